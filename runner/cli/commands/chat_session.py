"""The loop of `runner chat`: messages, commands that begin with a slash, and answers as they come."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from runner.cli.commands.arguments import print_note
from runner.cli.commands.chat_input import MessageReader
from runner.cli.commands.load_adapter import LoadedAdapter
from runner.common.atomic_io import write_atomically
from runner.common.errors import ConfigError, DataError, RunnerError, did_you_mean
from runner.common.text import printable
from runner.inference.conversation import AnswerStopped, ContextFull, Conversation, Piece

_HELP = """\
/reset          forget the conversation
/system TEXT    set the system message for all that is asked from now on; without a text, show it
/undo           remove the last message and its answer
/save FILE      write the conversation as JSON Lines, as data=folder trains on it
/quit           end, as Ctrl-D does
A line that ends with \\ is continued in the next one; a message that begins with / is typed with two of them.
Ctrl-C stops an answer; typed again it ends."""
_COMMANDS = ("/help", "/reset", "/system", "/undo", "/save", "/quit")
_ENDINGS = {
    "length": "the answer reached --max-tokens",
    "context": "the conversation reached the end of the model's context: /undo or /reset",
    "interrupted": "stopped",
}


@dataclass
class Speaker:
    """One of those who answer."""

    name: str
    conversation: Conversation
    with_adapter: bool


class ChatSession:
    """Conversations with the model with its adapter and, where that is asked for, without it."""

    def __init__(
        self,
        loaded: LoadedAdapter,
        speakers: list[Speaker],
        *,
        max_tokens: int,
        sampler: Callable[[Any], Any],
        system: str | None,
        trained_length: int,
        as_json: bool,
    ) -> None:
        """`trained_length`: tokens of the longest row that the run could be trained on; `as_json`: print one JSON
        object a message."""
        self.speakers, self._loaded = speakers, loaded
        self._max_tokens, self._sampler = max_tokens, sampler
        self._trained_length, self._said_long = trained_length, False
        self._as_json = as_json
        self._was_stopped = False
        """Whether Ctrl-C stopped an answer to the last message."""
        self._set_system(system)

    @property
    def uses_template(self) -> bool:
        """Whether the model sees the conversation; otherwise each message alone."""
        return self.speakers[0].conversation.has_history

    def run(self, reader: MessageReader) -> None:
        """Answer what `reader` reads until it ends.

        Raises:
            RunnerError: a message cannot be answered, and nobody types who could be told.
            KeyboardInterrupt: Ctrl-C typed twice, or once where nobody types.
        """
        was_interrupted = False
        while True:
            try:
                message = reader.read()
                if message is None or not self._handle(message):
                    return
                was_interrupted = self._was_stopped
            except KeyboardInterrupt:
                if was_interrupted or self._was_stopped or not reader.is_interactive:
                    raise
                was_interrupted = True
                print_note("\n(Ctrl-C again or Ctrl-D ends)")
            except RunnerError as error:
                if not reader.is_interactive:
                    raise
                print_note(f"{error} /undo and /reset make room." if isinstance(error, ContextFull) else str(error))

    def _handle(self, line: str) -> bool:
        """Carry out a line; False where it ends the session."""
        self._was_stopped = False
        if not line.strip():
            return True
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            command, _, argument = line.partition(" ")
            return self._carry_out(command, argument.strip())
        else:
            self._ask(line)
        return True

    def _carry_out(self, command: str, argument: str) -> bool:
        conversations = [speaker.conversation for speaker in self.speakers]
        if command == "/help":
            print_note(_HELP)
        elif command == "/reset":
            for conversation in conversations:
                conversation.reset()
            print_note("(the conversation is empty)")
        elif command == "/system":
            if argument:
                self._set_system(argument)
            print_note(f"(system: {conversations[0].system or 'that of the data, if there is one'})")
        elif command == "/undo":
            removed = [conversation.undo() for conversation in conversations]
            print_note("(the last message and its answer are removed)" if any(removed) else "(nothing to undo)")
        elif command == "/save":
            self._save(argument)
        elif command != "/quit":
            raise ConfigError(f"{command} is not a command.{did_you_mean(command, _COMMANDS)} /help lists them.")
        return command != "/quit"

    def _set_system(self, text: str | None) -> None:
        if text is not None and not self.uses_template:
            raise ConfigError("A system message needs a chat template, and the run was trained without one.")
        for speaker in self.speakers:
            speaker.conversation.system = text

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file.")
        path = Path(name).expanduser()
        if path.exists():
            raise ConfigError(f"{path} exists already; nothing is replaced.")
        rows = [{**speaker.conversation.to_row(), "by": speaker.name} for speaker in self.speakers]
        try:
            write_atomically(path.absolute(), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}.") from None
        print_note(f"(wrote {path})")

    def _ask(self, message: str) -> None:
        """Let each speaker answer; where one cannot, nobody has been asked.

        Raises:
            RunnerError: the message cannot be answered.
            KeyboardInterrupt: Ctrl-C was typed twice while one answered.
        """
        answers: list[dict[str, Any]] = []
        with _stop_requests() as stop:
            for speaker in self.speakers:
                if speaker.with_adapter != (self._loaded.adapted is not None):
                    self._loaded.attach() if speaker.with_adapter else self._loaded.detach()
                if len(self.speakers) > 1 and not self._as_json:
                    print(f"--- {speaker.name}", flush=True)
                try:
                    answers.append({"by": speaker.name, **self._answer(speaker.conversation, message, stop)})
                except RunnerError:
                    for answered in self.speakers[: len(answers)]:
                        answered.conversation.undo()
                    raise
                except KeyboardInterrupt:
                    self._was_stopped = True
                    raise
        if self._as_json:
            print(json.dumps({"message": message, "answers": answers}), flush=True)

    def _answer(self, conversation: Conversation, message: str, stop: Callable[[], None]) -> dict[str, Any]:
        """Print an answer as it comes, and return it as the fields of the JSON object."""
        text, piece = "", None
        pieces = conversation.answer(
            self._loaded.base, message, max_tokens=self._max_tokens, sampler=self._sampler, before_step=stop
        )
        for piece in pieces:
            text += piece.text
            if not self._as_json:
                print(printable(piece.text), end="", flush=True)
        assert piece is not None
        self._was_stopped |= piece.finish_reason == "interrupted"
        if not self._as_json:
            print(flush=True)
            self._print_ending(piece)
        return {
            "text": text,
            "tokens": piece.tokens,
            "prompt_tokens": piece.prompt_tokens,
            "reused_tokens": piece.reused_tokens,
            "finish_reason": piece.finish_reason,
        }

    def _print_ending(self, piece: Piece) -> None:
        if piece.finish_reason in _ENDINGS:
            print_note(f"({_ENDINGS[piece.finish_reason]})")
        length = piece.prompt_tokens + piece.tokens
        if length > self._trained_length and not self._said_long:
            self._said_long = True
            print_note(
                f"(the conversation has {length:,} tokens; the run was trained on rows of at most "
                f"{self._trained_length:,})"
            )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], None]]:
    """Yield what raises AnswerStopped once Ctrl-C was typed; typed again, it raises KeyboardInterrupt at once.

    A signal that interrupted a computation would leave the caches in any state, so it waits for the next step.
    """
    requested = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested or not sys.stdin.isatty():
            raise KeyboardInterrupt
        requested = True

    def check() -> None:
        if requested:
            raise AnswerStopped

    former = signal.signal(signal.SIGINT, on_signal)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, former)
