"""The hidden-state cache: bitwise the same training whatever it contains, and damage is never trusted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import system

from runner.backends.mlx.backend import MlxBackend
from runner.common.errors import ModelError
from runner.config import schema
from runner.data.length_buckets import LengthBuckets
from runner.models import hidden_cache
from runner.models.device import on_cpu
from runner.models.hidden_cache import HiddenStateCaches, HiddenStates
from runner.models.hidden_store import Budget, HiddenStateStore
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel
from runner.models.split_probe import split
from runner.training.component_loader import ComponentLoader
from runner.training.dataloader import BatchBuilder, EvaluationLoader, join_batches

CUT = {"lora.num_layers": 1, "train.grad_accumulation": 2}


@pytest.fixture(params=[0.0, 0.1])
def cut(request: pytest.FixtureRequest) -> dict[str, float]:
    """Without dropout the engine of the CPU computes, where it can; with it MLX does."""
    return {**CUT, "lora.dropout": request.param}


@pytest.fixture(autouse=True)
def _small_sets_have_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_cache, "MIN_BYTES_ON_DISK", 0)


def store(folder: Path | None, rows: int = 3, *, memory: int = 0, disk: int = 10**6, say=print) -> HiddenStateStore:
    return HiddenStateStore(
        np.arange(rows + 1, dtype=np.int64) * 40, memory=Budget(memory), disk_bytes=disk, folder=folder, log=say
    )


def states(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (5, 2), dtype=np.uint32)


def is_cached(made: HiddenStateStore, row: int) -> bool:
    found = made.fetch(row)
    assert found is None or bytes(found) == states(row).tobytes(), "other bytes than were stored"
    return found is not None


@pytest.mark.parametrize(("memory", "disk", "left"), [(120, 0, 3), (80, 0, 2), (0, 10**6, 3), (40, 80, 2), (0, 0, 0)])
def test_rows_are_read_back_as_they_were_stored_up_to_the_limits(
    tmp_path: Path, memory: int, disk: int, left: int
) -> None:
    made = store(tmp_path / "k", memory=memory, disk=disk)
    for row in range(3):
        assert not is_cached(made, row)
        made.put(row, states(row))
    assert sum(is_cached(made, row) for row in range(3)) == left
    made.close()
    again = store(tmp_path / "k", disk=disk)
    assert sum(is_cached(again, row) for row in range(3)) == min(3, disk // 40)


@pytest.mark.parametrize("damage", ["flip", "cut", "sums cut", "sums gone", "states gone"])
def test_a_damaged_file_loses_rows_and_never_returns_other_bytes(tmp_path: Path, damage: str) -> None:
    made = store(tmp_path / "k")
    for row in range(3):
        made.put(row, states(row))
    made.close()
    data, sums = tmp_path / "k/states.bin", tmp_path / "k/sums.bin"
    if damage == "flip":
        whole = bytearray(data.read_bytes())
        whole[45] ^= 1
        data.write_bytes(whole)
    elif damage == "cut":
        os.truncate(data, 100)
    elif damage == "sums cut":
        os.truncate(sums, 13)
    else:
        (sums if damage.startswith("sums") else data).unlink()
    again = store(tmp_path / "k")
    found = [is_cached(again, row) for row in range(3)]
    assert (
        found
        == {
            "flip": [True, False, True],
            "cut": [True, True, False],
            "sums cut": [True, False, False],
            "sums gone": [False] * 3,
            "states gone": [False] * 3,
        }[damage]
    )
    for row in range(3):
        again.put(row, states(row))
    assert all(is_cached(again, row) for row in range(3))


def test_two_stores_may_write_the_same_rows_at_once(tmp_path: Path) -> None:
    both = [store(tmp_path / "k", rows=200) for _ in range(2)]

    def fill(made: HiddenStateStore) -> None:
        for row in range(200):
            made.put(row, states(row))

    threads = [threading.Thread(target=fill, args=(made,)) for made in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(is_cached(store(tmp_path / "k", rows=200), row) for row in range(200))


def test_an_unusable_folder_is_logged_once_and_memory_is_still_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    made = store(tmp_path / "file" / "k", memory=40, say=said.append)
    made.put(0, states(0))
    made.put(1, states(1))
    assert is_cached(made, 0) and not is_cached(made, 1)
    assert len(said) == 1 and "memory only" in said[0]


def test_a_disk_that_fails_while_rows_are_written_is_logged_once(tmp_path: Path) -> None:
    said: list[str] = []
    made = store(tmp_path / "k", say=said.append)
    assert made._files is not None
    with system.file_size_limit(0):
        for row in range(3):
            made.put(row, states(row))
    assert len(said) == 1 and os.strerror(errno.EFBIG) in said[0]
    assert not any(is_cached(made, row) for row in range(3))


def test_the_least_recently_used_cache_is_evicted_and_other_folders_stay(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/precious").write_text("mine")
    rows = np.arange(4, dtype=np.int64) * 8192
    new, old, third = (letter * 32 for letter in "abc")
    for age, name in enumerate((new, old)):
        made = HiddenStateStore(rows, memory=Budget(0), disk_bytes=10**6, folder=tmp_path / name)
        for row in range(3):
            made.put(row, np.full(2048, row + 1, np.uint32))
        made.close()
        for file in (tmp_path / name).iterdir():  # until it is written back, st_blocks may lack some of its blocks
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    size = sum(file.stat().st_size for file in (tmp_path / old).iterdir())
    HiddenStateStore(rows, memory=Budget(0), disk_bytes=2 * size, folder=tmp_path / third)
    assert {p.name for p in tmp_path.iterdir()} == {new, third, "notes"}
    assert (tmp_path / "notes/precious").read_text() == "mine"


def test_the_split_forward_pass_equals_the_whole_bitwise() -> None:
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))
    ids = mx.array([[1, 70, 71, 72, 3, 100, 259, 2] * 8])
    for cut in range(1, len(base.model.layers)):
        split_model = split(base.model, cut)
        assert split_model.frozen_blocks == cut
        assert mx.array_equal(split_model.logits(ids), split_model.logits(ids, split_model.run_frozen_blocks(ids)))


def replace_forward(base, forward: Callable) -> None:
    trunk = base.model.model
    trunk.__class__ = type("Other", (type(trunk),), {"__call__": forward})


def test_a_model_that_treats_its_blocks_by_position_is_cut_right() -> None:
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))

    def forward(self, inputs, cache=None, input_embeddings=None):
        h = self.embed_tokens(inputs)
        for number, block in enumerate(self.layers):
            h = block(h, "causal", None) * (1.0 + number)
        return self.norm(h)

    replace_forward(base, forward)
    made, ids = split(base.model, 2), mx.array([[1, 70, 71, 72]])
    assert made.has_separate_head and made.frozen_blocks == 2
    assert mx.array_equal(made.logits(ids), made.logits(ids, made.run_frozen_blocks(ids))).item()


def test_blocks_whose_other_outputs_are_read_above_the_cut_are_not_cached() -> None:
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))

    def forward(self, inputs, cache=None, input_embeddings=None):
        outputs = [self.embed_tokens(inputs)]
        for block in self.layers:
            outputs.append(block(outputs[-1], "causal", None))
        return self.norm(outputs[-1] + 1e-3 * outputs[1])

    replace_forward(base, forward)
    assert split(base.model, 1).frozen_blocks == 1
    made = split(base.model, 2)
    assert made.has_separate_head and made.frozen_blocks == 0
    assert made.parts.reason == "the blocks above them read more than their output"


def test_values_that_blocks_keep_on_their_objects_are_not_taken_for_the_row_s_own() -> None:
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))
    blocks = base.model.layers
    cls = type(blocks[0])

    class Sharing(cls):  # type: ignore[misc, valid-type]
        def __call__(self, x, mask=None, cache=None):
            if self is not blocks[0]:
                return cls.__call__(self, x, mask, cache) + 0.1 * blocks[0].shared["x"][:, -1:]
            object.__setattr__(self, "shared", {"x": x})
            return cls.__call__(self, x, mask, cache)

    for block in blocks:
        block.__class__ = Sharing
    made = split(base.model, 2)
    assert made.has_separate_head and made.frozen_blocks == 0


def test_a_window_shorter_than_the_row_is_part_of_the_probe() -> None:
    """A state that depends on how far a row is padded differs between the cache and the batch."""
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))

    def forward(self, inputs, cache=None, input_embeddings=None):
        h = self.embed_tokens(inputs) * (2.0 if inputs.shape[1] > 100 else 1.0)
        for block in self.layers:
            h = block(h, "causal", None)
        return self.norm(h)

    replace_forward(base, forward)
    assert split(base.model, 2, 90).frozen_blocks == 2
    made = split(base.model, 2, 120)
    assert made.frozen_blocks == 0 and "padding" in made.parts.reason


def mlx_backend() -> MlxBackend:
    """MLX on the tiny model, cut above its first block."""
    base = load_base_model(schema.ModelConfig(path="builtin:tiny"))
    adapted = AdaptedModel(base, schema.LoraConfig(num_layers=len(base.model.layers) - 1), seed=0)
    return MlxBackend(adapted, split(adapted.model, 1), chunk=256)


def caches(backend: MlxBackend, cache_key_parts: dict | None = None, **config) -> HiddenStateCaches:
    split_model, config = backend.split_model, schema.HiddenCacheConfig(memory_gb=0, **config)
    return HiddenStateCaches(
        backend.run_frozen_blocks,
        dtype=split_model.hidden_dtype,
        hidden_size=split_model.hidden_size,
        cache_key_parts=cache_key_parts or {},
        config=config,
        log=print,
    )


@pytest.fixture
def rows(tiny: Callable) -> HiddenStates:
    from runner.data.formats import EncodeOptions
    from runner.data.tokenize import load_dataset

    settings = tiny()
    base = load_base_model(settings.model)
    return load_dataset("builtin:tiny", base.tokenizer, EncodeOptions.from_config(settings.data)).train


def test_hidden_states_depend_on_the_row_alone(rows, tmp_path: Path) -> None:
    backend = mlx_backend()
    trunk, split_model = caches(backend, disk_gb=0).for_token_set(rows), backend.split_model
    chosen = np.argsort(rows.lengths)[[0, 1, len(rows) // 2, -1]]
    together = trunk.compute([int(r) for r in chosen])
    alone = [trunk.compute([int(r)])[0] for r in reversed(chosen)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    fed, plain = BatchBuilder(rows, 16, trunk)(chosen), BatchBuilder(rows, 16)(chosen)
    own, ours = (
        split_model.logits(mx.array(plain.batch.inputs), states).reshape(-1, 320)[mx.array(plain.batch.positions)]
        for states in (None, mx.array(fed.hidden))
    )
    assert mx.abs(own - ours).max().item() < 1e-4 < mx.abs(own).max().item()


def test_a_fully_cached_batch_needs_no_weights_where_rows_are_computed_together(
    rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in what depends on the device's name."""
    monkeypatch.setattr(hidden_cache, "on_cpu", lambda: False)
    backend = mlx_backend()
    trunk = caches(backend, disk_gb=1, folder=str(tmp_path)).for_token_set(rows)
    feed = BatchBuilder(rows, 16, trunk)
    first = feed(np.arange(3)).hidden
    assert not trunk.complete()
    feed(np.arange(len(rows)))
    assert trunk.complete()

    def reload():
        raise AssertionError("the base is not needed")

    assert backend.free_frozen_weights(reload) > 0
    assert np.array_equal(feed(np.arange(3)).hidden, first)


