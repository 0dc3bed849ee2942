"""`runner data`: what training on a data set would see, before it starts. Loads the tokenizer, not the model."""

from __future__ import annotations

import sys
from typing import Any

from runner.cli.commands import COMMANDS, CommandParser, arguments
from runner.common.errors import ConfigError
from runner.common.text import count, printable
from runner.config.schema import Config

_BAR = 40
_COLOUR, _PLAIN = "\033[32m", "\033[0m"


def run(argv: list[str]) -> int:
    """Print the report on the data that `argv` configures.

    Raises:
        RunnerError: a wrong argument, or a tokenizer or a data set that cannot be used.
    """
    parser = CommandParser(prog="runner data", description=COMMANDS["data"])
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows of train to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings as for a run: data.path=…, model=…"
    )
    has_help = any(argument in ("-h", "--help") for argument in argv)
    options = parser.parse_args(argv) if has_help else parser.parse_intermixed_args(argv)
    if options.rows < 0:
        raise ConfigError(f"--rows {options.rows} is invalid: must be 0 or more.")
    config = arguments.compose_run("data", options.overrides)
    from runner.data.report import data_report
    from runner.data.tokenize import load_data
    from runner.models.tokenizer_only import load_tokenizer_only

    data = load_data(config, load_tokenizer_only(config.model))
    report = {"model": config.model.path, "data": config.data.path, **data_report(data, options.rows)}
    if config.data.mix is not None:
        report |= {"data": config.data.mix, "rows_an_epoch": list(data.mixture.counts) if data.mixture else None}
    if options.json:
        arguments.print_json(report)
        return 0
    for line in _lines(report, config):
        print(printable(line))
    for shown in report["rows"]:
        _print_row(shown, data.decode)
    return 0


def _lines(report: dict[str, Any], config: Config) -> list[str]:
    lines = [f"model  {report['model']}", f"data   {report['data']}"]
    if report.get("rows_an_epoch"):
        lines.append(f"mix    rows of each source in an epoch: {', '.join(f'{n:,}' for n in report['rows_an_epoch'])}")
    lines += report["notes"]
    for split, found in report["splits"].items():
        lines += ["", *_split_lines(split, found, config)]
    for split, found in report["in_train_and"].items():
        for kind in ("exact", "near"):
            if found[kind]["rows"]:
                lines.append(
                    f"{split}: {_pairs_text(found[kind])} {'is' if found[kind]['rows'] == 1 else 'are'}"
                    f"{'' if kind == 'exact' else ' nearly'} in train"
                )
    if "valid" not in report["splits"]:
        lines.append("no validation split: data.valid_fraction=0.05 would cut one off")
    return lines


def _split_lines(split: str, found: dict[str, Any], config: Config) -> list[str]:
    lengths = found["lengths"]
    lines = [
        f"{split}: {count(found['rows'], 'row')}, {count(found['tokens'], 'token')}, "
        f"{found['supervised_tokens']:,} supervised ({found['supervised_share']:.0%})",
        "  tokens a row: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()),
    ]
    largest = max(bin["rows"] for bin in found["histogram"])
    for bin in filter(lambda bin: bin["rows"], found["histogram"]):
        bar = "#" * round(_BAR * bin["rows"] / largest)
        lines.append(f"  {bin['from']:>7,} to {bin['below'] - 1:>7,} {bin['rows']:>9,} {bar}")
    limit = config.data.max_length
    for key, text in (
        ("cut", f"cut at max_length {limit} (the longest has {found['longest_before_cut']:,} tokens)"),
        ("dropped_too_long", f"left out: longer than max_length {limit}"),
        ("prompt_too_long", f"left out: the prompt alone reaches max_length {limit}"),
        ("without_supervised_token", "left out: no supervised token"),
    ):
        if found[key]:
            lines.append(f"  {count(found[key], 'row')} {text}")
    if found["rendered_turn_by_turn"]:
        lines.append(f"  {count(found['rendered_turn_by_turn'], 'conversation')} rendered turn by turn, a row for each")
    lines += [f"  {note}" for note in found["template_notes"]]
    if found["compared"] < found["rows"]:
        lines.append(f"  the first {found['compared']:,} rows are compared for duplicates")
    for key, text in (
        ("exact_duplicates", "repeat"),
        ("near_duplicates", "nearly repeat"),
    ):
        if found[key]["rows"]:
            lines.append(f"  {_pairs_text(found[key])} {text}{'s' * (found[key]['rows'] == 1)} an earlier row")
    return lines


def _pairs_text(pairs: dict[str, Any]) -> str:
    examples = "; ".join(f"{later} = {first}" for later, first in pairs["examples"])
    return f"{count(pairs['rows'], 'row')} ({examples})"


def _print_row(shown: dict[str, Any], decode: Any) -> None:
    """Print a row with its supervised tokens in colour, or between ⟦ and ⟧ where there is no terminal."""
    begin, end = (_COLOUR, _PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    text, position = "", 0
    for start, stop in shown["supervised"]:
        text += printable(decode(shown["tokens"][position:start]))
        text += f"{begin}{printable(decode(shown['tokens'][start:stop]))}{end}"
        position = stop
    text += printable(decode(shown["tokens"][position:]))
    print(
        f"\n--- {printable(shown['file'])}:{shown['line']}, {len(shown['tokens'])} tokens, supervised in {begin}…{end}"
    )
    print(text)
