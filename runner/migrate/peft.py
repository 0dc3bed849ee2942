"""The settings of a run that begins with an adapter that PEFT saved."""

from __future__ import annotations

import re
from pathlib import Path

from runner.common import safe_json
from runner.common.errors import RunnerError
from runner.common.filesystem import FileSystem
from runner.migrate.convert import CannotImport, to_text
from runner.migrate.result import ImportResult
from runner.migrate.source import Program, SourceConfig
from runner.models.peft.config import PeftConfig, module_names, read_config, saved_modules
from runner.models.peft.families import DOWN, FAMILIES, PeftFamily, single_expert, stacked_parameter

PEFT = Program("PEFT", {}, {})
_BLOCK = re.compile(r".*?\.(?:layers|h)\.(\d{1,5})\.(.+)")
_BLOCK_NAME = re.compile(r".*?\.(?:layers|h)\.(\d{1,5}\.)")
_NO_DATA = "PEFT does not record what it was trained on: add data=folder data.path=FOLDER to the command"
_NO_BASE = "the base model is needed (a folder of a known architecture); it alone"
_LARGEST_CONFIG = 1 << 24


def import_adapter(folder: Path) -> ImportResult:
    """Return our settings for a run on the base model of the adapter in `folder` that begins with its weights.

    Raises:
        ModelError: it is no plain LoRA adapter.
        CheckpointError: its weights are damaged.
    """
    config, names = read_config(folder), module_names(folder)
    settings = {
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": sorted({name for _, name in _in_blocks(names)}),
        "use_dora": config.dora or None,
        "modules_to_save": saved_modules(folder) or None,
    }
    result = ImportResult(SourceConfig(PEFT, {k: v for k, v in settings.items() if v is not None}, str(folder)))
    try:
        result.add("base_model_name_or_path", config.base_model, {"model.path": to_text(config.base_model)})
    except CannotImport:
        result.skip("base_model_name_or_path", "the base model is not named: add model.path=… to the command", "(none)")
    depth, model_type = _base_facts(config.base_model)
    family = FAMILIES.get(model_type) if model_type else None
    _shape(result, config, family, names)
    result.import_value("lora_dropout", config.dropout, float, "lora.dropout")
    if config.dora:
        result.add("use_dora", True, {"lora.type": "dora"})
    _layers(result, config, family, depth, names)
    if saved := saved_modules(folder):
        keys = [_BLOCK_NAME.sub(r"layers.\1", name) for name in saved]
        result.add("modules_to_save", saved[:20], {"lora.modules_to_save": keys})
    result.add("adapter", str(folder), {"adapter": str(folder)}, note="its weights; a fresh optimizer", explicit=True)
    result.skip("data", _NO_DATA, "(none)")
    result.validate()
    return result


def _shape(result: ImportResult, config: PeftConfig, family: PeftFamily | None, names: list[str]) -> None:
    parameters = [_parameter(name, config, family) for name in names]
    rank = max((config.rank_of(name) for name in parameters), default=config.rank)
    note = "the largest of its layers; the others are filled up" if rank != config.rank else ""
    result.add("r", config.rank, {"lora.rank": rank}, note=note)
    scale = config.scale_of("")
    formula = "lora_alpha / sqrt(r)" if config.rslora else "lora_alpha / r"
    result.add(
        "lora_alpha", config.alpha, {"lora.scale": scale}, note=f"{formula}; that of other layers is carried in B"
    )
    result.explain("use_rslora", "in lora.scale")


def _layers(
    result: ImportResult, config: PeftConfig, family: PeftFamily | None, depth: int | None, names: list[str]
) -> None:
    found = _in_blocks(names)
    outside = sorted(set(names) - {name for name in names if _BLOCK.fullmatch(name)})
    blocks = sorted({block for block, _ in found})
    if outside or (blocks and not _are_last_blocks(found, config, depth)):
        _layers_by_number(result, config, family, found, outside)
        return
    last = depth if depth is not None else (blocks[-1] + 1 if blocks else 0)
    if not blocks:
        result.skip("layers_to_transform", "it adapts no layer of a block", "(none)")
    elif depth is None and blocks[0] == 0 and not config.in_all_blocks:
        result.skip(
            "layers_to_transform", f"{_NO_BASE} tells whether these are its last blocks: add lora.num_layers=…", blocks
        )
    else:
        count = -1 if blocks[0] == 0 else last - blocks[0]
        shown = f"{blocks[0]} to {blocks[-1]}"
        note = "" if depth is not None or count < 0 else "if the base model, which is not here, ends with them"
        result.add("layers_to_transform", shown, {"lora.num_layers": count}, note=note, explicit=True)
    modules = sorted({name for _, name in found})
    if family is None and any(map(_differs_by_family, modules)):
        result.skip(
            "target_modules", f"{_NO_BASE} decides what these layers are called here: add lora.keys=…", modules[:20]
        )
    elif keys := sorted({key for name in modules for key in _own_names(name, config, family)}):
        result.add("target_modules", modules[:20], {"lora.keys": keys})


