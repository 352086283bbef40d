"""The arrays of one Tinker datum per sequence, cut out of a Batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Batch


@dataclass(frozen=True, slots=True, eq=False)
class DatumArrays:
    """The arrays of one sequence of T positions: ``target_tokens[t]`` is predicted from ``model_input[:t + 1]``."""

    row: int  # of the batch it was cut from
    model_input: np.ndarray  # (T,) int64
    target_tokens: np.ndarray  # (T,) int64; before the first sampled token any value would do
    logprobs: np.ndarray  # (T,) float32, of the distribution that sampled the targets, 0 where mask is 0
    advantages: np.ndarray  # (T,) float32, 0 where mask is 0
    mask: np.ndarray  # (T,) float32, 1 where the policy chose the target


def datum_arrays(batch: Batch) -> list[DatumArrays]:
    """Return the rows of ``batch`` that have a sampled token, without padding, in the dtypes that Tinker takes.

    Nothing is shifted here: ``Batch.pack`` did that. Advantages are passed on unchanged; Tinker's losses
    are sums over tokens, so multiply them by ``batch.weights`` first to get the batch's aggregation.
    Source: the Tinker documentation on losses, whose arrays all share next-token alignment.
    """
    data = []
    for row, mask in enumerate(batch.weights != 0):
        if mask.any():
            end = int(np.flatnonzero(mask)[-1]) + 1
            sampled = mask[:end]
            data.append(
                DatumArrays(
                    row=row,
                    model_input=batch.inputs[row, :end].astype(np.int64),
                    target_tokens=batch.targets[row, :end].astype(np.int64),
                    logprobs=np.where(sampled, batch.logprobs[row, :end], 0).astype(np.float32),
                    advantages=np.where(sampled, batch.advantages[row, :end], 0).astype(np.float32),
                    mask=sampled.astype(np.float32),
                )
            )
    return data
