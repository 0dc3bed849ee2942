"""Sections of the schema for what a run does: the adapter, its training, the checkpoints and what a sweep compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.common.layout import CHECKPOINTS
from runner.config.setting import MISSING, OnResume, PathKind, section, setting

FREE = OnResume.FREE
METHOD_ANSWERS = {
    "sft": "chosen",
    "dpo": "pairs",
    "ipo": "pairs",
    "orpo": "pairs",
    "simpo": "pairs",
    "kto": "labeled",
    "grpo": "chosen",
}
"""The methods of training, and which answers of the data each reads: see `runner.data.formats.EncodeOptions`."""
_PAIR_MEASURES = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
METHOD_MEASURES = {
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), _PAIR_MEASURES),
    "kto": ("reward_chosen", "reward_rejected", "kl"),
    "grpo": ("reward", "reward_std", "answer_tokens", "kl"),
}
"""What the rows of metrics.jsonl have beside the loss, by method."""
OBJECTIVE_METRICS = ("valid_loss", "test_loss", "score", "reward_accuracy", "tokens_per_second", "peak_memory_gb")
"""The values of objective.metric."""
HIGHER_IS_BETTER = ("score", "reward_accuracy", "tokens_per_second")
"""Those of which a higher one is better, unless objective.direction says otherwise."""
ENDLESS_SCHEDULES = ("constant", "step", "inverse_sqrt")
"""Schedules whose learning rates do not depend on the update at which the run ends."""
DEFAULT_LORA_SCALE = 20.0
"""lora.scale where neither it nor lora.alpha is set, as in mlx-lm."""


@dataclass(kw_only=True)
class LoraConfig:
    """The shape of the adapter."""

    type: str = setting("lora", choices=("lora", "dora", "full"))
    """Method of fine-tuning: lora; dora, which trains the norm of each row as well (arXiv:2402.09353); or full, which
    trains the model's own weights in the chosen blocks, in float32, and has no rank and no factor."""
    rank: int = setting(8, at_least=1, at_most=16_384)
    """Rank of the update matrices."""
    rank_pattern: list[str] | None = setting(None)
    """Ranks that differ by layer, each as KEY:RANK with a key as in lora.keys, such as v_proj:16; the first that names
    a layer counts. lora.alpha is divided by the layer's own rank, as in PEFT; lora.scale holds for all."""
    scale: float | None = setting(None)
    """Factor of the update, as in mlx-lm; null means 20 unless alpha is set."""
    alpha: float | None = setting(None, above=0)
    """Numerator of the factor, as in PEFT, instead of scale: scale = alpha / rank."""
    rslora: bool = setting(False)
    """With alpha: scale = alpha / sqrt(rank) (rank-stabilized LoRA, arXiv:2312.03732)."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout probability on the adapter's input."""
    init: str = setting("default", choices=("default", "pissa"))
    """Start of the factors: default, A random and B zero; or pissa, the principal singular vectors of the weight
    (arXiv:2404.02948), while what the model computes is that of the base all the same."""
    num_layers: int = setting(16, at_least=1, minus_one_is_all=True)
    """Number of transformer blocks to adapt, counted from the last."""
    keys: list[str] | None = setting(None)
    """Layers to adapt; null means every linear layer of the blocks. A key is a layer's name inside a block, its end
    (q_proj), or a glob (self_attn.*), with layers.20-29. or layers.3. in front for blocks by number, from 0; or the
    name of a layer outside of the blocks (embed_tokens, lm_head)."""
    modules_to_save: list[str] | None = setting(None)
    """Modules to train whole, by keys as in lora.keys, such as embed_tokens and lm_head for new tokens; norms too."""
    b_lr_ratio: float | None = setting(None, above=0)
    """Learning rate of the factors B relative to optimizer.learning_rate, which A keeps (LoRA+, arXiv:2402.12354, where
    16 is a usual value); null means that both have the same."""
    dtype: str = setting("float32", choices=("float32", "model"))
    """Data type that the adapter computes in: float32, or model, the base model's own (smaller products on a GPU);
    weights and optimizer state are float32 in both cases."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of the adapter's weights."""

    name: str = setting(MISSING, choices=("adamw", "adam", "sgd", "lion", "adafactor", "muon"))
    """Optimizer; set by the group."""
    learning_rate: float | None = setting(
        None,
        above=0,
        defaults_by={"adamw": 1e-4, "adam": 1e-4, "sgd": 1e-4, "lion": 3e-5, "adafactor": 1e-4, "muon": 2e-3},
    )
    """Peak learning rate (mlx-lm's default of 1e-5 hardly moves an adapter of rank 8)."""
    betas: list[float] | None = setting(
        None,
        length=2,
        at_least=0,
        below=1,
        defaults_by={"adamw": [0.9, 0.999], "adam": [0.9, 0.999], "lion": [0.9, 0.99]},
    )
    """Decay rates of the first and the second moment; with lion, those of the update's and of the stored momentum."""
    eps: float | None = setting(None, above=0, defaults_by={"adamw": 1e-8, "adam": 1e-8, "adafactor": 1e-30})
    """Term added to the denominator for numerical stability; with adafactor, to the squares of the gradient."""
    bias_correction: bool | None = setting(None, defaults_by={"adamw": True, "adam": True})
    """Correct the moments for their start at zero, as in the Adam paper (mlx-lm's default is not to, which makes the
    first updates about three times too large)."""
    weight_decay: float | None = setting(
        None, at_least=0, defaults_by={"adamw": 0.01, "sgd": 0.0, "lion": 0.0, "adafactor": 0.0, "muon": 0.0}
    )
    """Weight decay; added to the gradient with sgd and muon, decoupled from it with the others."""
    momentum: float | None = setting(None, defaults_by={"sgd": 0.0, "muon": 0.95})
    """Momentum factor."""
    nesterov: bool | None = setting(None, defaults_by={"sgd": False, "muon": True})
    """Nesterov momentum; needs momentum above 0."""
    ns_steps: int | None = setting(None, added_later=True, at_least=1, at_most=100, defaults_by={"muon": 5})
    """Iterations of Newton-Schulz that make the update of a matrix orthogonal."""
    beta1: float | None = setting(None, added_later=True, at_least=0, below=1, defaults_by={"adafactor": None})
    """Decay rate of a first moment; null keeps none, which takes less memory."""
    decay_rate: float | None = setting(None, added_later=True, below=0, defaults_by={"adafactor": -0.8})
    """Exponent of the update in the decay rate of the second moment: 1 - update ** decay_rate."""
    clip_threshold: float | None = setting(None, added_later=True, above=0, defaults_by={"adafactor": 1.0})
    """Largest root mean square of an array's update, before the learning rate."""
    scale_parameter: bool | None = setting(None, added_later=True, defaults_by={"adafactor": False})
    """Multiply the learning rate by the root mean square of the array's weights, or by 0.001 where that is larger, as
    in the Adafactor paper. The second factor of an adapter begins at zero, so that it hardly moves."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the updates."""

    name: str = setting(
        MISSING,
        choices=(
            "constant",
            "linear",
            "cosine",
            "exponential",
            "cosine_with_restarts",
            "wsd",
            "step",
            "inverse_sqrt",
        ),
    )
    """Shape of the schedule; set by the group."""
    warmup: int = setting(0, at_least=0)
    """Number of updates over which the learning rate rises linearly to its peak."""
    iters: int | None = setting(None, at_least=1)
    """Update at which the schedule ends; null means train.iters; constant, step and inverse_sqrt have no end."""
    end: float | None = setting(
        None,
        at_least=0,
        defaults_by={"linear": 0.0, "cosine": 0.0, "exponential": 1e-6, "cosine_with_restarts": 0.0, "wsd": 0.0},
    )
    """Learning rate of the last update; must be above 0 with exponential."""
    cycles: int | None = setting(None, added_later=True, at_least=1, defaults_by={"cosine_with_restarts": 2})
    """Number of times that the learning rate falls from its peak to the end, each as long as the others."""
    decay: float | None = setting(None, added_later=True, above=0, defaults_by={"wsd": 0.2})
    """Updates over which the learning rate falls at the end: below 1 a fraction of the schedule, from 1 on a number."""
    decay_shape: str | None = setting(
        None, added_later=True, choices=("linear", "cosine", "sqrt"), defaults_by={"wsd": "linear"}
    )
    """How it falls: in a straight line, in half a cosine, or as 1 - sqrt (arXiv:2405.18392)."""
    step_size: int | None = setting(None, added_later=True, at_least=1, defaults_by={"step": 200})
    """Updates between two decreases."""
    gamma: float | None = setting(None, added_later=True, above=0, at_most=1, defaults_by={"step": 0.5})
    """Factor of each decrease."""
    timescale: int | None = setting(None, added_later=True, at_least=1, defaults_by={"inverse_sqrt": None})
    """Updates after the peak until the learning rate is peak / sqrt(2); null means schedule.warmup, and 10,000
    without a warmup."""


