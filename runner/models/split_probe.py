"""Find the parts that a model can be split into, and verify on a probe that they compute what the whole model does.

The probe of the cut is a batch of two rows, a long one and a short one that is padded on the right: attention windows
and chunks, positions, masks and padding then matter as in training. Its parts have to give the hidden states of the
whole model, with the output of the last frozen block alone: the other frozen blocks return NaN, which shows wherever
something else of theirs is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.models.split_model import Parts, SplitModel
from runner.models.stand_in import output_of, stand_in

SHORT = 24
"""Tokens of the short row, and of a probe whose model has neither windows nor other effects of the length."""
_MIN_LENGTH, _LENGTH_MULTIPLE = 48, 16
"""The hidden-state cache computes rows padded to these lengths."""
_EXACT = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 1e-2}
"""Largest difference, relative to the norm of a position, of what is computed by the same operations."""
_CLOSE = {mx.float32: 1e-3, mx.float16: 5e-3, mx.bfloat16: 3e-2}
"""Largest mean difference of what is computed at other lengths, where a product may sum in another order."""
_FAILURES = (TypeError, AttributeError, ValueError, IndexError, KeyError, LookupError)
"""What a model's code raises where it is called in a way that it was not written for."""


def split(model: nn.Module, frozen_blocks: int = 0, length: int = SHORT) -> SplitModel:
    """Return `model` in the parts that `find_parts` finds."""
    return SplitModel(model, find_parts(model, frozen_blocks, length))


