"""What clean removes, as a pure function: the best and the newest checkpoint survive every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cleaning.policy import CheckpointFacts, Policies, RunFacts, decide
from runner.common.layout import STATES

PATH = Path("run")


def facts(losses=(0.5, 0.3, None, 0.4), **fields):
    """A run with a checkpoint of 10 bytes at each step from 1, with these losses."""
    checkpoints = tuple(CheckpointFacts(step=i, valid_loss=loss, size_bytes=10) for i, loss in enumerate(losses, 1))
    settings = {"state": "finished", "has_trained": True, "result_step": 2, "size_bytes": 99}
    settings["has_result"] = settings["has_adapters"] = fields.get("state", "finished") == "finished"
    return RunFacts(path=PATH, checkpoints=checkpoints, **{**settings, **fields})


def removed(run, **policies):
    """The steps that go, or `whole`."""
    removal, _ = decide(run, Policies(**policies))
    return None if removal is None else "whole" if removal.whole else removal.steps


def kept(run, **policies):
    """Why something stays."""
    return " | ".join(found.reason for found in decide(run, Policies(**policies))[1])


@pytest.mark.parametrize(
    ("fields", "policies", "steps"),
    [
        ({}, {"checkpoints": True}, (1, 3)),
        ({}, {}, None),
        ({}, {"failed": True}, None),
        ({"result_step": 3}, {"checkpoints": True}, (1,)),
        ({"parent_steps": {1}}, {"checkpoints": True}, (3,)),
        ({"parent_steps": {1}}, {"checkpoints": True, "parents": True}, (1, 3)),
        ({"in_use": True}, {"checkpoints": True}, None),
        ({"state": "stopped"}, {"checkpoints": True}, None),
        ({"state": "stopped", "age_days": 31}, {"older_days": 30}, (1, 3)),
        ({"age_days": 30}, {"older_days": 30}, None),
        ({"is_job": True, "rank": 2}, {"beyond_best": 2}, (1, 3)),
        ({"is_job": True, "rank": 1}, {"beyond_best": 2}, None),
        ({"is_job": True, "rank": None}, {"beyond_best": 2}, (1, 3)),
        ({"is_job": True, "rank": 2}, {"beyond_best": 2, "everything": True}, (1, 2, 3, 4)),
        ({}, {"checkpoints": True, "everything": True}, (1, 2, 3, 4)),
        (
            {"state": "diverged", "has_result": True, "age_days": 31},
            {"older_days": 30, "everything": True},
            (1, 2, 3, 4),
        ),
        ({"has_result": False}, {"checkpoints": True, "everything": True}, (1, 3)),
        ({"is_job": True, "rank": 2, "parent_steps": {4}}, {"beyond_best": 2, "everything": True}, (1, 2, 3)),
        ({"is_job": True, "rank": 2, "has_result": False}, {"beyond_best": 2, "everything": True}, (1, 3)),
        ({"is_job": True, "rank": 0}, {"checkpoints": True, "everything": True}, (1, 3)),  # the best of its sweep
        ({"state": "stopped", "age_days": 31}, {"older_days": 30, "everything": True}, (1, 3)),  # it can be resumed
    ],
)
def test_which_checkpoints_go(fields, policies, steps):
    assert removed(facts(**fields), **policies) == steps


@pytest.mark.parametrize(
    ("losses", "fields", "policies", "gone", "reason"),
    [
        ((), {"state": "failed"}, {}, "whole", ""),
        ((), {"state": "interrupted", "has_trained": False}, {}, "whole", ""),
        ((), {"state": "stopped"}, {}, None, ""),
        ((), {"state": "diverged"}, {}, "whole", ""),
        ((), {"state": "diverged", "is_job": True}, {}, None, "would train it again"),
        ((), {"state": "failed", "is_job": True}, {}, "whole", ""),
        ((0.3,), {"state": "failed"}, {}, None, "has a checkpoint of step 1"),
        ((0.3,), {"state": "failed"}, {"everything": True}, "whole", ""),
        ((0.3,), {"state": "failed", "is_job": True, "rank": 0}, {"everything": True}, None, "best of its sweep"),
        ((), {"state": "failed", "is_parent": True}, {}, None, "another run began from it"),
        ((), {"state": "failed", "is_parent": True}, {"parents": True}, "whole", ""),
        ((), {"state": "failed", "unknown": ["my_notes.txt"]}, {"everything": True}, None, "my_notes.txt"),
        ((), {"state": "failed", "made": ["export-peft/"]}, {}, None, "holds exports or evaluations: export-peft/"),
        ((), {"state": "failed", "in_use": True}, {"everything": True}, None, "in use"),
        ((), {"state": "running", "has_trained": False, "in_use": True}, {}, None, "in use"),
        ((0.3,), {"state": "failed", "has_adapters": True}, {"everything": True}, None, "has a result (adapters/)"),
        ((), {"state": "diverged", "has_result": True}, {}, None, "has a result (adapters/)"),
    ],
)
def test_which_failed_runs_go(losses, fields, policies, gone, reason):
    run = facts(losses, **fields)
    assert removed(run, failed=True, **policies) == gone
    assert reason in kept(run, failed=True, **policies)


def test_a_checkpoint_that_is_not_its_own_stays_and_keeps_its_run():
    foreign = CheckpointFacts(step=1, problem="left by another run", is_foreign=True)
    run = facts((), state="failed")
    run = RunFacts(**{**vars_of(run), "checkpoints": (foreign,)})
    assert removed(run, failed=True, everything=True) is None
    run = RunFacts(**{**vars_of(facts()), "checkpoints": (foreign, *facts().checkpoints[1:])})
    assert removed(run, checkpoints=True) == (3,) and "left by another run" in kept(run, checkpoints=True)


def vars_of(run):
    return {name: getattr(run, name) for name in RunFacts.__dataclass_fields__}


losses = st.none() | st.floats(0, 9, allow_nan=False)
checkpoint_lists = st.dictionaries(st.integers(0, 30), st.tuples(losses, st.booleans()), max_size=8)
runs = st.builds(
    lambda checkpoints, **fields: RunFacts(
        path=PATH,
        checkpoints=tuple(
            CheckpointFacts(step=step, valid_loss=loss, problem="damaged" if is_damaged else None, size_bytes=1)
            for step, (loss, is_damaged) in sorted(checkpoints.items())
        ),
        **fields,
    ),
    checkpoint_lists,
    state=st.sampled_from([*STATES, "unknown"]),
    in_use=st.booleans(),
    age_days=st.floats(0, 99),
    result_step=st.none() | st.integers(0, 30),
    has_result=st.booleans(),
    has_adapters=st.booleans(),
    has_trained=st.booleans(),
    is_job=st.booleans(),
    rank=st.none() | st.integers(0, 5),
    parent_steps=st.frozensets(st.integers(0, 30), max_size=3),
    is_parent=st.booleans(),
    unknown=st.lists(st.just("x"), max_size=1),
    made=st.lists(st.just("export-mlx/"), max_size=1),
)
policy_sets = st.builds(
    Policies,
    checkpoints=st.booleans(),
    failed=st.booleans(),
    older_days=st.none() | st.integers(0, 99),
    beyond_best=st.none() | st.integers(1, 5),
    everything=st.booleans(),
    parents=st.booleans(),
)


@given(runs, policy_sets)
def test_the_best_and_the_newest_always_survive(run, policies):
    removal, _ = decide(run, policies)
    if removal is None:
        return
    usable = [checkpoint for checkpoint in run.checkpoints if checkpoint.problem is None]
    measured = [(c.valid_loss, c.step) for c in usable if c.valid_loss is not None]
    assert not run.in_use
    if removal.whole:
        assert run.state in ("failed", "diverged") or not run.has_trained
        assert policies.everything or not run.checkpoints
        assert policies.parents or not run.is_parent
        assert not run.unknown and not run.made and run.rank != 0
        assert not run.has_result and not run.has_adapters
        return
    assert set(removal.steps) <= {checkpoint.step for checkpoint in usable}
    assert set(removal.steps) | set(removal.keeps) == {checkpoint.step for checkpoint in usable}
    assert policies.parents or not set(removal.steps) & set(run.parent_steps)
    if not policies.everything:  # what that leaves is in the table above
        assert max(checkpoint.step for checkpoint in usable) not in removal.steps
        assert not measured or min(measured)[1] not in removal.steps
        assert run.result_step not in removal.steps
