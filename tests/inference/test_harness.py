"""lm-eval gets the log-likelihoods and texts that a plain forward pass gives, and evaluates tasks offline.

Runs where lm-eval is installed: see the extra lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from tiny_models import write_model

pytest.importorskip("lm_eval")

from runner.cli.commands import adapter_source, stored_settings, test
from runner.cli.commands.load_adapter import load_adapter
from runner.common.errors import ConfigError
from runner.config.schema import Config, ModelConfig
from runner.inference.harness import HarnessModel
from runner.inference.prompts import PromptEncoder
from runner.models.load import BaseModel, load_base_model

PAIRS = [("The capital of France is", " Paris"), ("a", "b"), ("", "hello"), ("The capital of ", "Italy is Rome, or so")]
TOLERANCE = 1e-4


def harness(base: BaseModel, tokens_at_once: int = 64, use_template: bool = False) -> HarnessModel:
    config = Config()
    config.data.path, config.data.format = "builtin:tiny", "completions"
    encoder = PromptEncoder(base.tokenizer, config)
    return HarnessModel(base, encoder, tokens_at_once=tokens_at_once, use_template=use_template)


def requests(*arguments: tuple) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def plain_score(base: BaseModel, tokens: list[int], length: int) -> tuple[float, bool]:
    """Of the last `length` of the tokens, from one forward pass over them alone."""
    logprobs = nn.log_softmax(base.model(mx.array([tokens[:-1]])).astype(mx.float32), axis=-1)[0]
    found = [
        (logprobs[i - 1, tokens[i]].item(), logprobs[i - 1].argmax().item() == tokens[i])
        for i in range(len(tokens) - length, len(tokens))
    ]
    return sum(score for score, _ in found), all(greedy for _, greedy in found)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mamba"])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 4096])
def test_log_likelihoods_equal_a_plain_forward_pass(tmp_path: Path, family: str, tokens_at_once: int) -> None:
    base = load_base_model(ModelConfig(path=str(write_model(tmp_path / "model", family))))
    scored = harness(base, tokens_at_once).loglikelihood(requests(*PAIRS))
    for (context, continuation), (score, greedy) in zip(PAIRS, scored, strict=True):
        stripped = context.rstrip()
        length = len(continuation) + len(context) - len(stripped)  # a token is a byte
        tokens = base.tokenizer.encode(context + continuation, add_special_tokens=False)
        expected = plain_score(base, tokens if context else [base.tokenizer.bos_token_id, *tokens], length)
        assert score == pytest.approx(expected[0], abs=TOLERANCE)
        assert greedy == expected[1]


def test_whole_texts_are_scored_in_windows_of_the_context(tmp_path: Path) -> None:
    base = load_base_model(ModelConfig(path="builtin:tiny"))
    model = harness(base)
    first = base.tokenizer.bos_token_id
    short, long = "hello there", "0123456789abcdefghijklmnopqrstuvwxyz"
    model.max_length = 16
    found = model.loglikelihood_rolling(requests((short,), (long,)))
    tokens = base.tokenizer.encode(long, add_special_tokens=False)
    windows = [([first, *tokens[:16]], 16), (tokens[15:32], 16), (tokens[19:36], 4)]
    expected = plain_score(base, [first, *base.tokenizer.encode(short, add_special_tokens=False)], len(short))[0]
    assert found[0] == pytest.approx(expected, abs=TOLERANCE)
    assert found[1] == pytest.approx(sum(plain_score(base, *window)[0] for window in windows), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mamba"])  # in batches, and one at a time
def test_generated_texts_end_before_a_stop_text(tmp_path: Path, cache: Path, family: str) -> None:
    base = load_base_model(ModelConfig(path=str(write_model(tmp_path / "model", family))))
    prompts = ["abc", "defg", "hello there", "x", "what is it?"]
    ends = base.tokenizer.eos_token_ids
    whole = []
    for prompt in prompts:
        tokens = base.tokenizer.encode(prompt)
        answer = [r.token for r in mlx_lm.stream_generate(base.model, base.tokenizer, tokens, max_tokens=12)]
        whole.append(base.tokenizer.decode([token for token in answer if token not in ends]))
    stop = next(c for text in whole for c in text[2:] if c.isascii() and c.isprintable())
    assert any(stop in text for text in whole) and not all(stop in text for text in whole)
    settings = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    found = harness(base).generate_until(requests(*((prompt, settings) for prompt in prompts)))
    assert found == [text.split(stop)[0] for text in whole]
    with pytest.raises(ConfigError, match="sampled answers"):
        harness(base).generate_until(requests(("a", {"until": [], "do_sample": True, "temperature": 1.0})))


def write_tasks(folder: Path) -> Path:
    """Write a task of each kind, with its rows, as lm-eval reads them."""
    folder.mkdir()
    rows = [
        {"country": country, "choices": ["Paris", "Rome", "Oslo"], "answer": answer}
        for answer, country in enumerate(("France", "Italy", "Norway"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_target": "{{choices[answer]}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "capitals": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "capitals_text": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]},
        "capitals_answer": {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, settings in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **settings}))  # JSON is YAML
    return folder


@pytest.fixture
def run(tiny: Callable, train: Callable, tmp_path: Path) -> Path:
    return train(tiny(), tmp_path / "run")


def test_tasks_of_our_own_are_evaluated_with_and_without_the_adapter(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    names = ",".join(str(tasks / f"{name}.yaml") for name in ("capitals", "capitals_text", "capitals_answer"))
    capsys.readouterr()
    assert test.run([str(run), "--tasks", names, "--base", "--json", "--num-fewshot", "1", "--limit", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(Path(document.pop("file")).read_text()) == document
    assert document["chat_template"] is True and document["step"] == 12
    adapter, base = (document["evaluations"][kind]["results"] for kind in ("adapter", "base"))
    assert set(adapter) == set(base) == {"capitals", "capitals_text", "capitals_answer"}
    assert document["evaluations"]["adapter"]["n-samples"]["capitals"]["effective"] == 2
    assert document["evaluations"]["adapter"]["n-shot"]["capitals"] == 1
    loaded = load_adapter(adapter_source.find_adapter(run), stored_settings.read_settings(run), log=print)
    rolling, _ = zip(
        *(plain_score(loaded.base, tokens, len(tokens) - 1) for tokens in whole_texts(loaded.base)), strict=True
    )
    bits = -sum(rolling) / sum(len(text) - 1 for text in whole_texts(loaded.base)) / 0.6931471805599453
    assert adapter["capitals_text"]["bits_per_byte,none"] == pytest.approx(bits, abs=TOLERANCE)
    assert adapter["capitals_text"]["bits_per_byte,none"] != base["capitals_text"]["bits_per_byte,none"]
    assert test.run([str(run), "--tasks", names, "--base", "--limit", "2", "--no-chat-template"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["task", "metric", "rows", "shots", "base", "adapter", "difference"]
    assert printed.splitlines()[-2].endswith("no chat template") and printed.splitlines()[-1].startswith("wrote ")
    assert len(list((run / "evaluations").iterdir())) == 2


def whole_texts(base: BaseModel) -> list[list[int]]:
    """The first two targets of the rolling task, after the first token of a text."""
    return [
        [base.tokenizer.bos_token_id, *base.tokenizer.encode(t, add_special_tokens=False)] for t in ("Paris", "Rome")
    ]


def test_multiple_choices_are_asked_in_the_chat_template_of_the_run(run: Path) -> None:
    loaded = load_adapter(adapter_source.find_adapter(run), stored_settings.read_settings(run), log=print)
    model = harness(loaded.base, use_template=True)
    turns = [{"role": "user", "content": "abc"}]
    expected = loaded.base.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert model.tok_encode(model.apply_chat_template(turns)) == expected
    begun = model.apply_chat_template([*turns, {"role": "assistant", "content": "It"}], add_generation_prompt=False)
    assert model.tok_encode(begun) == [*expected, *loaded.base.tokenizer.encode("It", add_special_tokens=False)]


def test_a_task_that_is_not_there_is_refused_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        test.run([str(run), "--tasks", "capitals.yaml", "model.path=nowhere"])
    broken = write_tasks(tmp_path / "tasks") / "capitals.yaml"
    (broken.parent / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="lm-eval cannot evaluate .*capitals.yaml"):
        test.run([str(run), "--tasks", str(broken)])


@pytest.mark.long
def test_a_name_that_lm_eval_does_not_know_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="no such task. Did you mean 'hellaswag'"):
        test.run([str(run), "--tasks", "helaswag"])
