"""A run, its result, a checkpoint: each is found by what one would type, and what is damaged or absent is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.cli.commands.adapter_source import find_adapter
from runner.common.errors import CheckpointError, ConfigError


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    # Keeps steps 4, 8 and 12, all of them evaluated or not: evaluations are at 6 and 12.
    return train_once(tiny(), tmp_path / "run")


def test_a_run_means_its_result_with_its_step(run: Path) -> None:
    source = find_adapter(run)
    assert (source.run, source.folder, source.is_result) == (run, run / "adapters", True)
    assert source.step == json.loads((run / "status.json").read_text())["result_step"]
    assert source.adapters == (run / "adapters" / "adapters.safetensors").read_bytes()
    assert find_adapter(run / "adapters") == source


@pytest.mark.parametrize(("which", "step"), [("last", 12), ("best", 12), ("4", 4), ("step-0000008", 8)])
def test_last_best_and_a_step_choose_a_checkpoint_as_its_folder_does(run: Path, which: str, step: int) -> None:
    source = find_adapter(run, which)
    folder = run / "checkpoints" / f"step-{step:07d}"
    assert (source.folder, source.step, source.is_result) == (folder, step, False)
    assert find_adapter(folder) == source


def test_best_is_the_lowest_finite_validation_loss_and_the_earlier_of_equals(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints", json.loads((run / "status.json").read_text())["run_id"])
    files = store.load(store.folder / "step-0000012").files
    for step, loss in ((16, 0.5), (20, 0.1), (24, 0.1), (28, math.nan), (32, None)):
        store.commit(step, files, metrics={} if loss is None else {"valid_loss": loss})
    assert find_adapter(run, "best").step == 20
    assert find_adapter(run, "last").step == 32


def test_checkpoints_of_another_run_are_ignored(run: Path, tiny: Callable, train: Callable, tmp_path: Path) -> None:
    other = train(tiny(**{"train.iters": 16}), tmp_path / "other")
    shutil.copytree(other / "checkpoints" / "step-0000016", run / "checkpoints" / "step-0000016")
    assert find_adapter(run, "last").step == 12


@pytest.mark.parametrize(
    ("which", "message"),
    [("lst", "Did you mean 'last'"), ("5", "no checkpoint step-0000005; it has 4, 8, 12"), ("-1", "last, best or")],
)
def test_a_missing_checkpoint_is_answered_with_the_existing_ones(run: Path, which: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_adapter(run, which)


def test_without_an_evaluation_there_is_no_best(tiny: Callable, train: Callable, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "abc"}\n' * 8)
    run = train(tiny(**{"data.path": str(data)}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"was evaluated.*--checkpoint last"):
        find_adapter(run, "best")


def test_a_path_without_an_adapter_is_refused_with_what_it_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such directory\. Did you mean 'run'"):
        find_adapter(tmp_path / "rum")
    with pytest.raises(ConfigError, match="not a run directory"):
        find_adapter(tmp_path)
    sweep = tmp_path / "sweep"
    shutil.copytree(run, sweep / "0")
    (sweep / "multirun.yaml").write_text("")
    assert find_adapter(sweep).run == sweep / "0"  # its best job
    (sweep / "0/status.json").unlink()
    (sweep / "0/metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="is a sweep, and none of its jobs has a valid_loss yet"):
        find_adapter(sweep)
    with pytest.raises(ConfigError, match="is not a run directory"):
        find_adapter(run / "checkpoints" / "step-0000004", "last")
    shutil.copytree(run / "checkpoints" / "step-0000004", tmp_path / "step-0000004")
    with pytest.raises(ConfigError, match=r"no run directory .* lies above"):
        find_adapter(tmp_path / "step-0000004")


def test_a_run_without_a_result_names_its_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "adapters")
    with pytest.raises(ConfigError, match=r"no result .*: it is finished. Its checkpoints: 4, 8, 12; --checkpoint"):
        find_adapter(run)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "optimizer.safetensors"])
def test_a_flipped_bit_in_a_checkpoint_is_refused(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-0000008" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        find_adapter(run, "8")


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json", "manifest.json"])
def test_a_flipped_bit_in_the_result_is_refused(run: Path, name: str) -> None:
    path = run / "adapters" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        find_adapter(run)


def test_a_result_without_a_manifest_is_read(run: Path) -> None:
    new = find_adapter(run)
    (run / "adapters/manifest.json").unlink()
    old = find_adapter(run)
    assert (old.adapters, old.adapter_config, old.step, old.is_result) == (
        new.adapters,
        new.adapter_config,
        new.step,
        new.is_result,
    )


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_a_malformed_adapter_config_is_refused(run: Path, text: str) -> None:
    (run / "adapters/manifest.json").unlink()  # which would find it first
    (run / "adapters" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        find_adapter(run)


def test_a_symbolic_link_to_the_result_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "adapters" / "adapters.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors"):
        find_adapter(run)
