"""All chat templates that TRL ships, times a dozen shapes of conversations, against the marks of its own variants.

TRL's wheel has for half of its templates a variant with generation marks, which other people wrote: an independent
mask. ``python tests/data/test_template_collection.py`` prints the table of docs/chat.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runner.data.chat_encoder import ChatEncoder
from runner.data.chat_template import TemplateOptions
from runner.data.conversation import normalize
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder

pytestmark = pytest.mark.reference

SPECIAL = re.compile(
    r"<\|[\w /=-]+\|>|<｜[^<>｜]+｜>|</?s>|<(?:start|end)_of_\w+>|<\|\w+>|<\w+\|>|</?think>|</?tool_call>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|\[gMASK\]|<sop>|<fake_token_around_image>|<image>|<eos>"
)
# By the beginning of a template's name: the EOS token, and what else ends generation in the model's configuration.
EOS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": ("<|end_of_text|>",),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava_next": ("</s>",),
    "muse": ("<|eot|>",),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|endoftext|>", "<|end|>"),
    "qwen": ("<|im_end|>",),
    "smolvlm": ("<end_of_utterance>",),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "the city"}},
                "required": ["city"],
            },
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def call(city):
    function = {"name": "weather", "arguments": {"city": city}}
    return assistant("", tool_calls=[{"id": "call12345", "type": "function", "function": function}])


def result(text):
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": "call12345"}


ONE, TWO, THREE = ([user(f"U{n}"), assistant(f"A{n}")] for n in ("one", "two", "three"))
SYSTEM = {"role": "system", "content": "Sys text"}
SHAPES = {
    "one turn": ONE,
    "system, one turn": [SYSTEM, *ONE],
    "two turns": [*ONE, *TWO],
    "system, three turns": [SYSTEM, *ONE, *TWO, *THREE],
    "ends with a user": [*ONE, user("Utwo")],
    "assistant first": [assistant("Azero"), *ONE],
    "user twice": [user("Uextra"), *ONE],
    "assistant twice": [*ONE, assistant("Atwo")],
    "empty turn": [*ONE, user(""), assistant("Atwo")],
    "thinking inside": [
        user("Uone"),
        assistant("<think>\nRone\n</think>\n\nAone"),
        user("Utwo"),
        assistant("<think>\nRtwo\n</think>\n\nAtwo"),
    ],
    "reasoning_content": [
        user("Uone"),
        assistant("Aone", reasoning_content="Rone"),
        user("Utwo"),
        assistant("Atwo", reasoning_content="Rtwo"),
    ],
    "one tool round": [user("Uone"), call("Oslo"), result("rain"), assistant("Aone")],
    "two tool rounds": [
        *[user("Uone"), call("Oslo"), result("rain"), assistant("Aone")],
        *[user("Utwo"), call("Bergen"), result("sun"), assistant("Atwo")],
    ],
}
# What a template refuses or has no place for. Everything else of the table has to be right.
TEMPLATE_REFUSES = r"the model's chat template fails on it"
NO_TOOLS = r"the chat template leaves out of message 2 its tool call 'weather'"
PROMPT_DIFFERS = r"the start of message 3 cannot be determined"
WITHOUT_TOOL_CALLS = ("deepseek_r1_distill", "idefics3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm")
ALTERNATING = ("cohere", "cohere2", "gemma", "gemma3")
REFUSED = {
    **{(name, shape): NO_TOOLS for name in WITHOUT_TOOL_CALLS for shape in SHAPES if "tool" in shape},
    **{
        (name, shape): TEMPLATE_REFUSES
        for name in ALTERNATING
        for shape in SHAPES
        if "tool" in shape or "twice" in shape or shape == "assistant first"
    },
    **{("gemma", shape): TEMPLATE_REFUSES for shape in SHAPES if "system" in shape},
    **{("llava_next", shape): TEMPLATE_REFUSES for shape in SHAPES if "tool" in shape},
    **{(name, "assistant twice"): PROMPT_DIFFERS for name in ("diffusion_gemma", "gemma4_v5")},
}


@dataclass
class Example:
    """A conversation encoded with one of the templates."""

    chat: ChatEncoder
    texts: list[str]
    """The supervised texts of all rows, in order."""
    kind: str
    """How it was encoded: right, turn by turn, or right with reasoning that the template leaves out."""


def templates() -> dict[str, str]:
    """Return name to text of the templates of the TRL in the reference environment."""
    python = os.environ.get("RUNNER_REFERENCE_PYTHON") or sys.executable
    code = "from importlib.util import find_spec; print(find_spec('trl').submodule_search_locations[0])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(
            f"{python} has no TRL, whose templates are compared with: `make test-all` installs it, or set "
            "RUNNER_REFERENCE_PYTHON to a Python with trl",
            pytrace=False,
        )
    folder = Path(done.stdout.strip()) / "chat_templates"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


def make_encoder(name: str, template: str) -> ChatEncoder:
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    stops = EOS[max((beginning for beginning in EOS if name.startswith(beginning)), key=len)]
    special = sorted({*SPECIAL.findall(template), *stops, "<bos>"})
    byte_level.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = "<bos>" if "bos_token" in template else None
    inner = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=stops[0], bos_token=bos)
    inner.chat_template = template
    tokenizer = TokenizerWrapper(inner, eos_token_ids=[byte_level.token_to_id(token) for token in stops])
    return ChatEncoder(TextEncoder(tokenizer, TemplateOptions(date="2026-11-29")))


def encode(chat: ChatEncoder, shape: str) -> Example:
    encoded = chat.encode(SHAPES[shape], TOOLS if "tool" in shape else None, 10**6)
    tokenizer = chat.encoder.tokenizer
    texts = [
        tokenizer.decode(tokens[start:end], skip_special_tokens=False)
        for tokens, spans in encoded.rows
        for start, end in spans
    ]
    kind = "turn by turn" if len(encoded.rows) > 1 else "drops reasoning" if encoded.lost_reasoning else "right"
    return Example(chat, texts, kind)


def mistakes(example: Example, shape: str) -> list[str]:
    """Return what is wrong: an answer not supervised exactly once or without its end, or other text supervised."""
    found = []
    for message in SHAPES[shape]:
        cities = [call["function"]["arguments"]["city"] for call in message.get("tool_calls", [])]
        said = [message["content"].split("</think>")[-1].strip(), *cities]
        expected = int(message["role"] == "assistant")
        for text in filter(None, said):
            times = sum(text in supervised for supervised in example.texts)
            if times != expected:
                found.append(f"{text} is supervised {times} times, not {expected}")
    return found + [f"{text!r} has no end" for text in example.texts if not example.chat.ends.is_ended(text)]


def marked_texts(chat: ChatEncoder, shape: str) -> list[str]:
    """Return the texts that the template marks; marks that only white space separates are one."""
    messages = [turn.message for turn in normalize(SHAPES[shape], chat.traits)]
    tools = TOOLS if "tool" in shape else None
    text, joined = chat.encoder.render(messages, tools), []
    for start, end in chat.encoder.render_marked(messages, tools):
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return [text[start:end] for start, end in joined]


def answer_alone(text: str, chat: ChatEncoder) -> str:
    """Return a turn without its reasoning, its end, and the header that some marks include.

    TRL's variants show all reasoning, and some mark the header or leave the end out.
    """
    text = re.sub(
        r"^(?:[^<]*</think>|[^<]*<channel\|>|.*?<think>.*?</think>)", "", text.strip(), flags=re.DOTALL
    ).strip()
    text = re.sub(r"^<｜tool▁outputs▁end｜>", "", text.replace(chat.ends.turn_header.strip(), ""))
    while (shorter := re.sub(rf"(?:{SPECIAL.pattern})$", "", text.strip())) != text:
        text = shorter
    return text


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_supervised_as_the_marks_say_or_refused_with_the_reason(shape):
    collection = templates()
    assert len(collection) > 70
    compared = 0
    for name, template in collection.items():
        if name.endswith("_training"):
            continue  # what is compared with
        chat = make_encoder(name, template)
        if (name, shape) in REFUSED:
            with pytest.raises(RowError, match=REFUSED[name, shape]):
                encode(chat, shape)
            continue
        example = encode(chat, shape)
        assert not mistakes(example, shape), name
        if f"{name}_training" in collection:
            marked = marked_texts(make_encoder(name, collection[f"{name}_training"]), shape)
            ours = [answer_alone(text, chat) for text in example.texts]
            if shape == "assistant twice":  # marks of neighbours are joined
                words = ["".join(re.sub(SPECIAL, "", text).split()) for text in (*ours, "|", *marked)]
                ours, marked = "".join(words[: len(ours)]), "".join(words[len(ours) + 1 :])
                header = re.sub(SPECIAL, "", chat.ends.turn_header).strip()
                assert (marked.replace(header, "") if header else marked) == ours, name
            else:
                assert [answer_alone(text, chat) for text in marked] == ours, name
            compared += 1
    assert compared >= 17


def table() -> list[str]:
    """Return the lines of the table of templates by shapes."""
    lines, counts = [], Counter()
    signs = {"right": "✓", "turn by turn": "✓ rows", "drops reasoning": "✓ −r", "refused": "refused"}
    lines += [f"| template | {' | '.join(SHAPES)} |", "|---" * (len(SHAPES) + 1) + "|"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, template in templates().items():
        if name.endswith("_training"):
            continue
        cells = []
        for shape in SHAPES:
            try:
                example = encode(make_encoder(name, template), shape)
                kind = "wrong" if mistakes(example, shape) else example.kind
            except RowError as error:
                kind = "refused"
                cells.append(
                    "calls lost" if "tool call" in str(error) else "template" if "fails" in str(error) else "start"
                )
                counts[f"refused: {cells[-1]}"] += 1
                continue
            counts[kind] += 1
            cells.append(signs.get(kind, kind))
        groups.setdefault(tuple(cells), []).append(name)
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    return [*lines, "", str(dict(counts))]


if __name__ == "__main__":
    print(*table(), sep="\n")
