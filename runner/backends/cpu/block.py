"""One block: RMS norm, causal attention, RMS norm, gated MLP, with LoRA on any of its linear layers.

Notation: n positions (rows of a batch one after the other), d the model's width, r a rank. A group is the linear
layers that share an input: their adapters' first factors are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.partitions import Partition
from runner.backends.cpu.workspace import Workspace

Grads = dict[str, np.ndarray]
Rope = Callable[[int], tuple[np.ndarray, np.ndarray]]


class UnsupportedModel(Exception):
    """The model has a part that the engine does not implement."""


def view(array: mx.array) -> np.ndarray:
    """The numbers of an evaluated float32 array, shared."""
    return np.array(array, copy=False)


@dataclass
class Linear:
    """One linear layer: y = x Wᵀ + b, and with LoRA + scale (x A) B."""

    name: str
    """Dotted path in the model."""
    weight: np.ndarray
    """(outputs, inputs)."""
    bias: np.ndarray | None
    scale: float | None
    """None without LoRA."""

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Linear | None:
        """None for another kind of layer, or numbers that are not float32."""
        scale = float(module.scale) if isinstance(module, LoRALinear) else None
        own = module.linear if isinstance(module, LoRALinear) else module
        if type(own) is not nn.Linear or own.weight.dtype != mx.float32:
            return None
        return cls(name, view(own.weight), view(own.bias) if "bias" in own else None, scale)


class Group:
    """Linear layers with the same input (n, inputs)."""

    def __init__(self, linears: Sequence[Linear], key: str) -> None:
        """`key` tells its arrays in the workspace from those of other groups."""
        self.linears, self._key = linears, key
        self._adapted = [linear for linear in linears if linear.scale is not None]

    def take(self, params: Mapping[str, np.ndarray]) -> None:
        """The factors A (inputs, r) and B (r, outputs) of the update that comes."""
        self._b = [params[f"{linear.name}.lora_b"] for linear in self._adapted]
        factors = [params[f"{linear.name}.lora_a"] for linear in self._adapted]
        self._ranks = [a.shape[1] for a in factors]
        self._a = (
            np.concatenate([a * linear.scale for a, linear in zip(factors, self._adapted, strict=True)], axis=1)
            if factors
            else None
        )

    def forward(
        self, x: np.ndarray, outs: Sequence[np.ndarray], work: Workspace, keep: str, *, add: bool = False
    ) -> None:
        """Write (or `add`) each layer's output; `keep` names what the way back needs."""
        for linear, out in zip(self.linears, outs, strict=True):
            gemm(x, linear.weight.T, out, add=add)
            if linear.bias is not None:
                out += linear.bias
        if self._a is not None:
            low = gemm(x, self._a, self._low(work, keep, len(x)))
            for _, b, part, out in self._adapted_with(outs):
                gemm(low[:, part], b, out, add=True)

    def back(
        self, by_outs: Sequence[np.ndarray], by_x: np.ndarray | None, work: Workspace, keep: str, grads: Grads
    ) -> None:
        """The gradient by the input over `by_x`, where it is wanted; those of the factors B into `grads`."""
        n = len(by_outs[0])
        if by_x is not None:
            for number, (linear, given) in enumerate(zip(self.linears, by_outs, strict=True)):
                gemm(given, linear.weight, by_x, add=number > 0)
        if self._a is None:
            return
        low, by_low = self._low(work, keep, n), work.get("by_low", n, sum(self._ranks))
        for linear, b, part, given in self._adapted_with(by_outs):
            gemm(given, b.T, by_low[:, part])
            grads[f"{linear.name}.lora_b"] = gemm(low[:, part].T, given, np.empty(b.shape, np.float32))
        if by_x is not None:
            gemm(by_low, self._a.T, by_x, add=True)

    def back_of_first_factors(self, x: np.ndarray, work: Workspace, grads: Grads) -> None:
        """The gradients of the factors A, right after `back`: for them the input is needed once more."""
        if self._a is None:
            return
        by_a = gemm(x.T, work.get("by_low", len(x), sum(self._ranks)), work.get("by_a", *self._a.shape))
        for linear, _, part, _ in self._adapted_with([x] * len(self.linears)):
            grads[f"{linear.name}.lora_a"] = by_a[:, part] * np.float32(linear.scale or 0)

    def _adapted_with(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[Linear, np.ndarray, slice, np.ndarray]]:
        """Each layer that has LoRA: its B, its columns among the low ones, and its own of `arrays`."""
        at, number = 0, 0
        for linear, array in zip(self.linears, arrays, strict=True):
            if linear.scale is not None:
                yield linear, self._b[number], slice(at, at + self._ranks[number]), array
                at, number = at + self._ranks[number], number + 1

    def _low(self, work: Workspace, keep: str, count: int) -> np.ndarray:
        return work.get(f"{keep}.{self._key}.low", count, sum(self._ranks))


