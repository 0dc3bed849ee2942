"""`runner generate` answers as the adapter answers, shows nothing that could steer a terminal, and ends quietly."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from runner.cli.commands import adapter_source, generate, stored_settings
from runner.cli.commands.load_adapter import load_adapter
from runner.common.errors import ConfigError, DataError
from runner.config import schema
from runner.models import load as models


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    return train_once(tiny(), tmp_path / "run")


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert generate.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def plain(model: Any, tokenizer: Any, prompt: str) -> str:
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, tokens, max_tokens=12)


def test_the_answer_equals_greedy_mlx_lm_with_the_chat_template(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_adapter(adapter_source.find_adapter(run), stored_settings.read_settings(run), log=print)
    found = answered(capsys, str(run), "twice: sour", "--max-tokens", "12")
    assert [a["by"] for a in found["answers"]] == ["adapter"]
    assert found["answers"][0]["text"] == plain(loaded.base.model, loaded.base.tokenizer, "twice: sour")
    assert found["answers"][0]["tokens"] == 12
    assert found["step"] == 12


def test_compare_base_answers_without_the_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = models.load_base_model(schema.ModelConfig(path="builtin:tiny"))
    found = answered(capsys, str(run), "twice: sour", "--max-tokens", "12", "--base")
    first, second = found["answers"]
    assert (first["by"], second["by"]) == ("base", "adapter")
    assert first["text"] == plain(base.model, base.tokenizer, "twice: sour")
    assert second["text"] == answered(capsys, str(run), "twice: sour", "--max-tokens", "12")["answers"][0]["text"]
    assert first["text"] != second["text"]
    generate.run([str(run), "twice: sour", "--max-tokens", "2", "--compare-base"])
    out = capsys.readouterr().out
    assert out.index("--- base") < out.index("--- adapter (step 12)")


def test_the_seed_decides_the_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "a", "--temp", "1", "--top-p", "0.9", "--max-tokens", "12"]
    texts = [answered(capsys, *arguments, "--seed", seed)["answers"][0]["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = answered(capsys, str(run), "a", "--max-tokens", "12")["answers"][0]["text"]
    for one_token in (["--top-k", "1"], ["--min-p", "1"]):
        sampled = answered(capsys, str(run), "a", "--temp", "1", "--max-tokens", "12", *one_token)
        assert sampled["answers"][0]["text"] == greedy


def test_the_chat_template_is_used_as_in_training_with_a_system_turn(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(capsys, str(run), "abc", "--max-tokens", "1")["prompt_tokens"] > 20
    assert answered(capsys, str(run), "abc", "--max-tokens", "1", "data.chat_template=false")["prompt_tokens"] == 3
    assert answered(capsys, str(run), "abc", "--max-tokens", "1", "data.format=text")["prompt_tokens"] == 3
    with_system = answered(capsys, str(run), "abc", "--max-tokens", "1", "--system", "Be brief.")["prompt_tokens"]
    assert with_system > answered(capsys, str(run), "abc", "--max-tokens", "1")["prompt_tokens"] + 9
    with pytest.raises(ConfigError, match="--system needs a chat template"):
        generate.run([str(run), "abc", "--system", "x", "data.chat_template=false"])


def test_runs_on_plain_text_get_no_template(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "abc"}\n')
    assert answered(capsys, str(run), "abc", "--max-tokens", "1", f"data.path={data}")["prompt_tokens"] == 3
    shutil.rmtree(data)
    assert answered(capsys, str(run), "abc", "--max-tokens", "1", f"data.path={data}")["prompt_tokens"] > 20


def test_a_prompt_may_come_from_standard_input_or_look_like_an_option(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert answered(capsys, str(run), "-", "--max-tokens", "1")["prompt"] == "a\nb"
    assert answered(capsys, "--max-tokens", "1", str(run), "k=v")["prompt"] == "k=v"
    assert generate.run(["--max-tokens", "1", "--json", str(run), "--", "--seed"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "--seed"


def test_control_characters_in_an_answer_are_not_printed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(run), "a", "--max-tokens", "60", "--temp", "5"]  # near random bytes
    answer = answered(capsys, *arguments)["answers"][0]["text"]
    assert any(not c.isprintable() and c != "\n" for c in answer)
    assert generate.run(arguments) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert len(out) == len(answer) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens: 0 is invalid: must be 1 or more"),
        (["--temp", "-1"], "--temp: -1 is invalid"),
        (["--temp", "nan"], "--temp: nan is invalid"),
        (["--top-p", "0"], "--top-p: 0 is invalid"),
        (["--top-k", "-1"], "--top-k: -1 is invalid"),
        (["--min-p", "2"], "--min-p: 2 is invalid: must be between 0 and 1"),
        (["--seed", "x"], "--seed: x is invalid"),
        (["--quiet"], "--quiet"),
    ],
)
def test_an_invalid_option_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate.run([str(tmp_path), "a", *options])


def test_an_empty_prompt_without_a_template_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="prompt is empty"):
        generate.run([str(run), "", "data.chat_template=false"])


def test_ctrl_c_ends_the_answer_quietly_with_130(run: Path, cli: Any) -> None:
    process = cli.start("generate", str(run), "a", "--max-tokens", "1000000")
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest and "runner:" not in rest
    assert rest.endswith("\n")


def test_loading_does_not_depend_on_the_random_state(run: Path) -> None:
    source, settings = adapter_source.find_adapter(run), stored_settings.read_settings(run)
    first = load_adapter(source, settings, log=print).base.model(mx.array([[1, 2, 3]]))
    mx.random.seed(99)
    assert mx.array_equal(load_adapter(source, settings, log=print).base.model(mx.array([[1, 2, 3]])), first)
