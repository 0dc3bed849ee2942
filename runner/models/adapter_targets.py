"""Which layers of a model an adapter has, and which modules are trained whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from runner.common.errors import ModelError
from runner.config import schema
from runner.models.adapter_layers import DoraEmbedding, DoraLinear, PissaLinear
from runner.models.layer_keys import LayerNames, Selection, choose, matching_rank
from runner.models.mlx_lm_tuner import LoRAEmbedding, LoRALinear, LoRASwitchLinear

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Target:
    """A layer that gets factors of its own."""

    path: str
    """Dotted name in the model."""
    module: nn.Module
    rank: int


@dataclass(frozen=True)
class Targets:
    """What is trained of a model."""

    adapted: list[Target]
    """In the order in which mlx-lm adapts layers, which decides their random factors."""
    whole: Mapping[str, nn.Module]
    """Modules trained whole, by their dotted names in the model; none lies inside another or in an adapted layer."""
    blocks: Mapping[int, frozenset[str]]
    """By the number of a block, the names inside it of what is trained there."""
    outside: frozenset[str]
    """Dotted names in the model of what is trained outside of the blocks."""
    named: frozenset[str]
    """The names inside a block that the keys name in any block."""
    block_names: tuple[frozenset[str], ...]
    """Of each block, the names inside it of all layers that can have an adapter."""
    block_paths: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        """The names of the adapted layers, inside their blocks where they are in one."""
        return sorted({self._inside(target.path)[1] for target in self.adapted})

    @property
    def where(self) -> str:
        """What is trained, for a person: `the last 16 of 30 blocks`, `blocks 3, 20 to 29 of 40 and embed_tokens`."""
        depth, numbers = len(self.block_names), sorted(self.blocks)
        parts = []
        if numbers and numbers == list(range(numbers[0], depth)):
            parts.append(f"the last {len(numbers)} of {depth} blocks")
        elif numbers:
            starts = [n for n in numbers if n - 1 not in self.blocks]
            ends = [n for n in numbers if n + 1 not in self.blocks]
            spans = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
            parts.append(f"block{'s' * (len(numbers) > 1)} {', '.join(spans)} of {depth}")
        parts += sorted(path.rpartition(".")[2] for path in self.outside)
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

    def stock_keys(self, num_layers: int) -> tuple[int, list[str]]:
        """Return `num_layers` and `keys` with which mlx-lm chooses the adapted layers.

        It looks for a key inside its last blocks, and among all dotted names of the model. So names inside the blocks
        do where the same layers are adapted in each of the last blocks; else every layer is named in full.
        """
        adapted: dict[int, set[str]] = {}
        for target in self.adapted:
            block, name = self._inside(target.path)
            if block is not None:
                adapted.setdefault(block, set()).add(name)
        outside = [target.path for target in self.adapted if self._inside(target.path)[0] is None]
        depth = len(self.block_names)
        own = frozenset().union(*adapted.values())
        for count, names in ((num_layers, self.named), (depth - min(adapted, default=depth), own)):
            as_stock = {i: set(names & self.block_names[i]) for i in range(depth - count, depth)}
            if {i: found for i, found in as_stock.items() if found} == adapted:
                return max(1, count), sorted({*names, *outside})
        return num_layers, sorted(target.path for target in self.adapted)

    def _inside(self, path: str) -> tuple[int | None, str]:
        """Return the number of the block of a layer, and its name inside it."""
        for number, block in enumerate(self.block_paths):
            if path.startswith(f"{block}."):
                return number, path.removeprefix(f"{block}.")
        return None, path


def find_targets(model: nn.Module, lora: schema.LoraConfig, num_layers: int, model_path: str) -> Targets:
    """Return what `lora` trains of `model`, in its last `num_layers` blocks unless a key says otherwise.

    Raises:
        ModelError: a key names nothing, or a layer that cannot be trained this way.
    """
    paths = {id(module): path for path, module in reversed(model.named_modules())}
    blocks = [(paths[id(block)], block) for block in model.layers]
    adaptable = _names(model, blocks, _adaptable)
    everything = _names(model, blocks, lambda module: bool(tree_flatten(module.parameters())))
    last = range(len(blocks) - num_layers, len(blocks))
    full = lora.type == "full"
    saved = choose("lora.modules_to_save", lora.modules_to_save or [], everything, num_layers)
    if full and lora.keys is None:
        chosen = Selection({i: frozenset([""]) for i in last}, frozenset())
    elif lora.keys is None:
        chosen = Selection({i: frozenset(adaptable.blocks[i]) for i in last if adaptable.blocks[i]}, frozenset())
    else:
        chosen = choose("lora.keys", lora.keys, everything if full else adaptable, num_layers)
    whole = _outermost(_paths(saved, blocks) | (_paths(chosen, blocks) if full else set()))
    modules = {path: module for path, module in model.named_modules() if path in whole}
    _refuse_quantized(modules)
    adapted: list[Target] = []
    if not full:
        adapted = _ordered(model, blocks, chosen, lora, skipped=whole if lora.keys is None else set())
        overlapping = [t.path for t in adapted if any(_is_inside(t.path, path) for path in whole)]
        if overlapping:
            raise ModelError(f"lora.keys and lora.modules_to_save both name {overlapping[0]}: leave it out of one.")
    if not adapted and not modules:
        raise ModelError(
            f"model.path={model_path}: no layer of its last {num_layers} blocks can have an adapter: "
            "mlx-lm adapts linear, embedding and expert layers only."
        )
    anywhere = adaptable.blocks
    if lora.keys is not None and not full:
        named = choose("lora.keys", lora.keys, adaptable, len(blocks)).blocks.values()
        anywhere = list(named)
    trained = {i: chosen.blocks.get(i, frozenset()) | saved.blocks.get(i, frozenset()) for i in range(len(blocks))}
    return Targets(
        adapted,
        modules,
        {i: names for i, names in trained.items() if names},
        chosen.outside | saved.outside,
        frozenset().union(*anywhere),
        tuple(frozenset(names) for names in adaptable.blocks),
        tuple(path for path, _ in blocks),
    )


def adapter_for(target: Target, lora: schema.LoraConfig, scale: float, *, has_values: bool) -> nn.Module:
    """Return the layer that adapts `target`, at its start; `has_values`: whether the weights of the base are there.

    Raises:
        ModelError: this kind of layer cannot have this kind of adapter.
    """
    module = target.module
    if lora.type == "dora":
        if isinstance(module, _LINEAR):
            return DoraLinear(module, target.rank, scale, has_values=has_values)
        if isinstance(module, _EMBEDDING):
            return DoraEmbedding(module, target.rank, scale, has_values=has_values)
        raise ModelError(_not_possible(target, "lora.type=dora", "linear layers and embeddings"))
    if lora.init == "pissa":
        if isinstance(module, _LINEAR):
            return PissaLinear(module, target.rank, scale)
        raise ModelError(_not_possible(target, "lora.init=pissa", "linear layers"))
    options = {"r": target.rank, "scale": scale, "dropout": lora.dropout}
    if hasattr(module, "to_lora"):
        own: nn.Module = module.to_lora(**options)
        return own
    kinds = ((_LINEAR, LoRALinear), (_EXPERTS, LoRASwitchLinear), (_EMBEDDING, LoRAEmbedding))
    cls = next(adapter for kind, adapter in kinds if isinstance(module, kind))
    adapter: nn.Module = cls.from_base(module, **options)
    return adapter


def _not_possible(target: Target, setting: str, kinds: str) -> str:
    return (
        f"{setting}: {target.path} is of type {type(target.module).__name__}, and {kinds} alone can be trained so. "
        "Leave it out: list the other layers in lora.keys."
    )


def _adaptable(module: nn.Module) -> bool:
    return hasattr(module, "to_lora") or isinstance(module, (*_LINEAR, *_EXPERTS, *_EMBEDDING))


def _names(model: nn.Module, blocks: list[tuple[str, nn.Module]], wanted: Callable[[nn.Module], bool]) -> LayerNames:
    """Return the names of the modules for which `wanted` is true, without the blocks and what holds them."""
    inside = [[name for name, m in block.named_modules() if name and wanted(m)] for _, block in blocks]
    prefixes = tuple(f"{path}." for path, _ in blocks)
    outside = [
        name
        for name, module in model.named_modules()
        if name
        and not f"{name}.".startswith(prefixes)
        and not any(prefix.startswith(f"{name}.") for prefix in prefixes)
        and wanted(module)
    ]
    return LayerNames(inside, outside)


def _paths(selection: Selection, blocks: list[tuple[str, nn.Module]]) -> set[str]:
    inside = {
        f"{blocks[i][0]}.{name}" if name else blocks[i][0] for i, names in selection.blocks.items() for name in names
    }
    return inside | selection.outside


def _outermost(paths: Iterable[str]) -> set[str]:
    chosen = set(paths)
    return {path for path in chosen if not any(path != other and _is_inside(path, other) for other in chosen)}


def _is_inside(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _ordered(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    chosen: Selection,
    lora: schema.LoraConfig,
    skipped: set[str],
) -> list[Target]:
    """Return the chosen layers in mlx-lm's order, without those inside `skipped`."""
    found = [
        (f"{path}.{name}", module)
        for i, (path, block) in enumerate(blocks)
        for name, module in block.named_modules()
        if name in chosen.blocks.get(i, ())
    ]
    found += [(name, module) for name, module in model.named_modules() if name in chosen.outside]
    kept = [(path, module) for path, module in found if not any(_is_inside(path, other) for other in skipped)]
    ranks = matching_rank(lora, [path for path, _ in kept], [path for path, _ in blocks])
    return [Target(path, module, ranks[path]) for path, module in kept]


def _refuse_quantized(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        for name, part in module.named_modules():
            if "scales" in part and "weight" in part and part.weight.dtype == mx.uint32:
                where = f"{path}.{name}" if name else path
                raise ModelError(
                    f"{where} is quantized, and its weight cannot be trained whole. Expand the base: "
                    "model.dequantize=always; or train an adapter of it: lora.type=lora."
                )
