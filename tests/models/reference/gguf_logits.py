"""Read GGUF files by transformers, and by llama.cpp where llama_cpp is installed, and write their logits.

Needs torch, transformers and gguf, in a separate environment:

    python tests/models/reference/gguf_logits.py FOLDER NAME...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

IDS = [1, *range(60, 82), 2]
READ_BY_TRANSFORMERS = ("llama", "mistral-nemo", "qwen2", "phi3")
"""Of other families transformers 5.23 leaves out experts, scales or windows, or has no tokenizer."""


def by_transformers(file: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def by_llama_cpp(file: Path) -> np.ndarray:
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=64, n_batch=64, logits_all=True, n_threads=1, verbose=False)
    llama.eval(IDS)
    return np.array(llama.scores[: len(IDS)])


def main() -> None:
    folder, readers = Path(sys.argv[1]), {}
    for name in sys.argv[2:]:
        readers[name] = []
        for reader, read in (("transformers", by_transformers), ("llama_cpp", by_llama_cpp)):
            if reader == "transformers" and name not in READ_BY_TRANSFORMERS:
                continue
            try:
                logits = read(folder / f"{name}.gguf")
            except ImportError:
                continue
            except Exception as error:
                print(name, reader, type(error).__name__, str(error)[:300], file=sys.stderr)
                continue
            np.save(folder / f"{name}-{reader}.npy", logits)
            readers[name].append(reader)
    (folder / "readers.json").write_text(json.dumps(readers))


if __name__ == "__main__":
    main()
