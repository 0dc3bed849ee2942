"""Every kind of adapter: trained, used by other commands, and carried to each format or refused with a sentence."""

from __future__ import annotations

import json

import pytest

RUNS = {
    "dora": ("lora.type=dora", "lora.num_layers=2"),
    "pissa": ("lora.init=pissa", "lora=query_value", "lora.rank=2"),
    "full": ("lora.type=full", "lora.num_layers=1", "lora.modules_to_save=[norm,embed_tokens]"),
    "whole modules": ("lora=query_value", "lora.num_layers=1", "lora.modules_to_save=[norm]"),
    "ranks": ("lora.keys=[q_proj,layers.0.mlp.up_proj]", "lora.alpha=8", "lora.rank_pattern=[up_proj:2,layers.3:12]"),
    "embedding": ("lora.keys=[embed_tokens,v_proj]", "lora.num_layers=1"),
}
EXPORTS = {
    "dora": {"mlx": "", "fused": "", "peft": "", "npz": "has no DoRA"},
    "pissa": {"mlx": "", "fused": "", "peft": "", "npz": ""},
    "full": {"mlx": "", "fused": "", "peft": "PEFT reads adapters", "npz": "lora.py reads adapters"},
    "whole modules": {"mlx": "model.norm was trained whole", "fused": "", "peft": "", "npz": "was trained whole"},
    "ranks": {"mlx": "", "fused": "", "peft": "", "npz": "ranks that differ by layer"},
    "embedding": {"mlx": "", "fused": "", "peft": "is the head of this model as well", "npz": "embed_tokens"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_every_format_carries_it_or_says_why_not(inline, name):
    run = ("model=tiny", "data=tiny", "optimizer.learning_rate=1e-2", "train.iters=4", "checkpoint.every=2")
    said = inline(*run, *RUNS[name], "train.eval_every=4", "hydra.run.dir=run")
    assert ("stock mlx-lm cannot load" in said) == (name in ("whole modules", "ranks"))
    rows = [json.loads(line) for line in (inline.folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "valid"]
    assert losses[-1] < losses[0]
    tested = json.loads(inline("test", "run", "--json"))
    for to, refusal in EXPORTS[name].items():
        out = inline("export", "run", "--to", to, "--json", "--rows", "8", expect=2 if refusal else 0)
        if refusal:
            assert refusal in out and "Traceback" not in out
            continue
        proof = json.loads(out[out.index("{") :])["check"]
        assert proof["passes"] and proof["deviation"] < 1e-3 and proof["base_loss"] != proof["run_loss"]
    assert tested
    if name == "dora":
        assert "the mean of DoRA's updates" in inline("export", "run", "--to", "mlx", "--average", "last:2", expect=2)
    if name == "full":
        out = inline("export", "run", "--to", "mlx", "--average", "last:2", "--json", "--rows", "8")
        average = json.loads(out[out.index("{") :])
        assert average["check"]["passes"] and average["average"]["steps"] == [2, 4]
