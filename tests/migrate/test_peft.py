"""An adapter that PEFT saved is imported as the settings of a run that it fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
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


def write_adapter(folder: Path, modules: list[str], base: str, **changes: object) -> Path:
    """An adapter of rank 2 with these modules; its arrays are too small for any model."""
    folder.mkdir()
    arrays = {f"base_model.model.{name}.lora_{x}.weight": mx.zeros((2, 2)) for name in modules for x in "AB"}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def base_model(folder: Path, model_type: str, depth: int) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": depth}))
    return str(folder)


@pytest.mark.parametrize(
    ("model_type", "module", "parameters", "keys"),
    [
        ("qwen3_moe", "mlp.experts", ["mlp.experts.down_proj"], ["mlp.switch_mlp.down_proj"]),
        (
            "qwen3_moe",
            "mlp.experts",
            ["mlp.experts.gate_up_proj"],
            ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"],
        ),
        ("qwen3_moe", "mlp.experts.3.up_proj", [], ["mlp.switch_mlp.up_proj"]),
        ("mixtral", "mlp.experts", ["mlp.experts.down_proj"], ["block_sparse_moe.switch_mlp.down_proj"]),
        ("mixtral", "block_sparse_moe.experts.0.w1", [], ["block_sparse_moe.switch_mlp.gate_proj"]),
    ],
)
def test_experts_have_the_names_of_their_family(
    tmp_path: Path, model_type: str, module: str, parameters: list[str], keys: list[str]
) -> None:
    base = base_model(tmp_path / "base", model_type, depth=1)
    modules = [f"model.layers.0.{module}"]
    rank = {"mlp.experts.gate_up_proj": 5}
    adapter = write_adapter(tmp_path / "peft", modules, base, target_parameters=parameters, rank_pattern=rank)
    values = import_adapter(adapter).values
    assert values["lora.keys"] == keys
    assert values["lora.rank"] == (5 if "mlp.experts.gate_up_proj" in parameters else 2)


@pytest.mark.parametrize("module", ["mlp.experts", "mlp.experts.base_layer", "mlp.experts.0.up_proj", "mlp.gate"])
def test_layers_that_families_name_differently_need_the_base_model(tmp_path: Path, module: str) -> None:
    adapter = write_adapter(tmp_path / "peft", [f"model.layers.0.{module}"], "someone/base")
    result = import_adapter(adapter)
    assert "lora.keys" not in result.values
    assert {skipped.key: skipped.reason for skipped in result.skipped}["target_modules"].startswith("the base model is")


def test_some_blocks_are_all_where_the_adapter_says_so_or_the_base_model_has_no_more(tmp_path: Path) -> None:
    modules = [f"model.layers.{block}.self_attn.q_proj" for block in range(2)]
    of_all = write_adapter(tmp_path / "all", modules, "someone/base", target_modules=["q_proj"])
    assert import_adapter(of_all).values["lora.num_layers"] == -1
    some = write_adapter(tmp_path / "some", modules, "someone/base", layers_to_transform=[0, 1])
    result = import_adapter(some)
    assert "lora.num_layers" not in result.values and result.values["lora.keys"] == ["self_attn.q_proj"]
    assert any("the base model is needed" in skipped.reason for skipped in result.skipped)
    for depth, count in ((2, -1), (4, None)):
        base = base_model(tmp_path / f"base{depth}", "llama", depth)
        adapter = write_adapter(tmp_path / f"of{depth}", modules, base, layers_to_transform=[0, 1])
        assert import_adapter(adapter).values.get("lora.num_layers") == count
