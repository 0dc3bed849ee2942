"""Minimal inputs that once broke a reader: an undocumented exception, no end, or an error message of megabytes."""

from __future__ import annotations

import json
import struct
from typing import Any

PROGRESS = ("progress",)
TRAIN_STATE: dict[str, tuple[tuple[str, ...], bytes]] = {
    "an offset of infinity": (("metrics_offset",), b"1e999"),
    "an offset below zero": (("metrics_offset",), b"-5"),
    "an offset that is a string": (("samples_offset",), b'"12"'),
    "a batch that is a boolean": (("position", "batch"), b"true"),
    "an epoch with a fraction": (("position", "epoch"), b"0.5"),
    "a window of 0 batches": (("position", "window"), b"0"),
    "a window that is a string": (("position", "window"), b'"1"'),
    "a token count that is a string": ((*PROGRESS, "tokens"), b'"many"'),
    "a token count beyond 64 bits": ((*PROGRESS, "tokens"), b"18446744073709551616"),
    "a best loss that is a list": ((*PROGRESS, "best_loss"), b"[]"),
    "a loss sum that is null": ((*PROGRESS, "window", "loss_sum"), b"null"),
    "an evaluation that is a number": ((*PROGRESS, "pending_evaluation"), b"1"),
    "seconds that are NaN": (("seconds",), b"NaN"),
    "a fingerprint that is null": (("fingerprints", "model"), b"null"),
    "200,000 opening brackets": (("environment",), b"[" * 200_000),
}
"""The path of a field in train_state.json, and the JSON text of its value."""

YAML = {
    "a rate of 400 hexadecimal digits": "optimizer: {name: adamw, learning_rate: 0x" + "f" * 400 + "}",
    "a path of 9,000 hexadecimal digits": "model: {path: 0x" + "f" * 9000 + "}",
    "a key of 900,000 letters": "model: {? " + "k" * 900_000 + " : 1}",
    "a path longer than a file name may be": "model: {path: builtin:tiny}\ndata: {path: " + "x" * 1000 + "}",
    "an unknown user": "model: {path: builtin:tiny}\ndata: {path: ~no-such-user-here/data}",
    "a path with a null character": 'model: {path: builtin:tiny}\ndata: {path: "a\\0b"}',
    "a reference nested deeply": "model: {path: '${oc.env:A," + "[" * 900 + "}'}",
}
"""The text of a config.yaml."""

SWEEP = {
    "a job of infinity": b'{"job": 1e999, "id": "a", "overrides": []}\n',
    "a job that is a string": b'{"job": "0", "id": "a", "overrides": []}\n',
    "an override without a value": b'{"job": 0, "id": "a", "overrides": ["seed"]}\n',
    "words that are one string": b'{"schema": 1, "words": "abc"}\n',
    "an identity that is a list": b'{"job": 0, "id": [], "overrides": []}\n',
}

SAFETENSORS: dict[str, dict[str, Any]] = {
    "an axis of 2^40 beside one of 0": {"a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}},
    "more tensors than any adapter has": {
        f"a{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)
    },
    "a name of a million letters": {"a" * 1_000_000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
}
"""The header of a file without tensor data."""

ROWS = {
    "a line of 5 MB without its end": b'{"text": "' + b"x" * (5 << 20),
    "a thousand keys in each row": b'{"text": "a"}\n'
    + (json.dumps({f"text{i}": 1 for i in range(1000)}).encode() + b"\n") * 300,
    "a role of four megabytes": json.dumps({"messages": [{"role": "u" * 4_000_000, "content": ""}]}).encode() + b"\n",
}

_KEY = b"general.architecture"
GGUF = {
    "an architecture of 20 MB": b"GGUF"
    + struct.pack("<IQQQ", 3, 0, 1, len(_KEY))
    + _KEY
    + struct.pack("<IQ", 8, 20 << 20)
    + b"x" * (20 << 20),
}
