"""`runner import` as a user meets it, and the imported command against stock mlx-lm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from runner.cli.commands.import_ import run
from runner.common.errors import ConfigError

OLD = {
    "model": "org/model",
    "data": "it's my data",
    "train": True,
    "iters": 100,
    "learning_rate": 2e-4,
    "seed": 0,
    "report_to": "swanlab",
    "lr_schedule": {"name": "cosine_decay", "arguments": [2e-4, 99]},
}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(OLD))
    return path


def test_each_old_setting_is_listed_and_then_the_command(old, capsys):
    assert run([str(old)]) == 0
    out = capsys.readouterr().out
    assert "seed=0" in out and "same as our default" in out
    assert "learning_rate=0.0002" in out and "overridden by lr_schedule" in out
    assert "report_to=swanlab: not yet a logger" in out
    command = out[out.index("python -m runner") :]
    arguments = shlex.split(command.replace("\\\n", ""))
    assert arguments[:3] == ["python", "-m", "runner"]
    assert "data.path=it's my data" in arguments and "schedule.iters=100" in arguments


def test_json_is_one_document_with_the_same_command(old, capsys):
    run(["--json", str(old)])
    found = json.loads(capsys.readouterr().out)
    assert found["program"] == "mlx_lm.lora"
    assert shlex.split(found["command"]) == ["python", "-m", "runner", *found["overrides"]]
    assert {left["key"] for left in found["not_carried"]} == {"report_to"}
    assert any(line["key"] == "mask_prompt" and not line["said"] for line in found["carried"])


def test_a_recipe_composes_to_what_the_command_composes_to(old, cli, capsys):
    run(["--json", str(old)])
    command = json.loads(capsys.readouterr().out)
    run(["--json", "--write", "mine/experiment/old.yaml", str(old)])
    recipe = json.loads(capsys.readouterr().out)["command"]
    assert recipe == "python -m runner --config-dir mine experiment=old"
    text = Path("mine/experiment/old.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    outs = [cli(*overrides, "--cfg", "job") for overrides in (shlex.split(recipe)[3:], command["overrides"])]
    assert yaml.safe_load(outs[0]) == yaml.safe_load(outs[1]) | {"experiment": None}


def test_no_file_is_overwritten_and_no_built_in_recipe_shadowed(old):
    for target, message in (
        ("mine/old.yaml", "mine/experiment/old.yaml"),
        ("mine/experiment/smoke.yaml", "is built in"),
        ("mine/experiment/old.txt", "NAME.yaml"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(["--write", target, str(old)])
    run(["--write", "mine/experiment/old.yaml", str(old)])
    with pytest.raises(ConfigError, match="exists already"):
        run(["--write", "mine/experiment/old.yaml", str(old)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "takes a YAML"),
        (["nowhere.yaml"], "There is no file nowhere.yaml"),
        (["mlx_lm.lora", "--train"], "behind --"),
        (["--", "mlx_lm.generate", "--model", "m"], "This command cannot be imported"),
        (["--", "mlx_lm.lora", "--iters", "many"], "invalid int value: 'many'"),
        (["--wriet", "x", "old.yaml"], "unrecognized arguments"),
        (["old.yaml", "--", "mlx_lm.lora"], "takes a YAML"),
    ],
)
def test_a_wrong_argument_is_refused_with_a_message(old, argv, message):
    with pytest.raises(ConfigError, match=message):
        run(argv)


def test_control_characters_and_secrets_of_an_old_file_are_not_printed(tmp_path, capsys):
    token = "hf_" + "a1B2" * 8
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps({"train": True, "bad\x1b[2J": "\x1b]0;x", "key": token, "data": "a\x1b[1m"}))
    run([str(path)])
    run(["--json", str(path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and token not in out


def test_import_from_the_command_line(cli):
    out = cli("import", "--", "python", "lora.py", "--model", "m", "--train", "--add-eos-token", "0")
    assert "lora=query_value" in out and "add_eos_token=0: here every row ends" in out
    assert "usage: runner import" in cli("import", "--help")
    cli("import", "nowhere.yaml", expect=2)


STOCK = """
import json, sys
import mlx.core as mx
from mlx_lm import lora

mx.disable_compile()  # a C++ compiler at run time is not what is compared

class Keep:
    def __init__(self):
        self.rows = []
    def on_train_loss_report(self, info):
        self.rows.append(["train", info["iteration"], info["train_loss"], info["learning_rate"]])
    def on_val_loss_report(self, info):
        self.rows.append(["valid", info["iteration"], info["val_loss"], None])

keep = Keep()
lora.get_reporting_callbacks = lambda *args, **kwargs: keep
sys.argv = ["mlx_lm.lora", *sys.argv[2:]]
lora.main()
with open("stock.json", "w") as out:
    json.dump(keep.rows, out)
"""


def write_model(folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from runner.models import tiny

    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(tiny.build_model().parameters())))
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
    tiny.build_tokenizer().save_pretrained(folder)


TEXT = [{"text": f"{i} bottles of water stand on the wall, and one of them falls"} for i in range(4)]
PAIRS = [{"prompt": f"what is {i} + {i} ?", "completion": f"it is {2 * i:02d}, " + "and so on " * 8} for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "width", "more"),
    [
        (TEXT, 32, {"optimizer": "adam", "learning_rate": "1e-3"}),
        pytest.param(
            *(TEXT, 32, {"optimizer": "adamw", "grad_accumulation_steps": 2, "iters": 12, "steps_per_report": 2}),
            marks=pytest.mark.long,
        ),
        (PAIRS, 96, {"mask_prompt": True, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}}),
        (
            TEXT,
            32,
            {
                "num_layers": -1,
                "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 5, 1e-5]},
                "optimizer": "sgd",
            },
        ),
    ],
    ids=["adam", "accumulation", "masked prompts", "schedule"],
)
def test_the_imported_command_trains_as_stock_mlx_lm_does_where_one_batch_is_the_data_set(cli, rows, width, more):
    """Rows are cut to one length, so that neither padding nor the order of rows can make a difference."""
    here = cli.folder
    write_model(here / "model")
    (here / "data").mkdir()
    for split in ("train", "valid"):
        (here / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = {
        "model": "model",
        "data": "data",
        "train": True,
        "iters": 6,
        "batch_size": len(rows),
        "num_layers": 2,
        "learning_rate": 1e-3,
        "steps_per_report": 1,
        "steps_per_eval": 6,
        "max_seq_length": width,
        "seed": 3,
    } | more
    (here / "old.yaml").write_text(yaml.safe_dump(old).replace("'1e-3'", "1e-3"))
    stock = cli.start("-c", "old.yaml", words=("-c", STOCK, "--"))
    output, _ = stock.communicate(timeout=300)
    assert stock.returncode == 0, output
    theirs = json.loads((here / "stock.json").read_text())
    command = json.loads(cli("import", "old.yaml", "--json"))
    assert command["not_carried"] == []
    cli(*command["overrides"], "hydra.run.dir=run")
    ours = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]

    trained = [row for row in theirs if row[0] == "train"]
    found = [row for row in ours if row["split"] == "train"]
    assert len(trained) == len(found) == 6
    assert [row["loss"] for row in found] == pytest.approx([row[2] for row in trained], abs=1e-4)
    assert [row["learning_rate"] for row in found] == pytest.approx([row[3] for row in trained], rel=1e-5)
    assert trained[-1][2] < trained[0][2] - 1e-3
    first = [
        next(row for row in theirs if row[0] == "valid")[2],
        next(r for r in ours if r["split"] == "valid")["loss"],
    ]
    assert first[0] == pytest.approx(first[1], abs=1e-4)
