"""The config to import: an mlx_lm.lora YAML or command line, or one of mlx-examples' lora.py, with its defaults.

Flags, defaults and their precedence are those of mlx-lm 0.32.2 (`mlx_lm/lora.py`) and of the last lora.py in
mlx-examples.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from runner.common.errors import ConfigError
from runner.common.safe_yaml import load_yaml_file

_TRAINING: dict[str, type] = {
    "model": str,
    "train": bool,
    "data": str,
    "batch_size": int,
    "iters": int,
    "val_batches": int,
    "learning_rate": float,
    "steps_per_report": int,
    "steps_per_eval": int,
    "resume_adapter_file": str,
    "save_every": int,
    "test": bool,
    "test_batches": int,
    "seed": int,
    "lora_layers": int,  # of mlx-lm before it was called num_layers
}
_TRAINING_DEFAULTS: dict[str, Any] = {
    "train": False,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "save_every": 100,
    "seed": 0,
    "num_layers": 16,
    "optimizer": "adam",
}


@dataclass(frozen=True)
class Program:
    """A program whose settings can be imported."""

    name: str
    flags: dict[str, type]
    """Flag, with underscores, to the type of its value; a bool flag takes none."""
    defaults: dict[str, Any]
    """Values of settings that are not given, as far as they decide what is trained."""
    short: dict[str, str] = field(default_factory=dict)
    yaml_only: tuple[str, ...] = ()
    """Keys of its YAML that have no flag."""


MLX_LM = Program(
    name="mlx_lm.lora",
    flags=_TRAINING
    | {
        "fine_tune_type": str,
        "optimizer": str,
        "mask_prompt": bool,
        "num_layers": int,
        "grad_accumulation_steps": int,
        "adapter_path": str,
        "max_seq_length": int,
        "config": str,
        "grad_checkpoint": bool,
        "clear_cache_threshold": str,
        "report_to": str,
        "project_name": str,
        "trust_remote_code": bool,
    },
    defaults=_TRAINING_DEFAULTS
    | {
        "model": "Qwen/Qwen3-0.6b",
        "data": "mlx-community/WikiSQL",
        "fine_tune_type": "lora",
        "mask_prompt": False,
        "max_seq_length": 2048,
        "grad_checkpoint": False,
        "grad_accumulation_steps": 1,
    },
    short={"config": "-c"},
    yaml_only=(
        "optimizer_config",
        "lora_parameters",
        "lr_schedule",
        "hf_dataset",
        "prompt_feature",
        "completion_feature",
        "text_feature",
        "chat_feature",
    ),
)
EXAMPLES = Program(
    name="lora.py",
    flags=_TRAINING | {"adapter_file": str, "add_eos_token": int, "prompt": str, "max_tokens": int, "temp": float},
    defaults=_TRAINING_DEFAULTS | {"model": "mlx_model", "data": "data/", "grad_accumulation_steps": 1},
    short={"prompt": "-p", "max_tokens": "-m"},
)


@dataclass
class SourceConfig:
    """Everything that a config or command line of another program sets."""

    program: Program
    settings: dict[str, Any]
    """Key, with underscores, to value; a null is not set, as in mlx-lm."""
    origin: str
    """The file or command that it comes from, for messages."""
    from_flags: set[str] = field(default_factory=set)
    """Keys set by a flag rather than by the YAML."""
    unknown_flags: list[str] = field(default_factory=list)
    """Arguments that the program does not know."""
    command_prefix: list[str] = field(default_factory=list)
    """Arguments before the name of the program, such as those of mpirun."""


def read_config(path: Path) -> SourceConfig:
    """Read an mlx_lm.lora YAML file.

    Raises:
        ConfigError: missing or not plain YAML.
    """
    try:
        data = load_yaml_file(path, missing=f"There is no file {path}.")
    except ValueError as error:  # text that YAML resolves to a date or number which Python cannot represent
        raise ConfigError(f"{path} is not plain YAML: {error}.") from None
    return SourceConfig(MLX_LM, {str(k): v for k, v in data.items() if v is not None}, str(path))


def read_command(arguments: Sequence[str]) -> SourceConfig:
    """Read a command line; its flags override those of a YAML that it names with -c, as in mlx-lm.

    Raises:
        ConfigError: no known program, a flag with an invalid value, or a YAML that cannot be read.
    """
    if len(arguments) == 1 and " " in arguments[0]:
        try:
            arguments = shlex.split(arguments[0])
        except ValueError as error:
            raise ConfigError(f"The command cannot be split into arguments: {error}.") from None
    program, prefix, rest = _find_program(arguments)
    parser = _Flags(prog=program.name, add_help=False, argument_default=argparse.SUPPRESS)
    for name, kind in program.flags.items():
        flags = [f"--{name.replace('_', '-')}", *([program.short[name]] if name in program.short else [])]
        if kind is bool:
            parser.add_argument(*flags, action="store_true", dest=name)
        else:
            parser.add_argument(*flags, type=kind, dest=name)
    known, unknown = parser.parse_known_args(list(rest))
    from_flags = vars(known)
    config = from_flags.pop("config", None)
    from_file = read_config(Path(config)).settings if config else {}
    origin = f"the command line and {config}" if config else "the command line"
    return SourceConfig(program, from_file | from_flags, origin, set(from_flags), unknown, prefix)


def is_program(argument: str) -> bool:
    """Return whether an argument of a command line names a program that can be imported."""
    return Path(argument).name in ("mlx_lm", "mlx_lm.lora", "lora.py")


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}.")


def _find_program(arguments: Sequence[str]) -> tuple[Program, list[str], Sequence[str]]:
    """Return the program, the arguments before it and those after it."""
    for i, argument in enumerate(arguments):
        path, prefix = Path(argument), list(arguments[:i])
        if path.name == "mlx_lm.lora" or (path.name == "lora.py" and path.parent.name == "mlx_lm"):
            return MLX_LM, prefix, arguments[i + 1 :]
        if path.name == "lora.py":
            return EXAMPLES, prefix, arguments[i + 1 :]
        if path.name == "mlx_lm" and list(arguments[i + 1 : i + 2]) == ["lora"]:
            return MLX_LM, prefix, arguments[i + 2 :]
    raise ConfigError(
        "This command cannot be imported: expected mlx_lm.lora …, mlx_lm lora … or lora.py …, with or without "
        "python -m before it."
    )
