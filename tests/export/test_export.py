"""An export is checked: what does not compute what the run does is refused, and nothing is left of it."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard

from runner.cli.commands import export
from runner.common.errors import ConfigError, ModelError
from runner.config.schema import Config, LoraConfig, ModelConfig, QuantizeConfig
from runner.export.average import average_updates, padded
from runner.export.fidelity import (
    EXACT_LIMIT,
    HALF_LIMIT,
    ROUNDED_LIMIT,
    ExportError,
    FidelityCheck,
    LossesByRow,
    Measured,
    limit_of,
)
from runner.export.hub import _remove_local_names, find_personal, local_paths
from runner.export.mlx import write_model_folder
from runner.export.model_card import CardFacts, write_card
from runner.models.load import load_base_model
from runner.models.warm_start import read_weights

MACHINE = "machine-of-alice"
LEARNS = {"lora.num_layers": -1, "optimizer.learning_rate": 1e-2, "train.eval_every": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs a run trains it."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(tiny: Callable, train: Callable, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if not trained.exists():
        train(tiny(**LEARNS, **{"checkpoint.keep_last": 3}), trained)
    capsys.readouterr()
    return Path(shutil.copytree(trained, tmp_path / "run"))


def check_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)["check"]


def check(base: list[float], run: list[float], export: list[float], limit: float = ROUNDED_LIMIT) -> FidelityCheck:
    tokens = np.ones(len(base))
    losses = [LossesByRow(np.array(sums), tokens) for sums in (base, run, export)]
    return FidelityCheck(losses[0], Measured(losses[1]), Measured(losses[2]), limit)


def test_the_deviation_is_zero_of_the_run_and_one_of_the_base() -> None:
    base, run = [5.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    assert check(base, run, run).deviation == 0
    assert check(base, run, base).deviation == pytest.approx(1)
    assert not check(base, run, base).passes and "lost" in check(base, run, base).problem()
    shifted = check(base, run, [3.0, 1.0, 2.0])  # the same mean loss, by other rows
    assert shifted.export.losses.mean == shifted.run.losses.mean
    assert not shifted.passes and "damaged" in shifted.problem()
    assert not check(base, run, [float("nan"), 2.0, 3.0]).passes


def test_an_adapter_that_does_nothing_is_exported_where_nothing_changes() -> None:
    assert check([5.0, 4.0], [5.0, 4.0], [5.001, 4.0]).passes
    assert not check([5.0, 4.0], [5.0, 4.0], [5.2, 4.0]).passes


def test_noise_of_additions_is_no_deviation() -> None:
    assert check([5.0, 4.0], [5.00001, 4.0], [5.000012, 4.000002], EXACT_LIMIT).passes
    assert not check([5.0, 4.0], [5.1, 4.0], [5.11, 4.0], EXACT_LIMIT).passes


def test_the_coarsest_type_decides_what_may_deviate() -> None:
    assert limit_of(["f32", "float32"]) == EXACT_LIMIT
    assert limit_of(["f32", "bfloat16"]) == limit_of(["f16"]) == HALF_LIMIT
    assert limit_of(["float16", "uint32"]) == limit_of(["q8_0"]) == ROUNDED_LIMIT


@pytest.mark.parametrize("to", ["mlx", "peft", "fused", "hub"])
def test_each_export_has_the_losses_of_the_run(run: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.run([str(run), "--to", to, "--json"]) == 0
    check = check_of(capsys)
    assert check["rows"] == 10 and check["deviation"] < 1e-3 and check["limit"] == EXACT_LIMIT
    assert check["base_loss"] - check["run_loss"] > 0.1
    assert check["export_loss"] == pytest.approx(check["run_loss"], abs=1e-5)


def swallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the merge lose the update, as a coarse quantization does."""
    from runner.export import fused

    monkeypatch.setattr(fused, "_fuse_layer", lambda adapter: adapter["linear"])


def test_an_export_that_lost_the_adapter_is_refused_and_removed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swallow(monkeypatch)
    before = sorted(run.iterdir())
    with pytest.raises(ExportError, match="the adapter's effect is lost.*deviation 100.*--force exports it"):
        export.run([str(run), "--to", "fused"])
    assert sorted(run.iterdir()) == before
    assert export.run([str(run), "--to", "fused", "--force"]) == 0
    assert "warning: the adapter's effect is lost" in capsys.readouterr().out
    assert (run / "export-fused" / "config.json").is_file()