@dataclass(kw_only=True)
class MethodConfig:
    """What training minimizes. Losses and names are those of TRL."""

    name: str = setting("sft", choices=tuple(METHOD_ANSWERS), added_later=True)
    """Training method: sft (supervised fine-tuning); dpo, ipo, orpo, simpo on pairs of a better and a worse answer; kto
    on answers that are each good or bad; grpo on answers that the model samples and data.metric scores."""
    beta: float | None = setting(
        None,
        at_least=0,
        defaults_by={"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1, "grpo": 0.0},
        added_later=True,
    )
    """dpo, ipo, kto: how strongly the model is held to the reference, the model as it was before training. orpo: weight
    of the odds ratio. simpo: scale of the rewards. grpo: weight of the KL divergence from the reference."""
    reference_free: bool | None = setting(None, defaults_by={"dpo": False, "ipo": False}, added_later=True)
    """Compare with a reference that finds all answers equally likely, instead of the model before training."""
    gamma: float | None = setting(None, at_least=0, defaults_by={"simpo": 1.0}, added_later=True)
    """Margin by which the reward of the better answer has to exceed that of the worse one."""
    desirable_weight: float | None = setting(None, above=0, defaults_by={"kto": 1.0}, added_later=True)
    """Weight of the good answers."""
    undesirable_weight: float | None = setting(None, above=0, defaults_by={"kto": 1.0}, added_later=True)
    """Weight of the bad answers."""
    group_size: int | None = setting(None, at_least=2, at_most=1024, defaults_by={"grpo": 8}, added_later=True)
    """Answers sampled for each prompt, whose rewards are compared with one another."""
    max_new_tokens: int | None = setting(None, at_least=1, defaults_by={"grpo": 96}, added_later=True)
    """Maximum length of a sampled answer, in tokens."""
    scale_rewards: bool | None = setting(None, defaults_by={"grpo": True}, added_later=True)
    """Divide the advantages of a prompt's answers by the standard deviation of their rewards."""
    loss_type: str | None = setting(
        None, choices=("grpo", "dapo", "dr_grpo"), defaults_by={"grpo": "dapo"}, added_later=True
    )
    """How the tokens of an update are averaged: grpo, within each answer first; dapo, over all tokens; dr_grpo, over
    the number of answers times max_new_tokens, so that an answer's length does not matter."""


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """Stopping when the validation loss no longer improves."""

    patience: int | None = setting(None, at_least=1, on_resume=FREE)
    """Number of evaluations in a row without improvement before training stops; null never stops."""
    min_delta: float = setting(0.0, at_least=0, on_resume=FREE)
    """Smallest decrease of the loss that counts as an improvement."""


@dataclass(kw_only=True)
class HiddenCacheConfig:
    """Cache of the hidden states that the frozen blocks below the first adapted block compute for each row."""

    enabled: bool = setting(True, on_resume=FREE)
    """Compute the frozen blocks once per row and cache their output (no effect if all blocks are
    adapted: lora.num_layers=-1)."""
    memory_gb: float = setting(0.25, at_least=0, on_resume=FREE)
    """Size limit in memory, in GB."""
    disk_gb: float = setting(8.0, at_least=0, on_resume=FREE)
    """Size limit on disk, in GB, shared by all runs; the least recently used entries are removed. 0 uses no disk."""
    folder: str | None = setting(None, path=PathKind.OUTPUT, on_resume=FREE)
    """Folder on disk; null means trunk/ in the cache folder (RUNNER_CACHE, else ~/.cache/mlx-runner)."""
    free_frozen_weights: bool = setting(True, on_resume=FREE)
    """Free the weights of the frozen blocks when every row is on disk; they are reloaded if an entry is lost."""


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop: its length, its batches, what is computed how and what is reported."""

    iters: int = setting(1000, at_least=1, at_most=10**12, on_resume=FREE, shown_as_result_setting=True)
    """Number of optimizer updates."""
    epochs: float | None = setting(None, above=0, at_most=10**9, on_resume=FREE, shown_as_result_setting=True)
    """Number of passes over the training rows; where it is set, train.iters is computed from it and stored."""
    batch_size: int = setting(4, at_least=1, at_most=1_000_000)
    """Number of rows in a micro-batch."""
    grad_accumulation: int = setting(1, at_least=1)
    """Number of micro-batches per update, weighted by their supervised tokens."""
    rows_at_once: int | None = setting(None, at_least=1, on_resume=FREE)
    """Rows of a micro-batch to compute at a time, for less memory; null computes all. The gradients of its parts are
    summed, so that an update is the same but for rounding, and for what lora.dropout and neftune_alpha draw."""
    grad_clip: float | None = setting(None, above=0)
    """Maximum norm of the gradient; null does not clip."""
    neftune_alpha: float | None = setting(None, above=0, added_later=True)
    """Add uniform noise of up to alpha / sqrt(tokens * hidden size) to the embeddings of each row in training (NEFTune,
    arXiv:2310.05914, where 5 is a usual value); null adds none. Hidden states of frozen blocks are not cached then."""
    averaging_power: float | None = setting(None, at_least=0, at_most=1000, added_later=True)
    """Weight averaging: what is evaluated, and the adapter of checkpoints and the result, is the mean of the weights
    after each update, those after update t weighted by about t**averaging_power (arXiv:1212.1824; 3 is a good value);
    null takes the last weights. It helps most where the learning rate does not fall."""
    on_nonfinite: str = setting("stop", choices=("stop", "skip"), on_resume=FREE)
    """What happens at an update whose loss or gradient is not finite: stop ends the run as diverged; skip leaves the
    weights and the optimizer as they are and continues with the next rows."""
    nonfinite_limit: int = setting(10, at_least=1, on_resume=FREE)
    """With on_nonfinite=skip, how many updates in a row may be skipped; one more ends the run as diverged."""
    grad_checkpoint: bool = setting(False, on_resume=FREE)
    """Recompute activations in the backward pass: less memory, about 1.4 times the time."""
    compile: str = setting("auto", choices=("auto", "always", "never"), on_resume=FREE)
    """Compile the step with mx.compile; auto does so except on the CPU, where each new shape costs seconds."""
    report_every: int = setting(10, at_least=1, on_resume=FREE)
    """Updates between reports of the training loss."""
    eval_every: int = setting(200, at_least=1, on_resume=FREE)
    """Updates between evaluations, in addition to one before the first update and one at the end."""
    eval_at: list[int] = setting([], at_least=1, on_resume=FREE)
    """Steps after which the run evaluates, too; a search has its rungs here."""
    eval_batches: int = setting(-1, at_least=1, minus_one_is_all=True, on_resume=FREE)
    """Number of batches, of train.batch_size rows each, that an evaluation covers."""
    eval_tokens: int = setting(2048, at_least=1, on_resume=FREE)
    """Maximum tokens (padding included) to compute at a time: batches are merged up to it, the rows stay the same."""
    cache_baseline: bool = setting(True, on_resume=FREE)
    """Cache the validation loss before training: runs on the same base model and data compute it once."""
    cache_probes: bool = setting(True, on_resume=FREE)
    """Cache whether the optimized code paths passed their comparison with the plain model, per base model, settings,
    machine and code."""
    head: str = setting("supervised", choices=("supervised", "all"), on_resume=FREE)
    """Positions whose logits are computed: supervised, or all (more memory)."""
    loss_chunk: int = setting(256, at_least=1, on_resume=FREE)
    """Number of supervised positions whose logits are in memory at a time."""
    hidden_cache: HiddenCacheConfig = section(HiddenCacheConfig)
    prefetch: bool = setting(True, on_resume=FREE)
    """Prepare the next batch while the current step runs."""
    cpu_engine: bool = setting(True, on_resume=FREE)
    """On the CPU, compute supported models with the engine of NumPy and BLAS, which is faster there than MLX."""
    cpu_native: bool = setting(True, on_resume=FREE)
    """In that engine, use C code compiled once by this machine's compiler; NumPy if there is no compiler."""
    test: bool = setting(False, on_resume=FREE)
    """Evaluate the result on the test split at the end."""
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig)
    cache_limit_gb: float | None = setting(None, above=0, on_resume=FREE)
    """Limit of MLX's cache of freed buffers, in GB; it is emptied between updates when it is more than half full. null
    means an eighth of the memory that a GPU should work in, because cached buffers stay wired and Metal reclaims them
    only when 95 % of it is used; on the CPU, MLX's own limit."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are retained."""

    every: int | None = setting(100, at_least=1, on_resume=FREE)
    """Updates between checkpoints; null saves none on schedule."""
    every_minutes: float | None = setting(None, above=0, on_resume=FREE)
    """Also save when this many minutes have passed since the last checkpoint."""
    keep_last: int = setting(3, at_least=0, on_resume=FREE)
    """Number of the most recent scheduled checkpoints to retain."""
    keep_best: int = setting(1, at_least=0, on_resume=FREE)
    """Number of the best checkpoints, by validation loss, to retain."""
    keep_every: int | None = setting(None, at_least=1, on_resume=FREE)
    """Retain every checkpoint at a multiple of this many updates."""
    result: str = setting("best", choices=("best", "last"), on_resume=FREE)
    """Checkpoint that becomes adapters/: the best by validation loss, or the last (also without validation rows)."""
    dir: str = setting(CHECKPOINTS, path=PathKind.RUN_SUBFOLDER)
    """Folder of the checkpoints inside the run directory."""
    background: bool = setting(True, on_resume=FREE)
    """Write checkpoints while training continues; false makes the step wait for its save."""
    backup: str | None = setting(None, path=PathKind.OUTPUT, on_resume=FREE)
    """Folder on a second disk that the best, every keep_every-th and the final checkpoint are copied to."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The value by which the jobs of a sweep are compared."""

    metric: Any = setting("valid_loss", choices=OBJECTIVE_METRICS, several=True, on_resume=FREE)
    """valid_loss means the lowest validation loss of the run; test_loss needs train.test=true; score needs
    data.metric_rows; reward_accuracy, that of the evaluation with the lowest loss, needs a method of pairs;
    tokens_per_second is all tokens trained on by the time in updates; peak_memory_gb the highest of the run.
    With several, as [valid_loss,tokens_per_second], the jobs of the Pareto front come first, ranked by the first."""
    direction: Any = setting(None, choices=("minimize", "maximize"), several=True, on_resume=FREE)
    """Whether a lower or a higher value is better, of several metrics a list; null means what the metric says: higher
    for score, reward_accuracy and tokens_per_second."""
