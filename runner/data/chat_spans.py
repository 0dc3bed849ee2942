"""Text and conversations as tokens, and which of the tokens the assistant wrote."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any

from runner.common.errors import DataError
from runner.data.row_errors import RowError
from runner.data.template_limits import LimitExceeded, limited

Message = dict[str, Any]
Span = tuple[int, int]
_LONGEST_TEXT = 16_000_000  # characters of a rendered conversation; a row has at most a quarter of that


class TextEncoder:
    """A tokenizer with its chat template; failures come out as BadRow.

    `tokenizer` is mlx-lm's TokenizerWrapper or a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        wrapped = getattr(tokenizer, "has_chat_template", None)
        self.has_template: bool = bool(getattr(tokenizer, "chat_template", None)) if wrapped is None else wrapped

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of plain text, with the tokenizer's own start (and end) token where `special`."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special))
        except Exception as error:
            raise RowError(f"the tokenizer refuses it ({_first_line(error)})") from error

    def ended(self, tokens: list[int]) -> list[int]:
        """`tokens` with the end token, if they do not end with it and the tokenizer has one."""
        eos = self.tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]

    def render(self, messages: list[Message], tools: Any = None, prompt: bool = False) -> str:
        """The template's text, closed by the opening of an assistant turn where `prompt`."""
        try:
            with limited():
                text = self._apply(messages, tools, prompt)
        except LimitExceeded as error:
            raise DataError(f"The model's chat template takes {error} for one conversation: it is not used.") from None
        if len(text) > _LONGEST_TEXT:
            raise DataError(f"The model's chat template makes {len(text):,} characters of one conversation.")
        return text

    def chat(self, messages: list[Message], tools: Any = None, prompt: bool = False) -> list[int]:
        """The template's tokens, as mlx-lm's data sets make them."""
        return self.encode(self.render(messages, tools, prompt), special=False)

    def _apply(self, messages: list[Message], tools: Any, prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, return_dict=False
            )
            return text
        except (LimitExceeded, MemoryError):
            raise
        # A template is a program of the model's author and may raise anything at all.
        except Exception as error:
            raise RowError(f"the model's chat template refuses it ({_first_line(error)})") from error

    @cached_property
    def opening(self) -> str:
        """What the template writes to open an assistant turn."""
        question = [{"role": "user", "content": "."}]
        before, after = self.render(question), self.render(question, prompt=True)
        return after[len(before) :] if after.startswith(before) else ""

    @cached_property
    def closing(self) -> list[int]:
        """The tokens after an assistant's words, from the special token that ends the turn on.

        ``[eos]`` where the template ends turns with no special token, ``[]`` if there is no eos either.
        """
        mark = "answer"
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": mark}]
        tokens = self.encode(self.render(turns).rpartition(mark)[2], special=False)
        special = next((index for index, token in enumerate(tokens) if token in self._special), None)
        if special is not None:
            return tokens[special:]
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    @cached_property
    def _special(self) -> frozenset[int]:
        known = set(getattr(self.tokenizer, "all_special_ids", ()))
        return frozenset(known | set(self.tokenizer.get_added_vocab().values()))


class Conversation:
    """One rendered conversation and where the assistant's turns lie in its tokens."""

    def __init__(self, encoder: TextEncoder, messages: list[Message], tools: Any = None) -> None:
        self.encoder = encoder
        self.messages = messages
        self.tools = tools
        self.text = encoder.render(messages, tools)
        """The rendered conversation."""
        self.tokens = encoder.encode(self.text, special=False)
        self._known = (0, 0)
        self._rewritten = False

    def assistant_spans(self, limit: int) -> list[Span]:
        """Half-open token ranges of the assistant's turns, each with the tokens that end it.

        Turns that start at token `limit` or later are left out: a cut there makes them irrelevant, and each
        turn costs a rendering of all that is before it. Raises BadRow if a turn cannot be found.
        """
        spans = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            start = self._start(index)
            if start >= limit:
                break
            end = self._end(index, start)
            if end is None:
                raise RowError(
                    f"the end of message {index + 1} cannot be found: the chat template rewrites earlier "
                    "turns and ends them with no special token (data.mask_prompt=false trains on all tokens)"
                )
            spans.append((start, end))
        return spans

    def _start(self, index: int) -> int:
        """The first token the assistant has to produce for message `index`."""
        before = self.messages[:index]
        # A template may refuse what stands before a turn (nothing at all, say), and yet render the whole.
        with suppress(RowError):
            found = self._token_at(self.encoder.render(before, self.tools, prompt=True))
            if found is not None:
                return found
            bare = self.encoder.render(before, self.tools)
            if bare and self.text.startswith(bare):
                # The opening and the turn agree up to a point: a template may open a thought that this turn
                # lacks.
                return _common_prefix(self.encoder.chat(before, self.tools, prompt=True), self.tokens)
        found = self._start_by_count(index)
        if found is None:
            raise RowError(
                f"the start of message {index + 1} cannot be found: what the chat template writes before it "
                "is no beginning of the whole conversation (data.mask_prompt=false trains on all tokens)"
            )
        return found

    def _start_by_count(self, index: int) -> int | None:
        """The start after the turn's own opening, where there are as many openings as assistant turns.

        For templates that render earlier turns otherwise once later ones follow, and for a conversation that
        the assistant begins.
        """
        opening = self.encoder.opening
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        pieces = self.text.split(opening) if opening else []
        if len(pieces) != len(turns) + 1:
            return None
        return self._token_at(opening.join(pieces[: turns.index(index) + 1]) + opening)

    def _end(self, index: int, start: int) -> int | None:
        """One past the last token of message `index`, which starts at token `start`."""
        if index == len(self.messages) - 1:
            return len(self.tokens)
        if not self._rewritten:
            with suppress(RowError):
                found = self._token_at(self.encoder.render(self.messages[: index + 1], self.tools))
                if found is not None and found > start:
                    return found
            self._rewritten = True
        closing = self.encoder.closing
        if not closing or closing[0] not in self.tokens[start:]:
            return None
        end = self.tokens.index(closing[0], start)
        for token in closing:
            if self.tokens[end : end + 1] != [token]:
                break
            end += 1
        return end

    def _token_at(self, prefix: str) -> int | None:
        """How many tokens `prefix` is, or None where it is no beginning of the text.

        A token that reaches over the border counts to the prefix, as in mlx-lm's offsets. Encodes only what
        lies after the last border found, so that a long conversation is encoded about twice, whatever its
        number of turns.
        """
        if not self.text.startswith(prefix):
            return None
        characters, count = self._known
        if len(prefix) >= characters:
            piece = self.encoder.encode(prefix[characters:], special=False)
            if self.tokens[count : count + len(piece)] == piece:
                self._known = (len(prefix), count + len(piece))
                return count + len(piece)
        return len(self.encoder.encode(prefix, special=False))


def common_prompt(encoder: TextEncoder, prompt: str, tokens: list[int]) -> int:
    """How many of `tokens`, made of a prompt and what follows, are the prompt's.

    A token that holds characters of both is not counted, so that a one-word answer which merges with the
    blank before it is still learnt.
    """
    return _common_prefix(encoder.encode(prompt), tokens)


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
