"""Hostile sweep manifests: the overrides that resume= reads from them run no code and write nothing elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.fault(23), pytest.mark.slow]

TINY = ("model=tiny", "data=tiny", "train.iters=1")


class Canary:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


RECIPE = """\
# @package _global_
hydra: {callbacks: {mine: {_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [ran]}]}}}
"""
JOB = {"job": 0, "id": "a", "overrides": [*TINY, "seed=1"]}
SWEEPS: dict[str, list[Any] | bytes] = {
    "a callback": ["+hydra.callbacks.mine._target_=pathlib.Path.touch", "+hydra.callbacks.mine._args_=[ran]"],
    "the environment": ["+hydra.job.env_set.LD_PRELOAD=ran"],
    "logging": ["hydra/job_logging=default"],
    "another config path": ["--config-path=theirs"],
    "only to show": ["--cfg=job"],
    "a folder of recipes": ["--config-dir=theirs", "experiment=hostile"],
    "a trillion jobs": ["seed=range(0,1000000000000)"],
    "a trillion jobs, shuffled": ["seed=shuffle(range(0,1000000000000))"],
    "a product": [f"{key}=range(1,100)" for key in ("seed", "lora.rank", "train.batch_size")],
    "trust in a model's code": ["model.trust_remote_code=true"],
    "a word of brackets": ["seed=" + "[" * 15_000],
    "a reference nested deeply": ["data.path=${oc.env:A," + "[" * 900 + "}"],
    "Hydra's settings in a job": [{**JOB, "overrides": ["+hydra.callbacks.mine._target_=pathlib.Path.touch"]}],
    "another directory for a job": [{**JOB, "overrides": [*TINY, "hydra.run.dir=ran"]}],
    "a job that is no setting": [{**JOB, "overrides": ["--config-dir=theirs"]}],
    "a job of infinity": b'{"job": 1e999, "id": "a", "overrides": []}\n',
    "three million brackets": b"[" * 3_000_000 + b"\n",
    "20 MB of lists": b"[" + b"[]," * 6_600_000 + b"[]]\n",
    "a hole of 2 GB": b"",
    "a link to /dev/zero": b"",
    "a FIFO": b"",
    "a pickle": pickle.dumps(Canary()),
}


def sweep_in(folder: Path, name: str) -> Path:
    folder.mkdir()
    path, what = folder / "sweep.jsonl", SWEEPS[name]
    if name == "a FIFO":
        os.mkfifo(path)
    elif name == "a link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif isinstance(what, bytes):
        path.write_bytes(what)
        if not what:
            os.truncate(path, 2 << 30)
    else:
        overrides = [*TINY, "seed=1", *(word for word in what if isinstance(word, str))]
        lines = [{"schema": 1, "words": overrides}, *(job for job in what if isinstance(job, dict))]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "multirun.yaml").write_text("a: &a [*a]\nb: !!python/object/apply:os.system ['touch ran']\n")
    return folder


def test_a_hostile_manifest_is_refused(cases, fresh_cli, hostile):
    for name in cases.some(list(SWEEPS), 8):
        cli = fresh_cli()
        (cli.folder / "theirs/experiment").mkdir(parents=True)
        (cli.folder / "theirs/experiment/hostile.yaml").write_text(RECIPE)
        sweep_in(cli.folder / "s", name)
        hostile.invoke(cli, "resume=s")
        hostile.invoke(cli, "show", "s", expect=(0,))
        assert {path.name for path in (cli.folder / "s").iterdir()} <= {"sweep.jsonl", "multirun.yaml"}, name
        cases.done()


def test_the_same_manifest_without_anything_hostile_runs(cli):
    SWEEPS["nothing hostile"] = [{**JOB}]
    try:
        sweep_in(cli.folder / "s", "nothing hostile")
    finally:
        del SWEEPS["nothing hostile"]
    cli("resume=s")
    assert (cli.folder / "s/0/adapters").is_dir()


def test_hostile_manifests_are_refused_within_a_second_and_200_mb(cases, cli, tmp_path, hostile):
    paths = [sweep_in(tmp_path / str(number), name) for number, name in enumerate(SWEEPS)]
    for name, found in zip(SWEEPS, hostile.measure(cli, "sweep", paths), strict=True):
        assert found["error"] in ("ConfigError", None), (name, found)
        assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
