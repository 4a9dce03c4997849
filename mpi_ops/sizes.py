"""How large things are: the payload of a number of elements, and the share of it that a rank has.

A *payload* is what travels: int32 words of lanes (standard and two-hop levels) or bytes of codes
(exponential levels), in whole rows. Where codes cannot be added on their way, each rank reduces one
*share* of all ranks' payloads: as many whole *units* for every rank, the last ones filled up with
zeros.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import lanes
from .kernels.interface import INT32, UINT8
from .scheme import Plan


def payload_dtype(plan: Plan) -> np.dtype[Any]:
    """Element type of a payload."""
    return UINT8 if plan.levels == "exponential" else INT32


def payload_size(count: int, plan: Plan) -> int:
    """Elements of the payload of `count` elements."""
    if plan.levels == "exponential":
        return lanes.exponential_bytes(count, plan.bits)
    return lanes.standard_words(count, plan.bits)


def row_elements(plan: Plan) -> int:
    """Elements that a row of the payload stands for."""
    return lanes.ROW * (8 * payload_dtype(plan).itemsize // plan.bits)


def share_unit(plan: Plan) -> int:
    """Elements that shares are made of.

    Whole rows of the payload; where shares are rounded, also whole groups of random numbers; and
    whole blocks where a share has norms of its own.
    """
    unit = row_elements(plan)
    if not plan.in_flight:
        unit = math.lcm(unit, lanes.GROUP)
    if plan.levels == "two-hop":
        unit = math.lcm(unit, plan.block_size or lanes.ROW)
    return unit


def share_elements(count: int, plan: Plan) -> int:
    """Elements whose codes each of plan.world_size ranks reduces: the same for all."""
    unit = share_unit(plan)
    return -(-count // (unit * plan.world_size)) * unit


def shard_size(count: int, plan: Plan) -> int:
    """Payload elements that each of plan.world_size ranks reduces."""
    return share_elements(count, plan) // row_elements(plan) * lanes.ROW


def share_norms(count: int, plan: Plan) -> int:
    """Norms that a reduced share of `count` elements brings with it."""
    if plan.levels != "two-hop":
        return 0
    share = share_elements(count, plan)
    return lanes.blocks(share, plan.block_for(share))


def reduced_size(count: int, plan: Plan) -> int:
    """Payload elements of a reduced share: its norms, if it has its own, and its codes."""
    return share_norms(count, plan) + shard_size(count, plan)
