"""Head and cross-entropy in chunks of supervised positions: the logits of all positions never exist at once.

Of the head's backward pass only the gradient by the hidden states is needed, and that by its own arrays where it is
trained. They are computed together with the loss while a chunk's logits exist, which are neither kept for the backward
pass nor computed again in it; Liger Kernel (Hsu et al., 2024) fuses linear layer and cross-entropy in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from runner.models.lora import Params
from runner.models.split_model import SplitModel


@dataclass(frozen=True, kw_only=True)
class ChunkedLoss:
    """The sum over supervised tokens of -log p(target), float32.

    Arguments of its methods: `inputs`, token ids (batch, length), and `states`, their hidden states after the frozen
    blocks or None; `positions`, `targets`, `weights` (n,), where positions are indices into the flattened
    (batch * length) and padding has weight 0.
    """

    split_model: SplitModel
    chunk: int
    """Positions whose logits exist at once."""
    all_positions: bool
    """Compute the head at every position, and pick the supervised ones from its logits."""
    head_params: tuple[str, ...] = ()
    """Names of the trained arrays that the head reads."""

    def __call__(
        self, inputs: mx.array, states: mx.array | None, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the loss without gradients, and what each position contributes to it, (n,)."""
        if not self._chunked:
            losses = self._in_one(inputs, states, positions, targets, weights)
            return losses.sum(), losses
        total, by_chunk = mx.array(0.0), []
        hidden = self._selected(inputs, states, positions)
        for start in range(0, len(targets), self.chunk):
            losses = self._chunk_losses(hidden, targets, weights, start)
            total = total + losses.sum()
            mx.eval(total, losses)  # nothing is differentiated here, so the chunk's logits are freed
            by_chunk.append(losses)
        return total, mx.concatenate(by_chunk)

    def until_first_evaluation(
        self, inputs: mx.array, states: mx.array | None, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> list[mx.array]:
        """Return what the loss without gradients evaluates first, at which its memory is at its peak."""
        if not self._chunked:
            losses = self._in_one(inputs, states, positions, targets, weights)
            return [losses.sum(), losses]
        hidden = self._selected(inputs, states, positions)
        losses = self._chunk_losses(hidden, targets, weights, 0)
        return [losses.sum(), losses, hidden]

    def loss_and_grads(
        self,
        place: Callable[[Params], None],
        params: Params,
        inputs: mx.array,
        states: mx.array | None,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
    ) -> tuple[mx.array, Params]:
        """Return the loss and its gradients by `params`, which `place` puts into the model.

        The model holds tracers afterwards: place its parameters again.
        """

        def surrogate(params: Params) -> tuple[mx.array, mx.array]:
            place(params)
            if not self._chunked:
                loss = self._in_one(inputs, states, positions, targets, weights).sum()
                return loss, loss
            hidden = self._selected(inputs, states, positions)
            own = {name: params[name] for name in self.head_params if name in params}
            stopped = mx.stop_gradient(hidden), {name: mx.stop_gradient(array) for name, array in own.items()}
            loss, grad_hidden, grads = self._chunks_with_grad(*stopped, place, targets, weights)
            if own:
                place(params)
            # A scalar whose gradient by the hidden states is `grad_hidden`: the backward pass begins with it.
            total = (hidden.astype(mx.float32) * grad_hidden.astype(mx.float32)).sum()
            for name, array in own.items():
                total = total + (array * mx.stop_gradient(grads[name])).sum()
            return total, mx.stop_gradient(loss)

        (_, loss), grads = mx.value_and_grad(surrogate)(params)
        return loss, grads

    @property
    def _chunked(self) -> bool:
        return self.split_model.has_separate_head and not self.all_positions

    def _selected(self, inputs: mx.array, states: mx.array | None, positions: mx.array) -> mx.array:
        hidden = self.split_model.hidden(inputs, states)
        return hidden.reshape(-1, hidden.shape[-1])[positions]

    def _chunk_losses(self, hidden: mx.array, targets: mx.array, weights: mx.array, start: int) -> mx.array:
        part = slice(start, start + self.chunk)
        return token_losses(self.split_model.head(hidden[part]), targets[part], weights[part])

    def _in_one(
        self, inputs: mx.array, states: mx.array | None, positions: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        logits = self.split_model.logits(inputs, states)
        return token_losses(logits.reshape(-1, logits.shape[-1])[positions], targets, weights)

    def _chunks_with_grad(
        self,
        hidden: mx.array,
        own: Params,
        place: Callable[[Params], None],
        targets: mx.array,
        weights: mx.array,
    ) -> tuple[mx.array, mx.array, Params]:
        """Return the loss, its gradient by `hidden` (n, hidden_size), and those by `own`, arrays of the head."""
        total = mx.array(0.0)
        grads: list[mx.array] = []
        sums = {name: mx.zeros_like(array) for name, array in own.items()}

        def head(h: mx.array, *arrays: mx.array) -> mx.array:
            if own:
                place(dict(zip(own, arrays, strict=True)))
            return self.split_model.head(h)

        for start in range(0, len(targets), self.chunk):
            part = slice(start, start + self.chunk)
            h, t, w = hidden[part], targets[part], weights[part]
            # MLX evaluates a graph in an order of its own, and all chunks' logits could exist at once: each chunk waits
            # for the one before it.
            h = mx.depends(h, [total, grads[-1]]) if start else h
            loss, grad_logits = cross_entropy_and_grad(head(h, *own.values()), t, w)
            grad, *own_grads = mx.vjp(head, [h, *own.values()], [grad_logits])[1]
            total = total + loss
            grads.append(grad)
            sums = {name: sums[name] + g for name, g in zip(own, own_grads, strict=True)}
        return total, mx.concatenate(grads), sums


def cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the sum of `token_losses`."""
    return token_losses(logits, targets, weights).sum()


def token_losses(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return weight times -log softmax(logits)[target], (n,); logits (n, vocabulary), targets and weights (n,)."""
    return nn.losses.cross_entropy(logits, targets) * weights


def cross_entropy_and_grad(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """Return `cross_entropy` and its gradient by the logits, (softmax(logits) - one_hot(target)) * weight.

    MLX's own differentiation of it takes about twice the passes over the logits.
    """
    targets = targets[:, None]
    log_sum = mx.logsumexp(logits, axis=-1, keepdims=True)
    target_logit = mx.take_along_axis(logits, targets, axis=-1)
    loss = ((log_sum - target_logit)[:, 0] * weights).sum()
    grad_at_target = mx.exp(target_logit - log_sum) - 1.0
    grad = mx.put_along_axis(mx.exp(logits - log_sum), targets, grad_at_target, axis=-1) * weights[:, None]
    return loss, grad
