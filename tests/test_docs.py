"""Every command in README and docs is run as written, in a folder that holds what it names.

What a command would take hours for is cut short: `train.iters=2` and, where it names no model or data of its own, the
tiny ones are added behind it. Hub names are found in an offline cache in the hub's layout, with the tiny model in it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.cli.commands import COMMANDS
from runner.config import reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "outputs/2026-11-24/10-00-00"
SWEEP = "outputs/sweeps/2026-11-24/10-00-00"
HUB = ("Qwen/Qwen3-0.6B", "mlx-community/Qwen3-4B-4bit", "HuggingFaceTB/SmolLM2-135M-Instruct")
ELSEWHERE = (
    "make train",
    "make bench",
    "make test",
    "make test-all",
    "make test-darwin",
    "make check",
    "make setup",
    "source .venv/bin/activate",
    # A server does not end, and lm-eval is not installed: tests/cli/commands/test_serve.py, tests/inference.
    f"python -m runner serve {RUN}",
    f"python -m runner test {RUN} --tasks arc_easy,hellaswag --limit 100 --base",
    f"python -m runner test {RUN} --tasks capitals.yaml --base",
    # They need a cluster: tests/sweeps/test_ray.py, test_submitit.py.
    "python -m runner -m hydra/launcher=ray hydra.launcher.address=192.168.1.10:6379 lora.rank=4,8,16 "
    "optimizer.learning_rate=1e-4,3e-4",
    f"python -m runner resume={SWEEP} hydra.launcher.address=192.168.1.10:6379",
    "python -m runner -m hydra/launcher=submitit hydra.launcher.partition=gpu hydra.launcher.gpus=1 lora.rank=4,8,16 "
    "seed=0,1,2",
)
"""Run by CI itself, or below as a test of its own."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of every fenced block's lines that start with a program of ours or of mlx-lm."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            block = re.sub(r"\\\n\s*", "", block)
            for line in block.splitlines():
                line = re.sub(r"\s+(#|--- ).*$", "", line).strip()
                if re.match(r"(python -m runner|runner|make|mlx_lm\.\w+|pip|python -m) ?", line):
                    found.append((page.name, line))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_cli):
    """A folder with a run, a sweep, data, old adapters and an offline hub cache."""
    from runner.config.schema import ModelConfig
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    folder = tmp_path_factory.mktemp("place")
    model = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), model)
    commit = "0" * 40
    for name in HUB:
        cache = folder / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, cache / "snapshots" / commit)
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text(commit)
    cli = make_cli(folder)
    cli.environment |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    cli.imports_for_itself = True
    cli.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shutil.copytree(ROOT / "runner/data/sets/tiny", folder / "my_data")
    cli("experiment=smoke", "train.iters=100", "train.stop_at=80", "checkpoint.every=20", "checkpoint.keep_every=20",
         f"hydra.run.dir={RUN}")  # fmt: skip
    cli("-m", "experiment=smoke", "train.iters=2", "lora.rank=4,8,16", f"hydra.sweep.dir={SWEEP}")
    import gguf_families

    case = gguf_families.CASES["mistral-nemo"]
    case = gguf_families.Case(case.architecture, case.config | {"num_hidden_layers": 4})
    weights = gguf_families.weights_of(gguf_families.build_model(case.config))
    gguf_families.write_weights(case, weights).write(folder / "Mistral-7B-Instruct-v0.3.Q4_K_M.gguf")
    (folder / "questions.csv").write_text("question,answer\n" + "".join(f"{n}?,{n}\n" for n in range(30)))
    for name, row in (
        ("preferences", {"prompt": "twice: a", "chosen": "a a", "rejected": "b"}),
        ("ratings", {"prompt": "twice: a", "completion": "a a", "label": True}),
    ):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    (folder / "usb_disk").mkdir()
    cli("experiment=smoke", "train.iters=2", "checkpoint.backup=usb_disk", "hydra.run.dir=mirrored")
    next((folder / "usb_disk").iterdir()).rename(folder / "usb_disk/2026-11-24-10-00-00-0123abcd")
    (folder / "old").mkdir()
    (folder / "mine/experiment").mkdir(parents=True)
    (folder / "old.yaml").write_text("model: Qwen/Qwen3-0.6B\ntrain: true\ndata: my_data\niters: 100\n")
    from runner.models.warm_start import read_weights

    weights = read_weights(folder / RUN / "adapters")
    np.savez(folder / "old/adapters.npz", **{name: np.array(array) for name, array in weights.items()})
    return cli


def cut_short(words: list[str]) -> list[str]:
    """The words behind a command that keep it short."""
    own = {word.partition("=")[0] for word in words}
    metric = ["data.metric=exact_match"] if "data.metric_rows" in own or "method=grpo" in words else []
    if "repeat" in own:
        return ["train.iters=2", *metric]
    if own & {"resume", "--cfg", "--help", "-sc"} or not any("=" in w or w == "-m" for w in words):
        return []
    extra = [] if "train.epochs" in own else ["train.iters=2"]
    extra += ["lora.num_layers=4"]
    extra += [] if own & {"model", "model.path", "adapter"} else ["model=tiny"]
    extra += ["model=tiny"] if "adapter" in own else []
    extra += [] if own & {"data", "data.path", "data.mix"} else ["data=tiny"]
    extra += metric
    # A warmup of their own is longer than two updates.
    extra += ["schedule.warmup=0"] if "experiment=first_run" in words or "schedule.warmup" in own else []
    kept = {word.partition("=")[0] for word in extra} & own - {"train.iters", "schedule.warmup"}
    return [word for word in extra if word.partition("=")[0] not in kept]


def cases() -> list[Any]:
    """The commands as parameters; of sweeps the first two, and the others in `make test-all`."""
    sweeps = [command for command in commands() if " -m" in command[1].replace(" -m runner", "", 1)]
    return [
        pytest.param(
            *command, id="-".join(part[:60] for part in command), marks=[pytest.mark.long] * (command in sweeps[2:])
        )
        for command in commands()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), cases())
def test_the_command_does_what_the_page_says(place, page, command):
    if command in ELSEWHERE or command.startswith("pip install"):
        return
    words = shlex.split(command.replace("…", "x"))
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if words[:3] == ["python", "-m", "runner"]:
        words = words[3:]
        is_verb = words and words[0] in COMMANDS
        place(*words, *([] if is_verb else cut_short(words)))
        return
    words[0] = str(Path(sys.executable).parent / words[0]) if not words[0].startswith("python") else sys.executable
    done = subprocess.run(words, cwd=place.folder, env=place.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pages_hold_commands_and_every_link_leads_somewhere():
    assert len(commands()) > 15
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_settings_page_is_in_step_with_the_code():
    assert reference.main(["--check"]) == 0


@pytest.mark.long
def test_make_train_ends_with_a_fine_tuned_model_and_a_clear_gain(make_cli, tmp_path):
    cli = make_cli(tmp_path)
    cli.environment.pop("OPENBLAS_NUM_THREADS")
    cli("experiment=first_run", "hydra.run.dir=run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows if "score" in row]
    assert len(scores) == 2 and scores[1] >= scores[0] + 0.05


def test_reliability_lists_the_faults_that_the_tests_inject():
    spec = importlib.util.spec_from_file_location("fault_rows", ROOT / "tests/faults/rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs/reliability.md").read_text()
    assert {int(row): fault for row, fault in re.findall(r"^\| (\d+) \| (.*) \| [\d,]+ \|$", text, re.M)} == module.ROWS
