"""The tables of docs/models.md, printed by `python -m tests.architectures.table`: what is possible with each model."""

from __future__ import annotations

from collections import defaultdict

from runner.common.errors import RunnerError
from tests.architectures.configs import (
    NOT_TRAINED_BY_STOCK,
    architectures,
)
from tests.architectures.test_architectures import build_run


def outcomes() -> dict[str, dict[str, list[str]]]:
    """Return for each subject the architectures by outcome."""
    found: dict[str, dict[str, list[str]]] = {
        subject: defaultdict(list) for subject in ("head", "cut", "checkpointing")
    }
    for name in architectures():
        if name in NOT_TRAINED_BY_STOCK:
            continue
        parts = build_run(name).backend.split_model.parts  # type: ignore[attr-defined]
        found["head"]["yes" if parts.trunk is not None else "no"].append(name)
        found["cut"]["yes" if parts.frozen_blocks else f"no: {parts.reason}"].append(name)
        try:
            build_run(name, grad_checkpoint=True)
            found["checkpointing"]["yes"].append(name)
        except RunnerError as refused:
            reason = str(refused).partition("this model: ")[2].partition(". Set")[0]
            found["checkpointing"][f"refused: {reason}"].append(name)
    return found


TITLES = {
    "head": "Logits at supervised positions alone",
    "cut": "Hidden states of the frozen blocks cached",
    "checkpointing": "`train.grad_checkpoint=true`",
}


def markdown() -> str:
    """Return the tables."""
    lines = []
    for subject, by_outcome in outcomes().items():
        lines += [f"### {TITLES[subject]}", "", "| | architectures |", "|---|---|"]
        for outcome, names in sorted(by_outcome.items(), key=lambda item: -len(item[1])):
            shown = f"{len(names)} others" if outcome == "yes" else ", ".join(names)
            lines.append(f"| {outcome} | {shown} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
