"""Generate the default data set: questions about small tables, and the SQL that answers them.

    python -m tools.text_to_sql.generate [--out DIR]     # train.jsonl, valid.jsonl, test.jsonl
    python -m tools.text_to_sql.generate --check         # compare the shipped files with the generated rows

The rows depend on `SEED` and the vocabulary alone. README.md of the data set describes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.text_to_sql.aggregates import AGGREGATED
from tools.text_to_sql.content import Scene, draw_pair, draw_single
from tools.text_to_sql.draw import Draw
from tools.text_to_sql.intents import ONE_TABLE, Example, Intent, NotApplicable
from tools.text_to_sql.joined import JOINED
from tools.text_to_sql.query import is_discriminating
from tools.text_to_sql.ranked import RANKED
from tools.text_to_sql.vocabulary import Topic, read_topics

OUTPUT_FOLDER = Path(__file__).resolve().parent.parent.parent / "runner" / "data" / "sets" / "text_to_sql"
SEED = "text-to-sql-1"
ROWS = {"train": 3000, "valid": 200, "test": 300}
MAX_TRIES = 40
"""Tables that are drawn for one intent before another intent is drawn."""

Row = dict[str, object]
Choice = tuple[Intent, str, int, bool | None]
"""Intent, difficulty, weight, and for two tables whether every parent needs a child (None for one table)."""


def generate_rows(split: str) -> Iterator[Row]:
    """Yield the rows of a split, cycling through its topics; no two rows have the same prompt."""
    topics = read_topics(split)
    seen: set[str] = set()
    for number in range(ROWS[split]):
        draw = Draw(f"{SEED}/{split}/{number}")
        while (row := _row(draw, topics[number % len(topics)])) is None or row["prompt"] in seen:
            continue
        seen.add(str(row["prompt"]))
        yield row


def _row(draw: Draw, topic: Topic) -> Row | None:
    intents: list[Choice] = [(*entry, None) for entry in (*ONE_TABLE, *AGGREGATED, *RANKED)]
    intents += JOINED if topic.link else ()
    intent, difficulty, _, covered = _weighted(draw, intents)
    for _ in range(MAX_TRIES):
        scene = draw_single(draw, topic) if covered is None else draw_pair(draw, topic, covered)
        try:
            example = intent(scene)
        except NotApplicable:
            continue
        tables = {table.name: table.as_json() for table in scene.tables}
        if is_discriminating(example.query, tables):
            return _as_row(draw, scene, example, difficulty, tables)
    return None


def _weighted(draw: Draw, intents: list[Choice]) -> Choice:
    left = draw.below(sum(weight for _, _, weight, _ in intents))
    for entry in intents:
        left -= entry[2]
        if left < 0:
            return entry
    raise AssertionError("the weights do not add up")


def _as_row(draw: Draw, scene: Scene, example: Example, difficulty: str, tables: Mapping[str, object]) -> Row:
    schemas = [table.schema() for table in scene.tables]
    if draw.chance(0.5):
        schemas.reverse()
    prompt = "\n".join([*schemas, f"Question: {example.question}", "SQL:"])
    return {"prompt": prompt, "completion": example.query.sql(), "difficulty": difficulty, "tables": tables}


def render_split(split: str) -> str:
    """Return the content of the split's file."""
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in generate_rows(split))


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them with --check; return 0, or 1 if a file differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=OUTPUT_FOLDER, help="folder to write into (default: the set that ships)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the files in --out")
    options = parser.parse_args(arguments)
    different = []
    for split in ROWS:
        path = options.out / f"{split}.jsonl"
        data = render_split(split).encode()
        if not options.check:
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        elif not path.is_file() or path.read_bytes() != data:
            different.append(str(path))
    for path in different:
        print(
            f"{path} differs from the generated rows; run the generator without --check to rewrite it.", file=sys.stderr
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
