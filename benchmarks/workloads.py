"""The two data sets as JSONL: ``python -m benchmarks.workloads MODEL NAME TRAIN VALID`` writes one.

``short``: the default data, short supervised answers after longer prompts. ``mixed``: functions of this Python's
standard library, the signature as prompt and the body as completion, chosen so that the lengths have a median of 60
tokens and a 90th percentile of 500, whatever the Python. Rows are cut at 512 tokens.
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import json
import math
import statistics
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAMES = ("short", "mixed")
MAX_LENGTH = 512
MEDIAN, NINETIETH = 60, 500
LONGEST = 2000
"""Tokens of the longest row of ``mixed`` before the cut."""
POOL = 4000
"""Functions to choose from."""
SPLITS = ("train", "valid")
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


@dataclass(frozen=True)
class Statistics:
    """Statistics of one split's tokens, with the chat template and truncated to 512 per row."""

    rows: int
    tokens: int
    supervised: int
    median: float
    ninetieth: float
    cut: int
    """Number of truncated rows."""

    def __str__(self) -> str:
        share = self.supervised / self.tokens
        return (
            f"{self.rows} rows, {self.tokens:,} tokens (median {self.median:g}, 90th percentile {self.ninetieth:g}, "
            f"{self.cut} cut at {MAX_LENGTH}), {share:.0%} supervised"
        )


def quantiles(count: int) -> list[int]:
    """Return `count` (2 or more) ascending row lengths: log-normal with MEDIAN and NINETIETH, up to LONGEST."""
    normal = statistics.NormalDist()
    sigma = math.log(NINETIETH / MEDIAN) / normal.inv_cdf(0.9)
    shares = (min(max(i / (count - 1), 0.5 / count), 1 - 0.5 / count) for i in range(count))
    return [min(LONGEST, round(MEDIAN * math.exp(sigma * normal.inv_cdf(share)))) for share in shares]


def nearest(lengths: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return, for each wanted length, the index of the unused row of the nearest length.

    Raises ValueError where there are fewer rows than wanted.
    """
    if len(wanted) > len(lengths):
        raise ValueError(f"{len(wanted)} rows wanted, {len(lengths)} there")
    free = sorted((length, index) for index, length in enumerate(lengths))
    chosen = []
    for want in wanted:
        at = bisect.bisect_left(free, (want, -1))
        around = [i for i in (at - 1, at) if 0 <= i < len(free)]
        best = min(around, key=lambda i: abs(free[i][0] - want))
        chosen.append(free.pop(best)[1])
    return chosen


def functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield signature and body of each function and method in the Python files under `folder`, without duplicates."""
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        if _LEFT_OUT & set(file.relative_to(folder).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # the standard library holds files with deliberate errors
            continue
        lines = text.splitlines(keepends=True)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(inner for one in classes for inner in one.body)]:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.body[0].lineno == node.lineno:
                continue
            begin, middle, end = node.lineno - 1, node.body[0].lineno - 1, node.end_lineno
            whole = textwrap.dedent("".join(lines[begin:end])).splitlines(keepends=True)
            prompt, completion = "".join(whole[: middle - begin]), "".join(whole[middle - begin :])
            if completion.strip() and prompt + completion not in seen:
                seen.add(prompt + completion)
                yield prompt.rstrip("\n"), completion.rstrip("\n")


def _short(train: int, valid: int) -> dict[str, list[dict[str, str]]]:
    """Return evenly spaced rows of the default data set."""
    from runner.data.source import find_dataset, find_split_files

    files = find_split_files(find_dataset("builtin:text_to_sql"))
    made = {}
    for split, count in zip(SPLITS, (train, valid), strict=True):
        lines = [line for file in files[split] for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [json.loads(line) for line in lines]
        if count > len(rows):
            raise SystemExit(f"short: {count} {split} rows wanted, {len(rows)} there")
        picked = [rows[i * len(rows) // count] for i in range(count)]
        made[split] = [{key: row[key] for key in ("prompt", "completion")} for row in picked]
    return made


def _mixed(train: int, valid: int, encoder: Any) -> dict[str, list[dict[str, str]]]:
    """Return functions whose lengths follow `quantiles`, in an order independent of length."""
    library = Path(sysconfig.get_path("stdlib"))
    pool = sorted(functions(library), key=lambda pair: hashlib.sha256("".join(pair).encode()).digest())
    rows, lengths = [], []
    for prompt, completion in pool[:POOL]:
        question = {"role": "user", "content": prompt}
        # Stock mlx-lm divides by zero where the truncation leaves no supervised token.
        if len(encoder.encode_chat([question], add_generation_prompt=True)) < MAX_LENGTH // 2:
            rows.append({"prompt": prompt, "completion": completion})
            lengths.append(len(encoder.encode_chat([question, {"role": "assistant", "content": completion}])))
    made = {}
    for split, count in zip(SPLITS, (train, valid), strict=True):
        taken = set(nearest(lengths, quantiles(count)))
        made[split] = [rows[i] for i in sorted(taken)]
        rows = [row for i, row in enumerate(rows) if i not in taken]
        lengths = [length for i, length in enumerate(lengths) if i not in taken]
    return made


def make(model: str, name: str, train: int, valid: int) -> dict[str, Any]:
    """Write the data set `name` unless it exists; return its ``folder`` and the statistics of each split."""
    from runner.backends import blas

    blas.load_blas()
    from mlx_lm.utils import load_tokenizer

    from benchmarks.models import cache
    from runner.common.atomic_io import create_atomically
    from runner.data.text_encoder import TextEncoder

    version = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode() + model.encode()).hexdigest()[:12]
    folder = cache() / "data" / f"{name}-{train}-{valid}-{version}"
    tokenizer = load_tokenizer(Path(model))
    if not folder.is_dir():
        rows = _short(train, valid) if name == "short" else _mixed(train, valid, TextEncoder(tokenizer))
        with create_atomically(folder, is_folder=True) as new_folder:
            for split in SPLITS:
                text = "".join(json.dumps(row) + "\n" for row in rows[split])
                (new_folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    found = _statistics(folder, tokenizer)
    if name == "mixed" and train >= 20:
        check_mixed(found["train"])
    return {"folder": str(folder), "statistics": {split: asdict(part) for split, part in found.items()}}


def check_mixed(found: Statistics) -> None:
    """Raise SystemExit if the lengths of the rows are not those of the workload."""
    off = max(abs(found.median / MEDIAN - 1), abs(found.ninetieth / NINETIETH - 1))
    if off > 0.15:
        raise SystemExit(f"mixed: median {MEDIAN} and 90th percentile {NINETIETH} wanted, not {found}")


def _statistics(folder: Path, tokenizer: Any) -> dict[str, Statistics]:
    import numpy as np

    from runner.data.tokenize import load_dataset

    data = load_dataset(str(folder), tokenizer, encode_options(), SPLITS)
    found = {}
    for split in SPLITS:
        lengths, counts = getattr(data, split).lengths.tolist(), data.stats[split]
        found[split] = Statistics(
            rows=counts.rows,
            tokens=counts.tokens,
            supervised=counts.supervised,
            median=statistics.median(lengths),
            ninetieth=float(np.quantile(lengths, 0.9)),
            cut=counts.truncated,
        )
    return found


def encode_options() -> Any:
    """Return options with which `runner` encodes rows as stock mlx-lm does: only answers are supervised."""
    from runner.config.schema import DataConfig
    from runner.data.formats import EncodeOptions

    return EncodeOptions.from_config(DataConfig(format="completions", max_length=MAX_LENGTH))


if __name__ == "__main__":
    print(json.dumps(make(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
