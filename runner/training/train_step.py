"""One optimizer update: gradients of micro-batches, weighted by tokens, clipped and applied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from runner.backends.protocol import Backend, BackendBatch
from runner.common.errors import NonFiniteUpdate
from runner.models.dropout import dropout_key
from runner.training import optimizer
from runner.training.methods.method import Method
from runner.training.methods.supervised import SupervisedMethod
from runner.training.optimizer import FlatArrays
from runner.training.train_state import TrainState, UpdateResult
from runner.training.world import ALONE, UpdateSums, World


class TrainStep:
    """Makes optimizer updates; the result depends on the train state, the batches and the learning rate alone."""

    def __init__(
        self, backend: Backend, *, grad_clip: float | None, method: Method | None = None, world: World = ALONE
    ) -> None:
        """`grad_clip`: largest norm of the mean gradient; None does not clip. `method`: None fine-tunes supervised."""
        self._backend, self._grad_clip, self._world = backend, grad_clip, world
        self._method = method or SupervisedMethod(backend)

    def update(self, state: TrainState, batches: Sequence[BackendBatch], learning_rate: float) -> UpdateResult:
        """Update the adapter and the optimizer of `state` on one update's micro-batches: this rank's share of them.

        Raises:
            NonFiniteUpdate: the loss or the gradient is not finite; `state` is unchanged.
            RankLost: another rank is gone; `state` is unchanged.
        """
        update = state.progress.step + 1
        weighed = self._method.weigh(state, batches)
        loss_sum, grad_sum = 0.0, FlatArrays()
        for index, micro_batch in enumerate(weighed.batches):
            key = dropout_key(state.seed, update, index, self._world.rank)
            loss, grads = self._backend.loss_and_grads(state.params, micro_batch, key)
            # Before anything is computed from them: together with their concatenation MLX evaluates the graph in an
            # order that recomputes the activations of many blocks at once, which took 1.7 times the memory.
            mx.eval(loss, grads)
            flat = state.optimizer.layout.flatten(grads)
            grad_sum = {name: grad_sum[name] + grad for name, grad in flat.items()} if grad_sum else flat
            mx.eval(grad_sum)
            loss_sum += float(loss)
        if not grad_sum:  # no rows of this rank, or nothing to learn from: every answer has the same reward
            grad_sum = {
                name: mx.zeros_like(value) for name, value in state.optimizer.layout.flatten(state.params).items()
            }
        sums = self._world.sum_update(UpdateSums(grad_sum, loss_sum, weighed.supervised, weighed.tokens))
        loss_sum = sums.loss if weighed.loss is None else weighed.loss * weighed.examples
        divisor = sums.supervised if weighed.loss is None else 1.0
        mean = {name: grad / divisor for name, grad in sums.arrays.items()}
        mean, norm_array = optimizer.clip_grads(mean, self._grad_clip)
        norm = float(norm_array)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss_sum) else "gradient"
            raise NonFiniteUpdate(
                f"The {what} at update {update} is not finite (learning rate {learning_rate:g}); "
                "the update was not applied."
            )
        state.params = state.optimizer.update(state.params, mean, learning_rate)
        if state.average is not None:
            state.average.add(state.params, update - state.progress.skipped_updates)
        return UpdateResult(
            loss_sum=loss_sum,
            supervised=sums.supervised,
            tokens=sums.tokens,
            examples=weighed.examples,
            measures=weighed.measures,
            grad_norm=norm,
        )
