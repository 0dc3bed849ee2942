"""What users of Hydra bring to a sweep works as in Hydra: paired values, recipes, launchers, sweepers, callbacks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from runner.runs.sweep_manifest import read_manifest

SMALL = ("model=tiny", "data=tiny", "train.iters=2")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stored(job: Path) -> dict:
    return yaml.safe_load((job / "config.yaml").read_text())


def test_a_group_and_dicts_of_its_settings_are_swept_together(inline):
    inline("-m", *SMALL, "lora=attention", "lora={rank: 4},{rank: 8, dropout: 0.1}", "hydra.sweep.dir=s")
    found = [stored(inline.folder / f"s/{number}")["lora"] for number in (0, 1)]
    assert [(lora["rank"], lora["dropout"], len(lora["keys"])) for lora in found] == [(4, 0.0, 4), (8, 0.1, 4)]


@pytest.mark.parametrize(
    "launcher", ["serial", *(pytest.param(name, marks=pytest.mark.long) for name in ("process", "joblib"))]
)
def test_values_are_paired_by_a_group_of_ones_own(cli, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for name, rank, rate in (("small", 3, 1e-3), ("large", 5, 2e-3)):
        text = f"# @package _global_\nlora: {{rank: {rank}}}\noptimizer: {{learning_rate: {rate}}}\n"
        write(cli.folder / f"mine/paired/{name}.yaml", text)
    arguments = ("--config-dir", "mine", *SMALL, "paired=small,large", f"hydra/launcher={launcher}")
    cli("-m", *arguments, "hydra.sweep.dir=s")
    found = [stored(cli.folder / f"s/{number}") for number in (0, 1)]
    assert [(c["lora"]["rank"], c["optimizer"]["learning_rate"]) for c in found] == [(3, 1e-3), (5, 2e-3)]
    assert "paired=smal is not a choice: large, small. Did you mean 'small'" in cli(
        "--config-dir", "mine", *SMALL, "paired=smal", expect=2
    )


def test_recipes_that_are_sweeps_bring_their_own_values(inline):
    for name, ranks in (("a", "2,3"), ("b", "4")):
        text = f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {{lora.rank: '{ranks}'}}}}}}\n"
        write(inline.folder / f"mine/experiment/{name}.yaml", text)
    inline("--config-dir", "mine", "-m", *SMALL, "experiment=a,b", "seed=1,2", "hydra.sweep.dir=s")
    jobs = [stored(inline.folder / f"s/{number}") for number in range(6)]
    found = [(config["experiment"], config["seed"], config["lora"]["rank"]) for config in jobs]
    assert sorted(found) == [("a", 1, 2), ("a", 1, 3), ("a", 2, 2), ("a", 2, 3), ("b", 1, 4), ("b", 2, 4)]


def test_a_recipe_chooses_the_launcher_and_a_resume_may_choose_another(inline):
    text = (
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: process\n"
        "hydra: {launcher: {jobs: 1}}\ntrain: {iters: 2}\n"
    )
    write(inline.folder / "mine/experiment/rec.yaml", text)
    out = inline("--config-dir", "mine", "-m", *SMALL, "experiment=rec", "seed=1", "hydra.sweep.dir=s")
    assert "processes: 1 at once" in out
    assert "processes: 1 at once" in inline("resume=s", "seed=2")
    assert "processes: 2 at once" in inline("resume=s", "seed=3,4", "hydra.launcher.jobs=2")
    assert "processes:" not in inline("resume=s", "seed=5", "hydra/launcher=serial")
    assert "processes:" not in inline("resume=s", "seed=6")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra/launcher=process", "hydra.launcher.jobs=0"], "must be 1 or more"),
        (["hydra.launcher.jobs=2"], "hydra.launcher.jobs needs hydra/launcher=process"),
        (["hydra.launcher.fail_fast=maybe"], "hydra.launcher.fail_fast=maybe is invalid: must be true or false"),
        (["hydra.output_subdir=../.."], "must be the name of a folder in the run's directory"),
        (["hydra.output_subdir=."], "must be the name of a folder in the run's directory"),
        (["data.path=/nope"], "There is no file or folder '/nope'. A data set"),
        (["model.path=/nope"], "model.path=/nope: there is no such file or folder"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true is not supported"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_before_it_is_recorded(inline, arguments, message):
    assert message in inline("-m", *SMALL, "seed=1,2", *arguments, "hydra.sweep.dir=s", expect=2)
    assert not (inline.folder / "s").exists()


SWEEPER = '''
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class TwoRounds(Sweeper):
    """Tries two ranks, then twice the better one."""

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        first = self.launcher.launch([[*arguments, f"lora.rank={rank}"] for rank in (2, 4)], initial_job_idx=0)
        values = [result.return_value for result in first]
        best = (2, 4)[values.index(min(values))]
        return self.launcher.launch([[*arguments, f"lora.rank={2 * best}"]], initial_job_idx=2)


ConfigStore.instance().store(
    group="hydra/sweeper", name="two_rounds", node={"_target_": "hydra_plugins.two_rounds.TwoRounds"}, provider="test"
)
'''


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_sweeper_of_another_package_works_with_our_launchers_and_its_jobs_are_recorded(inline, launcher):
    write(inline.folder / "plugins/hydra_plugins/two_rounds.py", SWEEPER)
    env = {"PYTHONPATH": os.pathsep.join([str(inline.folder / "plugins"), inline.environment["PYTHONPATH"]])}
    arguments = ("-m", "hydra/sweeper=two_rounds", f"hydra/launcher={launcher}", *SMALL, "hydra.sweep.dir=s")
    out = inline(*arguments, env=env)
    assert "resume=s lora.rank=" in out and (inline.folder / "s/curves.svg").is_file()
    assert [row["lora.rank"] for _, row in sorted(inline.results(inline.folder / "s").items())] == ["2", "4", "8"]
    jobs = read_manifest(inline.folder / "s").jobs
    assert [(job.folder, job.config["lora"]["rank"]) for job in jobs] == [("0", 2), ("1", 4), ("2", 8)]
    (inline.folder / "s/2/config.yaml").unlink()
    for path in (inline.folder / "s/2/checkpoints").glob("step-*"):
        path.rename(inline.folder / path.name)
    (inline.folder / "s/2").rename(inline.folder / "gone")
    assert "3 jobs, 1 to start, 2 done" in inline("resume=s")  # without that sweeper
    assert stored(inline.folder / "s/2")["lora"]["rank"] == 8


def test_folders_are_named_by_a_template_or_by_their_number_where_it_gives_no_name(inline):
    inline("-m", *SMALL, "lora.rank=2,4", "hydra.sweep.subdir=r${lora.rank}-${hydra:job.num}", "hydra.sweep.dir=s")
    assert (inline.folder / "s/r2-0/adapters").is_dir() and (inline.folder / "s/r4-1/adapters").is_dir()
    out = inline("resume=s", "lora.rank=8")
    assert "1 to start, 2 done" in out and (inline.folder / "s/r8-2/adapters").is_dir()
    inline("-m", *SMALL, "seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}", "hydra.sweep.dir=t")
    assert any("seed=1" in path.name for path in (inline.folder / "t").iterdir())
    out = inline("-m", *SMALL, "seed=1,2", "hydra.sweep.subdir=a/${seed}", "hydra.sweep.dir=u-${hydra:job.name}")
    assert (inline.folder / "u-runner/0/adapters").is_dir()
    assert "job 0: 'a/1', which is no plain name" in out and "and 1 more" in out
    out = inline("-m", *SMALL, "seed=1", "hydra.sweep.subdir=sweep.jsonl", "hydra.sweep.dir=v")
    assert "job 0: 'sweep.jsonl', which the sweep needs itself" in out
    names = [run["run"] for run in json.loads(inline("show", "s", "--json"))["runs"]]
    assert set(names) == {"r2-0", "r4-1", "r8-2"}


@pytest.mark.parametrize(
    "launcher", ["serial", *(pytest.param(name, marks=pytest.mark.long) for name in ("process", "joblib"))]
)
def test_the_record_of_hydra_is_written_where_and_if_it_is_asked_for(inline, launcher):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    inline("-m", *SMALL, "seed=1,2", f"hydra/launcher={launcher}", "hydra.output_subdir=record", "hydra.sweep.dir=s")
    assert "seed=2" in yaml.safe_load((inline.folder / "s/1/record/overrides.yaml").read_text())
    inline("-m", *SMALL, "seed=1,2", "hydra.output_subdir=null", "hydra.sweep.dir=t")
    assert not any(path.name in (".hydra", "record") for path in (inline.folder / "t/0").iterdir())


CALLBACK = """
from hydra.experimental.callback import Callback


