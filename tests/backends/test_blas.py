"""The BLAS under MLX's CPU backend: found, proved, loaded before MLX, and never a reason to crash."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.backends import blas, mlx_build
from runner.backends.blas_library import FORWARDED

ROOT = Path(__file__).resolve().parents[2]
CPU_BUILD = mlx_build.mlx_build() == "cpu"
WHEEL = mlx_build.installed("scipy-openblas32")
WHEEL_LIBRARY = str(WHEEL.locate_file("scipy_openblas32/lib/libscipy_openblas.so")) if WHEEL else ""
COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)

cpu_build = pytest.mark.skipif(not CPU_BUILD, reason="only Linux with MLX's CPU build needs a BLAS")
shim = pytest.mark.skipif(
    not (CPU_BUILD and WHEEL and COMPILER), reason="needs MLX's CPU build, scipy-openblas32 and a compiler"
)

REPORT = """
import dataclasses, json, os, sys
from runner.backends import blas
report = blas.load_blas()
print(json.dumps(dataclasses.asdict(report) | {"identity": blas.identity()}))
"""


def child(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RUNNER_BLAS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")
    }
    environment = inherited | {"RUNNER_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen) -> dict:
    """The last line that `process` prints, as JSON; its error output where it fails."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def library_from(source: str, target: Path) -> str:
    words = [str(COMPILER), "-x", "c", "-shared", "-fPIC", "-o", str(target), "-"]
    subprocess.run(words, input=source, text=True, check=True)
    return str(target)


@shim
def test_the_library_of_the_wheel_serves_the_whole_process(tmp_path: Path) -> None:
    code = REPORT.replace(
        "print(",
        "from runner.backends.blas_library import owner, FORWARDED; owners = [owner(n) for n in FORWARDED]\nprint(",
    ).replace('{"identity"', '{"owners": owners, "identity"')
    report = said(child(code, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY))
    assert report["kind"] == "named" and report["library"] == WHEEL_LIBRARY and report["advice"] is None
    assert "OpenBLAS" in report["version"] and report["core"]
    assert {str(Path(path).parent) for path in report["owners"]} == {str(tmp_path)}
    assert report["identity"] == {
        "library": report["version"],
        "threads": report["threads"],
        "core": report["core"],
    }


@cpu_build
@pytest.mark.parametrize("choice", ["off", pytest.param("wheel", marks=shim)])
def test_mlx_multiplies_and_factors_as_numpy_does(tmp_path: Path, choice: str) -> None:
    code = """
import json, sys
from runner.backends import blas
kind = blas.load_blas().kind
assert "mlx" not in sys.modules and "mlx.core" not in sys.modules
import numpy as np, mlx.core as mx
rng = np.random.default_rng(0)
a, b = (rng.standard_normal((96, 96), dtype=np.float32) for _ in range(2))
c = (a + 1j * b).astype(np.complex64)
s = a @ a.T + 96 * np.eye(96, dtype=np.float32)
on = mx.cpu
def far(got, want): return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
with mx.stream(on):
    m, n, k, p = mx.array(a), mx.array(b), mx.array(c), mx.array(s)
    u, d, vt = mx.linalg.svd(m)
    far_off = {
        "gemm": far(m @ n, a @ b),
        "gemm transposed": far(m @ n.T, a @ b.T),
        "complex gemm": far(k @ k, c @ c),
        "svd": far((u * d) @ vt, a),
        "cholesky": far(mx.linalg.cholesky(p), np.linalg.cholesky(s)),
        "inverse": far(mx.linalg.inv(p), np.linalg.inv(s)),
        "eigenvalues": far(mx.linalg.eigvalsh(p), np.linalg.eigvalsh(s)),
    }
print(json.dumps({"kind": kind, "far_off": far_off}))
"""
    result = said(child(code, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY if choice == "wheel" else "off"))
    assert result["kind"] == ("named" if choice == "wheel" else "reference")
    assert max(result["far_off"].values()) < 2e-5, result


@cpu_build
def test_off_keeps_the_reference_blas_with_advice(tmp_path: Path) -> None:
    report = said(child(REPORT, tmp_path, RUNNER_BLAS="off"))
    assert (report["kind"], report["threads"], report["library"]) == ("reference", 1, None)
    assert "RUNNER_BLAS=off" in report["advice"] and not list(tmp_path.iterdir())


@cpu_build
def test_a_named_library_that_does_not_exist_is_skipped_with_advice(tmp_path: Path) -> None:
    report = said(child(REPORT, tmp_path, RUNNER_BLAS=str(tmp_path / "libnone.so")))
    assert report["kind"] != "named" and "libnone.so" in report["advice"] and "\n" not in report["advice"]


@shim
def test_a_library_that_crashes_or_computes_wrong_results_is_skipped(tmp_path: Path) -> None:
    crash = "__attribute__((constructor)) void die(void) { __builtin_trap(); } void cblas_sgemm(void) {}"
    for name, source in {"crash": crash, "wrong": "void cblas_sgemm(void) {}"}.items():
        library = library_from(source, tmp_path / f"{name}.so")
        report = said(child(REPORT, tmp_path / "cache", RUNNER_BLAS=library))
        assert report["kind"] != "named" and f"{name}.so" in report["advice"], name


