"""Write smollm2_135m.json: SmolLM2-135M's outputs by readers that share no code with runner.models.gguf.

Weights, forward pass and chat template: transformers reads the same GGUF file (`gguf_file=`) into torch, float32, CPU.
Token ids: a byte-level BPE in plain Python with the `regex` package below, over the vocabulary and merges as the `gguf`
package reads them. transformers' own tokenizer for this file is not a reference: it splits text by GPT-2's pattern
without first separating digits, so it differs for two spaces before a digit and for digits of other scripts. The texts
where it differs are recorded too.

Needs torch, transformers, accelerate and gguf, in a separate environment:

    python tests/models/reference/make_reference.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf
import regex
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24

TEXTS = {
    "prose": (
        "The lighthouse keeper climbed the last of the stairs before dusk, as she had done every evening for eleven"
        " years, and found the lamp already burning. Nobody else lived on the island. She set down her lantern,"
        " listened to the sea, and began to count the reasons why that might be."
    ),
    "code": (
        "def moving_average(values: list[float], width: int) -> list[float]:\n"
        "    if width < 1:\n"
        '        raise ValueError("width must be at least 1")\n'
        "    total, out = 0.0, []\n"
        "    for i, value in enumerate(values):\n"
        "        total += value\n"
        "        if i >= width:\n"
        "            total -= values[i - width]\n"
        "        out.append(total / min(i + 1, width))\n"
        "    return out\n"
    ),
    "sql": (
        "SELECT c.name, COUNT(*) AS orders, SUM(o.total) AS spent\n"
        "FROM customers AS c\nLEFT JOIN orders AS o ON o.customer_id = c.id\n"
        "WHERE o.created_at >= '2024-01-01'\nGROUP BY c.name\nHAVING SUM(o.total) > 1000\nORDER BY spent DESC;"
    ),
    "mixed": "In 2024, 日本の人口は約1億2400万人でした。 That is 124,000,000 people 👥 — or 1.6 % of 7.9 × 10⁹ 🌍!",
}

PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Name three colours of the rainbow.",
    "Translate 'good morning' into Spanish.",
    "What is 7 + 5?",
]

UNUSUAL_TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    "\r\n",
    " \n ",
    "hello",
    " hello",
    "hello ",
    "   three blanks before and after   ",
    "a  b   c    d",
    "tab\tseparated\tvalues\n1\t2\t3",
    "line one\nline two\r\nline three\n\n    indented\n",
    "0123456789",
    "1234567890 12 345 6,789.01 -2.5e10 0xFF 1_000",
    "two  3 blanks   4 digits    5",
    "  7",
    "room101 v2.0.1 3rd 4x4 H2O2",
    "½ cup, ²³¹, Ⅷ, ① and ⑩",
    "١٢٣٤ १२३ １２３",
    "I'm you're he'll we've she'd it's don't I'M YOU'RE IT'S",
    "'twas 'n' ''quoted''",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
    "for(i=0;i<10;i++){a[i]+=b[i]**2;} // done",
    "if x != y and not (a <= b): return {'k': [1, 2], **rest}",
    "SELECT * FROM t WHERE a='b' AND c IS NOT NULL; -- 100 %",
    '<div class="x">&amp;</div>',
    "https://example.org/a/b?c=d&e=%20f#g user@example.org",
    "C:\\Users\\me\\file.txt ~/.bashrc ./run.sh",
    "你好，世界！这是一个测试。",
    "こんにちは世界、テストです。カタカナ",
    "안녕하세요 세계",
    "Привет, мир! Это тест.",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "naïve café — “quotes” … €5 £6 ¥7",
    "cafe\u0301 nai\u0308ve (combining marks) e\u0301\u0302\u0303",
    "caf\u00e9 na\u00efve (composed)",
    "👍 🎉🎉 👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽",
    "🇫🇷🇯🇵",
    "\u00a0non\u00a0breaking\u2003em\u3000ideographic",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "!!! ??? ... ,,, ;;; --- ___ *** ### @@@ $$$ %%%",
    "(((a)))[[[b]]]{{{c}}}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaft",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text <|im_end|> text",
    "<|endoftext|><|endoftext|>",
    "<|im_start|",
    "<| im_start |>",
    "<repo_name>me/thing<file_sep>a.py\n1",
    "<reponame><filename><gh_stars>10<issue_start>",
    "Q: 12\u00d712?\nA: 144.\n\n",
    "mixed 日本語 and English 123 と 456",
]


def reference_encoder(path: Path) -> Callable[[str], list[int]]:
    """Return a function from text to token ids by SmolLM2's rules.

    Special tokens are split off first, then digits one by one, then pieces by GPT-2's pattern, which are merged.
    """
    fields = gguf.GGUFReader(path, "r").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    control = sorted((t for t, number in zip(tokens, types, strict=True) if number == 3), key=len, reverse=True)
    special = regex.compile("(" + "|".join(map(regex.escape, control)) + ")")
    digit = regex.compile(r"(\p{N})")
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}

    def merge(word: str) -> list[int]:
        parts = [symbols[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, position = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[position : position + 2] = [parts[position] + parts[position + 1]]
        return [ids[part] for part in parts if part in ids]

    def encode(text: str) -> list[int]:
        encoded: list[int] = []
        for piece in special.split(text):
            if piece in control:
                encoded.append(ids[piece])
                continue
            for run in digit.split(piece):
                for word in pattern.findall(run):
                    encoded += merge(word)
        return encoded

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    path: Path = arguments.gguf
    torch.set_num_threads(1)  # on a busy machine, a second thread only spins
    encode = reference_encoder(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_probabilities(ids: list[int]) -> torch.Tensor:
        """Return the log-probabilities of each next token: float64 (length, vocabulary), from float32 logits."""
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    @torch.no_grad()
    def answer(ids: list[int]) -> tuple[list[int], list[float]]:
        """Return the greedy answer, and by how many nats each token led the second most likely one."""
        new, leads, cache, unseen = [], [], None, ids
        while len(new) < NEW_TOKENS and (not new or new[-1] != tokenizer.eos_token_id):
            out = model(torch.tensor([unseen]), past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].double().topk(2)
            leads.append((best.values[0] - best.values[1]).item())
            new.append(best.indices[0].item())
            cache, unseen = out.past_key_values, new[-1:]
        return new, leads

    texts = {}
    for name, text in TEXTS.items():
        ids = encode(text)
        scored = log_probabilities(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        texts[name] = {"text": text, "ids": ids, "log_probabilities": [round(x, 7) for x in scored.tolist()]}

    greedy = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = encode(rendered)
        new, leads = answer(ids)
        greedy.append(
            {
                "prompt": prompt,
                "rendered": rendered,
                "prompt_ids": ids,
                "new_ids": new,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "smallest_lead": round(min(leads), 6),
            }
        )

    token_ids = [{"text": text, "ids": encode(text)} for text in UNUSUAL_TEXTS]
    differing_texts = [row["text"] for row in token_ids if tokenizer(row["text"]).input_ids != row["ids"]]
    record = {
        "about": "Written by make_reference.py.",
        "file": {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "regex": regex.__version__,
        },
        "texts": texts,
        "greedy": greedy,
        "token_ids": token_ids,
        "transformers_differs": differing_texts,
    }
    arguments.out.write_text(json.dumps(record, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")
    scored = sum(len(row["log_probabilities"]) for row in texts.values())
    print(json.dumps(record["versions"]), f"{scored} log-probabilities, {len(token_ids)} texts")
    print("transformers splits differently:", differing_texts)


if __name__ == "__main__":
    main()
