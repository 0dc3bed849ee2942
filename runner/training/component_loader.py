"""Loads what the jobs of a sweep in one process share: base model, data, baselines and hidden-state caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from typing import Any

from runner.backends.hidden_caches import hidden_caches
from runner.backends.protocol import Backend
from runner.config import schema
from runner.data.formats import EncodeOptions
from runner.data.source import find_sources
from runner.data.token_cache import open_token_cache
from runner.data.tokenize import TokenizedDataset, load_sources
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.load import BaseModel, load_base_model
from runner.models.precision import resolve_auto
from runner.training.baseline import Baseline, load_baseline

_MEASURES = 2
"""Version of what methods measure beside their loss: a stored baseline of another one is not used."""


class ComponentLoader:
    """Loads the base model and the data of runs, and returns the last ones again to a run that has the same.

    The jobs of a sweep in one process share an instance; any other run has its own. Sharing does not change what a job
    computes: the base model is frozen and returned without its adapter, and a baseline equals what the job would
    compute.
    """

    def __init__(self) -> None:
        # Each with the key that it was loaded for.
        self._base: tuple[Any, BaseModel] | None = None
        self._data: tuple[Any, TokenizedDataset] | None = None
        self._caches: tuple[Any, HiddenStateCaches | None] | None = None
        self._baselines: dict[Any, Baseline] = {}

    def base(self, config: schema.ModelConfig, precision: Mapping[str, str] | None = None) -> BaseModel:
        """Return the configured base model; load it unless it is the last job's.

        `precision`: what `auto` meant when the run began; None means that it begins here.
        """
        config = resolve_auto(config, precision)
        key = astuple(config)
        if self._base is None or self._base[0] != key:
            self._base = self._data = None  # two base models may not fit into memory
            self._baselines.clear()
            self.close()
            self._base = (key, load_base_model(config))
        return self._base[1]

    def data(self, config: schema.Config, base: BaseModel, check_stop: Callable[[], None]) -> TokenizedDataset:
        """Return the configured data, tokenized for `base`; `check_stop` is called meanwhile and may raise to stop."""
        options = EncodeOptions.from_config(config.data, config.method.name)
        sources = find_sources(config.data, config.method.name)
        key = (sources, options, config.data.valid_fraction, base.fingerprint)
        if self._data is None or self._data[0] != key:
            self._data = None
            self.close()
            data = load_sources(
                sources,
                base.lazy_tokenizer,
                options,
                cache=open_token_cache(config.data),
                check_stop=check_stop,
                valid_fraction=config.data.valid_fraction,
            )
            self._data = (key, data)
        return self._data[1]

    def hidden_caches(
        self,
        backend: Backend,
        base: BaseModel,
        config: schema.Config,
        print_line: Callable[[str], None],
    ) -> HiddenStateCaches | None:
        """Return the hidden-state caches of `backend`'s frozen blocks; the last job's if it had the same."""
        frozen_blocks = backend.split_model.frozen_blocks
        key = (base.fingerprint, frozen_blocks, backend.kernel_version, astuple(config.train.hidden_cache))
        if self._caches is None or self._caches[0] != key:
            self.close()
            self._caches = (key, hidden_caches(backend, base, config, print_line))
        elif self._caches[1]:
            self._caches[1].set_compute(backend.run_frozen_blocks)
        return self._caches[1]

    def baseline(
        self, config: schema.Config, base: BaseModel, data: TokenizedDataset, numeric_environment: Mapping[str, Any]
    ) -> Baseline:
        """Return the baseline of `base` on `data`; a run with a warm start does not share its own.

        `numeric_environment`: what the last digits depend on, as a checkpoint records it.
        """
        if config.adapter or config.method.name == "grpo":  # whose validation loss depends on much more
            return Baseline()
        d, t = config.data, config.train
        validation_key: dict[str, Any] = {
            "base": base.content_hash,
            "rows": data.valid.fingerprint,
            "batches": (t.batch_size, t.eval_batches, t.eval_tokens, d.pad_to),
            "environment": {**numeric_environment, **numeric_platform()},
            **({"method": asdict(config.method), "measures": _MEASURES} if config.method.name != "sft" else {}),
        }
        template = EncodeOptions.from_config(d).template
        generation_key = (
            str(find_sources(d)),
            d.valid_fraction,
            d.chat_template,
            d.system_prompt,
            str(template),
            d.metric,
            d.metric_split,
            d.metric_rows,
            d.max_new_tokens,
        )
        key = (json.dumps(validation_key, sort_keys=True, default=str), generation_key)
        if key not in self._baselines:
            self._baselines[key] = load_baseline(validation_key) if t.cache_baseline else Baseline()
        return self._baselines[key]

    def close(self) -> None:
        """Close the files of the hidden-state caches."""
        if self._caches and self._caches[1]:
            self._caches[1].close()
        self._caches = None
