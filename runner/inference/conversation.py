"""A conversation with one model: its messages, its key-value cache, and answers that stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_lm import stream_generate

from runner.common.errors import DataError
from runner.data.row_errors import RowError
from runner.data.text_encoder import Message
from runner.inference.prompt_cache import PromptCache
from runner.inference.prompts import PromptEncoder
from runner.models.load import BaseModel
from runner.training.decoding import generation_error


class ContextFull(DataError):
    """Raised where a conversation leaves no room for an answer in the model's context."""


class AnswerStopped(Exception):
    """Raised by the callback of `Conversation.answer` to end the answer; what came before stays in the history."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer as it comes."""

    text: str
    tokens: int
    """Generated so far."""
    tokens_per_second: float
    prompt_tokens: int
    reused_tokens: int
    """Tokens of the prompt that the turn before had computed."""
    finish_reason: str | None
    """Of the last piece: `stop`, `length` (the token limit), `context` (the end of the model's context) or
    `interrupted`."""


class Conversation:
    """The messages exchanged with one model, and what it computed for them."""

    def __init__(self, encoder: PromptEncoder, context: int | None) -> None:
        """`context`: the tokens that the model can attend to; None where its config does not say."""
        self.messages: list[Message] = []
        """The turns so far, each of the user followed by the answer."""
        self.system: str | None = None
        """A system message; None means that of the run's data, if there is one."""
        self._encoder, self._context = encoder, context
        self._cache = PromptCache()

    @property
    def has_history(self) -> bool:
        """Whether the model sees the messages before the last one."""
        return self._encoder.uses_template

    def answer(
        self,
        base: BaseModel,
        message: str,
        *,
        max_tokens: int,
        sampler: Callable[[Any], Any],
        before_step: Callable[[], None] = lambda: None,
    ) -> Iterator[Piece]:
        """Ask `message` and yield the answer of `base` as it comes; both join the history, also where it is stopped.

        `before_step` is called before each step and may raise AnswerStopped.

        Raises:
            ContextFull: there is no room for an answer; the message does not join the history.
            DataError: the chat template fails on the conversation.
            ModelError: mlx-lm cannot generate with this architecture; the message does not join the history.
        """
        turn = {"role": "user", "content": message}
        prompt = self._encode([*self.messages, turn])
        room = max_tokens if self._context is None else min(max_tokens, self._context - len(prompt))
        if room < 1:
            raise ContextFull(
                f"The conversation has {len(prompt):,} tokens, and the model's context ends at {self._context:,}: "
                "an answer to it would not be what the model was trained for."
            )
        text = ""
        try:
            for piece in self._generate(base, prompt, room, room < max_tokens, sampler, before_step):
                text += piece.text
                yield piece
        except GeneratorExit:  # the reader ends it
            self.messages += [turn, {"role": "assistant", "content": text}]
            raise
        self.messages += [turn, {"role": "assistant", "content": text}]

    def undo(self) -> bool:
        """Remove the last message and its answer; False if there is none."""
        removed = self.messages[-2:]
        del self.messages[-2:]
        return bool(removed)

    def reset(self) -> None:
        """Remove all messages; the system message stays."""
        self.messages.clear()
        self._cache.clear()

    def to_row(self) -> dict[str, Any]:
        """Return the conversation as a row of data: `messages`, with the system message if there is one."""
        return {"messages": [*self._system_turn(), *self.messages]}

    def _encode(self, messages: list[Message]) -> list[int]:
        try:
            tokens = self._encoder.encode([*self._system_turn(), *messages])
        except RowError as reason:
            raise DataError(f"The prompt cannot be used: {reason}.") from None
        if not tokens:
            raise DataError("The prompt is empty.")
        return tokens

    def _system_turn(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _generate(
        self,
        base: BaseModel,
        prompt: list[int],
        max_tokens: int,
        ends_context: bool,
        sampler: Callable[[Any], Any],
        before_step: Callable[[], None],
    ) -> Iterator[Piece]:
        caches, reused = self._cache.reuse(base.model, prompt)
        generated: list[int] = []
        piece: Piece | None = None
        stream = stream_generate(
            base.model,
            base.tokenizer,
            prompt[reused:],
            max_tokens=max_tokens,
            sampler=sampler,
            prompt_cache=caches,
            prompt_progress_callback=lambda done, total: before_step(),
        )
        try:
            for response in stream:
                if response.finish_reason is None or response.finish_reason == "length":
                    generated.append(response.token)
                reason = "context" if ends_context and response.finish_reason == "length" else response.finish_reason
                rate = response.generation_tps
                piece = Piece(response.text, len(generated), rate, len(prompt), reused, reason)
                yield piece
                before_step()
        except AnswerStopped:
            stream.close()
            done = piece or Piece("", 0, 0.0, len(prompt), reused, None)
            if piece is not None:  # between two steps, the caches hold all that was generated
                self._cache.store(caches, [*prompt, *generated])
            yield Piece("", done.tokens, done.tokens_per_second, len(prompt), reused, "interrupted")
            return
        except (OSError, MemoryError):  # such as a closed pipe
            raise
        except Exception as error:  # mlx-lm's caches and models raise all kinds of errors
            raise generation_error(base, error) from error
        assert piece is not None  # stream_generate always ends with a response
        ended_by_token = [response.token] if response.finish_reason == "stop" else []
        self._cache.store(caches, [*prompt, *generated, *ended_by_token])


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model attends to, by its config.json; None where it does not say."""
    texts = [config.get("text_config"), config]
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
    found = (part.get(name) for part in texts if isinstance(part, Mapping) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)
