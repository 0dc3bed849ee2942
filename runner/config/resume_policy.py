"""What a resumed run may change: a pure function of the stored settings, the new ones and the step."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from runner.common.errors import ConfigError
from runner.config.schema import PROVENANCE, Config, flatten, format_value

# What a resumed run may change. All else is frozen: it decides the path of the run.
FREE_ON_RESUME = (
    *PROVENANCE,
    "adapter",
    "model.path",  # the fingerprint decides
    "model.revision",
    "model.trust_remote_code",
    "data.path",  # the fingerprint decides
    "data.metric",
    "data.metric_split",
    "data.metric_rows",
    "data.max_new_tokens",
    "data.cache",
    "data.cache_gb",
    "data.cache_folder",
    "train.iters",  # judged by may_extend
    "train.report_every",
    "train.eval_every",
    "train.eval_batches",
    "train.eval_tokens",
    "train.cache_baseline",
    "train.cache_probes",
    "train.loss_chunk",  # named where it differs, as the trunk
    "train.hidden_cache",
    "train.head",
    "train.cpu_engine",
    "train.cpu_native",
    "train.prefetch",
    "train.test",
    "train.early_stopping",
    "train.cache_limit_gb",
    "train.grad_checkpoint",
    "train.compile",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
    "checkpoint.result",
    "checkpoint.background",
    "checkpoint.backup",
    "loggers",
    "objective",
)


def iters_may_change(config: Config) -> bool:
    """Whether train.iters may change on resume: only where the learning rate of past updates does not depend on it."""
    return config.schedule.name == "constant" or config.schedule.iters is not None


def is_free_on_resume(name: str) -> bool:
    """Whether the setting may change when a run goes on; the others decide the path of the run."""
    return _matches(name, FREE_ON_RESUME)


def frozen_fingerprint(settings: Config) -> str:
    """SHA-256 (hex) over the frozen settings."""
    frozen = {name: value for name, value in flatten(settings).items() if not is_free_on_resume(name)}
    return hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode()).hexdigest()


def changes_on_resume(stored: Config, now: Config, step: int) -> dict[str, tuple[Any, Any]]:
    """The settings that `now` changes of a run stored at `step`, as name to (stored, now), invocation aside.

    Raises:
        ConfigError: a change of a frozen setting, with the difference.
    """
    before, after = flatten(stored), flatten(now)
    changed = {n: (before[n], after[n]) for n in after if before[n] != after[n] and not _matches(n, PROVENANCE)}
    frozen = {n: pair for n, pair in changed.items() if not is_free_on_resume(n)}
    problems = [
        f"{n} was {format_value(old)} and cannot become {format_value(new)} on resume."
        for n, (old, new) in frozen.items()
    ]
    if "train.iters" in changed:
        old, new = changed["train.iters"]
        if not iters_may_change(stored):
            problems.append(
                f"train.iters was {old} and cannot become {new}: the {stored.schedule.name} schedule ends at "
                "train.iters, so the updates already made would have had other learning rates."
            )
        elif new < step:
            problems.append(f"train.iters={new} lies before update {step}, where the run stands.")
    if problems:
        problems.append(
            "A new run with changed settings: repeat=RUN; with these weights as its start: adapter=RUN/adapters."
        )
        raise ConfigError("\n".join(problems))
    return changed


def _matches(name: str, settings: tuple[str, ...]) -> bool:
    return any(name == s or name.startswith(f"{s}.") for s in settings)
