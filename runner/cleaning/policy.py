"""What `runner clean` removes of a run: a pure function of the run and the policies.

Whatever the policies, of the checkpoints of a run that stays the best and the newest stay, and so do those that became
its result or that another run began from. `everything` gives the first three up where adapters/ holds the result, and
`parents` the last.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoints.retention import best_checkpoint

FAILED_STATES = ("failed", "diverged")
_ENDED = ("finished", "diverged")
"""States of runs that no resume continues with the same settings."""


@dataclass(frozen=True, kw_only=True)
class Policies:
    """What was asked for."""

    checkpoints: bool = False
    """Prune the checkpoints of finished runs."""
    failed: bool = False
    """Remove runs that failed, diverged or trained nothing."""
    older_days: float | None = None
    """Prune the checkpoints of runs that have not been written for longer."""
    beyond_best: int | None = None
    """Prune the checkpoints of the jobs of a sweep beyond the best ones, this many."""
    everything: bool = False
    """Prune all checkpoints of a run that ended and has a result, and remove failed runs that have checkpoints."""
    parents: bool = False
    """Remove what other runs began from, too."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """One checkpoint."""

    step: int
    size_bytes: int = 0
    valid_loss: float | None = None
    problem: str | None = None
    """Why it is left alone: damaged, of another run, or with files in it that are not its own."""
    is_foreign: bool = False
    """Whether it, or a file in it, belongs to something else than the run."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the decision needs of a run."""

    path: Path
    state: str
    in_use: bool = False
    """Whether a process holds its lock, or that of its sweep."""
    age_days: float = 0.0
    size_bytes: int = 0
    checkpoints: tuple[CheckpointFacts, ...] = ()
    result_step: int | None = None
    has_result: bool = False
    """Whether adapters/ is whole."""
    has_adapters: bool = False
    """Whether adapters/ holds anything, whole or not."""
    has_trained: bool = False
    """Whether it has made an update."""
    is_job: bool = False
    rank: int | None = None
    """Place among the jobs of its sweep by their objective, 0 for the best; None of one that has no value."""
    parent_steps: Collection[int] = ()
    """Steps of checkpoints that other runs began from."""
    is_parent: bool = False
    """Whether other runs began from it in any way."""
    unknown: Sequence[str] = ()
    """Names in its directory that a run does not write."""
    made: Sequence[str] = ()
    """Names in its directory of what was made of its result: exports and evaluations."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is removed of one run."""

    run: Path
    whole: bool = False
    """Whether it is the whole directory."""
    steps: tuple[int, ...] = ()
    """The checkpoints, where it is not."""
    keeps: tuple[int, ...] = ()
    """The checkpoints that stay."""
    size_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Kept:
    """What a policy asked for and what stays nevertheless."""

    path: Path
    reason: str


def decide(run: RunFacts, policies: Policies) -> tuple[Removal | None, list[Kept]]:
    """Return what is removed of the run, and what stays though a policy asked for it."""
    has_failed = run.state in FAILED_STATES or not (run.has_trained or run.checkpoints or run.state == "finished")
    pruned_for = _reasons_to_prune(run, policies)
    if not pruned_for and not (policies.failed and has_failed):
        return None, []
    if run.in_use:
        return None, [Kept(run.path, "in use")]
    kept: list[Kept] = []
    if policies.failed and has_failed:
        obstacle = _obstacle(run, policies)
        if obstacle is None:
            reason = run.state if run.state in FAILED_STATES else "trained nothing"
            return Removal(run=run.path, whole=True, size_bytes=run.size_bytes, reason=reason), []
        kept.append(Kept(run.path, obstacle))
    removal, left = _prune(run, policies, pruned_for) if pruned_for else (None, [])
    return removal, [*kept, *left]


def protected_steps(run: RunFacts, policies: Policies) -> set[int]:
    """Return the steps whose checkpoints stay."""
    usable = [checkpoint for checkpoint in run.checkpoints if checkpoint.problem is None]
    named = set() if policies.parents else {*run.parent_steps}
    if policies.everything and run.state in _ENDED and run.has_result and run.rank != 0:
        return named
    evaluated = best_checkpoint(usable)
    best = {evaluated.step} if evaluated else set()
    newest = {max(c.step for c in usable)} if usable else set()
    return named | best | newest | ({run.result_step} if run.result_step is not None else set())


def _reasons_to_prune(run: RunFacts, policies: Policies) -> list[str]:
    reasons = []
    if policies.checkpoints and run.state == "finished":
        reasons.append("finished")
    if policies.older_days is not None and run.age_days > policies.older_days:
        reasons.append(f"{int(run.age_days)} days old")
    is_ended_job = run.is_job and run.state in _ENDED
    if policies.beyond_best is not None and is_ended_job and (run.rank is None or run.rank >= policies.beyond_best):
        reasons.append(f"beyond the best {policies.beyond_best} of its sweep")
    return reasons


def _obstacle(run: RunFacts, policies: Policies) -> str | None:
    """Return why a failed run is not removed."""
    foreign = next((checkpoint for checkpoint in run.checkpoints if checkpoint.is_foreign), None)
    if run.rank == 0:
        return "the best of its sweep"
    if run.is_job and run.state == "diverged":
        return "diverged; its sweep would train it again if its directory were gone"
    if foreign is not None:
        return f"step {foreign.step} is not its own: {foreign.problem}"
    if run.has_result or run.has_adapters:
        return f"{run.state}, but has a result (adapters/)"
    if run.checkpoints and not policies.everything:
        step = max(checkpoint.step for checkpoint in run.checkpoints)
        return f"{run.state}, but has a checkpoint of step {step}; --everything removes it, too"
    if run.is_parent and not policies.parents:
        return "another run began from it; --parents removes it, too"
    if run.made:
        return f"holds exports or evaluations: {_list(run.made)}"
    if run.unknown:
        return f"holds what no run writes: {_list(run.unknown)}"
    return None


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def _prune(run: RunFacts, policies: Policies, reasons: Sequence[str]) -> tuple[Removal | None, list[Kept]]:
    protected = protected_steps(run, policies)
    left: dict[str, list[int]] = {}
    for checkpoint in run.checkpoints:
        if checkpoint.problem is not None and checkpoint.step not in protected:
            left.setdefault(checkpoint.problem, []).append(checkpoint.step)
    kept = [Kept(run.path, f"step {', '.join(map(str, steps))}: {problem}") for problem, steps in left.items()]
    usable = [checkpoint for checkpoint in run.checkpoints if checkpoint.problem is None]
    removed = [checkpoint for checkpoint in usable if checkpoint.step not in protected]
    if not removed:
        return None, kept
    removal = Removal(
        run=run.path,
        steps=tuple(checkpoint.step for checkpoint in removed),
        keeps=tuple(checkpoint.step for checkpoint in usable if checkpoint.step in protected),
        size_bytes=sum(checkpoint.size_bytes for checkpoint in removed),
        reason=", ".join(reasons),
    )
    return removal, kept
