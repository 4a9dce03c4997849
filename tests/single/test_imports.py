"""What the packages import: nothing heavy, one way only, and a clear error where it is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "tf_keras", "horovod"}
# Whoever imports these waits for them, or starts MPI or a GPU.
HEAVY = (*sorted(FRAMEWORKS), "mpi4py.MPI", "cupy")
# Whoever imports these wants MPI; see test_no_import_calls_mpi.
STARTING_MPI = {
    *("gq_horovod/path/mpi.py", "mpi_ops/exchange.py", "mpi_ops/op.py", "mpi_ops/reduction.py"),
    *("mpi_ops/lifetime.py", "mpi_ops/kernels/device.py"),
}
# Everything but what belongs to a framework.
WITH_FRAMEWORK = ("torch", "tensorflow", "torch_baselines", "power_sgd", "replayed")
LIGHT = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted([*(ROOT / "gq_horovod").rglob("*.py"), *(ROOT / "mpi_ops").rglob("*.py")])
    if not {*path.relative_to(ROOT).with_suffix("").parts} & {*WITH_FRAMEWORK, "__main__"}
    and path.relative_to(ROOT).as_posix() not in STARTING_MPI
]


def python(code: str) -> str:
    """Output of code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_are_light() -> None:
    """One interpreter for all modules: what one of them loads stays loaded."""
    code = "import sys, importlib\n"
    code += f"for module in {LIGHT}:\n"
    code += "    importlib.import_module(module)\n"
    code += f"    print(module, [name for name in {HEAVY} if name in sys.modules])\n"
    assert python(code).splitlines() == [f"{module} []" for module in LIGHT]


def test_what_mpi_ops_offers_is_looked_up_when_it_is_asked_for() -> None:
    code = "import sys, mpi4py, mpi_ops\nmpi4py.rc.initialize = False\n"
    code += "print('mpi4py.MPI' in sys.modules, set(mpi_ops.__all__) <= set(dir(mpi_ops)))\n"
    code += "print(mpi_ops.chain_headroom(8), callable(mpi_ops.exponential_sum))\n"
    code += "print('mpi4py.MPI' in sys.modules, hasattr(mpi_ops, 'allreduces'))"
    assert python(code).split() == ["False", "True", "7", "True", "True", "False"]


# All but the kernels of GPUs, which need CuPy.
PARTS = [path for path in (ROOT / "mpi_ops").rglob("*.py") if path.name != "device.py"]
NOT_STARTING = [
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(PARTS)),
    *(
        "gq_horovod.advisor.calibrate",
        "gq_horovod.cli",
        "gq_horovod.advisor.doctor",
        "gq_horovod.path.mpi",
    ),
]
IMPORTED_FIRST = """
import importlib, mpi4py
mpi4py.rc.initialize = False
for module in {modules}:
    importlib.import_module(module)
from mpi4py import MPI
print(MPI.Is_initialized())
{then}
"""


def test_no_import_calls_mpi() -> None:
    """Which aborts a program that starts MPI itself, after its imports (mpi4py.rc.initialize)."""
    assert {"mpi_ops.reduction", "mpi_ops.op", "mpi_ops.exchange"} < set(NOT_STARTING)
    assert python(IMPORTED_FIRST.format(modules=NOT_STARTING, then="")).strip() == "False"


def test_a_call_of_mpi_before_its_start_is_noticed() -> None:
    with pytest.raises(AssertionError, match="before"):
        python(IMPORTED_FIRST.format(modules=[], then="MPI.COMM_WORLD.Get_rank()"))


def test_the_check_for_light_imports_sees_heavy_ones() -> None:
    code = "import sys, mpi4py\nmpi4py.rc.initialize = False\nimport mpi4py.MPI\n"
    code += f"print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "['mpi4py.MPI']"


# ---------------------------------------------------------------------------------------- direction


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names of the modules that a module of `package` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = [] if node.level == 0 else parents
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*base, name]) for name in names)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


# The rooms, and what each may import of the others. Frameworks are for those that say so.
ROOMS = {
    "mpi_ops": set[str](),
    "log": {"mpi_ops"},
    "path": {"mpi_ops", "log"},
    "guards": {"mpi_ops", "log", "path"},
    "frontend": {"mpi_ops", "log", "path", "guards"},
    "torch": {"mpi_ops", "log", "path", "guards", "frontend", "framework"},
    "tensorflow": {"mpi_ops", "log", "path", "guards", "frontend", "framework"},
    "advisor": {"mpi_ops", "log", "path"},
    "research": {"mpi_ops", "log", "path", "guards", "advisor"},
    "cli": {"mpi_ops", "log", "path", "advisor", "research"},
}
# One module of a room of its own, where the room may not.
EXCEPTIONS = {
    # They measure training steps, and import what they measure when they run.
    "gq_horovod.advisor.calibrate": {"torch", "framework"},
    "gq_horovod.advisor.replayed": {"framework"},
    "gq_horovod.advisor.doctor": {"framework"},
    **{
        f"gq_horovod.research.{name}": {"torch", "framework", "frontend"}
        for name in ("torch_baselines", "power_sgd")
    },
}
# Public names of what is inside, for users; nobody here imports them.
PUBLIC = {"stats": "guards", "replicas": "guards", "torch_baselines": "research", "__main__": "cli"}