def test_another_base_has_another_file(rows, tmp_path: Path) -> None:
    backend = mlx_backend()
    for identity in ({"base": "a"}, {"base": "b"}, {"base": "a"}):
        caches(backend, identity, disk_gb=1, folder=str(tmp_path)).for_token_set(rows).compute([0])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def reference(tiny: Callable, train: Callable, tmp_path: Path, cut: dict) -> Path:
    """A run whose cache was empty at first, and held all in memory."""
    return train(tiny(**cut, **{"train.hidden_cache.disk_gb": 0.0}), tmp_path / "reference")


@pytest.mark.parametrize("kind", ["disk", pytest.param("nothing", marks=pytest.mark.long), "little memory", "warm"])
def test_the_content_of_the_cache_does_not_change_training(
    tiny: Callable, train: Callable, tmp_path: Path, reference: Path, cut: dict, assert_equal_runs: Callable, kind: str
) -> None:
    limits = {
        "disk": {"train.hidden_cache.memory_gb": 0.0},
        "nothing": {"train.hidden_cache.memory_gb": 0.0, "train.hidden_cache.disk_gb": 0.0},
        "little memory": {"train.hidden_cache.memory_gb": 5e-5, "train.hidden_cache.disk_gb": 0.0},
        "warm": {"train.hidden_cache.memory_gb": 0.0},
    }[kind]
    changes = {**cut, **limits, "train.hidden_cache.folder": str(tmp_path / "cache")}
    run = train(tiny(**changes), tmp_path / "run")
    if kind == "warm":
        run = train(tiny(**changes), tmp_path / "again")
    assert_equal_runs(run, reference)
    assert ("are freed" in (run / "run.log").read_text()) == (kind == "warm")
    assert (tmp_path / "cache").exists() == (kind in ("disk", "warm"))