@shim
def test_without_a_compiler_the_advice_is_to_install_one(tmp_path: Path) -> None:
    code = REPORT.replace("report =", "blas._system_folders = lambda: []\nreport =")
    report = said(child(code, tmp_path, PATH=str(tmp_path)))
    assert report["kind"] == "reference"
    assert "install a C compiler" in report["advice"] and "\n" not in report["advice"]


@cpu_build
def test_without_wheel_and_system_library_the_advice_is_to_install_one(tmp_path: Path) -> None:
    code = REPORT.replace(
        "report =",
        """
blas._system_folders = lambda: []
found = blas.installed
blas.installed = lambda name: None if name == "scipy-openblas32" else found(name)
report =""",
        1,
    )
    report = said(child(code, tmp_path))
    assert report["kind"] == "reference" and "pip install scipy-openblas32" in report["advice"]


@shim
def test_two_processes_with_a_cold_cache_build_one_shim(tmp_path: Path) -> None:
    both = [child(REPORT, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY) for _ in range(2)]
    assert [said(process)["kind"] for process in both] == ["named", "named"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rsplit("-", 1)[0] for name in names] == ["blas-proved", "blas-shim"], names


@shim
def test_a_damaged_shim_is_built_again(tmp_path: Path) -> None:
    said(child(REPORT, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY))
    (built,) = tmp_path.glob("blas-shim-*.so")
    whole = built.read_bytes()
    built.write_bytes(whole[:100])
    assert said(child(REPORT, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY))["kind"] == "named"
    assert built.read_bytes() == whole


@shim
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    assert said(child(REPORT, in_the_way, RUNNER_BLAS=WHEEL_LIBRARY))["kind"] == "named"


@cpu_build
def test_loading_after_mlx_was_imported_gives_advice(tmp_path: Path) -> None:
    report = said(child("import mlx.core\n" + REPORT, tmp_path))
    assert report["kind"] == "reference" and "before load_blas()" in report["advice"]


def test_on_macos_nothing_happens(tmp_path: Path) -> None:
    code = "import sys, os; sys.platform = 'darwin'; before = dict(os.environ)\n" + REPORT
    report = said(child(code + "assert before == dict(os.environ)", tmp_path, RUNNER_BLAS="/nowhere"))
    assert (report["kind"], report["advice"], report["threads"]) == ("native", None, None)
    assert not list(tmp_path.iterdir())


def test_with_the_cuda_package_nothing_happens(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    record = packages / "mlx_cuda_13-0.32.4.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.4\n")
    report = said(child(REPORT, tmp_path / "cache", PYTHONPATH=f"{ROOT}:{packages}"))
    assert report["kind"] == "native" and not (tmp_path / "cache").exists()


def test_mlx_without_a_backend_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Bare:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mlx_build, "installed", lambda name: Bare() if name == "mlx" else None)
    monkeypatch.setattr(blas, "_report", None)
    report = blas.load_blas()
    assert report.kind == "missing" and "mlx-runner[cpu]" in str(report.advice)


def test_a_second_call_returns_the_first_report(tmp_path: Path) -> None:
    code = (
        "from runner.backends import blas\nfirst = blas.load_blas(jobs=1)\nprint(int(blas.load_blas(jobs=64) is first))"
    )
    assert said(child(code, tmp_path)) == 1


def test_any_error_results_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(jobs: int) -> blas.BlasReport:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(blas, "_report", None)
    monkeypatch.setattr(blas, "_load_best", fail)
    report = blas.load_blas()
    assert report.kind == "reference" and "no such thing" in str(report.advice)


@pytest.mark.parametrize(
    ("environment", "jobs", "cores", "threads"),
    [
        ({}, 1, 8, 8),
        ({}, 3, 8, 2),
        ({}, 16, 8, 1),
        ({}, 0, 8, 8),
        ({"OPENBLAS_NUM_THREADS": "5"}, 4, 8, 5),
        ({"OPENBLAS_NUM_THREADS": "0"}, 2, 8, 4),
        ({"OPENBLAS_NUM_THREADS": "many"}, 1, 8, 8),
        ({"OMP_NUM_THREADS": "3"}, 1, 8, 3),
        ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "3"}, 1, 8, 2),
    ],
)
def test_threads_are_cores_divided_by_jobs_unless_set_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], jobs: int, cores: int, threads: int
) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert blas.thread_count(jobs, cores) == threads


@shim
def test_the_thread_count_is_set_in_the_library_and_not_inherited_by_children(tmp_path: Path) -> None:
    code = REPORT.replace("load_blas()", "load_blas(jobs=64)").replace(
        '{"identity"', '{"left": dict(os.environ), "identity"'
    )
    report = said(child(code, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY))
    assert report["threads"] == 1 and "OPENBLAS_NUM_THREADS" not in report["left"]
    report = said(child(code, tmp_path, RUNNER_BLAS=WHEEL_LIBRARY, OPENBLAS_NUM_THREADS="2"))
    assert report["threads"] == min(2, os.cpu_count() or 1) and report["left"]["OPENBLAS_NUM_THREADS"] == "2"


@shim
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_every_blas_and_lapack_symbol_of_mlx_is_forwarded() -> None:
    libmlx = importlib.metadata.distribution("mlx-cpu").locate_file("mlx/lib/libmlx.so")
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(libmlx)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    wheel = ctypes.CDLL(WHEEL_LIBRARY)
    asked = {name for name in names if name.startswith("cblas_") or hasattr(wheel, f"scipy_{name}")}
    assert "cblas_sgemm" in asked and asked <= set(FORWARDED)
