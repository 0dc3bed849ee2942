"""The lines of search.jsonl that a search writes, and what it prints of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.common.clock import utc_now
from runner.runs.search_record import Result
from runner.sweeps.search.state import Continuation, Wave


def wave_line(number: int, wave: Wave) -> dict[str, object]:
    """Return the line of a wave that begins now."""
    line: dict[str, object] = {"wave": number, "asked": wave.asked, "time": utc_now()}
    if wave.continued:
        line["continued"] = [decision.to_dict() for decision in wave.continued]
    if wave.replicates:
        line["replicates"] = [{"trial": trial, "seed": seed} for trial, seed in wave.replicates]
    return line


def read_wave(line: Mapping[str, Any]) -> Wave:
    """Return the wave of a line."""
    return Wave(
        asked=int(line["asked"]),
        continued=tuple(
            Continuation(tuple(d["trials"]), d["from"], d["to"], d["of"], d.get("cut"), d.get("reason", ""))
            for d in line.get("continued", [])
        ),
        replicates=tuple((pair["trial"], pair["seed"]) for pair in line.get("replicates", [])),
    )


def result_line(number: int, result: Result) -> dict[str, object]:
    """Return the line of a trial's result."""
    line: dict[str, object] = {"result": number, "step": result.step, "values": result.values, "state": result.state}
    if result.rung_value is not None and result.values[0] != result.rung_value:
        line["judged"] = result.rung_value
    return line | ({"reason": result.reason} if result.reason else {})


def continued_text(decision: Continuation) -> str:
    """Return what is printed when trials continue: ``rung 10  3 of 9 continue to 30: trials 4, 3, 7, …``."""
    numbers = ", ".join(map(str, decision.trials))
    trials = f"{'trial' if len(decision.trials) == 1 else 'trials'} {numbers}"
    rung, following = decision.from_step, decision.to_step
    if decision.cut is None:
        return f"rung {rung}  {trials} to {following}: {decision.reason}"
    text = f"rung {rung}  {len(decision.trials)} of {decision.of} continue to {following}: {trials}"
    return f"{text}, valid loss up to {decision.cut:.4f}" + (f"; {decision.reason}" if decision.reason else "")
