"""A template that writes today's date: a run keeps the date of its first start, whenever it is resumed."""

from __future__ import annotations

import json
from datetime import date

import pytest
import yaml

from runner.common.errors import ConfigError
from runner.training import template_date

TEMPLATE = (
    "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def dated(tiny, tmp_path):
    """Settings of a run on conversations whose template writes the date."""
    (tmp_path / "dated.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}, as you say"}]}
        for n in range(8)
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **changes: tiny(
        **{"data.path": f"{tmp_path}/data", "data.template": f"{tmp_path}/dated.jinja"} | changes
    )


@pytest.fixture
def on_day(monkeypatch):
    return lambda day: monkeypatch.setattr(template_date, "today", lambda: date.fromisoformat(day))


def stored_date(run):
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["template_date"]


def test_a_run_that_is_resumed_the_next_day_ends_equal(dated, train, on_day, tmp_path, assert_equal_runs):
    on_day("2026-11-29")
    whole = train(dated(), tmp_path / "whole")
    run = train(dated(), tmp_path / "run", stop_at=5)
    assert stored_date(run) == "2026-11-29"
    on_day("2026-11-30")
    with pytest.raises(ConfigError, match="the training data changed"):
        train(dated(**{"data.template_date": "2026-11-30"}), run, resume=run)
    train(dated(**{"data.template_date": stored_date(run)}), run, resume=run)
    assert_equal_runs(whole, run)
    assert stored_date(run) == "2026-11-29"


def test_a_run_without_a_stored_date_has_that_of_its_first_start(dated, train, on_day, tmp_path):
    run = train(dated(), tmp_path / "run", stop_at=5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["data"]["template_date"]  # as earlier versions wrote it
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    on_day("2035-01-01")
    train(dated(), run, resume=run)
    assert stored_date(run) == date.today().isoformat()
