"""Kinds of chat templates: every answer is supervised with its end, in the context that the model will see."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runner.common.errors import DataError
from runner.data.chat_encoder import ChatEncoder
from runner.data.chat_template import TemplateOptions
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder

SPECIAL = ["<eos>", "<end>", "<return>", "<call>", "<user>", "<assistant>", "<tool>", "<start>", "<think>", "</think>"]


def system(text):
    return {"role": "system", "content": text}


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def tool_call(arguments, content=None):
    function = {"name": "weather", "arguments": arguments}
    return assistant(content, tool_calls=[{"id": "call12345", "type": "function", "function": function}])


def tool_result(content):
    return {"role": "tool", "content": content, "name": "weather", "tool_call_id": "call12345"}


MESSAGES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = MESSAGES + PROMPT
# The last turn ends with another token than earlier ones.
TWO_ENDS = (
    "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}"
    "{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant:{% endif %}"
)
# A turn ends where the next begins.
OPENED = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% endfor %}" + PROMPT
# Nothing ends a turn.
HEADINGS = (
    "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
# The whole conversation ends with EOS, and the prompt takes its place.
FINAL_EOS = MESSAGES + "{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
# The system message stands in the last question.
MOVED_SYSTEM = (
    "{% set ns = namespace(last=0, system='') %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% elif m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "[Q]{{ ns.system + ' ' if ns.system and loop.index0 == ns.last }}{{ m.content }}[A]"
    "{% elif m.role == 'assistant' %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
# The system message stands in the question only where that is the last message, as in Mistral Nemo's template.
SYSTEM_IN_PROMPT = (
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[Q]{{ system + ' ' if system and loop.last }}{{ m.content }}[A]"
    "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
)
# Earlier turns lose their reasoning.
DROPS_THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% set reasoning = m.reasoning_content or '' %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set reasoning = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{% if reasoning and loop.index0 > ns.last %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    "{{ text }}<end>{% endfor %}" + PROMPT
)
# As DROPS_THINKING, but an empty block remains, and nothing ends a turn.
EMPTIES_THINKING = (
    DROPS_THINKING.replace("{% if reasoning and loop.index0 > ns.last %}", "{% if m.role == 'assistant' %}")
    .replace("{{ reasoning }}", "{{ reasoning if loop.index0 > ns.last }}")
    .replace("<end>{% endfor %}", "{% endfor %}")
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ ARGUMENTS }}}{% endfor %}<end>{% endfor %}' + PROMPT
)
OBJECT_CALLS = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
STRING_CALLS = CALLS.replace("{{ ARGUMENTS }}", "{{ '' + c.function.arguments }}")
CALL_END = OBJECT_CALLS.replace("{% endfor %}<end>", "{% endfor %}{{ '<call>' if m.tool_calls else '<end>' }}")
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p['text'] }}{% endfor %}<end>{% endfor %}" + PROMPT
)
STRINGS = PLAIN.replace("{{ m.content }}", "{{ m.content if m.content is string }}")
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}<end>{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    + PROMPT
)
DATED = "Today is {{ strftime_now('%-d %B %Y') }}.\n" + PLAIN


@dataclass
class Result:
    texts: list[list[str]]
    """The supervised texts of each row."""
    rows: list[str]
    encoded: object


@pytest.fixture(scope="module")
def encode():
    """Encode a conversation with a template; `eos` is the EOS token, `stops` are further tokens that end generation."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])

    def do(template, *messages, tools=None, eos="<eos>", stops=(), limit=10**6, mask_prompt=True, **options):
        inner = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=eos)
        inner.chat_template = template
        tokenizer = TokenizerWrapper(inner, eos_token_ids=[byte_level.token_to_id(t) for t in (*stops, eos) if t])
        chat = ChatEncoder(TextEncoder(tokenizer, TemplateOptions(**options)))
        encoded = chat.encode(list(messages), tools, limit, mask_prompt)

        def decode(tokens):
            return tokenizer.decode(tokens, skip_special_tokens=False)

        texts = [[decode(tokens[start:end]) for start, end in spans] for tokens, spans in encoded.rows]
        return Result(texts, [decode(tokens) for tokens, _ in encoded.rows], encoded)

    return do


TWO_TURNS = (user("q1"), assistant("a1"), user("q2"), assistant("a2"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, [["a1<end>", "a2<end>"]]),
        (TWO_ENDS, [["a1<end>", "a2<return>"]]),
        (FINAL_EOS, [["a1<end>", "a2<end><eos>"]]),
        (MARKED, [["a1<end>", "a2<end>"]]),
        (HEADINGS, [["a1\n\n<eos>"], ["a2\n\n<eos>"]]),
        (OPENED, [["\na1<eos>"], ["\na2<eos>"]]),
    ],
)
def test_each_turn_is_supervised_with_its_own_end(template, expected, encode):
    assert encode(template, *TWO_TURNS).texts == expected


