"""The benchmark's own arithmetic: what it counts, chooses and concludes, on which the meaning of its timings rests."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import build_schedule

from runner.training.lr_schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import bench, flops, gates, processes, replay, report, sides, workloads  # noqa: E402

TOY = flops.Shape(layers=3, hidden=4, inner=6, queries=4, keys=2, vocabulary=10, rank=2, trained=2)


def test_operations_of_a_small_model_are_those_counted_by_hand() -> None:
    block = 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * (4 * 6)  # q, k and v, o, gate and up and down: 120 weights
    adapter = 2 * (8 + 6 + 6 + 8 + 10 + 10 + 10)  # 116 weights
    first = (16 + 8 + 8) + 2 * (4 + 4 + 4)  # q, k, v of the first trained block, and their A: 56
    assert flops.costs(TOY) == flops.Costs(
        trunk=2 * block,
        forward=2 * 2 * (block + adapter),
        backward=2 * (2 * (block + adapter) - first) + 2 * 2 * adapter,
        head=2 * 10 * 4,
    )


def test_a_frozen_block_costs_once_a_row_and_the_head_only_where_something_is_learned() -> None:
    cost = flops.costs(TOY)
    once = flops.training(TOY, tokens=10, first=10, supervised=3)
    again = flops.training(TOY, tokens=20, first=10, supervised=6)
    assert 2 * once - again == 10 * cost.trunk
    assert flops.training(TOY, tokens=10, first=10, supervised=4) - once == 2 * cost.head
    evaluation = flops.evaluating(TOY, tokens=10, supervised=3, times=1)
    assert evaluation == 10 * (cost.trunk + cost.forward) + 3 * cost.head
    assert flops.evaluating(TOY, tokens=10, supervised=3, times=3) == 3 * evaluation - 2 * 10 * cost.trunk


@pytest.mark.parametrize("rows", [16, 24, 128, 1001])
def test_the_mixed_lengths_have_the_promised_median_and_ninetieth_percentile(rows: int) -> None:
    lengths = workloads.quantiles(rows)
    assert len(lengths) == rows and lengths == sorted(lengths)
    assert statistics.median(lengths) == pytest.approx(60, rel=0.05)
    assert np.quantile(lengths, 0.9) == pytest.approx(500, rel=0.15)


def test_rows_of_other_lengths_than_promised_are_refused() -> None:
    found = {"rows": 100, "tokens": 9000, "supervised": 5000, "cut": 0}
    workloads.check_mixed(workloads.Statistics(**found, median=60, ninetieth=480))
    with pytest.raises(SystemExit, match="median 60"):
        workloads.check_mixed(workloads.Statistics(**found, median=80, ninetieth=480))


def test_each_wanted_length_takes_the_nearest_row_that_is_free() -> None:
    assert workloads.nearest([10, 50, 52, 90], [51, 50, 1000]) == [1, 2, 3]
    with pytest.raises(ValueError, match="2 rows wanted, 1 there"):
        workloads.nearest([10], [10, 10])


def test_functions_are_cut_into_signature_and_body_once_each(tmp_path: Path) -> None:
    text = "class A:\n    def f(self,\n          x):\n        return x\n\n    def one(self): return 1\n"
    for name in ("a.py", "b.py", "test/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "broken.py").write_text("def (")
    assert list(workloads.functions(tmp_path)) == [("def f(self,\n      x):", "    return x")]


def test_losses_that_differ_by_more_than_the_seeds_do_fail_the_gate() -> None:
    ours, theirs = [1.50, 1.52, 1.48], [1.49, 1.51, 1.53]
    assert gates.compare_means(ours, theirs, 2.1, same=True)["passed"]
    worse, better = [loss + 0.2 for loss in ours], [loss - 0.2 for loss in ours]
    assert not gates.compare_means(worse, theirs, 2.1, same=True)["passed"]
    assert not gates.compare_means(worse, theirs, 2.1, same=False)["passed"]
    assert not gates.compare_means(better, theirs, 2.1, same=True)["passed"]
    assert gates.compare_means(better, theirs, 2.1, same=False)["passed"]
    assert not gates.compare_means(ours, theirs, 1.51, same=True)["passed"], "nothing was learned"


def test_both_sides_are_told_the_same_work() -> None:
    work, folder = sides.Work(6, 3), Path("out")
    words = sides.command(sides.ROWS["f"], work, model="m", data="d", seed=2, folder=folder)[3:]
    ours = dict(word.split("=", 1) for word in words)
    theirs = sides.stock_config(work, "m", "d", 2, folder)
    lora: Any = theirs["lora_parameters"]
    for name, value in {
        "model.path": theirs["model"],
        "data.path": theirs["data"],
        "data.max_length": theirs["max_seq_length"],
        "seed": theirs["seed"],
        "lora.rank": lora["rank"],
        "lora.scale": lora["scale"],
        "lora.num_layers": theirs["num_layers"],
        "train.iters": theirs["iters"],
        "train.batch_size": theirs["batch_size"],
        "train.eval_every": theirs["steps_per_eval"],
        "checkpoint.every": theirs["save_every"],
        "optimizer": theirs["optimizer"],
        "optimizer.learning_rate": theirs["learning_rate"],
    }.items():
        assert ours[name] == str(value), name


def test_every_row_of_ours_is_made_of_settings_that_there_are(cli: Any) -> None:
    settings = {name: value for row in sides.ROWS.values() for name, value in row.overrides.items()}
    cli("--cfg", "job", *(f"{name}={value}" for name, value in settings.items()))


def test_an_optimization_is_on_in_its_own_row_only() -> None:
    for name, optimization in sides.OPTIMIZATIONS.items():
        assert optimization.on.keys() == optimization.off.keys() and optimization.on != optimization.off
        assert (
            sides.optimizations_off() | optimization.on
            == sides.ROWS[f"e: {name}"].overrides
            != sides.ROWS["d"].overrides
        )


def test_stock_batches_are_counted_without_padding_and_without_the_partial_batch() -> None:
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    class Rows(list):
        process = staticmethod(tuple)

    def dataset(lengths: list[int]) -> CacheDataset:
        return CacheDataset(Rows([(list(range(1, n + 1)), 5) for n in lengths]))

    config = {"batch_size": 2, "max_seq_length": 64, "iters": 4, "seed": 0, "steps_per_eval": 2}
    # Two batches an epoch, the row of 9 in none: 10 and 40, 33 and one that is cut at 64.
    counted = replay.stock(config, dataset([10, 40, 33, 70, 9]), dataset([8, 8]), iterate_batches)
    one_epoch = 9 + 39 + 32 + 63
    assert (counted.tokens, counted.first) == (2 * one_epoch, one_epoch)
    assert counted.positions == 2 * 4 * 63, "one more than a multiple of 32, at most 64; the last is no input"
    assert counted.supervised == 2 * (one_epoch - 4 * 4)
    assert counted.padded_rows == 2 * 3, "the row that is cut has no padding after it"
    assert (counted.valid_tokens, counted.valid_supervised, counted.evaluations) == (14, 6, 3)


def made_results() -> dict[str, Any]:
    """Results of rows b and f: a cold run and two rounds of each, all on 1,000 real tokens."""
    counted = {"tokens": 1000, "positions": 1250, "supervised": 200, "padded_rows": 16, "first": 1000}
    counted |= {"valid_tokens": 100, "valid_supervised": 20, "evaluations": 2}
    took = {"b": {"cold": 100.0, 1: 20.0, 2: 10.0}, "f": {"cold": 10.0, 1: 10.0, 2: 1000 / 180}}
    same = {"workload": "short", "seed": 0, "rss_gb": 1.0, "mlx_peak_gb": 1.0, "load": 0.1, "others": 0.0}
    runs = [
        {**same, "row": row, "round": which, "seconds": seconds, "counted": counted}
        for row, times in took.items()
        for which, seconds in times.items()
    ]
    split = workloads.Statistics(rows=16, tokens=1016, supervised=200, median=60, ninetieth=100, cut=0)
    statistics_ = {"train": vars(split), "valid": vars(split)}
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    return {
        "mode": "quick",
        "gates": {"short, equal batches": {"passed": True, "text": "as they should be"}},
        "workloads": {"short": {"statistics": statistics_, **vars(sides.Work(4, 4))}},
        "runs": runs,
        "notes": [],
        "machine": {"processor": "one", "cores": 2, "system": "", "python": "3", "versions": {"mlx": "0"}, "date": ""},
        "model": {**shape, "num_attention_heads": 9, "num_key_value_heads": 3},
        "gemm": {"gflops": 100.0, "blas": {"kind": "wheel", "version": "1", "threads": 2}},
    }


def test_the_headline_compares_within_rounds_and_is_withheld_where_a_gate_fails(tmp_path: Path) -> None:
    results = made_results()
    text = report.write(results, tmp_path)
    # Rounds of b at 50 and 100 tokens per second, of f at 100 and 180; cold runs count in neither.
    assert "**f/b: 1.90 times the real tokens per second** (rounds: 1.80 to 2.00, 2 of them)" in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "plot.svg").read_text().count("<rect") == 3
    results["gates"]["short, equal batches"]["passed"] = False
    text = report.write(results, tmp_path)
    assert "**FAILED** short, equal batches" in text and "f/b:" not in text


def test_optimizations_are_measured_apart_and_compared_with_none(tmp_path: Path) -> None:
    parts = bench.parts_of(bench.FULL, list(sides.ROWS), ["short", "mixed"])
    assert list(parts) == ["short", "short, optimizations", "mixed", "mixed, optimizations"]
    assert parts["mixed"].rows == ["a", "b", "c", "f"]
    assert parts["mixed, optimizations"].rows == ["b", "d", *(f"e: {name}" for name in sides.OPTIMIZATIONS)]
    assert list(bench.parts_of(bench.FULL, ["b", "d", "e: trunk"], ["short"])) == ["short, optimizations"]
    (quick,) = bench.parts_of(bench.QUICK, list(sides.QUICK_ROWS), ["short"]).values()
    assert quick.rows == ["a", "b", "d", "f"] and quick.gated and not parts["mixed, optimizations"].gated
    results = made_results()
    results["workloads"]["short, optimizations"] = results["workloads"].pop("short")
    names = {"b": "d", "f": "e: trunk"}
    for run in results["runs"]:
        run |= {"workload": "short, optimizations", "row": names[run["row"]]}
    text = report.write(results, tmp_path)
    assert "## short, optimizations" in text and "| of d |" in text and "f/b" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| e: trunk")]
    assert "| 140.0 (100.0–180.0) | 1.90 |" in row


def test_a_process_is_measured_by_itself(tmp_path: Path) -> None:
    code = "import time; block = bytearray(200_000_000); block[::4096] = b'1' * len(block[::4096]); time.sleep(0.3)"
    took = processes.run_measured([sys.executable, "-c", code], extra={}, log=tmp_path / "log", limit=60)
    assert took.seconds > 0.3 and took.rss_gb > 0.2
    with pytest.raises(processes.ProcessFailed, match=re.compile("ended with 3.*the reason", re.DOTALL)):
        words = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
        processes.run_measured(words, extra={}, log=tmp_path / "log", limit=60)


@pytest.mark.parametrize("falls", [False, True])
def test_both_sides_train_each_update_at_the_same_learning_rate(falls: bool, tmp_path: Path) -> None:
    work = sides.Work(iters=12, eval_every=12, learning_rate=3e-4, falls_to_zero=falls)
    stock = sides.stock_config(work, "model", "data", 0, tmp_path)
    typed = dict(text.split("=", 1) for text in sides.overrides(sides.ROWS["f"], work, "model", "data", 0, tmp_path))
    schedule = stock["lr_schedule"] or {"name": "step_decay", "arguments": [stock["learning_rate"], 1.0, 1]}
    theirs = build_schedule(schedule)
    options = {"end": 0.0} if typed["schedule"] == "linear" else {}
    for update in range(1, work.iters + 1):
        ours = learning_rate(
            update, name=typed["schedule"], peak=float(typed["optimizer.learning_rate"]), iters=work.iters, **options
        )
        assert float(theirs(mx.array(update - 1))) == pytest.approx(ours, rel=1e-5, abs=1e-10)
    assert (ours == 0.0) == falls
