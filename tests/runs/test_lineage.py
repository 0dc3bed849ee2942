"""Lineage: what is recorded of a run's parents, and how they are found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.reports.run_tree import GONE, tree_rows
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo
from runner.runs.lineage import Parent, ParentIndex, parents, parents_of, record_parents
from runner.runs.sweep_manifest import SweepManifest


def run(path, run_id=None, origins=(), **settings):
    status = {"run_id": run_id, "parents": [Parent(*origin).to_dict() for origin in origins]}
    return RunInfo(path=Path(path), state="finished", settings=settings, status=status)


def shown(entries):
    return [(row.prefix, str(row.entry.path), row.last) for row in tree_rows(entries, {})]


def test_a_tree_of_branches_repeats_and_warm_starts():
    first = run("/o/2026/a", "1", **{"lora.rank": 8})
    branch = run("/o/2026/b", "2", [("branch", Path("/o/2026/a/checkpoints/step-0000080"), "1")], **{"lora.rank": 8})
    origins = [("repeat", Path("/o/2026/b"), "2"), ("warm start", Path("/o/2026/b/adapters"), "2")]
    warm = run("/o/2026/c", "3", origins, **{"lora.rank": 32})
    assert shown([warm, branch, first]) == [
        ("", "/o/2026/a", ""),
        ("└─ ", "/o/2026/b", "branch at 80"),
        ("   └─ ", "/o/2026/c", "warm start: rank 8 -> 32"),
    ]
    assert [parent.how for parent in parents(warm)] == ["warm start", "repeat"]


def test_a_moved_parent_is_found_by_its_identity_and_a_missing_one_has_a_row():
    moved = run("/elsewhere/a", "1")
    child = run("/o/2026/b", "2", [("repeat", Path("/o/2026/a"), "1")])
    assert ParentIndex([moved, child]).find(parents(child)[0]) is moved
    another = run("/o/2026/a", "9")  # a new run has taken the directory
    assert ParentIndex([another, child]).find(parents(child)[0]) is None
    rows = tree_rows([another, child], {})
    assert [str(row.entry.path) for row in rows] == ["/o/2026/a", "/o/2026/b", "/o/2026/a"]
    assert isinstance(rows[0].entry, RunInfo) and rows[0].entry.state == GONE and rows[1].prefix == "└─ "


def test_a_branch_of_an_earlier_version_is_found_by_its_path_or_the_end_of_it():
    old = {"parent": "/old/outputs/2026-11-24/10-00-00/checkpoints/step-0000100"}
    (parent,) = parents_of(old)
    assert (parent.how, parent.step, parent.run_id) == ("branch", 100, None)
    moved = run("/new/2026-11-24/10-00-00", "1")
    assert ParentIndex([moved]).find(parent) is moved
    assert (
        ParentIndex([moved, run("/copy/2026-11-24/10-00-00", "1")]).find(parent) is None
    )  # which of them is not known


def test_a_job_stands_below_its_sweep_where_a_run_came_from_it():
    jobs = [run(f"/o/s/{n}", str(n)) for n in range(3)]
    manifest = SweepManifest(Path("/o/s"), arguments=["lora.rank=1,2", "repeat=/o/a"])
    sweep = SweepInfo(path=Path("/o/s"), runs=jobs, manifest=manifest)
    child = run("/o/b", "9", [("repeat", Path("/o/s/1"), "1")])
    assert [(p, path) for p, path, _ in shown([child, sweep, run("/o/a", "8")])] == [
        ("", "/o/a"),
        ("└─ ", "/o/s"),
        ("   └─ ", "/o/s/1"),
        ("      └─ ", "/o/b"),
    ]


def test_a_circle_ends():
    a = run("/o/a", "1", [("repeat", Path("/o/b"), "2")])
    b = run("/o/b", "2", [("repeat", Path("/o/a"), "1")])
    itself = run("/o/c", "3", [("repeat", Path("/o/c"), "3")])
    assert sorted(path for _, path, _ in shown([a, b, itself])) == ["/o/a", "/o/b", "/o/c"]


@pytest.mark.parametrize(
    "status",
    [{"parents": 3}, {"parents": [3, {}, {"how": "x", "path": "y"}, {"how": "branch", "path": ""}]}, {"parent": {}}],
)
def test_what_is_damaged_is_no_parent(status):
    assert parents_of(status) == []


def test_a_run_records_where_it_comes_from(train, tiny, tmp_path):
    small = {"train.iters": 2, "checkpoint.every": 1, "lora.num_layers": 1}
    first = train(tiny(**small), tmp_path / "first")
    branch = train(tiny(**small), tmp_path / "branch", resume=first / "checkpoints/step-0000001")
    warm = train(tiny(**small, adapter=str(first / "adapters")), tmp_path / "warm")
    from runner.runs.inspect import read_run

    infos = {path.name: read_run(path) for path in (first, branch, warm)}
    index = ParentIndex(list(infos.values()))
    for name, text in (("branch", "branch at 1"), ("warm", "warm start")):
        (parent,) = parents(infos[name])
        assert parent.text == text and parent.run_id == infos["first"].status["run_id"]
        assert index.find(parent) is infos["first"]
    assert parents(infos["first"]) == []
    train(tiny(**small), warm, resume=warm)  # a resume keeps it
    assert parents(read_run(warm)) == parents(infos["warm"])
    assert record_parents(branch=None, repeat=None, adapter="/nowhere/adapters.npz")[0]["run_id"] is None
