"""`builtin:tiny`: a llama model of fixed random weights with a byte-level tokenizer, for tests and smoke runs."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
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
    """Return a tokenizer with one token per byte, three special tokens and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return TokenizerWrapper(fast_tokenizer, BPEStreamingDetokenizer)


def build_model() -> llama.Model:
    """Return the model, with the same weights every time and on every machine.

    Each array is drawn from a key of its own. The embedding's values are small, so that the untrained model's loss is
    near log(vocabulary size).
    """
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    weights = []
    for i, (name, array) in enumerate(sorted(tree_flatten(model.parameters()))):
        if array.ndim == 1:
            weights.append((name, mx.ones(array.shape)))
            continue
        bound = 0.05 if "embed" in name else array.shape[-1] ** -0.5
        weights.append((name, mx.random.uniform(-bound, bound, array.shape, key=mx.random.key(1000 + i))))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    model.eval()
    return model
