"""The peak memory of a step of the MLX backend, from the graph of the step itself, so of any model on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from runner.backends.mlx.evaluation_memory import CPU_PACE, GPU_PACE, evaluation_peak
from runner.backends.mlx.graph import trace
from runner.backends.mlx.loss import ChunkedLoss
from runner.backends.protocol import StepMemory
from runner.common.errors import ModelError
from runner.models.device import on_cpu
from runner.models.lora import AdaptedModel, Params
from runner.models.stand_in import output_of, stand_in


def step_memory(
    function: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array | None], model: nn.Module
) -> StepMemory:
    """Return what evaluating `function(*arrays)` takes at its peak beyond the model's weights.

    `arrays` are those of a batch: they count, and are freed after their last use. Nothing is computed.
    """
    present = [array for array in arrays if array is not None]

    def traced(*given: mx.array) -> list[mx.array]:
        remaining = iter(given)
        return list(function(*(None if array is None else next(remaining) for array in arrays)))

    try:
        graph = trace(traced, *present)
    except Exception as error:  # models and MLX raise all kinds of errors
        reason = " ".join(str(error).split())
        raise ModelError(f"The memory of this model's step cannot be estimated: {reason}") from error
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]  # not evaluated
    pace = CPU_PACE if on_cpu() else GPU_PACE
    peak = evaluation_peak(graph, pace, freed=[array.name for array in graph.inputs], vocabulary=vocabulary)
    return StepMemory(activations=peak.other, logits=peak.logits)


def checkpointed_step(
    adapted: AdaptedModel, loss: ChunkedLoss, params: Params, inputs: mx.array, *batch: mx.array
) -> list[mx.array]:
    """Return the loss and the gradients of a step that recomputes its blocks, from operations that can be traced.

    `mx.checkpoint` cannot be traced. The graph here is the one that it makes: in the forward pass no gradient passes
    through the blocks, and backward each of them is computed again, after its own output, and differentiated.

    Args:
        inputs: token ids (batch, length).
        batch: the other arguments of `ChunkedLoss.loss_and_grads`.
    """
    blocks = list(adapted.model.layers)
    trained = [i for i, block in enumerate(blocks) if tree_flatten(block.trainable_parameters())]
    paths = {id(module): path for path, module in adapted.model.named_modules()}
    calls: dict[int, tuple[Callable, tuple, dict, mx.array]] = {}
    added: Params = {}

    def call(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        output = own_call(*args, **kwargs)
        if index not in trained or not isinstance(output, mx.array):
            return output
        output = mx.stop_gradient(output)
        calls[index] = own_call, args, kwargs, output
        return output + added["grad"] if index == trained[-1] else output  # so that it has a gradient

    adapted.place(params)
    last = output_of(blocks[trained[-1]], lambda: adapted.model(inputs))
    with stand_in(blocks, call):
        zeros = mx.zeros(last.shape, last.dtype)
        total, grads = loss.loss_and_grads(added.update, {"grad": zeros}, inputs, *batch)
    grad = grads["grad"]
    results: Params = {}
    for index, (own_call, args, kwargs, output) in reversed(calls.items()):
        block = blocks[index]
        names, values = zip(*tree_flatten(block.trainable_parameters()), strict=True)

        def run(
            *given: mx.array,
            own_call: Callable = own_call,
            args: tuple = args,
            kwargs: dict = kwargs,
            names: tuple = names,
            block: nn.Module = block,
        ) -> list[mx.array]:
            block.update(tree_unflatten(list(zip(names, given[:-1], strict=True))))
            return [own_call(given[-1], *args[1:], **kwargs)]

        _, vjps = mx.vjp(run, mx.depends([*values, args[0]], [output]), [grad])
        *own, grad = vjps
        results |= {f"{paths[id(block)]}.{name}": array for name, array in zip(names, own, strict=True)}
    return [total, *(results[name] for name in params if name in results)]
