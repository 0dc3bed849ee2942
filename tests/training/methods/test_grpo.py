"""GRPO's advantages and token weights, with figures."""

from __future__ import annotations

import numpy as np
import pytest

from runner.training.methods.grpo import group_advantages, token_factors


def test_advantages_are_rewards_less_the_mean_of_their_group():
    scores = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    plain = group_advantages(scores, scale=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-0.25, -0.25, -0.25, 0.75]]
    scaled = group_advantages(scores, scale=True)
    assert scaled[0] == pytest.approx(plain[0] / (0.57735 + 1e-4), abs=1e-4)  # of 4 rewards, divided by 3
    assert scaled[1].tolist() == [0, 0, 0, 0]


def test_tokens_are_averaged_as_the_loss_type_says():
    lengths = np.array([[2, 4], [1, 3]])
    assert token_factors(lengths, "grpo", 8).tolist() == [[1 / 8, 1 / 16], [1 / 4, 1 / 12]]
    assert token_factors(lengths, "dapo", 8).tolist() == [[1 / 10] * 2] * 2
    assert token_factors(lengths, "dr_grpo", 8).tolist() == [[1 / 32] * 2] * 2
