"""`runner verify`: damage is found without a model, named with the way back, and a stretch can be trained again."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runner.checkpoints.manifest import write
from runner.checkpoints.safetensors_file import Tensor, pack, unpack
from runner.checkpoints.store import file_records
from runner.checkpoints.verify import load_checkpoint
from runner.cli.commands import verify
from runner.common.errors import ConfigError
from runner.models.device import on_cpu


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_cli) -> Path:
    cli = make_cli(tmp_path_factory.mktemp("trained"))
    overrides = ("model=tiny", "data=tiny", "lora.dropout=0.1", "train.iters=30", "train.eval_every=10")
    cli(*overrides, "checkpoint.every=10", "hydra.run.dir=run")
    return cli.folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_intact_runs_are_reported_as_whole_without_loading_mlx(run, capsys):
    before = sys.modules.pop("mlx.core", None)
    try:
        assert verify.run(["run"]) == 0
        assert "mlx.core" not in sys.modules
    finally:
        if before:
            sys.modules["mlx.core"] = before
    out = capsys.readouterr().out
    assert "whole    run  (run finished, 3 checkpoints" in out
    assert "1 run, 3 checkpoints" in out and "all whole" in out


@pytest.mark.parametrize("file", ["adapters.safetensors", "optimizer.safetensors", "train_state.json", "manifest.json"])
def test_one_flipped_bit_is_found_and_the_recovery_named(run, capsys, file):
    flip(run / "checkpoints/step-0000030" / file, 100)
    assert verify.run(["run"]) == 5
    out = capsys.readouterr().out
    assert f"checkpoints/step-0000030/{file}" in out
    assert "whole: step 10, 20" in out
    assert "python -m runner resume=run" in out
    assert "1 damaged" in out


def test_the_result_the_rows_and_the_settings_are_checked_too(run, capsys):
    flip(run / "adapters/adapters.safetensors")
    rows = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(rows[:-40])
    config = (run / "config.yaml").read_text()
    assert "  rank: 8\n" in config
    (run / "config.yaml").write_text(config.replace("  rank: 8\n", "  rank: 16\n"))
    assert verify.run(["run", "--json"]) == 5
    damage = "\n".join(json.loads(capsys.readouterr().out)["audits"][0]["damage"])
    assert "adapters/adapters.safetensors: its SHA-256" in damage
    assert "the newest checkpoint relies on" in damage
    assert "lora.rank is 16, but the newest checkpoint was trained with 8" in damage


def test_nan_is_damage_even_with_a_valid_manifest(run, capsys):
    step = run / "checkpoints/step-0000020"
    reseal(step, lambda array: np.full_like(array, np.nan))
    assert verify.run(["run"]) == 5
    assert "contains NaN or Inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.yaml", "config.yaml is missing"), ("adapters", "missing, though the run is finished")],
)
def test_missing_files_are_damage(run, capsys, name, message):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert verify.run(["."]) == 5
    assert message in capsys.readouterr().out


def test_leftovers_and_torn_lines_are_notes_and_not_damage(run, capsys):
    (run / "checkpoints/.tmp-step-0000040-0123abcd").mkdir()
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 31, "spl')
    (run / "row_losses.jsonl").unlink()
    assert verify.run(["run"]) == 0
    out = capsys.readouterr().out
    assert "1 temporary folders of an interrupted save" in out and "its last line is torn" in out
    assert "row_losses.jsonl: 0 of" in out and "a resume begins it anew" in out


def test_folders_sweeps_and_checkpoints_can_be_verified(run, tmp_path, capsys):
    sweep = tmp_path / "sweeps/one"
    sweep.mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    for number in "01":
        shutil.copytree(run, sweep / number)
    assert verify.run(["."]) == 0
    assert "3 runs, 9 checkpoints" in capsys.readouterr().out
    flip(sweep / "1/checkpoints/step-0000010/optimizer.safetensors")
    assert verify.run(["sweeps"]) == 5
    out = capsys.readouterr().out
    assert "DAMAGED  sweeps/one/1" in out and "whole    sweeps/one/0" in out
    assert verify.run(["run/checkpoints/step-0000010"]) == 0
    assert verify.run(["run/adapters"]) == 0
    assert verify.run(["sweeps/one/1/checkpoints/step-0000010"]) == 5


def test_nothing_to_verify_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing", Path(__file__)):
        with pytest.raises(ConfigError):
            verify.run([str(path)])


def reseal(step: Path, change) -> None:
    """Change the adapter of a checkpoint and make its manifest agree."""
    loaded = load_checkpoint(step, verify_disk())
    tensors, metadata = unpack(loaded.files["adapters.safetensors"], where="here")
    changed = {name: Tensor.of(change(tensor.array())) for name, tensor in tensors.items()}
    loaded.files["adapters.safetensors"] = pack(changed, metadata)
    for name, data in loaded.files.items():
        (step / name).write_bytes(data)
    (step / "manifest.json").write_bytes(write(replace(loaded.checkpoint.manifest, files=file_records(loaded.files))))


def verify_disk():
    from runner.common.filesystem import FileSystem

    return FileSystem()


def test_a_replay_reproduces_the_checkpoint_and_leaves_nothing(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert verify.run(["run", "--replay"]) == 0
    assert verify.run(["run", "--replay", "--from", "0"]) == 0
    out = capsys.readouterr().out
    same = "the same, bit for bit" if on_cpu() else "the same within this device's noise"
    assert f"steps 20 to 30 trained again: {same}" in out
    assert f"steps 0 to 10 trained again: {same}" in out
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert not list((tmp_path / "cache").glob("replay-*"))


def test_only_a_replay_finds_a_forged_checkpoint(run, capsys):
    reseal(run / "checkpoints/step-0000030", lambda array: array * np.float32(1.0001))
    assert verify.run(["run"]) == 0
    assert verify.run(["run", "--replay"]) == 5
    assert "steps 20 to 30 trained again: NOT the same: adapters.safetensors differs" in capsys.readouterr().out


@pytest.mark.cpu("rows are compared where equal steps have equal bits")
def test_a_replay_finds_rewritten_rows(run, capsys):
    rows = (run / "metrics.jsonl").read_text()
    at = rows.index('"loss": ', rows.index('"step": 30')) + 8
    changed = rows[: at + 4] + ("1" if rows[at + 4] != "1" else "2") + rows[at + 5 :]
    (run / "metrics.jsonl").write_text(changed)
    assert verify.run(["run", "--replay"]) == 5
    assert "loss of the train row of step 30 was" in capsys.readouterr().out


def test_tensor_differences_are_relative_to_the_largest_value(tmp_path, trained):
    """No GPU here: the measure itself, on files."""
    from runner.cli.commands.replay import tensor_differences

    step = shutil.copytree(trained / "checkpoints/step-0000030", tmp_path / "step-0000030")
    one = load_checkpoint(step, verify_disk())
    reseal(step, lambda array: array + np.float32(1e-3) * np.abs(array).max())
    found = tensor_differences(one, load_checkpoint(step, verify_disk()))
    assert found["optimizer.safetensors"] == 0.0
    assert found["adapters.safetensors"] == pytest.approx(1e-3, rel=0.01)


def test_two_equal_replays_on_a_gpu_still_allow_the_rounding_of_sums_in_another_order(tmp_path, trained):
    """No GPU here: the comparison itself."""
    from runner.cli.commands.replay import _compare, _Trained, noise_floor

    stored, equal = trained / "checkpoints/step-0000030", {"adapters.safetensors": 0.0, "optimizer.safetensors": 0.0}
    floor = noise_floor(10, 100)
    assert floor == pytest.approx(1.2e-5, rel=0.01)
    for factor, accepted in ((1.0 + 1e-6, True), (1.0001, False)):
        step = shutil.copytree(stored, tmp_path / f"{factor}" / "step-0000030")
        reseal(step, lambda array, factor=factor: array * np.float32(factor))
        found = _compare(_Trained.load(stored), _Trained.load(step), equal, floor)
        assert bool(found) != accepted, found
        assert _compare(_Trained.load(stored), _Trained.load(step), None, floor)
