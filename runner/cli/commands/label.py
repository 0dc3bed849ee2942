"""`runner label`: show or change the name, the tags and the note of a run, a job or a sweep, also while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.commands.arguments import print_note
from runner.cli.commands.output_paths import holds_sweep
from runner.cli.run_argument import resolve_name
from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import relative_path
from runner.config.labels import Labels, problems, split_tags
from runner.config.validation import refuse_secrets
from runner.reports.cells import label_lines
from runner.reports.screen import Screen, json_document
from runner.runs.labels import edit_labels, read_labels


def run(argv: list[str]) -> int:
    """Show the labels of the run or sweep that `argv` names, after the changes that it asks for.

    Raises:
        ConfigError: a wrong argument, an invalid label, or a path that is neither a run nor a sweep.
        StorageError: the labels cannot be written.
    """
    parser = CommandParser(prog="runner label", description=COMMANDS["label"])
    parser.add_argument("path", metavar="RUN|SWEEP", help="its directory or its name")
    parser.add_argument("--name", metavar="TEXT", help="what to call it; '' removes the name")
    parser.add_argument("--tag", metavar="TAGS", action="append", default=[], help="add tags: --tag sql,baseline")
    parser.add_argument("--untag", metavar="TAGS", action="append", default=[], help="remove tags")
    parser.add_argument("--note", metavar="TEXT", help="free text; '' removes the note")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    path = resolve_name(options.path)
    holds_sweep(path, "label")
    added, removed = ([tag for text in texts for tag in split_tags(text)] for texts in (options.tag, options.untag))
    texts = {"name": options.name, "note": options.note}
    for problem in problems(options.name or None, added, options.note):
        raise ConfigError(f"runner label: {problem}")
    refuse_secrets({**texts, "tags": added})

    def change(present: Labels) -> Labels:
        _require_tags(removed, present.tags)
        changed = {name: text or None for name, text in texts.items() if text is not None}
        return Labels.of({**present.to_dict(), "tags": present.tagged(added, removed), **changed})

    is_edit = bool(added or removed) or any(text is not None for text in texts.values())
    labels = edit_labels(path, change) if is_edit else read_labels(path)
    if options.json:
        print(json_document({"path": path, **labels.to_dict()}))
        return 0
    if options.name and Path(options.name).exists():
        print_note(f"{options.name} is also a path here, for which commands take it: name this run by its directory")
    screen = Screen()
    screen.line((relative_path(path), "bold"))
    for line in label_lines(labels, labels.tags) or ["no name, no tags, no note"]:
        screen.line(line)
    return 0


def _require_tags(removed: Sequence[str], present: Sequence[str]) -> None:
    for tag in removed:
        if tag not in present:
            has = f"its own tags are {', '.join(present)}" if present else "it has no tags of its own"
            raise ConfigError(f"--untag {tag}: {has}.{did_you_mean(tag, present)}")
