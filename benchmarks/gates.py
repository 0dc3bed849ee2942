"""Checks that both sides compute the same: otherwise a ratio of speeds means nothing.

``python -m benchmarks.gates equal MODEL DATA``: the same tokens, loss and gradients on the same batches.
``python -m benchmarks.gates adapters JOB.json``: validation losses of both sides' adapters, by one program.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sides import Work

LOSS, GRADIENT = 1e-5, 1e-4
"""Largest difference of the losses, and of a gradient relative to its norm."""
SEEDS = 3
"""Runs of each side that the comparison of adapters needs."""
# Two-sided 95 % points of Student's t by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def compare_means(ours: Sequence[float], theirs: Sequence[float], before: float, *, same: bool) -> dict[str, Any]:
    """Test whether two samples of validation losses have the same mean, given their spread (t test, 95 %).

    Without `same`, ours may also be the lower one. Each side must have learned: its mean lies below the loss `before`
    training by more than the margin. Raises ValueError for fewer than two losses a side.
    """
    count = len(ours) + len(theirs)
    if min(len(ours), len(theirs)) < 2:
        raise ValueError("a spread needs at least two losses a side")
    pooled = sum((len(side) - 1) * statistics.variance(side) for side in (ours, theirs)) / (count - 2)
    margin = _T[min(count - 2, len(_T)) - 1] * math.sqrt(pooled * (1 / len(ours) + 1 / len(theirs)))
    mean, other = statistics.mean(ours), statistics.mean(theirs)
    learned = before - max(mean, other) > margin
    found = {"before": before, "ours": mean, "theirs": other, "margin": margin, "same": same}
    return {"passed": learned and mean - other <= margin and (not same or other - mean <= margin), **found}


def equal(model: str, data: str) -> dict[str, Any]:
    """Compare the tokens of every row, and loss and gradients of the first batch and the one of the shortest rows."""
    adapted, tokens = _load(model, data)
    found: dict[str, Any] = {"rows_that_differ": _count_differing_rows(adapted.base.tokenizer, tokens, data)}
    size = Work(0, 0).batch_size
    batches = [range(size), tokens.train.lengths.argsort(kind="stable")[:size]]
    made = [_loss_and_grads_by_side(adapted, tokens.train, rows) for rows in batches]
    # Stock mlx-lm adds 49,000 exponentials up in a row, in float32: 1e-4 of the loss is lost. So it is compared with
    # our MLX backend, which has the same sums, and the engine with a loss whose sums are made in float64.
    pairs = [(m["mlx"], m["stock"]) for m in made] + [(m["engine"], m["float64"]) for m in made if "engine" in m]
    found["loss"] = max(abs(ours - theirs) for (ours, _), (theirs, _) in pairs)
    found["losses"] = [{name: side[0] for name, side in m.items()} for m in made]
    found["gradient"] = max(_distance(ours, theirs) for (_, ours), (_, theirs) in pairs)
    found["zero_gradients"] = sum(not _norm(g) > 0 for pair in pairs for _, side in pair for g in side.values())
    found["arrays"] = len(pairs[0][0][1])
    found["passed"] = (
        found["rows_that_differ"] == 0
        and found["zero_gradients"] == 0
        and found["loss"] <= LOSS
        and found["gradient"] <= GRADIENT
    )
    return found


def _load(model: str, data: str) -> tuple[Any, Any]:
    from runner.backends import blas

    blas.load_blas()
    from benchmarks.workloads import SPLITS, encode_options
    from runner.config import schema
    from runner.data.tokenize import load_dataset
    from runner.models.load import load_base_model
    from runner.models.lora import AdaptedModel

    work = Work(0, 0)
    base = load_base_model(schema.ModelConfig(path=model))
    lora = schema.LoraConfig(rank=work.rank, scale=work.scale, num_layers=work.num_layers)
    return AdaptedModel(base, lora, seed=0), load_dataset(data, base.tokenizer, encode_options(), SPLITS)


def _count_differing_rows(tokenizer: Any, tokens: Any, data: str) -> int:
    """Return the number of rows whose tokens or supervised part differ from those of stock mlx-lm."""
    from mlx_lm.tuner.datasets import CompletionsDataset

    from benchmarks.workloads import MAX_LENGTH, SPLITS

    differing = 0
    for split in SPLITS:
        text = (Path(data) / f"{split}.jsonl").read_text(encoding="utf-8")
        stock = CompletionsDataset(
            [json.loads(line) for line in text.splitlines()], tokenizer, "prompt", "completion", True
        )
        ours = getattr(tokens, split)
        differing += abs(len(stock) - len(ours))
        for index in range(min(len(stock), len(ours))):
            theirs, begin = stock.process(stock[index])
            row, supervised = ours.row(index)
            theirs = theirs[:MAX_LENGTH]
            same = row.tolist() == theirs and supervised.tolist() == [i >= begin for i in range(len(theirs))]
            differing += not same
    return differing


def _loss_and_grads_by_side(adapted: Any, rows: Any, chosen: Sequence[int]) -> dict[str, tuple[float, dict]]:
    """Return mean loss and gradients of the rows `chosen`, by stock mlx-lm and by each of our backends.

    Stock mlx-lm counts the first token of padding after each row. Told that each row is one token shorter, it counts
    what is there.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.trainer import default_loss

    from runner.backends.cpu.backend import CpuBackend
    from runner.backends.mlx.backend import MlxBackend
    from runner.backends.protocol import Backend
    from runner.backends.select import select_backend
    from runner.config.schema import Config
    from runner.training.dataloader import BatchBuilder

    model, config = adapted.model, Config()
    backend = select_backend(adapted, config)
    backends: dict[str, Backend] = {"mlx": MlxBackend(adapted, backend.split_model, chunk=config.train.loss_chunk)}
    if isinstance(backend, CpuBackend):
        backends["engine"] = backend
    params = {
        # B starts at zero, where the gradient of A is zero as well.
        name: mx.random.normal(array.shape, scale=0.01, key=mx.random.key(index)) if name.endswith("lora_b") else array
        for index, (name, array) in enumerate(adapted.params().items())
    }
    ready = BatchBuilder(rows, pad_to=32)(np.asarray(chosen))
    batch = ready.batch

    sides: dict[str, tuple[float, dict]] = {}
    for name, computed in (
        *((name, one.loss_and_grads(params, ready, mx.random.key(0))) for name, one in backends.items()),
        ("float64", _in_float64(adapted, params, batch)),
    ):
        loss, grads = computed
        mx.eval(loss)
        mean = {key: mx.array(grad) / batch.supervised for key, grad in grads.items()}
        mx.eval(mean)
        sides[name] = float(loss) / batch.supervised, mean
    model.train()
    model.update(tree_unflatten(list(params.items())))
    parts = [rows.row(int(index)) for index in chosen]
    padded = np.zeros((len(parts), batch.inputs.shape[1] + 1), np.int32)
    for line, (tokens, _) in zip(padded, parts, strict=True):
        line[: len(tokens)] = tokens
    spans = [(int(supervised.argmax()), len(tokens) - 1) for tokens, supervised in parts]
    (loss, _), grads = nn.value_and_grad(model, default_loss)(model, mx.array(padded), mx.array(spans))
    mx.eval(loss, grads)
    sides["stock"] = loss.item(), dict(tree_flatten(grads))
    return sides


