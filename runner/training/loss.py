"""Head and cross-entropy, where a token is supervised, in pieces: logits of all positions never exist at once.

The head is frozen, so the gradient of the hidden states is all that training needs of it. It is made together with
the loss, while a piece's logits are there: they are neither kept for the backward pass nor computed again in it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.cpu import cross_entropy
from runner.backends.cpu.block import view
from runner.models.device import on_cpu
from runner.models.forward import Forward
from runner.models.lora import Params


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
    no gradients: see `loss_and_grads`.
    """
    if not forward.split or forward.everywhere:
        return _summed(forward.logits(inputs, positions), targets, weights)
    hidden = forward.selected(inputs, positions)
    return _in_pieces(forward, hidden, targets, weights, gradient=False, eager=eager)[0]


def loss_and_grads(
    forward: Forward,
    place: Callable[[Params], None],
    params: Params,
    inputs: mx.array,
    positions: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    eager: bool = True,
) -> tuple[mx.array, Params]:
    """The summed loss as in `loss_sum`, and its gradients by `params`, which `place` puts into the model.

    The model holds arrays of the differentiation's own afterwards: place what it is to have.
    """

    def hidden_of(params: Params) -> mx.array:
        place(params)
        return forward.selected(inputs, positions)

    def whole(params: Params) -> tuple[mx.array, mx.array]:
        place(params)
        loss = _summed(forward.logits(inputs, positions), targets, weights)
        return loss, loss

    def in_pieces(params: Params) -> tuple[mx.array, mx.array]:
        hidden = hidden_of(params)
        loss, gradient = _in_pieces(forward, mx.stop_gradient(hidden), targets, weights, gradient=True, eager=False)
        assert gradient is not None
        return _with_its_gradient(hidden, gradient.astype(mx.float32)), mx.stop_gradient(loss)

    if forward.split and not forward.everywhere:
        if eager and on_cpu():
            return _forth_and_back(forward, hidden_of, params, targets, weights)
        (_, loss), grads = mx.value_and_grad(in_pieces)(params)
    else:
        (_, loss), grads = mx.value_and_grad(whole)(params)
    return loss, grads


def _forth_and_back(
    forward: Forward,
    hidden_of: Callable[[Params], mx.array],
    params: Params,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, Params]:
    """`loss_and_grads` where arrays are evaluated on the way: not before the differentiation has ended, as each
    array that is evaluated within it is kept until its end, needed or not."""
    by_hidden = mx.array(0.0)

    def traced(params: Params) -> tuple[mx.array, mx.array]:
        nonlocal by_hidden
        hidden = hidden_of(params)
        by_hidden = mx.array(np.zeros(hidden.shape, np.float32))
        return _with_its_gradient(hidden, by_hidden), mx.stop_gradient(hidden)

    (scalar, hidden), grads = mx.value_and_grad(traced)(params)
    del scalar  # never computed
    loss, gradient = _in_pieces(forward, hidden, targets, weights, gradient=True, eager=True)
    assert gradient is not None
    # The way back is laid out but not begun: it will read what is written here.
    np.array(by_hidden, copy=False)[...] = view(gradient.astype(mx.float32))
    return loss, grads


def _with_its_gradient(hidden: mx.array, gradient: mx.array) -> mx.array:
    """A scalar whose gradient by `hidden` is `gradient`, which is held fixed."""
    return (hidden.astype(mx.float32) * gradient).sum()


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
