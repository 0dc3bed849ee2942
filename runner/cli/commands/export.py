"""`runner export`: a run as an adapter folder for stock mlx-lm, or as a model with the adapter merged into it."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.backends.cpu import blas
from runner.checkpoints.safetensors_file import unpack
from runner.cli.commands import COMMANDS, adapter_source, arguments, stored_settings
from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.commands.stored_settings import StoredSettings
from runner.common.atomic_io import storage_errors
from runner.common.errors import CheckpointError, ConfigError, ModelError, StorageError
from runner.common.filesystem import FileSystem, format_bytes
from runner.common.text import relative_path
from runner.config.schema import Config
from runner.runs.layout import ADAPTER_CONFIG, ADAPTERS

if TYPE_CHECKING:
    from runner.models.load import BaseModel


def run(argv: list[str]) -> int:
    """Export what `argv` names. Everything is written beside its target and renamed when it is whole.

    Raises:
        RunnerError: a word, the adapter or the base cannot be used, the target exists, or the disk fails.
    """
    parser = arguments.adapter_parser("export", COMMANDS["export"])
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", default=[], help=arguments.OVERRIDES_HELP)
    parser.add_argument(
        "--to", choices=("mlx", "fused"), required=True, help="an mlx-lm adapter folder, or a whole model"
    )
    parser.add_argument("--out", metavar="DIR", help="where to; must not exist (default: RUN/export-mlx, -fused)")
    parser.add_argument("--dequantize", action="store_true", help="expand a quantized base; nothing is rounded again")
    parser.add_argument("--with-base", action="store_true", help="with --to mlx: write the base model too, to DIR-base")
    words = arguments.parse_arguments(parser, argv)
    if words.with_base and words.to != "mlx":
        raise ConfigError("--with-base belongs to --to mlx: a fused model holds its base.")
    if words.dequantize and words.to == "mlx" and not words.with_base:
        raise ConfigError("--dequantize is about a base model: use it with --to fused or --with-base.")
    place = adapter_source.find_adapter(Path(words.run), words.checkpoint)
    chosen = _numbers_to_write(stored_settings.read_settings(place.run, words.changes), words.dequantize)
    target = Path(words.out).expanduser().absolute() if words.out else place.run / _default_name(words.to, place)
    beside = target.with_name(f"{target.name}-base")
    targets = [target, beside] if words.with_base else [target]
    for path in targets:
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already; nothing is replaced. Choose another --out, or move it away.")
    if words.to == "fused":
        _fuse(place, chosen, target, words.dequantize, words.any_base)
    else:
        adapter = _checked_adapter(place)
        base = _base(place, chosen, words.any_base) if words.with_base else None
        with _written(target) as temporary:
            for name, data in adapter.items():
                FileSystem().write_file(temporary / name, data)
            if base is not None:
                with _written(beside) as folder:
                    _write(base, folder)
    model = target if words.to == "fused" else beside if words.with_base else _loadable(chosen.config)
    command = _command(model, target if words.to == "mlx" else None, chosen.config)
    if words.json:
        document = {"to": words.to, "folder": str(target), "base": str(beside) if words.with_base else None}
        arguments.print_json({**document, "run": str(place.run), "step": place.step, "command": command})
        return 0
    for path in targets:
        print(
            f"wrote {relative_path(path)} ({place.name})"
            if path == target
            else f"wrote {relative_path(path)} (the base model)"
        )
    if command:
        print(f"try it: {command}")
    else:
        print(
            f"Stock mlx-lm cannot load {chosen.config.model.path} by its name, nor a base that was quantized while "
            "loading: --with-base writes it as a folder."
        )
    return 0


def _numbers_to_write(chosen: StoredSettings, dequantize: bool) -> StoredSettings:
    """A quantized base is written as it is, also where it is expanded for computing, unless that is wanted."""
    model = chosen.config.model
    if "model.dequantize" not in chosen.typed:
        model = replace(model, dequantize="always" if dequantize else "never")
    return replace(chosen, config=replace(chosen.config, model=model))


def _default_name(to: str, place: AdapterSource) -> str:
    return f"export-{to}" if place.is_result else f"export-{to}-{place.folder.name}"


def _checked_adapter(place: AdapterSource) -> dict[str, bytes]:
    """The two files of an adapter folder, checked to be what stock mlx-lm reads."""
    where = place.folder / ADAPTERS
    for name, tensor in unpack(place.adapters, where=str(where))[0].items():
        if not tensor.is_finite():
            raise CheckpointError(f"{where}: {name} holds values that are not finite.")
    layers = place.about.get("num_layers")
    if type(layers) is not int or layers < 1:
        raise ModelError(f"{place.folder / ADAPTER_CONFIG}: num_layers is {layers}, where mlx-lm needs the real count.")
    return {ADAPTERS: place.adapters, ADAPTER_CONFIG: FileSystem().read_file(place.folder / ADAPTER_CONFIG, 1 << 20)}


def _base(place: AdapterSource, chosen: StoredSettings, any_base: bool) -> BaseModel:
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapted

    loaded = load_adapted(place, chosen, any_base=any_base, say=arguments.print_note)  # the adapter fits it, too
    loaded.take_off()
    return loaded.base


def _fuse(place: AdapterSource, chosen: StoredSettings, target: Path, dequantize: bool, any_base: bool) -> None:
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapted
    from runner.export.folders import fuse_adapter

    loaded = load_adapted(place, chosen, any_base=any_base, say=arguments.print_note)
    assert loaded.adapted is not None
    merged = fuse_adapter(loaded.adapted, dequantize=dequantize)
    if merged.config.get("quantization"):
        arguments.print_note(
            "the base stays quantized, so the merged layers are rounded again; --dequantize rounds nothing"
        )
    with _written(target) as temporary:
        _write(merged, temporary)


def _write(base: BaseModel, folder: Path) -> None:
    from runner.export.folders import size_of, write_model_folder

    needed, free = size_of(base), FileSystem().free_space(folder)
    if needed > free:
        raise StorageError(f"{folder.parent}: needs {format_bytes(needed)}, has {format_bytes(free)}.")
    try:
        with storage_errors(folder, "cannot be written"):
            write_model_folder(base, folder)
    except RuntimeError as error:  # MLX's own words for a write that failed
        raise StorageError(f"{folder} cannot be written: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes it at the end, and is gone if anything fails."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(target, "cannot be made"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        with storage_errors(target, "cannot be written"):
            if target.exists():
                raise ConfigError(f"{target} appeared meanwhile; nothing is replaced.")
            os.rename(temporary, target)
        FileSystem().fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    with storage_errors(folder, "cannot be written"):
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    FileSystem().fsync_folder(folder)


def _loadable(config: Config) -> str | None:
    """The name by which stock mlx-lm loads the very base, or None."""
    path = config.model.path
    is_ours = path.startswith("builtin:") or path.endswith(".gguf") or config.model.quantize.bits is not None
    return None if is_ours else path


def _command(model: Path | str | None, adapter: Path | None, config: Config) -> str | None:
    if model is None:
        return None
    words = ["mlx_lm.generate", "--model", relative_path(model) if isinstance(model, Path) else model]
    words += ["--adapter-path", relative_path(adapter)] if adapter else []
    words += [] if config.data.chat_template else ["--ignore-chat-template"]
    return f"{shlex.join(words)} --prompt …"