class Block:
    """A block with its weights, shared with the model's own arrays."""

    def __init__(self, module: nn.Module, name: str, rope: Rope) -> None:
        """`rope`: cos and sin (length, half) of the positions up to a length.

        Raises:
            UnsupportedModel: a part is of another kind than is implemented here.
        """
        attention, mlp = module.self_attn, module.mlp

        def group(owner: nn.Module, path: str, names: Sequence[str], key: str) -> Group:
            made = [Linear.of(getattr(owner, n), f"{name}.{path}.{n}") for n in names]
            if None in made:
                raise UnsupportedModel(f"{name}.{path}")
            return Group(made, key)  # type: ignore[arg-type]

        self.qkv = group(attention, "self_attn", ("q_proj", "k_proj", "v_proj"), "qkv")
        self.o = group(attention, "self_attn", ("o_proj",), "o")
        self.gate_up = group(mlp, "mlp", ("gate_proj", "up_proj"), "gate_up")
        self.down = group(mlp, "mlp", ("down_proj",), "down")
        self.norms = [norm_of(module.input_layernorm), norm_of(module.post_attention_layernorm)]
        heads, kv_heads = attention.n_heads, attention.n_kv_heads
        self.shape = HeadLayout(heads, kv_heads, len(self.qkv.linears[0].weight) // heads, float(attention.scale))
        self.inner = len(self.gate_up.linears[0].weight)
        self.rope = rope

    @property
    def groups(self) -> tuple[Group, ...]:
        """All linear layers."""
        return self.qkv, self.o, self.gate_up, self.down

    def forward(
        self, x: np.ndarray, lane: Partition, out: np.ndarray, keep: str, chosen: np.ndarray | None = None
    ) -> None:
        """`out` (m, d) from `x` (n, d), the positions of `lane`; `keep` names what the way back needs.

        `chosen` (m,): the positions whose output is wanted; None: all. After attention only they are computed.
        """
        qkv = self._common(lane, f"{keep}.qkv", self.shape.columns)
        own = qkv[lane.span]
        self.qkv.forward(self._norm(0, x, lane, keep), self._split(own), lane.own, keep)
        self._rotate(own, lane)
        attended = self._common(lane, f"{keep}.attended", self.shape.heads * self.shape.width)
        log_sums = self._common(lane, f"{keep}.log_sums", self.shape.heads)
        lane.wait()
        lane.ops.attend(qkv, self.shape, lane, attended, log_sums)
        lane.wait()
        m = len(out)
        middle = lane.own.get(f"{keep}.middle", *out.shape)
        middle[:] = x if chosen is None else x[chosen]
        self.o.forward(self._attended(lane, keep, chosen), [middle], lane.own, keep, add=True)
        gate_up = lane.own.get(f"{keep}.gate_up", m, 2 * self.inner)
        self.gate_up.forward(self._norm(1, middle, lane, keep), self._halves(gate_up), lane.own, keep)
        inner = lane.own.get("inner", m, self.inner)
        lane.ops.swiglu(gate_up, inner)
        out[:] = middle
        self.down.forward(inner, [out], lane.own, keep, add=True)

    def back(
        self,
        x: np.ndarray,
        lane: Partition,
        by_out: np.ndarray,
        keep: str,
        grads: Grads,
        chosen: np.ndarray | None = None,
        *,
        first: bool,
    ) -> np.ndarray:
        """The gradient by `x` from that by the output (m, d), which is written over; `chosen` as in `forward`.

        For the `first` block none is made of `x`, and what is returned means nothing.
        """
        n, (m, d) = len(x), by_out.shape
        work = lane.own
        gate_up, middle = work.get(f"{keep}.gate_up", m, 2 * self.inner), work.get(f"{keep}.middle", m, d)
        by_inner, inner = work.get("by_inner", m, self.inner), work.get("inner", m, self.inner)
        by_normed = work.get("by_normed", m, d)
        self.down.back([by_out], by_inner, work, keep, grads)
        lane.ops.swiglu_back(gate_up, by_inner, inner)
        self.down.back_of_first_factors(inner, work, grads)
        self.gate_up.back(self._halves(gate_up), by_normed, work, keep, grads)
        self.gate_up.back_of_first_factors(self._norm(1, middle, lane, keep), work, grads)
        self._norm_back(1, middle, by_normed, by_out, lane, keep)

        columns = self.shape.heads * self.shape.width
        attended, by_attended = self._attended(lane, keep, chosen), self._common(lane, "by_attended", columns)
        qkv, by_qkv = (self._common(lane, name, self.shape.columns) for name in (f"{keep}.qkv", "by_qkv"))
        log_sums, deltas = (self._common(lane, name, self.shape.heads) for name in (f"{keep}.log_sums", "deltas"))
        by_own = by_attended[lane.span] if chosen is None else work.get("by_chosen", m, columns)
        self.o.back([by_out], by_own, work, keep, grads)
        self.o.back_of_first_factors(attended, work, grads)
        heads = m, self.shape.heads, self.shape.width
        own_deltas = deltas[lane.span] if chosen is None else np.empty(heads[:2], np.float32)
        lane.ops.dots(attended.reshape(heads), by_own.reshape(heads), own_deltas)
        if chosen is not None:  # what no one asked for has no gradient but through keys and values
            by_out = _scattered(by_out, chosen, work.get("by_x", n, d))
            _scattered(by_own, chosen, by_attended[lane.span])
            _scattered(own_deltas, chosen, deltas[lane.span])
            by_normed = work.get("by_normed", n, d)
        lane.wait()
        lane.ops.attend_back(qkv, self.shape, lane, deltas, log_sums, by_attended, by_qkv)
        lane.wait()
        by_own = by_qkv[lane.span]
        self._rotate(by_own, lane, back=True)
        self.qkv.back(self._split(by_own), None if first else by_normed, work, keep, grads)
        self.qkv.back_of_first_factors(self._norm(0, x, lane, keep), work, grads)
        if not first:
            self._norm_back(0, x, by_normed, by_out, lane, keep)
        return by_out

    def _attended(self, lane: Partition, keep: str, chosen: np.ndarray | None) -> np.ndarray:
        """The heads' output at the lane's positions, or those that are chosen."""
        own = self._common(lane, f"{keep}.attended", self.shape.heads * self.shape.width)[lane.span]
        return own if chosen is None else np.take(own, chosen, axis=0)

    def _common(self, lane: Partition, name: str, columns: int) -> np.ndarray:
        """(positions of all lanes, columns), which all lanes share."""
        return lane.common.get(name, len(lane.rows), columns)

    def _norm(self, which: int, x: np.ndarray, lane: Partition, keep: str) -> np.ndarray:
        """`x` normed; made again on the way back, where it costs less than keeping it would."""
        weight, eps = self.norms[which]
        normed = lane.own.get("normed", *x.shape)
        lane.ops.rms_norm(x, weight, eps, normed, lane.own.get(f"{keep}.scale{which}", len(x), 1))
        return normed

    def _norm_back(
        self, which: int, x: np.ndarray, by_normed: np.ndarray, add_to: np.ndarray, lane: Partition, keep: str
    ) -> None:
        weight, _ = self.norms[which]
        lane.ops.rms_norm_back(x, weight, lane.own.get(f"{keep}.scale{which}", len(x), 1), by_normed, add_to)

    def _rotate(self, qkv: np.ndarray, lane: Partition, *, back: bool = False) -> None:
        turned = self.shape.heads + self.shape.kv_heads  # queries and keys
        heads = qkv.reshape(len(qkv), -1, self.shape.width)[:, :turned]
        cos, sin = self.rope(max(lane.rows.lengths))
        lane.ops.rotate(heads, cos, sin, lane.rows.places[lane.span], back=back)

    def _split(self, qkv: np.ndarray) -> list[np.ndarray]:
        width = self.shape.width
        edges = [self.shape.heads * width, (self.shape.heads + self.shape.kv_heads) * width]
        return np.split(qkv, edges, axis=1)

    def _halves(self, gate_up: np.ndarray) -> list[np.ndarray]:
        return [gate_up[:, : self.inner], gate_up[:, self.inner :]]


def _scattered(part: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out`, with `part` at `places` and zero elsewhere."""
    out[:] = 0
    out[places] = part
    return out


def norm_of(module: nn.Module) -> tuple[np.ndarray, float]:
    """Weight (d,) and epsilon of an RMS norm. Raises UnsupportedModel for another kind, or numbers that are not float32."""
    if type(module) is not nn.RMSNorm or module.weight.dtype != mx.float32:
        raise UnsupportedModel(type(module).__name__)
    return view(module.weight), float(module.eps)
