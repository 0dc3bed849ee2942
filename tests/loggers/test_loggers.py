"""Loggers are built from the config alone, so that a wrong name or option is refused before a run begins."""

from __future__ import annotations

import pytest

from runner import loggers
from runner.common.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"csvv": {}}, "Did you mean 'csv'"),
        ({"csv": {"fil": "x.csv"}}, r"loggers\.csv\.fil is not an option .* Did you mean 'loggers\.csv\.file'"),
        ({"csv": {"file": "config.yaml"}}, r"ends in \.csv"),
        ({"csv": {"file": "../x.csv"}}, "plain file name"),
        ({"csv": {}}, "file"),
        ({"csv": "x"}, "must be a section"),
        ({"os:system": {"command": "touch ran"}}, "is not a logger"),
    ],
)
def test_a_wrong_logger_or_option_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        loggers.build(settings)


def test_building_a_logger_opens_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(loggers.build({"csv": {"file": "metrics.csv"}})) == 1
    assert list(tmp_path.iterdir()) == []
