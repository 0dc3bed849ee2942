"""Give MLX's CPU backend a fast BLAS before MLX is loaded. Knows no MLX.

The ``mlx-cpu`` wheel links the netlib reference BLAS, many times slower than OpenBLAS on the same cores. The
dynamic linker asks the global scope first: a BLAS loaded there before ``libmlx.so`` wins. macOS (Accelerate,
Metal) and the CUDA packages bring their own and are left alone.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.backends.cpu import blas_library
from runner.backends.cpu.blas_library import BlasError, LoadedBlas
from runner.common.cores import usable_cores

SLOW = "MLX runs on its reference BLAS here, 15 times slower or more"
# BLIS comes after the wheel's OpenBLAS, which is faster where both were measured.
SYSTEM_NAMES = (
    "libopenblasp.so.0",
    "libopenblas.so.0",
    "libopenblaso.so.0",
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
    "libmkl_rt.so",
)
BLIS_NAMES = ("libblis-mt.so.4", "libblis.so.4")
# OpenBLAS's idle threads spin before they sleep: 2^26 times as shipped, which takes a core from MLX's own
# single-threaded work and from other processes. At 2^12 a step took as long on two idle cores with a quarter less
# CPU time, and was 1.3 times as fast with another process on one of them.
SPIN = {"OPENBLAS_THREAD_TIMEOUT": "12"}
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class BlasReport:
    """Which BLAS this process multiplies with."""

    kind: str
    """native (macOS, CUDA), missing (MLX without a backend), preloaded, named, system, wheel or reference."""
    library: str | None = None
    """Path of the library that was loaded."""
    version: str | None = None
    """What the library says about itself."""
    core: str | None = None
    """The CPU kernels that it chose, where it tells."""
    threads: int | None = None
    """Threads of one product; None where MLX's own backend decides."""
    advice: str | None = None
    """One line for a person: what is slow or missing, and what to install."""


_report: BlasReport | None = None


def load_blas(jobs: int = 1) -> BlasReport:
    """Load the fastest BLAS found for the whole process; call it before the first ``import mlx.core``.

    `jobs` is how many such processes share the machine: each gets its part of the usable cores, unless
    ``OPENBLAS_NUM_THREADS`` says otherwise. ``RUNNER_BLAS`` names a library, or ``off``. Never raises: a slow
    run is better than none, and `advice` tells why. A second call returns the first one's report.
    """
    global _report
    if _report is None:
        try:
            _report = _prepare(jobs)
        except Exception as error:
            _report = _reference(f"{SLOW}: {type(error).__name__}: {error}")
    return _report


def blas_identity(report: BlasReport) -> dict[str, str | int | None]:
    """What the bits of a float32 product depend on: ``{"library", "threads", "core"}``, for a checkpoint."""
    return {"library": report.version or report.kind, "threads": report.threads, "core": report.core}


def thread_count(jobs: int, cores: int) -> int:
    """``OPENBLAS_NUM_THREADS``, else ``OMP_NUM_THREADS``, else `cores` / `jobs`, at least 1."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return max(1, cores // max(1, jobs))


def _prepare(jobs: int) -> BlasReport:
    backend = _backend()
    if backend != "mlx-cpu":
        advice = "MLX has no backend here: pip install 'mlx-runner[cpu]', or 'mlx-runner[cuda]' for NVIDIA"
        return BlasReport(kind=backend, advice=advice if backend == "missing" else None)
    choice = os.environ.get("RUNNER_BLAS", "").strip()
    if choice.lower() == "off":
        return _reference(f"{SLOW}, as RUNNER_BLAS=off asks")
    if "mlx.core" in sys.modules:
        return _reference(f"{SLOW}: MLX was imported before load_blas()")
    threads = thread_count(jobs, usable_cores())
    with _threads_in_environment(threads):
        return _load(choice, threads)


def _load(choice: str, threads: int) -> BlasReport:
    if not choice and (library := blas_library.owner("cblas_sgemm")):
        return _loaded("preloaded", library, blas_library.describe(ctypes.CDLL(None)), threads)
    reasons: dict[str, str] = {}
    for kind, path in _candidates(choice):
        try:
            found = blas_library.open_for_process(path)
        except BlasError as error:
            reasons[kind] = str(error)
            continue
        advice = f"RUNNER_BLAS was passed over: {reasons['named']}" if "named" in reasons else None
        return _loaded(kind, path, found, threads, advice)
    return _reference(_advice(reasons))


def _loaded(kind: str, path: str, found: LoadedBlas, threads: int, advice: str | None = None) -> BlasReport:
    count = found.threads or threads
    return BlasReport(kind=kind, library=path, version=found.version, core=found.core, threads=count, advice=advice)


def _candidates(choice: str) -> Iterator[tuple[str, str]]:
    if choice:
        named = os.path.expanduser(choice)
        yield "named", os.path.abspath(named) if os.path.exists(named) else named
    yield from (("system", path) for path in _system_libraries(SYSTEM_NAMES))
    if wheel := _installed("scipy-openblas32"):
        yield "wheel", str(wheel.locate_file("scipy_openblas32/lib/libscipy_openblas.so"))
    yield from (("system", path) for path in _system_libraries(BLIS_NAMES))


def _system_libraries(names: tuple[str, ...]) -> Iterator[str]:
    for folder in _system_folders():
        yield from (str(folder / name) for name in names if (folder / name).exists())


def _system_folders() -> list[Path]:
    named = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    usual = (
        f"{sys.prefix}/lib",
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib64",
        "/usr/local/lib",
        "/opt/OpenBLAS/lib",
        "/opt/intel/oneapi/mkl/latest/lib",
    )
    return [Path(folder) for folder in dict.fromkeys([*named, *usual])]


def _advice(reasons: dict[str, str]) -> str:
    debian = "apt-get install libopenblas0-pthread"
    if "wheel" not in reasons:
        remedy = f"pip install scipy-openblas32, or install OpenBLAS (Debian: {debian})"
    elif "compiler" in reasons["wheel"]:
        remedy = f"install a C compiler (Debian: apt-get install gcc) or OpenBLAS ({debian})"
    else:
        remedy = f"install OpenBLAS (Debian: {debian}) or name one with RUNNER_BLAS=<path>"
    because = "; ".join(" ".join(reason.split()) for reason in reasons.values())
    return f"{SLOW}: {remedy}" + (f" [{because}]" if because else "")


def _reference(advice: str) -> BlasReport:
    return BlasReport(kind="reference", version="reference BLAS", core=platform.machine(), threads=1, advice=advice)


def _backend() -> str:
    """mlx-cpu, or native (nothing to do), or missing (Linux's bare ``mlx``, without its library)."""
    if sys.platform != "linux" or _installed("mlx-cuda-12") or _installed("mlx-cuda-13"):
        return "native"
    if _installed("mlx-cpu"):
        return "mlx-cpu"
    core = _installed("mlx")
    return "missing" if core and not Path(str(core.locate_file("mlx/lib/libmlx.so"))).exists() else "native"


def _installed(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Set the thread variables while a library loads; afterwards a child process counts for itself again."""
    wanted = {**{name: str(threads) for name in THREAD_VARIABLES}, **SPIN}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if not before[name]})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
