"""Runs SQL from a model on a small in-memory SQLite database that it can neither change nor leave.

Everything that ends a statement is counted, in instructions, bytes or copies, never timed, so a score is
the same on a slow and on a fast machine. Sources: https://sqlite.org/c3ref/set_authorizer.html,
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
"""Virtual machine instructions that a statement may take on a small database."""
INSTRUCTIONS_PER_CELL = 200
"""What each stored value adds to that: scans grow with the rows of the data set."""
VALUE_BYTES = 4_096
"""The longest value and row that a statement may build, unless the data set itself holds longer ones."""
EXPANSION = 200
"""Copies that a statement's WITH clauses may unfold into: SQLite copies one for each mention before it plans, so a
chain of definitions that each name the one before twice doubles with every link."""
STATEMENT_BYTES = 20_000

_STRIDE = 500
_TYPE = re.compile(r"[A-Za-z][A-Za-z ]*(\(\d+(,\s*\d+)?\))?|")
_FUNCTIONS = frozenset(
    [
        "abs",
        "avg",
        "ceil",
        "ceiling",
        "coalesce",
        "concat",
        "concat_ws",
        "count",
        "cume_dist",
        "date",
        "datetime",
        "dense_rank",
        "exp",
        "first_value",
        "floor",
        "glob",
        "group_concat",
        "hex",
        "ifnull",
        "iif",
        "instr",
        "julianday",
        "lag",
        "last_value",
        "lead",
        "length",
        "like",
        "likelihood",
        "likely",
        "ln",
        "log",
        "log10",
        "log2",
        "lower",
        "ltrim",
        "max",
        "median",
        "min",
        "mod",
        "nth_value",
        "ntile",
        "nullif",
        "percent_rank",
        "pow",
        "power",
        "quote",
        "rank",
        "replace",
        "round",
        "row_number",
        "rtrim",
        "sign",
        "sqrt",
        "strftime",
        "string_agg",
        "substr",
        "substring",
        "sum",
        "time",
        "timediff",
        "total",
        "trim",
        "trunc",
        "typeof",
        "unicode",
        "unixepoch",
        "unlikely",
        "upper",
        "char",
        "cast",
    ]
)


class StatementRefused(Exception):
    """The statement is not valid, not permitted, or took more than it may."""


class Sandbox:
    """The tables of one row, read only.

    `tables` maps a name to ``{"columns": [[name, type], ...], "rows": [[value, ...], ...]}``.

    Raises:
        DataError: the tables are malformed.
    """

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self._names = frozenset(name.lower() for name in tables)
        self._left = 0
        self._database = sqlite3.connect(":memory:", isolation_level=None)
        # Without it a large sort would spill into files of the machine's temporary folder.
        self._database.execute("PRAGMA temp_store=MEMORY")
        try:
            cells, longest = self._fill(tables)
        except (sqlite3.Error, sqlite3.Warning, ValueError, TypeError, KeyError, OverflowError) as error:
            self._database.close()
            raise DataError(
                "A row's 'tables' cannot be loaded into SQLite: "
                f'{error}. Expected {{name: {{"columns": [[name, type], ...], "rows": [[value, ...], ...]}}}}.'
            ) from error
        self._budget = INSTRUCTIONS + INSTRUCTIONS_PER_CELL * cells
        self._confine(max(VALUE_BYTES, 2 * longest))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def run(self, sql: str, most_rows: int | None = None) -> Result:
        """The rows of one statement, the first `most_rows` of them where that is given.

        Raises:
            StatementRefused: see its class; `sql` may be any text.
        """
        if expansion(sql) > EXPANSION:
            raise StatementRefused("the WITH clauses unfold into too many copies")
        self._left = self._budget // _STRIDE
        try:
            cursor = self._database.execute(sql)
            if cursor.description is None:
                raise StatementRefused("there is no statement")
            return cursor.fetchall() if most_rows is None else cursor.fetchmany(most_rows)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise StatementRefused(str(error)) from error

    def _fill(self, tables: Mapping[str, Any]) -> tuple[int, int]:
        """Creates the tables; the number of values and the bytes of the longest row."""
        cells = longest = 0
        for name, table in tables.items():
            columns = [(column, str(kind)) for column, kind in table["columns"]]
            for _, kind in columns:
                if not _TYPE.fullmatch(kind):
                    raise ValueError(f"'{kind}' is not a column type")
            declared = ", ".join(f"{_quoted(column)} {kind}" for column, kind in columns)
            self._database.execute(f"CREATE TABLE {_quoted(name)} ({declared})")
            marks = ", ".join("?" * len(columns))
            rows = table["rows"]
            self._database.executemany(f"INSERT INTO {_quoted(name)} VALUES ({marks})", rows)
            cells += len(columns) * len(rows)
            longest = max([longest, *(len(str(row).encode()) for row in rows)])
        return cells, longest

    def _confine(self, value_bytes: int) -> None:
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
        self._database.set_progress_handler(self._out_of_instructions, _STRIDE)
        self._database.set_authorizer(self._authorize)

    def _out_of_instructions(self) -> int:
        self._left -= 1
        return int(self._left <= 0)

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ:
            # SQLite asks with an empty column name where rows are only counted, with a WITH name as table then.
            allowed = not second or (first or "").lower() in self._names
        elif action == sqlite3.SQLITE_FUNCTION:
            allowed = (second or "").lower() in _FUNCTIONS
        else:
            allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
