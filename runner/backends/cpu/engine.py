"""The loss of a model and the gradients of its adapter, written out for CPUs.

MLX's CPU backend computes elementwise operations in one thread, keeps every array of the forward pass, and allocates
fresh memory for each. Here matrix products go to the same BLAS, everything else is vectorized and divided among
threads, buffers are reused, and attention stores no matrix. Results differ from MLX's in the last digits only, which
`runner.backends.cpu.probe` verifies before the engine is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE

from runner.backends.cpu import gemm as blas
from runner.backends.cpu.block import Block, norm_parameters
from runner.backends.cpu.head import Head, Targets
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.linear import Grads, UnsupportedModel, as_numpy
from runner.backends.cpu.partitions import PackedBatch, PackedRows, Partition, Partitioner

_ARCHITECTURES = ("llama", "qwen2")
"""Modules of mlx_lm.models whose blocks `runner.backends.cpu.block` implements; Mistral and SmolLM are llama there."""
VERSION = 6
"""Changes where the last digits do."""
MAX_POSITIONS = 384
"""Positions that an evaluation computes at once: more are not faster, and take more memory than training does."""
_REUSED = "0"
"""Buffer slot of a block whose activations are not kept: that of the first block with an adapter, which overwrites its
own with each batch."""


class Engine:
    """Computes the loss of a model and the gradients of the adapter in its last blocks."""

    def __init__(
        self, model: nn.Module, *, chunk: int, threads: int = 1, grad_checkpoint: bool = False, ops: Ops | None = None
    ) -> None:
        """`chunk`: positions whose logits exist at once. `grad_checkpoint` stores a block's input alone, and computes
        the block again in the backward pass. `ops`: the kernels, NumPy's by default.

        Raises:
            UnsupportedModel: the model has a part that is not implemented here.
        """
        if type(model).__module__ not in [f"mlx_lm.models.{name}" for name in _ARCHITECTURES]:
            raise UnsupportedModel(type(model).__module__)
        if not blas.available():
            raise UnsupportedModel("no BLAS to call")
        if any(getattr(block, "use_sliding", False) for block in model.layers):
            raise UnsupportedModel("sliding window")
        self.grad_checkpoint, self._ops = grad_checkpoint, ops or Ops()
        self._rope = _Rope(model.layers[0].self_attn.rope)
        blocks = self._blocks(model.layers)
        embedding, head = model.model.embed_tokens, getattr(model, "lm_head", None)
        if type(embedding) is not nn.Embedding or (
            head is not None and (type(head) is not nn.Linear or "bias" in head)
        ):
            raise UnsupportedModel("embedding or head")
        self.embedding = as_numpy(embedding.weight)
        weight = self.embedding if head is None else as_numpy(head.weight)
        if self.embedding.dtype != np.float32 or weight.dtype != np.float32:
            raise UnsupportedModel("not float32")
        self.head = Head(weight, norm_parameters(model.model.norm), chunk, self._ops)
        self.frozen_blocks = next((i for i, block in enumerate(blocks) if block.has_adapter), len(blocks))
        """Number of blocks before the first with an adapter."""
        self.frozen, self.trained = blocks[: self.frozen_blocks], blocks[self.frozen_blocks :]
        self.partitioner = Partitioner(threads)

    @property
    def kernel_version(self) -> str:
        """Version of the engine and of its kernels, on which the last digits depend."""
        return f"{VERSION}, {self._ops.name}"

    def free_frozen_weights(self) -> None:
        """Release the weights of the frozen blocks."""
        self.frozen = []

    def reload_frozen_weights(self, model: nn.Module) -> None:
        """Take the weights of the frozen blocks from `model`."""
        self.frozen = self._blocks(model.layers[: self.frozen_blocks])

    def run_frozen_blocks(self, inputs: np.ndarray) -> np.ndarray:
        """Return the hidden states (batch, length, d) before the first adapted block, of ids (batch, length)."""
        rows = PackedRows([inputs.shape[1]] * len(inputs))
        out = np.empty((inputs.size, self.embedding.shape[1]), np.float32)

        def work(part: Partition) -> None:
            out[part.span] = self._frozen_forward(inputs.reshape(-1)[part.span], part)

        self.partitioner.run(work, rows)
        return out.reshape(*inputs.shape, -1)

    def losses(self, params: Mapping[str, np.ndarray], batch: PackedBatch) -> tuple[float, np.ndarray]:
        """Return the weighted sum of -log p(target), computing some rows at a time, and what each supervised token
        contributes to it, (n,) float32, those of weight 0 left out."""
        self._load(params)
        total, by_token = np.float32(0), [np.empty(0, np.float32)]
        for group in group_rows(batch.rows.lengths, MAX_POSITIONS):
            rows = batch.select_rows(group)
            by_token.append(np.empty(np.count_nonzero(rows.weights), np.float32))
            total += self._loss(rows, by_token[-1])
        return float(total), np.concatenate(by_token)

    def _loss(self, batch: PackedBatch, by_token: np.ndarray) -> np.float32:
        """Return the loss of `batch`, and write what each supervised token contributes to `by_token`."""

        def work(part: Partition) -> np.float32:
            targets = Targets.of_partition(batch, part, len(self.head.weight))
            for x in self._forward(batch.inputs, part, targets.positions, keep=False):
                last = x
            return self.head.loss(last, part, targets, None, by_token)

        return sum(self.partitioner.run(work, batch.rows), np.float32(0))

    def loss_and_grads(self, params: Mapping[str, np.ndarray], batch: PackedBatch) -> tuple[float, Grads]:
        """Return the weighted sum of -log p(target), and its gradients by `params`."""
        self._load(params)

        def work(part: Partition) -> tuple[np.float32, Grads]:
            targets = Targets.of_partition(batch, part, len(self.head.weight))
            block_inputs = list(self._forward(batch.inputs, part, targets.positions, keep=True))
            last = block_inputs.pop()
            grad = part.local.buffer("grad_last", *last.shape)
            loss = self.head.loss(last, part, targets, grad)
            grads: Grads = {}
            for i, block in reversed(list(enumerate(self.trained))):
                x = block_inputs.pop()
                selected = self._selected(i, targets.positions)
                if self.grad_checkpoint:
                    block.forward(x, part, part.local.buffer("recomputed", *grad.shape), _REUSED, selected)
                slot = _REUSED if self.grad_checkpoint else str(i)
                grad = block.backward(x, part, grad, slot, grads, selected, needs_grad_x=i > 0)
            return loss, grads

        (loss, grads), *others = self.partitioner.run(work, batch.rows)
        for other_loss, other_grads in others:
            loss += other_loss
            for name, grad in other_grads.items():
                grads[name] += grad
        return float(loss), grads

    def _blocks(self, modules: Iterable[nn.Module]) -> list[Block]:
        return [Block(module, f"model.layers.{i}", self._rope, self._ops) for i, module in enumerate(modules)]

    def _load(self, params: Mapping[str, np.ndarray]) -> None:
        for block in self.trained:
            for group in block.groups:
                group.load(params)

    def _selected(self, index: int, positions: np.ndarray) -> np.ndarray | None:
        """Return the positions whose output of a trained block is needed: the supervised ones after the last; None for
        all."""
        return positions if index == len(self.trained) - 1 else None

    def _forward(
        self, inputs: np.ndarray, part: Partition, positions: np.ndarray, *, keep: bool
    ) -> Iterator[np.ndarray]:
        """Yield the input of each trained block, and the output of the last at `positions`.

        Without `keep` each is overwritten after the next one.
        """
        x = self._frozen_forward(inputs[part.span], part) if inputs.ndim == 1 else inputs[part.span]
        if not self.trained:
            x = x[positions]
        yield x
        for i, block in enumerate(self.trained):
            selected = self._selected(i, positions)
            shape = x.shape if selected is None else (len(selected), x.shape[1])
            out = part.local.buffer(f"{i}.out", *shape) if keep else self._alternate(x, part, *shape)
            block.forward(x, part, out, str(i) if keep and not self.grad_checkpoint else _REUSED, selected)
            yield out
            x = out

    def _frozen_forward(self, ids: np.ndarray, part: Partition) -> np.ndarray:
        """Return the hidden states (n, d) after the embedding and the frozen blocks."""
        x = part.local.buffer("even", ids.size, self.embedding.shape[1])
        np.take(self.embedding, ids, axis=0, out=x)
        for block in self.frozen:
            out = self._alternate(x, part, *x.shape)
            block.forward(x, part, out, _REUSED)
            x = out
        return x

    @staticmethod
    def _alternate(x: np.ndarray, part: Partition, *shape: int) -> np.ndarray:
        """Return the one of two buffers that does not hold `x`."""
        even = part.local.buffer("even", *shape)
        return part.local.buffer("odd", *shape) if np.may_share_memory(even, x) else even


def group_rows(lengths: list[int], max_positions: int) -> Iterator[slice]:
    """Yield slices of neighbouring rows with at most `max_positions` positions, or of one longer row."""
    start, count = 0, 0
    for row, length in enumerate(lengths):
        if count and count + length > max_positions:
            yield slice(start, row)
            start, count = row, 0
        count += length
    if lengths:
        yield slice(start, len(lengths))


class _Rope:
    """cos and sin (length, half) of the model's rotary positions."""

    def __init__(self, module: nn.Module) -> None:
        if getattr(module, "traditional", True) or type(module) not in (nn.RoPE, Llama3RoPE):
            raise UnsupportedModel(type(module).__name__)
        half = module.dims // 2
        if type(module) is nn.RoPE:
            periods = float(module.base) ** (np.arange(half) / half)
            self._frequencies = float(module.scale) / periods
        else:
            self._frequencies = 1.0 / as_numpy(module._freqs).astype(np.float64)
        self._table: tuple[np.ndarray, np.ndarray] = (np.zeros((0, half)), np.zeros((0, half)))

    def __call__(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self._table[0]) < length:
            angles = np.arange(length)[:, None] * self._frequencies
            self._table = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return self._table[0][:length], self._table[1][:length]
