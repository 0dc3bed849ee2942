"""A model folder of every architecture loads, answers as stock mlx-lm does and is exported to what stock loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import save_config, save_model

from runner.common.errors import ModelError
from runner.config.schema import LoraConfig, ModelConfig
from runner.export.fused import fuse_adapter
from runner.export.mlx import export_model
from runner.models import tiny
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.training.decoding import decode
from tests.architectures.configs import LAYERS, NOT_TRAINED_BY_STOCK, VOCABULARY, architectures, tiny_config
from tests.architectures.stock import ADAPTED_BLOCKS, build_model, build_rows

PROMPTS = [
    [(7 * i + 3 * j * j + 11) % (VOCABULARY - 5) + 3 for j in range(n)] for i, n in enumerate((6, 10, 24, 15, 3))
]
"""Shorter and longer than the windows."""
NEW_TOKENS = 6
FOLDER_KEYS: dict[str, dict[str, Any]] = {
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
    "granitemoehybrid": {"mamba_expand": 1},
    "mamba2": {"expand": 1},
}
"""Keys of config.json that transformers needs to load the tokenizer."""
_NOT_FROZEN = "cannot freeze a model of that class"
REFUSED: dict[tuple[str, str], str] = {
    ("gear", "answers"): "mlx-lm cannot generate with",  # as stock mlx-lm
    **{("recurrent_gemma", step): _NOT_FROZEN for step in ("load", "answers", "export")},
}
"""By architecture and step: a part of the sentence with which it is refused. All others are right."""


def write_folder(name: str, folder: Path) -> Path:
    """Write the tiny model of an architecture as a folder in the hub's layout."""
    folder.mkdir(parents=True)
    save_model(folder, build_model(name))
    keys = {"eos_token_id": VOCABULARY - 1, **FOLDER_KEYS.get(name, {})}
    save_config({**tiny_config(name), **keys}, folder / "config.json")
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


def check_load(name: str, folder: Path) -> None:
    base = load_base_model(ModelConfig(path=str(folder)))
    rows = build_rows(2)
    assert_equal(base.model(rows), stock_model(folder)(rows), "logits")


def stock_model(folder: Path) -> nn.Module:
    model: nn.Module = mlx_lm.load(str(folder))[0]
    return model


def check_answers(name: str, folder: Path) -> None:
    base = load_base_model(ModelConfig(path=str(folder)))
    answers = decode(base, PROMPTS, NEW_TOKENS, before_step=lambda: None, log=lambda line: None, cache_probe=False)
    assert answers == stock_answers(folder)


def stock_answers(folder: Path) -> list[list[int]]:
    model, tokenizer = mlx_lm.load(str(folder))
    answers = []
    for prompt in PROMPTS:
        answer: list[int] = []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS):
            if token in tokenizer.eos_token_ids:
                break
            answer.append(token)
        answers.append(answer)
    return answers


def check_export(name: str, folder: Path) -> None:
    export_model(load_base_model(ModelConfig(path=str(folder))), folder.with_name("exported"))
    rows = build_rows(2)
    assert_equal(stock_model(folder.with_name("exported"))(rows), stock_model(folder)(rows), "logits")


def check_fused(name: str, folder: Path) -> None:
    base = load_base_model(ModelConfig(path=str(folder)))
    rows = build_rows(2)
    before = base.model(rows)
    adapted = AdaptedModel(base, LoraConfig(rank=2, num_layers=ADAPTED_BLOCKS), seed=0)
    adapted.place(random_params(adapted))
    adapted.model.eval()
    expected = adapted.model(rows)
    assert mx.where(expected == before, 0, mx.abs(expected - before)).max().item() > 1e-3, "the adapter changes nothing"
    export_model(fuse_adapter(adapted, dequantize=False), folder.with_name("fused"))
    assert_equal(stock_model(folder.with_name("fused"))(rows), expected, "logits")


def random_params(adapted: AdaptedModel) -> dict[str, mx.array]:
    return {
        name: array + mx.random.normal(array.shape, key=mx.random.key(number)) * 0.05
        for number, (name, array) in enumerate(sorted(adapted.params().items()))
    }


def assert_equal(first: mx.array, second: mx.array, what: str) -> None:
    assert not mx.isnan(first).any().item()
    difference = mx.where(first == second, 0, mx.abs(first - second)).max()  # infinite for tokens that are ruled out
    scale = mx.where(mx.isinf(second), 0, mx.abs(second)).max()
    assert (difference < 1e-4 * scale).item(), f"{what} differ by {difference.item():.1e}"


STEPS: dict[str, Callable[[str, Path], None]] = {
    "load": check_load,
    "answers": check_answers,
    "export": check_export,
    "fused": check_fused,
}


@pytest.mark.long
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_goes_the_whole_way_or_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(name, tmp_path / "model")
    for step, check in STEPS.items():
        if step == "fused" and name in NOT_TRAINED_BY_STOCK:
            continue
        reason = REFUSED.get((name, step))
        if reason is None:
            check(name, folder)
        else:
            with pytest.raises(ModelError, match=reason):
                check(name, folder)
