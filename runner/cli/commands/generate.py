"""`runner generate`: answer a prompt with a run's adapter, streaming; --base also asks the base model."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError, DataError
from runner.common.text import printable
from runner.config.schema import Config
from runner.data.row_errors import RowError

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter


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
    if options.base:
        loaded.detach()
        answers.append({"by": "base", **_answer(loaded, prompt_tokens, options, heading="base")})
        loaded.attach()
    heading = f"adapter ({source.name})" if options.base else None
    answers.append({"by": "adapter", **_answer(loaded, prompt_tokens, options, heading)})
    if options.json:
        document = {"run": str(source.run), "adapter": str(source.folder), "step": source.step, "prompt": prompt}
        arguments.print_json({**document, "prompt_tokens": len(prompt_tokens), "answers": answers})
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("generate")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    parser.add_max_tokens(256)
    parser.add_sampling()
    parser.add_seed()
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--base", action="store_true", help="also answer without the adapter, first")
    parser.add_argument("--compare-base", action="store_true", dest="base", help=SUPPRESS)  # its former name
    return parser.parse(argv)


def _encode_prompt(loaded: LoadedAdapter, config: Config, prompt: str, system: str | None) -> list[int]:
    """Encode the prompt as the run's rows were encoded: with the chat template if they were."""
    from runner.inference.prompts import PromptEncoder

    encoder = PromptEncoder(loaded.base.tokenizer, config)
    if system is not None and not encoder.uses_template:
        raise ConfigError("--system needs a chat template, and this run's rows were encoded without one.")
    turns = [{"role": "system", "content": system}] if system is not None else []
    try:
        tokens = encoder.encode([*turns, {"role": "user", "content": prompt}])
    except RowError as reason:
        raise DataError(f"The prompt cannot be used: {reason}.") from None
    if not tokens:
        raise ConfigError("The prompt is empty.")
    return tokens


def _answer(loaded: LoadedAdapter, prompt_tokens: list[int], options: Namespace, heading: str | None) -> dict[str, Any]:
    """Generate with the model as it is, printing the text as it comes unless --json was given."""
    import mlx.core as mx
    from mlx_lm import stream_generate

    from runner.training.decoding import generation_error

    mx.random.seed(options.seed)
    sampler = arguments.make_sampler(options)
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
