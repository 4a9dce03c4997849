"""The error of `GlobalQSGD(check_replicas=)`: `gq_horovod.guards.replicas`."""

from .guards.replicas import ReplicaMismatchError

__all__ = ["ReplicaMismatchError"]
