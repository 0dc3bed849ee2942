"""A stored config is read without Hydra; a verb may change what it uses, and nothing that made the run what it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.commands.stored_settings import read_settings
from runner.common.errors import ConfigError
from runner.config import schema, serialize
from runner.runs.directory import RunDirectory


@pytest.fixture
def stored(tiny: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`stored(**{"data.path": "${oc.env:X}"})`: a run directory with this in its config.yaml."""

    def write(**changes: Any) -> Path:
        data = serialize.to_dict(tiny())
        for name, value in changes.items():
            section, _, key = name.rpartition(".")
            (data[section] if section else data)[key] = value
        RunDirectory(tmp_path).write_config(data)
        return tmp_path

    return write


def test_without_overrides_the_stored_config_is_returned(stored: Callable[..., Path], tiny: Callable) -> None:
    settings = read_settings(stored())
    assert settings.config == tiny()
    assert settings.trained_model == tiny().model
    assert not settings.typed


def test_an_override_has_the_type_of_its_setting(stored: Callable[..., Path], tmp_path: Path) -> None:
    overrides = [
        "data.max_length=64",
        "data.mask_prompt=false",
        "data.keys.text=1",
        "data.metric=null",
        "model.revision=7",
    ]
    settings = read_settings(
        stored(), [*overrides, f"data.path={tmp_path}", "train.batch_size=2", "model.quantize.bits=4"]
    )
    data = settings.config.data
    assert (data.max_length, data.mask_prompt, data.keys.text, data.metric) == (64, False, "1", None)
    assert (settings.config.model.revision, settings.config.model.quantize.bits) == ("7", 4)
    assert data.path == str(tmp_path)
    assert settings.config.train.batch_size == 2


def test_the_trained_model_keeps_its_dtype_and_has_the_typed_path(stored: Callable[..., Path]) -> None:
    settings = read_settings(stored(), ["model.dtype=bfloat16", "model.path=builtin:smollm2_135m"])
    assert settings.config.model.dtype == "bfloat16"
    assert (settings.trained_model.dtype, settings.trained_model.path) == ("auto", "builtin:smollm2_135m")


def test_a_data_group_replaces_the_section(stored: Callable[..., Path]) -> None:
    settings = read_settings(stored(), ["data.max_new_tokens=5", "data=text_to_sql"])
    assert settings.config.data == schema.DataConfig(
        path="builtin:text_to_sql", metric="execution_accuracy", max_new_tokens=5
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=4", "lora.rank belongs to how the run was trained"),
        ("seed=1", "seed belongs to how"),
        ("train.iters=1", "train.iters belongs to how"),
        ("data.pth=x", "no setting 'data.pth'. Did you mean 'data.path'"),
        ("model=tiny", "only data=NAME"),
        ("data=tni", "Did you mean 'tiny'"),
        ("data=../../pyproject", "is not a choice"),
        ("hello", "'hello' is not a setting"),
        ("+data.path=x", "is not a setting"),
        ("data.max_length=long", "data.max_length has to be int"),
        ("data.max_length=0", "must be 2 or more"),
        ("model.dtype=int8", "must be one of auto, native, float32"),
        ("train.batch_size=[", "cannot be read"),
    ],
)
def test_other_overrides_are_refused_with_a_message(stored: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(stored(), [override])


def test_references_to_the_environment_are_resolved(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_ROOT", str(tmp_path))
    monkeypatch.setenv("MY_SIZE", "3")
    monkeypatch.delenv("MY_OTHER", raising=False)
    run = stored(
        **{
            "data.path": "${oc.env:MY_ROOT}",
            "model.revision": "${oc.env:MY_OTHER,null}",
            "train.batch_size": "${oc.env:MY_SIZE}",
            "data.format": "${oc.env:MY_OTHER,'text'}",
            "loggers": {"remote": {"key": "${oc.env:MY_OTHER}"}},
        }
    )
    settings = read_settings(run).config
    assert (settings.data.path, settings.train.batch_size) == (str(tmp_path), 3)
    assert (settings.model.revision, settings.data.format) == (None, "text")


def test_an_unset_variable_is_named(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_OTHER", raising=False)
    with pytest.raises(ConfigError, match=r"data\.path is .*environment variable MY_OTHER is not set"):
        read_settings(stored(**{"data.path": "${oc.env:MY_OTHER}/data"}))
    with pytest.raises(ConfigError, match=r"data\.path is .*only .* can be resolved"):
        read_settings(stored(**{"data.path": "${model.path}"}))


def test_neither_hydra_nor_mlx_is_imported(stored: Callable[..., Path]) -> None:
    code = (
        "import sys, pathlib; from runner.cli.commands import stored_settings, adapter_source, test, generate, export; "
        f"stored_settings.read_settings(pathlib.Path({str(stored())!r})); "
        "assert not {'mlx', 'mlx.core', 'hydra', 'omegaconf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[3])})
