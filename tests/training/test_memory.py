"""Memory does not grow with the number of updates, and the cache of freed buffers stays below its limit.

MLX's CPU backend caches buffers too, so the limit is tested on it; what the default is on a GPU is tested in
tests/darwin.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from runner.config.schema import Config
from runner.training.memory import default_cache_limit, memory_limits


@pytest.fixture
def memory_rows(
    tiny: Callable[..., Config], train: Callable[..., Path], tmp_path: Path
) -> Callable[..., list[dict[str, float]]]:
    """Train through MLX with the given settings and return the training rows of each update."""

    def do(name: str, **changes: object) -> list[dict[str, float]]:
        own = {"train.cpu_engine": False, "train.report_every": 1, "train.eval_every": 1000, "checkpoint.every": 1000}
        run = train(tiny(**{**own, "train.iters": 12, **changes}), tmp_path / name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == "train"]

    return do


def test_active_memory_stays_the_same_from_update_to_update(memory_rows: Callable) -> None:
    """A row is rounded to 1 MB; the activations of one update of this model take several."""
    gc.collect()
    before = mx.get_active_memory() / 1e9  # what earlier tests left in this process
    active = [row["active_memory_gb"] for row in memory_rows("run", **{"train.batch_size": 8})]
    assert len(active) == 12
    assert max(active[3:]) - min(active[3:]) <= 0.0011
    assert max(active) - before < 0.01


def test_the_cache_of_freed_buffers_is_emptied_when_half_full(memory_rows: Callable) -> None:
    free, limited = (
        memory_rows("free", **{"train.cache_limit_gb": 1.0}),
        memory_rows("limited", **{"train.cache_limit_gb": 0.02}),
    )
    assert max(row["cache_memory_gb"] for row in free) > 0.015
    assert max(row["cache_memory_gb"] for row in limited) <= 0.01
    assert [row["loss"] for row in free] == [row["loss"] for row in limited]
    assert all(row["peak_memory_gb"] >= row["active_memory_gb"] for row in limited)


def test_the_limit_is_that_of_before_after_a_run() -> None:
    before = mx.set_cache_limit(12_345)
    try:
        with memory_limits(0.5) as cache:
            assert cache.limit == 500_000_000
        assert mx.set_cache_limit(12_345) == 12_345
    finally:
        mx.set_cache_limit(before)


def test_the_cpu_keeps_the_limit_of_mlx(request: pytest.FixtureRequest) -> None:
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("needs MLX on the CPU")
    assert default_cache_limit() is None
    own = mx.set_cache_limit(12_345)
    mx.set_cache_limit(own)
    with memory_limits(None):
        current = mx.set_cache_limit(own)
    assert current == own
