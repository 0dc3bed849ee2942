"""Runs generated SQL on a small in-memory SQLite database, read-only and within limits.

The limits are counts of instructions, bytes and copies, never times, so that a score is the same on slow and fast
machines. Sources: https://sqlite.org/c3ref/set_authorizer.html,
https://sqlite.org/limits.html and https://sqlite.org/security.html.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from runner.common.errors import DataError
from runner.data.metrics.sql_text import expansion

Value = int | float | str | bytes | None
Result = list[tuple[Value, ...]]

INSTRUCTIONS = 100_000
"""Virtual machine instructions that a statement may execute on a small database."""
INSTRUCTIONS_PER_CELL = 200
"""Additional instructions per stored value, because scans grow with the tables."""
VALUE_BYTES = 4_096
"""Longest value and row that a statement may build, unless the tables contain longer ones."""
EXPANSION = 200
"""Copies that a statement's WITH clauses may expand to: SQLite copies a definition for every mention before it plans,
so a chain of definitions that each mention the previous one twice doubles with every link."""
STATEMENT_BYTES = 20_000

_STRIDE = 500
_TYPE = re.compile(r"[A-Za-z][A-Za-z ]*(\(\d+(,\s*\d+)?\))?|")
_FUNCTIONS = frozenset([
    "abs", "avg", "ceil", "ceiling", "coalesce", "concat", "concat_ws", "count", "cume_dist", "date", "datetime",
    "dense_rank", "exp", "first_value", "floor", "glob", "group_concat", "hex", "ifnull", "iif", "instr",
    "julianday", "lag", "last_value", "lead", "length", "like", "likelihood", "likely", "ln", "log", "log10",
    "log2", "lower", "ltrim", "max", "median", "min", "mod", "nth_value", "ntile", "nullif", "percent_rank", "pow",
    "power", "quote", "rank", "replace", "round", "row_number", "rtrim", "sign", "sqrt", "strftime", "string_agg",
    "substr", "substring", "sum", "time", "timediff", "total", "trim", "trunc", "typeof", "unicode", "unixepoch",
    "unlikely", "upper", "char", "cast",
])  # fmt: skip


class StatementRefused(Exception):
    """The statement is invalid, not permitted, or exceeds a limit."""


class Sandbox:
    """The tables of one row, read-only.

    `tables` maps a name to ``{"columns": [[name, type], ...], "rows": [[value, ...], ...]}``.

    Raises:
        DataError: the tables are malformed.
    """

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self._names = frozenset(name.lower() for name in tables)
        self._remaining = 0
        self._database = sqlite3.connect(":memory:", isolation_level=None)
        # Otherwise a large sort would spill to files in the temporary folder.
        self._database.execute("PRAGMA temp_store=MEMORY")
        try:
            cells, longest = self._create_tables(tables)
        except (sqlite3.Error, sqlite3.Warning, ValueError, TypeError, KeyError, OverflowError) as error:
            self._database.close()
            raise DataError(
                "A row's 'tables' cannot be loaded into SQLite: "
                f'{error}. Expected {{name: {{"columns": [[name, type], ...], "rows": [[value, ...], ...]}}}}.'
            ) from error
        self._budget = INSTRUCTIONS + INSTRUCTIONS_PER_CELL * cells
        self._set_limits(max(VALUE_BYTES, 2 * longest))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def run(self, sql: str, max_rows: int | None = None) -> Result:
        """Return the rows of one statement, at most `max_rows` of them.

        Raises:
            StatementRefused: `sql`, which may be any text, is invalid, not permitted or exceeds a limit.
        """
        if expansion(sql) > EXPANSION:
            raise StatementRefused("the WITH clauses expand to too many copies")
        self._remaining = self._budget // _STRIDE
        try:
            cursor = self._database.execute(sql)
            if cursor.description is None:
                raise StatementRefused("there is no statement")
            return cursor.fetchall() if max_rows is None else cursor.fetchmany(max_rows)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise StatementRefused(str(error)) from error

    def _create_tables(self, tables: Mapping[str, Any]) -> tuple[int, int]:
        """Create the tables; return the number of values and the bytes of the longest row."""
        cells = longest = 0
        for name, table in tables.items():
            columns = [(column, str(kind)) for column, kind in table["columns"]]
            for _, kind in columns:
                if not _TYPE.fullmatch(kind):
                    raise ValueError(f"'{kind}' is not a column type")
            declared = ", ".join(f"{_quoted(column)} {kind}" for column, kind in columns)
            self._database.execute(f"CREATE TABLE {_quoted(name)} ({declared})")
            placeholders = ", ".join("?" * len(columns))
            rows = table["rows"]
            self._database.executemany(f"INSERT INTO {_quoted(name)} VALUES ({placeholders})", rows)
            cells += len(columns) * len(rows)
            longest = max([longest, *(len(str(row).encode()) for row in rows)])
        return cells, longest

    def _set_limits(self, value_bytes: int) -> None:
        limit = self._database.setlimit
        limit(sqlite3.SQLITE_LIMIT_LENGTH, value_bytes)
        limit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, STATEMENT_BYTES)
        limit(sqlite3.SQLITE_LIMIT_COLUMN, 200)
        limit(sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100)
        limit(sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 20)
        limit(sqlite3.SQLITE_LIMIT_VDBE_OP, 50_000)
        limit(sqlite3.SQLITE_LIMIT_FUNCTION_ARG, 20)
        limit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        limit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
        limit(sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1)
        limit(sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0)
        self._database.set_progress_handler(self._on_progress, _STRIDE)
        self._database.set_authorizer(self._authorize)

    def _on_progress(self) -> int:
        self._remaining -= 1
        return int(self._remaining <= 0)

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ:
            # Where rows are only counted, the column name is empty and the table may be the name of a WITH clause.
            allowed = not second or (first or "").lower() in self._names
        elif action == sqlite3.SQLITE_FUNCTION:
            allowed = (second or "").lower() in _FUNCTIONS
        else:
            allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
