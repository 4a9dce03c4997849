"""error_feedback: what a rank's codes leave out of its gradient is added to its next one.

Seide, Fu, Droppo, Li and Yu, "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy,
Rebjock, Stich and Jaggi, "Error feedback fixes SignSGD", arXiv 1901.09847. In step t of a tensor,
of a rank's gradient g and its residual e, which begins at zero:

    x_t = g_t + e_t                 by whoever makes the task, in the gradient's dtype
    d_t = decode(quantize(x_t))     by the norms of all ranks, to the nearest level (`Plan.nearest`)
    e_{t+1} = x_t - d_t             here, as soon as a parcel is quantized

So Σ d_t = Σ g_t - e_{T+1}, but for rounding in that dtype. What the mean loses when it is rounded
once more (two-hop levels) is not part of it: that rounding has a dither, and is unbiased.

A residual follows the gradient alone: results are decoded from codes as ever, the same on every
rank.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops.codec import Payload
from mpi_ops.kernels.interface import Tensors
from mpi_ops.layout import Parcel
from mpi_ops.stages import Stages


class Feedback(Protocol):
    """The residuals of a bucket's tensors, where these lie."""

    residuals: Tensors  # memory for them: as many elements as x has, of its dtype

    def subtract(self, tensor: int, start: int, stop: int, norms: NDArray[np.int32]) -> None:
        """Replace what codes stand for, in a part of a residual, by what they leave out of x.

        Or by zeros, where one of the `norms` of all ranks is not finite. They are the tensor's.
        """


def keep(
    feedback: Feedback,
    own: Stages,
    x: Tensors,
    parcel: Parcel,
    norms: NDArray[np.int32],
    codes: Payload,
) -> None:
    """Write what a parcel's codes leave out of `x` to its residuals.

    That of a tensor with a norm that is NaN or Inf, on any rank, becomes zero: its gradient is lost
    in this step, and with it the residual that was added. On a GPU nothing waits for any of it.
    """
    own.decode_own(parcel, codes, norms, feedback.residuals)
    ends = [*own.layout.norm_places[1:], own.layout.norm_count]
    for piece in parcel.pieces:
        if x.pointers[piece.tensor] == 0:  # this rank has none, and what is left stays
            continue
        span = slice(own.layout.norm_places[piece.tensor], ends[piece.tensor])
        feedback.subtract(piece.tensor, piece.start, piece.stop, norms[span])
