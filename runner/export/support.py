"""Which formats can hold which adapters, by settings and names of arrays alone: before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection

from runner.config.schema import LoraConfig

_FACTORS = (".lora_a", ".lora_b", ".m")


def refusal(to: str, lora: LoraConfig, names: Collection[str], *, adapter_only: bool, averages: bool) -> str | None:
    """Return why the format `to` cannot hold the adapter, as a sentence; None where it may.

    `names`: those of the adapter's arrays; `averages`: whether it is the average of checkpoints.
    """
    whole = sorted(name.rpartition(".")[0] for name in names if not name.endswith(_FACTORS))
    if averages and lora.type == "dora":
        return (
            "--average: the mean of DoRA's updates is no update of DoRA, because each is scaled by norms of its own. "
            "Export one checkpoint: --checkpoint."
        )
    if lora.type == "full":
        if to in ("peft", "npz"):
            program = "PEFT" if to == "peft" else "lora.py"
            return f"{program} reads adapters, and lora.type=full has trained weights of the model itself: --to fused."
        return None
    if whole and (to in ("mlx", "npz") or (to == "hub" and adapter_only)):
        return (
            f"{whole[0]} was trained whole (lora.modules_to_save), which an adapter of "
            f"{'lora.py' if to == 'npz' else 'mlx-lm'} cannot hold. The merged model: --to fused; for PEFT: --to peft."
        )
    if to == "npz" and (lora.type == "dora" or lora.rank_pattern):
        what = "DoRA" if lora.type == "dora" else "ranks that differ by layer (lora.rank_pattern)"
        return f"lora.py of mlx-examples has no {what}. For mlx-lm: --to mlx or fused."
    if to == "peft" and any(name.endswith("embed_tokens.m") for name in names):
        return "PEFT's DoRA of an embedding scales columns where mlx-lm's scales rows: --to fused."
    return None
