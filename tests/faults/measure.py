"""What a reader takes to answer: `measure.py READER PATH…` prints a line of JSON for each path.

`seconds` of CPU time and `bytes` of memory beyond what the program has before it looks at the path; `error` is the
name of what was raised, or null, `told` its sentence. A reader that hangs is ended after half a minute.
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

from runner import blas, plain_yaml
from runner.checkpoints import tensors, verify
from runner.checkpoints.disk import Disk
from runner.config import Lora, Model

SECONDS = 30


def adapter() -> Callable[[Path], Any]:
    """`adapter=PATH` of a run of the tiny model."""
    from runner.models.adapters import Adapted, read_weights, warm_start
    from runner.models.loading import load

    params = Adapted(load(Model(path="builtin:tiny")), Lora(), seed=0).params()
    return lambda path: warm_start(params, read_weights(path, fitting=params), str(path))


def resume() -> Callable[[Path], Any]:
    """`resume=RUN`, as far as its checkpoint."""
    from runner.training import state

    return lambda path: state.read(verify.load(path / "checkpoints/step-0000004", Disk()))


def generate() -> Callable[[Path], Any]:
    """`runner generate RUN`, as far as its adapter."""
    from runner.models.arrays import arrays_from
    from runner.verbs import places

    return lambda path: arrays_from(places.find(path).adapters, where=str(path))


def export() -> Callable[[Path], Any]:
    """`runner export RUN`, as far as its adapter."""
    from runner.verbs import export, places

    return lambda path: export._checked_adapter(places.find(path))


def audit() -> Callable[[Path], Any]:
    """`runner verify RUN`: damage is raised."""
    from runner.errors import CheckpointError
    from runner.reports import audit
    from runner.reports.runs import read_run

    def look(path: Path) -> None:
        if damage := audit.of_run(read_run(path)).damage:
            raise CheckpointError("\n".join(damage))

    return look


def model() -> Callable[[Path], Any]:
    """`model.path=PATH`."""
    from runner.models.folders import write_folder
    from runner.models.loading import load

    with TemporaryDirectory() as folder:  # what the first model of a process imports is the program's own
        write_folder(load(Model(path="builtin:tiny")), Path(folder))
        load(Model(path=folder))
    return lambda path: load(Model(path=str(path))).tokenizer


def data() -> Callable[[Path], Any]:
    """`data.path=PATH`."""
    from runner.data.formats import Reading
    from runner.data.tokens import load_splits
    from runner.models import tiny

    tokenizer = tiny.tokenizer()
    reading = Reading(format="auto", mask_prompt=True, max_length=64, on_too_long="truncate")
    return lambda path: load_splits(str(path), tokenizer, reading)


def stored() -> Callable[[Path], Any]:
    """The config.yaml in a run, as a verb reads it."""
    from runner.verbs import settings

    return settings.read


def sweep() -> Callable[[Path], Any]:
    """The manifest of a sweep."""
    from runner.sweeps import manifest

    return manifest.read


def show() -> Callable[[Path], Any]:
    """`runner show RUN`."""
    from runner.reports import run_page
    from runner.reports.runs import read_run
    from runner.reports.tables import Screen

    return lambda path: run_page.show(run_page.read(read_run(path)), Screen(io.StringIO()))


def recipe() -> Callable[[Path], Any]:
    """A YAML below --config-dir, before Hydra reads it."""
    return plain_yaml.require_bounded


def header() -> Callable[[Path], Any]:
    """The header of a safetensors file."""
    return tensors.read_header


READERS = {
    made.__name__: made
    for made in (adapter, resume, generate, export, audit, model, data, stored, sweep, show, recipe, header)
}


def main() -> None:
    name, *paths = sys.argv[1:]
    blas.prepare()
    read = READERS[name]()
    for path in paths:
        print(json.dumps(measured(read, Path(path))), flush=True)


def measured(read: Callable[[Path], Any], path: Path) -> dict[str, Any]:
    """What `read(path)` took."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, begun, error = peak_bytes(), time.process_time(), None
    signal.alarm(SECONDS)
    try:
        read(path)
    except Exception as raised:
        error = raised
    signal.alarm(0)
    seconds = time.process_time() - begun
    return {
        "path": str(path),
        "error": type(error).__name__ if error else None,
        "told": str(error)[:10_000] if error else "",
        "seconds": seconds,
        "bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """The most memory that this process has had."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


if __name__ == "__main__":
    main()
