"""The losses that compare answers, against the formulas of their papers in plain Python and numeric derivatives."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from runner.config.schema import METHOD_MEASURES, Config, MethodConfig
from runner.config.validation import fill_defaults
from runner.training.methods.answer_losses import ANSWER_LOSSES, Answers

LOG_PROBS = np.array([[-12.0, -9.5], [-4.25, -20.0], [-7.0, -7.5]])
REFERENCE = np.array([[-11.0, -10.0], [-5.0, -18.0], [-7.5, -7.25]])
TOKENS = np.array([[6.0, 5.0], [4.0, 9.0], [7.0, 3.0]])
UNWANTED = np.array([[False, False], [True, True], [False, False]])


def options(name: str, **changes: float) -> MethodConfig:
    return fill_defaults(Config(method=MethodConfig(name=name, **changes))).method


def compute(name: str, log_probs: np.ndarray, **changes: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with mx.stream(mx.cpu):
        answers = Answers(*(mx.array(values, mx.float64) for values in (TOKENS, REFERENCE)), mx.array(UNWANTED))
        losses, measures = ANSWER_LOSSES[name](mx.array(log_probs, mx.float64), answers, options(name, **changes))
        return np.array(losses), {measure: np.array(values) for measure, values in measures.items()}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(name: str) -> list[float]:
    ratios = LOG_PROBS - REFERENCE
    if name == "dpo":
        return [-log_sigmoid(0.1 * (chosen - rejected)) for chosen, rejected in ratios]
    means, mean_ratios = LOG_PROBS / TOKENS, ratios / TOKENS
    if name == "ipo":
        return [(chosen - rejected - 5.0) ** 2 for chosen, rejected in mean_ratios]
    if name == "simpo":
        return [-log_sigmoid(2.0 * chosen - 2.0 * rejected - 1.0) for chosen, rejected in means]
    if name == "orpo":
        supervised = 3 * -LOG_PROBS[:, 0] / TOKENS[:, 0].sum()
        odds = [[math.log(math.exp(m) / (1 - math.exp(m))) for m in pair] for pair in means]
        return [
            s - 0.1 * log_sigmoid(chosen - rejected) for s, (chosen, rejected) in zip(supervised, odds, strict=True)
        ]
    divergence = max(0.0, ratios[:, 1].mean())
    return [
        1 - sigmoid(0.1 * (divergence - answer if bad else answer - divergence))
        for answer, bad in zip(ratios[:, 0], UNWANTED[:, 0], strict=True)
    ]


@pytest.mark.parametrize("name", ANSWER_LOSSES)
def test_losses_are_those_of_the_papers(name):
    losses, measures = compute(name, LOG_PROBS)
    assert losses == pytest.approx(expected(name), abs=1e-6)
    assert set(measures) == set(METHOD_MEASURES[name])


@pytest.mark.parametrize("name", ANSWER_LOSSES)
def test_derivatives_are_those_of_the_losses(name):
    with mx.stream(mx.cpu):
        answers = Answers(*(mx.array(values, mx.float64) for values in (TOKENS, REFERENCE)), mx.array(UNWANTED))
        loss = ANSWER_LOSSES[name]
        found = mx.grad(lambda x: loss(x, answers, options(name))[0].mean())(mx.array(LOG_PROBS, mx.float64))
        found = np.array(found)
    for index in np.ndindex(*LOG_PROBS.shape):
        step = np.zeros_like(LOG_PROBS)
        step[index] = 1e-2
        numeric = (compute(name, LOG_PROBS + step)[0].mean() - compute(name, LOG_PROBS - step)[0].mean()) / 2e-2
        if name == "kto" and index[1] == 1:
            numeric = 0.0  # the divergence is a constant in the paper
        assert found[index] == pytest.approx(numeric, abs=2e-5), index


def test_rewards_say_which_answer_is_preferred():
    _, measures = compute("dpo", LOG_PROBS)
    ratios = 0.1 * (LOG_PROBS - REFERENCE)
    assert measures["reward_margin"] == pytest.approx(ratios[:, 0] - ratios[:, 1])
    assert measures["reward_accuracy"].tolist() == [0, 1, 1]
    _, measures = compute("dpo", REFERENCE + np.array([[0, 2e-5], [2e-5, 0], [0, 0]]))  # nothing but rounding
    assert measures["reward_accuracy"].tolist() == [0.5, 0.5, 0.5]
    _, measures = compute("kto", LOG_PROBS)
    assert np.isnan(measures["reward_chosen"]).tolist() == UNWANTED[:, 0].tolist()
    assert np.isnan(measures["reward_rejected"]).tolist() == (~UNWANTED[:, 0]).tolist()


def test_the_weights_of_kto_scale_the_losses_of_their_kind():
    plain, _ = compute("kto", LOG_PROBS)
    weighted, _ = compute("kto", LOG_PROBS, desirable_weight=2.0, undesirable_weight=3.0)
    assert (weighted / plain).tolist() == pytest.approx([2, 3, 2])
