"""Runs that start in the same second, at once or one after the other, have a directory each."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = [pytest.mark.fault(12), pytest.mark.slow]

OVERRIDES = ("model=tiny", "data=tiny", "train.iters=1")


def test_each_run_has_its_own_directory_and_result(cli, fault_environment, cases):
    number, at_once = cases.of(full=50, quick=4), cases.of(full=2, quick=4)
    frozen_clock = {**fault_environment(clock="=1750000000"), "TZ": "UTC"}  # the clock of all of them stands still
    for first in range(0, number, at_once):
        started = [cli.start(*OVERRIDES, f"seed={seed}", env=frozen_clock) for seed in range(first, first + at_once)]
        for process in started:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out
    day, second = "2025-06-15", "15-06-40"
    runs = sorted((cli.folder / "outputs" / day).iterdir(), key=lambda path: (len(path.name), path.name))
    assert [path.name for path in (cli.folder / "outputs").iterdir()] == [day] and len(runs) == number
    assert [path.name for path in runs] == [second, *(f"{second}-{i}" for i in range(2, number + 1))]
    seeds, ids, results = set(), set(), set()
    for run in runs:
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"], status["started"][:10]) == ("finished", 1, day)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        seeds.add(re.search(r"^seed: (\d+)$", (run / "config.yaml").read_text(), re.MULTILINE)[1])
        ids.add(status["run_id"])
        results.add((run / "adapters/adapters.safetensors").read_bytes())
        cases.done()
    assert len(seeds) == len(ids) == len(results) == number  # no run overwrote another