def test_a_token_that_opens_the_next_turn_and_stops_generation_ends_a_turn(encode):
    result = encode(OPENED, *TWO_TURNS, stops=["<user>"])
    assert result.texts == [["\na1<user>", "\na2<eos>"]]


def test_without_an_eos_token_the_token_that_opens_the_next_turn_ends_a_turn(encode):
    assert encode(OPENED, *TWO_TURNS, eos=None).texts == [["\na1<user>", "\na2"]]


def test_a_span_never_contains_the_next_message(encode):
    secret = user("a very long secret that only the user says <return> and more")
    result = encode(TWO_ENDS, user("q1"), assistant("a1"), secret, assistant("a2"))
    assert result.texts == [["a1<end>", "a2<return>"]]


def test_a_system_message_that_moves_to_the_last_question_gives_a_row_for_each_answer(encode):
    result = encode(MOVED_SYSTEM, system("Be brief."), *TWO_TURNS)
    assert result.rows == ["[Q]Be brief. q1[A]a1<eos>", "[Q]q1[A]a1<eos>[Q]Be brief. q2[A]a2<eos>"]
    assert result.texts == [["a1<eos>"], ["a2<eos>"]]
    assert encode(MOVED_SYSTEM, *TWO_TURNS).texts == [["a1<eos>", "a2<eos>"]]


@pytest.mark.parametrize("template", [MOVED_SYSTEM, SYSTEM_IN_PROMPT])
def test_an_answer_whose_prompt_has_another_system_message_is_not_trained_without_it(template, encode):
    with_prompt = template.replace("{% if m.role == 'user' %}[Q]", "{% if m.role == 'user' %}<user>").replace("[A]", "")
    with_prompt = with_prompt.replace("{{ m.content }}<eos>", "<assistant>{{ m.content }}<eos>") + PROMPT
    result = encode(with_prompt, system("Be brief."), *TWO_TURNS)
    assert result.rows == [
        "<user>Be brief. q1<assistant>a1<eos>",
        "<user>q1<assistant>a1<eos><user>Be brief. q2<assistant>a2<eos>",
    ]
    assert result.texts == [["a1<eos>"], ["a2<eos>"]]


def test_a_system_message_that_only_prompts_have_is_kept_in_the_row_of_each_answer(encode):
    result = encode(SYSTEM_IN_PROMPT, system("Be brief."), *TWO_TURNS)
    assert result.rows == ["[Q]Be brief. q1[A]a1<eos>", "[Q]q1[A]a1<eos>[Q]Be brief. q2[A]a2<eos>"]
    assert result.texts == [["a1<eos>"], ["a2<eos>"]]
    assert result.encoded.lost_context == 0
    # The answer says what the question says: the prompt ends with the last of both.
    same = encode(SYSTEM_IN_PROMPT, system("s"), user("x[A]"), assistant("x[A]"))
    assert (same.rows, same.texts) == (["[Q]s x[A][A]x[A]<eos>"], [["x[A]<eos>"]])


THINKING = (
    user("q1"),
    assistant("<think>\nr1\n</think>\n\na1"),
    user("q2"),
    assistant("<think>\nr2\n</think>\n\na2"),
)


def test_reasoning_that_the_template_drops_in_earlier_turns_is_counted(encode):
    result = encode(DROPS_THINKING, *THINKING)
    assert result.texts == [["a1<end>", "<think>\nr2\n</think>\n\na2<end>"]]
    assert result.encoded.lost_reasoning == 1
    fields = [{**m, "content": f"a{i}", "reasoning_content": f"r{i}"} for i, m in ((1, THINKING[1]), (2, THINKING[3]))]
    assert encode(DROPS_THINKING, user("q1"), fields[0], user("q2"), fields[1]).texts == result.texts


def test_turns_that_cannot_be_told_apart_are_rendered_one_by_one_with_their_reasoning(encode):
    result = encode(EMPTIES_THINKING, *THINKING)
    assert result.texts == [[f"<think>\nr{i}\n</think>\n\na{i}<eos>"] for i in (1, 2)]
    assert "<think>\n\n</think>\n\na1<user>" in result.rows[1]
    assert result.encoded.lost_reasoning == 0


# Only the last turn has a reasoning block; the prompt has `block` (Qwen3 with enable_thinking=false, Qwen3.5).
BLOCK_IN_PROMPT = DROPS_THINKING.replace(
    "{% if reasoning and loop.index0 > ns.last %}", "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
).replace("<assistant>{% endif %}", "<assistant>{{ block }}{% endif %}")
EMPTY_BLOCK = "<think>\n\n</think>\n\n"


