"""Loggers are built from the config alone, so that a wrong name or option is refused before a run begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runner import loggers
from runner.common.errors import ConfigError
from runner.loggers.csv import CsvLogger


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"csvv": {}}, "Did you mean 'csv'"),
        ({"csv": {"fil": "x.csv"}}, r"loggers\.csv\.fil is not an option .* Did you mean 'loggers\.csv\.file'"),
        ({"csv": {"file": "config.yaml"}}, r"ends in \.csv"),
        ({"csv": {"file": "../x.csv"}}, "plain file name"),
        ({"csv": {}}, "file"),
        ({"csv": {"file": 7}}, "must be a text"),
        ({"csv": "x"}, "must be a section"),
        ({"mlflow": {"tracking_uri": "mlruns", "experiment": "a"}}, r"such as sqlite:///mlflow\.db"),
        ({"mlflow": {"tracking_uri": "https://me:secret@h", "experiment": "a"}}, "^((?!secret).)*MLFLOW_TRACKING_PASS"),
        ({"wandb": {"project": "a", "entity": None, "mode": "onlin"}}, "must be one of offline, online"),
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


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_such_package").mkdir()  # as W&B writes into a folder "wandb"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(CsvLogger, "REQUIRES", ("no_such_package",), raising=False)
    with pytest.raises(ConfigError, match=r"needs no_such_package, .* pip install 'mlx-runner\[csv\]'"):
        loggers.build({"csv": {"file": "metrics.csv"}})


def test_no_library_is_imported_unless_its_logger_is_opened():
    """Each in a new process, where nothing else has imported it."""
    code = (
        "import sys; from runner import loggers;"
        "loggers.build({'mlflow': {'tracking_uri': 'sqlite:///a.db', 'experiment': 'a'}, 'tensorboard': {},"
        " 'trackio': {'dir': 'a', 'project': 'a'}, 'wandb': {'project': 'a', 'entity': None, 'mode': 'offline'}});"
        "print(sorted({'mlflow', 'tensorboardX', 'trackio', 'wandb', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_relative_locations_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "csv": {"file": "metrics.csv"},
        "mlflow": {"tracking_uri": "sqlite:///outputs/mlflow.db", "experiment": "a"},
        "trackio": {"dir": "outputs/trackio", "project": "a"},
    }
    for _ in range(2):  # what is absolute stays
        loggers.make_locations_absolute(settings)
        assert settings["csv"]["file"] == "metrics.csv"
        assert settings["mlflow"]["tracking_uri"] == f"sqlite:///{tmp_path}/outputs/mlflow.db"
        assert settings["trackio"]["dir"] == f"{tmp_path}/outputs/trackio"
    server = {"mlflow": {"tracking_uri": "https://example.org:5000/a", "experiment": "a"}}
    loggers.make_locations_absolute(server)
    assert server["mlflow"]["tracking_uri"] == "https://example.org:5000/a"
