"""`runner generate`: answer a prompt with a run's adapter, streaming; --compare-base also asks the base model."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError, DataError
from runner.common.text import printable
from runner.config.schema import Config
from runner.data.row_errors import RowError
from runner.data.source import BUILTIN_PREFIX, find_sources

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter
    from runner.data.text_encoder import TextEncoder


def run(argv: list[str]) -> int:
    """Answer the prompt in `argv`.

    Raises:
        RunnerError: a wrong argument, or an adapter or base model that cannot be used.
        KeyboardInterrupt: Ctrl-C; the line in progress is ended.
    """
    options = _parse(argv)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapter

    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    prompt_tokens = _encode_prompt(loaded, settings.config, prompt, options.system)
    answers = []
    if options.compare_base:
        loaded.detach()
        answers.append({"by": "base", **_answer(loaded, prompt_tokens, options, heading="base")})
        loaded.attach()
    heading = f"adapter ({source.name})" if options.compare_base else None
    answers.append({"by": "adapter", **_answer(loaded, prompt_tokens, options, heading)})
    if options.json:
        document = {"run": str(source.run), "adapter": str(source.folder), "step": source.step, "prompt": prompt}
        arguments.print_json({**document, "prompt_tokens": len(prompt_tokens), "answers": answers})
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("generate")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    parser.add_argument("--max-tokens", type=_number(int, lambda n: n >= 1, "1 or more"), default=256, metavar="N")
    parser.add_argument(
        "--temp",
        type=_number(float, lambda t: 0 <= t < 1000, "0 or more"),
        default=0.0,
        metavar="T",
        help="temperature; 0 always chooses the likeliest token (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=_number(float, lambda p: 0 < p <= 1, "above 0, up to 1"),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that hold this much probability (default: 1, all)",
    )
    parser.add_argument("--seed", type=_number(int, lambda s: 0 <= s < 2**63, "0 or more"), default=0, metavar="N")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--compare-base", action="store_true", help="also answer without the adapter, first")
    return parser.parse(argv)


def _number(kind: type, is_valid: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Return an argparse type: a number that `is_valid` accepts."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise ArgumentTypeError(f"{text} is invalid: must be {requirement}")
        return value

    return parse


def _encode_prompt(loaded: LoadedAdapter, config: Config, prompt: str, system: str | None) -> list[int]:
    """Encode the prompt as the run's rows were encoded: with the chat template if they were."""
    from runner.data.chat_template import TemplateOptions
    from runner.data.text_encoder import TextEncoder

    encoder = TextEncoder(loaded.base.tokenizer, TemplateOptions.from_config(config.data))
    try:
        if encoder.has_chat_template and config.data.chat_template and not _trained_on_text(config, encoder):
            system = config.data.system_prompt if system is None else system
            turns = [{"role": "system", "content": system}] if system is not None else []
            return encoder.encode_chat([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True)
        if system is not None:
            raise ConfigError("--system needs a chat template, and this run's rows were encoded without one.")
        tokens = encoder.encode(prompt)
    except RowError as reason:
        raise DataError(f"The prompt cannot be used: {reason}.") from None
    if not tokens:
        raise ConfigError("The prompt is empty.")
    return tokens


def _trained_on_text(config: Config, encoder: TextEncoder) -> bool:
    """Return whether the run was trained on plain text, without a template; False if its data cannot be read."""
    data = config.data
    if data.format != "auto":
        return data.format == "text"
    if data.mix is None and not (data.path.startswith(BUILTIN_PREFIX) or Path(data.path).exists()):
        return False
    from runner.data.formats import FORMATS, choose_format
    from runner.data.readers import read_rows

    try:
        source = find_sources(data)[0]
        first = next(iter(read_rows(source.find_files()["train"][0])))
        return choose_format(first, encoder, source.options) is FORMATS["text"]
    except (DataError, KeyError, StopIteration):
        return False


def _answer(loaded: LoadedAdapter, prompt_tokens: list[int], options: Namespace, heading: str | None) -> dict[str, Any]:
    """Generate with the model as it is, printing the text as it comes unless --json was given."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from runner.training.decoding import generation_error

    mx.random.seed(options.seed)
    sampler = make_sampler(temp=options.temp, top_p=options.top_p)
    prints = not options.json
    text, response = "", None
    if heading and prints:
        print(f"--- {heading}", flush=True)
    try:
        for response in stream_generate(
            loaded.base.model, loaded.base.tokenizer, prompt_tokens, max_tokens=options.max_tokens, sampler=sampler
        ):
            text += response.text
            if prints:
                print(printable(response.text), end="", flush=True)
    except (OSError, MemoryError):  # such as a closed pipe
        raise
    except Exception as error:  # mlx-lm's caches and models raise all kinds of errors
        raise generation_error(loaded.base, error) from error
    finally:
        if prints:
            print(flush=True)
    assert response is not None  # stream_generate always ends with a response
    if prints:
        tokens, rate = response.generation_tokens, response.generation_tps
        arguments.print_note(f"({tokens} tokens, {rate:.1f} a second, {response.finish_reason})")
    return {
        "text": text,
        "tokens": response.generation_tokens,
        "tokens_per_second": round(response.generation_tps, 3),
        "finish_reason": response.finish_reason,
    }
