"""Draw the tables of one row: spellings of names, a selection of columns, and values."""

from __future__ import annotations

from dataclasses import dataclass

from tools.text_to_sql.draw import Draw
from tools.text_to_sql.vocabulary import NUMERIC, Column, Entity, Link, Topic

Cell = int | float | str


@dataclass(frozen=True, slots=True)
class Table:
    """A concrete table; `described` pairs the columns that questions may name with their descriptions."""

    name: str
    entity: Entity
    header: tuple[tuple[str, str], ...]
    described: tuple[tuple[str, Column], ...]
    rows: tuple[tuple[Cell, ...], ...]

    def values(self, column: str) -> list[Cell]:
        index = [name for name, _ in self.header].index(column)
        return [row[index] for row in self.rows]

    def named(self, *kinds: str) -> list[tuple[str, Column]]:
        """Return the described columns of these kinds."""
        return [(name, column) for name, column in self.described if column.kind in kinds]

    @property
    def key(self) -> tuple[str, Column]:
        return self.named("key")[0]

    @property
    def numbers(self) -> list[tuple[str, Column]]:
        return self.named(*NUMERIC)

    @property
    def categories(self) -> list[tuple[str, Column]]:
        return self.named("cat")

    def schema(self) -> str:
        return f"Table {self.name}({', '.join(name for name, _ in self.header)})"

    def as_json(self) -> dict[str, object]:
        return {"columns": [list(pair) for pair in self.header], "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True, slots=True)
class Scene:
    """The tables of one question; `child` refers to `main` by `foreign_key`."""

    draw: Draw
    main: Table
    child: Table | None = None
    link: Link | None = None
    foreign_key: str = ""

    @property
    def tables(self) -> list[Table]:
        return [self.main] if self.child is None else [self.main, self.child]


def draw_single(draw: Draw, topic: Topic) -> Scene:
    """Draw one table of 9 to 12 rows."""
    return Scene(draw, _table(draw, topic.entity, draw.between(9, 12), with_id=draw.chance(0.5)))


def draw_pair(draw: Draw, topic: Topic, covered: bool) -> Scene:
    """Draw two tables; if `covered`, every parent has at least one child, else some have none.

    Raises:
        ValueError: the topic has no second table.
    """
    if topic.link is None:
        raise ValueError(f"{topic.entity.noun} has no second table")
    main = _table(draw, topic.entity, 8, with_id=True, max_columns=3)
    parents = list(main.values("id"))
    wanted = draw.between(11, 12)
    pointed = parents if covered else draw.sample(parents, draw.between(5, 6))
    keys = draw.shuffled([*pointed, *(draw.pick(pointed) for _ in range(wanted - len(pointed)))])
    foreign_key = draw.pick(topic.link.keys)
    child = _table(draw, topic.link.child, wanted, with_id=draw.chance(0.4), max_columns=3)
    position = 1 if child.header[0][0] == "id" else 0
    header = (*child.header[:position], (foreign_key, "INTEGER"), *child.header[position:])
    rows = tuple((*row[:position], key, *row[position:]) for row, key in zip(child.rows, keys, strict=True))
    child = Table(child.name, child.entity, header, child.described, rows)
    return Scene(draw, main, child, topic.link, foreign_key)


def _table(draw: Draw, entity: Entity, count: int, with_id: bool, max_columns: int = 5) -> Table:
    """Draw a table; `max_columns` limits the columns besides the key, with a category and a number if there are any."""
    rest = [column for column in entity.columns if column.kind != "key"]
    selected = [column for column in rest if draw.chance(0.8)][:max_columns]
    for kinds in (("cat",), NUMERIC):
        of_kind = [column for column in rest if column.kind in kinds]
        if of_kind and not any(column in selected for column in of_kind):
            selected.append(draw.pick(of_kind))
    chosen = [column for column in entity.columns if column.kind == "key" or column in selected]
    if draw.chance(0.35):
        chosen = draw.shuffled(chosen)
    described = tuple((draw.pick(column.names), column) for column in chosen)
    header = [(name, column.sql_type) for name, column in described]
    columns = [_values(draw, column, count) for column in chosen]
    if with_id:
        header.insert(0, ("id", "INTEGER"))
        columns.insert(0, [number + 1 for number in range(count)])
    rows = tuple(zip(*columns, strict=True))
    return Table(draw.pick(entity.names), entity, tuple(header), described, rows)


def _values(draw: Draw, column: Column, count: int) -> list[Cell]:
    """Draw a column's values. Keys and numbers never repeat, so that no order has ties; categories do."""
    if column.kind == "key":
        return list(draw.sample(column.values, count))
    if column.kind == "cat":
        pool = draw.sample(column.values, draw.between(3, 5))
        # The first value is drawn more often, which gives groups of unequal size.
        return [draw.pick([pool[0], *pool]) for _ in range(count)]
    if column.kind == "real":
        tenths = range(round(column.low * 10), round(column.high * 10) + 1)
        return [number / 10 for number in draw.sample(tenths, count)]
    return list(draw.sample(range(int(column.low), int(column.high) + 1, column.step), count))