@pytest.mark.parametrize(
    "between",
    [
        "deleted",
        "filled and damaged",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("filled", "elsewhere", "damaged")),
    ],
)
def test_a_resume_is_exact_whatever_happened_to_the_cache(
    tiny: Callable,
    train: Callable,
    tmp_path: Path,
    reference: Path,
    cut: dict,
    assert_equal_runs: Callable,
    between: str,
) -> None:
    cache = tmp_path / "cache"
    changes = {**cut, "train.hidden_cache.memory_gb": 0.0, "train.hidden_cache.folder": str(cache)}
    run = train(tiny(**changes), tmp_path / "run", stop_at=5)
    if between == "deleted":
        shutil.rmtree(cache)
    elif between == "elsewhere":
        changes["train.hidden_cache.folder"] = str(tmp_path / "second disk")
    if "filled" in between:
        train(tiny(**changes), tmp_path / "other")
    if "damaged" in between:
        for file in cache.rglob("states.bin"):
            file.write_bytes(bytes(file.stat().st_size))
    assert_equal_runs(train(tiny(**changes), run, resume=run), reference)
    log = (run / "run.log").read_text()
    assert ("are freed" in log) == ("filled" in between)
    assert ("reloading the weights of the frozen blocks" in log) == (between == "filled and damaged")


