"""The commands that try an export, by the programs that it is for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from runner.common.commands import mlx_lm_command
from runner.common.text import relative_path
from runner.config.schema import Config
from runner.export.trained_adapter import TrainedAdapter
from runner.models.transformers5_config import misread_by_stock


def try_command(to: str, target: Path, base_target: Path | None, trained: TrainedAdapter) -> str | None:
    """Return the command that tries the export by the program that it is for, or None where there is none."""
    path, config = shlex.quote(relative_path(target)), trained.config
    if to == "npz":
        base = shlex.quote(name_for_mlx_lm(None, config) or "MODEL")
        layers = trained.lora.num_layers
        if trained.adapted and layers < 0:
            layers = len(trained.adapted.model.layers)
        return f'python lora.py --model {base} --lora-layers {layers} --adapter-file {path} --prompt "…"'
    others = {
        "hub": f"hf upload YOUR_NAME/THIS_MODEL {path}",
        "gguf": f"llama-cli -m {path}",
        "peft": f"PeftModel.from_pretrained(model, {json.dumps(relative_path(target))})",
    }
    if to in others:
        return others[to]
    model = relative_path(target) if to == "fused" else name_for_mlx_lm(base_target, config)
    if model is None:
        return None
    return generate_command(config, model, relative_path(target) if to == "mlx" else None)


def generate_command(config: Config, model: str, adapter: str | None) -> str:
    """Return the command by which mlx-lm answers as the run of `config` was trained."""
    data = config.data
    return mlx_lm_command(model, adapter, chat_template=data.chat_template, template_args=data.template_args)


def no_command(config: Config) -> str:
    """Return what is said where `try_command` knows none."""
    return (
        f"Stock mlx-lm cannot load {config.model.path} by its name, nor a base that was quantized while "
        "loading, nor all that transformers 5 saves: --with-base writes it as a folder."
    )


def name_for_mlx_lm(base_target: Path | None, config: Config) -> str | None:
    """Return the name by which stock mlx-lm loads the same base model, or None if there is none."""
    if base_target:
        return relative_path(base_target)
    path = config.model.path
    if Path(path).is_dir() and misread_by_stock(Path(path)):
        return None
    unknown = path.startswith("builtin:") or path.endswith(".gguf") or config.model.quantize.bits is not None
    return None if unknown else path
