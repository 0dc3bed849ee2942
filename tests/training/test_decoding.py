"""Greedy answers equal those of stock mlx-lm on every architecture, in batches only where these equal one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from tiny_models import write_model

from runner.common.errors import ModelError
from runner.config.schema import ModelConfig
from runner.models.load import BaseModel, load_base_model
from runner.training import decoding
from runner.training.methods.grpo import KeyedSampler

PROMPTS = [[1, *((7 * i + 3 * j * j + 11) % 300 + 3 for j in range(n)), 200] for i, n in enumerate((5, 9, 40, 21, 14))]
"""Longer and shorter than the windows of gpt_oss (16) and llama4 (32)."""


def load(folder: Path) -> BaseModel:
    return load_base_model(ModelConfig(path=str(folder)))


def decode(base: BaseModel, log: Callable[[str], None], *, before_step: Callable[[], None] = lambda: None) -> list:
    return decoding.decode(base, PROMPTS, 8, before_step=before_step, log=log)


def stock_answers(folder: Path) -> list[list[int]]:
    model, tokenizer = mlx_lm.load(str(folder))
    answers = [[r.token for r in mlx_lm.stream_generate(model, tokenizer, p, max_tokens=8)] for p in PROMPTS]
    return [ids[:-1] if ids[-1] in tokenizer.eos_token_ids else ids for ids in answers]


@pytest.mark.parametrize(
    ("family", "in_batches"),
    [
        ("llama", True),
        ("gpt_oss", True),
        ("qwen3_moe", True),
        ("mamba", False),
        ("gemma2", False),
        ("llama4", False),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("qwen3", True), ("deepseek_v3", True), ("longcat_flash", True), ("kimi_linear", True))
        ),
    ],
)
def test_answers_equal_those_of_stock_mlx_lm(tmp_path: Path, cache: Path, family: str, in_batches: bool) -> None:
    folder = write_model(tmp_path / "model", family)
    base, log = load(folder), []
    assert decode(base, log.append) == stock_answers(folder)
    assert [line.startswith("answers are generated one at a time:") for line in log] == [True] * (not in_batches)


def test_prompts_of_one_token_do_not_hide_that_batches_are_wrong(tmp_path: Path, cache: Path) -> None:
    base, log = load(write_model(tmp_path / "model", "mamba")), []
    decoding.decode(base, [[90], *PROMPTS], 8, before_step=lambda: None, log=log.append)
    assert "batches of this model give other answers" in log[0]


def test_batches_of_a_recurrent_model_would_be_wrong(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(write_model(tmp_path / "model", "mamba"))
    alone, log = decode(base, print), []
    monkeypatch.setattr(decoding, "why_not_in_batches", lambda *_: None)
    assert decode(base, log.append) != alone
    assert log == []  # they were generated in batches


def test_the_test_of_batches_is_made_once_for_a_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tests = load(write_model(tmp_path / "model", "llama")), []
    difference = decoding._batch_difference
    monkeypatch.setattr(decoding, "_batch_difference", lambda *a: tests.append(a) or difference(*a))
    assert decode(base, print) == decode(base, print)
    assert len(tests) == 1
    base.content_hash = "another model"
    decode(base, print)
    assert len(tests) == 2


def test_the_tested_prompts_reach_beyond_a_window_that_answers_can_reach(tmp_path: Path) -> None:
    base = load(write_model(tmp_path / "model", "gpt_oss"))
    assert 16 in decoding._windows(base)
    lengths = {n: [len(p) for p in decoding._probe_prompts(base, [[1] * n] * 4, 8)] for n in (5, 9, 20)}
    assert lengths == {5: [5, 5, 5], 9: [9, 15, 9], 20: [20, 20, 20]}


def test_a_model_that_mlx_lm_cannot_generate_with_is_refused_in_one_sentence(tmp_path: Path) -> None:
    base = load(write_model(tmp_path / "model", "llama"))
    base.model.make_cache = lambda: [object()] * 4
    with pytest.raises(ModelError, match=r"cannot generate with .*model_type is 'llama'.*data\.metric_rows=0"):
        decode(base, print)


def test_a_stop_signal_ends_generation_at_the_next_step(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Stopped

    for family in ("llama", "mamba"):
        steps = 0
        with pytest.raises(Stopped):
            decode(load(write_model(tmp_path / family, family)), print, before_step=stop)


def test_not_a_number_is_a_difference() -> None:
    one = mx.array([0.0, -1.0])
    assert decoding._agree(one, one)
    assert not decoding._agree(one, mx.array([0.0, float("nan")]))


def test_tokens_that_a_model_rules_out_hide_no_difference() -> None:
    one, other = mx.array([float("-inf"), -1.0]), mx.array([float("-inf"), -1.1])
    assert decoding._agree(one, one)
    assert not decoding._agree(one, other)
    assert not decoding._agree(one, mx.array([-2.0, -1.0]))


def test_samples_depend_on_the_key_and_the_number_of_the_answer_alone(tmp_path: Path, cache: Path) -> None:
    base = load(write_model(tmp_path / "model", "llama"))

    def sample(update: int, in_batches: bool, prompts: list[list[int]], with_end: bool = False) -> list[list[int]]:
        sampler = KeyedSampler(3, update)
        arguments = {"before_step": lambda: None, "log": lambda line: None, "with_end": with_end}
        return decoding.decode(base, prompts, 8, in_batches=in_batches, sampler=sampler, **arguments)

    first = sample(1, True, PROMPTS)
    assert first == sample(1, True, PROMPTS) == sample(1, False, PROMPTS)
    assert first != sample(2, True, PROMPTS)
    assert first[:2] == sample(1, True, PROMPTS[:2])
    same = sample(1, True, [PROMPTS[0]] * 5)
    assert len({tuple(answer) for answer in same}) > 1  # answers to one prompt differ
    ends = base.tokenizer.eos_token_ids
    for answer, whole in zip(first, sample(1, True, PROMPTS, with_end=True), strict=True):
        assert whole[: len(answer)] == answer and (len(answer) == 8 or whole[-1] in ends)
