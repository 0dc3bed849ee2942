"""`builtin:tiny`: a llama of random weights with a byte-level tokenizer, made on the spot for tests and smoke runs."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def build_tokenizer() -> TokenizerWrapper:
    """One token a byte, three special tokens, a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)


def build_model() -> llama.Model:
    """The same weights every time, on every machine: drawn from keys of their own, by name.

    The embedding is drawn small, so that the untrained model's loss is near log(vocabulary).
    """
    made = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    weights = []
    for i, (name, array) in enumerate(sorted(tree_flatten(made.parameters()))):
        if array.ndim == 1:
            weights.append((name, mx.ones(array.shape)))
            continue
        bound = 0.05 if "embed" in name else array.shape[-1] ** -0.5
        weights.append((name, mx.random.uniform(-bound, bound, array.shape, key=mx.random.key(1000 + i))))
    made.update(tree_unflatten(weights))
    mx.eval(made.parameters())
    made.eval()
    return made
