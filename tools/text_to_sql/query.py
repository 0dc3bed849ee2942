"""A SELECT in parts, its SQL, and the near misses that its tables must distinguish from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from runner.data.metrics.execution import same_result
from runner.data.metrics.sandbox import Sandbox, StatementRefused


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition in SQL with its near misses, such as another comparison or half of a range."""

    sql: str
    near: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """A SELECT statement in parts.

    `source` is the table or the join. `wrong_selects` and `wrong_orders` are select lists and sort keys that must give
    another result; `equivalent_selects` are other readings of the select list, which must give the same result.
    """

    select: str
    source: str
    where: tuple[Condition, ...] = ()
    connective: str = "AND"
    group: str = ""
    having: Condition | None = None
    order: str = ""
    descending: bool = False
    limit: int = 0
    offset: int = 0
    distinct: bool = False
    wrong_selects: tuple[str, ...] = ()
    wrong_orders: tuple[str, ...] = ()
    equivalent_selects: tuple[str, ...] = ()

    def sql(self) -> str:
        parts = [f"SELECT {'DISTINCT ' * self.distinct}{self.select} FROM {self.source}"]
        if self.where:
            parts.append("WHERE " + f" {self.connective} ".join(condition.sql for condition in self.where))
        if self.group:
            parts.append(f"GROUP BY {self.group}")
        if self.having:
            parts.append(f"HAVING {self.having.sql}")
        if self.order:
            parts.append(f"ORDER BY {self.order}{' DESC' * self.descending}")
        if self.limit:
            parts.append(f"LIMIT {self.limit}")
        if self.offset:
            parts.append(f"OFFSET {self.offset}")
        return " ".join(parts)

    def near_misses(self) -> Iterator[Query]:
        """Yield queries with one part wrong or missing."""
        for index, condition in enumerate(self.where):
            before, after = self.where[:index], self.where[index + 1 :]
            yield replace(self, where=before + after)
            for near in condition.near:
                yield replace(self, where=(*before, Condition(near), *after))
        if len(self.where) > 1:
            yield replace(self, connective="OR" if self.connective == "AND" else "AND")
        if self.having:
            for near in ("", *self.having.near):
                yield replace(self, having=Condition(near) if near else None)
        for select in self.wrong_selects:
            yield replace(self, select=select)
        if self.order:
            yield replace(self, descending=not self.descending)
            for order in ("", *self.wrong_orders):
                yield replace(self, order=order)
        if self.limit:
            yield replace(self, limit=0, offset=0)
        if self.offset:
            yield replace(self, offset=0)
        if self.distinct:
            yield replace(self, distinct=False)


def is_discriminating(query: Query, tables: Mapping[str, object]) -> bool:
    """Return whether on these tables the query has a result, without NULL or ties, that no near miss shares."""
    with Sandbox(tables) as sandbox:
        gold = sandbox.run(query.sql())
        if not gold or any(value is None for row in gold for value in row):
            return False
        for select in query.equivalent_selects:
            if not same_result(gold, sandbox.run(replace(query, select=select).sql()), ordered=False):
                return False
        if query.order:
            keys = sandbox.run(replace(query, select=query.order, limit=0, offset=0).sql())
            shown = keys[: query.limit + query.offset + 1] if query.limit else keys
            if any(key == next_key for key, next_key in pairwise(shown)):
                return False
        for near_miss in query.near_misses():
            try:
                if same_result(gold, sandbox.run(near_miss.sql()), ordered=bool(query.order)):
                    return False
            except StatementRefused:
                continue
    return True
