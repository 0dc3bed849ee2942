"""Load a fast BLAS for MLX's CPU backend, before MLX is imported.

The ``mlx-cpu`` wheel links the netlib reference BLAS, many times slower than OpenBLAS on the same cores. The dynamic
linker searches the global scope first, so a BLAS that is loaded there before ``libmlx.so`` takes its place. macOS
(Accelerate, Metal) and the CUDA packages bring their own, and nothing is loaded there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.backends import blas_library
from runner.backends.blas_library import BlasError, LoadedBlas
from runner.backends.mlx_build import installed, mlx_build
from runner.common.cores import usable_cores
from runner.common.system_packages import install_hint

SLOW = "MLX runs on its reference BLAS here, 15 times slower or more"
# BLIS is tried after the OpenBLAS of the wheel, which is faster where both were measured.
SYSTEM_NAMES = (
    "libopenblasp.so.0",
    "libopenblas.so.0",
    "libopenblaso.so.0",
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
    "libmkl_rt.so",
)
OPENBLAS_PACKAGES = {
    "apt-get": "libopenblas0-pthread",
    "dnf": "openblas-threads",
    "zypper": "libopenblas_pthreads0",
    "pacman": "openblas",
}
COMPILER_PACKAGES = dict.fromkeys(OPENBLAS_PACKAGES, "gcc")
BLIS_NAMES = ("libblis-mt.so.4", "libblis.so.4")
# OpenBLAS's idle threads spin before they sleep, by default 2^26 times, which takes a core from MLX's single-threaded
# work and from other processes. With 2^12 a step took the same time on two idle cores and a quarter less CPU time, and
# was 1.3 times as fast with another process on one of them.
SPIN = {"OPENBLAS_THREAD_TIMEOUT": "12"}
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class BlasReport:
    """The BLAS of this process."""

    kind: str
    """native (macOS, CUDA), missing (MLX without a backend), preloaded, named, system, wheel or reference."""
    library: str | None = None
    """Path of the library that was loaded."""
    version: str | None = None
    """Version string of the library."""
    core: str | None = None
    """CPU kernels that it selected, if it reports them."""
    threads: int | None = None
    """Threads of one matrix product; None where MLX's own backend decides."""
    advice: str | None = None
    """One line for the user: what is slow or missing, and what to install."""


_report: BlasReport | None = None
"""A library that was loaded into the global scope stays there: it belongs to the process, not to a run."""


def load_blas(jobs: int = 1) -> BlasReport:
    """Load the fastest BLAS found for the whole process; call it before the first ``import mlx.core``.

    `jobs` such processes share the machine: each uses its share of the usable cores, unless ``OPENBLAS_NUM_THREADS``
    is set. ``RUNNER_BLAS`` names a library, or ``off``. Never raises: without a library the run is slow, and `advice`
    gives the reason. A second call returns the report of the first.
    """
    global _report
    if _report is None:
        try:
            _report = _load_best(jobs)
        except Exception as error:
            _report = _reference(f"{SLOW}: {type(error).__name__}: {error}")
    return _report


def identity() -> dict[str, str | int | None]:
    """Return what the last digits of a float32 product depend on: library, threads and core of this process's BLAS."""
    report = load_blas()
    return {"library": report.version or report.kind, "threads": report.threads, "core": report.core}


def thread_count(jobs: int, cores: int) -> int:
    """Return ``OPENBLAS_NUM_THREADS``, else ``OMP_NUM_THREADS``, else `cores` / `jobs`, at least 1."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return max(1, cores // max(1, jobs))


def _load_best(jobs: int) -> BlasReport:
    build = mlx_build()
    if build == "missing":
        advice = "MLX has no backend here: pip install 'mlx-runner[cpu]', or 'mlx-runner[cuda]' for NVIDIA"
        return BlasReport(kind="missing", advice=advice)
    if build != "cpu":
        return BlasReport(kind="native")
    requested = os.environ.get("RUNNER_BLAS", "").strip()
    if requested.lower() == "off":
        return _reference(f"{SLOW}: RUNNER_BLAS=off is set")
    if "mlx.core" in sys.modules:
        return _reference(f"{SLOW}: MLX was imported before load_blas()")
    threads = thread_count(jobs, usable_cores())
    with _threads_in_environment(threads):
        return _load_first(requested, threads)


def _load_first(requested: str, threads: int) -> BlasReport:
    if not requested and (path := blas_library.owner("cblas_sgemm")):
        return _report_of("preloaded", path, blas_library.describe(ctypes.CDLL(None)), threads)
    reasons: dict[str, str] = {}
    for kind, path in _candidates(requested):
        try:
            library = blas_library.open_for_process(path)
        except BlasError as error:
            reasons[kind] = str(error)
            continue
        advice = f"RUNNER_BLAS is not used: {reasons['named']}" if "named" in reasons else None
        return _report_of(kind, path, library, threads, advice)
    return _reference(_advice(reasons))


def _report_of(kind: str, path: str, library: LoadedBlas, threads: int, advice: str | None = None) -> BlasReport:
    count = library.threads or threads
    return BlasReport(kind=kind, library=path, version=library.version, core=library.core, threads=count, advice=advice)


def _candidates(requested: str) -> Iterator[tuple[str, str]]:
    if requested:
        named = os.path.expanduser(requested)
        yield "named", os.path.abspath(named) if os.path.exists(named) else named
    yield from (("system", path) for path in _system_libraries(SYSTEM_NAMES))
    if wheel := installed("scipy-openblas32"):
        yield "wheel", str(wheel.locate_file("scipy_openblas32/lib/libscipy_openblas.so"))
    yield from (("system", path) for path in _system_libraries(BLIS_NAMES))


def _system_libraries(names: tuple[str, ...]) -> Iterator[str]:
    for folder in _system_folders():
        yield from (str(folder / name) for name in names if (folder / name).exists())


def _system_folders() -> list[Path]:
    configured = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    standard = (
        f"{sys.prefix}/lib",
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib64",
        "/usr/local/lib",
        "/opt/OpenBLAS/lib",
        "/opt/intel/oneapi/mkl/latest/lib",
    )
    return [Path(folder) for folder in dict.fromkeys([*configured, *standard])]


def _advice(reasons: dict[str, str]) -> str:
    library, compiler = install_hint(OPENBLAS_PACKAGES), install_hint(COMPILER_PACKAGES)
    if "wheel" not in reasons:
        remedy = f"pip install scipy-openblas32, or install OpenBLAS{library}"
    elif "compiler" in reasons["wheel"]:
        remedy = f"install a C compiler{compiler} or OpenBLAS{library}"
    else:
        remedy = f"install OpenBLAS{library} or name one with RUNNER_BLAS=<path>"
    details = "; ".join(" ".join(reason.split()) for reason in reasons.values())
    return f"{SLOW}: {remedy}" + (f" [{details}]" if details else "")


def _reference(advice: str) -> BlasReport:
    return BlasReport(kind="reference", version="reference BLAS", core=platform.machine(), threads=1, advice=advice)


@contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Set the thread variables while a library loads; child processes started later see the former values."""
    variables = {**{name: str(threads) for name in THREAD_VARIABLES}, **SPIN}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if not before[name]})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
