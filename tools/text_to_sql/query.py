"""A SELECT in parts, its SQL, and the wrong queries that its tables must tell apart from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from runner.data.metrics.execution import same_result
from runner.data.metrics.sandbox import Sandbox, StatementRefused


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition in SQL and its near misses: another comparison, half of a range."""

    sql: str
    near: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """`source` is the table, or the join; `others` are wrong select lists, `other_orders` wrong sort keys,
    `same` other readings of the select list, which must not differ."""

    select: str
    source: str
    where: tuple[Condition, ...] = ()
    glue: str = "AND"
    group: str = ""
    having: Condition | None = None
    order: str = ""
    descending: bool = False
    limit: int = 0
    offset: int = 0
    distinct: bool = False
    others: tuple[str, ...] = ()
    other_orders: tuple[str, ...] = ()
    same: tuple[str, ...] = ()

    def sql(self) -> str:
        parts = [f"SELECT {'DISTINCT ' * self.distinct}{self.select} FROM {self.source}"]
        if self.where:
            parts.append("WHERE " + f" {self.glue} ".join(condition.sql for condition in self.where))
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
        """Queries with one part wrong or missing."""
        for at, condition in enumerate(self.where):
            rest = self.where[:at], self.where[at + 1 :]
            yield replace(self, where=rest[0] + rest[1])
            for near in condition.near:
                yield replace(self, where=(*rest[0], Condition(near), *rest[1]))
        if len(self.where) > 1:
            yield replace(self, glue="OR" if self.glue == "AND" else "AND")
        if self.having:
            for near in ("", *self.having.near):
                yield replace(self, having=Condition(near) if near else None)
        for select in self.others:
            yield replace(self, select=select)
        if self.order:
            yield replace(self, descending=not self.descending)
            for order in ("", *self.other_orders):
                yield replace(self, order=order)
        if self.limit:
            yield replace(self, limit=0, offset=0)
        if self.offset:
            yield replace(self, offset=0)
        if self.distinct:
            yield replace(self, distinct=False)


def is_telling(query: Query, tables: Mapping[str, object]) -> bool:
    """Whether on these tables the query has a result, and one that no near miss and no tie shares."""
    with Sandbox(tables) as sandbox:
        gold = sandbox.run(query.sql())
        if not gold or any(value is None for row in gold for value in row):
            return False
        for select in query.same:
            if not same_result(gold, sandbox.run(replace(query, select=select).sql()), ordered=False):
                return False
        if query.order:
            keys = sandbox.run(replace(query, select=query.order, limit=0, offset=0).sql())
            shown = keys[: query.limit + query.offset + 1] if query.limit else keys
            if any(one == next_one for one, next_one in pairwise(shown)):
                return False
        for miss in query.near_misses():
            try:
                if same_result(gold, sandbox.run(miss.sql()), ordered=bool(query.order)):
                    return False
            except StatementRefused:
                continue
    return True
