"""Global-QSGD gradient compression for Horovod (arXiv 2305.18627).

Import the class from the module of your framework:

    from gq_horovod.torch import GlobalQSGD
    opt = hvd.DistributedOptimizer(opt, named_parameters=..., compression=GlobalQSGD)

Importing this package imports no framework and starts no MPI.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gq-horovod")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "unknown"
