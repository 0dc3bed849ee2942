"""NEFTune (arXiv:2310.05914): uniform noise on the token embeddings in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.common.errors import ConfigError
from runner.models.dropout import DropoutKeys
from runner.models.lora import AdaptedModel
from runner.models.stand_in import stand_in


class EmbeddingNoise:
    """Adds noise to what the token embedding of a model returns; its key is one more of the dropout layers' keys."""

    def __init__(self, adapted: AdaptedModel, alpha: float) -> None:
        """Find the token embedding: the one that the model calls with the token ids themselves.

        Raises:
            ConfigError: it is not found.
        """
        self._alpha = alpha
        self._embedding = _token_embedding(adapted)
        self._keys: DropoutKeys = adapted.dropout
        self._index = adapted.dropout.layers
        adapted.dropout.layers += 1

    @contextmanager
    def applied(self, token_ids: mx.array, lengths: mx.array | None) -> Iterator[None]:
        """Add noise inside this context to the embeddings of `token_ids` (batch, length), if the keys are set.

        It is uniform between -b and b with b = alpha / sqrt(tokens of the row * hidden size).

        Args:
            lengths: (batch,) tokens of each row without padding; None counts all positions.
        """
        keys = self._keys.keys
        if keys is None:
            yield
            return
        key = keys[self._index]

        def with_noise(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
            output = own_call(*args, **kwargs)
            if not args or args[0] is not token_ids:  # such as the probe of the head
                return output
            rows, length, size = output.shape
            tokens = mx.full((rows,), length) if lengths is None else lengths
            bound = self._alpha * mx.rsqrt(tokens.astype(mx.float32) * size)
            noise = mx.random.uniform(-1.0, 1.0, output.shape, key=key) * bound[:, None, None]
            return output + noise.astype(output.dtype)

        with stand_in([self._embedding], with_noise):
            yield


def _token_embedding(adapted: AdaptedModel) -> nn.Module:
    """Return the embedding that is called with the token ids; of several, as in Gemma 4, embed_tokens."""
    named = [(n, m) for n, m in adapted.model.named_modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
    token_ids, called = mx.zeros((1, 2), mx.int32), set[int]()

    def record(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is token_ids:
            called.add(index)
        return own_call(*args, **kwargs)

    with stand_in([module for _, module in named], record):
        adapted.model(token_ids)  # not evaluated
    found = [named[index] for index in called]
    if len(found) > 1:
        found = [(name, module) for name, module in found if name.rpartition(".")[2] == "embed_tokens"]
    if len(found) != 1:
        raise ConfigError(
            "train.neftune_alpha is not possible with this model: the embedding that it calls with the token ids "
            "is not found. Set train.neftune_alpha=null"
        )
    return found[0][1]
