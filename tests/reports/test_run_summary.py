"""The summary of a run is complete, and generated text cannot control the terminal."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runner.common.text import printable
from runner.reports.next_commands import Command
from runner.reports.run_summary import SAMPLES, score_lines, select_samples, summary_lines

SCORES = st.dictionaries(st.integers(0, 30), st.tuples(st.booleans(), st.booleans()), min_size=1)


@given(SCORES)
def test_samples_show_every_kind_of_answer_before_a_second_of_any_kind(scores):
    before = {row: {"score": float(b)} for row, (b, _) in scores.items()}
    after = {row: {"score": float(a)} for row, (_, a) in scores.items()}
    picked = select_samples(before, after)
    assert len(picked) == min(SAMPLES, len(scores)) and picked == sorted(set(picked))
    kinds = {(a, b and a) for b, a in scores.values()}
    shown = {(scores[r][1], scores[r][0] and scores[r][1]) for r in picked}
    assert len(shown) == min(len(kinds), SAMPLES)


def test_generated_text_cannot_control_the_terminal():
    hostile = "a\x1b]0;title\x07b\x9b31mc\u202ed"
    assert not any(c in printable(hostile) for c in "\x1b\x07\x9b\u202e")
    row = {"prompt": "p", "expected": "e", "text": hostile, "score": 0.0}
    assert "\x1b" not in "\n".join(score_lines("m", 1, None, 0.0, [(None, row)]))


def test_the_summary_names_outcome_losses_paths_and_commands():
    lines = summary_lines(
        Path("r"),
        state="stopped",
        reason="SIGTERM",
        step=3,
        iters=9,
        seconds=61.0,
        tokens=1234,
        baseline=2.0,
        best={"step": 3, "valid_loss": 1.0},
        result_step=3,
        peak_memory_gb=1.5,
        commands=[Command("resume", "python -m runner resume=r")],
    )
    assert lines == [
        "stopped (SIGTERM) at step 3 of 9 after 1m01s: 1,234 tokens, 1.50 GB",
        "valid loss  2.0000 -> 1.0000 (step 3)",
        "run         r",
        "adapter     r/adapters (step 3)",
        "report      r/report.html",
        "resume      python -m runner resume=r",
    ]
