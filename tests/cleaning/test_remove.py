"""Clean on real runs: what goes, what stays, and that a kill at any moment leaves a run that resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from runner.checkpoints import verify
from runner.cleaning import remove
from runner.cleaning.caches import find_drafts, find_entries, remove_entries, select_entries
from runner.cleaning.facts import Context, interrupted_removals, leftovers, read_facts, unknown_names
from runner.cleaning.policy import Policies, decide
from runner.common.atomic_io import hold_draft
from runner.common.disk_cache import DiskCache
from runner.common.filesystem import FileSystem
from runner.runs.directory import RunDirectory
from runner.runs.find import find_runs
from runner.runs.inspect import read_run
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps.plan import remaining_jobs, unchangeable_jobs

CHECKPOINTS = Policies(checkpoints=True)
EVERYTHING = Policies(older_days=-1, everything=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_cli) -> Path:
    """A finished run with checkpoints at 1, 2, 3 and 4."""
    cli = make_cli(tmp_path_factory.mktemp("trained"), in_process=True)
    cli("model=tiny", "data=tiny", "lora.num_layers=1", "train.iters=4", "train.eval_every=2", "checkpoint.every=1",
        "checkpoint.keep_last=9", "hydra.run.dir=run")  # fmt: skip
    return cli.folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it in a folder of the test's own."""
    shutil.copytree(trained, tmp_path / "outputs/2026-11-24/10-00-00")
    return tmp_path / "outputs/2026-11-24/10-00-00"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def context(run: Path) -> Context:
    return Context.of(find_runs(run.parent.parent))


def plan(run: Path, policies: Policies = CHECKPOINTS):
    return decide(read_facts(read_run(run), context(run)), policies)


def test_the_best_and_the_newest_stay_and_verify(run):
    removal, _ = plan(run)
    best = read_run(run).best_step
    assert removal.steps == tuple(sorted({1, 2, 3, 4} - {best, 4})) and removal.size_bytes > 0
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    freed = remove.carry_out(removal, CHECKPOINTS, context(run))
    after = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    assert before - after == freed == removal.size_bytes
    assert steps(run) == sorted({best, 4})
    assert all(verify.is_whole(path, FileSystem()) for path in (run / "checkpoints").glob("step-*"))
    assert plan(run) == (None, [])


def test_everything_leaves_the_result_and_says_so_on_resume(run, inline):
    removal, _ = plan(run, EVERYTHING)
    remove.carry_out(removal, EVERYTHING, context(run))
    assert steps(run) == [] and verify.is_whole(run / "adapters", FileSystem())
    out = inline(f"resume={run}", expect=2)
    assert "`runner clean` removed its checkpoints" in out
    assert (
        "repeat=outputs/2026-11-24/10-00-00" in out
        and "adapter=" in out
        and len((run / "metrics.jsonl").read_text().splitlines()) > 2
    )
    assert "removed by runner clean" in inline("verify", str(run))


def test_a_resume_from_an_older_step_than_was_cleaned_says_so(run, inline):
    child = run.parent / "11-00-00"
    shutil.copytree(run, child)
    status = json.loads((child / "status.json").read_text())
    status |= {"run_id": "f" * 16, "parent": str(run / "checkpoints/step-0000001")}
    (child / "status.json").write_text(json.dumps(status))
    removal, _ = plan(run, EVERYTHING)
    with pytest.raises(Killed):
        remove.carry_out(removal, EVERYTHING, context(run), KilledAt(0))
    assert steps(run) == [1, 2, 3, 4] and "resumes from" not in inline(f"resume={run}", "checkpoint.keep_last=8")
    remove.carry_out(removal, EVERYTHING, context(run))
    assert steps(run) == [1]
    assert "those after step 1: removed by runner clean" in inline("verify", str(run))
    adapters = (run / "adapters/adapters.safetensors").read_bytes()
    out = inline(f"resume={run}", "checkpoint.keep_last=9")
    assert "resumes from step 1, though step 4 was saved: `runner clean` removed its newer checkpoints" in out
    assert steps(run) == [1, 2, 3, 4] and (run / "adapters/adapters.safetensors").read_bytes() == adapters
    assert "removed" not in inline("verify", str(run))


