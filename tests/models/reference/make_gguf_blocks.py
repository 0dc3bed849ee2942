"""Write gguf_blocks.json: raw blocks of each block type and the values that the `gguf` package expands them to.

Random bytes cover every code, scale and minimum; the float16 scales are random in [-1, 1), because random bytes would
give NaN or Inf. The values are stored as the hexadecimal bytes of little-endian float32, so that the comparison is bit
for bit. Needs gguf, in a separate environment:

    python tests/models/reference/make_gguf_blocks.py > tests/models/reference/gguf_blocks.json
"""

from __future__ import annotations

import json

import gguf
import numpy as np
from gguf import quants

FLOAT16_OFFSETS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where the float16 numbers stand in a block of each type."""


def main() -> None:
    random = np.random.default_rng(20)
    result = {}
    for name, offsets in FLOAT16_OFFSETS.items():
        number = gguf.GGMLQuantizationType[name]
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[number]
        raw = random.integers(0, 256, (64 // block_values or 2, block_bytes), dtype=np.uint8)
        for offset in offsets:
            raw[:, offset : offset + 2] = random.uniform(-1, 1, (len(raw), 1)).astype("<f2").view(np.uint8)
        values = quants.dequantize(raw, number).astype("<f4")
        result[name] = {"blocks": raw.tobytes().hex(), "values": values.tobytes().hex()}
    print(json.dumps({"gguf": "0.19.0", "types": result}, indent=1))


if __name__ == "__main__":
    main()
