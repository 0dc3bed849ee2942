"""Final norm, head and cross-entropy. The lanes divide the vocabulary: each reads its part of the head's weights once
for all positions, and what a position's other words add comes from the other lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.partitions import Partition
from runner.common.errors import ModelError


@dataclass(frozen=True)
class Targets:
    """What a batch is to predict, in the order of its positions, and which of it lies in a lane."""

    tokens: np.ndarray
    """(n,) int32."""
    weights: np.ndarray
    """(n,) float32, none of them zero."""
    mine: np.ndarray
    """(m,): which of the n the lane's positions predict, in rising order."""
    places: np.ndarray
    """(m,): where these lie among the lane's positions."""

    @classmethod
    def of(
        cls, positions: np.ndarray, targets: np.ndarray, weights: np.ndarray, vocabulary: int, lane: Partition
    ) -> Targets:
        """`positions` (n,) in the batch; those of weight 0 are left out.

        Raises:
            ModelError: a token is not in a vocabulary of so many.
        """
        wanted = np.flatnonzero(weights)
        if len(wanted) and not 0 <= targets[wanted].min() <= targets[wanted].max() < vocabulary:
            raise ModelError(
                f"The data hold token {targets[wanted].max()}, and the model has {vocabulary:,}: "
                "this is another model's tokenizer."
            )
        at, span = positions[wanted], lane.span
        mine = np.flatnonzero((at >= span.start) & (at < span.stop))
        return cls(targets[wanted], weights[wanted], mine, at[mine] - span.start)


class Head:
    """From the last block's output to the loss, and back."""

    def __init__(self, weight: np.ndarray, norm: tuple[np.ndarray, float], piece: int) -> None:
        """`weight`: (vocabulary, d); `norm`: weight (d,) and epsilon; `piece`: positions whose logits exist at once."""
        self.weight, self.norm, self.piece = weight, norm, piece

    def loss(self, x: np.ndarray, lane: Partition, targets: Targets, by_x: np.ndarray | None) -> np.float32:
        """The weighted sum of -log p(target), in the first lane, zero in the others; `x` (m, d) predicts `mine`.

        Its gradient by `x` is written to `by_x`, where that is given. All lanes take part at once.
        """
        loss = np.float32(0)
        for start in range(0, len(targets.tokens), self.piece):
            part = slice(start, start + self.piece)
            own = slice(*np.searchsorted(targets.mine, (part.start, part.stop)))
            loss += self._piece(
                x[own],
                lane,
                targets.mine[own] - start,
                targets.tokens[part],
                targets.weights[part],
                None if by_x is None else by_x[own],
            )
        return loss

    def _piece(
        self,
        x: np.ndarray,
        lane: Partition,
        mine: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray,
        by_x: np.ndarray | None,
    ) -> np.float32:
        norm, eps = self.norm
        count, work, common = len(tokens), lane.own, lane.common
        words = slice(len(self.weight) * lane.number // lane.count, len(self.weight) * (lane.number + 1) // lane.count)
        head = self.weight[words]
        normed, scale = work.get("head.own", *x.shape), work.get("head.scale", len(x), 1)
        lane.ops.rms_norm(x, norm, eps, normed, scale)
        everyone = common.get("head.normed", count, x.shape[1])
        everyone[mine] = normed
        lane.wait()
        logits = gemm(everyone, head.T, work.get("logits", count, len(head)))
        tops, sums = (common.get(f"head.{name}", lane.count, count) for name in ("tops", "sums"))
        np.max(logits, axis=1, out=tops[lane.number], initial=-np.inf)  # more lanes than words: none here
        lane.wait()
        top, own = tops.max(axis=0), common.get("head.target", count)
        here = np.flatnonzero((tokens >= words.start) & (tokens < words.stop))
        at = here, tokens[here] - words.start
        own[here] = logits[at] - top[here]
        lane.ops.exponentials(logits, top, sums[lane.number])
        lane.wait()
        total = sums.sum(axis=0)
        with np.errstate(all="ignore"):  # what is not finite shows in the loss
            loss = ((np.log(total) - own) * weights).sum(dtype=np.float32) if lane.number == 0 else np.float32(0)
            if by_x is not None:
                # Softmax less the target, times the sum of the exponentials: divided by it below, in fewer numbers.
                logits[at] -= total[here]
                parts = common.get("head.by_normed", lane.count, count, x.shape[1])
                gemm(logits, head, parts[lane.number])
                lane.wait()
                by_normed = parts[:, mine].sum(axis=0) * (weights / total)[mine, None]
                by_x[:] = 0
                lane.ops.rms_norm_back(x, norm, scale, by_normed, by_x)
        return loss
