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

from runner import blas
from runner.checkpoints.disk import Disk, size_text
from runner.checkpoints.tensors import unpack
from runner.config import Config
from runner.errors import CheckpointError, ConfigError, ModelError, StorageError
from runner.reports.summary import short
from runner.rundir import ADAPTER_CONFIG, ADAPTERS, explained
from runner.verbs import VERBS, asking, places, settings
from runner.verbs.places import Place
from runner.verbs.settings import Settings

if TYPE_CHECKING:
    from runner.models.loading import Base


def run(argv: list[str]) -> int:
    """Export what `argv` names. Everything is written beside its target and renamed when it is whole.

    Raises:
        RunnerError: a word, the adapter or the base cannot be used, the target exists, or the disk fails.
    """
    parser = asking.parser("export", VERBS["export"])
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", default=[], help=asking.CHANGES)
    parser.add_argument(
        "--to", choices=("mlx", "fused"), required=True, help="an mlx-lm adapter folder, or a whole model"
    )
    parser.add_argument("--out", metavar="DIR", help="where to; must not exist (default: RUN/export-mlx, -fused)")
    parser.add_argument("--dequantize", action="store_true", help="expand a quantized base; nothing is rounded again")
    parser.add_argument("--with-base", action="store_true", help="with --to mlx: write the base model too, to DIR-base")
    words = asking.parse(parser, argv)
    if words.with_base and words.to != "mlx":
        raise ConfigError("--with-base belongs to --to mlx: a fused model holds its base.")
    if words.dequantize and words.to == "mlx" and not words.with_base:
        raise ConfigError("--dequantize is about a base model: use it with --to fused or --with-base.")
    place = places.find(Path(words.run), words.checkpoint)
    chosen = _numbers_to_write(settings.read(place.run, words.changes), words.dequantize)
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
                Disk().write_file(temporary / name, data)
            if base is not None:
                with _written(beside) as folder:
                    _write(base, folder)
    model = target if words.to == "fused" else beside if words.with_base else _loadable(chosen.config)
    command = _command(model, target if words.to == "mlx" else None, chosen.config)
    if words.json:
        document = {"to": words.to, "folder": str(target), "base": str(beside) if words.with_base else None}
        asking.print_json({**document, "run": str(place.run), "step": place.step, "command": command})
        return 0
    for path in targets:
        print(f"wrote {short(path)} ({place.name})" if path == target else f"wrote {short(path)} (the base model)")
    if command:
        print(f"try it: {command}")
    else:
        print(
            f"Stock mlx-lm cannot load {chosen.config.model.path} by its name, nor a base that was quantized while "
            "loading: --with-base writes it as a folder."
        )
    return 0


def _numbers_to_write(chosen: Settings, dequantize: bool) -> Settings:
    """A quantized base is written as it is, also where it is expanded for computing, unless that is wanted."""
    model = chosen.config.model
    if "model.dequantize" not in chosen.typed:
        model = replace(model, dequantize="always" if dequantize else "never")
    return replace(chosen, config=replace(chosen.config, model=model))


def _default_name(to: str, place: Place) -> str:
    return f"export-{to}" if place.is_result else f"export-{to}-{place.folder.name}"


def _checked_adapter(place: Place) -> dict[str, bytes]:
    """The two files of an adapter folder, checked to be what stock mlx-lm reads."""
    where = place.folder / ADAPTERS
    for name, tensor in unpack(place.adapters, where=str(where))[0].items():
        if not tensor.is_finite():
            raise CheckpointError(f"{where}: {name} holds values that are not finite.")
    layers = place.about.get("num_layers")
    if type(layers) is not int or layers < 1:
        raise ModelError(f"{place.folder / ADAPTER_CONFIG}: num_layers is {layers}, where mlx-lm needs the real count.")
    return {ADAPTERS: place.adapters, ADAPTER_CONFIG: Disk().read_file(place.folder / ADAPTER_CONFIG, 1 << 20)}


def _base(place: Place, chosen: Settings, any_base: bool) -> Base:
    blas.prepare()
    from runner.verbs.loading import load_adapted

    loaded = load_adapted(place, chosen, any_base=any_base, say=asking.say)  # the adapter fits it, too
    loaded.take_off()
    return loaded.base


def _fuse(place: Place, chosen: Settings, target: Path, dequantize: bool, any_base: bool) -> None:
    blas.prepare()
    from runner.models.folders import merge
    from runner.verbs.loading import load_adapted

    loaded = load_adapted(place, chosen, any_base=any_base, say=asking.say)
    assert loaded.adapted is not None
    merged = merge(loaded.adapted, dequantize=dequantize)
    if merged.config.get("quantization"):
        asking.say("the base stays quantized, so the merged layers are rounded again; --dequantize rounds nothing")
    with _written(target) as temporary:
        _write(merged, temporary)


def _write(base: Base, folder: Path) -> None:
    from runner.models.folders import size_of, write_folder

    needed, free = size_of(base), Disk().free_space(folder)
    if needed > free:
        raise StorageError(f"{folder.parent}: needs {size_text(needed)}, has {size_text(free)}.")
    try:
        with explained(folder, "cannot be written"):
            write_folder(base, folder)
    except RuntimeError as error:  # MLX's own words for a write that failed
        raise StorageError(f"{folder} cannot be written: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes it at the end, and is gone if anything fails."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with explained(target, "cannot be made"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        with explained(target, "cannot be written"):
            if target.exists():
                raise ConfigError(f"{target} appeared meanwhile; nothing is replaced.")
            os.rename(temporary, target)
        Disk().fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    with explained(folder, "cannot be written"):
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    Disk().fsync_folder(folder)


def _loadable(config: Config) -> str | None:
    """The name by which stock mlx-lm loads the very base, or None."""
    path = config.model.path
    is_ours = path.startswith("builtin:") or path.endswith(".gguf") or config.model.quantize.bits is not None
    return None if is_ours else path


def _command(model: Path | str | None, adapter: Path | None, config: Config) -> str | None:
    if model is None:
        return None
    words = ["mlx_lm.generate", "--model", short(model) if isinstance(model, Path) else model]
    words += ["--adapter-path", short(adapter)] if adapter else []
    words += [] if config.data.chat_template else ["--ignore-chat-template"]
    return f"{shlex.join(words)} --prompt …"
