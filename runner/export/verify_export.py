"""Load a written model folder as stock mlx-lm does, and compare it with the model in memory.

Settings, weights, logits and tokens are compared; weights one array at a time, so the comparison needs memory for one
more array, whatever the model's size.
The forward pass of the loaded model is then computed with the arrays that are in memory already.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from runner.common.errors import ModelError
from runner.models.load import BaseModel

_PROBE_LENGTH = 8
_TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest one, of two models with the same weights."""
_SENTENCE = "Hello, world! 123\n"


def verify_model_folder(base: BaseModel, folder: Path, target: Path) -> None:
    """Check that stock mlx-lm reads `base` from `folder`: the same structure, weights, logits and tokens.

    `target` is the name that the folder will have.

    Raises:
        ModelError: it does not; says in what it differs.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    try:
        loaded, config = load_model(folder, lazy=True, trust_remote_code="model_file" in base.config)
        difference = (
            _weights_difference(base.model, loaded)
            or _logits_difference(base.model, loaded)
            or _settings_difference(base.model, loaded)
        )
        if difference is None:
            tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
            if tokenizer.encode(_SENTENCE) != base.tokenizer.encode(_SENTENCE):
                difference = "its tokenizer encodes a sentence as other tokens"
    except MemoryError:
        raise
    except Exception as error:  # mlx-lm raises all kinds of errors
        difference = f"reading it fails with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if difference is not None:
        raise ModelError(
            f"{target} is not written, because mlx-lm {version('mlx-lm')} would not read the same model from it "
            f"(model_type '{base.config.get('model_type')}'): {difference.rstrip('.')}. An adapter folder of the same "
            "run (--to mlx) is used with the base model as it is."
        )


def _settings_difference(expected: nn.Module, loaded: nn.Module) -> str | None:
    """Return which setting of a module differs, such as the base of a rotary embedding or a window, or None.

    Some have no effect on as few tokens as the logits are compared for.
    """
    modules = dict(loaded.named_modules())
    for name, module in expected.named_modules():
        settings, others = _settings(module), _settings(modules.get(name, module))
        for key in settings.keys() & others.keys():  # layers that were merged may lack what their constructors set
            if settings[key] != others[key]:
                return f"{key} of {name or 'the model'} is {others[key]} instead of {settings[key]}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module, and its arrays that are no parameters, such as frequencies."""
    settings: dict[str, Any] = {}
    for key, value in [*vars(module).items(), *module.items()]:
        if key in ("_no_grad", "_training"):
            continue
        if value is None or isinstance(value, (bool, int, float, str)):
            settings[key] = value
        elif isinstance(value, mx.array) and key.startswith("_"):
            settings[key] = value.tolist()
    return settings


def _weights_difference(expected: nn.Module, loaded: nn.Module) -> str | None:
    """Return in which array `loaded` differs, or None; its own arrays are freed."""
    arrays, written = dict(tree_flatten(loaded.parameters())), dict(tree_flatten(expected.parameters()))
    loaded.update(tree_map(lambda array: mx.zeros((0,), array.dtype), loaded.parameters()))
    if missing := sorted(written.keys() ^ arrays.keys()):
        return f"{len(missing)} arrays have other names, such as {missing[0]}"
    for name in sorted(written):
        array = arrays.pop(name)
        if array.shape != written[name].shape or array.dtype != written[name].dtype:
            return f"{name} is {array.dtype} {array.shape} instead of {written[name].dtype} {written[name].shape}"
        if not _equal_weights(array, written[name]):
            return f"{name} has other values"
    return None


def _equal_weights(first: mx.array, second: mx.array) -> bool:
    """Return whether two weights are equal, but for the rounding of models that normalize a weight while loading it."""
    if not mx.issubdtype(first.dtype, mx.floating):
        return bool(mx.array_equal(first, second).item())
    if mx.array_equal(first, second, equal_nan=True).item():
        return True
    tolerance = 4 * mx.finfo(first.dtype).eps
    return bool((mx.abs(first - second) <= tolerance * mx.abs(second)).all().item())


def _logits_difference(expected: nn.Module, loaded: nn.Module) -> str | None:
    """Return how the logits of `loaded` differ once it has the arrays of `expected`, or None."""
    loaded.update(expected.parameters())
    loaded.eval()
    ids = mx.arange(_PROBE_LENGTH)[None] + 1
    ours, theirs = expected(ids).astype(mx.float32), loaded(ids).astype(mx.float32)
    if ours.shape != theirs.shape:
        return f"its logits have the shape {theirs.shape} instead of {ours.shape}"
    difference = mx.where(ours == theirs, 0, mx.abs(ours - theirs)).max()  # infinite for tokens that are ruled out
    scale = mx.where(mx.isinf(ours), 0, mx.abs(ours)).max()
    if not (difference <= _TOLERANCE * mx.maximum(scale, 1e-6)).item():
        return f"its logits differ by up to {difference.item():.2g}"
    return None