def test_four_bits_that_swallow_a_small_update_are_noticed(
    tiny: Callable, train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(path="builtin:tiny", quantize=QuantizeConfig(bits=4, group_size=32))
    write_model_folder(load_base_model(model), tmp_path / "base")
    changes = {"model.path": str(tmp_path / "base"), "optimizer.learning_rate": 1e-5, "train.iters": 4}
    run = train(tiny(**changes), tmp_path / "run")
    with pytest.raises(ExportError, match="adapter's effect is (lost|damaged)"):
        export.run([str(run), "--to", "fused"])
    assert not (run / "export-fused").exists()
    capsys.readouterr()
    assert export.run([str(run), "--to", "fused", "--dequantize", "--json"]) == 0
    assert check_of(capsys)["deviation"] < 0.05


def test_an_export_that_cannot_be_compared_is_refused_unless_forced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"data.path={tmp_path / 'gone'}"
    with pytest.raises(ExportError, match="cannot be compared with the run: .*gone.*--force"):
        export.run([str(run), "--to", "mlx", missing])
    assert not (run / "export-mlx").exists()
    assert export.run([str(run), "--to", "mlx", missing, "--force"]) == 0
    assert "not compared with the run" in capsys.readouterr().out


def test_an_npz_is_what_lora_py_reads(
    tiny: Callable, train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"lora.keys": ["self_attn.q_proj", "self_attn.v_proj"], "lora.scale": 5.0, "lora.rank": 4}
    run = train(tiny(**LEARNS | changes), tmp_path / "run")
    assert export.run([str(run), "--to", "npz", "--out", str(tmp_path / "adapters.npz")]) == 0
    assert "lora.py --model MODEL --lora-layers 4 --adapter-file" in capsys.readouterr().out
    ours, written = read_weights(run / "adapters"), np.load(tmp_path / "adapters.npz")
    assert set(written) == set(ours)
    name = "model.layers.3.self_attn.v_proj.lora"
    update = 20.0 * (written[f"{name}_a"] @ written[f"{name}_b"])
    np.testing.assert_allclose(update, np.array(5.0 * (ours[f"{name}_a"] @ ours[f"{name}_b"])), atol=1e-6)


def test_an_npz_of_layers_that_lora_py_ignores_is_refused_before_the_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("runner.cli.commands.export_adapter.load_trained")
    with pytest.raises(ModelError, match="adapts q_proj and v_proj alone.*mlp.down_proj.*lora=query_value"):
        export.run([str(run), "--to", "npz"])
    assert not list(run.glob("*.npz")) and not list(run.glob(".export*"))


def test_an_average_is_that_of_the_updates() -> None:
    shapes = {"q.lora_a": (6, 2), "q.lora_b": (2, 5), "e.lora_a": (3, 2, 6), "e.lora_b": (3, 5, 2)}
    checkpoints = [{n: mx.random.normal(s, key=mx.random.key(i)) for n, s in shapes.items()} for i in range(3)]
    averaged, lora = average_updates(checkpoints, LoraConfig(rank=2, alpha=4.0))
    assert (lora.rank, lora.scale, lora.alpha) == (6, 2.0, None)
    expected = sum(c["q.lora_a"] @ c["q.lora_b"] for c in checkpoints) / 3
    assert mx.allclose(averaged["q.lora_a"] @ averaged["q.lora_b"], expected, atol=1e-6)
    expected = sum(c["e.lora_b"] @ c["e.lora_a"] for c in checkpoints) / 3
    assert mx.allclose(averaged["e.lora_b"] @ averaged["e.lora_a"], expected, atol=1e-6)
    wide = padded(checkpoints[0], averaged)
    assert mx.allclose(wide["q.lora_a"] @ wide["q.lora_b"], checkpoints[0]["q.lora_a"] @ checkpoints[0]["q.lora_b"])


@pytest.mark.parametrize("choice", ["last:3", "best:2"])
def test_an_average_is_exported_and_compared_with_the_best_checkpoint(
    run: Path, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.run([str(run), "--to", "mlx", "--average", choice, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = run / f"export-mlx-{choice.replace(':', '-')}"
    assert document["folder"] == str(folder) and document["check"]["passes"]
    average, count = document["average"], int(choice[-1])
    assert len(average["steps"]) == count and average["single_step"] == 12
    assert average["loss"] > average["single_loss"]  # of a run that still improves
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 8 * count
    assert export.run([str(run), "--to", "fused", "--average", choice]) == 0
    out = capsys.readouterr().out
    assert "The average is worse: --checkpoint 12" in out
    assert f"average {average['loss']:.4f}, export " in out and ", run " not in out


def test_an_average_of_too_few_checkpoints_is_refused(run: Path) -> None:
    for choice, reason in (("last:9", "has 3 checkpoints"), ("last:1", "2 checkpoints or more"), ("mean:3", "invalid")):
        with pytest.raises(ConfigError, match=reason):
            export.run([str(run), "--to", "mlx", "--average", choice])


def test_a_folder_for_the_hub_has_a_valid_card_and_nothing_of_this_machine(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: MACHINE)
    assert export.run([str(run), "--to", "hub", "--license", "mit", "--base-model", "someone/base"]) == 0
    assert "hf upload YOUR_NAME/THIS_MODEL" in capsys.readouterr().out
    folder = run / "export-hub"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "someone/base", "mlx")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    for expected in (
        "mlx_lm.generate --model",
        "| lora.num_layers | `-1` |",
        "on 10 valid rows",
        "these files",
        "50 training rows",
    ):
        assert expected in card.text
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(texts) >= 4 and not any(str(run.parent) in text for text in texts)
    assert not any(MACHINE in text for text in texts)
    assert not list(find_personal(folder))


def test_an_adapter_for_the_hub_needs_the_name_of_its_base(run: Path) -> None:
    with pytest.raises(ConfigError, match="--base-model ORGANISATION/NAME"):
        export.run([str(run), "--to", "hub", "--adapter-only"])
    assert export.run([str(run), "--to", "hub", "--adapter-only", "--base-model", "someone/base"]) == 0
    folder = run / "export-hub"
    assert json.loads((folder / "adapter_config.json").read_text())["model"] == "someone/base"
    assert ModelCard.load(folder / "README.md").data.to_dict()["base_model_relation"] == "adapter"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
    ]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("README.md", "see {parent}/data", "a path of this machine"),
        ("README.md", "key hf_" + "a1B2" * 9, "what looks like a secret"),
        ("config.json", '{{"x": "{home}/models"}}', "the home directory"),
        ("chat_template.jinja", "from {home} ", "the home directory"),
        ("code/modeling.py", "# on machine-of-alice", "the name of this machine"),
        ("tokenizer.json", '{{"x": "{home}/models"}}', "the home directory"),
        ("notes.txt", "made of clients/secret.jsonl", "a path of this machine"),
        ("notes.txt", "made of /mix/part", "a path of this machine"),
    ],
)
def test_personal_names_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, found: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: MACHINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients/secret.jsonl").touch()
    config = Config()
    config.model.path, config.data.path = "someone/base", "clients/secret.jsonl"
    config.data.mix = [{"path": "/mix/part"}, {"path": "someone/rows"}]
    folder = tmp_path / "hub"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(text.format(parent=tmp_path, home=Path.home()))
    (folder / "other.md").write_text("of someone/base and someone/rows")
    assert list(find_personal(folder, local_paths(config))) == [f"{file} holds {found}"]


