"""GGUF as a model source: a llama-family file as mlx-lm's own model, config and tokenizer.

`read` is the way in. The file is only ever opened for reading, and its tensors are decoded here:
`mlx.core.load` opens a GGUF file for writing, so it refuses one that is read-only, and it converts the types it
cannot keep without saying so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError
from runner.models.gguf import tokenizer as gguf_tokenizer
from runner.models.gguf.blocks import GROUP_SIZE, Quantized, read_tensor
from runner.models.gguf.config import llama_config
from runner.models.gguf.header import Header, read_header

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model read from a GGUF file.

    `config` is in the style of the hub's config.json: with it, `mlx_lm.utils.save_model`, `save_config` and
    `tokenizer.save_pretrained` make a folder that mlx-lm loads.
    """

    model: Model
    config: dict
    tokenizer: TokenizerWrapper


def load_gguf(path: Path, *, keep_quantized: bool, dtype: mx.Dtype | None) -> GgufModel:
    """The model in the GGUF file `path`.

    With `keep_quantized`, matrices of Q4_0, Q4_1 and Q8_0 blocks stay quantized (4 or 8 bits, groups of 32) and
    `dtype` is that of their scales and of everything else; without, all is `dtype`. None stands for float32 on
    the CPU, the only type that is fast there, and elsewhere for the type that most of the file is stored in.

    Raises ModelError, naming the file and what is supported, for a damaged or hostile file, another architecture
    than llama, an unsupported tensor type, tokenizer or rope scaling, and missing, unknown or misshapen tensors.
    """
    header = read_header(path)
    factors = _rope_factors(path, header)
    config = llama_config(path, header, factors)
    names = _names(path, header, config)
    tokenizer = gguf_tokenizer.build(header.metadata, path)
    if len(tokenizer) > config["vocab_size"]:
        raise ModelError(f"{path}: {len(tokenizer)} tokens, but embeddings for {config['vocab_size']}.")
    tokenizer.model_max_length = config["max_position_embeddings"]
    dtype = dtype or _default_dtype(header)
    config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")

    bits: dict[str, int] = {}
    model = Model(ModelArgs.from_dict(config))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    weights: dict[str, mx.array] = {}
    for source, target in names.items():
        info = header.tensors[source]
        if shapes[target] != info.shape:
            raise ModelError(f"{path}: tensor {source!r} has the shape {info.shape}, not {shapes[target]}.")
        tensor = _unpermuted(read_tensor(path, info), target, config)
        if keep_quantized and isinstance(tensor, Quantized):
            layer = target.removesuffix(".weight")
            bits[layer] = tensor.bits
            parts = {
                target: mx.array(tensor.packed()),
                f"{layer}.scales": mx.array(tensor.scales).astype(dtype),
                f"{layer}.biases": mx.array(tensor.biases).astype(dtype),
            }
        else:
            dense = tensor.dense() if isinstance(tensor, Quantized) else np.ascontiguousarray(tensor)
            parts = {target: mx.array(dense).astype(dtype)}
        mx.eval(parts)  # one tensor at a time: the peak is the model and one tensor's source
        weights |= parts
    for missing in shapes.keys() - weights.keys():  # biases only: _names has checked the rest
        weights[missing] = mx.zeros(shapes[missing], dtype)
    if bits:
        config["quantization"] = _quantization(bits)
        nn.quantize(model, class_predicate=lambda layer, _: _settings(bits[layer]) if layer in bits else False)
    model.eval()
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return GgufModel(model, config, gguf_tokenizer.wrap(tokenizer, header.metadata))


def _names(path: Path, header: Header, config: dict) -> dict[str, str]:
    """GGUF tensor name to mlx-lm parameter name; every weight of the model is there, and nothing else."""
    layers = range(config["num_hidden_layers"])
    stems = {f"blk.{i}.{stem}": f"model.layers.{i}.{name}" for i in layers for stem, name in _IN_BLOCK.items()}
    stems |= _OUTSIDE
    if config["tie_word_embeddings"]:
        del stems["output"]
    names = {}
    for source in header.tensors.keys() - {_ROPE_FACTORS}:
        stem, _, part = source.rpartition(".")
        biased = part == "bias" and stems.get(stem, "").endswith("_proj")
        if stem not in stems or not (part == "weight" or biased):
            raise ModelError(f"{path}: tensor {source[:80]!r} is not part of a llama model as supported here.")
        names[source] = f"{stems[stem]}.{part}"
    for stem in stems:
        if f"{stem}.weight" not in names:
            raise ModelError(f"{path}: tensor '{stem}.weight' is missing; the file is not a whole llama model.")
    return dict(sorted(names.items()))


def _unpermuted(tensor: np.ndarray | Quantized, target: str, config: dict) -> np.ndarray | Quantized:
    """Undo llama.cpp's order of the rows of q and k, which pairs neighbours for its rotary embedding.

    Within each head the file holds (d/2, 2) where the hub's layout is (2, d/2).
    """
    for part, count in ((".q_proj.", "num_attention_heads"), (".k_proj.", "num_key_value_heads")):
        if part in target:
            heads, width = config[count], config["head_dim"]
            order = np.arange(heads * width).reshape(heads, width // 2, 2).swapaxes(1, 2).reshape(-1)
            return tensor.rows(order) if isinstance(tensor, Quantized) else tensor[order]
    return tensor


def _rope_factors(path: Path, header: Header) -> np.ndarray | None:
    """What each rotary frequency is divided by, float32 (head_dim / 2,); None where nothing is scaled."""
    info = header.tensors.get(_ROPE_FACTORS)
    if info is None:
        return None
    if info.kind != "F32" or len(info.shape) != 1:
        raise ModelError(f"{path}: {_ROPE_FACTORS} is {info.kind} of shape {info.shape}, not a list of F32.")
    return np.asarray(read_tensor(path, info))


def _default_dtype(header: Header) -> mx.Dtype:
    if mx.default_device() == mx.cpu:
        return mx.float32
    stored: dict[str, int] = {}
    for info in header.tensors.values():
        stored[info.kind] = stored.get(info.kind, 0) + info.nbytes
    most = max(stored, key=stored.__getitem__)
    return {"F32": mx.float32, "BF16": mx.bfloat16}.get(most, mx.float16)


def _settings(bits: int) -> dict:
    return {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}


def _quantization(bits: dict[str, int]) -> dict:
    """mlx-lm's "quantization": what most layers use, then each layer that differs."""
    counts = list(bits.values())
    usual = max(sorted(set(counts)), key=counts.count)
    return _settings(usual) | {layer: _settings(n) for layer, n in sorted(bits.items()) if n != usual}
