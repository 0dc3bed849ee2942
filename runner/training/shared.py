"""What the jobs of a sweep in one process share: base model, tokenised data, and the values before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

from runner.backends.cpu.blas import BlasReport
from runner.config import schema
from runner.data.formats import EncodeOptions
from runner.data.from_config import encode_options, token_cache_from
from runner.data.tokenize import TokenizedDataset, load_dataset
from runner.models.forward import Forward
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.load import BaseModel, load_base_model
from runner.training.baseline import Baseline, load_baseline
from runner.training.feeding import make_hidden_caches


class SharedComponents:
    """Keeps the last base model and the last data set, and every baseline of theirs; a plain run has one of its own.

    Nothing here changes what a job computes: the base is frozen and given back without its adapter, and a baseline
    is the very value that the job would compute.
    """

    def __init__(self) -> None:
        self._base: tuple[Any, BaseModel] | None = None
        self._data: tuple[Any, TokenizedDataset, EncodeOptions] | None = None
        self._baselines: dict[Any, Baseline] = {}
        self._trunks: tuple[Any, HiddenStateCaches | None] | None = None

    def base(self, settings: schema.ModelConfig) -> BaseModel:
        """The base model of `settings`, loaded where the last job had another."""
        key = astuple(settings)
        if self._base is None or self._base[0] != key:
            self._base = self._data = None  # two bases need not fit into memory at once
            self._baselines.clear()
            self._let_go_of_trunks()
            self._base = (key, load_base_model(settings))
        return self._base[1]

    def data(
        self, settings: schema.DataConfig, base: BaseModel, each: Callable[[], None]
    ) -> tuple[TokenizedDataset, EncodeOptions]:
        """The data set of `settings` as tokens of `base`'s tokenizer, and how its rows are read.

        `each` is called while rows are tokenised, and may raise.
        """
        reading = encode_options(settings)
        key = (settings.path, reading, base.fingerprint)
        if self._data is None or self._data[0] != key:
            self._data = None
            self._let_go_of_trunks()
            data = load_dataset(
                settings.path, base.lazy_tokenizer, reading, cache=token_cache_from(settings), each=each
            )
            self._data = (key, data, reading)
        return self._data[1], self._data[2]

    def hidden_caches(
        self,
        forward: Forward,
        base: BaseModel,
        settings: schema.Config,
        blas: BlasReport,
        say: Callable[[str], None],
    ) -> HiddenStateCaches | None:
        """The trunk's cache at `forward`'s cut, the last job's where it had the same."""
        engine = forward.engine and forward.engine.identity
        key = (base.fingerprint, forward.cut, engine, astuple(settings.train.hidden_cache))
        if self._trunks is None or self._trunks[0] != key:
            self._let_go_of_trunks()
            self._trunks = (key, make_hidden_caches(forward, base, settings, blas, say))
        elif self._trunks[1]:
            self._trunks[1].use(forward)
        return self._trunks[1]

    def close(self) -> None:
        """Let go of files; what is shared is not used again."""
        self._let_go_of_trunks()

    def _let_go_of_trunks(self) -> None:
        if self._trunks and self._trunks[1]:
            self._trunks[1].close()
        self._trunks = None

    def baseline(
        self, settings: schema.Config, base: BaseModel, data: TokenizedDataset, environment: Mapping[str, Any]
    ) -> Baseline:
        """The values before training, empty where no job has computed them yet; a warm start has its own.

        `environment`: what the numbers depend on, as a checkpoint records it.
        """
        if settings.adapter:
            return Baseline()
        d, t = settings.data, settings.train
        batches = (t.batch_size, t.eval_batches, t.eval_tokens, d.pad_to)
        # The last digits are those of the way that computes them.
        way = {**environment, **numeric_platform()}
        losses = {"base": base.content_hash, "rows": data.valid.fingerprint, "batches": batches, "way": way}
        answers = (d.path, d.chat_template, d.metric, d.metric_split, d.metric_rows, d.max_new_tokens)
        key = (json.dumps(losses, sort_keys=True, default=str), answers)
        if key not in self._baselines:
            self._baselines[key] = load_baseline(losses) if t.cache_baseline else Baseline()
        return self._baselines[key]
