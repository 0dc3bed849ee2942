"""Execution accuracy: the generated SQL returns the same as the expected SQL on the tables of the row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.common.errors import DataError
from runner.data.metrics.exact_match import expected_text
from runner.data.metrics.sandbox import Result, Sandbox, StatementRefused, Value
from runner.data.metrics.sql_text import first_statement, is_ordered

TOLERANCE = 1e-6
"""Relative tolerance for fractions; integers compare exactly."""


class ExecutionAccuracy:
    """Scores 1.0 where both statements return the same rows: in order if the expected one sorts, else in any order.

    Column names do not matter, the order of columns does. The row needs ``tables`` (see `Sandbox`) and the expected
    SQL as ``completion`` or as the last assistant turn of ``messages``. This is the execution accuracy of the
    Spider and BIRD benchmarks, on small tables that each row brings along.
    """

    name: str = "execution_accuracy"

    def score(self, row: Mapping[str, Any], text: str) -> float:
        """Return 1.0 or 0.0. Whatever `text` contains, it can only read the tables, within limits.

        Raises:
            DataError: the row has no tables or no expected SQL, or the expected SQL does not run.
        """
        tables = row.get("tables")
        if not isinstance(tables, Mapping) or not tables:
            raise DataError(f"The metric '{self.name}' needs rows with 'tables' to run their SQL on.")
        gold = first_statement(expected_text(row))
        with Sandbox(tables) as sandbox:
            try:
                expected = sandbox.run(gold)
            except StatementRefused as error:
                raise DataError(f"The expected SQL of a row does not run: {error}. It is: {gold}") from error
            try:
                # One row more than expected is enough to know that the answer is wrong.
                generated = sandbox.run(first_statement(text), max_rows=len(expected) + 1)
            except StatementRefused:
                return 0.0
        return float(same_result(expected, generated, ordered=is_ordered(gold)))


def same_result(expected: Result, generated: Result, ordered: bool) -> bool:
    """Return whether two results have equal rows, as lists if `ordered`, else as multisets."""
    if len(expected) != len(generated):
        return False
    if not ordered:
        expected, generated = sorted(expected, key=_sort_key), sorted(generated, key=_sort_key)
    return all(
        len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))
        for left, right in zip(expected, generated, strict=True)
    )


def _equal(left: Value, right: Value) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        return (
            isinstance(left, int | float)
            and isinstance(right, int | float)
            and math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=1e-9)
        )
    return type(left) is type(right) and left == right


def _sort_key(row: tuple[Value, ...]) -> tuple[tuple[int, Any], ...]:
    """Return a key of a total order over mixed types in which numbers that differ only by rounding are equal."""
    return tuple(_cell_key(value) for value in row)


def _cell_key(value: Value) -> tuple[int, Any]:
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, float(f"{value:.9g}") if isinstance(value, float) else value
    return (2, value) if isinstance(value, str) else (3, value)
