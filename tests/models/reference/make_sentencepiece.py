"""Write sentencepiece.json: small SentencePiece BPE vocabularies, and the ids that SentencePiece gives to odd texts.

The vocabularies are written as llama.cpp's converter does (scores and types as they are, user-defined tokens with
plain blanks). Each is trained with other settings: "llama" with a prefix blank and byte fallback, "gemma" without a
prefix and with user-defined runs of blanks and newlines, "unknown" without byte fallback and with the removal of extra
blanks. Needs sentencepiece, which mlx-lm requires too:

    python tests/models/reference/make_sentencepiece.py > tests/models/reference/sentencepiece.json
"""

from __future__ import annotations

import io
import json
from typing import Any

import sentencepiece

CORPUS = (
    "The quick brown fox jumps over the lazy dog. The lighthouse keeper climbed the stairs before dusk.",
    "In 2024 there were 1234567 people, 89 cats and 3.14 pies; she said: “it's hers, isn't it?”",
    "def moving_average(values, width):\n    return sum(values) / width  # the mean\n\n    pass",
    "SELECT name, COUNT(*) AS orders FROM customers WHERE total >= 1000 GROUP BY name;",
    "Der Fuchs springt über den Zaun, naïve café déjà vu. aaa aaaa aaaaa banana bandana",
)
TEXTS = (
    "",
    " ",
    "  ",
    "   a",
    "a",
    "Hello",
    " Hello",
    "Hello ",
    "Hello   world  ",
    "the lazy fox",
    "aaaaaaa",
    "bananana",
    "12345 67 8",
    "3.14159",
    "line\nbreak\n\n\nmore\n",
    "tab\tand\r\nreturn",
    "naïve café déjà",
    "日本語とEnglish",
    "👍🏽 emoji 👨‍👩‍👧",
    "é vs é",
    "\u2581already\u2581blank",
    "<0x0A> >x<",
    "def f(x):\n        return x",
    "“quoted” it's",
    "\u00a0nbsp\u3000wide",
    "ﬁ ligature ½ Ⅷ",
    "\x00\x7f",
    "العربية हिन्दी",
    "SELECT * FROM t WHERE a >= 1;",
)

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True, "add_dummy_prefix": True, "remove_extra_whitespaces": False, "split_digits": True},
    "gemma": {
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["▁▁", "▁▁▁", "▁▁▁▁", "\n", "\n\n", "<start_of_turn>", "<end_of_turn>"],
    },
    "unknown": {"byte_fallback": False, "add_dummy_prefix": True, "remove_extra_whitespaces": True},
}


def train(settings: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=460 if settings["byte_fallback"] else 200,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def main() -> None:
    result = {}
    for name, settings in SETTINGS.items():
        processor = train(settings)
        rows = range(processor.get_piece_size())
        types = [
            2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
            for i in rows
        ]
        tokens = [processor.id_to_piece(i) for i in rows]
        for symbol in settings.get("user_defined_symbols", ()):
            types[processor.piece_to_id(symbol)] = 4
            tokens[processor.piece_to_id(symbol)] = symbol.replace("▁", " ")
        result[name] = {
            "metadata": {
                "model": "llama",
                "pre": "default",
                "tokens": tokens,
                "scores": [processor.get_score(i) for i in rows],
                "token_type": types,
                "bos_token_id": processor.bos_id(),
                "eos_token_id": processor.eos_id(),
                "unknown_token_id": processor.unk_id(),
                "add_bos_token": True,
                "add_eos_token": False,
                "add_space_prefix": settings["add_dummy_prefix"],
            }
            | ({"remove_extra_whitespaces": True} if settings["remove_extra_whitespaces"] else {}),
            "rows": [
                {"text": text, "ids": processor.encode(text), "decoded": processor.decode(processor.encode(text))}
                for text in TEXTS
            ],
        }
    print(json.dumps({"sentencepiece": sentencepiece.__version__, "models": result}))


if __name__ == "__main__":
    main()