def test_a_vocabulary_may_have_the_name_of_the_machine_as_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: MACHINE)
    (tmp_path / "tokenizer.json").write_text(json.dumps({MACHINE: 1, str(Path.home()): 2}))
    assert not list(find_personal(tmp_path))


def test_names_of_local_folders_are_removed_at_any_depth(tmp_path: Path) -> None:
    config = {"text_config": {"_name_or_path": "/data/base", "n": 1}, "parts": [{"name_or_path": "x"}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _remove_local_names(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": {"n": 1}, "parts": [{}]}


def test_a_card_says_on_how_many_rows_it_trained_and_was_measured() -> None:
    config = Config()
    config.model.path, config.data.path, config.data.metric = "someone/base", "someone/rows", "exact_match"
    config.train.batch_size, config.train.grad_accumulation = 4, 2
    losses = LossesByRow(np.ones(3), np.ones(3, np.int64))
    measured = FidelityCheck(losses, Measured(losses), Measured(losses, 0.5, 8), 1.0)
    card = write_card(config, CardFacts("someone/base", None, "llama", 1200, False, measured, "valid", 1500, 90_000))
    assert "Trained on the data set `someone/rows`: 1,500 training rows, 90,000 tokens. The loss" in card
    assert "(1,200 updates of 8 rows)" in card and "loss on 3 valid rows" in card
    assert "exact_match on 8 test rows: 50.0%" in card


@pytest.mark.parametrize(
    ("method", "about", "data"),
    [
        ("sft", "with LoRA on the data set `someone/rows` (9 updates of 4 rows)", "The loss covers answers."),
        ("dpo", "by DPO (direct preference optimization) on", "(9 updates of 4 pairs)"),
        ("kto", "by KTO (Kahneman-Tversky optimization) on", "Each row is an answer that is good or bad."),
        ("grpo", "by GRPO (group relative policy optimization) on", "were scored by exact_match. Training started"),
    ],
)
def test_a_card_says_how_the_model_was_trained(method: str, about: str, data: str) -> None:
    config = Config()
    config.model.path, config.data.path, config.data.metric = "someone/base", "someone/rows", "exact_match"
    config.method.name, config.train.batch_size = method, 4
    config.adapter = "adapters" if method == "grpo" else None
    card = write_card(config, CardFacts("someone/base", None, "llama", 9, False, None, None, 12, 340))
    assert (": 6 training pairs, 340 tokens. Each pair is" in card) == (method == "dpo")
    assert about in card and data in card
    assert (f'- "{method}"\n' in card) == (method != "sft")


def test_the_command_of_a_card_bears_an_apostrophe() -> None:
    config = Config()
    config.model.path, config.data.path, config.data.template_args = "someone/base", "someone/rows", {"who": "Ann's"}
    card = write_card(config, CardFacts("someone/base", None, "llama", 1, False, None, None))
    line = next(line for line in card.splitlines() if line.startswith("mlx_lm.generate"))
    assert json.loads(shlex.split(line)[4]) == {"who": "Ann's"}
