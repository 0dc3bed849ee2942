"""Measure what reading a file costs: `measure.py READER PATH…` prints one line of JSON for each path.

`seconds` is CPU time and `bytes` the memory beyond what the program used before; `error` is the class of the exception
raised, or null, and `message` its text. A reader that hangs is ended after half a minute.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runner.backends import blas
from runner.checkpoints import safetensors_file, verify
from runner.common import safe_yaml
from runner.common.filesystem import FileSystem
from runner.config.schema import LoraConfig, ModelConfig

SECONDS = 30


def adapter() -> Callable[[Path], Any]:
    """`adapter=PATH` of a run of the tiny model."""
    from runner.models.load import load_base_model
    from runner.models.lora import AdaptedModel
    from runner.models.warm_start import read_weights, warm_start

    params = AdaptedModel(load_base_model(ModelConfig(path="builtin:tiny")), LoraConfig(), seed=0).params()
    return lambda path: warm_start(params, read_weights(path, fitting=params), str(path))


def resume() -> Callable[[Path], Any]:
    """`resume=RUN`, as far as its checkpoint."""
    from runner.training import state_files

    return lambda path: state_files.read_state(verify.load_checkpoint(path / "checkpoints/step-0000004", FileSystem()))


def generate() -> Callable[[Path], Any]:
    """`runner generate RUN`, as far as its adapter."""
    from runner.cli.commands import adapter_source
    from runner.models.arrays import parse_arrays

    return lambda path: parse_arrays(adapter_source.find_adapter(path).adapters, source=str(path))


def export() -> Callable[[Path], Any]:
    """`runner export RUN`, as far as its adapter."""
    from runner.cli.commands import adapter_source
    from runner.export.mlx import check_adapter

    def check(path: Path) -> None:
        source = adapter_source.find_adapter(path)
        check_adapter(source.folder, source.adapters, source.adapter_config)

    return check


def audit() -> Callable[[Path], Any]:
    """`runner verify RUN`: damage is raised."""
    from runner.common.errors import CheckpointError
    from runner.reports.audit import audit_run
    from runner.runs.inspect import read_run

    def check(path: Path) -> None:
        if damage := audit_run(read_run(path)).damage:
            raise CheckpointError("\n".join(damage))

    return check


def model() -> Callable[[Path], Any]:
    """`model.path=PATH`."""
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    with TemporaryDirectory() as folder:  # the imports of the first model do not count
        write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), Path(folder))
        load_base_model(ModelConfig(path=folder))
    return lambda path: load_base_model(ModelConfig(path=str(path))).tokenizer


def data() -> Callable[[Path], Any]:
    """`data.path=PATH`."""
    from runner.config.schema import DataConfig
    from runner.data.formats import EncodeOptions
    from runner.data.tokenize import load_dataset
    from runner.models import tiny

    tokenizer = tiny.build_tokenizer()
    options = EncodeOptions.from_config(DataConfig(max_length=64))
    return lambda path: load_dataset(str(path), tokenizer, options)


def stored() -> Callable[[Path], Any]:
    """The config.yaml in a run, as a verb reads it."""
    from runner.cli.commands import stored_settings

    return stored_settings.read_settings


def sweep() -> Callable[[Path], Any]:
    """The manifest of a sweep."""
    from runner.runs import sweep_manifest

    return sweep_manifest.read_manifest


def show() -> Callable[[Path], Any]:
    """`runner show RUN`."""
    from runner.reports.run_page import print_run_page, read_run_page
    from runner.reports.screen import Screen
    from runner.runs.inspect import read_run

    return lambda path: print_run_page(read_run_page(read_run(path)), Screen(io.StringIO()))


def recipe() -> Callable[[Path], Any]:
    """A YAML below --config-dir, before Hydra reads it."""
    return safe_yaml.require_bounded


def header() -> Callable[[Path], Any]:
    """The header of a safetensors file."""
    return safetensors_file.read_header


READERS = {
    made.__name__: made
    for made in (adapter, resume, generate, export, audit, model, data, stored, sweep, show, recipe, header)
}


def main() -> None:
    name, *paths = sys.argv[1:]
    blas.load_blas()
    read = READERS[name]()
    for path in paths:
        print(json.dumps(measure(read, Path(path))), flush=True)


def measure(read: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    """Return what `read(path)` cost."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, error = peak_bytes(), time.process_time(), None
    signal.alarm(SECONDS)
    try:
        read(path)
    except Exception as raised:
        error = raised
    signal.alarm(0)
    seconds = time.process_time() - start
    return {
        "path": str(path),
        "error": type(error).__name__ if error else None,
        "message": str(error)[:10_000] if error else "",
        "seconds": seconds,
        "bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


if __name__ == "__main__":
    main()