@pytest.mark.parametrize(
    "other", [{"train.hidden_cache.free_frozen_weights": False}, {"data.metric_rows": 2, "data.metric": "exact_match"}]
)
def test_weights_are_not_freed_if_set_so_or_if_answers_are_generated(
    tiny: Callable, train: Callable, tmp_path: Path, cut: dict, other: dict
) -> None:
    changes = {**cut, "train.iters": 1, "train.hidden_cache.folder": str(tmp_path / "cache")}
    train(tiny(**{**changes, "train.iters": 12}), tmp_path / "first")
    run = train(tiny(**changes, **other), tmp_path / "run")
    assert "are freed" not in (run / "run.log").read_text()


def test_reloading_released_weights_from_a_changed_model_is_refused(
    tiny: Callable, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.export.mlx import write_model_folder
    from runner.models.load import BaseModel

    changes = {**CUT, "model.path": str(tmp_path / "model"), "train.hidden_cache.folder": str(tmp_path / "cache")}
    changes |= {"train.hidden_cache.memory_gb": 0.0}
    write_model_folder(load_base_model(schema.ModelConfig(path="builtin:tiny")), tmp_path / "model")
    train(tiny(**changes), tmp_path / "first")
    for file in (tmp_path / "cache").rglob("states.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    own = SplitModel.free_frozen_weights

    def changes_meanwhile(split_model: SplitModel, reload: Callable) -> int:
        base = load_base_model(schema.ModelConfig(path=changes["model.path"]))
        tokenizer = base.tokenizer
        other = base.model.layers[0].mlp.up_proj
        other.weight = other.weight * 2
        shutil.rmtree(tmp_path / "model")
        write_model_folder(BaseModel(base.model, tokenizer, base.config, "", ""), tmp_path / "model")
        return own(split_model, reload)

    monkeypatch.setattr(SplitModel, "free_frozen_weights", changes_meanwhile)
    with pytest.raises(ModelError, match="has changed since the run began"):
        train(tiny(**changes), tmp_path / "run")


def test_switching_the_cache_off_on_resume_is_logged(
    tiny: Callable, train: Callable, tmp_path: Path, cut: dict
) -> None:
    run = train(tiny(**cut), tmp_path / "run", stop_at=5)
    train(tiny(**cut, **{"train.hidden_cache.enabled": False}), run, resume=run)
    assert "number of blocks in the hidden-state cache was 3, is 0" in (run / "run.log").read_text()


def test_batches_of_an_evaluation_are_built_lazily(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    feed = BatchBuilder(rows, 16)
    own = feed.prepare
    monkeypatch.setattr(feed, "prepare", lambda indices: made.append(len(indices)) or own(indices))
    fixed = EvaluationLoader(feed, [np.arange(3), np.arange(3, 5)])
    assert (made, fixed.row_count) == ([], 5)
    for _ in range(2):  # as often as it is evaluated
        assert [len(ready.batch.inputs) for ready in fixed] == [3, 2]
    assert made == [3, 2, 3, 2]


def test_neighbouring_batches_are_joined_up_to_the_limit_in_order() -> None:
    lengths = np.array([5, 6, 9, 17, 17, 30, 200])
    chosen = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5]), np.array([6])]
    whole = join_batches(chosen, lengths, LengthBuckets(16), 10**6)
    assert [g.tolist() for g in whole] == [[0, 1, 2, 3, 4, 5, 6]]
    assert [g.tolist() for g in join_batches(chosen, lengths, LengthBuckets(16), 64)] == [[0, 1, 2, 3], [4, 5], [6]]
    assert [g.tolist() for g in join_batches(chosen, lengths, LengthBuckets(16), 1)] == [c.tolist() for c in chosen]