def room(module: str) -> str | None:
    """Where a module belongs; None: to nobody (the standard library, NumPy, ...)."""
    first, *rest = module.split(".")
    if first in FRAMEWORKS:
        return "framework"
    if first != "gq_horovod":
        return first if first == "mpi_ops" else None
    # gq_horovod itself has a version, and imports nothing.
    return rest[0] if rest and rest != ["__version__"] else None


@pytest.mark.parametrize(
    "path",
    [*modules("mpi_ops"), *modules("gq_horovod")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__init__")
    package = ".".join(parts[:-1])
    own = room(module)
    found = {room(name) for name in imported(path.read_text(), package)} - {None, own}
    if own is None:
        allowed = set[str]()
    elif own in PUBLIC:
        allowed = {PUBLIC[own]}
    else:
        allowed = ROOMS[own] | EXCEPTIONS.get(module, set())
    assert found <= allowed, f"{module} imports {sorted(found - allowed)}"


def test_a_training_step_loads_no_advisor_and_no_laboratory() -> None:
    """Nor anything that it draws with. With every option that adds something."""
    code = "import sys, gq_horovod.torch as plugin\n"
    code += "plugin.GlobalQSGD(stats=True, check_replicas=5, levels='auto')\n"
    code += "print(*sys.modules)"
    loaded = python(code).split()
    ours = {room(name) for name in loaded} - {None}
    assert ours == {"mpi_ops", "log", "path", "guards", "frontend", "torch", "framework"}
    assert not {"matplotlib", "scipy", "rich", "typer", "click", "argparse_manpage"} & {*loaded}


def test_kernels_know_nothing_above_them() -> None:
    for path in modules("mpi_ops/kernels"):
        names = set(imported(path.read_text(), "mpi_ops.kernels"))
        own = {name for name in names if name.startswith("mpi_ops")}
        assert own <= {
            "mpi_ops.lanes",
            *(f"mpi_ops.kernels.{own}" for own in ("interface", "host", "threads", "code_cache")),
        }


def test_the_scan_finds_every_form_of_import() -> None:
    source = """
import torch.nn as nn
from tensorflow import keras
from .config import Plan
from .. import lanes
from ..lanes import ROW
def later():
    import horovod.torch
"""
    assert list(imported(source, "mpi_ops.kernels")) == [
        *("torch.nn", "tensorflow", "mpi_ops.kernels.config", "mpi_ops.lanes", "mpi_ops.lanes"),
        "horovod.torch",
    ]


# ---------------------------------------------------------------------------------- what is missing

BLOCKED = """
import sys, types

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
for name in {present}:
    sys.modules[name] = types.ModuleType(name)
try:
    import gq_horovod.torch
except ImportError as error:
    print(type(error).__name__, type(error.__cause__).__name__, error, sep="\\n")
"""


def test_without_torch_the_error_says_so() -> None:
    kind, cause, text = python(BLOCKED.format(blocked="torch", present=())).strip().split("\n")
    assert (kind, cause) == ("ImportError", "ModuleNotFoundError")
    assert text == (
        "gq_horovod.torch: PyTorch is not installed; `pip install 'gq-horovod[torch]'`, or import "
        "GlobalQSGD from the module of the framework that you use."
    )


def test_without_horovod_the_error_says_so() -> None:
    code = BLOCKED.format(blocked="horovod", present=("torch",))
    kind, cause, text = python(code).strip().split("\n")
    assert (kind, cause) == ("ImportError", "ModuleNotFoundError")
    assert text == (
        "gq_horovod.torch: Horovod with PyTorch support is not installed; build it with "
        "HOROVOD_WITH_PYTORCH=1 (its `horovodrun --check-build` shows what it has)."
    )


def test_horovod_without_torch_support_is_the_same_error() -> None:
    """Its packages are there then, but their native library is not."""
    code = BLOCKED.format(blocked="nothing", present=("torch", "horovod", "horovod.torch"))
    assert "Horovod with PyTorch support is not installed" in python(code)


def test_without_the_kernel_library_the_error_says_so() -> None:
    code = """
from pathlib import Path
from mpi_ops.kernels import host
host._LIBRARY = Path("/nowhere/libgq_kernels.so")
try:
    host.best_instruction_set()
except ImportError as error:
    print(error)
"""
    text = python(code)
    assert text.startswith("mpi_ops: the kernel library libgq_kernels.so is not beside ")
    assert "`make build`" in text
