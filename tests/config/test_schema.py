"""The schema: every value is checked, every setting is documented, and rules of resume are pure functions."""

from __future__ import annotations

import math

import pytest

from runner.common.errors import ConfigError
from runner.config import resume_policy, schema, serialize, validation
from runner.config.schema import Config
from runner.config.setting import Setting


def test_the_default_of_every_setting_is_valid_by_its_metadata():
    defaults = serialize.default_settings()
    for name, metadata in schema.metadata().items():
        for default in (defaults[name], *metadata.defaults_by.values()):
            assert default in (None, schema.MISSING) or metadata.accepts(default), name
    assert set(schema.metadata()) == set(defaults)


@pytest.mark.parametrize("group", ["optimizer", "schedule", "method"])
def test_options_by_choice_name_choices_of_their_group(group):
    choices = schema.metadata()[f"{group}.name"].choices
    for name, metadata in schema.metadata().items():
        if metadata.defaults_by:
            assert name.split(".")[0] in ("optimizer", "schedule", "method")
            if name.startswith(group):
                assert set(metadata.defaults_by) <= set(choices), name
    assert schema.choice_options("optimizer", "adamw")["weight_decay"] == 0.01
    assert schema.choice_options("optimizer", "sgd")["weight_decay"] == 0.0
    assert "weight_decay" not in schema.choice_options("optimizer", "adam")
    assert schema.metadata()["optimizer.learning_rate"].defaults_by.keys() == set(
        schema.metadata()["optimizer.name"].choices
    )


@pytest.mark.parametrize(
    ("metadata", "valid", "invalid", "requirement"),
    [
        (Setting(at_least=1), [1, 10**9], [0, -1], "1 or more"),
        (Setting(above=0), [1e-9], [0, 0.0, math.nan], "above 0"),
        (Setting(below=0), [-0.8], [0, 0.8, math.nan], "below 0"),
        (Setting(above=0, at_most=1), [0.5, 1], [0, 1.5], "above 0 and at most 1"),
        (Setting(at_least=1, at_most=16_384), [1, 16_384], [0, 16_385], "from 1 to 16,384"),
        (Setting(at_least=0, below=1), [0, 0.99], [1, -0.1], "from 0 to below 1"),
        (Setting(at_least=1, minus_one_is_all=True), [-1, 1], [0, -2], "-1 (all), or 1 or more"),
        (Setting(at_least=0, below=1, length=2), [[0.9, 0.99]], [[0.9], [0.9, 1.0]], "2 numbers from 0 to below 1"),
        (Setting(choices=("a", "b")), ["a"], ["c"], "one of a, b"),
        (
            Setting(choices=("a", "b"), several=True),
            ["a", ["b"], ["a", "b"]],
            ["c", [], ["a", "c"], [["a"]], {"a": 1}],
            "one of a, b, or a list of them",
        ),
        (Setting(), [None, 3, "x", {}], [], ""),
    ],
)
def test_bounds_and_choices_of_the_metadata(metadata, valid, invalid, requirement):
    assert all(metadata.accepts(value) for value in valid) and not any(metadata.accepts(value) for value in invalid)
    assert metadata.requirement() == requirement


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora.rank", 0),
        ("lora.num_layers", 0),
        ("lora.num_layers", -2),
        ("lora.dropout", 1.0),
        ("lora.type", "qlora"),
        ("lora.init", "olora"),
        ("lora.keys", ["q proj"]),
        ("lora.modules_to_save", [""]),
        ("lora.rank_pattern", ["q_proj"]),
        ("lora.rank_pattern", ["q_proj:0"]),
        ("lora.rank_pattern", [":8"]),
        ("lora.b_lr_ratio", 0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", math.nan),
        ("optimizer.betas", [0.9]),
        ("train.iters", 0),
        ("train.grad_clip", -1.0),
        ("train.batch_size", 0),
        ("data.on_too_long", "cut"),
        ("data.max_length", 1),
        ("model.quantize.bits", 7),
        ("model.dtype", "float64"),
        ("checkpoint.dir", "../elsewhere"),
        ("checkpoint.dir", "a/b"),
        ("checkpoint.keep_last", -1),
        ("schedule.warmup", 1000),
        ("seed", -1),
        ("data.metric_rows", 5),
        ("lora.rslora", True),
        ("optimizer.nesterov", True),
        ("schedule.step_size", 0),
        ("schedule.gamma", 1.5),
        ("optimizer.decay_rate", 0.8),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(tiny, name, value):
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        tiny(**{name: value, "schedule.name": "constant"} | ({"train.iters": 1000} if name != "train.iters" else {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "loss"}, "objective.metric=loss is invalid: must be one of valid_loss, "),
        ({"metric": ["valid_loss", "valid_loss"]}, "names a metric twice"),
        ({"metric": ["valid_loss", "test_loss"]}, "objective.metric=test_loss needs train.test=true"),
        ({"metric": "score"}, "objective.metric=score needs data.metric_rows"),
        ({"metric": "reward_accuracy"}, "not measured by method=sft: dpo, ipo, orpo, simpo do"),
        ({"metric": ["valid_loss", "peak_memory_gb"], "direction": "minimize"}, "one direction for each metric of "),
        ({"direction": ["minimize", "minimize"]}, "one direction for each metric of "),
        ({"direction": "up"}, "objective.direction=up is invalid: must be one of minimize, maximize"),
    ],
)
def test_an_objective_names_metrics_that_are_measured_with_a_direction_each(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**{f"objective.{name}": value for name, value in changes.items()})
    valid = {"objective.metric": ["valid_loss", "tokens_per_second"], "objective.direction": ["minimize", "maximize"]}
    assert tiny(**valid).objective.metric == valid["objective.metric"]


