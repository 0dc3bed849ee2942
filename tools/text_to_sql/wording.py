"""English phrases for conditions and for the things that satisfy them."""

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
class Phrase:
    """A condition in SQL and in the forms that a sentence may need.

    ``after`` follows the noun ("from France"), ``finite`` is a predicate of the plural ("are from France"), ``clause``
    follows "whose" ("country is France"), ``before`` precedes the noun ("French") or is empty.
    """

    condition: Condition
    after: tuple[str, ...]
    finite: str
    clause: str
    before: str = ""


def expand(draw: Draw, template: str) -> str:
    """Replace every ``[a|b]``, innermost first, by a random one of its alternatives."""
    while found := _INNERMOST.search(template):
        template = template[: found.start()] + draw.pick(found[1].split("|")) + template[found.end() :]
    return " ".join(template.split())


def literal(value: Cell) -> str:
    """Return the value as an SQL literal."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def article(noun: str) -> str:
    """Return the noun with "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrase_category(draw: Draw, sql: str, column: Column, values: Sequence[str], negated: bool = False) -> Phrase:
    """Phrase ``column = value``, IN for two values, or ``<>`` if `negated`."""
    spoken = " or ".join(values)
    quoted = [literal(value) for value in values]
    finite, after = draw.pick(column.phrases) if column.phrases else ("", "")
    before = after == "pre"
    if negated:
        condition = Condition(f"{sql} <> {quoted[0]}", (f"{sql} = {quoted[0]}",))
        clause = f"{column.noun} is not {spoken}"
        denied = _denied(finite.format(spoken)) or f"have {article(column.noun)} other than {spoken}"
        return Phrase(condition, (f"whose {clause}",), denied, clause)
    if len(values) > 1:
        condition = Condition(f"{sql} IN ({', '.join(quoted)})", tuple(f"{sql} = {value}" for value in quoted))
    else:
        condition = Condition(f"{sql} = {quoted[0]}", (f"{sql} <> {quoted[0]}",))
    clause = f"{column.noun} is {spoken}"
    whose = f"whose {clause}"
    if before:
        return Phrase(condition, (whose,), finite.format(spoken), clause, spoken)
    own = after.format(spoken)
    return Phrase(condition, (own, own, own, own, whose), finite.format(spoken), clause)


def _denied(finite: str) -> str:
    """Return the negated predicate, or nothing where the verb is in the past tense."""
    verb, _, rest = finite.partition(" ")
    if verb in ("are", "were"):
        return f"{verb} not {rest}"
    past = verb.endswith("ed") or verb in ("gave", "went", "came", "ate", "fell", "led", "took")
    return "" if past or not verb else f"do not {finite}"


def phrase_number(draw: Draw, sql: str, column: Column, how: str, value: Cell, upper: Cell = 0) -> Phrase:
    """Phrase a comparison; `how` is gt, lt, ge, le, between (with `upper`) or eq."""
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
    return Phrase(condition, tuple(forms), predicate, clause)


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


def phrase_text(draw: Draw, sql: str, column: Column, how: str, part: str) -> Phrase:
    """Phrase a LIKE condition; `how` is start, end or contain."""
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
    return Phrase(condition, after, f"have {article(column.noun)} {doing} '{part}'", clause)


def plural(draw: Draw, entity: Entity, phrases: Sequence[Phrase], connective: str = "AND") -> str:
    """Return the things that satisfy the conditions: "singers from France who are older than 30"."""
    nouns, who = entity.nouns, entity.who
    if not phrases:
        return nouns
    if connective == "OR":
        return draw.pick([
            f"{nouns} {who} " + " or ".join(phrase.finite for phrase in phrases),
            f"{nouns} {who} either " + " or ".join(phrase.finite for phrase in phrases),
            f"{nouns} " + " or ".join(f"whose {phrase.clause}" for phrase in phrases),
        ])  # fmt: skip
    first, *rest = phrases
    if first.before and draw.chance(0.75):
        head, closed = f"{first.before} {nouns}", False
    elif draw.chance(0.2):
        return f"{nouns} {who} " + listed([phrase.finite for phrase in phrases])
    elif len(phrases) > 1 and draw.chance(0.2):
        return f"{nouns} " + listed([f"whose {phrase.clause}" for phrase in phrases])
    else:
        after = draw.pick(first.after)
        head, closed = f"{nouns} {after}", after.startswith("whose")
    if not rest:
        return head
    if not closed and draw.chance(0.4):
        return f"{head} {who} " + listed([phrase.finite for phrase in rest])
    tails = [f"whose {phrase.clause}" if closed else draw.pick(phrase.after) for phrase in rest]
    if len(tails) == 1 and not closed and head == f"{first.before} {nouns}":
        return f"{head} {tails[0]}"
    if len(tails) == 1 and not closed and not tails[0].startswith("whose") and draw.chance(0.5):
        return f"{head} {tails[0]}"
    return f"{head} and " + listed(tails)


def singular(draw: Draw, entity: Entity, phrases: Sequence[Phrase]) -> str:
    """Return a phrase for "each …", as `plural` but without a relative clause, whose verb would be plural."""
    return " ".join([entity.noun, listed([draw.pick(phrase.after) for phrase in phrases])]).strip()


def predicate(phrases: Sequence[Phrase], connective: str = "AND") -> str:
    """Return the conditions as a predicate of the plural."""
    return f" {connective.lower()} ".join(phrase.finite for phrase in phrases)


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def condition_on(draw: Draw, table: Table, name: str, column: Column, prefix: str = "") -> Phrase:
    """Draw a condition on one column: equality for a category, a comparison for a number."""
    if column.kind == "cat":
        return phrase_category(draw, prefix + name, column, [str(draw.pick(table.values(name)))])
    ordered = sorted(table.values(name), key=float)
    value = ordered[draw.between(1, len(ordered) - 2)]
    return phrase_number(
        draw, prefix + name, column, draw.pick(["gt", "gt", "gt", "lt", "lt", "lt", "ge", "le"]), value
    )
