"""One update: summed loss and gradients of micro-batches, then the optimizer's step. Pure in (params, batch, key)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import mlx.core as mx

from runner.backends.cpu.block import view
from runner.common.errors import Diverged
from runner.models.forward import Forward
from runner.models.lora import AdaptedModel, Params
from runner.training import optimizer
from runner.training.dataloader import DeviceBatch
from runner.training.loss import loss_and_grads
from runner.training.optimizer import FlatArrays, FlatLayout
from runner.training.train_state import TrainState


class TrainStep:
    """The computation of an update, shared by all members of a run."""

    def __init__(
        self,
        adapted: AdaptedModel,
        forward: Forward,
        *,
        grad_clip: float | None,
        compiled: bool,
    ) -> None:
        self._adapted = adapted
        self._forward = forward
        self._grad_clip = grad_clip
        self._eager = not compiled
        self._loss_and_grads = mx.compile(self._differentiated) if compiled else self._differentiated

    def place(self, params: Params) -> None:
        """Put `params` into the model, for evaluation and generation."""
        self._adapted.place(params)

    def learn(self, member: TrainState, batches: Sequence[DeviceBatch], learning_rate: float) -> tuple[float, float]:
        """One optimizer update of `member` on the micro-batches, weighted by their supervised tokens.

        Returns:
            The summed loss over all supervised tokens and the norm of the mean gradient before clipping.

        Raises:
            Diverged: loss or gradient is not finite; the member is as it was before.
        """
        update = member.progress.step + 1
        by_mlx = self._forward.engine is None
        if by_mlx:
            self._adapted.model.train()
        loss_sum, total = 0.0, FlatArrays()
        for micro, ready in enumerate(batches):
            key = dropout_key(member.seed, update, micro)
            part, grads = self._of_batch(member.params, ready, key, member.optimizer.layout)
            total = {dtype: total[dtype] + g for dtype, g in grads.items()} if total else grads
            mx.eval(part, total)
            loss_sum += float(part)
        tokens = sum(ready.batch.supervised for ready in batches)
        mean, length = optimizer.clip_grads({dtype: g / tokens for dtype, g in total.items()}, self._grad_clip)
        norm = float(view(length))
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss_sum) else "gradient"
            raise Diverged(
                f"The {what} at update {update} is not finite (learning rate {learning_rate:g}); "
                "the update was not made."
            )
        member.params = member.optimizer.update(member.params, mean, learning_rate)
        if by_mlx:
            self.place(member.params)  # tracing left its own arrays in the model
            self._adapted.stream.begin(None)
        return loss_sum, norm

    def _of_batch(
        self, params: Params, ready: DeviceBatch, key: mx.array, layout: FlatLayout
    ) -> tuple[mx.array, FlatArrays]:
        """Summed loss and gradients of one micro-batch."""
        engine = self._forward.engine
        if engine is None:
            loss, grads = self._loss_and_grads(params, *ready.arrays(), key)
            return loss, layout.pack(grads)
        value, made = engine.loss_and_grads({name: view(array) for name, array in params.items()}, *ready.numbers())
        return mx.array(value), layout.pack_numpy(made)

    def _differentiated(
        self,
        params: Params,
        inputs: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array,
    ) -> tuple[mx.array, Params]:
        self._adapted.stream.begin(key)
        return loss_and_grads(self._forward, self.place, params, inputs, positions, targets, weights, eager=self._eager)


def dropout_seed(seed: int, update: int, micro: int) -> int:
    """64 bits that depend on (seed, update, micro-batch) alone."""
    return int.from_bytes(hashlib.blake2b(f"dropout {seed} {update} {micro}".encode(), digest_size=8).digest(), "big")


def dropout_key(seed: int, update: int, micro: int) -> mx.array:
    """The key of a micro-batch's dropout masks: two uint32, high and low."""
    return mx.random.key(dropout_seed(seed, update, micro))
