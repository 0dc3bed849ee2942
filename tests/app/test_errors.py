"""Exceptions of Hydra, OmegaConf and YAML become one sentence; anything else is a failure, not a config error."""

from __future__ import annotations

import pytest
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf

from runner.app.errors import translate_error
from runner.common.errors import ConfigError, RunnerError, StorageError


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def test_our_own_error_is_found_in_the_chain_and_returned_as_it_is():
    ours = ConfigError("seed is invalid.")
    assert translate_error(ours) is ours
    assert translate_error(caused(ConfigCompositionException("wrapped"), ours)) is ours


def test_an_override_that_cannot_be_parsed_names_the_override():
    error = OverrideParseException(override="a=[1", message="mismatched input\nat 3")
    explained = translate_error(error)
    assert isinstance(explained, ConfigError)
    assert str(explained).startswith("'a=[1' cannot be read: mismatched input.")


def test_an_unknown_setting_gets_the_nearest_name():
    config = OmegaConf.create({"lora": {"rank": 1}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(Exception) as raised:
        OmegaConf.update(config, "lora.rnk", 2)
    assert "There is no setting 'lora.rnk'. Did you mean 'lora.rank'?" in str(translate_error(raised.value))


def test_a_disk_error_is_a_storage_error_and_any_other_error_a_failure():
    full = translate_error(OSError(28, "No space left on device", "/full"))
    assert isinstance(full, StorageError) and "/full: No space left" in str(full)
    other = translate_error(ZeroDivisionError("division by zero"))
    assert type(other) is RunnerError and "RUNNER_TRACEBACK=1" in str(other)


@pytest.mark.parametrize(
    "name, message",
    [
        ("samplr", "is no option of the sweeper. Did you mean 'sampler'?"),
        ("trials", "is an option of a search, and a grid has none: type hydra/sweeper=search too"),
    ],
)
def test_an_option_that_the_sweeper_does_not_have(name, message):
    config = OmegaConf.create({"hydra": {"sweeper": {"params": {}}}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(Exception) as raised:
        OmegaConf.update(config, f"hydra.sweeper.{name}", 1)
    assert f"hydra.sweeper.{name} {message}" in str(translate_error(raised.value))
