"""The commands offered for a run fit its settings and its state, wherever they are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.reports.checkpoint_list import CheckpointInfo
from runner.reports.next_commands import Command, after_run, after_sweep, for_damaged_run, for_run
from runner.runs.inspect import RunInfo

CHECKPOINTS = [CheckpointInfo(step=10, path=Path("r/checkpoints/step-0000010"))]


def run_with(state: str = "finished", **settings: Any) -> RunInfo:
    return RunInfo(path=Path("r"), state=state, settings={"lora.rank": 8, "model.path": "org/model", **settings})


def lines(commands: list[Command]) -> list[str]:
    return [command.line for command in commands]


@pytest.mark.parametrize("rank", [1, 8, 16, 32])
def test_the_variation_is_never_the_run_itself(rank: int) -> None:
    run = run_with(**{"lora.rank": rank})
    for commands in (after_run(run, has_result=True), for_run(run, CHECKPOINTS, has_result=True)):
        vary = [line for line in lines(commands) if "lora.rank=" in line]
        assert vary == [f"python -m runner repeat=r lora.rank={2 * rank}"]


def test_a_stopped_run_is_resumed_and_a_finished_one_is_varied_and_used() -> None:
    mlx_lm = 'mlx_lm.generate --model org/model --adapter-path r/adapters --prompt "…"'
    assert lines(after_run(run_with("stopped"), has_result=True)) == ["python -m runner resume=r", mlx_lm]
    assert lines(after_run(run_with("stopped"), has_result=False)) == ["python -m runner resume=r"]
    assert lines(after_run(run_with("finished"), has_result=True)) == [
        "python -m runner repeat=r lora.rank=16",
        "python -m runner repeat=r adapter=r/adapters",
        mlx_lm,
    ]


@pytest.mark.parametrize("model", ["builtin:tiny", "models/x.gguf", "${oc.env:MODEL}", None])
def test_mlx_lm_is_offered_only_for_a_base_model_that_it_can_load(model: str | None) -> None:
    run = run_with(**{"model.path": model})
    assert not any("mlx_lm" in line for line in lines(for_run(run, CHECKPOINTS, has_result=True)))


def test_the_page_of_a_run_names_what_uses_its_result() -> None:
    shown = lines(for_run(run_with(), CHECKPOINTS, has_result=True))
    used = [f"python -m runner {text}" for text in ("generate r '…'", "chat r", "serve r", "export r --to fused")]
    assert [line for line in shown if line in used] == used
    assert not {*lines(for_run(run_with(), CHECKPOINTS, has_result=False))} & {*used}


def test_mlx_lm_gets_the_template_of_the_run() -> None:
    run = run_with(**{"data.chat_template": False})
    assert "adapters --ignore-chat-template --prompt" in lines(for_run(run, [], has_result=True))[-2]
    run = run_with(**{"data.chat_template": True, "data.template_args": {"enable_thinking": False}})
    expected = """--chat-template-config '{"enable_thinking": false}' --prompt"""
    assert expected in lines(after_run(run, has_result=True))[-1]


def test_every_command_at_the_end_of_a_run_is_also_on_its_page() -> None:
    for state in ("stopped", "finished"):
        run = run_with(state)
        assert set(after_run(run, has_result=True)) <= set(for_run(run, CHECKPOINTS, has_result=True))


def test_a_damaged_run_is_recovered_from_what_is_left_of_it() -> None:
    backup = Path("/backup/r")
    both = for_damaged_run(Path("r"), resumable=True, repeatable=True, backup=backup)
    assert lines(both) == ["python -m runner resume=r", "python -m runner verify /backup/r"]
    assert lines(for_damaged_run(Path("r"), resumable=False, repeatable=True, backup=None)) == [
        "python -m runner repeat=r"
    ]
    assert for_damaged_run(Path("r"), resumable=False, repeatable=False, backup=None) == []


def test_a_sweep_is_finished_before_it_is_extended() -> None:
    assert lines(after_sweep(Path("s"), finished=False, varied=["seed"])) == ["python -m runner resume=s"]
    assert lines(after_sweep(Path("s"), finished=True, varied=["seed"])) == ["python -m runner resume=s seed=…"]
    assert after_sweep(Path("s"), finished=True, varied=[]) == []


def test_the_adapter_of_a_base_that_stock_mlx_lm_may_misread_is_used_from_a_fused_export(tmp_path: Path) -> None:
    run = run_with(**{"model.path": str(tmp_path)})
    assert any(line.startswith("mlx_lm.generate") for line in lines(after_run(run, has_result=True)))
    (tmp_path / "config.json").write_text('{"rope_parameters": {"rope_theta": 1e6}}')
    assert lines(after_run(run, has_result=True))[-1] == "python -m runner export r --to fused"
