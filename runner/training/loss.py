"""Head and cross-entropy, where a token is supervised, in pieces: logits of all positions never exist at once.

The head is frozen, so the gradient of the hidden states is all that training needs of it. It is made together with
the loss, while a piece's logits are there: they are neither kept for the backward pass nor computed again in it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from runner.cpu import cross_entropy
from runner.models.forward import Forward


def loss_sum(
    forward: Forward,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    eager: bool = True,
) -> mx.array:
    """Sum over supervised tokens of -log p(target), float32; padding positions have weight 0.

    `inputs` as in `Forward.logits`; positions, targets, weights (n,). `eager`: not while a compilation traces. It has
    no gradients: see `surrogate`.
    """
    if not forward.split or forward.everywhere:
        return _summed(forward.logits(inputs, positions), targets, weights)
    hidden = forward.selected(inputs, positions)
    return _in_pieces(forward, hidden, targets, weights, gradient=False, eager=eager)[0]


def surrogate(
    forward: Forward,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    eager: bool = True,
) -> tuple[mx.array, mx.array]:
    """A scalar with the gradients of the summed loss, and the summed loss itself, which has none.

    With g the loss's gradient by the hidden states h, held fixed, sum(h * g) has exactly g as its own.
    """
    if not forward.split or forward.everywhere:
        loss = _summed(forward.logits(inputs, positions), targets, weights)
        return loss, loss
    hidden = forward.selected(inputs, positions)
    fixed = mx.stop_gradient(hidden)
    loss, gradient = _in_pieces(forward, fixed, targets, weights, gradient=True, eager=eager)
    assert gradient is not None
    return (hidden.astype(mx.float32) * gradient.astype(mx.float32)).sum(), mx.stop_gradient(loss)


def _in_pieces(
    forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array, *, gradient: bool, eager: bool
) -> tuple[mx.array, mx.array | None]:
    total, gradients = mx.array(0.0), []
    for start in range(0, len(targets), forward.piece):
        part = slice(start, start + forward.piece)
        h, t, w = hidden[part], targets[part], weights[part]
        if gradient:
            loss, made = _with_gradient(forward, h, t, w, eager)
            gradients.append(made)
        else:
            loss = _loss(forward, h, t, w, eager)
        total = total + loss
        if eager:
            mx.eval(total, *gradients[-1:])  # else allocation runs ahead, and every piece's logits exist at once
    return total, mx.concatenate(gradients) if gradient else None


def _with_gradient(
    forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array, eager: bool
) -> tuple[mx.array, mx.array]:
    if not (eager and cross_entropy.usable()):
        return mx.value_and_grad(lambda h: _summed(forward.head(h), targets, weights))(hidden)
    losses, by_logits = cross_entropy.cross_entropy(forward.head(hidden), targets, weights)
    return losses, mx.vjp(forward.head, [hidden], [by_logits])[1][0]


def _loss(forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array, eager: bool) -> mx.array:
    if not (eager and cross_entropy.usable()):
        return _summed(forward.head(hidden), targets, weights)
    return cross_entropy.cross_entropy(forward.head(hidden), targets, weights, gradient=False)[0]


def _summed(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    return (nn.losses.cross_entropy(logits, targets) * weights).sum()
