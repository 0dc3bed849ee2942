"""`runner export`: write a run's adapter in the format of another program, and check that it computes the same."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.checkpoints.safetensors_file import unpack
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.cli.commands.adapter_source import AdapterSource
from runner.common.errors import ConfigError, DataError, ModelError
from runner.common.layout import EXPORT_PREFIX
from runner.common.text import relative_path
from runner.export.support import refusal
from runner.runs.directory import RunDirectory

if TYPE_CHECKING:
    from runner.export.export import FidelityReference
    from runner.export.fidelity import FidelityCheck
    from runner.export.target import Target
    from runner.export.trained_adapter import TrainedAdapter

_FORMATS = {
    "mlx": "an adapter folder for mlx-lm",
    "fused": "a model folder for mlx-lm, the adapter merged",
    "peft": "an adapter folder for PEFT",
    "gguf": "a file for llama.cpp, the adapter merged",
    "npz": "a file for mlx-examples' lora.py",
    "hub": "a folder with a model card, to upload",
}
_TYPES = ("f32", "f16", "bf16", "q8_0")


def run(argv: list[str]) -> int:
    """Export what `argv` names, print how it compares with the run, and the command that tries it.

    Raises:
        RunnerError: an argument is invalid, a target exists, the adapter or the base cannot be loaded, the export does
            not compute what the run does, or the disk fails. Then nothing is written.
    """
    options = _parse(argv)
    sources = adapter_source.find_average(Path(options.run), options.average) if options.average else []
    source = sources[-1] if sources else adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    target = _target_path(options, source)
    base_target = target.with_name(f"{target.name}-base") if options.with_base else None
    for path in filter(None, (target, base_target)):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already; nothing is replaced. Choose another --out, or move it away.")
    blas.load_blas()
    from runner.cli.commands import export_adapter

    names = [name for adapter in sources or [source] for name in unpack(adapter.adapters, where=str(adapter.folder))[0]]
    if reason := refusal(
        options.to, settings.config.lora, names, adapter_only=options.adapter_only, averages=bool(sources)
    ):
        raise ConfigError(reason)
    if options.to == "npz":  # before the model is loaded, for minutes
        from runner.export.npz import require_readable_there

        require_readable_there(names, settings.config.lora)
    trained = export_adapter.load_trained(
        source, sources, settings, any_base=options.any_base, log=arguments.print_note
    )
    return _export(trained, options, source, sources, target, base_target)


def _export(
    trained: TrainedAdapter,
    options: Namespace,
    source: AdapterSource,
    sources: list[AdapterSource],
    target: Path,
    base_target: Path | None,
) -> int:
    from runner.cli.commands import export_adapter
    from runner.export import commands
    from runner.export import export as exports

    config = trained.config
    reference = _measure(trained, options)
    average = export_adapter.report_average(trained, reference, sources) if reference and sources else None
    writer = _target(options, trained, source, target)

    def finish(trained: TrainedAdapter, check: FidelityCheck | None, draft: Path) -> None:
        writer.finish(trained, check, draft)
        if base_target:
            export_adapter.export_base(trained, base_target, dequantize=options.dequantize)

    check = exports.export(trained, writer, target, reference, force=options.force, finish=finish)
    command = commands.try_command(options.to, target, base_target, trained)
    steps = f"average of {', '.join(f'step {s.step}' for s in sources)}" if sources else source.name
    if options.json:
        document: dict[str, Any] = {
            "to": options.to,
            "folder": str(target),
            "base": str(base_target) if base_target else None,
            "run": str(source.run),
            "step": None if sources else source.step,
            "exported": trained.name,
            "command": command,
            "check": exports.check_values(check) if check else None,
        }
        arguments.print_json(document | ({"average": vars(average)} if average else {}))
        return 0
    for line in [average.line] if average else []:
        print(line)
    if check is None:
        print(f"not compared with the {trained.name} (--force)")
    for line in exports.check_lines(check, config.data.metric, trained.name) if check else []:
        print(line)
    if check and not check.passes:
        print(f"warning: {check.problem(trained.name)}; exported all the same (--force)")
    print(f"wrote {relative_path(target)} ({steps})")
    if base_target:
        print(f"wrote {relative_path(base_target)} (the base model)")
    print(f"try it: {command}" if command else commands.no_command(config))
    return 0


def _measure(trained: TrainedAdapter, options: Namespace) -> FidelityReference | None:
    from runner.export.export import measure_run
    from runner.export.fidelity import ExportError

    try:
        return measure_run(trained, options.rows, arguments.print_note)
    except (DataError, ConfigError, ModelError) as error:
        reason = f"{str(error).rstrip('.')}."
        if options.force:
            arguments.print_note(f"the export is not compared with the run (--force): {reason}")
            return None
        raise ExportError(
            f"The export cannot be compared with the run: {reason} Other rows: data.path=…; without them: --force."
        ) from error


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("export")
    formats = "; ".join(f"{name}: {text}" for name, text in _FORMATS.items())
    parser.add_argument("--to", choices=tuple(_FORMATS), required=True, help=formats)
    parser.add_argument("--out", metavar="PATH", help="what to create; must not exist (default: RUN/export-FORMAT)")
    parser.add_argument("--average", metavar="last:N|best:N", help="the average of N of the run's checkpoints")
    parser.add_argument("--type", choices=_TYPES, help="with --to gguf: the type of the weights (default: f16 or bf16)")
    parser.add_argument("--dequantize", action="store_true", help="dequantize the base, so that merging rounds nothing")
    parser.add_argument(
        "--with-base", action="store_true", help="with --to mlx: write the base model too, to PATH-base"
    )
    parser.add_argument("--adapter-only", action="store_true", help="with --to hub: the adapter without its base model")
    parser.add_argument("--base-model", metavar="ID", help="with --to hub: the base model's name there")
    parser.add_argument("--license", metavar="ID", help="with --to hub: the base model's licence, such as apache-2.0")
    parser.add_argument("--rows", type=int, default=64, help="validation rows to compare on, -1 for all (default: 64)")
    parser.add_argument("--force", action="store_true", help="export even what does not pass, or cannot be compared")
    options = parser.parse(argv)
    if options.with_base and options.to != "mlx":
        raise ConfigError("--with-base needs --to mlx: a fused model contains its base.")
    fuses = options.to == "fused" or (options.to == "hub" and not options.adapter_only)
    if options.dequantize and not (fuses or options.with_base):
        raise ConfigError("--dequantize changes a base model: it needs --to fused, --to hub or --with-base.")
    if options.type and options.to != "gguf":
        raise ConfigError("--type is that of a GGUF file: it needs --to gguf.")
    for name in ("adapter_only", "base_model", "license"):
        if getattr(options, name) and options.to != "hub":
            raise ConfigError(f"--{name.replace('_', '-')} needs --to hub.")
    if options.average and options.checkpoint:
        raise ConfigError("--average and --checkpoint exclude each other.")
    if options.rows == 0 or options.rows < -1:
        raise ConfigError(f"--rows {options.rows} is invalid: must be 1 or more, or -1 (all).")
    return options


def _target_path(options: Namespace, source: AdapterSource) -> Path:
    suffix = {"gguf": ".gguf", "npz": ".npz"}.get(options.to, "")
    if options.out:
        path = Path(options.out).expanduser().absolute()
        if suffix and path.suffix != suffix:
            raise ConfigError(f"--out {options.out}: --to {options.to} writes a file whose name ends in {suffix}.")
        if not suffix and path.suffix in (".gguf", ".npz"):
            raise ConfigError(f"--out {options.out}: --to {options.to} writes a folder.")
        return path
    name = f"{EXPORT_PREFIX}{options.to}{f'-{options.type}' if options.type else ''}"
    if options.average:
        name += f"-{options.average.replace(':', '-')}"
    elif not source.is_result:
        name += f"-{source.folder.name}"
    return source.run / f"{name}{suffix}"


def _target(options: Namespace, trained: TrainedAdapter, source: AdapterSource, path: Path) -> Target:
    """Return what writes the chosen format."""
    if options.to == "mlx":
        from runner.export.model_folder import MlxTarget

        if trained.config.data.template:
            arguments.print_note(
                f"the run used the chat template {trained.config.data.template}, which an adapter folder "
                "does not contain"
            )
        return MlxTarget()
    if options.to == "fused":
        from runner.export.model_folder import FusedTarget

        return FusedTarget(path, dequantize=options.dequantize)
    if options.to == "npz":
        from runner.export.npz import NpzTarget

        return NpzTarget()
    if options.to == "peft":
        from runner.export.peft import PeftTarget

        return PeftTarget()
    if options.to == "gguf":
        from runner.export.gguf import GgufTarget

        return GgufTarget(options.type)
    from runner.export.hub import HubTarget

    return HubTarget(
        path,
        dequantize=options.dequantize,
        adapter_only=options.adapter_only,
        base=options.base_model,
        licence=options.license,
        step=None if options.average else source.step,
        status=RunDirectory(source.run).read_status(),
    )
