"""Questions about two tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.text_to_sql import templates
from tools.text_to_sql.aggregates import AGGREGATES
from tools.text_to_sql.content import Scene, Table
from tools.text_to_sql.intents import Example, Intent, ask, base_slots, list_columns, pick_column, pick_columns
from tools.text_to_sql.query import Condition, Query
from tools.text_to_sql.vocabulary import Link
from tools.text_to_sql.wording import (
    Phrase,
    article,
    condition_on,
    expand,
    literal,
    plural,
    predicate,
    singular,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two tables of a scene that has both."""

    scene: Scene
    main: Table
    child: Table
    link: Link

    @property
    def on(self) -> str:
        return f"{self.child.name}.{self.scene.foreign_key} = {self.main.name}.id"

    def join(self, first: Table) -> str:
        second = self.child if first is self.main else self.main
        return f"{first.name} JOIN {second.name} ON {self.on}"

    def condition(self, table: Table, excluded: str = "") -> Phrase:
        usable = [pair for pair in table.described if pair[1].kind != "key" and pair[0] != excluded]
        return condition_on(self.scene.draw, table, *pick_column(self.scene.draw, usable), prefix=f"{table.name}.")

    def columns(self, table: Table) -> tuple[str, ...]:
        return tuple(f"{table.name}.{name}" for name, _ in table.header)


def pair_of(scene: Scene) -> Pair:
    """Return the two tables of the scene."""
    assert scene.child is not None and scene.link is not None
    return Pair(scene, scene.main, scene.child, scene.link)


def _parent(pair: Pair, described: bool) -> tuple[str, Condition]:
    """Return the parents of a question in English and SQL: one by its key, or those that satisfy a condition."""
    draw, main = pair.scene.draw, pair.main
    if described:
        phrases = pair.condition(main)
        return plural(draw, main.entity, [phrases]), phrases.condition
    key = main.key[0]
    value = draw.pick(main.values(key))
    spoken = draw.pick([str(value), f"the {main.entity.noun} {value}"])
    return spoken, Condition(f"{main.name}.{key} = {literal(value)}")


def children_of_one(scene: Scene) -> Example:
    """Child rows of the parent with a given key."""
    return _children(scene, described=False)


def children_of_some(scene: Scene) -> Example:
    """Child rows of the parents that satisfy a condition."""
    return _children(scene, described=True)


def _children(scene: Scene, described: bool) -> Example:
    """Ask for one or two columns of child rows, sometimes with a condition on the children too."""
    pair, draw = pair_of(scene), scene.draw
    child = pair.child
    parent, condition = _parent(pair, described)
    chosen = pick_columns(draw, child.described, draw.pick([1, 1, 2]))
    extra = [pair.condition(child, chosen[0][0])] if len(chosen) == 1 and not described and draw.chance(0.25) else []
    select = ", ".join(f"{child.name}.{name}" for name, _ in chosen)
    wrong = tuple(name for name in pair.columns(child) if name != select)
    query = Query(
        select, pair.join(child), (condition, *(phrases.condition for phrases in extra)),
        wrong_selects=wrong if len(chosen) == 1 else (),
    )  # fmt: skip
    group = f"{child.entity.nouns} {pair.link.relation} {parent}"
    if extra:
        group += f" that {predicate(extra)}"
    choices = (
        "{show} the {plurals} of [all|the|] {group}.",
        "What are the {plurals} of [the|all] {group}?",
        "{plurals} of {group}",
        "For [all|the] {group}, {showlow} the {plurals}.",
    )
    return Example(ask(draw, choices, group=group, **list_columns([column for _, column in chosen])), query)


def count_children_of_one(scene: Scene) -> Example:
    """The number of children of the parent with a given key."""
    return _counted(scene, described=False)


def count_children_of_some(scene: Scene) -> Example:
    """The number of children of the parents that satisfy a condition."""
    return _counted(scene, described=True)


