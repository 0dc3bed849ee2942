"""Record what PEFT's layers compute, and their gradients: LoRA, rsLoRA, DoRA and PiSSA on a small linear layer.

Written to the file that is named: JSON of inputs, outputs and gradients in float32. Needs torch and peft, in a separate
environment:

    python tests/models/reference/peft_layers.py tests/models/reference/peft_layers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

INPUTS, OUTPUTS, RANK, ROWS = 8, 6, 2, 3
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "dora": {"lora_alpha": 3, "use_dora": True},
    "pissa": {"lora_alpha": 3, "init_lora_weights": "pissa"},
}


def record(kind: str) -> dict[str, Any]:
    """Return weights, factors, the output for the inputs, and the gradients of the sum of its sines."""
    torch.manual_seed(0)
    generator = np.random.default_rng(len(kind))
    linear = torch.nn.Linear(INPUTS, OUTPUTS)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(generator.normal(size=(OUTPUTS, INPUTS))))
        linear.bias.copy_(torch.tensor(generator.normal(size=OUTPUTS)))
    values: dict[str, Any] = {"weight": linear.weight.tolist(), "bias": linear.bias.tolist()}
    config = LoraConfig(r=RANK, target_modules=["0"], **KINDS[kind])
    model = get_peft_model(torch.nn.Sequential(linear), config)
    trained = {
        name.split(".lora_")[1].split(".")[0]: parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            change = torch.tensor(generator.normal(size=parameter.shape), dtype=torch.float32)
            if kind == "pissa":
                values[f"start {name}"] = parameter.tolist()
            parameter.add_(0.3 * change)
            values[name] = parameter.tolist()
    x = torch.tensor(generator.normal(size=(ROWS, INPUTS)), dtype=torch.float32)
    y = model(x)
    torch.sin(y).sum().backward()
    values |= {"x": x.tolist(), "y": y.tolist()}
    return values | {f"grad {name}": parameter.grad.tolist() for name, parameter in trained.items()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({kind: record(kind) for kind in KINDS}, indent=1) + "\n")
