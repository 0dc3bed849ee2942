"""README.md of a folder for the hub: what the model is, how it was trained and measured, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.safe_yaml import parse
from runner.common.text import count, single_line
from runner.config import schema, serialize, validation
from runner.config.schema import METHOD_ANSWERS, Config
from runner.data.source import HUB_ID
from runner.export.commands import generate_command
from runner.export.fidelity import FidelityCheck
from runner.models.fetch import BUILTIN_MODELS
from runner.reports.settings_text import by_importance, changed_from_defaults, value_text

PROGRAM = "mlx-runner"
_HIDDEN = ("experiment", "adapter", "data.mix", "model.path", "data.path", "loggers")
"""Settings that hold paths or names of the machine, or that the card states in words."""
_LARGEST_README = 1 << 20
_METHODS = {
    "dpo": "DPO (direct preference optimization)",
    "ipo": "IPO (identity preference optimization)",
    "orpo": "ORPO (odds ratio preference optimization)",
    "simpo": "SimPO (simple preference optimization)",
    "kto": "KTO (Kahneman-Tversky optimization)",
    "grpo": "GRPO (group relative policy optimization)",
}
"""The methods by name, but for supervised fine-tuning, which goes without saying."""


@dataclass(frozen=True)
class CardFacts:
    """What the card says beside the settings."""

    base_id: str | None
    """Name of the base model on the hub; None where it has none."""
    licence: str | None
    model_type: str
    step: int | None
    adapter_only: bool
    check: FidelityCheck | None
    split: str | None
    """The split whose rows were compared."""
    train_rows: int | None = None
    """Size of the training set; None where the run did not record it."""
    train_tokens: int | None = None


def base_id(config: Config, typed: str | None) -> str | None:
    """Return the name of the base model on the hub: as typed, else a built-in model's, else model.path if it is one."""
    path = config.model.path
    if typed:
        return typed
    if path.startswith("builtin:"):
        builtin = BUILTIN_MODELS.get(path.removeprefix("builtin:"))
        return builtin.hub_id if builtin else None
    return path if HUB_ID.fullmatch(path) and not Path(path).exists() and not path.endswith(".gguf") else None


def base_licence(config: Config, folder: Path | None, typed: str | None) -> str | None:
    """Return the licence of the base model: as typed, else a built-in model's, else what its own card says."""
    if typed:
        return typed
    if config.model.path.startswith("builtin:"):
        builtin = BUILTIN_MODELS.get(config.model.path.removeprefix("builtin:"))
        return builtin.licence.lower() if builtin else None
    try:
        text = (folder / "README.md").read_bytes()[:_LARGEST_README].decode() if folder else ""
        licence = parse(text.split("---")[1]).get("license") if text.startswith("---") else None
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return licence if isinstance(licence, str) and licence.isprintable() else None


def write_card(config: Config, facts: CardFacts) -> str:
    """Return the text of README.md."""
    name = (facts.base_id or f"a {facts.model_type} model").rpartition("/")[2]
    kind = "The adapter alone, without the base model" if facts.adapter_only else "The adapter is merged into the model"
    method = {"lora": "with LoRA", "dora": "with DoRA", "full": "in its own weights"}[config.lora.type]
    method += f" by {_METHODS[config.method.name]}" if config.method.name in _METHODS else ""
    about = f"{facts.base_id or name}, fine-tuned {method} on {_data_text(config)}"
    example = {"pairs": "pair"}.get(METHOD_ANSWERS[config.method.name], "row")
    update = count(config.train.batch_size * config.train.grad_accumulation, example)
    about += f" ({count(facts.step, 'update')} of {update}). {kind}." if facts.step else f". {kind}."
    parts = [
        _front_matter(config, facts),
        f"# {name}, fine-tuned",
        about,
        "## Use",
        _usage(config, facts),
        "## Data",
        f"Trained on {_data_text(config)}{_size_text(config, facts)}. {_learned_text(config)}",
        "## Results",
        _results(config, facts),
        "## Settings",
        _settings(config),
        "## Licence",
        f"The base model's licence is {facts.licence}; it holds for this model too."
        if facts.licence
        else "The base model's licence is not stated in its files: add it here and as `license` above.",
        f"Made with {PROGRAM} and MLX.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Config, facts: CardFacts) -> str:
    values: dict[str, Any] = {"library_name": "mlx", "pipeline_tag": "text-generation"}
    values["license"] = facts.licence or "unknown"
    if facts.base_id:
        values["base_model"] = facts.base_id
        values["base_model_relation"] = "adapter" if facts.adapter_only else "finetune"
    if HUB_ID.fullmatch(config.data.path) and not Path(config.data.path).exists():
        values["datasets"] = [config.data.path]
    values["tags"] = ["mlx", *([] if config.lora.type == "full" else [config.lora.type])]
    values["tags"] += [*([config.method.name] if config.method.name in _METHODS else []), "text-generation"]
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, "---"])


