"""Every emitted command composes, and means what the old config meant."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config import schema, serialize
from runner.config.groups import CONF_DIR
from runner.migrate.mapping import import_config
from runner.migrate.result import GROUP_DEFAULTS
from runner.migrate.source import EXAMPLES, MLX_LM, read_command, read_config
from runner.training.lr_schedule import learning_rate_of as learning_rate

WHOLE = {"model": "org/model", "data": "my_data", "train": True}
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


def written(tmp_path: Path, **old) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(WHOLE | old))
    return path


def imported(tmp_path: Path, our_defaults: bool = False, **old):
    return import_config(read_config(written(tmp_path, **old)), our_defaults)


def reasons(carried) -> dict[str, str]:
    return {left.key: left.reason for left in carried.skipped}


def expected(name: str, value: object) -> object:
    """A path that is there is made absolute when a run starts."""
    found = Path(value).expanduser() if name in schema.path_settings() else None
    return str(found.absolute()) if found and found.exists() else value


RICH = [
    {},
    {"fine_tune_type": "lora", "optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 0.1, "eps": 1e-6}}},
    {"optimizer": "sgd", "optimizer_config": {"sgd": {"nesterov": True, "momentum": 0.9, "weight_decay": 0.1}}},
    {"optimizer": "ADAM", "optimizer_config": {"adam": {"betas": [0.9, 0.98], "bias_correction": True}}},
    {"num_layers": -1, "lora_parameters": LORA | {"keys": ["self_attn.q_proj", "mlp.down_proj"], "dropout": 0.05}},
    {"lora_parameters": {"rank": 4, "alpha": 32.0, "dropout": 0.0}},
    {"iters": 1003, "grad_accumulation_steps": 8, "save_every": 3, "steps_per_eval": 50, "val_batches": -1},
    {"iters": 3, "grad_accumulation_steps": 8},
    {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 1000, 1e-7], "warmup": 100, "warmup_init": 0}},
    {"lr_schedule": {"name": "linear_schedule", "arguments": [1e-5, 0.0, 1000]}},
    {"lr_schedule": {"name": "linear_schedule", "arguments": [0, 1e-4, 2000]}},
    {"lr_schedule": {"name": "exponential_decay", "arguments": [1e-5, 1.0], "warmup": 5000}},
    {"lr_schedule": {"name": "step_decay", "arguments": [1e-5, 0.5, 100]}},
    {"prompt_feature": "a, b", "completion_feature": "it's", "text_feature": "1e5", "chat_feature": "null"},
    {"model": "/models/a b's (1), {x}=[y]", "data": "~/data\\", "resume_adapter_file": "[old]/$HOME's\\'.npz"},
    {"data": "null", "model": "1e-5"},
    {"hf_dataset": {"path": "org/set", "prompt_feature": "question", "completion_feature": "answer"}},
    {"seed": 7, "test": True, "mask_prompt": True, "grad_checkpoint": True, "max_seq_length": 512, "batch_size": 1},
    {"optimizer": "muon", "optimizer_config": {"muon": {"momentum": 0.9}}, "report_to": "wandb,swanlab"},
    {"optimizer": "muon", "optimizer_config": {"muon": {"ns_steps": 6, "nesterov": False, "weight_decay": 0.1}}},
    {"optimizer": "adafactor", "optimizer_config": {"adafactor": {"relative_step": False, "beta_1": 0.9}}},
    {"optimizer": "adafactor", "optimizer_config": {"adafactor": {"eps": [1e-20, 1e-3], "warmup_init": True}}},
]


@pytest.mark.parametrize("old", RICH, ids=lambda old: ",".join(old) or "nothing")
@pytest.mark.parametrize("our_defaults", [False, True], ids=["their defaults", "our defaults"])
def test_the_command_composes_to_exactly_what_was_imported(tmp_path, compose, monkeypatch, old, our_defaults):
    monkeypatch.chdir(tmp_path)
    carried = imported(tmp_path, our_defaults, **old)
    flat = serialize.flatten(compose(carried))
    for name, value in carried.values.items():
        assert flat[name] == expected(name, value), name


def test_the_defaults_of_an_empty_config_are_imported(tmp_path, compose):
    found = compose(imported(tmp_path))
    assert (found.model.path, found.data.path, found.data.metric) == ("org/model", "my_data", None)
    assert found.data.mask_prompt is False
    assert (found.optimizer.name, found.optimizer.bias_correction) == ("adam", False)
    assert found.optimizer.learning_rate == 1e-5
    assert (found.train.iters, found.train.batch_size, found.train.eval_batches) == (1000, 4, 25)
    assert (found.lora.rank, found.lora.scale, found.lora.num_layers) == (8, 20.0, 16)
    assert found.checkpoint.result == "last"


def test_our_defaults_imports_only_what_is_set(tmp_path):
    assert imported(tmp_path, our_defaults=True, seed=3, iters=1000).overrides == [
        "data=folder",
        "model.path=org/model",
        "data.path=my_data",
        "seed=3",
    ]


def test_a_config_that_only_tests_is_told_that_the_command_trains(tmp_path):
    carried = imported(tmp_path, train=False, test=True)
    assert "runner test RUN" in reasons(carried)["test"]
    assert "the command below trains" in {line.key: line.note for line in carried.imported}["train"]


def test_micro_batches_become_updates(tmp_path, compose):
    carried = imported(tmp_path, iters=1003, grad_accumulation_steps=4, steps_per_report=10, steps_per_eval=200)
    found = compose(carried)
    assert (found.train.grad_accumulation, found.train.iters) == (4, 250)
    assert (found.train.report_every, found.train.eval_every, found.checkpoint.every) == (3, 50, 25)
    notes = {line.key: line.note for line in carried.imported}
    assert "1003 / 4" in notes["iters"] and "the last 3" in notes["iters"] and "rounded" in notes["steps_per_report"]


def test_numbers_without_a_dot_are_numbers_as_in_mlx_lms_own_loader(tmp_path, compose):
    path = tmp_path / "old.yaml"
    path.write_text("train: true\nlearning_rate: 3e-5\nlora_parameters: {rank: 16, scale: 2e1, dropout: 5e-2}\n")
    found = compose(import_config(read_config(path)))
    assert (found.optimizer.learning_rate, found.lora.scale, found.lora.dropout) == (3e-5, 20.0, 0.05)


@pytest.mark.parametrize(
    ("old", "key", "says"),
    [
        ({"fine_tune_type": "nothing"}, "fine_tune_type", "trains lora"),
        ({"optimizer": "rmsprop"}, "optimizer", "learning rate of its own"),
        (
            {"optimizer": "adafactor", "optimizer_config": {"adafactor": {"eps": [1e-30, 0.01]}}},
            "optimizer_config.adafactor.eps",
            "always 0.001",
        ),
        ({"report_to": "swanlab"}, "report_to", "not yet a logger"),
        ({"project_name": "p"}, "project_name", "hydra.run.dir"),
        ({"trust_remote_code": True}, "trust_remote_code", "reads the flag only"),
        ({"clear_cache_threshold": 10}, "clear_cache_threshold", "no effect in mlx-lm"),
        ({"hf_dataset": [{"path": "a/b"}, {"path": "c/d"}]}, "hf_dataset", "train.jsonl"),
        ({"test_batches": 7}, "test_batches", "runner test RUN"),
        ({"train": False}, "train", "trains nothing without it"),
        ({"itres": 7}, "itres", "Did you mean 'iters'?"),
        ({"save_every": 0}, "save_every", "1 or more"),
        ({"learning_rate": "fast"}, "learning_rate", "not a number"),
        ({"learning_rate": -1}, "learning_rate", "above 0"),
        ({"batch_size": 2.5}, "batch_size", "not a whole number"),
        ({"iters": True}, "iters", "not a number"),
        ({"model": "a${b}"}, "model", "meaning of its own"),
        ({"data": "a\nb"}, "data", "cannot be typed"),
        ({"model": "hf_" + "a1B2" * 8}, "model", "looks like a secret"),
        (
            {"optimizer": "sgd", "optimizer_config": {"sgd": {"dampening": 0.5}}},
            "optimizer_config.sgd.dampening",
            "no su",
        ),
        ({"lora_parameters": LORA | {"alpha": 16}}, "lora_parameters.alpha", "scale alone"),
        ({"lora_parameters": {"rank": 8}}, "lora_parameters.scale", "mlx-lm stops"),
        ({"lr_schedule": {"name": "join_schedules", "arguments": [1e-5, 0.5, 10]}}, "lr_schedule", "not there yet"),
        ({"lr_schedule": {"name": "step_decay", "arguments": [1e-5, 1.5, 10]}}, "lr_schedule", "at most 1"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5]}}, "lr_schedule", "other arguments"),
        (
            {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 9], "warmup": 2, "warmup_init": 1e-6}},
            "lr_schedule",
            "warmup_init",
        ),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_reason(tmp_path, compose, old, key, says):
    carried = imported(tmp_path, **old)
    assert says in reasons(carried)[key]
    compose(carried)


@pytest.mark.parametrize("our_defaults", [False, True])
def test_the_defaults_of_muon_there_are_imported(tmp_path, compose, our_defaults):
    found = compose(imported(tmp_path, our_defaults, optimizer="muon", learning_rate=1e-4)).optimizer
    assert (found.name, found.weight_decay, found.learning_rate) == ("muon", 0.0 if our_defaults else 0.01, 1e-4)
    assert (found.momentum, found.nesterov, found.ns_steps) == (0.95, True, 5)


def adafactor(tmp_path, compose, our_defaults=False, iters=1000, **options):
    old = {"optimizer": "adafactor", "learning_rate": 3e-4, "iters": iters, "optimizer_config": {"adafactor": options}}
    return compose(imported(tmp_path, our_defaults, **old))


def test_adafactor_ignores_the_learning_rate_there_unless_told_otherwise(tmp_path, compose):
    found = adafactor(tmp_path, compose)
    assert (found.optimizer.learning_rate, found.schedule.name) == (0.01, "constant")
    assert found.optimizer.scale_parameter is True
    assert adafactor(tmp_path, compose, relative_step=False).optimizer.learning_rate == 3e-4
    assert adafactor(tmp_path, compose, our_defaults=True).optimizer.learning_rate == 3e-4
    assert adafactor(tmp_path, compose, our_defaults=True, relative_step=True).optimizer.learning_rate == 0.01


@pytest.mark.parametrize("options", [{}, {"warmup_init": True}])
def test_the_rate_that_adafactor_computes_there_is_that_of_the_imported_schedule(tmp_path, compose, options):
    iters = 10_050 if options else 10_000
    found = adafactor(tmp_path, compose, iters=iters, **options)
    theirs = optim.Adafactor(scale_parameter=False, **options)
    for update in (1, 2, 5_000, 9_999, 10_000, 10_001, 10_050):
        if update <= iters:
            expected = float(theirs._compute_learning_rate(mx.array(update, mx.uint64), mx.array(1.0)))
            assert learning_rate(found, update) == pytest.approx(expected, rel=1e-5)


def test_a_schedule_that_is_not_there_leaves_its_first_rate(tmp_path, compose):
    old = {"lr_schedule": {"name": "join_schedules", "arguments": [3e-4, 0.5, 10]}, "learning_rate": 1.0}
    assert compose(imported(tmp_path, **old)).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(("layers", "here"), [(-1, -1), (0, -1), (-7, -1), (3, 3)])
def test_layers_below_one_mean_all_as_in_mlx_lm(tmp_path, compose, layers, here):
    assert compose(imported(tmp_path, num_layers=layers)).lora.num_layers == here


def test_flags_win_over_the_yaml(tmp_path, compose):
    path = written(tmp_path, iters=50, batch_size=2, train=False)
    words = ["python", "-m", "mlx_lm", "lora", "-c", str(path), "--iters=7", "--train", "--num-layers", "-1"]
    found = import_config(read_command(words))
    assert not found.skipped
    settings_ = compose(found)
    assert (settings_.train.iters, settings_.train.batch_size, settings_.lora.num_layers) == (7, 2, -1)


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("mlx_lm.lora --train", MLX_LM),
        ("mlx_lm lora --train", MLX_LM),
        ("python3 -m mlx_lm.lora --train", MLX_LM),
        ("HF_HUB_OFFLINE=1 /venv/bin/mlx_lm.lora --train", MLX_LM),
        ("python mlx_lm/lora.py --train", MLX_LM),
        ("python lora.py --train", EXAMPLES),
        ("python mlx-examples/lora/lora.py --train", EXAMPLES),
    ],
)
def test_the_program_is_found_in_the_command(command, program):
    assert read_command(command.split()).program is program
    assert read_command([command]).settings == {"train": True}


def test_mlx_examples_command_becomes_what_it_fixed_in_its_code(compose):
    words = "python lora.py --model m --train --lora-layers 4 --iters 600 -p hello --temp 0 --adapter-file a.npz"
    carried = import_config(read_command(words.split()))
    found = compose(carried)
    assert not carried.skipped
    assert found.lora.keys == ["self_attn.q_proj", "self_attn.v_proj"] and found.lora.num_layers == 4
    assert (found.data.keys.completion, found.data.chat_template, found.data.path) == ("text", False, "data/")
    assert (found.optimizer.name, found.optimizer.bias_correction) == ("adam", False)
    assert "no layer" in reasons(import_config(read_command(["lora.py", "--lora-layers", "-1"])))["lora_layers"]


def test_unknown_flags_and_several_machines_are_named():
    carried = import_config(read_command(["mlx.launch", "-n", "2", "mlx_lm.lora", "--train", "--lora-rank", "8"]))
    found = reasons(carried)
    assert "one process" in found["mlx.launch"] and "no such flag" in found["--lora-rank"]


def test_flags_and_defaults_are_those_of_the_mlx_lm_that_is_installed():
    lora = pytest.importorskip("mlx_lm.lora")
    theirs = {a.dest: a for a in lora.build_parser()._actions if a.dest != "help"}
    ours = {name: kind for name, kind in MLX_LM.flags.items() if name != "lora_layers"}
    assert set(theirs) - set(ours) == set()
    assert set(ours) - set(theirs) == set()
    for name, action in theirs.items():
        assert (ours[name] is bool) == isinstance(action, argparse._StoreTrueAction), name
    for name, value in MLX_LM.defaults.items():
        assert lora.CONFIG_DEFAULTS[name] == value, name
    known = {*MLX_LM.flags, *MLX_LM.yaml_only}
    assert set(lora.CONFIG_DEFAULTS) <= known


def test_the_choices_of_the_root_config_are_those_assumed():
    defaults = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]
    chosen = {k: v for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}
    assert {name: chosen[name] for name in GROUP_DEFAULTS} == GROUP_DEFAULTS


TEXT = st.text(st.sampled_from("ab1./~ '\"\\,=[]{}()$:#é-%*?!&|"), max_size=12)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3000),
    st.integers(),
    st.floats(),
    st.floats(1e-8, 1.0),
    TEXT,
    st.sampled_from(["1e-5", "adam", "sgd", "lora", "dora", "null", "???", "${x}", "hf_" + "a1B2" * 8]),
)
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
LORA_PARAMETERS = st.dictionaries(st.sampled_from(["rank", "scale", "dropout", "alpha", "keys", "x"]), ANY)
ADAM_AND_SGD = ["betas", "eps", "weight_decay", "bias_correction", "momentum", "nesterov", "dampening"]
MUON_AND_ADAFACTOR = ["ns_steps", "beta_1", "decay_rate", "relative_step", "warmup_init"]
OPTIMIZER_OPTIONS = st.dictionaries(st.sampled_from([*ADAM_AND_SGD, *MUON_AND_ADAFACTOR]), ANY)
SCHEDULES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["cosine_decay", "linear_schedule", "step_decay", "exponential_decay", "x"]),
        "arguments": st.lists(st.one_of(st.floats(0, 1), st.integers(0, 2000), ANY), max_size=4),
    },
    optional={"warmup": st.one_of(st.integers(0, 2000), ANY), "warmup_init": ANY},
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "lora_parameters": st.one_of(LORA_PARAMETERS, ANY),
        "optimizer": st.sampled_from(["adam", "adamw", "sgd", "muon", "adafactor"]),
        "optimizer_config": st.dictionaries(
            st.sampled_from(["adam", "adamw", "sgd", "muon", "adafactor"]), OPTIMIZER_OPTIONS
        ),
        "lr_schedule": st.one_of(SCHEDULES, ANY),
        "hf_dataset": ANY,
    },
)
WILD = st.dictionaries(st.sampled_from([*MLX_LM.flags, "prompt_feature", "text_feature", "itres"]), ANY)
OLD = st.builds(lambda wild, plausible: wild | plausible, WILD, PLAUSIBLE)


@settings(max_examples=25, deadline=None)
@given(old=OLD, our_defaults=st.booleans())
def test_whatever_an_old_config_says_the_command_composes_to_what_was_imported(
    tmp_path_factory, compose, old, our_defaults
):
    path = tmp_path_factory.mktemp("any") / "old.yaml"
    path.write_text(yaml.safe_dump(old, allow_unicode=True))
    found = read_config(path)
    carried = import_config(found, our_defaults)
    flat = serialize.flatten(compose(carried))
    for name, value in carried.values.items():
        assert flat[name] == expected(name, value), name
    told = {line.key.partition(".")[0] for line in carried.imported} | {
        left.key.partition(".")[0] for left in carried.skipped
    }
    empty = ("lora_parameters", "optimizer_config", "report_to")  # an empty one says nothing
    for key, value in found.settings.items():
        assert key in told or (key in empty and (not value or isinstance(value, typing.Mapping))), key


def test_every_flag_has_its_place_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs/migrating.md").read_text()
    there, examples = page.split("## mlx-examples' lora.py")
    for key in (*MLX_LM.flags, *MLX_LM.yaml_only):
        assert f"`{key}" in there or key == "lora_layers", key
    for flag in EXAMPLES.flags:
        assert f"`--{flag.replace('_', '-')}`" in examples, flag


def test_kinds_of_fine_tuning_and_layers_by_their_full_names_are_carried_over(tmp_path):
    keys = ["self_attn.q_proj", "lm_head", "model.embed_tokens", "model.layers.3.mlp.up_proj"]
    found = imported(tmp_path, fine_tune_type="dora", lora_parameters=LORA | {"keys": keys}).values
    assert found["lora.type"] == "dora"
    assert found["lora.keys"] == [*keys[:3], "layers.3.mlp.up_proj"]
    full = imported(tmp_path, fine_tune_type="full", lora_parameters=LORA)
    assert full.values["lora.type"] == "full" and not any("lora.rank" in name for name in full.values)