def test_an_answer_without_the_block_of_its_prompt_gets_a_row_in_which_it_follows_the_prompt(encode):
    result = encode(BLOCK_IN_PROMPT, *TWO_TURNS, args={"block": EMPTY_BLOCK})
    assert result.rows == [
        f"<user>q1<end><assistant>{EMPTY_BLOCK}a1<end>",
        f"<user>q1<end><assistant>a1<end><user>q2<end><assistant>{EMPTY_BLOCK}a2<end>",
    ]
    assert result.texts == [["a1<end>"], ["a2<end>"]]
    one_row = encode(BLOCK_IN_PROMPT, *TWO_TURNS, args={"block": ""})
    assert one_row.texts == [["a1<end>", f"{EMPTY_BLOCK}a2<end>"]]
    marked = BLOCK_IN_PROMPT.replace("{{ text }}", "{% generation %}{{ text }}{% endgeneration %}")
    assert encode(marked, *TWO_TURNS, args={"block": EMPTY_BLOCK}).rows == result.rows


def test_reasoning_that_cannot_follow_the_prompt_refuses_the_row(encode):
    with pytest.raises(RowError, match=r"the reasoning of message 2 cannot follow the generation prompt.*enable_think"):
        encode(BLOCK_IN_PROMPT, *THINKING, args={"block": EMPTY_BLOCK})


@pytest.mark.parametrize("drops_all", [False, True])
def test_an_answer_whose_prompt_opens_a_reasoning_block_continues_and_closes_it(drops_all, encode):
    template = BLOCK_IN_PROMPT
    if drops_all:  # as DeepSeek's templates
        template = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}").replace(
            "<assistant>{% endif %}", "<assistant>{{ block }}{% endif %}"
        )
    result = encode(template, *THINKING, args={"block": "<think>\n"})
    assert result.texts == [[f"r{i}\n</think>\n\na{i}<end>"] for i in (1, 2)]
    assert result.rows[0] == "<user>q1<end><assistant><think>\nr1\n</think>\n\na1<end>"
    assert result.encoded.lost_reasoning == 0
    assert encode(template, *TWO_TURNS, args={"block": "<think>\n"}).texts == [
        [f"\n</think>\n\na{i}<end>"] for i in (1, 2)
    ]


def test_reasoning_goes_into_the_content_of_a_template_that_has_no_field_for_it(encode):
    result = encode(PLAIN, user("q"), assistant("a", reasoning_content="r"))
    assert result.texts == [["<think>\nr\n</think>\n\na<end>"]]


def test_a_think_block_goes_into_the_field_of_a_template_that_knows_only_that(encode):
    template = PLAIN.replace("{{ m.content }}", "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}")
    result = encode(template, user("q"), assistant("<think>\nr\n</think>\n\na"))
    assert result.texts == [["(r)a<end>"]]


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize("template", [OBJECT_CALLS, STRING_CALLS])
def test_arguments_of_tool_calls_are_given_as_the_template_takes_them(template, arguments, encode):
    result = encode(template, user("q"), tool_call(arguments), tool_result({"rain": True}), assistant("a"))
    assert result.texts == [['{"name": "weather", "arguments": {"city": "Oslo"}}<end>', "a<end>"]]
    assert '<tool>{"rain": true}<end>' in result.rows[0]


def test_a_tool_call_that_ends_with_a_token_of_its_own_is_a_turn(encode):
    messages = (user("q"), tool_call({"city": "Oslo"}), tool_result("rain"), assistant("a"))
    texts = ['{"name": "weather", "arguments": {"city": "Oslo"}}<call>', "a<end>"]
    assert encode(CALL_END, *messages, stops=["<call>"]).texts == [texts]
    # Where generation would not stop at it, the EOS token follows.
    assert encode(CALL_END, *messages).texts == [[f"{texts[0]}<eos>"], texts[1:]]


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_tool_call_that_the_template_leaves_out_refuses_the_row(mask_prompt, encode):
    messages = (user("q"), tool_call({"city": "Oslo"}, ""), tool_result("rain"), assistant("a"))
    with pytest.raises(RowError, match=r"leaves out of message 2 its tool call 'weather' \(data.template=FILE"):
        encode(PLAIN, *messages, mask_prompt=mask_prompt)


def test_an_answer_that_the_template_leaves_out_refuses_the_row(encode):
    cut = PLAIN.replace("{{ m.content }}", "{{ m.content[:5] }}")
    with pytest.raises(RowError, match=r"leaves out of message 2 its text 'a long answer'"):
        encode(cut, user("q"), assistant("a long answer"))


def test_an_answer_of_reasoning_alone_that_the_template_leaves_out_refuses_the_row(encode):
    with pytest.raises(RowError, match="message 2 its reasoning, beside which it has nothing"):
        encode(
            STRINGS.replace("m.content if", "m.content.split('</think>')[-1] if"),
            user("q"),
            assistant("<think>r</think>"),
        )


