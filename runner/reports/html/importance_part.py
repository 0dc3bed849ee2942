"""The importance of settings on a page: a bar for each, how sure it is, and what it is based on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runner.reports.html import sections
from runner.reports.html.sections import Part
from runner.reports.importance import CLEAR_P, MIN_SPARE, Importance, ImportanceResult, measure_importance


def importance_part(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], *, metric: str, among: str, remark: str = ""
) -> list[Part]:
    """Return the part of a page that shows what each setting explains; nothing where nothing varies.

    Args:
        settings: of each job, name to value.
        values: what each job reached.
        metric: what the values are of.
        among: the jobs, as the end of a sentence: `12 jobs`.
        remark: a sentence to add.
    """
    result = measure_importance(settings, values)
    if result is None:
        return []
    items = [
        {
            "name": " and ".join(setting.names),
            "share": setting.share,
            "low": setting.interval[0] if setting.interval else None,
            "high": setting.interval[1] if setting.interval else None,
            "text": _text(setting, result),
        }
        for setting in result.settings
    ]
    rest = max(0.0, 1.0 - sum(setting.share for setting in result.settings))
    items.append({"name": "the rest", "share": rest, "low": None, "high": None,
                  "text": "noise, and what settings do only together"})  # fmt: skip
    return [sections.bars("What the settings explain", items, note=_note(result, metric, among, remark))]


def _text(setting: Importance, result: ImportanceResult) -> str:
    if setting.p is None:
        too_few = result.spare < MIN_SPARE
        return "too few jobs to tell it from chance" if too_few else "varies together with others: not to be told apart"
    together = "; they vary together" if len(setting.names) > 1 else ""
    if setting.p < CLEAR_P:
        return f"clear (p = {max(setting.p, 0.001):.3f}){together}"
    return f"could be chance (p = {setting.p:.2f}){together}"


def _note(result: ImportanceResult, metric: str, among: str, remark: str) -> str:
    metric = f"the logarithm of {metric}" if result.log else metric
    parts = [f"Share of the variance of {metric} over {among} that each setting explains by itself."]
    if result.spare < MIN_SPARE:
        parts.append(
            f"There are only {result.spare} more of them than effects: at least {MIN_SPARE} are needed to say how sure "
            "the shares are. More values, or more seeds, help."
        )
    else:
        parts.append("The bar's line is the 95 % interval of a bootstrap, p that of a permutation test.")
    return " ".join([*parts, *filter(None, [remark])])