def find_parts(model: nn.Module, frozen_blocks: int = 0, length: int = SHORT) -> Parts:
    """Return the parts that give what the whole model does, on rows of up to `length` tokens.

    Raises whatever the model raises where it cannot compute a row at all.
    """
    blocks = list(model.layers)
    candidates = _trunk_candidates(model, blocks)
    calls: list[int] = []
    outputs: dict[int, list[Any]] = {}

    def record_call(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        calls.append(index)
        return own_call(*args, **kwargs)

    def record_output(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        output = own_call(*args, **kwargs)
        outputs.setdefault(index, []).append(output)
        return output

    with stand_in(blocks, record_call), stand_in([module for _, module in candidates], record_output):
        logits = model(token_row(SHORT, 64))
    vocabulary = logits.shape[-1]
    trunk = None
    for index, (name, _) in enumerate(candidates):
        if _is_trunk(model, name, outputs.get(index, []), logits):
            trunk = name
            break
    if not frozen_blocks:
        return Parts(trunk=trunk)
    if calls != list(range(len(blocks))):
        return Parts(trunk=trunk, reason="they are not called once each, one after the other")
    reason = _reason_against_cut(model, trunk, frozen_blocks, max(length, SHORT), vocabulary)
    return Parts(trunk=trunk, frozen_blocks=0 if reason else frozen_blocks, reason=reason)


def unverified_parts(model: nn.Module, frozen_blocks: int = 0) -> Parts:
    """Return the parts that `find_parts` looks for first, by shapes alone: nothing is computed.

    Raises whatever the model raises where it cannot compute a row at all.
    """
    candidates = _trunk_candidates(model, list(model.layers))
    outputs: dict[int, list[Any]] = {}

    def record(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        outputs.setdefault(index, []).append(own_call(*args, **kwargs))
        return outputs[index][-1]

    with stand_in([module for _, module in candidates], record):
        logits = model(token_row(2, 64))
    for index, (name, _) in enumerate(candidates):
        found = outputs.get(index, [])
        if len(found) == 1 and isinstance(found[0], mx.array) and found[0].shape[:2] == logits.shape[:2]:
            return Parts(trunk=name, frozen_blocks=frozen_blocks)
    return Parts(frozen_blocks=frozen_blocks)


def token_row(length: int, vocabulary: int, start: int = 1) -> mx.array:
    """Return ids (1, length) spread over the first half of the vocabulary: not all tables hold its last tokens."""
    return ((mx.arange(length) * 7919 + start) % max(2, vocabulary // 2)).astype(mx.int32)[None]


def _trunk_candidates(model: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return the modules that hold all blocks, the innermost first, without the model itself."""
    wanted = {id(block) for block in blocks}
    holding = [
        (name, module)
        for name, module in model.named_modules()
        if name and module is not model and id(module) not in wanted and wanted <= {id(m) for m in module.modules()}
    ]
    return sorted(holding, key=lambda item: -item[0].count("."))


def _is_trunk(model: nn.Module, name: str, outputs: list[Any], logits: mx.array) -> bool:
    """Return whether the model's logits are a function of the one output of the module `name`, position by position."""
    if len(outputs) != 1 or not isinstance(outputs[0], mx.array) or outputs[0].shape[:2] != logits.shape[:2]:
        return False
    hidden = outputs[0]
    try:
        found = SplitModel(model, Parts(trunk=name)).head(hidden[0, ::-3])
        return _agrees(found, logits[0, ::-3], _EXACT[float_dtype(hidden)])
    except _FAILURES:
        return False


def _reason_against_cut(
    model: nn.Module, trunk: str | None, frozen_blocks: int, length: int, vocabulary: int
) -> str | None:
    """Return why the hidden states after the frozen blocks do not suffice; None where they do."""
    blocks = list(model.layers)
    top = blocks[-1] if trunk is None else dict(model.named_modules())[trunk]
    row, short = token_row(length, vocabulary), token_row(min(SHORT, length - 1), vocabulary, start=5)
    lengths = [row.shape[1], short.shape[1]]
    batch = mx.concatenate([row, _padded(short, length)])
    recorded: list[Any] = []

    def record(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        recorded.append(own_call(*args, **kwargs))
        return recorded[-1]

    with stand_in([blocks[frozen_blocks - 1]], record):
        expected = output_of(top, lambda: model(batch))
    states = recorded[0]
    if not isinstance(states, mx.array) or states.shape[:2] != batch.shape:
        return "they hand over more than one hidden state to the next block"
    if not isinstance(expected, mx.array) or expected.shape[:2] != batch.shape:
        return "the last block returns more than one hidden state"
    mx.eval(states, expected)
    nan = mx.full(states.shape, float("nan"), states.dtype)

    def cached(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> mx.array:
        return states if index == frozen_blocks - 1 else nan

    try:
        # What blocks may leave on their objects is then of the short row, not of the batch.
        part = SplitModel(model, Parts(trunk=trunk, frozen_blocks=frozen_blocks))
        alone = [part.run_frozen_blocks(_padded(ids, _cache_length(ids.shape[1]))) for ids in (row, short)]
        mx.eval(alone)
        with stand_in(blocks[:frozen_blocks], cached):
            found = output_of(top, lambda: model(batch))
        mx.eval(found)
    except _FAILURES as error:
        return f"the blocks above them read more than their output ({type(error).__name__})"
    exact, close = _EXACT[float_dtype(states)], _CLOSE[float_dtype(states)]
    for i, count in enumerate(lengths):
        if not _agrees(found[i, :count], expected[i, :count], exact):
            return "the blocks above them read more than their output"
        if not _agrees(alone[i][0, :count], states[i, :count], close, mean=True):
            return "their output depends on padding or on the other rows of the batch"
    return None


def _padded(ids: mx.array, length: int) -> mx.array:
    return mx.pad(ids, [(0, 0), (0, length - ids.shape[1])])


def _cache_length(length: int) -> int:
    return -(-max(length, _MIN_LENGTH) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def float_dtype(array: mx.array) -> mx.Dtype:
    """Return the dtype that decides the tolerance of a comparison of `array`."""
    return array.dtype if array.dtype in _EXACT else mx.float32


def _agrees(found: mx.array, expected: mx.array, tolerance: float, *, mean: bool = False) -> bool:
    """Return whether arrays (n, width) differ by at most `tolerance`, relative to the norm of a row or on average."""
    if found.shape != expected.shape:
        return False
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    found, expected = (x.reshape(len(x), -1) for x in (found, expected))
    norms = mx.maximum(mx.linalg.norm(expected, axis=-1), 1e-6)
    differences = mx.linalg.norm(found - expected, axis=-1) / norms
    return bool(((differences.mean() if mean else differences.max()) <= tolerance).item())
