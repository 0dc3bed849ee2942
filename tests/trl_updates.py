"""Updates of each method that TRL has too, computed here and by TRL's trainers: the same model, adapter, token ids and
rewards, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache as cached
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny_models

from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend
from runner.config import schema, validation
from runner.data.chat_template import TemplateOptions
from runner.data.token_set import TokenSet
from runner.export.peft import PeftTarget
from runner.export.trained_adapter import TrainedAdapter
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel, Params
from runner.models.split_probe import split
from runner.training.dataloader import BatchBuilder
from runner.training.generate import Question
from runner.training.methods import grpo
from runner.training.methods.build import has_reference
from runner.training.methods.method import Method
from runner.training.methods.preference import PreferenceMethod
from runner.training.methods.reference import BASE, Reference
from runner.training.optimizer import build_optimizer
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep

REFERENCE = Path(__file__).resolve().parent / "training" / "methods" / "reference"
RECORDED = REFERENCE / "trl.json"
LORA = schema.LoraConfig(
    rank=3, scale=2.0, num_layers=2, keys=["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
)
TOLERANCE = 1e-4
"""Of a loss, and of a gradient relative to the largest."""
LEARNING_RATE = 1024.0
"""Of plain SGD, so large that its update is the gradient to all digits."""

GROUPS = {"name": "grpo", "group_size": 4, "max_new_tokens": 16}
KTO = {"name": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}


@dataclass(frozen=True)
class Run:
    """One update."""

    batch: str
    method: dict[str, Any]
    """Settings of our method."""
    micro_batches: int = 1
    """Of TRL's update. Ours does not depend on them."""
    trl: dict[str, Any] = field(default_factory=dict)
    """Settings of TRL that ours has not."""


def _group_runs() -> dict[str, Run]:
    """GRPO in all ways; "corrected KL": TRL's default, the KL term weighted by the probability ratio."""
    runs = {}
    for loss_type, scaled in product(("grpo", "dapo", "dr_grpo"), (True, False)):
        method = {**GROUPS, "loss_type": loss_type, "scale_rewards": scaled, "beta": 0.0}
        name = f"grpo, {loss_type}{', scaled' if scaled else ''}"
        runs[name] = Run("groups", method)
        for corrected in (True, False):
            with_kl = f"{name}, {'corrected ' if corrected else ''}KL"
            settings = {"use_bias_correction_kl": corrected}
            runs[with_kl] = Run("groups", {**method, "beta": 0.04}, trl=settings)
            if scaled:
                runs[f"{with_kl}, accumulated"] = replace(runs[with_kl], micro_batches=2)
    return runs


RUNS = {
    "dpo": Run("pairs", {"name": "dpo", "beta": 0.1}),
    "dpo, accumulated": Run("pairs", {"name": "dpo", "beta": 0.3}, micro_batches=2),
    "dpo, reference_free": Run("pairs", {"name": "dpo", "beta": 0.1, "reference_free": True}),
    "ipo": Run("pairs", {"name": "ipo", "beta": 0.1}),
    # TRL's ORPO has the prompt in its supervised part, ours only the answer: with prompts of one token, which nothing
    # predicts, these are the same.
    "orpo": Run("pairs without a prompt", {"name": "orpo", "beta": 0.25}),
    "simpo": Run("pairs", {"name": "simpo", "beta": 2.0, "gamma": 1.0}),
    "kto": Run("labeled", KTO),
    "kto, divergence below 0": Run("labeled, unlikely", KTO),
    "kto, good answers alone": Run("labeled, good", KTO),
    "kto, bad answers alone": Run("labeled, bad", KTO),
    **_group_runs(),
}
OURS = [name for name, run in RUNS.items() if run.trl.get("use_bias_correction_kl", True)]
"""What we compute."""

Batches = dict[str, list[dict[str, Any]]]
Gradients = dict[str, np.ndarray]


@cached
def adapted_model() -> AdaptedModel:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_models.write_model(Path(folder) / "model", "llama")
        adapted = AdaptedModel(load_base_model(schema.ModelConfig(path=str(path))), LORA, seed=0)
        assert adapted.base.tokenizer  # read from the folder at the first use, as the weights are
        mx.eval(adapted.model.parameters())
    adapted.place(
        {
            name: 0.2 * mx.random.normal(array.shape, key=mx.random.key(number))
            for number, (name, array) in enumerate(sorted(adapted.params().items()))
        }
    )
    mx.eval(adapted.model.parameters())
    return adapted