def test_jobs_share_a_baseline_only_if_it_is_computed_in_the_same_way(tiny: Callable) -> None:
    from runner.backends.select import select_backend

    loader = ComponentLoader()
    base = loader.base(tiny().model)
    data = loader.data(tiny(), base, lambda: None)

    def baseline(**changes: object) -> object:
        settings = tiny(**changes)
        adapted = AdaptedModel(base, settings.lora, 0)
        try:
            environment = select_backend(adapted, settings, longest_row=64).numeric_environment()
            return loader.baseline(settings, base, data, environment)
        finally:
            adapted.remove()

    own = baseline()
    assert baseline(**{"lora.rank": 2, "seed": 1}) is own
    others: list[dict[str, object]] = [{"train.head": "all"}, {"lora.num_layers": 1}, {"train.eval_tokens": 1}]
    # Without dropout the engine computes, with it MLX does: the last digits may differ.
    others += [{"lora.dropout": 0.1}] if on_cpu() else []
    assert all(baseline(**other) is not own for other in others)


@pytest.mark.cpu("the kernels of the CPU engine")
def test_jobs_with_other_kernels_share_no_hidden_states(tiny: Callable, train: Callable, tmp_path: Path) -> None:
    """In one process, as jobs of a sweep: native kernels, then NumPy's, whose last digits differ."""
    settings = {**CUT, "train.hidden_cache.folder": str(tmp_path / "cache"), "train.iters": 1}
    loader, kept = ComponentLoader(), [0]
    for cpu_native in (True, False, True):
        train(tiny(**settings, **{"train.cpu_native": cpu_native}), tmp_path / f"{len(kept)}", loader=loader)
        kept.append(len(list((tmp_path / "cache").iterdir())))
    assert kept == [0, kept[1], 2 * kept[1], 2 * kept[1]] and kept[1] > 0
    states = [json.loads((tmp_path / f"{job}/checkpoints/step-0000001/train_state.json").read_text()) for job in (1, 2)]
    assert [state["environment"]["engine"].split(", ")[1][:5] for state in states] == ["nativ", "numpy"]
