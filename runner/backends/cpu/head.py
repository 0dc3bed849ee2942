"""Final norm, head and cross-entropy. The partitions divide the vocabulary: each reads its part of the head's weights
once for all positions and exchanges the maxima, sums and gradients of the positions with the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.partitions import PackedBatch, Partition
from runner.common.errors import ModelError

_NONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Targets:
    """The n supervised tokens of a batch, in the order of their positions, and which m of them a partition has."""

    tokens: np.ndarray
    """(n,) int32."""
    weights: np.ndarray
    """(n,) float32, none of them zero."""
    indices: np.ndarray
    """(m,): which of the n are in the partition, ascending."""
    positions: np.ndarray
    """(m,): their positions, counted from the partition's first."""

    @classmethod
    def of_partition(cls, batch: PackedBatch, part: Partition, vocabulary: int) -> Targets:
        """Return the targets of `batch` in a partition, those of weight 0 left out.

        Raises:
            ModelError: a token is outside the vocabulary.
        """
        supervised = np.flatnonzero(batch.weights)
        tokens, positions, span = batch.targets[supervised], batch.positions[supervised], part.span
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise ModelError(
                f"The data contains token {tokens.max()}, but the model's vocabulary has {vocabulary:,} "
                "tokens: it was tokenized for another model."
            )
        indices = np.flatnonzero((positions >= span.start) & (positions < span.stop))
        return cls(tokens, batch.weights[supervised], indices, positions[indices] - span.start)


class Head:
    """Computes the loss from the last block's output, and its gradient by that output."""

    def __init__(self, weight: np.ndarray, norm: tuple[np.ndarray, float], chunk: int, ops: Ops) -> None:
        """`weight`: (vocabulary, d); `norm`: weight (d,) and epsilon; `chunk`: positions whose logits exist at once."""
        self.weight, self.norm, self.chunk, self._ops = weight, norm, chunk, ops

    def loss(
        self,
        x: np.ndarray,
        part: Partition,
        targets: Targets,
        grad_x: np.ndarray | None,
        by_token: np.ndarray | None = None,
    ) -> np.float32:
        """Return the weighted sum of -log p(target) in the first partition, and zero in the others.

        `x` (m, d) are the last block's outputs at the partition's targets; the gradient by `x` is written to `grad_x`,
        and what each target contributes to the loss to `by_token` (n,), unless these are None. All partitions have to
        call this at the same time.
        """
        loss = np.float32(0)
        for start in range(0, len(targets.tokens), self.chunk):
            chunk = slice(start, start + self.chunk)
            inside = slice(*np.searchsorted(targets.indices, (chunk.start, chunk.stop)))
            losses = self._chunk_losses(
                x[inside],
                part,
                targets.indices[inside] - start,
                targets.tokens[chunk],
                targets.weights[chunk],
                None if grad_x is None else grad_x[inside],
            )
            if part.index == 0:
                with np.errstate(all="ignore"):  # a value that is not finite shows in the loss
                    loss += losses.sum(dtype=np.float32)
                if by_token is not None:
                    by_token[chunk] = losses
        return loss

    def _chunk_losses(
        self,
        x: np.ndarray,
        part: Partition,
        indices: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray,
        grad_x: np.ndarray | None,
    ) -> np.ndarray:
        """Return the losses of the targets of one chunk, in partitions other than the first none of them.

        `indices` (m,): which of the chunk's targets are in the partition, as rows of `x`.
        """
        norm_weight, eps = self.norm
        count, work, shared, vocabulary = len(tokens), part.local, part.shared, len(self.weight)
        share = slice(vocabulary * part.index // part.count, vocabulary * (part.index + 1) // part.count)
        weight = self.weight[share]
        normed, scale = work.buffer("head.local", *x.shape), work.buffer("head.scale", len(x), 1)
        self._ops.rms_norm(x, norm_weight, eps, normed, scale)
        all_normed = shared.buffer("head.normed", count, x.shape[1])
        all_normed[indices] = normed
        part.synchronize()
        logits = gemm(all_normed, weight.T, work.buffer("logits", count, len(weight)))
        maxima, sums = (shared.buffer(f"head.{name}", part.count, count) for name in ("maxima", "sums"))
        # The initial value is that of a partition without tokens, where there are more threads than tokens.
        np.max(logits, axis=1, out=maxima[part.index], initial=-np.inf)
        part.synchronize()
        maximum, target_logits = maxima.max(axis=0), shared.buffer("head.target", count)
        in_share = np.flatnonzero((tokens >= share.start) & (tokens < share.stop))
        target_logit_at = in_share, tokens[in_share] - share.start
        target_logits[in_share] = logits[target_logit_at] - maximum[in_share]
        self._ops.exp_minus_max(logits, maximum, sums[part.index])
        part.synchronize()
        total = sums.sum(axis=0)
        with np.errstate(all="ignore"):
            losses = (np.log(total) - target_logits) * weights if part.index == 0 else _NONE
            if grad_x is not None:
                # Softmax minus target, times the sum of exponentials; dividing by it after the product touches fewer
                # numbers.
                logits[target_logit_at] -= total[in_share]
                grads = shared.buffer("head.grad_normed", part.count, count, x.shape[1])
                gemm(logits, weight, grads[part.index])
                part.synchronize()
                grad_normed = grads[:, indices].sum(axis=0) * (weights / total)[indices, None]
                grad_x[:] = 0
                self._ops.rms_norm_backward(x, norm_weight, scale, grad_normed, grad_x)
        return losses