def before_training(params: Params) -> Params:
    return {name: mx.zeros_like(array) if name.endswith("lora_b") else array for name, array in params.items()}


@cached
def build_backend(name: str) -> Backend:
    adapted = adapted_model()
    split_model = split(adapted.model, frozen_blocks=2)
    if name == "cpu":
        return CpuBackend(Engine(adapted.model, chunk=256), split_model)
    return MlxBackend(adapted, split_model, chunk=256)


def token_set(rows: Sequence[tuple[list[int], list[int], bool]]) -> TokenSet:
    """The rows (prompt, answer, whether it is unwanted), as examples of two."""
    tokens = [np.array([*prompt, *answer], np.int32) for prompt, answer, _ in rows]
    masks = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer, _ in rows]
    return TokenSet(
        np.concatenate(tokens),
        np.concatenate(masks),
        np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        np.arange(len(rows), dtype=np.int64),
        np.array([unwanted for *_, unwanted in rows]),
        rows_per_example=2,
    )


def answer_rows(batch: list[dict[str, Any]]) -> TokenSet:
    rows = []
    for row in batch:
        if "good" in row:
            rows += [(row["prompt"], row[name], not row["good"]) for name in ("answer", "mismatched")]
        else:
            rows += [(row["prompt"], row["chosen"], False), (row["prompt"], row["rejected"], True)]
    return token_set(rows)


class GivenAnswers(grpo.GroupMethod):
    """The method with the answers and rewards of `groups` instead of sampled ones."""

    groups: list[dict[str, Any]]

    def _prompt(self, split: str, row: int) -> grpo._Prompt:
        return grpo._Prompt({"number": row}, Question([], "", self.groups[row]["prompt"]))

    def _sample(self, state: TrainState, prompts: list[grpo._Prompt], update: int) -> list[list[list[int]]]:
        return [self.groups[prompt.row["number"]]["answers"] for prompt in prompts]

    def _score(self, prompt: grpo._Prompt, answer: list[int]) -> float:
        group = self.groups[prompt.row["number"]]
        return group["rewards"][group["answers"].index(answer)]


def build_method(
    config: schema.Config, adapted: AdaptedModel, backend: Backend, batch: list[dict[str, Any]]
) -> tuple[Method, TokenSet]:
    def first_params() -> Params:
        return before_training(adapted.params())

    if config.method.name == "grpo":
        data: Any = type("Data", (), {"options": type("Options", (), {"template": TemplateOptions()})})
        method = GivenAnswers(adapted, backend, config, data, first_params, lambda: None, print)
        method.groups = batch
        prompts = token_set([(group["prompt"], [2], False) for group in batch]).grouped(1)
        return method, prompts
    rows = answer_rows(batch)
    reference = Reference(
        backend=backend,
        config=config,
        caches=None,
        base=adapted.base.content_hash,
        fingerprint=BASE,
        params=first_params,
        token_sets={"train": rows},
        check_stop=lambda: None,
        log=lambda line: None,
    )
    log_probs = reference.log_probs if has_reference(config.method) else None
    return PreferenceMethod(backend, config.method, {"train": rows}, log_probs, has_dropout=False), rows


