"""The interface through which lm-eval (lm-evaluation-harness) asks a model, and one evaluation with it.

mlx-lm has such an interface too, but it loads a model by path, scores one question at a time, and conditions whole
texts on no first token, other than lm-eval defines them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from lm_eval import evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from runner.common.errors import ConfigError, RunnerError, did_you_mean
from runner.common.text import first_line
from runner.inference.conversation import context_length
from runner.inference.prompts import PromptEncoder
from runner.models.load import BaseModel
from runner.training.decoding import decode

_DEFAULT_CONTEXT = 2048
"""Where the model's config does not say, as in lm-eval."""

_FEWSHOT_SEED = 1234
"""lm-eval's own."""

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as texts (not used), and as tokens."""


class HarnessModel(TemplateLM):
    """A base model, with or without an adapter, as lm-eval asks it."""

    def __init__(self, base: BaseModel, encoder: PromptEncoder, *, tokens_at_once: int, use_template: bool) -> None:
        """`tokens_at_once`: size of a batch, padding included. With `use_template` the texts of lm-eval hold all
        special tokens, because they were rendered by the run's chat template."""
        super().__init__()
        self._base, self._encoder, self._tokens_at_once = base, encoder, tokens_at_once
        self._use_template = use_template
        self.tokenizer = base.tokenizer
        self.max_length = context_length(base.config) or _DEFAULT_CONTEXT

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: the first of texts, where the tokenizer has one."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches."""
        return self._base.content_hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template for lm-eval's records."""
        return self._encoder.text.template_text or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as the run's rows were rendered; without a generation prompt, its last message is the
        beginning of an answer."""
        if add_generation_prompt:
            return self._encoder.render(chat_history)
        return self._encoder.render(chat_history[:-1]) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the token ids of a text, as training encodes one."""
        special = not self._use_template if add_special_tokens is None else add_special_tokens
        tokens = self._encoder.text.encode(string, add_special_tokens=special)
        # Some tokenizers end every text, also one that is to be continued.
        return tokens[:-1] if special and tokens[-1:] == [self.eot_token_id] and len(tokens) > 1 else tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return of each continuation its log-likelihood, and whether greedy decoding gives it; without a bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text as a whole, in windows of the model's context."""
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a greedy continuation of each context, up to one of its stop texts.

        Raises:
            ConfigError: a task asks for samples, or for answers longer than the model's context.
        """
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            arguments = dict(normalize_gen_kwargs(dict(requests[numbers[0]].args[1])))
            if arguments.get("do_sample") and arguments.get("temperature", 0):
                raise ConfigError("A task asks for sampled answers (do_sample); runner test generates greedily.")
            stops = [stop for stop in arguments["until"] if stop]
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._generate(contexts, stops, arguments["max_gen_toks"]), strict=True):
                texts[number] = postprocess_generated_text(text, stops, self.tokenizer.think_end)
        return texts

    def _generate(self, contexts: Sequence[str], stops: Sequence[str], max_tokens: int) -> list[str]:
        room = self.max_length - max_tokens
        if room < 1:
            raise ConfigError(
                f"A task asks for answers of {max_tokens:,} tokens, and the model's context is {self.max_length:,}."
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]

        def is_finished(number: int, tokens: Sequence[int]) -> bool:
            return any(stop in self.tokenizer.decode(tokens) for stop in stops)

        generated = decode(
            self._base,
            prompts,
            max_tokens,
            before_step=lambda: None,
            log=lambda line: None,
            is_finished=is_finished,
        )
        return [self.tokenizer.decode(tokens) for tokens in generated]

    def _loglikelihood_tokens(self, requests: list[Scored], **options: Any) -> list[tuple[float, bool]]:
        """Return of each continuation its log-likelihood, and whether greedy decoding gives it."""
        rows = [((context + answer)[-(self.max_length + 1) :], len(answer)) for _, context, answer in requests]
        scored: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for numbers in _batches([len(tokens) for tokens, _ in rows], self._tokens_at_once):
            width = max(len(rows[number][0]) for number in numbers) - 1
            inputs = np.zeros((len(numbers), width), np.int32)
            targets, is_scored = inputs.copy(), np.zeros(inputs.shape, bool)
            for row, number in enumerate(numbers):
                tokens, length = rows[number]
                end = len(tokens) - 1
                inputs[row, :end], targets[row, :end] = tokens[:-1], tokens[1:]
                is_scored[row, max(0, end - length) : end] = True
            scores, greedy = self._score(mx.array(inputs), mx.array(targets), mx.array(is_scored))
            for row, number in enumerate(numbers):
                scored[number] = (float(scores[row]), bool(greedy[row]))
        return scored

    def _score(self, inputs: mx.array, targets: mx.array, is_scored: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """Return per row the sum of log p(target) over the scored positions, and whether each is the likeliest token.

        All arguments are (rows, width). Padding is on the right, where no real token looks.
        """
        logits = self._base.model(inputs).astype(mx.float32)
        chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        scores = mx.where(is_scored, chosen - mx.logsumexp(logits, axis=-1), 0).sum(axis=1)
        greedy = mx.all((logits.argmax(axis=-1) == targets) | ~is_scored, axis=1)
        mx.eval(scores, greedy)
        return np.array(scores), np.array(greedy)


@dataclass(kw_only=True)
class TaskOptions:
    """What lm-eval is asked for."""

    tasks: list[str]
    """Names of tasks and groups of lm-eval, and paths of YAML files."""
    include: list[Path]
    """Folders with more tasks."""
    limit: int | None
    """Documents of each task; None for all."""
    shots: int | None
    """Examples before each document; None for each task's own number."""
    use_template: bool


