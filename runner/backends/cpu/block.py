"""One transformer block: RMSNorm, causal attention, RMSNorm, gated MLP, with LoRA on any of its linear layers.

Shapes: n positions (the rows of a batch one after the other), m of them selected, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.linear import Grads, Linear, LinearGroup, UnsupportedModel, as_numpy
from runner.backends.cpu.partitions import Partition

Rope = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Length to cos and sin (length, half) of the rotary positions."""


class Block:
    """A transformer block of the model, whose weights it shares.

    `slot` names the buffers in which `forward` leaves what `backward` reads: one a block, or one for all where only
    one block's activations exist at a time. `selected` (m,): positions whose output is needed, None for all n; after
    attention only these are computed.
    """

    def __init__(self, module: nn.Module, name: str, rope: Rope, ops: Ops) -> None:
        """Read the layers of `module`.

        Raises:
            UnsupportedModel: a part of another kind than is implemented here.
        """

        def group(owner: str, names: Sequence[str], key: str) -> LinearGroup:
            modules = {f"{name}.{owner}.{n}": getattr(getattr(module, owner), n) for n in names}
            return LinearGroup([Linear.from_module(m, path) for path, m in modules.items()], key)

        self.qkv_proj = group("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv")
        self.o_proj = group("self_attn", ("o_proj",), "o")
        self.gate_up_proj = group("mlp", ("gate_proj", "up_proj"), "gate_up")
        self.down_proj = group("mlp", ("down_proj",), "down")
        self.norms = [norm_parameters(module.input_layernorm), norm_parameters(module.post_attention_layernorm)]
        heads, kv_heads = module.self_attn.n_heads, module.self_attn.n_kv_heads
        width = len(self.qkv_proj.linears[0].weight) // heads
        self.layout = HeadLayout(heads, kv_heads, width, float(module.self_attn.scale))
        self.inner = len(self.gate_up_proj.linears[0].weight)
        self._rope, self._ops = rope, ops

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """All linear layers."""
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    @property
    def has_adapter(self) -> bool:
        """Whether a linear layer has LoRA."""
        return any(linear.scale is not None for group in self.groups for linear in group.linears)

    def forward(
        self, x: np.ndarray, part: Partition, out: np.ndarray, slot: str, selected: np.ndarray | None = None
    ) -> None:
        """Write the output (m, d) to `out` from `x` (n, d), the positions of `part`."""
        qkv = self._shared(part, f"{slot}.qkv", self.layout.columns)
        qkv_span = qkv[part.span]
        self.qkv_proj.forward(self._norm(0, x, part, slot), self._split(qkv_span), part.local, slot)
        self._rotate(qkv_span, part)
        attended = self._shared(part, f"{slot}.attended", self.layout.heads * self.layout.width)
        log_sums = self._shared(part, f"{slot}.log_sums", self.layout.heads)
        part.synchronize()
        self._ops.attention(qkv, self.layout, part, attended, log_sums)
        part.synchronize()
        m = len(out)
        middle = part.local.buffer(f"{slot}.middle", *out.shape)
        middle[:] = x if selected is None else x[selected]
        self.o_proj.forward(self._attended(part, slot, selected), [middle], part.local, slot, add=True)
        gate_up = part.local.buffer(f"{slot}.gate_up", m, 2 * self.inner)
        self.gate_up_proj.forward(self._norm(1, middle, part, slot), self._halves(gate_up), part.local, slot)
        inner = part.local.buffer("inner", m, self.inner)
        self._ops.swiglu(gate_up, inner)
        out[:] = middle
        self.down_proj.forward(inner, [out], part.local, slot, add=True)

    def backward(
        self,
        x: np.ndarray,
        part: Partition,
        grad_out: np.ndarray,
        slot: str,
        grads: Grads,
        selected: np.ndarray | None = None,
        *,
        needs_grad_x: bool,
    ) -> np.ndarray:
        """Return the gradient by `x` (n, d), and add those of the adapters to `grads`.

        `grad_out` (m, d), the gradient by the output, is overwritten. Where the gradient by `x` is not needed, the
        returned array has no meaning.
        """
        n, (m, d) = len(x), grad_out.shape
        work, layout = part.local, self.layout
        gate_up = work.buffer(f"{slot}.gate_up", m, 2 * self.inner)
        middle = work.buffer(f"{slot}.middle", m, d)
        grad_inner, inner = work.buffer("grad_inner", m, self.inner), work.buffer("inner", m, self.inner)
        grad_normed = work.buffer("grad_normed", m, d)
        self.down_proj.backward([grad_out], grad_inner, work, slot, grads)
        self._ops.swiglu_backward(gate_up, grad_inner, inner)
        self.down_proj.backward_a(inner, work, grads)
        self.gate_up_proj.backward(self._halves(gate_up), grad_normed, work, slot, grads)
        self.gate_up_proj.backward_a(self._norm(1, middle, part, slot), work, grads)
        self._norm_backward(1, middle, grad_normed, grad_out, part, slot)

        columns = layout.heads * layout.width
        attended, grad_attended = self._attended(part, slot, selected), self._shared(part, "grad_attended", columns)
        qkv, grad_qkv = (self._shared(part, name, layout.columns) for name in (f"{slot}.qkv", "grad_qkv"))
        log_sums, deltas = (self._shared(part, name, layout.heads) for name in (f"{slot}.log_sums", "deltas"))
        grad_span = grad_attended[part.span] if selected is None else work.buffer("grad_selected", m, columns)
        self.o_proj.backward([grad_out], grad_span, work, slot, grads)
        self.o_proj.backward_a(attended, work, grads)
        by_head = m, layout.heads, layout.width
        deltas_span = deltas[part.span] if selected is None else np.empty(by_head[:2], np.float32)
        self._ops.row_dots(attended.reshape(by_head), grad_span.reshape(by_head), deltas_span)
        if selected is not None:  # the other positions have gradients through their keys and values alone
            grad_out = _scatter(grad_out, selected, work.buffer("grad_x", n, d))
            _scatter(grad_span, selected, grad_attended[part.span])
            _scatter(deltas_span, selected, deltas[part.span])
            grad_normed = work.buffer("grad_normed", n, d)
        part.synchronize()
        self._ops.attention_backward(qkv, layout, part, deltas, log_sums, grad_attended, grad_qkv)
        part.synchronize()
        grad_qkv_span = grad_qkv[part.span]
        self._rotate(grad_qkv_span, part, inverse=True)
        self.qkv_proj.backward(self._split(grad_qkv_span), grad_normed if needs_grad_x else None, work, slot, grads)
        self.qkv_proj.backward_a(self._norm(0, x, part, slot), work, grads)
        if needs_grad_x:
            self._norm_backward(0, x, grad_normed, grad_out, part, slot)
        return grad_out

    def _attended(self, part: Partition, slot: str, selected: np.ndarray | None) -> np.ndarray:
        """Return the heads' output at the partition's positions, or at the selected ones."""
        span = self._shared(part, f"{slot}.attended", self.layout.heads * self.layout.width)[part.span]
        return span if selected is None else np.take(span, selected, axis=0)

    def _shared(self, part: Partition, name: str, columns: int) -> np.ndarray:
        """Return the buffer (positions of the batch, columns) that all partitions share."""
        return part.shared.buffer(name, len(part.rows), columns)

    def _norm(self, which: int, x: np.ndarray, part: Partition, slot: str) -> np.ndarray:
        """Return `x` normed; computed again in the backward pass, where it costs less than to store it."""
        weight, eps = self.norms[which]
        normed = part.local.buffer("normed", *x.shape)
        self._ops.rms_norm(x, weight, eps, normed, part.local.buffer(f"{slot}.scale{which}", len(x), 1))
        return normed

    def _norm_backward(
        self, which: int, x: np.ndarray, grad_normed: np.ndarray, grad_x: np.ndarray, part: Partition, slot: str
    ) -> None:
        weight, _ = self.norms[which]
        scale = part.local.buffer(f"{slot}.scale{which}", len(x), 1)
        self._ops.rms_norm_backward(x, weight, scale, grad_normed, grad_x)

    def _rotate(self, qkv: np.ndarray, part: Partition, *, inverse: bool = False) -> None:
        heads = qkv.reshape(len(qkv), -1, self.layout.width)[:, : self.layout.heads + self.layout.kv_heads]
        cos, sin = self._rope(max(part.rows.lengths))
        self._ops.rope(heads, cos, sin, part.rows.row_positions[part.span], inverse=inverse)

    def _split(self, qkv: np.ndarray) -> list[np.ndarray]:
        width = self.layout.width
        edges = [self.layout.heads * width, (self.layout.heads + self.layout.kv_heads) * width]
        return np.split(qkv, edges, axis=1)

    def _halves(self, gate_up: np.ndarray) -> list[np.ndarray]:
        return [gate_up[:, : self.inner], gate_up[:, self.inner :]]


def _scatter(values: np.ndarray, indices: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write `values` to the rows `indices` of `out`, zero to the others, and return it."""
    out[:] = 0
    out[indices] = values
    return out


def norm_parameters(module: nn.Module) -> tuple[np.ndarray, float]:
    """Return weight (d,) and epsilon of an RMSNorm.

    Raises:
        UnsupportedModel: another kind of norm, or not float32.
    """
    if type(module) is not nn.RMSNorm or module.weight.dtype != mx.float32:
        raise UnsupportedModel(type(module).__name__)
    return as_numpy(module.weight), float(module.eps)
