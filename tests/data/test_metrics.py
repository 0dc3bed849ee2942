"""Metrics: which answers are correct, and that hostile statements are contained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.errors import DataError
from runner.config.schema import DataConfig
from runner.config.setting import metadata_of
from runner.data.metrics import METRICS
from runner.data.metrics.execution import ExecutionAccuracy, same_result
from runner.data.metrics.sandbox import Sandbox, StatementRefused
from runner.data.metrics.sql_text import expansion, first_statement, is_ordered

SINGERS = {
    "columns": [["id", "INTEGER"], ["name", "TEXT"], ["country", "TEXT"], ["age", "REAL"]],
    "rows": [[1, "Ann", "France", 31.5], [2, "Ben", "Spain", 40], [3, "Cleo", "France", 22], [4, "Dan", None, 57]],
}
COUNT_FOREVER = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
LONG = "'" + "x" * 3_000 + "'"


def row(gold: str) -> dict[str, Any]:
    return {"completion": gold, "tables": {"singer": SINGERS}}


def score(gold: str, text: str) -> float:
    return ExecutionAccuracy().score(row(gold), text)


def test_metrics_are_registered_under_their_names_which_are_the_choices_of_the_setting() -> None:
    assert all(name == metric.name for name, metric in METRICS.items())
    assert set(METRICS) == set(metadata_of(next(f for f in fields(DataConfig) if f.name == "metric")).choices)


def test_exact_match_ignores_whitespace_only() -> None:
    metric = METRICS["exact_match"]
    assert metric.score({"completion": "SELECT  1"}, " SELECT\n1 ") == 1.0
    assert metric.score({"completion": "SELECT 1"}, "select 1") == 0.0


def test_exact_match_compares_with_the_last_assistant_message() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert METRICS["exact_match"].score(chat, "d") == 1.0
    assert METRICS["exact_match"].score(chat, "b") == 0.0


@pytest.mark.parametrize("bad", [{}, {"messages": []}, {"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}])
def test_a_row_without_an_expected_answer_is_an_error(bad: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no answer to compare with"):
        METRICS["exact_match"].score(bad, "x")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT name FROM singer WHERE country = 'France'",
        "select singer.name as who from singer where country in ('France') order by age",
        "```sql\nSELECT name FROM singer\n\nWHERE country = 'France';\n```\nThis lists the names.",
        "Here it is:\n```\nSELECT name FROM singer WHERE country = 'France'",
        "SQL: SELECT name FROM singer WHERE country = 'France';",
        "SELECT name FROM singer\nWHERE country = 'France'\n\nThis gives the names.",
        "SELECT name FROM singer WHERE country = 'France'; DROP TABLE singer",
        "SELECT name FROM singer WHERE country = 'France' -- ; from France",
        "SELECT name FROM singer WHERE country = 'France' AND name <> ';'",
        "WITH f AS (SELECT * FROM singer WHERE country = 'France') SELECT name FROM f",
    ],
)
def test_another_form_of_the_expected_query_scores_1(text: str) -> None:
    assert score("SELECT name FROM singer WHERE country = 'France'", text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "-- nothing",
        "I do not know.",
        "SELECT name FROM singer",
        "SELECT name FROM singer WHERE country = 'Spain'",
        "SELECT name, age FROM singer WHERE country = 'France'",
        "SELECT age FROM singer WHERE country = 'France'",
        "SELECT name FROM singer WHERE country = 'France' LIMIT 1",
        "SELECT name FROM singer WHERE country = 'France' UNION ALL SELECT 'Ann'",
        "SELECT name FROM singers WHERE country = 'France'",
        "SELECT name FROM singer WHERE",
        "SELECT 1; SELECT name FROM singer WHERE country = 'France'",
    ],
)
def test_a_wrong_or_invalid_query_scores_0(text: str) -> None:
    assert score("SELECT name FROM singer WHERE country = 'France'", text) == 0.0


def test_row_order_matters_only_where_the_expected_query_sorts() -> None:
    up, down = "SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age DESC"
    assert score(up, down) == 0.0
    assert score(up, up) == 1.0
    assert score("SELECT name FROM singer", down) == 1.0
    assert score("SELECT name FROM (SELECT * FROM singer ORDER BY age)", down) == 1.0


def test_repeated_rows_matter() -> None:
    assert score("SELECT DISTINCT country FROM singer", "SELECT country FROM singer") == 0.0
    assert score("SELECT country FROM singer", "SELECT DISTINCT country FROM singer") == 0.0


def test_numbers_compare_by_value_with_a_tolerance_for_fractions() -> None:
    assert score("SELECT AVG(age) FROM singer", "SELECT SUM(age) / COUNT(*) FROM singer") == 1.0
    assert score("SELECT 2", "SELECT 2.0") == 1.0
    assert score("SELECT 2", "SELECT '2'") == 0.0
    assert score("SELECT 0.1 + 0.2", "SELECT 0.3") == 1.0
    assert score("SELECT 0.3", "SELECT 0.3001") == 0.0
    assert score("SELECT 10000001", "SELECT 10000002") == 0.0


def test_an_empty_text_scores_0_even_where_the_expected_result_is_empty() -> None:
    nothing = "SELECT name FROM singer WHERE age > 99"
    assert score(nothing, "SELECT name FROM singer WHERE age > 98") == 1.0
    assert score(nothing, "") == 0.0


cells = st.one_of(
    st.none(), st.integers(-5, 5), st.floats(-2, 2), st.sampled_from(["a", "b", "1"]), st.binary(max_size=1)
)


@given(st.lists(st.tuples(cells, cells), max_size=6), st.randoms())
def test_unordered_results_compare_as_multisets(result: list[tuple[Any, ...]], random: Any) -> None:
    mixed = list(result)
    random.shuffle(mixed)
    assert same_result(result, mixed, ordered=False)
    assert same_result(result, result, ordered=True)
    assert not same_result([*result, (None, None)], mixed, ordered=False)


HOSTILE = {
    "attach": "ATTACH 'stolen.db' AS other",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma as a table": "SELECT * FROM pragma_table_info('singer')",
    "insert": "INSERT INTO singer VALUES (9, 'Eve', 'Peru', 1)",
    "insert returning": "INSERT INTO singer VALUES (9, 'Eve', 'Peru', 1) RETURNING name",
    "update": "UPDATE singer SET age = 0",
    "delete": "DELETE FROM singer",
    "drop": "DROP TABLE singer",
    "create": "CREATE TABLE other AS SELECT * FROM singer",
    "temporary view": "CREATE TEMP VIEW v AS SELECT 1",
    "vacuum into": "VACUUM INTO 'stolen.db'",
    "transaction": "BEGIN",
    "schema": "SELECT sql FROM sqlite_master",
    "extension": "SELECT load_extension('evil.so')",
    "file": "SELECT readfile('/etc/passwd')",
    "random": "SELECT random()",
    "endless count": COUNT_FOREVER + "SELECT COUNT(*) FROM c",
    "endless sum": COUNT_FOREVER + "SELECT SUM(x) FROM c WHERE x < 0",
    "endless sort": COUNT_FOREVER + f"SELECT x || {LONG} FROM c ORDER BY 1",
    "endless text": COUNT_FOREVER + f"SELECT group_concat({LONG}) FROM c",
    "a million steps": COUNT_FOREVER + "SELECT COUNT(*) FROM (SELECT x FROM c LIMIT 1000000)",
    "cross join": "SELECT COUNT(*) FROM " + ", ".join(f"singer s{at}" for at in range(12)),
    "zeroblob": "SELECT length(zeroblob(1e9))",
    "zeroblob result": "SELECT zeroblob(1000000000)",
    "randomblob": "SELECT length(randomblob(1000000000))",
    "printf": "SELECT length(printf('%.900000000c', 'x'))",
    "replace": f"SELECT length(replace({LONG}, 'x', {LONG}))",
    "doubling definitions": "WITH a0 AS (SELECT 1 AS x)"
    + "".join(f", a{at} AS (SELECT p.x FROM a{at - 1} p, a{at - 1} q)" for at in range(1, 40))
    + " SELECT COUNT(*) FROM a39",
    "doubling in quotes": "WITH a0 AS (SELECT 1 AS x)"
    + "".join(f', "A{at}" AS/**/(SELECT p.x FROM [a{at - 1}] p, `a{at - 1}` q)' for at in range(1, 40))
    + " SELECT COUNT(*) FROM a39",
    "deep nesting": "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
    "deep sum": "SELECT " + "+".join("1" * 9_000),
    "long statement": "SELECT '" + "x" * 1_000_000 + "'",
    "null byte": "SELECT 1\x00",
    "surrogate": "SELECT '\ud800'",
    "invalid text": "SELECT CAST(x'ff' AS TEXT)",
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_statement_is_refused_and_scores_0(
    attack: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert score("SELECT 1", attack) == 0.0
    with Sandbox({"singer": SINGERS}) as sandbox:
        before = sandbox.run("SELECT * FROM singer")
        with pytest.raises(StatementRefused):
            sandbox.run(attack)
        assert sandbox.run("SELECT * FROM singer") == before
    assert not list(tmp_path.iterdir())


def test_every_statement_has_its_own_instruction_budget() -> None:
    with Sandbox({"singer": SINGERS}) as sandbox:
        for _ in range(3):
            with pytest.raises(StatementRefused):
                sandbox.run(HOSTILE["endless count"])
            assert sandbox.run("SELECT COUNT(*) FROM singer a, singer b, singer c") == [(64,)]


def test_more_than_one_statement_is_refused() -> None:
    with Sandbox({"singer": SINGERS}) as sandbox, pytest.raises(StatementRefused):
        sandbox.run("SELECT 1; SELECT 2")


def test_an_endless_result_is_cut_off_and_scores_0() -> None:
    assert score("SELECT 1", COUNT_FOREVER + "SELECT x FROM c") == 0.0


def test_larger_tables_get_a_larger_instruction_budget() -> None:
    big = {"columns": [["n", "INTEGER"]], "rows": [[number] for number in range(20_000)]}
    with Sandbox({"big": big}) as sandbox:
        assert sandbox.run("SELECT COUNT(*), SUM(n) FROM big WHERE n >= 0") == [(20_000, 199_990_000)]


def test_long_stored_values_can_be_read() -> None:
    text = "long " * 4_000
    tables = {"notes": {"columns": [["body", "TEXT"]], "rows": [[text], ["short"]]}}
    with Sandbox(tables) as sandbox:
        assert sandbox.run("SELECT body FROM notes WHERE body LIKE 'long%'") == [(text,)]


@given(st.text(max_size=80))
def test_no_generated_text_raises(text: str) -> None:
    assert score("SELECT 'never'", text) in (0.0, 1.0)


def test_names_with_quotes_and_spaces_are_loaded() -> None:
    tables = {'odd "name"': {"columns": [['a "b"', "TEXT"], ["order", "INTEGER"]], "rows": [["x", 1]]}}
    with Sandbox(tables) as sandbox:
        assert sandbox.run('SELECT "a ""b""", "order" FROM "odd ""name"""') == [("x", 1)]


