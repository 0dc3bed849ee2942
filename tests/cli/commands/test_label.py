"""`runner label`, and the settings name, tags and note: where they go, who keeps them, and who does not."""

from __future__ import annotations

import json
import threading

import pytest

from runner.cli.commands import label
from runner.common.errors import ConfigError
from runner.config.labels import Labels
from runner.runs.directory import RunDirectory
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run
from runner.runs.labels import edit_labels, read_labels

TINY = ("model=tiny", "data=tiny", "lora.num_layers=1", "train.iters=2", "train.eval_batches=1", "loggers=[]")


def test_labels_of_a_run_outlast_a_resume_and_are_not_inherited(inline):
    place = inline.folder
    inline(*TINY, "name=first, try", "tags=sql,baseline", "note=why: a=b", "train.stop_at=1", "hydra.run.dir=run")
    run = place / "run"
    assert read_labels(run) == Labels("first, try", ("sql", "baseline"), "why: a=b")
    config = (run / "config.yaml").read_text()
    assert "- baseline" not in config and "first, try" not in config

    inline("label", "run", "--untag", "sql", "--tag", "kept", "--name", "second")
    out = inline("resume=run", "note=")  # what is typed changes, the rest stays
    assert "changed on resume" not in out
    assert read_labels(run) == Labels("second", ("baseline", "kept"), None)
    out = inline("resume=run", "name=third")
    assert "is finished; nothing is left to do" in out and read_labels(run).name == "third"

    inline("resume=run", "name=fourth", "lora.rank=32", expect=2)
    assert read_labels(run).name == "third"  # a refused resume changes nothing

    inline("repeat=run", "hydra.run.dir=again")
    inline("resume=run/checkpoints/step-0000001", "tags=[branch]", "hydra.run.dir=branch")
    assert read_labels(place / "again") == Labels()
    assert read_labels(place / "branch") == Labels(tags=("branch",))
    shown = inline("show", "branch")
    assert "tags     #branch" in shown and "name" not in shown.splitlines()[2]
    assert (place / "again/config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def test_labels_of_a_sweep_are_those_of_its_jobs(inline):
    place = inline.folder
    inline("-m", *TINY, "lora.rank=2,4", "name=ranks, two", "tags=sql", "hydra.sweep.dir=sweep")
    sweep = read_sweep(place / "sweep")
    assert sweep.labels == Labels("ranks, two", ("sql",)) and len(sweep.runs) == 2
    assert [run.tags for run in sweep.runs] == [("sql",)] * 2
    assert not (place / "sweep/0/labels.json").exists()

    inline("label", "sweep/1", "--name", "four", "--tag", "best")
    inline("label", "sweep", "--untag", "sql", "--tag", "old")
    assert read_run(place / "sweep/1").tags == ("old", "best")
    out = inline("resume=sweep", "lora.rank=8", "note=more ranks")
    assert "2 done" in out and "1 to start" in out
    assert read_labels(place / "sweep") == Labels("ranks, two", ("old",), "more ranks")
    assert read_run(place / "sweep/2").tags == ("old",) and read_labels(place / "sweep/2") == Labels()
    assert "3 done" in inline("resume=sweep", "tags=[a,b]")  # no finished job runs again for a label
    assert read_labels(place / "sweep").tags == ("a", "b")
    assert json.loads(inline("show", "sweep", "--json"))["tags"] == ["a", "b"]
    recorded = (place / "sweep/sweep.jsonl").read_bytes()
    inline("resume=sweep", "tags=[c]", "checkpoint.keep_last=7,8", expect=2)
    (place / "sweep/3").symlink_to(place / "elsewhere")
    inline("resume=sweep", "tags=[c]", "lora.rank=16", expect=2)  # a refused resume changes nothing
    assert read_labels(place / "sweep").tags == ("a", "b") and (place / "sweep/sweep.jsonl").read_bytes() == recorded


def test_a_refused_resume_of_a_job_leaves_its_sweep_as_it_is(inline):
    inline("-m", *TINY, "train.stop_at=1", "seed=1,2", "hydra.sweep.dir=sweep")
    job, recorded = inline.folder / "sweep/0", (inline.folder / "sweep/sweep.jsonl").read_bytes()
    (job / "labels.json").write_text("{")
    inline("resume=sweep/0", "checkpoint.keep_last=7", "name=mine", expect=2)
    (job / "labels.json").unlink()
    for checkpoint in job.glob("checkpoints/step-*"):
        (checkpoint / "manifest.json").unlink()
    inline("resume=sweep/0", "checkpoint.keep_last=7", "name=mine", expect=5)
    assert (inline.folder / "sweep/sweep.jsonl").read_bytes() == recorded and not (job / "labels.json").exists()


@pytest.mark.long
def test_jobs_may_be_named_by_their_settings(inline):
    inline("-m", *TINY, "lora.rank=2,4", "name=r${lora.rank}", "tags=x", "hydra.sweep.dir=sweep")
    names = [read_labels(inline.folder / "sweep" / job).name for job in "01"]
    assert names == ["r2", "r4"] and read_labels(inline.folder / "sweep") == Labels(tags=("x",))


def test_a_run_is_found_by_its_name(train, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(tiny(**{"train.iters": 1}), tmp_path / "outputs/2026/a")
    label.run(["outputs/2026/a", "--name", "first"])
    directory = RunDirectory(tmp_path / "outputs/2026/a")
    directory.lock()  # as while it trains
    assert label.run(["first", "--tag", "x"]) == 0
    directory.unlock()
    assert capsys.readouterr().out.splitlines()[-3:] == ["outputs/2026/a", "name     first", "tags     #x"]
    train(tiny(**{"train.iters": 1}), tmp_path / "outputs/2026/b")
    label.run(["outputs/2026/b", "--name", "first"])
    with pytest.raises(ConfigError, match="first is the name of 2 runs"):
        label.run(["first"])
    label.run(["outputs/2026/b", "--name", "sql/second"])
    assert label.run(["sql/second", "--name", "outputs"]) == 0
    assert "outputs is also a path here" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="neither a run.* The run of that name is outputs/2026/b"):
        label.run(["outputs"])
    with pytest.raises(ConfigError, match="Did you mean 'first'"):
        label.run(["firts"])
    with pytest.raises(ConfigError, match="its own tags are x. Did you mean 'x'"):
        label.run(["outputs/2026/a", "--untag", "xx"])
    with pytest.raises(ConfigError, match="looks like a secret"):
        label.run(["outputs/2026/a", "--note", "hf_" + "a" * 30])


def test_edits_at_the_same_time_are_all_kept(tmp_path):
    def add(number):
        edit_labels(tmp_path, lambda labels: Labels(tags=labels.tagged([f"t{number}"])))

    threads = [threading.Thread(target=add, args=[number]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_labels(tmp_path).tags) == {f"t{number}" for number in range(20)}
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"name": 3, "tags": "x"}', '{"tags": [1, "a b"]}', '{"name": "\\ud800"}', "{" * 99]
)
def test_a_damaged_file_of_labels_is_none(tmp_path, content):  # fmt: skip
    (tmp_path / "labels.json").write_text(content)
    labels = read_labels(tmp_path)
    assert labels.tags == () and labels.note is None


def test_labels_that_cannot_be_read_are_not_overwritten(tmp_path):
    (tmp_path / "labels.json").write_text('{"name": "mine", "note": ')
    with pytest.raises(ConfigError, match="cannot be read, so it is not changed"):
        edit_labels(tmp_path, lambda present: present)
    assert (tmp_path / "labels.json").read_text().startswith('{"name": "mine"')
    assert read_labels(tmp_path) == Labels()