def check_tasks(options: TaskOptions) -> TaskManager:
    """Return lm-eval's task manager, which knows the tasks.

    Raises:
        ConfigError: there is no such task.
    """
    for folder in options.include:
        if not folder.is_dir():
            raise ConfigError(f"--include {folder}: no such folder.")
    names = [name for name in options.tasks if not name.endswith((".yaml", ".yml"))]
    for file in set(options.tasks) - set(names):
        if not Path(file).is_file():
            raise ConfigError(f"--tasks {file}: no such file.")
    # To index lm-eval's own tasks takes seconds.
    manager = TaskManager(
        include_path=[str(folder) for folder in options.include] or None, include_defaults=bool(names)
    )
    for name in names:
        if not manager.match_tasks([name]):
            similar = [task for task in manager.all_tasks if task[:1] == name[:1]]
            raise ConfigError(
                f"--tasks {name}: lm-eval {version('lm_eval')} has no such task.{did_you_mean(name, similar)} "
                "Tasks of your own: a YAML file, or --include FOLDER."
            )
    return manager


def run_tasks(model: HarnessModel, options: TaskOptions, manager: TaskManager) -> dict[str, Any]:
    """Evaluate `model` and return lm-eval's results: `results`, `versions`, `n-shot`, `n-samples`, `higher_is_better`.

    Raises:
        ConfigError: a task cannot be loaded, such as one whose data is not on this machine.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        loaded = manager.load(options.tasks)
        for task in loaded["tasks"].values():
            own_shots = task.get_config("num_fewshot")
            if own_shots is None or (options.shots is not None and own_shots != 0):  # 0 in a task means never any
                task.set_config(key="num_fewshot", value=options.shots or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        found = evaluate(
            lm=model,
            task_dict=loaded,
            limit=options.limit,
            apply_chat_template=options.use_template,
            fewshot_as_multiturn=options.use_template,
            log_samples=False,
        )
    except (RunnerError, MemoryError):
        raise
    except Exception as error:  # tasks are programs: they raise all kinds of errors
        reason = first_line(str(error)) or type(error).__name__
        raise ConfigError(f"lm-eval cannot evaluate {', '.join(options.tasks)}: {reason}.") from error
    assert found is not None
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return {name: found[name] for name in names if name in found}


def _batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of similar length, at most `tokens_at_once` together with their padding."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens_at_once:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
