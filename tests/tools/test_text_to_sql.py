"""The shipped text-to-SQL data set and its generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.data.metrics import METRICS
from runner.data.metrics.sandbox import Sandbox
from tools.text_to_sql import generate
from tools.text_to_sql.query import Condition, Query, is_discriminating

COUNTS = {"train": 3000, "valid": 200, "test": 300}
SPLITS = tuple(COUNTS)
SHARED_COLUMNS = {"id", "name"}


def shipped(split: str) -> list[dict[str, Any]]:
    lines = (generate.OUTPUT_FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {split: shipped(split) for split in SPLITS}


def table_and_column_names(rows: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Table names and column names, in lower case."""
    tables = {name.lower() for row in rows for name in row["tables"]}
    columns = {pair[0].lower() for row in rows for table in row["tables"].values() for pair in table["columns"]}
    return tables, columns


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_well_formed(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    assert len(rows[split]) == COUNTS[split]
    for row in rows[split]:
        assert set(row) == {"prompt", "completion", "difficulty", "tables"}
        assert row["difficulty"] in ("easy", "medium", "hard")
        *schemas, question, last = row["prompt"].split("\n")
        assert question.startswith("Question: ") and len(question) > len("Question: ") + 5 and last == "SQL:"
        assert not any(sign in question for sign in "[]{}|~") and "  " not in question
        described = {
            f"Table {name}({', '.join(pair[0] for pair in table['columns'])})" for name, table in row["tables"].items()
        }
        assert set(schemas) == described
        for table in row["tables"].values():
            assert 8 <= len(table["rows"]) <= 15
            assert all(len(cells) == len(table["columns"]) for cells in table["rows"])
        assert row["completion"].startswith("SELECT ") and ";" not in row["completion"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_query_has_a_result_and_scores_1(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    metric = METRICS["execution_accuracy"]
    for row in rows[split]:
        with Sandbox(row["tables"]) as sandbox:
            result = sandbox.run(row["completion"])
        assert result and all(value is not None for cells in result for value in cells), row["completion"]
        assert metric.score(row, row["completion"]) == 1.0


@pytest.mark.parametrize("split", SPLITS)
def test_values_of_conditions_occur_in_the_question(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    for row in rows[split]:
        question = row["prompt"].split("Question: ")[1].lower()
        for quoted in row["completion"].split("'")[1::2]:
            assert quoted.strip("%").lower() in question, row["prompt"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_query_without_its_where_clause_scores_0(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    metric = METRICS["execution_accuracy"]
    plain = [row for row in rows[split] if " WHERE " in row["completion"] and "(SELECT" not in row["completion"]]
    assert len(plain) > len(rows[split]) / 3
    for row in plain:
        head, tail = row["completion"].split(" WHERE ")
        ends = [at for word in (" GROUP BY", " ORDER BY", " LIMIT") if (at := tail.find(word)) >= 0]
        assert metric.score(row, head + (tail[min(ends) :] if ends else "")) == 0.0, row["completion"]


def test_splits_share_no_table_and_no_column(rows: dict[str, list[dict[str, Any]]]) -> None:
    for left, right in (("train", "valid"), ("train", "test"), ("valid", "test")):
        tables, columns = zip(table_and_column_names(rows[left]), table_and_column_names(rows[right]), strict=True)
        assert not tables[0] & tables[1]
        assert columns[0] & columns[1] <= SHARED_COLUMNS


def test_no_prompt_occurs_twice(rows: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [row["prompt"] for split in SPLITS for row in rows[split]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_covers_the_sql_constructs(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    text = "\n".join(row["completion"] for row in rows[split])
    for words in ("COUNT(*)", "SUM(", "AVG(", "MIN(", "MAX(", "LIKE", "BETWEEN", " IN (", " OR ", " AND ", "<>"):
        assert words in text
    for words in ("GROUP BY", "HAVING", "DISTINCT", "ORDER BY", "LIMIT", " JOIN ", "(SELECT "):
        assert words in text
    kinds = [row["difficulty"] for row in rows[split]]
    assert all(kinds.count(kind) >= len(kinds) / 5 for kind in ("easy", "medium", "hard"))


@pytest.mark.parametrize("split", ["valid", "test", pytest.param("train", marks=pytest.mark.slow)])
def test_the_generator_reproduces_the_shipped_bytes(split: str) -> None:
    assert generate.render_split(split).encode() == (generate.OUTPUT_FOLDER / f"{split}.jsonl").read_bytes()


def test_check_reports_the_file_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "ROWS", {"valid": 3, "test": 3})
    assert generate.main(["--out", str(tmp_path)]) == 0
    assert generate.main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert generate.main(["--out", str(tmp_path), "--check"]) == 1
    error = capsys.readouterr().err
    assert "test.jsonl differs" in error and "valid.jsonl" not in error


def table(*ages: int) -> dict[str, object]:
    columns = [["name", "TEXT"], ["age", "INTEGER"]]
    return {"singer": {"columns": columns, "rows": [[f"n{at}", age] for at, age in enumerate(ages)]}}


def test_tables_on_which_a_near_miss_agrees_are_rejected() -> None:
    query = Query("name", "singer", (Condition("age > 30", ("age >= 30",)),))
    assert is_discriminating(query, table(20, 30, 40))
    assert not is_discriminating(query, table(20, 25, 40))  # nobody is 30: >= would agree
    assert not is_discriminating(query, table(40, 50))  # without the condition it would agree
    assert not is_discriminating(query, table(10, 30))  # no result


def test_tables_with_a_tie_in_the_order_are_rejected() -> None:
    query = Query("name", "singer", order="age", descending=True, limit=1)
    assert is_discriminating(query, table(20, 30, 40))
    assert not is_discriminating(query, table(20, 40, 40))