def _are_last_blocks(found: list[tuple[int, str]], config: PeftConfig, depth: int | None) -> bool:
    """Return whether the same layers are adapted in each of the last blocks, as far as that is known."""
    by_block: dict[int, set[str]] = {}
    for block, name in found:
        by_block.setdefault(block, set()).add(name)
    last = depth if depth is not None else max(by_block) + 1
    is_range = sorted(by_block) == list(range(min(by_block), last))
    # Blocks of one model may differ in the layers that they have: there names without numbers say what is meant.
    return is_range and (config.by_ends or len({frozenset(own) for own in by_block.values()}) == 1)


def _layers_by_number(
    result: ImportResult,
    config: PeftConfig,
    family: PeftFamily | None,
    found: list[tuple[int, str]],
    outside: list[str],
) -> None:
    """Import layers of some of the blocks, or outside of them, each by its own name."""
    if family is None and any(_differs_by_family(name) for _, name in found):
        result.skip("target_modules", f"{_NO_BASE} decides what these layers are called here: add lora.keys=…", "…")
        return
    spans: dict[str, list[int]] = {}
    for block, name in sorted(found):
        for own in _own_names(name, config, family):
            spans.setdefault(own, []).append(block)
    keys = [f"layers.{span}.{own}" for own, blocks in sorted(spans.items()) for span in _spans(sorted(set(blocks)))]
    result.add("target_modules", outside[:20] or "some blocks", {"lora.keys": [*keys, *outside]}, explicit=True)


def _spans(blocks: list[int]) -> list[str]:
    """Return the numbers as ranges: `3`, `20-29`."""
    starts = [n for n in blocks if n - 1 not in blocks]
    ends = [n for n in blocks if n + 1 not in blocks]
    return [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]


def _in_blocks(names: list[str]) -> list[tuple[int, str]]:
    return [(int(match[1]), match[2]) for name in names if (match := _BLOCK.fullmatch(name))]


def _parameter(name: str, config: PeftConfig, family: PeftFamily | None) -> str:
    """Return the name by which PEFT looks up the rank of a layer: that of the parameter where it is of all experts."""
    match = _BLOCK.fullmatch(name)
    known = [family] if family else FAMILIES.values()
    for experts in [family.experts for family in known if family.experts] if match else []:
        if match and (parameter := stacked_parameter(match[2], experts, config.target_parameters)):
            return f"{name.removesuffix('.base_layer')}.{parameter}"
    return name


def _own_names(name: str, config: PeftConfig, family: PeftFamily | None) -> list[str]:
    """Return mlx-lm's names of a layer inside a block."""
    if family is None:
        return [name]
    if experts := family.experts:
        parameter = stacked_parameter(name, experts, config.target_parameters)
        if parameter is not None:
            own = ["down_proj"] if parameter == DOWN else ["gate_proj", "up_proj"]
            return [f"{experts.own}.{leaf}" for leaf in own]
        if found := single_expert(name, experts):
            return [found[0]]
    return [family.aliases.get(name, name)]


def _differs_by_family(name: str) -> bool:
    """Return whether some family calls the layer `name` of PEFT otherwise."""
    return any(
        name in family.aliases
        or (family.experts is not None and name.startswith((family.experts.theirs, family.experts.stacked)))
        for family in FAMILIES.values()
    )


def _base_facts(base: str | None) -> tuple[int | None, str | None]:
    """Return the number of blocks and the architecture of the base model, where it is a folder here."""
    try:
        data = FileSystem().read_file(Path(base or "") / "config.json", _LARGEST_CONFIG)
        config = safe_json.parse_object(data, max_values=100_000)
    except (RunnerError, ValueError, OSError):
        return None, None
    depth, model_type = config.get("num_hidden_layers"), config.get("model_type")
    return depth if type(depth) is int else None, model_type if isinstance(model_type, str) else None
