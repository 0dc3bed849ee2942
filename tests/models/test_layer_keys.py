"""The syntax of lora.keys: names, ends, globs, blocks by number, layers outside the blocks, and what is refused."""

from __future__ import annotations

import pytest

from runner.common.errors import ModelError
from runner.config.schema import LoraConfig
from runner.models.layer_keys import LayerNames, choose, matching_rank

INSIDE = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate"]
NAMES = LayerNames([["self_attn.q_proj", "mlp.dense"], *[INSIDE] * 3], ["model.embed_tokens", "lm_head"])
Q, K, UP, GATE = INSIDE


@pytest.mark.parametrize(
    ("keys", "last", "blocks", "outside"),
    [
        (["self_attn.q_proj"], 2, {2: {Q}, 3: {Q}}, set()),
        (["q_proj", "gate"], 1, {3: {Q, GATE}}, set()),
        (["self_attn.*"], 1, {3: {Q, K}}, set()),
        (["*_proj"], 4, {0: {Q}, 1: {Q, K, UP}, 2: {Q, K, UP}, 3: {Q, K, UP}}, set()),
        (["?_proj"], 1, {3: {Q, K}}, set()),
        (["*"], 1, {3: set(INSIDE)}, set()),
        (["layers.0-1.q_proj"], 1, {0: {Q}, 1: {Q}}, set()),
        (["layers.0-2.self_attn.*", "layers.2.mlp.up_proj"], 1, {0: {Q}, 1: {Q, K}, 2: {Q, K, UP}}, set()),
        (["layers.2"], 1, {2: set(INSIDE)}, set()),
        (["layers.1.*", "q_proj"], 1, {1: set(INSIDE), 3: {Q}}, set()),
        (["embed_tokens", "lm_head"], 1, {}, {"model.embed_tokens", "lm_head"}),
        (["model.embed_tokens", "lm_*", "k_proj"], 1, {3: {K}}, {"model.embed_tokens", "lm_head"}),
        (["mlp.dense", "q_proj"], 1, {3: {Q}}, set()),
    ],
)
def test_keys_name_layers(keys, last, blocks, outside):
    chosen = choose("lora.keys", keys, NAMES, last)
    assert {i: set(names) for i, names in chosen.blocks.items()} == blocks
    assert chosen.outside == outside


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("q_prj", r"lora.keys: no block has 'q_prj'; there are .*Did you mean 'q_proj'"),
        ("self_atn.*", r"no block has 'self_atn.\*'"),
        ("layers.4.q_proj", "there are no blocks as in 'layers.4.q_proj': the model has 0 to 3"),
        ("layers.2-1.q_proj", "no blocks"),
        ("layers.0.k_proj", "these blocks do not have 'k_proj'.*it has mlp.dense, self_attn.q_proj"),
        ("embed_token", "Did you mean 'embed_tokens'"),
        ("layers.1.lm_head", "these blocks do not have 'lm_head'"),
        ("_proj", "no block has"),
    ],
)
def test_a_key_that_names_nothing_is_refused_with_what_is_near(key, message):
    with pytest.raises(ModelError, match=message):
        choose("lora.keys", ["q_proj", key], NAMES, 4)


def test_the_first_pattern_that_names_a_layer_gives_its_rank():
    blocks = ["m.layers.0", "m.layers.1"]
    paths = [f"{block}.{name}" for block in blocks for name in (Q, K, UP)] + ["lm_head"]
    lora = LoraConfig(rank=8, rank_pattern=["layers.1.q_proj:2", "*_proj:4", "mlp.*:16", "lm_head:1"])
    ranks = matching_rank(lora, paths, blocks)
    assert [ranks[path] for path in paths] == [4, 4, 4, 2, 4, 4, 1]
    with pytest.raises(ModelError, match="lora.rank_pattern: no block has 'gate'"):
        matching_rank(LoraConfig(rank_pattern=["gate:2"]), paths, blocks)
