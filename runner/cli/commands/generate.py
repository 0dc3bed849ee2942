"""`runner generate`: answer a prompt with a run's adapter, streaming; --base also asks the base model."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError
from runner.common.text import printable
from runner.config.schema import Config

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter
    from runner.inference.conversation import Conversation


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
    conversation = _conversation(loaded, settings.config, options.system)
    answers = []
    if options.base:
        loaded.detach()
        answers.append({"by": "base", **_answer(loaded, conversation, prompt, options, "base")})
        loaded.attach()
    heading = f"adapter ({source.name})" if options.base else None
    answers.append({"by": "adapter", **_answer(loaded, conversation, prompt, options, heading)})
    if options.json:
        document = {"run": str(source.run), "adapter": str(source.folder), "step": source.step, "prompt": prompt}
        arguments.print_json({**document, "prompt_tokens": answers[0]["prompt_tokens"], "answers": answers})
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


def _conversation(loaded: LoadedAdapter, config: Config, system: str | None) -> Conversation:
    """Return a conversation without any turn, as the run's rows were encoded: with the chat template if they were."""
    from runner.inference.conversation import Conversation
    from runner.inference.prompts import PromptEncoder

    encoder = PromptEncoder(loaded.base.tokenizer, config)
    if system is not None and not encoder.uses_template:
        raise ConfigError("--system needs a chat template, and this run's rows were encoded without one.")
    conversation = Conversation(encoder, context=None)
    conversation.system = system
    return conversation


def _answer(
    loaded: LoadedAdapter, conversation: Conversation, prompt: str, options: Namespace, heading: str | None
) -> dict[str, Any]:
    """Generate with the model as it is, printing the text as it comes unless --json was given."""
    import mlx.core as mx

    mx.random.seed(options.seed)
    prints = not options.json
    text, piece = "", None
    if heading and prints:
        print(f"--- {heading}", flush=True)
    conversation.reset()
    try:
        for piece in conversation.answer(
            loaded.base, prompt, max_tokens=options.max_tokens, sampler=arguments.make_sampler(options)
        ):
            text += piece.text
            if prints:
                print(printable(piece.text), end="", flush=True)
    finally:
        if prints:
            print(flush=True)
    assert piece is not None  # an answer always ends with a piece
    if prints:
        arguments.print_note(f"({piece.tokens} tokens, {piece.tokens_per_second:.1f} a second, {piece.finish_reason})")
    return {
        "prompt_tokens": piece.prompt_tokens,
        "text": text,
        "tokens": piece.tokens,
        "tokens_per_second": round(piece.tokens_per_second, 3),
        "finish_reason": piece.finish_reason,
    }
