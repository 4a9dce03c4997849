"""Which tensors are reduced together: the same on every rank, from what every rank knows.

It knows no framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mpi_ops.scheme import Plan

# Bytes of gradients that are reduced together. Smaller ones cost more operations, larger ones wait
# longer for their last gradient (benchmarks/many_tensors.py). With many ranks they grow where each
# rank has messages with every other one, whose number no larger operation of Horovod's saves: it
# fuses Allreduces only.
SMALLEST_LIMIT = 8 << 20
LIMIT_PER_RANK = 512 << 10
# Of the first one, which fills first: communication begins early.
DEFAULT_FIRST_BUCKET_BYTES = 1 << 20

# HOROVOD_CACHE_CAPACITY that is enough for the names of all but the largest models: one for each
# parameter, three for each bucket, and what else a program calls.
REMEDY_CAPACITY = 8192


def default_limit(plan: Plan) -> int:
    """Bytes of tensors with this plan that are reduced together, unless the options say so."""
    return max(SMALLEST_LIMIT, 0 if plan.in_flight else LIMIT_PER_RANK * plan.world_size)


def cut(sizes: Sequence[int], first: int, limit: int) -> list[range]:
    """Buckets of tensors that follow each other: the places of each bucket's.

    Arguments:
        sizes: bytes of each tensor.
        first: bytes from which on the first bucket takes no further tensor.
        limit: the same of all others. 0: each tensor by itself.
    """
    buckets: list[range] = []
    begin = filled = 0
    for place, size in enumerate(sizes):
        most = limit if buckets else min(first, limit)
        if place > begin and filled + size > most:
            buckets.append(range(begin, place))
            begin, filled = place, 0
        filled += size
    if len(sizes) > begin:
        buckets.append(range(begin, len(sizes)))
    return buckets


def name_of(names: Sequence[str], described: object) -> str:
    """The name of a bucket's operations: the same on ranks that have the same members.

    Arguments:
        names: of its tensors.
        described: what else has to be the same of them.

    A bucket of one has the name of its tensor.
    """
    if len(names) == 1:
        return names[0]
    digest = hashlib.blake2b(repr((names, described)).encode(), digest_size=4).hexdigest()
    return f"{names[0]}+{len(names) - 1}.{digest}"