def _data_text(config: Config) -> str:
    path = config.data.path
    if config.data.mix:
        return f"a mixture of {len(config.data.mix)} data sets"
    if path.startswith("builtin:"):
        return f"the data set `{path.removeprefix('builtin:')}` that comes with {PROGRAM}"
    if HUB_ID.fullmatch(path) and not Path(path).exists():
        return f"the data set `{path}`"
    return "a data set of its author's own"


def _size_text(config: Config, facts: CardFacts) -> str:
    if facts.train_rows is None:
        return ""
    are_pairs = METHOD_ANSWERS[config.method.name] == "pairs"  # whose answers are counted
    size = count(facts.train_rows // 2, "training pair") if are_pairs else count(facts.train_rows, "training row")
    tokens = "" if facts.train_tokens is None else f", {count(facts.train_tokens, 'token')}"
    return f": {size}{tokens}"


def _learned_text(config: Config) -> str:
    """Say what of the data was learned from, and what training started from."""
    if config.method.name == "grpo":
        text = f"The model's own answers were scored by {config.data.metric}."
    else:
        text = {
            "pairs": "Each pair is a better and a worse answer.",
            "labeled": "Each row is an answer that is good or bad.",
            "chosen": f"The loss covers {'answers' if config.data.mask_prompt else 'whole rows'}.",
        }[METHOD_ANSWERS[config.method.name]]
    return text + (" Training started from an adapter that had been trained before." if config.adapter else "")


def _usage(config: Config, facts: CardFacts) -> str:
    lines = ["```", "pip install mlx-lm"]
    if facts.adapter_only:
        lines += ["hf download YOUR_NAME/THIS_MODEL --local-dir adapter"]
        lines += [generate_command(config, str(facts.base_id), "adapter")]
    else:
        lines += [generate_command(config, "YOUR_NAME/THIS_MODEL", None)]
    text = "\n".join([*lines, "```"])
    if config.data.system_prompt:
        text += f"\n\nIt was trained with this system prompt:\n\n> {single_line(config.data.system_prompt)}"
    return text


def _results(config: Config, facts: CardFacts) -> str:
    check = facts.check
    if check is None:
        return "This export was not compared with its run."
    lines = [
        f"| | loss on {count(len(check.base.tokens), f'{facts.split} row')} |",
        "|---|---|",
        f"| base model | {check.base.mean:.4f} |",
        f"| after training | {check.run.losses.mean:.4f} |",
        f"| these files, loaded again | {check.export.losses.mean:.4f} |",
    ]
    text = "\n".join(lines)
    if check.export.score is not None:
        rows = count(check.export.answers, f"{config.data.metric_split} row")
        text += f"\n\n{config.data.metric} on {rows}: {check.export.score:.1%}."
    return text


def _settings(config: Config) -> str:
    settings = serialize.flatten(config)
    changed = changed_from_defaults(settings)
    always = ("lora.rank", "lora.num_layers", "optimizer.learning_rate", "train.batch_size", "train.iters", "seed")
    names = [name for name in by_importance([*settings]) if name in changed or name in always]
    rows = [f"| {name} | `{text}` |" for name in names if (text := _shown(name, settings)) is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _shown(name: str, settings: Mapping[str, Any]) -> str | None:
    """Return the text of a setting, or None where it may hold a path, a name or a secret."""
    hidden = name in _HIDDEN or name in schema.path_settings() or name.startswith(("loggers", "checkpoint."))
    text = value_text(settings[name])
    if hidden or text.startswith(("/", "~", "./", "../")) or "${" in text or list(validation.secrets_in({"": text})):
        return None
    return single_line(text).replace("|", "\\|").replace("`", "'")
