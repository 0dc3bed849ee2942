"""How conditions and groups of things are said in English."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.text_to_sql.content import Cell, Table
from tools.text_to_sql.draw import Draw
from tools.text_to_sql.query import Condition
from tools.text_to_sql.vocabulary import Column, Entity

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_GREATER = {"gt": (">", ">=", "<"), "lt": ("<", "<=", ">"), "ge": (">=", ">", "<"), "le": ("<=", "<", ">")}


@dataclass(frozen=True, slots=True)
class Said:
    """One condition in the forms that a sentence may need.

    ``after``: what follows the noun, "from France"; ``finite``: a predicate of the plural, "are from France";
    ``clause``: for "whose ...", "country is France"; ``before``: what precedes the noun, "French", or empty.
    """

    condition: Condition
    after: tuple[str, ...]
    finite: str
    clause: str
    before: str = ""


def expand(draw: Draw, template: str) -> str:
    """Replaces every ``[a|b]``, innermost first, by one of its alternatives."""
    while found := _INNERMOST.search(template):
        template = template[: found.start()] + draw.pick(found[1].split("|")) + template[found.end() :]
    return " ".join(template.split())


def literal(value: Cell) -> str:
    """The value as SQL."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def article(noun: str) -> str:
    """The noun with a or an in front."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def say_category(draw: Draw, sql: str, column: Column, values: Sequence[str], negated: bool = False) -> Said:
    """``column = value``, or IN where there are two values, or ``<>``."""
    spoken = " or ".join(values)
    quoted = [literal(value) for value in values]
    finite, after = draw.pick(column.phrases) if column.phrases else ("", "")
    before = after == "pre"
    if negated:
        condition = Condition(f"{sql} <> {quoted[0]}", (f"{sql} = {quoted[0]}",))
        clause = f"{column.noun} is not {spoken}"
        denied = _denied(finite.format(spoken)) or f"have {article(column.noun)} other than {spoken}"
        return Said(condition, (f"whose {clause}",), denied, clause)
    if len(values) > 1:
        condition = Condition(f"{sql} IN ({', '.join(quoted)})", tuple(f"{sql} = {one}" for one in quoted))
    else:
        condition = Condition(f"{sql} = {quoted[0]}", (f"{sql} <> {quoted[0]}",))
    clause = f"{column.noun} is {spoken}"
    whose = f"whose {clause}"
    if before:
        return Said(condition, (whose,), finite.format(spoken), clause, spoken)
    own = after.format(spoken)
    return Said(condition, (own, own, own, own, whose), finite.format(spoken), clause)


def _denied(finite: str) -> str:
    """The predicate with a "not", or nothing where the verb stands in the past."""
    verb, _, rest = finite.partition(" ")
    if verb in ("are", "were"):
        return f"{verb} not {rest}"
    past = verb.endswith("ed") or verb in ("gave", "went", "came", "ate", "fell", "led", "took")
    return "" if past or not verb else f"do not {finite}"


def say_number(draw: Draw, sql: str, column: Column, how: str, value: Cell, upper: Cell = 0) -> Said:
    """A comparison; `how` is gt, lt, ge, le, between (with `upper`) or eq."""
    if how == "between":
        condition = Condition(f"{sql} BETWEEN {value} AND {upper}", (f"{sql} >= {value}", f"{sql} <= {upper}"))
    elif how == "eq":
        condition = Condition(f"{sql} = {value}", (f"{sql} >= {value}", f"{sql} <= {value}"))
    else:
        sign, *near = _GREATER[how]
        condition = Condition(f"{sql} {sign} {value}", tuple(f"{sql} {other} {value}" for other in near))
    finite, after = column.phrases[0] if column.phrases else ("", "")
    amount = expand(draw, _amount(column, how, finite).format(value, upper))
    counted = finite == "have" or column.noun.startswith("number of")
    # "memory over 8 GB", not "memory over 8 GB of memory".
    unit = f" {column.unit.split(' of ')[0]}" if column.unit and not counted else ""
    clause = f"{column.noun} is " + expand(draw, _state(column, how).format(value, upper)) + unit
    forms = [f"whose {clause}"]
    if not column.noun.startswith(("number of", "year")) and how != "eq":
        forms.append(f"with {article(column.noun)} {expand(draw, _having(column, how).format(value, upper))}{unit}")
    predicate = f"have {article(column.noun)} of {amount}{unit}"
    if column.phrases:
        tail = f" {column.unit}" if column.unit else ""
        predicate = f"{finite} {amount}{tail}"
        forms += [f"{after} {amount}{tail}"] * 4
    if column.comparatives and column.kind != "year" and how in ("gt", "lt"):
        word = column.comparatives[how == "lt"]
        if not word.endswith(" -"):
            comparison = f"{word} than {value}{unit}"
            forms += [comparison] * 3
            predicate = draw.pick([predicate, f"are {comparison}"])
    return Said(condition, tuple(forms), predicate, clause)


def _amount(column: Column, how: str, finite: str) -> str:
    if column.kind == "year":
        return {
            "gt": "after {0}", "lt": "before {0}", "ge": "in {0} or later", "le": "in {0} or earlier",
            "between": "between {0} and {1}", "eq": "in {0}",
        }[how]  # fmt: skip
    placed = finite.startswith("are ")
    over = "over" if placed else "[more than|over|more than]"
    under = "under" if placed else "[fewer|fewer|less] than" if finite == "have" else "[less than|under]"
    if finite == "have" and not column.noun.startswith("number of"):
        under = "less than"
    return {
        "gt": over + " {0}", "lt": under + " {0}", "ge": "at least {0}", "le": "at most {0}",
        "between": "between {0} and {1}", "eq": "exactly {0}",
    }[how]  # fmt: skip


def _state(column: Column, how: str) -> str:
    if column.kind == "year":
        gt, lt, ge, le = (
            "[after|later than] {0}",
            "[before|earlier than] {0}",
            "{0} or later",
            "{0} or earlier",
        )
    else:
        gt, lt = "[above|over|greater than|more than] {0}", "[below|under|less than] {0}"
        ge, le = "[at least {0}|{0} or more]", "[at most {0}|{0} or less]"
    return {"gt": gt, "lt": lt, "ge": ge, "le": le, "between": "between {0} and {1}", "eq": "{0}"}[how]


def _having(column: Column, how: str) -> str:
    if column.kind == "year":
        return {"gt": "after {0}", "lt": "before {0}"}.get(how, "of " + _state(column, how))
    return {
        "gt": "[above|over|of more than] {0}", "lt": "[below|under|of less than] {0}", "ge": "of at least {0}",
        "le": "of at most {0}", "between": "between {0} and {1}",
    }[how]  # fmt: skip


def say_text(draw: Draw, sql: str, column: Column, how: str, part: str) -> Said:
    """A LIKE; `how` is start, end or contain."""
    pattern = {"start": f"{part}%", "end": f"%{part}", "contain": f"%{part}%"}[how]
    condition = Condition(f"{sql} LIKE '{pattern}'")
    verb, doing = expand(
        draw,
        {
            "start": "[starts with~starting with|begins with~beginning with]",
            "end": "[ends in~ending in|ends with~ending with]",
            "contain": "[contains~containing|includes~including]",
        }[how],
    ).split("~")
    clause = f"{column.noun} {verb} '{part}'"
    after = (f"whose {clause}", f"with {article(column.noun)} {doing} '{part}'")
    return Said(condition, after, f"have {article(column.noun)} {doing} '{part}'", clause)


def plural(draw: Draw, entity: Entity, said: Sequence[Said], glue: str = "AND") -> str:
    """The things that the conditions leave: "singers from France who are older than 30"."""
    nouns, who = entity.nouns, entity.who
    if not said:
        return nouns
    if glue == "OR":
        return draw.pick([
            f"{nouns} {who} " + " or ".join(one.finite for one in said),
            f"{nouns} {who} either " + " or ".join(one.finite for one in said),
            f"{nouns} " + " or ".join(f"whose {one.clause}" for one in said),
        ])  # fmt: skip
    first, *rest = said
    if first.before and draw.chance(0.75):
        head, closed = f"{first.before} {nouns}", False
    elif draw.chance(0.2):
        return f"{nouns} {who} " + listed([one.finite for one in said])
    elif len(said) > 1 and draw.chance(0.2):
        return f"{nouns} " + listed([f"whose {one.clause}" for one in said])
    else:
        after = draw.pick(first.after)
        head, closed = f"{nouns} {after}", after.startswith("whose")
    if not rest:
        return head
    if not closed and draw.chance(0.4):
        return f"{head} {who} " + listed([one.finite for one in rest])
    tails = [f"whose {one.clause}" if closed else draw.pick(one.after) for one in rest]
    if len(tails) == 1 and not closed and head == f"{first.before} {nouns}":
        return f"{head} {tails[0]}"
    if len(tails) == 1 and not closed and not tails[0].startswith("whose") and draw.chance(0.5):
        return f"{head} {tails[0]}"
    return f"{head} and " + listed(tails)


def singular(draw: Draw, entity: Entity, said: Sequence[Said]) -> str:
    """As `plural`, for "each ...": never a relative sentence, whose verb would be plural."""
    return " ".join([entity.noun, listed([draw.pick(one.after) for one in said])]).strip()


def predicate(said: Sequence[Said], glue: str = "AND") -> str:
    """What is said of the things, as the clause after their name."""
    return f" {glue.lower()} ".join(one.finite for one in said)


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def condition_on(draw: Draw, table: Table, name: str, column: Column, prefix: str = "") -> Said:
    """A plain condition on one column: equality of a category, a comparison of a number."""
    if column.kind == "cat":
        return say_category(draw, prefix + name, column, [str(draw.pick(table.values(name)))])
    ordered = sorted(table.values(name), key=float)
    value = ordered[draw.between(1, len(ordered) - 2)]
    return say_number(draw, prefix + name, column, draw.pick(["gt", "gt", "gt", "lt", "lt", "lt", "ge", "le"]), value)
