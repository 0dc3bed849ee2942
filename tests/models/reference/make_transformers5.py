"""Write tiny random models of many families as transformers 5 saves them, with their logits.

The base of the rotary embedding is not the one that mlx-lm assumes where config.json has none. Needs torch and
transformers, in a separate environment:

    python tests/models/reference/make_transformers5.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_theta": 400.0, "rope_type": "default"}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    **ROPE,
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "long_factor": [1 + 0.5 * i for i in range(6)],
    "short_factor": [1 + 0.25 * i for i in range(6)],
}
BY_LAYER_TYPE = {
    "full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {**ROPE, "rope_theta": 50.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
PATTERN = ["sliding_attention"] * 2 + ["full_attention"]
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}


def cases() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Yield a name, the class of the config and its arguments besides SIZES and ROPE."""
    yield "llama", hf.LlamaConfig, {}
    yield "llama3", hf.LlamaConfig, {"rope_parameters": LLAMA3}
    yield "mistral", hf.MistralConfig, {"sliding_window": None}
    yield "mixtral", hf.MixtralConfig, {"sliding_window": None, "num_local_experts": 4}
    yield "qwen2", hf.Qwen2Config, {}
    yield "qwen2_yarn", hf.Qwen2Config, {"rope_parameters": YARN}
    yield "qwen2_moe", hf.Qwen2MoeConfig, {**EXPERTS, "shared_expert_intermediate_size": 48}
    yield "qwen3", hf.Qwen3Config, {"head_dim": 16}
    yield "qwen3_moe", hf.Qwen3MoeConfig, {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}
    yield "gemma2", hf.Gemma2Config, {**GEMMA, "sliding_window": 256}
    yield "gemma3", hf.Gemma3TextConfig, {**GEMMA, "num_hidden_layers": 7, "rope_parameters": BY_LAYER_TYPE}
    yield (
        "gemma3_pattern",
        hf.Gemma3TextConfig,
        {**GEMMA, "num_hidden_layers": 6, "rope_parameters": BY_LAYER_TYPE, "layer_types": PATTERN * 2},
    )
    yield "phi3", hf.Phi3Config, {"sliding_window": None, "original_max_position_embeddings": 512}
    yield (
        "phi3_longrope",
        hf.Phi3Config,
        {"sliding_window": None, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    )
    yield "granite", hf.GraniteConfig, {}
    yield "olmo2", hf.Olmo2Config, {}
    yield (
        "olmo3",
        hf.Olmo3Config,
        {
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "rope_parameters": {"full_attention": {**YARN, "attention_factor": None}, "sliding_attention": ROPE},
        },
    )
    yield "stablelm", hf.StableLmConfig, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}
    yield "glm4", hf.Glm4Config, {"head_dim": 16, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
    yield (
        "gpt_neox",
        hf.GPTNeoXConfig,
        {
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
            "intermediate_size": 256,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
        },
    )
    yield (
        "cohere2",
        hf.Cohere2Config,
        {
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "layer_types": PATTERN * 2,
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-5,
            "head_dim": 16,
        },
    )
    yield (
        "exaone4",
        hf.Exaone4Config,
        {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": PATTERN * 2, "head_dim": 16},
    )
    yield (
        "minimax_m2",
        hf.MiniMaxM2Config,
        {
            "head_dim": 16,
            "shared_intermediate_size": 0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
    )
    yield "deepseek_v3", hf.DeepseekV3Config, DEEPSEEK
    yield "ernie4_5", hf.Ernie4_5Config, {"head_dim": 16}
    yield "seed_oss", hf.SeedOssConfig, {"head_dim": 16}
    yield "gemma", hf.GemmaConfig, {"head_dim": 16, "hidden_act": "gelu", "tie_word_embeddings": True}
    yield "cohere", hf.CohereConfig, {"layer_norm_eps": 1e-5, "tie_word_embeddings": True}
    yield "helium", hf.HeliumConfig, {"head_dim": 16}
    yield "phi", hf.PhiConfig, {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "layer_norm_eps": 1e-5}
    yield "smollm3", hf.SmolLM3Config, {}
    yield "starcoder2", hf.Starcoder2Config, {"norm_epsilon": 1e-5, "sliding_window": None, "hidden_act": "gelu"}


def main() -> None:
    ids = torch.tensor([[5, *((37 * i) % 127 + 1 for i in range(40))]])
    for name, cls, settings in cases():
        folder = Path(sys.argv[1]) / name
        config = cls(**{**SIZES, "rope_parameters": dict(ROPE), **settings})
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            logits = model(ids).logits.numpy()
        model.save_pretrained(folder)
        np.save(folder / "ids.npy", ids.numpy())
        np.save(folder / "logits.npy", logits)


if __name__ == "__main__":
    main()
