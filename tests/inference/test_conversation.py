"""A conversation answers as the model answers to the whole of it, and computes only what is new."""

from __future__ import annotations

from pathlib import Path

import mlx_lm
import pytest
from mlx_lm.sample_utils import make_sampler
from tiny_models import write_model

from runner.common.errors import DataError
from runner.config.schema import Config, DataConfig, ModelConfig
from runner.inference import conversation as conversation_module
from runner.inference.conversation import AnswerStopped, ContextFull, Conversation, Piece, context_length
from runner.inference.prompts import PromptEncoder
from runner.models.load import BaseModel, load_base_model

MESSAGES = ["twice: sour", "swap: red blue", "and now something that is quite a bit longer than the window", "ok"]
GREEDY = make_sampler()


def encoder_of(base: BaseModel, **data: object) -> PromptEncoder:
    config = Config()
    config.data = DataConfig(path="builtin:tiny", format="completions", **data)
    return PromptEncoder(base.tokenizer, config)


def ask(conversation: Conversation, base: BaseModel, message: str, max_tokens: int = 6, **options) -> tuple[str, Piece]:
    pieces = list(conversation.answer(base, message, max_tokens=max_tokens, sampler=GREEDY, **options))
    return "".join(piece.text for piece in pieces), pieces[-1]


def plain_answer(base: BaseModel, prompt: list[int], max_tokens: int = 6) -> str:
    return "".join(r.text for r in mlx_lm.stream_generate(base.model, base.tokenizer, prompt, max_tokens=max_tokens))


@pytest.fixture
def base() -> BaseModel:
    return load_base_model(ModelConfig(path="builtin:tiny"))


# Windows of 16 and chunks of 32 tokens, which a turn exceeds, and a recurrent state, which cannot be shortened.
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4", "mamba"])
def test_answers_equal_those_to_the_whole_conversation_computed_anew(tmp_path: Path, family: str) -> None:
    base = load_base_model(ModelConfig(path=str(write_model(tmp_path / "model", family))))
    encoder = encoder_of(base)
    conversation = Conversation(encoder, None)
    for message in MESSAGES:
        before = [*conversation.messages, {"role": "user", "content": message}]
        answer, _ = ask(conversation, base, message)
        assert answer == plain_answer(base, encoder.encode(before))
        if message == MESSAGES[1]:
            assert conversation.undo()


def test_a_turn_computes_only_what_the_turn_before_has_not(base: BaseModel) -> None:
    conversation = Conversation(encoder_of(base), None)
    _, first = ask(conversation, base, MESSAGES[0])
    _, second = ask(conversation, base, MESSAGES[1])
    assert first.reused_tokens == 0
    assert first.prompt_tokens <= second.reused_tokens < second.prompt_tokens
    conversation.reset()
    assert ask(conversation, base, MESSAGES[0])[1].reused_tokens == 0


def test_an_answer_that_ends_by_itself_leaves_the_cache_right(base: BaseModel) -> None:
    encoder = encoder_of(base)
    prompt = encoder.encode([{"role": "user", "content": MESSAGES[0]}])
    tokens = [r.token for r in mlx_lm.stream_generate(base.model, base.tokenizer, prompt, max_tokens=30)]
    end = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 1)
    base.tokenizer.add_eos_token(str(tokens[end]))
    conversation = Conversation(encoder, None)
    _, piece = ask(conversation, base, MESSAGES[0], max_tokens=30)
    assert (piece.finish_reason, piece.tokens) == ("stop", end)
    prompt = encoder.encode([*conversation.messages, {"role": "user", "content": MESSAGES[1]}])
    answer, piece = ask(conversation, base, MESSAGES[1])
    assert answer == plain_answer(base, prompt)
    assert piece.reused_tokens > len(encoder.encode([{"role": "user", "content": MESSAGES[0]}])) - 1


def test_a_template_that_rewrites_earlier_turns_gives_the_same_answers(base: BaseModel, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"  # as templates that remove the reasoning of all turns but the last
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}…{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = encoder_of(base, template=str(template))
    conversation = Conversation(encoder, None)
    for message in MESSAGES[:3]:
        prompt = encoder.encode([*conversation.messages, {"role": "user", "content": message}])
        answer, piece = ask(conversation, base, message)
        assert answer == plain_answer(base, prompt)
    assert piece.reused_tokens > 0


def test_a_stopped_answer_stays_in_the_history_and_the_cache_stays_right(base: BaseModel) -> None:
    encoder = encoder_of(base)
    conversation = Conversation(encoder, None)
    steps = iter(range(100))

    def stop_soon() -> None:
        if next(steps) > 5:
            raise AnswerStopped

    answer, piece = ask(conversation, base, MESSAGES[0], max_tokens=50, before_step=stop_soon)
    assert piece.finish_reason == "interrupted" and 0 < piece.tokens < 50
    assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    prompt = encoder.encode([*conversation.messages, {"role": "user", "content": MESSAGES[1]}])
    second, piece = ask(conversation, base, MESSAGES[1])
    assert second == plain_answer(base, prompt)
    assert piece.reused_tokens > 0


def test_the_end_of_the_context_is_said_and_never_passed(base: BaseModel) -> None:
    encoder = encoder_of(base)
    length = len(encoder.encode([{"role": "user", "content": MESSAGES[0]}]))
    conversation = Conversation(encoder, length + 4)
    _, piece = ask(conversation, base, MESSAGES[0])
    assert (piece.finish_reason, piece.tokens) == ("context", 4)
    before = list(conversation.messages)
    with pytest.raises(ContextFull, match=f"the model's context ends at {length + 4}"):
        ask(conversation, base, MESSAGES[1])
    assert conversation.messages == before
    assert ask(Conversation(encoder, length + 6), base, MESSAGES[0])[1].finish_reason == "length"


def test_the_system_message_is_the_one_that_was_set_else_that_of_the_data(base: BaseModel) -> None:
    conversation = Conversation(encoder_of(base, system_prompt="Be brief."), None)
    _, with_that_of_the_data = ask(conversation, base, "a")
    conversation.reset()
    conversation.system = "Be brief."
    assert ask(conversation, base, "a")[1].prompt_tokens == with_that_of_the_data.prompt_tokens
    conversation.reset()
    conversation.system = "Be very brief."
    assert ask(conversation, base, "a")[1].prompt_tokens == with_that_of_the_data.prompt_tokens + 5
    assert conversation.to_row()["messages"][0] == {"role": "system", "content": "Be very brief."}


def test_without_a_template_each_message_is_a_prompt_of_its_own(base: BaseModel) -> None:
    conversation = Conversation(encoder_of(base, chat_template=False), None)
    assert not conversation.has_history
    assert ask(conversation, base, "abc")[1].prompt_tokens == ask(conversation, base, "xyz")[1].prompt_tokens == 3
    with pytest.raises(DataError, match="empty"):
        ask(conversation, base, "")


def test_the_context_is_read_from_any_config() -> None:
    assert context_length({"max_position_embeddings": 2048}) == 2048
    assert context_length({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 2}) == 64
    assert context_length({"n_ctx": True}) is None


def test_a_message_that_cannot_be_answered_does_not_join_the_history(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(conversation_module, "stream_generate", fail)
    conversation = Conversation(encoder_of(base), None)
    with pytest.raises(Exception, match="no such layer"):
        ask(conversation, base, MESSAGES[0])
    assert conversation.messages == []


def test_a_prompt_is_rendered_without_a_look_at_the_data(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.inference.prompts._trained_on_text", lambda *arguments: pytest.fail("it was read"))
    assert "abc" in encoder_of(base).render([{"role": "user", "content": "abc"}])