def test_all_problems_are_told_at_once(tiny):
    with pytest.raises(ConfigError) as refused:
        tiny(**{"lora.rank": 0, "train.iters": 0})
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.type": "full", "lora.scale": 2.0}, "lora.scale=2.0 has no effect with lora.type=full"),
        ({"lora.type": "full", "lora.b_lr_ratio": 4.0}, "lora.b_lr_ratio=4.0 has no effect"),
        ({"lora.type": "full", "lora.init": "pissa"}, "lora.init=pissa has no effect"),
        ({"lora.type": "dora", "lora.init": "pissa"}, "lora.init=pissa and lora.type=dora exclude each other"),
        ({"lora.init": "pissa", "adapter": "old"}, "lora.init=pissa and adapter exclude each other"),
        ({"lora.init": "pissa", "lora.scale": -1.0}, "lora.init=pissa needs a factor above 0"),
    ],
)
def test_what_a_kind_of_adapter_does_not_use_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)
    full = tiny(**{"lora.type": "full"})
    validation.validate(full)  # as it is stored
    assert full.lora.scale is None


def test_exactly_one_of_scale_and_alpha(tiny):
    with pytest.raises(ConfigError, match="exactly one"):
        tiny(**{"lora.scale": 2.0, "lora.alpha": 16.0})
    assert validation.lora_scale(tiny().lora) == schema.DEFAULT_LORA_SCALE == tiny().lora.scale
    assert validation.lora_scale(tiny(**{"lora.alpha": 16.0, "lora.rank": 4}).lora) == 4.0
    assert validation.lora_scale(tiny(**{"lora.alpha": 16.0, "lora.rank": 4, "lora.rslora": True}).lora) == 8.0


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [("adamw", "momentum", 0.9), ("adam", "weight_decay", 0.1), ("sgd", "betas", [0.9, 0.99]), ("sgd", "eps", 1e-8)],
)
def test_an_option_that_the_optimizer_does_not_use_is_refused(tiny, group, option, value):
    with pytest.raises(ConfigError, match=f"optimizer.{option} is not used by optimizer={group}"):
        tiny(**{"optimizer.name": group, f"optimizer.{option}": value})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer.name": "muon", "optimizer.nesterov": True}, None),
        ({"optimizer.name": "muon", "optimizer.momentum": 0.0, "optimizer.nesterov": True}, "nesterov=true needs"),
        ({"optimizer.name": "muon", "optimizer.momentum": 1.0}, "momentum=1.0 is invalid with optimizer=muon"),
        ({"schedule.name": "cosine_with_restarts", "schedule.cycles": 12}, None),
        ({"schedule.name": "cosine_with_restarts", "schedule.cycles": 13}, "cycles=13 is more than the 12 updates"),
        ({"schedule.name": "cosine_with_restarts", "schedule.cycles": 13, "train.epochs": 1.0}, None),
        ({"schedule.name": "wsd", "schedule.decay": 11.0}, None),
        ({"schedule.name": "wsd", "schedule.decay": 12.0}, "decay=12 leaves no update at the peak: there are 12"),
        ({"schedule.name": "wsd", "schedule.decay": 0.9, "schedule.warmup": 2}, "decay=0.9 leaves no update"),
        ({"schedule.name": "wsd", "schedule.decay": 2.5}, "decay=2.5 is invalid: must be below 1, or a whole number"),
    ],
)
def test_rules_on_optimizers_and_schedules(tiny, changes, problem):
    if problem is None:
        tiny(**changes)
        return
    with pytest.raises(ConfigError, match=problem):
        tiny(**changes)


