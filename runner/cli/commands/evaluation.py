"""Loss, perplexity and metric of adapters on one split: the data is read once, and the model serves all of them."""

from __future__ import annotations

import math
from typing import Any

from runner.backends.hidden_caches import hidden_caches
from runner.backends.select import select_backend
from runner.cli.commands.arguments import print_note
from runner.cli.commands.load_adapter import LoadedAdapter
from runner.config.schema import Config
from runner.data.tokenize import load_data
from runner.training.dataloader import evaluation_loader
from runner.training.generate import GenerationResult, answer_rows
from runner.training.methods.build import build_method, has_reference
from runner.training.methods.reference import BASE, params_fingerprint
from runner.training.start_adapter import warm_started_params


class SplitEvaluation:
    """A split of a run's data, and the model that is measured on it."""

    def __init__(self, loaded: LoadedAdapter, config: Config, split: str, metric_rows: int) -> None:
        """`metric_rows`: rows to answer and score, -1 for all, 0 for none.

        Raises:
            DataError: the rows cannot be read.
        """
        self._loaded, self._config = loaded, config
        data = load_data(config, loaded.base.lazy_tokenizer, (split,))
        for note in data.notes:
            print_note(note)
        rows = getattr(data, split)
        assert loaded.adapted is not None
        self._backend = select_backend(loaded.adapted, config, int(rows.lengths.max()) if len(rows) else None)
        caches = hidden_caches(self._backend, loaded.base, config, print_note)
        self._batches = evaluation_loader(rows, config, caches)
        reference = loaded.adapted.without_effect(loaded.fresh)
        if has_reference(config.method) and config.adapter:
            print_note(f"the reference is adapter={config.adapter} as it is now")
            reference = warm_started_params(config, loaded.fresh, loaded.adapted)
        self._method = build_method(
            config,
            loaded.adapted,
            self._backend,
            data,
            caches,
            reference_fingerprint=params_fingerprint(reference) if config.adapter else BASE,
            reference_params=lambda: reference,
            check_stop=lambda: None,
            log=print_note,
        )
        self._questions = data.first_rows(split, metric_rows) if metric_rows else []
        self._split = split

    def measure(self) -> tuple[dict[str, Any], GenerationResult | None]:
        """Measure the adapter that is attached now; return the fields of the JSON document, and the scored answers."""
        assert self._loaded.adapted is not None
        tested = self._method.evaluate(self._loaded.adapted.params(), self._split, self._batches, lambda: None)
        perplexity = math.exp(min(tested.loss, 700))  # beyond it a float overflows
        fields: dict[str, Any] = {
            "rows": self._batches.row_count,
            "loss": tested.loss,
            **({"perplexity": perplexity} if self._config.method.name == "sft" else tested.measures),
            "supervised_tokens": tested.supervised,
            "tokens": tested.tokens,
            "seconds": round(tested.seconds, 3),
        }
        if not self._questions:
            return fields, None
        print_note(f"answering {len(self._questions)} {self._split} rows")
        scored = answer_rows(self._loaded.base, self._questions, self._config, log=print_note)
        return {**fields, "metric": self._config.data.metric, "score": scored.score}, scored
