"""`runner chat`: talk to a run's adapter, and with --base to the model without it, each with its own history."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.cli.commands.chat_input import MessageReader
from runner.common.errors import ConfigError

if TYPE_CHECKING:
    from runner.cli.commands.adapter_source import AdapterSource
    from runner.cli.commands.chat_session import ChatSession
    from runner.config.schema import Config


def run(argv: list[str]) -> int:
    """Answer the messages of standard input until it ends: those that are typed, or one a line of a file or pipe.

    Raises:
        RunnerError: a wrong argument, an adapter or base model that cannot be used, or, where no person types, a
            message that cannot be answered.
        KeyboardInterrupt: Ctrl-C, typed twice.
    """
    options = _parse(argv)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    session = _start(source, settings, options)
    reader = MessageReader(sys.stdin, Path(options.history).expanduser() if options.history else None)
    if reader.is_interactive and not options.json:
        _greet(session, source, settings.config)
    try:
        session.run(reader)
    finally:
        reader.close()
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("chat")
    parser.add_argument("--base", action="store_true", help="also answer without the adapter, first")
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: that of the run's data)")
    parser.add_max_tokens(512)
    parser.add_sampling()
    parser.add_seed()
    parser.add_argument("--history", metavar="FILE", help="keep the lines that are typed in FILE (default: not kept)")
    return parser.parse(argv)


def _start(source: AdapterSource, settings: stored_settings.StoredSettings, options: Namespace) -> ChatSession:
    blas.load_blas()
    import mlx.core as mx

    from runner.cli.commands.chat_session import ChatSession, Speaker
    from runner.cli.commands.load_adapter import load_adapter
    from runner.inference.conversation import Conversation, context_length
    from runner.inference.prompts import PromptEncoder

    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    encoder = PromptEncoder(loaded.base.tokenizer, settings.config)
    if options.system is not None and not encoder.uses_template:
        raise ConfigError("--system needs a chat template, and this run's rows were encoded without one.")
    context = context_length(loaded.base.config)
    speakers = [Speaker(f"adapter ({source.name})", Conversation(encoder, context), with_adapter=True)]
    if options.base:
        speakers.insert(0, Speaker("base", Conversation(encoder, context), with_adapter=False))
    mx.random.seed(options.seed)
    return ChatSession(
        loaded,
        speakers,
        max_tokens=options.max_tokens,
        sampler=arguments.make_sampler(options),
        system=options.system,
        trained_length=settings.config.data.max_length,
        as_json=options.json,
    )


def _greet(session: ChatSession, source: AdapterSource, config: Config) -> None:
    names = " and ".join(speaker.name for speaker in session.speakers)
    print(f"{names} of {config.model.path}. /help lists the commands; Ctrl-D ends.")
    if not session.uses_template:
        print("The run was trained without a chat template: each message is a prompt of its own, without history.")