def test_an_option_that_the_schedule_does_not_use_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"schedule.end is not used by schedule=constant"):
        tiny(**{"schedule.end": 1e-6})


def test_an_exponential_schedule_needs_an_end_above_zero(tiny):
    assert tiny(**{"schedule.name": "exponential"}).schedule.end == 1e-6
    with pytest.raises(ConfigError, match=r"schedule\.end=0\.0 is invalid with schedule=exponential: must be above 0"):
        tiny(**{"schedule.name": "exponential", "schedule.end": 0.0})


def test_the_stored_form_reads_back_as_the_same_config(tiny):
    settings = tiny(**{"lora.keys": ["self_attn.q_proj"], "loggers": {"csv": {"file": "m.csv"}}})
    assert serialize.from_dict(serialize.to_dict(settings), "x") == settings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora": {"rnk": 3}}, "lora.rnk.*Did you mean 'rank'"),
        ({"lora": {"rank": "8"}}, "lora.rank has to be int"),
        ({"lora": 3}, "lora has to hold settings"),
        ({"train": {"grad_checkpoint": 1}}, "train.grad_checkpoint has to be bool"),
        ({"lora": {"rank": True}}, "lora.rank has to be int"),
    ],
)
def test_a_stored_config_of_wrong_shape_is_refused_with_its_file(change, says):
    with pytest.raises(ConfigError, match=f"stored.yaml: .*{says}"):
        serialize.from_dict(change, "stored.yaml")


def test_secrets_are_refused_by_name_and_never_shown():
    token = "hf_" + "a1B2" * 8
    for data in ({"model": {"path": token}}, {"loggers": {"x": {"k": ["a", token]}}}):
        with pytest.raises(ConfigError) as refused:
            validation.refuse_secrets(data)
        assert token not in str(refused.value)
    validation.refuse_secrets(serialize.to_dict(Config()))


def test_the_frozen_fingerprint_of_a_config_stays_what_earlier_versions_stored_in_checkpoints(tiny):
    """Renaming a free setting does not change it. A new frozen setting is `added_later`, so that it does not."""
    settings = tiny(**{"data.max_length": 64, "lora.rank": 4, "data.window": None})
    assert resume_policy.frozen_fingerprint(settings) == (
        "78bf03087bd116e40c434d9b08c1fa30114ec9cd3723cd26137d96cdde91069c"
    )


def test_frozen_and_free_settings_together_are_all_settings():
    free = {n for n in serialize.default_settings() if resume_policy.is_free_on_resume(n)}
    frozen = set(serialize.default_settings()) - free
    assert {"seed", "lora.rank", "optimizer.learning_rate", "train.batch_size", "train.grad_accumulation"} <= frozen
    assert {"train.iters", "train.eval_every", "checkpoint.every", "loggers", "model.path", "data.path"} <= free


@pytest.mark.parametrize(
    ("bits", "group_size", "mode", "problem"),
    [
        (4, 32, "mxfp4", None),
        (8, 32, "mxfp8", None),
        (4, 16, "nvfp4", None),
        (4, 64, "affine", None),
        (None, 64, "affine", None),
        (4, 64, "mxfp4", "model.quantize.mode=mxfp4 needs model.quantize.bits=4 model.quantize.group_size=32"),
        (None, 16, "nvfp4", "model.quantize.mode=nvfp4 needs model.quantize.bits=4 model.quantize.group_size=16"),
        (4, 16, "affine", "group_size=16 is invalid with model.quantize.mode=affine: must be one of 32, 64, 128"),
        (4, 32, "mxfp", "Did you mean 'mxfp"),
    ],
)
def test_each_mode_of_quantization_has_its_bits_and_group_sizes(
    bits: int | None, group_size: int, mode: str, problem: str | None, tiny
) -> None:
    changes = {"model.quantize.bits": bits, "model.quantize.group_size": group_size, "model.quantize.mode": mode}
    if problem is None:
        tiny(**changes)
        return
    with pytest.raises(ConfigError, match=problem):
        tiny(**changes)