def _counted(scene: Scene, described: bool) -> Example:
    pair, draw = pair_of(scene), scene.draw
    parent, condition = _parent(pair, described)
    group = f"{pair.child.entity.nouns} {pair.link.relation} {parent}"
    query = Query("COUNT(*)", pair.join(pair.child), (condition,))
    choices = (
        "How many {group} are there?",
        "Count the {group}.",
        "[number|count] of {group}",
        "What is the number of {group}?",
        "How many {group} do we have?",
    )
    return Example(ask(draw, choices, group=group), query)


def aggregate_children(scene: Scene) -> Example:
    """An aggregate over the children of some parents."""
    pair, draw = pair_of(scene), scene.draw
    child = pair.child
    name, column = pick_column(draw, [found for found in child.numbers if found[1].kind != "year"])
    parent, condition = _parent(pair, draw.chance(0.5))
    function = draw.pick(["AVG", "MAX", "MIN"] + ["SUM", "SUM"] * column.additive)
    wrong = tuple(f"{other}({child.name}.{name})" for other in AGGREGATES if other != function)
    query = Query(f"{function}({child.name}.{name})", pair.join(child), (condition,), wrong_selects=wrong)
    group = f"{child.entity.nouns} {pair.link.relation} {parent}"
    words = expand(draw, AGGREGATES[function])
    return Example(ask(draw, templates.AGGREGATE, group=f"the {group}", agg=words, column=column.noun), query)


def parents_with_child(scene: Scene) -> Example:
    """Parents with a child that satisfies a condition; each has one such child, so that DISTINCT does not matter."""
    pair, draw = pair_of(scene), scene.draw
    phrases = pair.condition(pair.child)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(
        key,
        pair.join(pair.main),
        (phrases.condition,),
        wrong_selects=pair.columns(pair.child),
        equivalent_selects=(f"DISTINCT {key}",),
    )
    slots = base_slots(scene)
    slots["child"] = article(singular(draw, pair.child.entity, [phrases]))
    return Example(ask(draw, templates.PARENT_WHERE_CHILD, **slots, verb=pair.link.verb), query)


def both_tables(scene: Scene) -> Example:
    """A column of each table (JOIN)."""
    pair, draw = pair_of(scene), scene.draw
    name, column = pick_column(draw, pair.child.described)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(f"{pair.child.name}.{name}, {key}", pair.join(pair.child))
    slots = _family(pair)
    return Example(ask(draw, templates.BOTH, **slots, column=column.noun, columns=column.nouns), query)


def count_per_parent(scene: Scene) -> Example:
    """The number of children of each parent."""
    pair = pair_of(scene)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(f"{key}, COUNT(*)", pair.join(pair.main), group=key)
    return Example(ask(scene.draw, templates.PER_PARENT, **_family(pair)), query)


def most_children(scene: Scene) -> Example:
    """The parent with the most children."""
    pair = pair_of(scene)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(key, pair.join(pair.main), group=key, order="COUNT(*)", descending=True, limit=1)
    return Example(ask(scene.draw, templates.MOST_CHILDREN, **_family(pair), most="most"), query)


def childless(scene: Scene) -> Example:
    """Parents without children (NOT IN)."""
    pair, key = pair_of(scene), scene.main.key[0]
    inner = f"(SELECT {scene.foreign_key} FROM {pair.child.name})"
    where = (Condition(f"id NOT IN {inner}", (f"id IN {inner}",)),)
    return Example(ask(scene.draw, templates.CHILDLESS, **_family(pair)), Query(key, pair.main.name, where))


def _family(pair: Pair) -> dict[str, Any]:
    child = pair.child.entity
    return {**base_slots(pair.scene), "child": child.noun, "children": child.nouns, "verb": pair.link.verb}


JOINED: tuple[tuple[Intent, str, int, bool], ...] = (
    (children_of_one, "hard", 9, True),
    (children_of_some, "hard", 7, True),
    (count_children_of_one, "hard", 7, True),
    (count_children_of_some, "hard", 5, True),
    (aggregate_children, "hard", 7, True),
    (parents_with_child, "hard", 7, True),
    (both_tables, "hard", 4, True),
    (count_per_parent, "hard", 5, True),
    (most_children, "hard", 5, True),
    (childless, "hard", 5, False),
)
"""Intent, difficulty, weight, whether every parent needs a child."""
