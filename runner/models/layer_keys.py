"""Choosing a model's layers by name: the syntax of lora.keys, lora.modules_to_save and lora.rank_pattern.

A key is a layer's name inside a block (`self_attn.q_proj`), the end of one (`q_proj`), or a glob, whose `*` stands for
any characters, dots included (`*_proj`, `self_attn.*`). It means the last `lora.num_layers` blocks, unless it begins
with the numbers of its blocks, counted from 0: `layers.20-29.self_attn.*`, or `layers.3` for all layers of one block.
A name that no block has is looked for outside of them: `embed_tokens`, `lm_head`. Names alone, no MLX.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from runner.common.errors import ModelError, did_you_mean
from runner.common.text import shorten
from runner.config.schema import LoraConfig

_NUMBERED = re.compile(r"layers\.(\d{1,6})(?:-(\d{1,6}))?(?:\.(.+))?")
_SHOWN = 40
"""Names that an error lists."""


@dataclass(frozen=True)
class LayerNames:
    """The names of the layers that can be chosen."""

    blocks: Sequence[Collection[str]]
    """Of each block, the names inside it."""
    outside: Collection[str]
    """Dotted names in the model of those outside of the blocks."""


@dataclass(frozen=True)
class Selection:
    """The layers that were chosen."""

    blocks: Mapping[int, frozenset[str]]
    """By the number of a block, the names inside it; blocks without any are left out."""
    outside: frozenset[str]

    @property
    def first_block(self) -> int | None:
        """The lowest number of a block that has one of the layers."""
        return min(self.blocks, default=None)


def choose(setting: str, keys: Sequence[str], names: LayerNames, last_blocks: int) -> Selection:
    """Return the layers that `keys` name; `setting` is named in errors, `last_blocks` is the resolved lora.num_layers.

    Raises:
        ModelError: a key names no layer, or a block that the model does not have; says which names are near.
    """
    depth = len(names.blocks)
    blocks: dict[int, set[str]] = {}
    outside: set[str] = set()
    for key in keys:
        numbered = _NUMBERED.fullmatch(key)
        numbers, pattern = (_block_numbers(setting, key, numbered, depth), numbered[3]) if numbered else (None, key)
        searched = range(depth) if numbers is None else numbers
        found = {i: matching(pattern or "*", names.blocks[i]) for i in searched}
        if any(found.values()):
            for i, chosen in found.items():
                if chosen and (numbers is not None or i >= depth - last_blocks):
                    blocks.setdefault(i, set()).update(chosen)
        elif numbers is None and (chosen := matching(key, names.outside)):
            outside |= chosen
        else:
            raise ModelError(_unknown(setting, key, pattern or "*", names, numbers))
    return Selection({i: frozenset(found) for i, found in sorted(blocks.items())}, frozenset(outside))


def matching(key: str, names: Collection[str]) -> set[str]:
    """Return the `names` that `key` means: that name, or else those that end with it; of a glob, all that it matches.

    The end begins after a dot: `q_proj` is one of `self_attn.q_proj`, not of `my_q_proj`.
    """
    if "*" in key or "?" in key:
        pattern = key.replace("[", "[[]")
        return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
    return {key} if key in names else {name for name in names if name.endswith(f".{key}")}


def _block_numbers(setting: str, key: str, match: re.Match[str], depth: int) -> range:
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last or last >= depth:
        raise ModelError(f"{setting}: there are no blocks as in '{shorten(key)}': the model has 0 to {depth - 1}.")
    return range(first, last + 1)


def _unknown(setting: str, key: str, pattern: str, names: LayerNames, numbers: range | None) -> str:
    inside = set().union(*(names.blocks[i] for i in (numbers if numbers is not None else range(len(names.blocks)))))
    outside = set() if numbers is not None else {name.rpartition(".")[2] for name in names.outside}
    where = "no block has" if numbers is None else "these blocks do not have"
    known = sorted(inside) + sorted(outside)
    shown = ", ".join(known[:_SHOWN]) + (f", … ({len(known)} in all)" if len(known) > _SHOWN else "")
    hint = did_you_mean(pattern.replace("*", "").strip("."), {*known, *(n.rpartition(".")[2] for n in inside)})
    what = f"'{shorten(key)}'" if numbers is None else f"'{shorten(pattern)}' ('{shorten(key)}')"
    outside_too = "it has" if not outside else "there are"
    return f"{setting}: {where} {what}; {outside_too} {shown}.{hint}"


def matching_rank(lora: LoraConfig, paths: Sequence[str], blocks: Sequence[str]) -> dict[str, int]:
    """Return the rank of each adapted layer: that of the first `lora.rank_pattern` that names it, else lora.rank.

    `paths`: dotted names in the model; `blocks`: those of the blocks.

    Raises:
        ModelError: a pattern names none of the layers.
    """
    names: list[list[str]] = [[] for _ in blocks]
    outside: list[str] = []
    owner: dict[str, tuple[int | None, str]] = {}
    for path in paths:
        number = next((i for i, block in enumerate(blocks) if path.startswith(f"{block}.")), None)
        if number is None:
            outside.append(path)
            owner[path] = (None, path)
        else:
            name = path.removeprefix(f"{blocks[number]}.")
            names[number].append(name)
            owner[path] = (number, name)
    ranks = dict.fromkeys(paths, lora.rank)
    for pattern, rank in reversed(parse_rank_pattern(lora.rank_pattern or [])):
        chosen = choose("lora.rank_pattern", [pattern], LayerNames(names, outside), len(blocks))
        for path, (number, name) in owner.items():
            if name in (chosen.outside if number is None else chosen.blocks.get(number, ())):
                ranks[path] = rank
    return ranks


def parse_rank_pattern(patterns: Sequence[str]) -> list[tuple[str, int]]:
    """Return key and rank of each `KEY:RANK`, which validation has checked."""
    return [(key, int(rank)) for key, _, rank in (pattern.rpartition(":") for pattern in patterns)]
