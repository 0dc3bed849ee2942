"""The families whose adapters are carried to PEFT and back: what transformers calls a layer that mlx-lm adapts.

mlx-lm names most layers as the hub's checkpoints do, and these as transformers' modules. Where it stacks experts in one
array, transformers 4 has a module for each, in whose names adapters are published; PEFT turns them into the stacked
parameters of transformers 5 while loading. `make test-all` compares the logits of every family with PEFT's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from runner.common.errors import ModelError
from runner.common.text import shorten

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The parameters of all experts on transformers 5."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The layers of a mixture of experts."""

    own: str
    """The module of mlx-lm that stacks them, inside a block: `mlp.switch_mlp`."""
    theirs: str
    """The list of one module an expert: `mlp.experts`."""
    names: Mapping[str, str]
    """The layers of an expert: mlx-lm's name to theirs."""
    stacked: str = "mlp.experts"
    """The module of transformers 5 that has them all."""


@dataclass(frozen=True, slots=True)
class PeftFamily:
    """How the adapted layers of one architecture are named."""

    own_blocks: str = "model.layers"
    blocks: str = "model.layers"
    """Where transformers has the blocks."""
    experts: Experts | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    """Layers inside a block that PEFT cannot adapt, by the beginning of their names, each with the reason."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that adapters have for a layer inside a block, each with mlx-lm's."""

    @property
    def layers_pattern(self) -> str:
        """The name of the list of blocks, as PEFT's `layers_pattern` takes it."""
        return self.blocks.rpartition(".")[2]


_PLAIN = PeftFamily()
_GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_TAKEN_FOR_EXPERTS = "PEFT on transformers 5 takes a layer of this name for one of the experts"
_NOT_CONVERTED = "PEFT does not turn the experts of this architecture into those of transformers 5"

FAMILIES: dict[str, PeftFamily] = {
    **dict.fromkeys(
        (
            "cohere",
            "cohere2",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm4",
            "granite",
            "helium",
            "llama",
            "mistral",
            "olmo2",
            "olmo3",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "seed_oss",
            "smollm3",
            "stablelm",
            "starcoder2",
        ),
        _PLAIN,
    ),
    "gpt_neox": PeftFamily(own_blocks="model.h", blocks="gpt_neox.layers"),
    "mixtral": PeftFamily(
        experts=Experts(
            "block_sparse_moe.switch_mlp",
            "block_sparse_moe.experts",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
        aliases={"mlp.gate": "block_sparse_moe.gate"},
    ),
    "qwen3_moe": PeftFamily(
        experts=Experts("mlp.switch_mlp", "mlp.experts", _GATED),
        refused={name: _TAKEN_FOR_EXPERTS for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
    ),
    "qwen2_moe": PeftFamily(refused={"mlp.switch_mlp.": _NOT_CONVERTED, "mlp.gate": _NOT_CONVERTED}),
    "deepseek_v3": PeftFamily(refused={"mlp.": _TAKEN_FOR_EXPERTS}),
}
"""By the model_type of config.json."""


def find_family(model_type: object) -> PeftFamily:
    """Return the family of an architecture. Raises ModelError where its names are not known."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"model_type '{shorten(model_type, 60)}': how PEFT names the layers of this architecture is not known here "
            f"(known: {', '.join(FAMILIES)})."
        )
    return family


def split_name(module: str, blocks: str) -> tuple[int, str] | None:
    """Return the number of the block and the name inside it of `model.layers.3.self_attn.q_proj`."""
    if not module.startswith(f"{blocks}."):
        return None
    number, _, name = module.removeprefix(f"{blocks}.").partition(".")
    return (int(number), name) if number.isdecimal() and len(number) < 6 and name else None


def single_expert(name: str, experts: Experts) -> tuple[str, int] | None:
    """Return mlx-lm's name of the stacked layer, and the number of the expert, of `mlp.experts.3.up_proj`.

    Raises:
        ModelError: it is a layer that an expert does not have.
    """
    if not name.startswith(f"{experts.theirs}."):
        return None
    number, _, leaf = name.removeprefix(f"{experts.theirs}.").partition(".")
    if not number.isdecimal():
        return None
    own = {theirs: own for own, theirs in experts.names.items()}.get(leaf)
    if own is None or len(number) > 5:
        raise ModelError(f"The adapter's layer {shorten(name)} is none of an expert.")
    return f"{experts.own}.{own}", int(number)


def stacked_parameter(name: str, experts: Experts, targets: Collection[str]) -> str | None:
    """Return which parameter of all experts the module `name` adapts, or None if it is none of them.

    `targets`: PEFT's target_parameters.
    """
    if name == f"{experts.stacked}.base_layer":
        return GATE_UP
    if name != experts.stacked:
        return None
    return DOWN if any(target.endswith(DOWN) for target in targets) else GATE_UP
