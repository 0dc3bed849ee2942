"""Losses and gradients of TRL's trainers, on given token ids.

The folder holds the model, `model/`, an adapter in PEFT's format, `peft/`, and `cases.json`: batches of token ids and
runs (a method with its options, and the batch). Each run's trainer is built as its users build it, with a new adapter,
so that the reference is the base model; the weights of `peft/` then stand in for some training. One training step of
the trainer gives the loss and the gradients, written to `trl.npz` as RUN/loss, RUN/PARAMETER and
RUN/measures/NAME, its logged means. Needs torch,
transformers, peft, trl and datasets, in a separate environment:

    python tests/training/methods/reference/trl_gradients.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

Case = dict[str, Any]
TEXT = {"prompt": "p", "chosen": "c", "rejected": "r"}
"""A row for the constructors; the token ids of the training step are those of the case."""


def build(trainer_class: type, config: Any, folder: Path, rows: list[dict[str, Any]], **arguments: Any) -> Trainer:
    adapter = LoraConfig.from_pretrained(folder / "peft")
    adapter.inference_mode = False
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", dtype=torch.float32)
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adapter,
        **arguments,
    )
    found = set_peft_model_state_dict(trainer.model, load_file(folder / "peft" / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    return trainer


def options(folder: Path, micro_batches: int, **extra: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": micro_batches,
        **extra,
    }


def preferences(folder: Path, case: Case, run: Case) -> tuple[Trainer, Callable[[list[Case]], Any]]:
    """dpo and ipo."""
    method = run["method"]
    loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[method["name"]]
    config = DPOConfig(loss_type=loss_type, beta=method["beta"], **options(folder, run["micro_batches"]))
    trainer = build(DPOTrainer, config, folder, [TEXT])
    # TRL has no setting for it any more; reference log-probabilities that were computed before are read from the batch.
    trainer.precompute_ref_logps = bool(method.get("reference_free"))

    def collate(rows: list[Case]) -> Any:
        batch = trainer.data_collator([{f"{name}_ids": row[name] for name in TEXT} for row in rows])
        return {**batch, "ref_chosen_logps": torch.zeros(len(rows)), "ref_rejected_logps": torch.zeros(len(rows))}

    return trainer, collate


def without_reference(folder: Path, case: Case, run: Case) -> tuple[Trainer, Callable[[list[Case]], Any]]:
    """orpo and simpo."""
    method, common = run["method"], options(folder, run["micro_batches"], max_length=64)
    if method["name"] == "orpo":
        trainer = build(ORPOTrainer, ORPOConfig(beta=method["beta"], **common), folder, [TEXT])
    else:
        config = CPOConfig(loss_type="simpo", cpo_alpha=0.0, beta=method["beta"], simpo_gamma=method["gamma"], **common)
        trainer = build(CPOTrainer, config, folder, [TEXT])

    def collate(rows: list[Case]) -> Any:
        examples = []
        for row in rows:
            example = {}
            for name in ("chosen", "rejected"):
                ids = row["prompt"] + row[name]
                example[f"{name}_input_ids"] = ids
                example[f"{name}_attention_mask"] = [1] * len(ids)
                example[f"{name}_labels"] = [-100] * len(row["prompt"]) + row[name]
            examples.append(example)
        return trainer.data_collator(examples)

    return trainer, collate


def kto(folder: Path, case: Case, run: Case) -> tuple[Trainer, Callable[[list[Case]], Any]]:
    settings = {name: run["method"][name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    trainer = build(KTOTrainer, KTOConfig(**settings, **options(folder, run["micro_batches"])), folder, rows)

    def collate(rows: list[Case]) -> Any:
        return trainer.data_collator(
            [
                {
                    "prompt_ids": row["prompt"],
                    "completion_ids": row["answer"],
                    "KL_completion_ids": row["mismatched"],
                    "label": row["good"],
                }
                for row in rows
            ]
        )

    return trainer, collate


def grpo(folder: Path, case: Case, run: Case) -> Trainer:
    """A trainer that gets the answers and the rewards of the case instead of sampling."""
    method, groups = run["method"], case["batches"][run["batch"]]
    size = method["group_size"]
    config = GRPOConfig(
        beta=method["beta"],
        loss_type=method["loss_type"],
        scale_rewards="group" if method["scale_rewards"] else "none",
        temperature=1.0,
        max_completion_length=method["max_new_tokens"],
        num_generations=size,
        per_device_train_batch_size=len(groups) * size // run["micro_batches"],
        **options(folder, run["micro_batches"], **run["trl"]),
    )

    def answers(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        assert prompts == [str(number) for number in range(len(groups)) for _ in range(size)]
        return {
            "prompt_ids": [group["prompt"] for group in groups for _ in range(size)],
            "completion_ids": [answer for group in groups for answer in group["answers"]],
            "logprobs": None,
            "given": [reward for group in groups for reward in group["rewards"]],
        }

    def reward(completions: list[str], given: list[float], **other: Any) -> list[float]:
        return given

    rows = [{"prompt": str(number)} for number in range(len(groups))]
    return build(GRPOTrainer, config, folder, rows, reward_funcs=reward, rollout_func=answers)


BUILDERS = {"dpo": preferences, "ipo": preferences, "orpo": without_reference, "simpo": without_reference, "kto": kto}


def step(folder: Path, case: Case, run: Case) -> dict[str, Any]:
    """Return the loss, the gradients and the measures of one update."""
    count, rows = run["micro_batches"], case["batches"][run["batch"]]
    if run["method"]["name"] == "grpo":
        trainer = grpo(folder, case, run)
        prompts = [{"prompt": str(i)} for i in range(len(rows)) for _ in range(run["method"]["group_size"])]
        batches = [prompts] * count  # the answers are made once for the update, and buffered
    else:
        trainer, collate = BUILDERS[run["method"]["name"]](folder, case, run)
        size = len(rows) // count
        assert size * count == len(rows)
        batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    trainer.current_gradient_accumulation_steps = count
    loss = sum(float(trainer.training_step(trainer.model, batch, None)) for batch in batches)
    logged = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    measures = {f"measures/{name}": np.mean(values) for name, values in logged["train"].items()}
    grads = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    assert grads and all(".lora_" in name for name in grads)
    return {"loss": np.float64(loss), **grads, **measures}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    case = json.loads((folder / "cases.json").read_text())
    arrays = {}
    for name, run in case["runs"].items():
        arrays |= {f"{name}/{key}": value for key, value in step(folder, case, run).items()}
    np.savez(folder / "trl.npz", **arrays)


if __name__ == "__main__":
    main()
