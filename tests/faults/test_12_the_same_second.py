"""Runs that start in the same second, at once or one after the other, have a directory each."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = [pytest.mark.fault(12), pytest.mark.slow]

WORDS = ("model=tiny", "data=tiny", "train.iters=1")


def test_each_has_a_directory_and_a_result_of_its_own(cli, faulty, cases):
    number, at_once = cases.of(full=50, quick=4), cases.of(full=2, quick=4)
    still = {**faulty(clock="=1750000000"), "TZ": "UTC"}  # the clock of all of them stands still
    for first in range(0, number, at_once):
        started = [cli.start(*WORDS, f"seed={seed}", env=still) for seed in range(first, first + at_once)]
        for process in started:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out
    day, second = "2025-06-15", "15-06-40"
    made = sorted((cli.folder / "outputs" / day).iterdir(), key=lambda path: (len(path.name), path.name))
    assert [path.name for path in (cli.folder / "outputs").iterdir()] == [day] and len(made) == number
    assert [path.name for path in made] == [second, *(f"{second}-{i}" for i in range(2, number + 1))]
    seeds, ids, results = set(), set(), set()
    for run in made:
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"], status["started"][:10]) == ("finished", 1, day)
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        seeds.add(re.search(r"^seed: (\d+)$", (run / "config.yaml").read_text(), re.MULTILINE)[1])
        ids.add(status["run_id"])
        results.add((run / "adapters/adapters.safetensors").read_bytes())
        cases.done()
    assert len(seeds) == len(ids) == len(results) == number  # none wrote over another's
