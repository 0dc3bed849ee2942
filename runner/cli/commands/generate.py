"""`runner generate`: answer a prompt with a run's adapter, word by word, beside the base model where that is wanted."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends.cpu import blas
from runner.cli.commands import COMMANDS, adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError, DataError
from runner.common.text import printable
from runner.config.schema import Config
from runner.data.row_errors import RowError
from runner.data.source import BUILTIN, find_files, resolve

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter
    from runner.data.chat_spans import TextEncoder


def run(argv: list[str]) -> int:
    """Answer the prompt that `argv` holds.

    Raises:
        RunnerError: a word, the adapter or the base cannot be used.
        KeyboardInterrupt: Ctrl-C; the line that was begun is ended.
    """
    words = _words(argv)
    place = adapter_source.find_adapter(Path(words.run), words.checkpoint)
    chosen = stored_settings.read_settings(place.run, words.changes)
    prompt = sys.stdin.read().removesuffix("\n") if words.prompt == "-" else words.prompt
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapted

    loaded = load_adapted(place, chosen, any_base=words.any_base, say=arguments.print_note)
    tokens = _prompt_tokens(loaded, chosen.config, prompt, words.system)
    answers = []
    if words.compare_base:
        loaded.take_off()
        answers.append({"by": "base", **_answer(loaded, tokens, words, label="base")})
        loaded.put_on()
    label = f"adapter ({place.name})" if words.compare_base else None
    answers.append({"by": "adapter", **_answer(loaded, tokens, words, label)})
    if words.json:
        document = {"run": str(place.run), "adapter": str(place.folder), "step": place.step, "prompt": prompt}
        arguments.print_json({**document, "prompt_tokens": len(tokens), "answers": answers})
    return 0


def _words(argv: list[str]) -> Namespace:
    parser = arguments.adapter_parser("generate", COMMANDS["generate"])
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", default=[], help=arguments.OVERRIDES_HELP)
    parser.add_argument("--max-tokens", type=_number(int, lambda n: n >= 1, "1 or more"), default=256, metavar="N")
    parser.add_argument(
        "--temp",
        type=_number(float, lambda t: 0 <= t < 1000, "0 or more"),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=_number(float, lambda p: 0 < p <= 1, "above 0, up to 1"),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that hold this much probability (default: 1, all)",
    )
    parser.add_argument("--seed", type=_number(int, lambda s: 0 <= s < 2**63, "0 or more"), default=0, metavar="N")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the prompt")
    parser.add_argument("--compare-base", action="store_true", help="also answer without the adapter, first")
    return arguments.parse_arguments(parser, argv)


def _number(kind: type, good: Callable[[Any], bool], wants: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise ArgumentTypeError(f"{text} cannot be: it has to be {wants}")
        return value

    return parse


def _prompt_tokens(loaded: LoadedAdapter, config: Config, prompt: str, system: str | None) -> list[int]:
    """The prompt as the run's rows were encoded: with the chat template where they were."""
    from runner.data.chat_spans import TextEncoder

    encoder = TextEncoder(loaded.base.tokenizer)
    try:
        if encoder.has_template and config.data.chat_template and not _is_text(config, encoder):
            turns = [{"role": "system", "content": system}] if system is not None else []
            return encoder.chat([*turns, {"role": "user", "content": prompt}], prompt=True)
        if system is not None:
            raise ConfigError("--system needs a chat template, and this run's rows were read without one.")
        tokens = encoder.encode(prompt)
    except RowError as reason:
        raise DataError(f"The prompt cannot be used: {reason}.") from None
    if not tokens:
        raise ConfigError("The prompt is empty.")
    return tokens


def _is_text(config: Config, encoder: TextEncoder) -> bool:
    """Whether the run learned plain text, which no template was put around; where that cannot be seen, not."""
    data = config.data
    if data.format != "auto":
        return data.format == "text"
    if not (data.path.startswith(BUILTIN) or Path(data.path).is_dir()):
        return False
    from runner.data.formats import FORMATS, choose_format
    from runner.data.from_config import encode_options
    from runner.data.jsonl import read_jsonl

    try:
        first = next(iter(read_jsonl(find_files(resolve(data.path))["train"])))
        return choose_format(first, encoder, encode_options(config.data)) is FORMATS["text"]
    except (DataError, KeyError, StopIteration):
        return False


def _answer(loaded: LoadedAdapter, tokens: list[int], words: Namespace, label: str | None) -> dict[str, Any]:
    """Generate with the model as it is, printing what comes as it comes unless --json was said."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(words.seed)
    sampler = make_sampler(temp=words.temp, top_p=words.top_p)
    text, last = "", None
    if label and not words.json:
        print(f"--- {label}", flush=True)
    try:
        for last in stream_generate(
            loaded.base.model, loaded.base.tokenizer, tokens, max_tokens=words.max_tokens, sampler=sampler
        ):
            text += last.text
            if not words.json:
                print(printable(last.text), end="", flush=True)
    finally:
        if not words.json:
            print(flush=True)
    assert last is not None  # stream_generate always ends with a response
    if not words.json:
        arguments.print_note(
            f"({last.generation_tokens} tokens, {last.generation_tps:.1f} a second, {last.finish_reason})"
        )
    return {
        "text": text,
        "tokens": last.generation_tokens,
        "tokens_per_second": round(last.generation_tps, 3),
        "finish_reason": last.finish_reason,
    }