def test_context_that_the_template_leaves_out_is_counted(encode):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    no_system = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}")
    assert encode(no_system, system("Be brief."), user("q"), assistant("a"), tools=tools).encoded.lost_context == 2
    assert encode(PLAIN, system("Be brief."), user("q"), assistant("a")).encoded.lost_context == 0


@pytest.mark.parametrize("template", [PARTS, STRINGS, PLAIN])
@pytest.mark.parametrize("as_parts", [False, True])
def test_content_is_given_as_text_or_parts_as_the_template_takes_it(template, as_parts, encode):
    def part(text):
        return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}] if as_parts else text

    result = encode(template, user(part("q1")), assistant(part("a1")))
    assert (result.rows, result.texts) == (["<user>q1<end><assistant>a1<end>"], [["a1<end>"]])


def test_a_part_that_is_no_text_refuses_the_row(encode):
    with pytest.raises(RowError, match="the content of message 1 has a part of type 'image'"):
        encode(PARTS, user([{"type": "image", "url": "x"}]), assistant("a"))


@pytest.mark.parametrize("fields", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_turn_that_the_row_leaves_out_is_not_supervised(template, fields, encode):
    messages = (user("q1"), assistant("draft", **fields), user("q2"), assistant("a2", weight=1, train=True))
    assert encode(template, *messages).texts == [["a2<end>"]]
    assert encode(template, *messages, mask_prompt=False).texts == [
        ["<user>q1<end><assistant>", "<user>q2<end><assistant>a2<end>"]
    ]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant("a", weight=0.5), "the weight of message 2 is 0.5; it can be 0 or 1"),
        (assistant("a", weight="1"), 'the weight of message 2 is "1"; it can be'),
        (assistant("a", train="no"), "'train' of message 2 is a string, not true or false"),
        (assistant("a", train=True, weight=0), "contradict each other"),
        (user("b", train=True), "only turns of the assistant are trained on"),
        (assistant(""), "message 2 has no text, reasoning or tool call to learn"),
        (tool_call("{city: Oslo}"), "arguments of a tool call of message 2 are text that is not JSON"),
        (tool_call([1]), "arguments of a tool call of message 2 are a list, not an object"),
        (assistant("a", tool_calls=[{"type": "function"}]), "a tool call of message 2 has no function with a name"),
    ],
)
def test_a_message_that_cannot_be_trained_on_as_it_is_refuses_the_row(message, reason, encode):
    with pytest.raises(RowError, match=reason):
        encode(OBJECT_CALLS, user("q"), message)


def test_marks_decide_where_the_template_has_them(encode):
    template = MARKED.replace(
        "{% generation %}{{ m.content }}", "{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}"
    )
    with pytest.raises(RowError, match="leaves out of message 2 its text 'abc'"):
        encode(template, user("q"), assistant("abc"))
    prefixed = MARKED.replace("{% generation %}", "Sure: {% generation %}")
    assert encode(prefixed, *TWO_TURNS).texts == [["a1<end>", "a2<end>"]]


def test_the_date_of_the_options_takes_the_place_of_today(encode):
    messages = (user("q"), assistant("a"))
    result = encode(DATED, *messages, date="2024-02-09")
    assert result.rows == ["Today is 9 February 2024.\n<user>q<end><assistant>a<end>"]
    formats = DATED.replace("%-d %B %Y", "%A, %d %b %y; %Y-%m-%d %H:%M (%j)")
    assert (
        encode(formats, *messages, date="2024-02-09")
        .rows[0]
        .startswith("Today is Friday, 09 Feb 24; 2024-02-09 00:00 (040).\n")
    )


def test_a_variable_that_the_template_never_reads_is_refused(encode):
    template = "{% if think is not defined %}{% set think = true %}{% endif %}{{ think }}{{ bos_token }}" + MARKED
    assert encode(template, *TWO_TURNS, args={"think": False}).rows[0].startswith("False")
    with pytest.raises(
        DataError, match=r"args\.thnik has no effect.*Did you mean 'think'\? It reads: bos_token, think"
    ):
        encode(template, *TWO_TURNS, args={"thnik": False})
    with pytest.raises(DataError, match="It reads none"):
        encode(PLAIN, *TWO_TURNS, args={"enable_thinking": False})


def test_template_and_variables_of_the_options_are_used(encode):
    result = encode(PLAIN, *TWO_TURNS, text="{{ greeting }}\n" + TWO_ENDS, args={"greeting": "Hello"})
    assert result.rows[0].startswith("Hello\n<start>user:q1<end>")
    assert result.texts == [["a1<end>", "a2<return>"]]