class Note(Callback):
    def on_job_start(self, config, **kwargs):
        self.note("start", config.hydra.job.num)

    def on_job_end(self, config, job_return, **kwargs):
        self.note("end", config.hydra.job.num, job_return.status.name)

    def note(self, *words):
        with open("notes.txt", "a") as file:
            print(*words, file=file)
"""


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_callbacks_are_told_when_a_job_starts_and_ends(cli, launcher):
    write(cli.folder / "plugins/note.py", CALLBACK)
    env = {"PYTHONPATH": os.pathsep.join([str(cli.folder / "plugins"), cli.environment["PYTHONPATH"]])}
    arguments = (*SMALL, "seed=1,2", f"hydra/launcher={launcher}", "+hydra.callbacks.note._target_=note.Note")
    cli("-m", *arguments, "hydra.sweep.dir=s", env=env)
    notes = (cli.folder / "notes.txt").read_text().splitlines()
    assert sorted(notes) == ["end 0 COMPLETED", "end 1 COMPLETED", "start 0", "start 1"]


def test_settings_of_hydra_in_a_config_have_the_value_of_the_job(inline):
    inline("-m", *SMALL, "seed=1,2", "checkpoint.dir=saved-${hydra:job.num}", "hydra.sweep.dir=s")
    assert [stored(inline.folder / f"s/{number}")["checkpoint"]["dir"] for number in (0, 1)] == ["saved-0", "saved-1"]


def test_a_recipe_without_its_package_line_is_told_so(inline):
    write(inline.folder / "mine/experiment/x.yaml", "train: {iters: 2}\n")
    out = inline("--config-dir", "mine", *SMALL, "experiment=x", expect=2)
    assert "experiment/x.yaml: a recipe sets settings of all sections" in out and "# @package _global_" in out


def test_vars_are_free_values_for_references_in_recipes(inline):
    text = "# @package _global_\nvars: {x: 3}\nlora: {rank: '${vars.x}', alpha: '${lora.rank}'}\n"
    write(inline.folder / "mine/experiment/v.yaml", text)
    inline("--config-dir", "mine", "-m", *SMALL, "experiment=v", "vars.x=3,5", "hydra.sweep.dir=s")
    shutil.rmtree(inline.folder / "mine")  # a resume follows the recorded references
    inline("resume=s", "vars.x=7")
    inline("resume=s", "vars.x=7", "lora.rank=9")
    found = [stored(inline.folder / f"s/{number}")["lora"] for number in range(4)]
    assert [(lora["rank"], lora["alpha"]) for lora in found] == [(3, 3.0), (5, 5.0), (7, 7.0), (9, 9.0)]


def test_a_recipe_that_is_a_sweep_adds_its_values_on_resume_and_groups_of_ones_own_are_swept_in_it(inline):
    for name, rank in (("small", 3), ("large", 5)):
        write(inline.folder / f"mine/size/{name}.yaml", f"# @package _global_\nlora: {{rank: {rank}}}\n")
    params = "{size: 'small,large', vars.x: '1', optimizer.learning_rate: 1e-2}"
    text = f"# @package _global_\nhydra: {{mode: MULTIRUN, sweeper: {{params: {params}}}}}\n"
    write(inline.folder / "mine/experiment/sizes.yaml", text)
    inline("-m", *SMALL, "seed=1", "optimizer.learning_rate=1e-4", "hydra.sweep.dir=s")
    inline("resume=s", "checkpoint.keep_last=1")
    inline("resume=s", "--config-dir", "mine", "experiment=sizes")
    configs = [stored(inline.folder / f"s/{number}") for number in range(3)]
    found = [(c["lora"]["rank"], c["optimizer"]["learning_rate"], c["checkpoint"]["keep_last"]) for c in configs]
    assert found == [(8, 1e-4, 1), (3, 1e-2, 1), (5, 1e-2, 1)]
    write(inline.folder / "mine/size/both.yaml", text)
    assert "type the values of size, vars.x" in inline("resume=s", "size=both", expect=2)


def test_fail_fast_starts_no_job_after_one_has_failed(inline):
    arguments = ("-m", *SMALL, "lora.keys=[nonsense],[self_attn.q_proj]", "hydra.launcher.fail_fast=true")
    inline(*arguments, "hydra.sweep.dir=s", expect=1)
    assert not (inline.folder / "s/1").exists()
