"""The settings of a LoRA adapter that PEFT saved, and the names of its layers. No MLX.

Every layer has a rank and an alpha of its own (`rank_pattern`, `alpha_pattern`), the factor of an update is
alpha / rank, with `use_rslora` alpha / sqrt(rank). DoRA and modules that were trained whole are read; what a run here
cannot hold is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoints.safetensors_file import read_header
from runner.common import safe_json
from runner.common.errors import ModelError, RunnerError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG
from runner.common.text import shorten

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE, WHOLE = "magnitude", "whole"
_MAX_CONFIG_BYTES = 8 << 20
_MAX_CONFIG_VALUES = 200_000
_MAX_PATTERNS = 1_000
_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<factor>[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
)
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.)+\$?")
"""The regular expressions of rank_pattern and alpha_pattern that are read: any other could take forever to match."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")
_UNSUPPORTED = {
    "use_qalora": "it is a QALoRA adapter",
    "use_bdlora": "it is a block-diagonal LoRA adapter",
    "lora_bias": "its B has biases",
    "trainable_token_indices": "it trained embeddings of tokens as well (trainable_token_indices)",
    "layer_replication": "it replicates layers",
    "alora_invocation_tokens": "it is an activated LoRA adapter",
    "arrow_config": "it is a router of adapters (Arrow)",
    "kasa_config": "it is a KaSA adapter",
    "velora_config": "it is a VeLoRA adapter",
}


@dataclass(frozen=True)
class PeftConfig:
    """The part of PEFT's adapter_config.json that decides what a LoRA adapter computes."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    dora: bool
    modules_to_save: tuple[str, ...]
    """The ends of the names of the modules that were trained whole."""
    base_model: str | None
    by_ends: bool
    """Whether it names its layers by the ends of their names alone."""
    in_all_blocks: bool
    """Whether it names its layers without regard to their block: then it has them in each block of the base model."""

    def rank_of(self, module: str) -> int:
        """Return the rank of the layer with this name in transformers."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of the update of the layer with this name."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def is_peft_folder(path: Path) -> bool:
    """Return whether `path` is a folder with an adapter of PEFT; that of mlx-lm has a file of the same name."""
    try:
        return "peft_type" in _parse_config(path)
    except (RunnerError, ValueError):
        return False


def read_config(folder: Path) -> PeftConfig:
    """Read the adapter_config.json of an adapter of PEFT.

    Raises:
        ModelError: it is malformed, or no plain LoRA.
    """
    where = f"{folder / ADAPTER_CONFIG}"
    try:
        config = _parse_config(folder)
    except ValueError as error:
        raise ModelError(f"{where}: {error}.") from None
    if reason := _unsupported(config):
        raise ModelError(f"adapter={folder}: {reason}, which cannot be read: LoRA, DoRA and modules_to_save alone can.")
    patterns: list[dict[str, Any]] = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or len(pattern) > _MAX_PATTERNS:
            raise ModelError(f"{where}: {name} is not an object of up to {_MAX_PATTERNS} names.")
        patterns.append(pattern)
    rank, alpha = config.get("r", 8), safe_json.finite_number(config.get("lora_alpha", 8))
    ranks, alphas = patterns[0].values(), [safe_json.finite_number(value) for value in patterns[1].values()]
    if not all(safe_json.is_count(value) and 0 < value <= 16_384 for value in (rank, *ranks)):
        raise ModelError(f"{where}: a rank is not a whole number from 1 to 16,384.")
    dropout = safe_json.finite_number(config.get("lora_dropout", 0.0))
    if alpha is None or dropout is None or None in alphas:
        raise ModelError(f"{where}: lora_alpha or lora_dropout is not a number.")
    base, targets = config.get("base_model_name_or_path"), config.get("target_parameters") or []
    saved = config.get("modules_to_save") or []
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        rslora=config.get("use_rslora") is True,
        dropout=dropout,
        rank_pattern=patterns[0],
        alpha_pattern=dict(zip(patterns[1], (value for value in alphas if value is not None), strict=True)),
        target_parameters=tuple(map(str, targets)) if isinstance(targets, list) else (),
        dora=config.get("use_dora") is True,
        modules_to_save=tuple(map(str, saved)) if isinstance(saved, list) else (),
        base_model=base if isinstance(base, str) and base else None,
        by_ends=_by_ends(config),
        in_all_blocks=_by_ends(config) and config.get("layers_to_transform") is None,
    )


def module_names(folder: Path) -> list[str]:
    """Return the names in transformers of the layers that the adapter has, from the header of its weights alone."""
    spans, _ = read_header(weights_file(folder))
    return sorted({module for name in spans for module, factor in [parse_name(name, folder)] if factor != WHOLE})


def saved_modules(folder: Path) -> list[str]:
    """Return the names in transformers of the modules that were trained whole, from the header of the weights alone."""
    spans, _ = read_header(weights_file(folder))
    parsed = [(name, *parse_name(name, folder)) for name in spans]
    return sorted({module.rpartition(".")[0] for _, module, factor in parsed if factor == WHOLE})


def _parse_config(folder: Path) -> dict[str, Any]:
    data = FileSystem().read_file(folder / ADAPTER_CONFIG, _MAX_CONFIG_BYTES)
    return safe_json.parse_object(data, max_values=_MAX_CONFIG_VALUES)


def _by_ends(config: Mapping[str, Any]) -> bool:
    names = config.get("target_modules")
    by_ends = isinstance(names, list) and not any(re.search(r"\d", str(name)) for name in names)
    return by_ends and not config.get("exclude_modules")


def _unsupported(config: Mapping[str, Any]) -> str | None:
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {shorten(config.get('peft_type'), 40)}"
    if config.get("bias", "none") != "none":
        return f"it trained biases as well (bias: {shorten(config['bias'], 40)})"
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            return reason
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        return f"it belongs to a base model that its initialization changed (init_lora_weights: {shorten(start, 40)})"
    return None


def weights_file(folder: Path) -> Path:
    """Return the file of the adapter's weights. Raises ModelError where there is none that can be read."""
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = " adapter_model.bin is a pickle, which may run code and is never loaded." * bool(
            (folder / "adapter_model.bin").exists()
        )
        raise ModelError(f"adapter={folder}: it has no {WEIGHTS}.{pickled}")
    return file


def parse_name(name: str, folder: Path) -> tuple[str, str]:
    """Return the layer in transformers, and the factor, of an array's name: A, B or MAGNITUDE.

    Of an array of a module that was trained whole: its own name in transformers, and WHOLE.

    Raises:
        ModelError: any other array.
    """
    if match := _NAME.fullmatch(name):
        return match["module"], match["factor"] or match["embedding"] or MAGNITUDE
    if not name.startswith(PREFIX) or ".lora_" in name or not name.endswith((".weight", ".bias")):
        raise ModelError(f"adapter={folder}: the array {shorten(name)} is not known, and nothing is left out.")
    return name.removeprefix(PREFIX), WHOLE


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, as PEFT matches it."""
    for pattern, value in patterns.items():
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 3:
            raise ModelError(
                f"The pattern {shorten(pattern, 60)} of a PEFT adapter is not supported: names, dots and .* are."
            )
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
