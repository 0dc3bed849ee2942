"""An adapter that PEFT saved is imported as the settings of a run that it fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli.commands import export, import_
from runner.cli.overrides import parse_arguments
from runner.common.errors import ConfigError
from runner.migrate.peft import import_adapter


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs an adapter writes it."""
    return tmp_path_factory.mktemp("exported") / "peft"


@pytest.fixture
def adapter(tiny: Callable, train: Callable, exported: Path, tmp_path: Path) -> Path:
    if exported.exists():
        return Path(shutil.copytree(exported, tmp_path / "peft"))
    changes = {
        "lora.num_layers": 2,
        "lora.rank": 4,
        "lora.scale": 3.0,
        "lora.keys": ["self_attn.q_proj", "mlp.up_proj"],
    }
    run = train(tiny(**changes), tmp_path / "run")
    assert export.run([str(run), "--to", "peft", "--out", str(exported)]) == 0
    return Path(shutil.copytree(exported, tmp_path / "peft"))


def change(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_shape_of_the_adapter_is_imported(adapter: Path) -> None:
    change(adapter, base_model_name_or_path="someone/base")
    result = import_adapter(adapter)
    assert result.groups == {}
    expected = {
        "model.path": "someone/base",
        "lora.rank": 4,
        "lora.scale": 3.0,
        "lora.num_layers": 2,
        "lora.keys": ["mlp.up_proj", "self_attn.q_proj"],
        "adapter": str(adapter),
    }
    assert result.values == expected
    assert [skipped.key for skipped in result.skipped] == ["data"]


def test_a_run_with_the_imported_settings_fits(adapter: Path, tiny: Callable, train: Callable, tmp_path: Path) -> None:
    values = import_adapter(adapter).values
    changes = {name: value for name, value in values.items() if name not in ("model.path", "adapter")}
    train(tiny(**changes, **{"adapter": str(adapter), "train.iters": 2}), tmp_path / "next")


def test_ranks_by_layer_become_the_largest(adapter: Path) -> None:
    change(adapter, rank_pattern={"up_proj": 16}, alpha_pattern={"up_proj": 7})
    assert import_adapter(adapter).values["lora.rank"] == 16


def test_the_command_prints_what_to_paste(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert import_.run([str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "target_modules" in out and "data=folder data.path=FOLDER" in out
    assert import_.run([str(adapter), "--json"]) == 0
    overrides = json.loads(capsys.readouterr().out)["overrides"]
    assert parse_arguments(overrides) is not None


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter of PEFT.*adapter="):
        import_.run([str(tmp_path)])