def _in_float64(adapted: Any, params: dict, batch: Any) -> tuple[Any, dict]:
    """Return summed loss and gradients by MLX, with the softmax and its sums in NumPy's float64."""
    import mlx.core as mx
    import numpy as np

    from runner.models.split_probe import split

    forward, names = split(adapted.model), list(params)
    adapted.model.train()

    def logits(*arrays: Any) -> Any:
        adapted.place(dict(zip(names, arrays, strict=True)))
        hidden = forward.hidden(mx.array(batch.inputs))
        return forward.head(hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.positions)])

    values = list(params.values())
    x = np.array(logits(*values)).astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_sum, rows = np.log(np.exp(x).sum(axis=1)), np.arange(len(x))
    loss = ((log_sum - x[rows, batch.targets]) * batch.weights).sum()
    grad = np.exp(x - log_sum[:, None])
    grad[rows, batch.targets] -= 1
    grad *= batch.weights[:, None]
    _, grads = mx.vjp(logits, values, [mx.array(grad.astype(np.float32))])
    mx.eval(grads)
    adapted.place(params)
    return mx.array(loss), dict(zip(names, grads, strict=True))


def _norm(array: Any) -> float:
    return float((array * array).sum().item()) ** 0.5


def _distance(ours: dict, theirs: dict) -> float:
    """Return the largest difference between arrays of two gradients relative to the norm; infinite if names differ."""
    if set(ours) != set(theirs):
        return math.inf
    return max(_norm(ours[name] - theirs[name]) / max(_norm(ours[name]), 1e-30) for name in ours)


def adapters(model: str, data: str, folders: Sequence[str]) -> dict[str, Any]:
    """Return the validation loss, over supervised tokens, of the base model and of each adapter."""
    adapted, tokens = _load(model, data)
    import mlx.core as mx
    import numpy as np

    from runner.backends.mlx.backend import MlxBackend
    from runner.config.schema import TrainConfig
    from runner.data.order import evaluation_batches
    from runner.models.split_probe import split
    from runner.training.dataloader import BatchBuilder, EvaluationLoader
    from runner.training.evaluate import evaluate

    backend = MlxBackend(adapted, split(adapted.model), chunk=TrainConfig.loss_chunk)
    chosen = evaluation_batches(tokens.valid.lengths, Work(0, 0).batch_size)
    batches = EvaluationLoader(BatchBuilder(tokens.valid, pad_to=16), [np.asarray(rows) for rows in chosen])
    params, losses = adapted.params(), []
    before = evaluate(backend, params, batches).loss
    for folder in folders:
        own = mx.load(str(Path(folder) / "adapters.safetensors"))
        assert isinstance(own, dict)
        if {name: a.shape for name, a in own.items()} != {name: a.shape for name, a in params.items()}:
            raise SystemExit(f"{folder}: its adapter has other arrays than the one that both sides train")
        losses.append(evaluate(backend, own, batches).loss)
    return {"before": before, "losses": losses}


if __name__ == "__main__":
    if sys.argv[1] == "equal":
        print(json.dumps(equal(sys.argv[2], sys.argv[3])))
    else:
        print(json.dumps(adapters(**json.loads(Path(sys.argv[2]).read_text()))))
