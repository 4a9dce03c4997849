"""Build the native kernels: one small shared library, without the Python C API.

`ctypes` loads it, so one wheel per platform serves every Python 3. All other packaging data is in
pyproject.toml.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("mpi_ops/kernels")
# The flags are part of the arithmetic: no contraction into fused multiply-add, so that every CPU
# and the GPU give the same bytes. The -Wno- silence notes about vector types that never leave a
# file, GCC's false positives in its own intrinsics and in unrolled loops, and that clang does not
# know these.
FLAGS = [
    *["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    *["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"],
    *["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"],
]
# No -march=native: host.cpp is compiled once for each of these, and isa.cpp chooses at run time.
BASELINE = {"baseline": []}
X86_64 = {
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


class BuildKernels(build_ext):
    """Compile with exactly FLAGS, instead of those that the Python interpreter was built with."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp) / "kernels"
        objects.mkdir(parents=True, exist_ok=True)

        x86_64 = platform.machine().lower() in ("x86_64", "amd64")
        isas = {**BASELINE, **(X86_64 if x86_64 else {})}
        steps = {
            objects / f"{isa}.o": [*flags, f"-DGQ_ISA={isa}", "-c", str(KERNELS / "host.cpp")]
            for isa, flags in isas.items()
        }
        define = [f'-DGQ_FINGERPRINT="{fingerprint()}"', *(["-DGQ_X86_64"] if x86_64 else [])]
        steps[objects / "isa.o"] = [*define, "-c", str(KERNELS / "isa.cpp")]
        steps[objects / "threads.o"] = ["-pthread", "-c", str(KERNELS / "threads.cpp")]
        compile_all([[*FLAGS, *step, "-o", str(output)] for output, step in steps.items()])

        # Linked beside the target and renamed: a process that has the old library loaded keeps it.
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        compile_all([["-shared", "-pthread", *map(str, steps), "-o", str(fresh)]])
        fresh.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no interpreter tag: any Python loads it

    def copy_extensions_to_source(self) -> None:
        # The inherited copy writes into the library in place, under a process that has it loaded.
        for ext in self.extensions:
            target = Path(self.get_ext_filename(ext.name))
            fresh = target.with_name(f"{target.name}.{os.getpid()}")
            self.copy_file(os.path.join(self.build_lib, target), str(fresh))
            fresh.replace(target)


def fingerprint() -> str:
    """Of what decides the arithmetic: ranks whose libraries differ here may get other bytes."""
    digest = hashlib.blake2b(" ".join(FLAGS).encode(), digest_size=8)
    for path in sorted(path for kind in ("h", "cpp", "cu") for path in KERNELS.glob(f"*.{kind}")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class PlatformWheel(bdist_wheel):
    """Tag py3-none-PLATFORM: native code, but for no particular interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_all(commands: list[list[str]]) -> None:
    """Run the compiler with each list of arguments, all at the same time."""
    found = filter(None, map(shutil.which, ("g++", "c++", "clang++")))
    compiler = shlex.split(os.environ.get("CXX") or next(found, "g++"))
    running = []
    for arguments in commands:
        logging.info(shlex.join([*compiler, *arguments]))
        try:
            running.append(subprocess.Popen([*compiler, *arguments]))
        except FileNotFoundError:
            raise SystemExit(
                f"gq-horovod: the C++ compiler `{compiler[0]}` was not found; install g++ "
                "(11 or newer) or set CXX to a C++17 compiler."
            ) from None
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit(
            "gq-horovod: compiling the kernels failed; the compiler's messages are above. "
            "It takes C++17: g++ 11 or newer, or clang++ 14."
        )


setup(
    ext_modules=[Extension("mpi_ops.kernels.libgq_kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
