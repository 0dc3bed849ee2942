"""Filters and orders of listings: what they accept, and what they refuse with which advice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.errors import ConfigError
from runner.config.labels import Labels
from runner.reports import fields
from runner.reports.fields import FIELDS, find_field
from runner.reports.run_filter import looks_like_filter, parse_filter, parse_sort, tag_filters
from runner.runs.inspect import RunInfo


def make(**fields):
    settings = {
        "lora.rank": 8,
        "model.path": "/models/Qwen3-0.6B",
        "train.epochs": None,
        "optimizer.name": "lion",
        "vars": {"size": 3},
        "optimizer.betas": [0.9, 0.999],
    }
    settings |= fields.pop("settings", {})
    return RunInfo(
        path=Path(fields.pop("path", "outputs/a")), state=fields.pop("state", "finished"), settings=settings, **fields
    )


NOW = 1_800_000_000.0
RUN = make(best_loss=0.4, updated=NOW - 7200, size_bytes=2_000_000, labels=Labels("first try", ("sql", "old")))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The age of RUN does not depend on when the tests run."""
    monkeypatch.setattr(fields, "time", SimpleNamespace(time=lambda: NOW))


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("valid_loss<0.5", True),
        ("valid_loss < 0.4", False),
        ("valid_loss<=.4", True),
        ("best>=4e-1", True),
        ("test_loss<9", False),  # it has none
        ("test_loss!=9", True),
        ("test_loss=null", True),
        ("lora.rank>=8", True),
        ("rank=8.0", True),
        ("rank!=8", False),
        ("optimizer=lion", True),  # as on the command line
        ("method=dpo,sft", True),
        ("optimizer.learning_rate=3e-5", True),  # the default, with its optimizer, of a setting that was not stored
        ("schedule.warmup=0", True),  # the default of one that was not stored
        ("train.mask_prompt=true", None),
        ("mask_prompt=true", True),
        ("train.epochs=null", True),
        ("model.path~qwen", True),
        ("model.path!~QWEN", False),
        ("state=finished", True),
        ("state!=finished", False),
        ("tag=sql", True),
        ("tag=sq", False),
        ("tags~sq", True),
        ("tag!~keep", True),
        ("name~TRY", True),
        ("name=first try", True),
        ("note=null", True),
        ("age<3h", True),
        ("age>1d", False),
        ("age>60s", True),
        ("size>1.5MB", True),
        ("size<1kb", False),
        ("vars.size=3", True),
        ("betas=[0.9,0.999]", True),
        ("rank=4,8,16", True),
        ("rank=4, 16", False),
        ("rank!=4,16", True),
        ("rank!=4,8", False),
        ("state=failed,finished", True),
        ("valid_loss=0.3,0.4", True),
    ],
)
def test_a_filter_accepts_or_not(text, accepted):
    if accepted is None:
        with pytest.raises(ConfigError, match="Did you mean 'data.mask_prompt'"):
            parse_filter(text, [RUN])
    else:
        assert parse_filter(text, [RUN]).accepts(RUN) is accepted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("valid_los<1", "valid_los is neither a metric nor a setting. Did you mean 'valid_loss'"),
        ("lora.rnk=1", "'lora.rnk=1': lora.rnk is neither a metric nor a setting. Did you mean 'lora.rank'"),
        ("state=failed,finshed", "state=finshed: a run is"),
        ("valid_loss=0.3,low", "valid_loss is compared with a number"),
        ("state=finshed", "Did you mean 'finished'"),
        ("state<finished", "state is a text: compare it with ="),
        ("valid_loss<low", "valid_loss is compared with a number"),
        ("lora.rank=8,x", "lora.rank is compared with a number"),
        ("warmup!=x", "schedule.warmup is compared with a number"),
        ("age<3y", "such as 2h or 30d"),
        ("size>big", "such as 500MB"),
        ("valid_loss<", "has no value"),
        ("__import__('os')", "is no filter"),
    ],
)
def test_a_wrong_filter_is_refused_with_advice(text, reason):
    with pytest.raises(ConfigError) as refused:
        parse_filter(text)
    assert reason in str(refused.value)


def test_all_tags_are_required():
    assert all(found.accepts(RUN) for found in tag_filters(["sql", "old"]))
    assert not all(found.accepts(RUN) for found in tag_filters(["sql", "new"]))


def test_what_is_sorted_by_comes_first_and_runs_without_it_last():
    runs = [make(path=str(loss), best_loss=loss, size_bytes=int(10 * (loss or 0))) for loss in (0.5, None, 0.3, 0.9)]

    def order(text):
        return [run.best_loss for run in sorted(runs, key=lambda run: parse_sort(text).key([run]))]

    assert order("valid_loss") == order("best") == [0.3, 0.5, 0.9, None]
    assert order("-valid_loss") == [0.9, 0.5, 0.3, None]
    assert order("size") == [0.9, 0.5, 0.3, None] and order("-size") == [None, 0.3, 0.5, 0.9]
    assert parse_sort("-valid_loss").key(runs)[1].value[1] == 0.9 and parse_sort("valid_loss").key(runs)[1][1] == 0.3
    mixed = [make(settings={"lora.rank": rank}) for rank in (16, "x", 4)]
    assert [run.settings["lora.rank"] for run in sorted(mixed, key=lambda run: parse_sort("rank").key([run]))] == [
        4,
        16,
        "x",
    ]
    with pytest.raises(ConfigError, match="--sort learning_rat: .* Did you mean 'learning_rate'"):
        parse_sort("learning_rat")


@given(st.text(max_size=40))
def test_no_text_breaks_the_parser(text):
    """Whatever is typed is a filter that answers, or refused with a sentence."""
    for typed in (text, f"valid_loss{text}", f"lora.rank>={text}", f"tag={text}"):
        if looks_like_filter(typed):
            try:
                assert parse_filter(typed, [RUN]).accepts(RUN) in (True, False)
            except ConfigError as refused:
                assert str(refused)


def test_every_field_has_a_value_and_a_text_for_an_empty_run():
    empty = RunInfo(path=Path("x"), state="unknown")
    for name in [*FIELDS, "lora.rank", "loggers"]:
        assert isinstance(find_field(name).text(empty), str)
