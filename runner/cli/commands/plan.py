"""`runner plan`: what a run will take, before it starts. Reads the model's config and the data; downloads nothing."""

from __future__ import annotations

import os
from typing import Any

from runner.cli.commands import COMMANDS, CommandParser, arguments
from runner.common.text import printable
from runner.config.schema import Config

_GB = 1e9
_PARTS = {
    "weights": "weights",
    "adapter_and_optimizer": "adapter, optimizer",
    "activations": "activations",
    "logits": "logits",
    "caches": "caches",
    "process": "process",
    "loading": "loading",
}


def run(argv: list[str]) -> int:
    """Print the plan of the run that `argv` describes.

    Raises:
        RunnerError: a wrong argument, or a model or data that cannot be used.
    """
    parser = CommandParser(prog="runner plan", description=COMMANDS["plan"])
    parser.add_argument(
        "--fit", action="store_true", help="find the most rows at once that fit into memory, with the same result"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not measure the time of a few updates")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings as for a run")
    has_help = any(argument in ("-h", "--help") for argument in argv)
    options = parser.parse_args(argv) if has_help else parser.parse_intermixed_args(argv)
    config = arguments.compose_run("plan", options.overrides)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.training import memory_estimate, memory_fit, run_plan
    from runner.training.time_probe import measure_speed

    planned = memory_estimate.plan_model(config)
    data, assumed = run_plan.load_planned_data(config, planned)
    estimate = memory_estimate.estimate_memory(config, data, planned)
    fits = memory_estimate.needed(estimate) <= memory_estimate.device_limit()[0]
    probes = planned.has_weights and fits and not assumed and not options.no_probe
    document = run_plan.describe_run(
        config, data, planned, estimate, measure_speed(config, data) if probes else None, assumed
    )
    if not fits:
        document["help"] = [
            {"overrides": option.text(), "needed": option.needed}
            for option in memory_fit.options_that_help(config, data)
        ]
    if options.fit:
        found = memory_fit.fit(config, data)
        document["fit"] = {"overrides": found.text(), "needed": found.needed} if found else None
    if options.json:
        arguments.print_json(document)
        return 0
    for line in _lines(document, config, not options.no_probe):
        print(printable(line))
    return 0


def _lines(plan: dict[str, Any], config: Config, probe_wanted: bool) -> list[str]:
    model, memory = plan["model"], plan["memory"]
    lines = [
        f"model   {model['path']}: {model['parameters'] / 1e6:,.1f}M parameters, "
        f"{model['trained_parameters'] / 1e6:,.2f}M trained in {model['trained_in']}"
        + ("" if model["weights_are_here"] else "; its weights are not here, its config is"),
    ]
    if plan["assumed"]:
        lines.append(f"data    {plan['assumed']}")
    if updates := plan["updates"]:
        lines.append(
            f"data    {updates['rows_an_epoch']:,} rows, longest {updates['longest_row']:,} tokens; an epoch is "
            f"{updates['an_epoch']:,} updates of {updates['rows']} rows, about {updates['tokens']:,} tokens each"
        )
    lines += ["", "memory at the peak"]
    lines += [f"  {name:<20}{memory[key] / _GB:>8.2f} GB" for key, name in _PARTS.items() if memory[key]]
    lines.append(f"  {'total':<20}{memory['total'] / _GB:>8.2f} GB")
    verdict = "fits" if memory["fits"] else "does not fit"
    lines.append(
        f"  {memory['needed'] / _GB:.2f} GB of {memory['limit'] / _GB:.2f} GB ({memory['limit_is']}): {verdict}"
    )
    lines += [f"  {option['overrides']}: {option['needed'] / _GB:.2f} GB" for option in plan.get("help", [])]
    lines += ["", *_time_lines(plan, probe_wanted), "", *_disk_lines(plan["disk"])]
    if "fit" in plan:
        lines += ["", *_fit_lines(plan["fit"], config)]
    return lines


def _time_lines(plan: dict[str, Any], probe_wanted: bool) -> list[str]:
    times, updates = plan["time"], plan["updates"]
    if times is None:
        reasons = {
            "not measured (--no-probe)": not probe_wanted,
            "not measured: the model is not here": not plan["model"]["weights_are_here"],
            "not measured: the run does not fit": not plan["memory"]["fits"],
        }
        return ["time    " + next((reason for reason, holds in reasons.items() if holds), "not measured")]
    first = f" (the first {_duration(times['first_epoch'])})" if times["first_epoch"] > times["an_epoch"] * 1.05 else ""
    return [
        f"time    from {times['measured_updates']} updates: {times['tokens_per_second']:,.0f} tokens/s",
        f"  an update         {_duration(times['an_update'])}",
        f"  an epoch          {_duration(times['an_epoch'])}{first}",
        f"  an evaluation     {_duration(times['an_evaluation'])}",
        f"  {updates['of_the_run']:,} updates     {_duration(times['of_the_run'])} with evaluations",
        *([f"  not included      {excluded}"] if (excluded := plan["time_excludes"]) else []),
    ]


def _disk_lines(disk: dict[str, Any]) -> list[str]:
    lines = [
        "disk    at most",
        f"  a checkpoint      {_size(disk['a_checkpoint'])}",
        f"  the run           {_size(disk['run'])} ({disk['checkpoints']} checkpoints retained), "
        f"{_size(disk['free'])} free here",
    ]
    if disk["backup"]:
        lines.append(f"  its backup        {_size(disk['backup'])}")
    caches = disk["hidden_states"] + disk["tokens"]
    if caches:
        lines.append(
            f"  shared caches     {_size(caches)} (hidden states {_size(disk['hidden_states'])}), "
            f"{_size(disk['free_for_caches'])} free there"
        )
    if disk["run"] > disk["free"]:
        lines.append("  the run does not fit on this disk: checkpoint.keep_last and keep_every decide what is retained")
    return lines


def _fit_lines(found: dict[str, Any] | None, config: Config) -> list[str]:
    if found is None:
        return ["fit     not even one row at once with checkpointing: choose a smaller model or data.max_length"]
    lines = [f"fit     {found['overrides'] or 'as it is'}: {found['needed'] / _GB:.2f} GB"]
    if "rows_at_once" in found["overrides"] and config.lora.dropout > 0:
        lines.append("  the masks of lora.dropout are drawn for each part: the result is as good, but not the same")
    return lines


def _duration(seconds: float) -> str:
    for limit, unit, size in ((1, "ms", 0.001), (120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
