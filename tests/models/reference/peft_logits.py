"""Load adapters that the project wrote for PEFT, and write adapters for it to read, each with its logits.

Each folder holds a model as transformers saves it, `ids.npy`, and in `peft/` an adapter. Written to it: the logits of
model and adapter, `peft_logits.npy`; `from_peft/`, an adapter with ranks and alphas by layer; `from_peft_logits.npy`.
Needs torch, transformers and peft, in a separate environment:

    python tests/models/reference/peft_logits.py FOLDER...
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def logits(model: torch.nn.Module, folder: Path) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.load(folder / "ids.npy"))).logits.numpy()


def write_adapter(folder: Path) -> None:
    """Write an adapter of all linear layers of the blocks, some with a rank or an alpha of their own."""
    torch.manual_seed(1)
    model = load(folder)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if any(".experts." in name for name, _ in model.named_parameters()):
        linear = [name for name in linear if ".self_attn." in name]
    names = {name.rpartition(".")[2] for name in linear} - {"lm_head", "embed_out", "kv_b_proj"}
    first, last = sorted(names)[0], sorted(names)[-1]
    names |= {"mixtral": {"w1", "w2", "w3", "gate"}, "qwen3_moe": {"gate_proj", "up_proj", "down_proj", "gate"}}.get(
        model.config.model_type, set()
    )
    rslora = len(folder.name) % 2 == 0
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=sorted(names),
        rank_pattern={} if rslora else {first: 2, rf"layers\.1\..*\.{last}": 3},
        alpha_pattern={} if rslora else {last: 10},
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    np.save(folder / "from_peft_logits.npy", logits(adapted.eval(), folder))
    adapted.save_pretrained(folder / "from_peft")


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(load(folder), folder / "peft").eval()
        # Keys that PEFT did not find, or found no place for, are warnings to it.
        (folder / "warnings.txt").write_text("\n".join(str(w.message) for w in caught if "key" in str(w.message)))
        np.save(folder / "peft_logits.npy", logits(model, folder))
        write_adapter(folder)


if __name__ == "__main__":
    main()