def our_update(
    options: dict[str, Any], batch: list[dict[str, Any]], backend_name: str, micro_batches: int
) -> tuple[float, Gradients, dict[str, float]]:
    """Return the loss, the gradient and the measures of an update of all of `batch`, in one or two micro-batches."""
    adapted = adapted_model()
    config = schema.Config(
        optimizer=schema.OptimizerConfig(name="sgd"), method=schema.MethodConfig(**options), lora=LORA
    )
    config.data.metric = "exact_match"
    config = validation.fill_defaults(config)
    backend = build_backend(backend_name)
    method, rows = build_method(config, adapted, backend, batch)
    builder = BatchBuilder(rows, 8)
    parts = [np.arange(len(batch))] if micro_batches == 1 else [np.arange(1), np.arange(1, len(batch))]
    before = adapted.params()
    state = TrainState(before, build_optimizer(config, before), seed=0)
    divergences: list[np.ndarray] = []
    if config.method.name == "grpo":
        token_weights = method._token_weights

        def record_divergence(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
            weights, kl = token_weights(*arguments)
            divergences.append(kl)
            return weights, kl

        method._token_weights = record_divergence
    step = TrainStep(backend, grad_clip=None, method=method)
    result = step.update(state, [builder(part) for part in parts], LEARNING_RATE)
    grads = {
        name: (np.array(array, np.float64) - np.array(state.params[name], np.float64)) / LEARNING_RATE
        for name, array in before.items()
    }
    adapted.place(before)
    loss = (
        surrogate_loss(config.method, batch, np.concatenate(divergences))
        if config.method.name == "grpo"
        else result.loss
    )
    return loss, grads, {name: total / count for name, (total, count) in result.measures.items() if count}


def surrogate_loss(method: schema.MethodConfig, groups: list[dict[str, Any]], divergences: np.ndarray) -> float:
    """The loss whose gradient the method has; it reports 1 minus the mean reward. `divergences`: of each token."""
    advantages = grpo.group_advantages(np.array([g["rewards"] for g in groups]), scale=bool(method.scale_rewards))
    lengths = np.array([[len(answer) for answer in group["answers"]] for group in groups])
    factors = grpo.token_factors(lengths, str(method.loss_type), int(method.max_new_tokens or 0))
    kl = (divergences * np.repeat(factors.reshape(-1), lengths.reshape(-1))).sum()
    return float(-(advantages * factors * lengths).sum() + (method.beta or 0.0) * kl)


def our_names(trl: dict[str, np.ndarray], run: str) -> Gradients:
    """TRL's gradients of a run by our names, in our layout."""
    prefix = f"{run}/base_model.model."
    return {
        name.removeprefix(prefix).removesuffix(".weight").replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b"): (
            np.asarray(array, np.float64).T
        )
        for name, array in trl.items()
        if name.startswith(prefix)
    }


def run_trl(folder: Path, batches: Batches) -> dict[str, np.ndarray]:
    """Run TRL's trainers in the reference's Python; return its arrays."""
    tiny_models.write_model(folder / "model", "llama")
    adapted = adapted_model()
    config = schema.Config()
    config.model.path = str(folder / "model")
    (folder / "peft").mkdir()
    PeftTarget().write(TrainedAdapter(adapted, adapted.params(), LORA, config, {}, print), folder / "peft")
    cases = {"batches": batches, "runs": {name: asdict(run) for name, run in RUNS.items()}}
    (folder / "cases.json").write_text(json.dumps(cases))
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    program = [python, str(REFERENCE / "trl_gradients.py"), str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "trl.npz") as arrays:
        return dict(arrays)


def their_measures(trl: dict[str, np.ndarray], run: str) -> dict[str, float]:
    """TRL's measures of a run that are defined as ours, by our names."""
    names = {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "kl": "kl",
        "reward": "reward",
    }
    if RUNS[run].method["name"] == "ipo":  # TRL's rewards are of sums over tokens, which are not what IPO compares
        return {}
    if RUNS[run].method["name"] == "kto":
        del names["reward_margin"]  # of answers to different prompts
    if RUNS[run].method["name"] == "grpo":  # TRL's mean of the divergence does not follow the loss type
        del names["kl"]
    found = {ours: f"{run}/measures/{theirs}" for ours, theirs in names.items()}
    return {ours: float(trl[name]) for ours, name in found.items() if name in trl}


def summary(loss: float, grads: Gradients, measures: dict[str, float]) -> dict[str, Any]:
    """What is recorded of a run: of its gradient the norm for each factor, and a dozen entries."""
    flat = np.concatenate([grads[name].reshape(-1) for name in sorted(grads)])
    norms = [np.linalg.norm(grads[name]) for name in sorted(grads)]
    return {
        "loss": _rounded(loss),
        "measures": {name: _rounded(value) for name, value in measures.items()},
        "largest": _rounded(np.abs(flat).max()),
        "norms": [_rounded(norm) for norm in norms],
        "entries": [_rounded(value) for value in flat[np.linspace(0, len(flat) - 1, 12).astype(int)]],
    }


def _rounded(value: Any) -> float:
    return float(f"{value:.7g}")


def their_summary(trl: dict[str, np.ndarray], run: str) -> dict[str, Any]:
    return summary(float(trl[f"{run}/loss"]), our_names(trl, run), their_measures(trl, run))


@cached
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def compare(loss: float, ours: Gradients, their_loss: float, theirs: Gradients) -> tuple[float, float]:
    """Return the difference of the losses, and the largest of the gradients relative to the largest gradient."""
    assert set(ours) == set(theirs)
    largest = max(np.abs(array).max() for array in theirs.values())
    assert largest > 1e-4
    differences = [np.abs(ours[name] - array).max() for name, array in theirs.items()]
    return abs(loss - their_loss), float(max(differences) / largest)