@pytest.mark.parametrize(
    "tables",
    [
        {"t": {"rows": [[1]]}},
        {"t": {"columns": [["a", "TEXT"]]}},
        {"t": {"columns": [["a", "TEXT"]], "rows": [[1, 2]]}},
        {"t": {"columns": [["a", "TEXT"]], "rows": [[{"b": 1}]]}},
        {"t": {"columns": [["a", "TEXT); DROP TABLE t"]], "rows": []}},
        {"t": {"columns": [], "rows": []}},
        {"t": [1, 2]},
        {"t": {"columns": [["a", "INTEGER"]], "rows": [[10**30]]}},
    ],
)
def test_malformed_tables_are_a_data_error(tables: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be loaded into SQLite"):
        ExecutionAccuracy().score({"completion": "SELECT 1", "tables": tables}, "SELECT 1")


@pytest.mark.parametrize("tables", [None, {}, [], "singer"])
def test_a_row_without_tables_is_a_data_error(tables: Any) -> None:
    with pytest.raises(DataError, match="needs rows with 'tables'"):
        ExecutionAccuracy().score({"completion": "SELECT 1", "tables": tables}, "SELECT 1")


def test_an_expected_query_that_does_not_run_is_a_data_error() -> None:
    with pytest.raises(DataError, match="does not run: no such column: nme"):
        score("SELECT nme FROM singer", "SELECT 1")


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n /* x */ by a limit 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT 'ORDER BY' FROM t", False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a, RANK() OVER (ORDER BY a) FROM t", False),
    ],
)
def test_only_the_outermost_order_by_makes_a_result_ordered(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


def test_a_statement_ends_at_its_first_semicolon_outside_quotes() -> None:
    assert first_statement("SELECT ';' ; SELECT 2") == "SELECT ';'"
    assert first_statement('SELECT "a;b" /* ; */ FROM t;') == 'SELECT "a;b" /* ; */ FROM t'
    assert first_statement("SELECT 'it''s; fine'") == "SELECT 'it''s; fine'"


def test_expansion_bounds_the_copies_of_definitions() -> None:
    assert expansion("SELECT a FROM t") == 1
    assert expansion("WITH x AS (SELECT 1) SELECT * FROM x") == 1
    assert expansion("WITH x AS (SELECT 1), y(a, b) AS (SELECT * FROM x, x) SELECT * FROM y, y, y") == 6
