"""`runner export`: write a run's adapter, or its base model with the adapter merged, for stock mlx-lm."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.commands.stored_settings import StoredSettings
from runner.common.errors import ConfigError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.common.text import relative_path
from runner.config.schema import Config

if TYPE_CHECKING:
    from runner.models.load import BaseModel

_LARGEST_CONFIG = 1 << 20  # bytes of adapter_config.json


def run(argv: list[str]) -> int:
    """Export what `argv` names and print the command that tries it.

    Raises:
        RunnerError: an argument is invalid, a target exists, the adapter or the base cannot be loaded, or the disk
            fails. Then nothing is written.
    """
    options = _parse(argv)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = _with_stored_quantization(
        stored_settings.read_settings(source.run, options.overrides), options.dequantize
    )
    target = _target(options, source)
    base_target = target.with_name(f"{target.name}-base") if options.with_base else None
    for path in filter(None, (target, base_target)):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already; nothing is replaced. Choose another --out, or move it away.")
    if options.to == "fused":
        _export_fused(source, settings, target, options)
        model: Path | str | None = target
    else:
        _export_mlx(source, settings, target, base_target, options)
        model = base_target or _name_for_mlx_lm(settings.config)
    command = _generate_command(model, target if options.to == "mlx" else None, settings.config)
    if options.json:
        base = str(base_target) if base_target else None
        document = {"to": options.to, "folder": str(target), "base": base, "run": str(source.run), "step": source.step}
        arguments.print_json({**document, "command": command})
        return 0
    print(f"wrote {relative_path(target)} ({source.name})")
    if base_target:
        print(f"wrote {relative_path(base_target)} (the base model)")
    if command:
        print(f"try it: {command}")
    else:
        print(
            f"Stock mlx-lm cannot load {settings.config.model.path} by its name, nor a base that was quantized while "
            "loading, nor all that transformers 5 saves: --with-base writes it as a folder."
        )
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("export")
    parser.add_argument(
        "--to", choices=("mlx", "fused"), required=True, help="an mlx-lm adapter folder, or a model with it merged"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to create; must not exist (default: RUN/export-mlx, -fused)"
    )
    parser.add_argument("--dequantize", action="store_true", help="dequantize the base, so that merging rounds nothing")
    parser.add_argument("--with-base", action="store_true", help="with --to mlx: write the base model too, to DIR-base")
    options = parser.parse(argv)
    if options.with_base and options.to != "mlx":
        raise ConfigError("--with-base needs --to mlx: a fused model contains its base.")
    if options.dequantize and options.to == "mlx" and not options.with_base:
        raise ConfigError("--dequantize changes a base model: it needs --to fused or --with-base.")
    return options


def _with_stored_quantization(settings: StoredSettings, dequantize: bool) -> StoredSettings:
    """Keep a quantized base quantized, also where training dequantized it, unless an option or override says not."""
    model = settings.config.model
    if "model.dequantize" not in settings.typed:
        model = replace(model, dequantize="always" if dequantize else "never")
    return replace(settings, config=replace(settings.config, model=model))


def _target(options: Namespace, source: AdapterSource) -> Path:
    if options.out:
        return Path(options.out).expanduser().absolute()
    suffix = "" if source.is_result else f"-{source.folder.name}"
    return source.run / f"export-{options.to}{suffix}"


def _export_mlx(
    source: AdapterSource, settings: StoredSettings, target: Path, base_target: Path | None, options: Namespace
) -> None:
    from runner.export.mlx import check_adapter, export_adapter

    check_adapter(source.folder, source.adapters, source.adapter_config)
    config = FileSystem().read_file(source.folder / ADAPTER_CONFIG, _LARGEST_CONFIG)
    base = None
    if base_target:
        blas.load_blas()
        from runner.cli.commands.load_adapter import load_adapter

        # The adapter is loaded with its base to check that it fits.
        loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
        loaded.detach()
        _set_template(loaded.base, settings.config)
        base = (loaded.base, base_target)
    elif settings.config.data.template:
        arguments.print_note(
            f"the run used the chat template {settings.config.data.template}, which an adapter folder does not contain"
        )
    export_adapter({ADAPTERS: source.adapters, ADAPTER_CONFIG: config}, target, base)


def _export_fused(source: AdapterSource, settings: StoredSettings, target: Path, options: Namespace) -> None:
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapter
    from runner.export.fused import fuse_adapter
    from runner.export.mlx import export_model

    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    assert loaded.adapted is not None
    fused = fuse_adapter(loaded.adapted, dequantize=options.dequantize)
    if fused.config.get("quantization"):
        arguments.print_note("the base stays quantized, which rounds the merged layers; --dequantize avoids it")
    _set_template(fused, settings.config)
    export_model(fused, target)


def _set_template(base: BaseModel, config: Config) -> None:
    """Give the tokenizer that is exported the chat template that the run used instead of the model's."""
    from runner.data.chat_template import TemplateOptions

    if (template := TemplateOptions.from_config(config.data).text) is not None:
        vars(base.tokenizer).get("_tokenizer", base.tokenizer).chat_template = template


def _name_for_mlx_lm(config: Config) -> str | None:
    """Return the name by which stock mlx-lm loads the same base model, or None if there is none."""
    from runner.models.transformers5_config import misread_by_stock

    path = config.model.path
    if Path(path).is_dir() and misread_by_stock(Path(path)):
        return None
    unknown = path.startswith("builtin:") or path.endswith(".gguf") or config.model.quantize.bits is not None
    return None if unknown else path


def _generate_command(model: Path | str | None, adapter: Path | None, config: Config) -> str | None:
    if model is None:
        return None
    command = ["mlx_lm.generate", "--model", relative_path(model) if isinstance(model, Path) else model]
    command += ["--adapter-path", relative_path(adapter)] if adapter else []
    command += [] if config.data.chat_template else ["--ignore-chat-template"]
    if config.data.template_args:
        command += ["--chat-template-config", json.dumps(config.data.template_args)]
    return f"{shlex.join(command)} --prompt …"