def test_a_sweep_resumes_a_job_whose_cleaning_was_interrupted(run, tmp_path):
    job = SweepJob(0, run.name, (), {}, changes={"checkpoint.keep_last": 1})
    manifest = SweepManifest(run.parent, jobs=[job])
    removal, _ = plan(run, EVERYTHING)
    with pytest.raises(Killed):
        remove.carry_out(removal, EVERYTHING, context(run), KilledAt(0))
    assert [planned.job for planned in remaining_jobs(manifest)] == [job] and unchangeable_jobs(manifest) == []
    remove.carry_out(removal, EVERYTHING, context(run))
    assert remaining_jobs(manifest) == [] and unchangeable_jobs(manifest) == [job]


class Killed(BaseException):
    """Stands for a kill."""


class KilledAt(FileSystem):
    """A file system whose process is killed before its operation number `last`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def rename(self, source, target):
        self._count()
        super().rename(source, target)

    def fsync_folder(self, folder):
        self._count()
        super().fsync_folder(folder)

    def remove_tree(self, path):
        self._count()
        if path.is_dir():  # killed in the middle of a folder
            for inner in sorted(path.rglob("*"))[:1]:
                if inner.is_file():
                    inner.unlink()
            self._count()
        super().remove_tree(path)


@pytest.mark.parametrize("policies", [CHECKPOINTS, EVERYTHING], ids=["checkpoints", "everything"])
def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_the_next_clean_ends_it(run, policies, tmp_path):
    for last in range(40):
        copy = tmp_path / f"copy{last}/2026-11-24/10-00-00"
        shutil.copytree(run, copy)
        removal, _ = plan(copy, policies)
        try:
            remove.carry_out(removal, policies, context(copy), KilledAt(last))
        except Killed:
            pass
        else:
            break
        left = [path for path in (copy / "checkpoints").glob("step-*")]
        assert all(verify.is_whole(path, FileSystem()) for path in left)
        assert set(removal.keeps) <= set(steps(copy)) and verify.is_whole(copy / "adapters", FileSystem())
        remove.remove_leftovers(read_run(copy))
        assert leftovers(read_run(copy)) == []
        again, _ = plan(copy, policies)
        if again:
            remove.carry_out(again, policies, context(copy))
        assert steps(copy) == sorted(removal.keeps)
        assert not [path for path in (copy / "checkpoints").iterdir() if path.name.startswith(".")]
    assert last > 5


def fail(run: Path) -> None:
    """Make it a run that failed before its first checkpoint and its result."""
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    for name in ("checkpoints", "adapters"):
        shutil.rmtree(run / name)
    (run / "checkpoints").mkdir()


def test_a_failed_run_goes_whole_and_its_empty_date_too(run):
    fail(run)
    policies = Policies(failed=True)
    removal, _ = plan(run, policies)
    assert removal.whole
    with pytest.raises(Killed):
        remove.carry_out(removal, policies, context(run), KilledAt(2))
    assert not run.exists() and [path.name[:18] for path in run.parent.iterdir()] == [".removed-10-00-00-"]
    foreign = run.parent / ".removed-by-me-01234567"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    found = interrupted_removals(run.parent.parent)
    assert len(found) == 1 and remove.remove_interrupted(found) > 0 and foreign.exists()
    shutil.rmtree(foreign)
    run.parent.rmdir()
    assert not run.parent.exists() and run.parent.parent.exists()


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "wandb/offline-run-1",
        "evaluations/",
        "export-mlx/",
        "checkpoints/step-0000001/x",
        ".hydra/x",
        "more/",
    ],
)
def test_what_no_run_writes_keeps_its_directory(run, name):
    if name.startswith("checkpoints"):
        (run / "checkpoints/step-0000001/x").touch()
        assert plan(run)[0].steps == tuple(sorted({2, 3, 4} - {read_run(run).best_step, 4}))
        return
    fail(run)
    assert unknown_names(read_run(run)) == []
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).mkdir() if name.endswith("/") else (run / name).touch()
    removal, kept = plan(run, Policies(failed=True, everything=True))
    assert removal is None and name in kept[0].reason


def test_the_draft_of_a_killed_export_goes_and_that_of_a_living_one_stays(run, inline):
    draft = run / ".export-mlx.0123abcd.tmp"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"12345")
    os.utime(draft, (1, 1))
    with hold_draft(draft):
        assert leftovers(read_run(run)) == [] and remove.remove_leftovers(read_run(run)) == 0 and draft.exists()
        fail(run)
        assert ".export-mlx" in plan(run, Policies(failed=True))[1][0].reason
    assert plan(run, Policies(failed=True))[0].whole
    assert "1 leftover" in inline("clean", "--leftovers", "--yes") and not draft.exists()


def test_a_run_with_a_result_stays_whole(run):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    for name in ("adapters", ".adapters.old"):  # the other: a kill between the two renames of its replacement
        (run / "adapters").rename(run / name)
        removal, kept = plan(run, Policies(failed=True, everything=True))
        assert removal is None and kept[0].reason == "failed, but has a result (adapters/)"


def test_offline_runs_of_wandb_that_were_uploaded_keep_nothing(run):
    fail(run)
    (run / "wandb/offline-run-1").mkdir(parents=True)
    assert "not synced" in plan(run, Policies(failed=True))[1][0].reason
    (run / "wandb/offline-run-1/run-1.wandb.synced").touch()
    assert plan(run, Policies(failed=True))[0].whole


def test_links_are_neither_followed_nor_removed(run, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(run / "checkpoints", outside)
    (run / "checkpoints").symlink_to(outside)
    assert plan(run, EVERYTHING)[0] is None and len(list(outside.iterdir())) == 4
    shutil.rmtree(run / "adapters")
    fail_state = json.loads((run / "status.json").read_text()) | {"state": "failed"}
    (run / "status.json").write_text(json.dumps(fail_state))
    removal, kept = plan(run, Policies(failed=True, everything=True))
    assert removal is None and "checkpoints" in kept[0].reason


def test_a_run_in_use_and_a_damaged_newest_checkpoint_are_left_alone(run):
    removal, _ = plan(run)
    directory = RunDirectory(run)
    directory.lock()
    assert plan(run)[1][0].reason == "in use"
    with pytest.raises(remove.NotRemoved, match="in use"):
        remove.carry_out(removal, CHECKPOINTS, context(run))
    directory.unlock()
    (run.parent / "multirun.yaml").touch()
    sweep = RunDirectory(run.parent)
    sweep.lock()
    with pytest.raises(remove.NotRemoved, match="in use"):
        remove.carry_out(removal, CHECKPOINTS, context(run))
    sweep.unlock()
    file = run / "checkpoints/step-0000004/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(remove.NotRemoved, match="step 4, which would stay, is damaged"):
        remove.carry_out(removal, CHECKPOINTS, context(run))
    assert steps(run) == [1, 2, 3, 4]


def test_a_checkpoint_that_a_branch_came_from_stays(run):
    child = run.parent / "11-00-00"
    shutil.copytree(run, child)
    status = json.loads((child / "status.json").read_text())
    status |= {"run_id": "f" * 16, "parent": str(run / "checkpoints/step-0000001")}
    (child / "status.json").write_text(json.dumps(status))
    assert 1 not in plan(run)[0].steps and 1 not in plan(run, EVERYTHING)[0].steps
    assert 1 in plan(run, Policies(checkpoints=True, parents=True))[0].steps


@pytest.mark.parametrize("form", ["absolute", "dots", "here", "link"])
def test_a_run_is_protected_in_whatever_form_its_path_is_typed(run, form, inline):
    child, sweep, elsewhere = run.parent / "11-00-00", run.parent.parent / "sweep", run.parents[2] / "elsewhere"
    sweep.mkdir()
    elsewhere.mkdir()
    (sweep / "multirun.yaml").touch()
    for copy in (child, sweep / "0", sweep / "1"):
        shutil.copytree(run, copy)
    status = json.loads((child / "status.json").read_text())
    adapter = run / "checkpoints/step-0000001/adapters.safetensors"
    parent = {"how": "warm start", "path": str(adapter), "run_id": status["run_id"]}
    (child / "status.json").write_text(json.dumps({**status, "run_id": "f" * 16, "parents": [parent]}))
    status = json.loads((sweep / "0/status.json").read_text())
    (sweep / "0/status.json").write_text(json.dumps({**status, "run_id": "e" * 16}))
    for chosen, policies, left in (
        (sweep / "0", ["--beyond-best", "1", "--everything"], [1, 2, 3, 4]),
        (run, ["--older", "0", "--everything"], [1]),
    ):
        link = run.parents[2] / f"link-to-{chosen.name}"
        link.symlink_to(chosen.parent)
        inline.folder = chosen if form == "here" else elsewhere
        relative = Path(os.path.relpath(chosen, elsewhere))
        typed = {"absolute": chosen, "dots": relative, "here": Path("."), "link": link / chosen.name}[form]
        inline("clean", str(typed), *policies, "--yes")
        assert steps(chosen) == left


def test_a_cleaned_job_is_done_for_its_sweep(inline):
    small = ("model=tiny", "data=tiny", "lora.num_layers=1", "train.iters=2", "checkpoint.every=1")
    inline("-m", *small, "seed=0,1,2", "hydra.sweep.dir=sweep")
    sweep = inline.folder / "sweep"
    out = inline("clean", "sweep", "--beyond-best", "1", "--everything")
    assert "Nothing was removed" in out and all(steps(sweep / job) for job in "012")
    out = inline("clean", "sweep", "--beyond-best", "1", "--everything", "--yes")
    left = [job for job in "012" if steps(sweep / job)]
    assert "freed" in out and left == [find_runs(sweep)[0].best.path.name]
    rows = {job: (sweep / job / "metrics.jsonl").read_bytes() for job in "012"}
    out = inline("resume=sweep")
    assert "3 done" in out and "not changed" not in out
    out = inline("resume=sweep", "checkpoint.keep_last=1")  # the best runs again to apply it
    first, second = (job for job in "012" if job not in left)
    assert "2 done" in out and f"not changed: jobs {first}, {second}, of which `runner clean` left no" in out
    assert all((sweep / job / "metrics.jsonl").read_bytes() == rows[job] for job in "012" if job not in left)


@pytest.mark.parametrize("arguments", [["rank=8"], ["--tag", "sql"], ["."], ["--checkpoints", "rank=8"]])
def test_entries_of_caches_are_not_selected_by_runs(inline, arguments):
    assert "entries of caches belong to none" in inline("clean", "--caches", *arguments, expect=2)


def test_entries_of_caches_go_by_age_and_size(tmp_path):
    cache = DiskCache(tmp_path / "tokens")
    names = [f"{i:064x}" for i in range(4)]
    for i, name in enumerate(names):
        cache.write_record(name, {"values": "x" * 100})
        os.utime(tmp_path / f"tokens/{name}.json", (1e9 + i * 86_400, 1e9 + i * 86_400))
    DiskCache(tmp_path / "of_another").write_record(names[0], {"values": "theirs"})
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/model.safetensors").touch()
    entries = find_entries(tmp_path)
    assert [entry.name for entry in entries] == [f"{name}.json" for name in reversed(names)]
    now, size = 1e9 + 4 * 86_400, entries[0].size_bytes
    assert len(select_entries(entries, unused_days=None, max_bytes=None)) == 4
    assert len(select_entries(entries, unused_days=2.5, max_bytes=None, now=now)) == 2
    assert len(select_entries(entries, unused_days=None, max_bytes=3 * size + 1)) == 1
    with cache.draft() as draft:
        os.utime(draft.folder, (1, 1))
        assert find_drafts(tmp_path) == []
        left = draft.folder.with_name(".draft-killed")
        left.mkdir()
        (left / "tokens").write_bytes(b"12345")
        os.utime(left, (1, 1))
        drafts = find_drafts(tmp_path)
        assert [draft.name for draft in drafts] == [left.name]
        assert remove_entries(drafts) == drafts[0].size_bytes and not left.exists() and draft.folder.exists()
    old = select_entries(entries, unused_days=3.5, max_bytes=None, now=now)
    assert remove_entries(old) == size and len(find_entries(tmp_path)) == 3
    assert (tmp_path / "smollm2/model.safetensors").exists()


@pytest.mark.long
def test_a_clean_that_is_killed_leaves_runs_that_verify(run, cli, tmp_path):
    best = read_run(run).best_step
    for number in range(20):
        shutil.copytree(run, tmp_path / f"killed/{number:02d}/run")
    process = cli.start("clean", "killed", "--checkpoints", "--yes")
    while process.poll() is None and len(list(tmp_path.glob("killed/*/run/checkpoints/step-0000001"))) > 15:
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for copy in tmp_path.glob("killed/*/run"):
        assert {best, 4} <= set(steps(copy))
    cli("verify", "killed")
    assert "freed" in cli("clean", "killed", "--checkpoints", "--leftovers", "--yes")
    assert not list(tmp_path.glob("killed/*/run/checkpoints/.*"))
