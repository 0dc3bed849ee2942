"""The data report: what a tokenized data set holds and what was left out, as one plain document."""

from __future__ import annotations

from typing import Any

import numpy as np

from runner.data.duplicates import Duplicates, RowId, find_duplicates
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset

_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_BINS = 10
_EXAMPLES = 3


def data_report(data: TokenizedDataset, rows: int) -> dict[str, Any]:
    """Return the report on `data`, with the first `rows` rows of train as text, tokens and supervised ranges."""
    splits = {split: getattr(data, split) for split in data.parts}
    duplicates = find_duplicates(splits)
    return {
        "splits": {split: _describe(data, split, token_set, duplicates) for split, token_set in splits.items()},
        "in_train_and": {
            split: {
                "exact": _pairs(data, duplicates.between(duplicates.exact, split, "train")),
                "near": _pairs(data, duplicates.between(duplicates.near, split, "train")),
            }
            for split in splits
            if split != "train" and "train" in splits
        },
        "notes": data.notes,
        "rows": [shown_row(data, "train", row) for row in range(min(rows, len(data.train)))],
    }


def shown_row(data: TokenizedDataset, split: str, row: int) -> dict[str, Any]:
    """Return a row with its location, its text, its tokens and the half-open ranges of its supervised tokens."""
    tokens, supervised = getattr(data, split).row(row)
    file, line = data.locate(split, row)
    return {
        "split": split,
        "file": str(file),
        "line": line,
        "text": data.decode(tokens),
        "tokens": [int(token) for token in tokens],
        "supervised": supervised_ranges(supervised),
    }


def supervised_ranges(supervised: np.ndarray) -> list[list[int]]:
    """Return the half-open ranges in which `supervised`, (length,) bool, is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    return [[int(start), int(end)] for start, end in edges.reshape(-1, 2)]


def _describe(data: TokenizedDataset, split: str, token_set: TokenSet, duplicates: Duplicates) -> dict[str, Any]:
    stats, lengths = data.stats[split], token_set.lengths
    edges = np.linspace(lengths.min(), lengths.max() + 1, min(_BINS, int(np.ptp(lengths)) + 1) + 1)
    counts, _ = np.histogram(lengths, np.floor(edges))
    return {
        "files": [str(part.file) for part in data.parts[split]],
        "rows": stats.rows,
        "tokens": stats.tokens,
        "supervised_tokens": stats.supervised,
        "supervised_share": round(stats.supervised / stats.tokens, 4),
        "lengths": {name: int(np.quantile(lengths, share, method="higher")) for name, share in _QUANTILES.items()},
        "longest_before_cut": stats.longest,
        "histogram": [
            {"from": int(start), "below": int(end), "rows": int(count)}
            for start, end, count in zip(np.floor(edges[:-1]), np.floor(edges[1:]), counts, strict=True)
        ],
        "cut": stats.truncated,
        "dropped_too_long": stats.dropped,
        "prompt_too_long": stats.prompt_too_long,
        "without_supervised_token": stats.unsupervised,
        "rendered_turn_by_turn": stats.split,
        "template_notes": stats.template_notes(split),
        "compared": duplicates.compared[split],
        "exact_duplicates": _pairs(data, duplicates.between(duplicates.exact, split, split)),
        "near_duplicates": _pairs(data, duplicates.between(duplicates.near, split, split)),
    }


def _pairs(data: TokenizedDataset, pairs: list[tuple[RowId, RowId]]) -> dict[str, Any]:
    """Return the number of source rows that repeat another one, and the locations of the first.

    A conversation that is rendered turn by turn is one source row: it counts once, and does not repeat itself.
    """
    located = dict.fromkeys((data.locate(*later), data.locate(*first)) for later, first in pairs)
    different = [(later, first) for later, first in located if later != first]
    examples = [[f"{file.name}:{line}" for file, line in pair] for pair in different[:_EXAMPLES]]
    return {"rows": len({later for later, _ in different}), "examples": examples}
