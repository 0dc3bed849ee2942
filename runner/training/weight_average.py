"""Weight averaging: the mean of an adapter's weights over the updates so far.

With a learning rate that does not fall, the weights move around a better point than the one where they stop, and so
does their loss. Their mean is near that point at any step, without knowing the length of the run.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from runner.checkpoints.safetensors_file import Tensor
from runner.training.optimizer import FlatArrays, FlatLayout


class WeightAverage:
    """The mean of the weights after each update, later ones weighted more.

    Those after update t weigh t (t + 1) … (t + power - 1), about t**power: polynomial-decay averaging of Shamir and
    Zhang, "Stochastic gradient descent for non-smooth optimization" (2013), section 4. The mean is about
    1 / (power + 2) of the run behind its end.
    """

    def __init__(self, power: float, layout: FlatLayout) -> None:
        """Prepare a mean of nothing; `power` 0 weighs all updates alike. `layout`: of the weights."""
        self._power, self._layout = power, layout
        self.vectors: FlatArrays | None = None
        """The mean, float32; None before the first update."""

    def add(self, params: Mapping[str, mx.array], update: int) -> None:
        """Add the weights after `update`, counted from 1 without those that were skipped."""
        weights = {key: vector.astype(mx.float32) for key, vector in self._layout.flatten(params).items()}
        if self.vectors is not None:
            share = (self._power + 1) / (update + self._power)
            weights = {key: mean + (weights[key] - mean) * share for key, mean in self.vectors.items()}
        mx.eval(weights)
        self.vectors = weights

    def params(self) -> dict[str, mx.array] | None:
        """Return the mean by the names of its arrays; None before the first update."""
        return None if self.vectors is None else self._layout.unflatten(self.vectors)

    def tensors(self) -> dict[str, Tensor] | None:
        """Return the mean as tensors for a checkpoint file, as views of its memory; None before the first update.

        Raises:
            NonFiniteArray: names an array with NaN or Inf.
        """
        return None if self.vectors is None else self._layout.tensors(self.vectors)

    def restore(self, params: Mapping[str, mx.array] | None) -> None:
        """Replace the mean by a saved one."""
        self.vectors = None if params is None else self._layout.flatten(params)
