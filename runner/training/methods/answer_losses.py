"""The losses of the methods that compare answers, as functions of the answers' log-probabilities.

Each is that of TRL's trainer of the same name. Arrays are float64: (n, 2) for n examples of two answers, the better one
first; for KTO the answer, and then its prompt with another row's answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from runner.config.schema import MethodConfig


@dataclass(frozen=True)
class Answers:
    """What is known of the answers of n examples before the model is asked."""

    tokens: mx.array
    """(n, 2): number of supervised tokens."""
    reference: mx.array
    """(n, 2): log-probability by the reference, zero without one."""
    unwanted: mx.array
    """(n, 2) bool: whether it is a bad answer."""


_LARGEST_MEAN = -1e-6
"""Bound of the mean log-probability of an answer's tokens in odds ratios."""
Losses = tuple[mx.array, dict[str, mx.array]]
"""The loss of each example, (n,), and what else is measured of each, (n,); NaN where it does not apply."""
AnswerLoss = Callable[[mx.array, Answers, MethodConfig], Losses]
"""Takes the answers' log-probabilities, (n, 2): sums over their supervised tokens."""


def dpo(log_probs: mx.array, answers: Answers, config: MethodConfig) -> Losses:
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290)."""
    rewards = _given(config.beta) * (log_probs - answers.reference)
    return -_log_sigmoid(rewards[:, 0] - rewards[:, 1]), _pair_measures(rewards)


def ipo(log_probs: mx.array, answers: Answers, config: MethodConfig) -> Losses:
    """Identity preference optimization (Azar et al., arXiv:2310.12036), with log-probabilities averaged over tokens."""
    ratios = (log_probs - answers.reference) / answers.tokens
    losses = mx.square(ratios[:, 0] - ratios[:, 1] - 1 / (2 * _given(config.beta)))
    return losses, _pair_measures(_given(config.beta) * ratios)


def simpo(log_probs: mx.array, answers: Answers, config: MethodConfig) -> Losses:
    """Simple preference optimization (Meng et al., arXiv:2405.14734): the reward is the mean log-probability."""
    rewards = _given(config.beta) * log_probs / answers.tokens
    losses = -_log_sigmoid(rewards[:, 0] - rewards[:, 1] - _given(config.gamma))
    return losses, _pair_measures(rewards)


def orpo(log_probs: mx.array, answers: Answers, config: MethodConfig) -> Losses:
    """Odds ratio preference optimization (Hong et al., arXiv:2403.07691).

    The loss of the better answer, a mean over the tokens of all examples, and `beta` times that of the odds ratio.
    """
    # Of an answer that is certain the odds are infinite: below this bound its gradient is zero.
    means = mx.minimum(log_probs / answers.tokens, _LARGEST_MEAN)
    log_odds = means - mx.log(-mx.expm1(means))
    odds_ratio = -_log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    supervised = -log_probs[:, 0] * (len(log_probs) / answers.tokens[:, 0].sum())
    return supervised + _given(config.beta) * odds_ratio, _pair_measures(_given(config.beta) * means)


def kto(log_probs: mx.array, answers: Answers, config: MethodConfig) -> Losses:
    """Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306)."""
    ratios, bad = log_probs - answers.reference, answers.unwanted[:, 0]
    divergence = mx.stop_gradient(mx.maximum(ratios[:, 1].mean(), 0))
    advantage = _given(config.beta) * (ratios[:, 0] - divergence)
    losses = mx.where(
        bad,
        _given(config.undesirable_weight) * (1 - mx.sigmoid(-advantage)),
        _given(config.desirable_weight) * (1 - mx.sigmoid(advantage)),
    )
    rewards, none = _given(config.beta) * ratios[:, 0], mx.array(float("nan"), ratios.dtype)
    return losses, {
        "reward_chosen": mx.where(bad, none, rewards),
        "reward_rejected": mx.where(bad, rewards, none),
        "kl": mx.broadcast_to(divergence, bad.shape),
    }


ANSWER_LOSSES: dict[str, AnswerLoss] = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo, "kto": kto}
WITH_REFERENCE = ("dpo", "ipo", "kto")
"""Those that compare with the model as it was before training."""


_TIE = 1e-5
"""Margins below it are those of rounding: before the first update the model is its own reference."""


def _pair_measures(rewards: mx.array) -> dict[str, mx.array]:
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "reward_margin": margin,
        "reward_accuracy": mx.where(mx.abs(margin) < _TIE, 0.5, margin > 0).astype(margin.dtype),
    }


def _log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(mx.zeros_like(x), -x)


def _given(option: float | None) -> float:
    """Return an option that the method has: its default is filled in."""
    assert option is not None
    return option
