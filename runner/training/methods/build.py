"""Building the configured method of a run."""

from __future__ import annotations

from collections.abc import Callable

from runner.backends.protocol import Backend
from runner.config.schema import METHOD_ANSWERS, Config, MethodConfig
from runner.data.tokenize import TokenizedDataset
from runner.models.hidden_cache import HiddenStateCaches
from runner.models.lora import AdaptedModel, Params
from runner.training.methods.answer_losses import WITH_REFERENCE
from runner.training.methods.grpo import GroupMethod
from runner.training.methods.method import Method
from runner.training.methods.preference import PreferenceMethod
from runner.training.methods.reference import Reference
from runner.training.methods.supervised import SupervisedMethod
from runner.training.world import ALONE, World


def build_method(
    config: Config,
    adapted: AdaptedModel,
    backend: Backend,
    data: TokenizedDataset,
    caches: HiddenStateCaches | None,
    *,
    reference_fingerprint: str,
    reference_params: Callable[[], Params],
    check_stop: Callable[[], None],
    log: Callable[[str], None],
    world: World = ALONE,
) -> Method:
    """Build the method of `config`; `reference_params` returns the adapter before training, of that fingerprint."""
    method = config.method
    if METHOD_ANSWERS[method.name] == "chosen":
        if method.name == "sft":
            return SupervisedMethod(backend, world)
        return GroupMethod(adapted, backend, config, data, reference_params, check_stop, log, world)
    token_sets = {"train": data.train, "valid": data.valid, "test": data.test}
    reference = Reference(
        backend=backend,
        config=config,
        caches=caches,
        base=adapted.base.content_hash,
        fingerprint=reference_fingerprint,
        params=reference_params,
        token_sets=token_sets,
        check_stop=check_stop,
        log=log,
        world=world,
    )
    return PreferenceMethod(
        backend,
        method,
        token_sets,
        reference.log_probs if has_reference(method) else None,
        has_dropout=config.lora.dropout > 0,
        world=world,
    )


def has_reference(method: MethodConfig) -> bool:
    """Return whether the method compares with the model as it was before training."""
    if method.name == "grpo":
        return bool(method.beta)
    return method.name in WITH_REFERENCE and not method.reference_free
