"""Every reader of an untrusted file returns or raises the error it documents, quickly and within a memory limit."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from runner.checkpoints import manifest, safetensors_file, verify
from runner.checkpoints.verify import LoadedCheckpoint
from runner.cli.commands import adapter_source, import_
from runner.cli.commands import stored_settings as verb_settings
from runner.common import safe_yaml, sealed_json
from runner.common.errors import CheckpointError, ConfigError, DataError, ModelError, RunnerError
from runner.common.filesystem import FileSystem
from runner.config import serialize
from runner.config.schema import DataConfig
from runner.data.formats import EncodeOptions
from runner.data.tokenize import TokenizedDataset, load_dataset
from runner.migrate.mapping import import_config
from runner.migrate.source import read_config
from runner.models import tiny
from runner.models.arrays import parse_arrays
from runner.models.gguf import header as gguf_header
from runner.models.gguf import load as gguf
from runner.reports.audit import audit_run
from runner.reports.run_page import print_run_page, read_run_page, run_page_fields
from runner.reports.screen import Screen
from runner.reports.sweep_page import print_sweep_page
from runner.runs import sweep_manifest as sweeps
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run
from runner.training import state_files

HERE = Path(__file__).resolve().parent


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fuzz_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutations = _module(HERE / "mutations.py")
gguf_files = _module(HERE.parent / "gguf_files.py")
found = _module(HERE / "found" / "cases.py")
damaged, altered, JSON = mutations.damaged, mutations.altered, mutations.JSON
fuzz, bounded, SECONDS = mutations.fuzz, mutations.bounded, mutations.SECONDS


@pytest.fixture(scope="module")
def real(tmp_path_factory, make_cli) -> Path:
    """A finished run of the tiny model."""
    cli = make_cli(tmp_path_factory.mktemp("real"))
    cli("model=tiny", "data=tiny", "train.iters=4", "checkpoint.every=2", "train.eval_every=2", "hydra.run.dir=run")
    return cli.folder / "run"


@pytest.fixture(scope="module")
def checkpoint(real: Path) -> LoadedCheckpoint:
    return verify.load_checkpoint(real / "checkpoints" / "step-0000004", FileSystem())


@pytest.mark.fault(8)
def test_a_manifest_is_read_or_refused(cases, checkpoint):
    whole = (checkpoint.checkpoint.path / manifest.NAME).read_bytes()
    record = {key: value for key, value in json.loads(whole).items() if key != "sha256"}

    def read(data: Any) -> None:
        if not isinstance(data, bytes):  # the checksum fits what it says
            try:
                data = sealed_json.seal(data) if isinstance(data, dict) else json.dumps(data).encode()
            except (ValueError, RecursionError):
                return
        found = manifest.read(data)
        assert type(found.step) is int and all(type(file.size) is int for file in found.files.values())

    fuzz(cases, read, ValueError, damaged(whole), altered(record), JSON)


@pytest.mark.fault(8)
def test_a_train_state_is_read_or_refused(cases, checkpoint):
    whole = checkpoint.files[state_files.STATE]
    small = {**checkpoint.files}

    def read(data: Any) -> None:
        small[state_files.STATE] = data if isinstance(data, bytes) else json.dumps(data).encode()
        found = state_files.read_state(LoadedCheckpoint(checkpoint.checkpoint, small))
        assert_usable(found)

    fuzz(cases, read, CheckpointError, damaged(whole), altered(json.loads(whole)), JSON)


def assert_usable(found: state_files.SavedState) -> None:
    """What the loop computes with, it can compute with."""
    progress, window = found.progress, found.progress.since_report
    counts = [progress.step, progress.tokens, progress.bad_evaluations, window.supervised, window.tokens]
    counts += [
        window.updates,
        found.written.metrics_offset,
        found.written.samples_offset,
        found.position.epoch,
        found.position.batch,
    ]
    assert all(type(count) is int and 0 <= count < 2**63 for count in counts)
    losses = [progress.best_loss, progress.baseline_loss, progress.valid_loss, progress.train_loss, window.grad_norm]
    assert all(isinstance(loss, (float, int, type(None))) and not isinstance(loss, bool) for loss in losses)
    assert isinstance(window.loss_sum, (float, int)) and isinstance(found.written.seconds, float)
    assert progress.pending_evaluation in (True, False)
    assert all(isinstance(value, str) for value in found.identity.fingerprints.values())


@pytest.mark.fault(22)
def test_a_safetensors_file_is_read_or_refused(cases):
    from numpy import arange

    arrays = {"a": arange(12, dtype="f4").reshape(3, 4), "b": arange(3, dtype="u1"), "c": arange(0, dtype="f8")}
    whole = safetensors_file.pack(
        {name: safetensors_file.Tensor.of(array) for name, array in arrays.items()}, {"format": "mlx"}
    )
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])

    def read(data: Any) -> None:
        if not isinstance(data, bytes):
            text = json.dumps(data).encode()
            data = len(text).to_bytes(8, "little") + text + whole[-51:]
        found, _ = safetensors_file.unpack(data, where="here")
        assert sum(len(one.data) for one in found.values()) <= len(data)
        parse_arrays(data, source="here")

    fuzz(cases, read, CheckpointError, damaged(whole), altered(header), JSON)


@pytest.fixture(scope="module")
def llama_files() -> list[bytes]:
    made = [
        gguf_files.tiny_llama(),
        gguf_files.tiny_llama({"attn_q": "Q8_0", "ffn_up": "Q4_0"}, biases=True, tied=False),
    ]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return [one.write(Path(folder) / "a.gguf").read_bytes() for one in made]


@pytest.mark.fault(8)
def test_a_gguf_header_is_read_or_refused(cases, llama_files, tmp_path):
    path = tmp_path / "a.gguf"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = gguf_header.read_header(path)
        assert all(info.start + info.nbytes <= len(data) for info in found.tensors.values())

    head = llama_files[0][:4096]
    fuzz(
        cases, read, ModelError, damaged(*llama_files), damaged(head, most=8), st.binary().map(b"GGUF\3\0\0\0".__add__)
    )


@pytest.mark.fault(8)
def test_a_gguf_model_is_read_or_refused(cases, llama_files, tmp_path):
    path, whole = tmp_path / "a.gguf", gguf_files.tiny_llama()
    keys = [*whole.file.metadata, "llama.attention.key_length", "tokenizer.ggml.add_eos_token", "general.alignment"]
    values = (
        st.integers(0, 2**32 - 1)
        | st.booleans()
        | st.floats(width=32)
        | st.text(max_size=20)
        | st.lists(st.text(max_size=4), min_size=1, max_size=300)
        | st.lists(st.integers(-1, 9), min_size=1, max_size=300)
        | st.sampled_from(["x" * 100_000, ["a"] * 300, "llama-bpe", "qwen2", 2**31, 0, -0.0])
    )

    def read(changes: Any) -> None:
        if isinstance(changes, bytes):
            path.write_bytes(changes)
        else:
            type(whole.file)({**whole.file.metadata, **changes}, whole.file.tensors).write(path)
        gguf.load_gguf(path, keep_quantized=False, dtype=None)

    changes = st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3)
    fuzz(cases, read, ModelError, changes, damaged(*llama_files))


ROWS = [
    {"prompt": "one and one", "completion": " two"},
    {"text": "a text"},
    {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "n"}],
        "tools": [],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "a"},
        ]
    },
]


def _load_rows(folder: Path, tokenizer: Any) -> TokenizedDataset:
    options = EncodeOptions.from_config(DataConfig(max_length=64))
    return load_dataset(str(folder), tokenizer, options)


@pytest.mark.fault(16, 8)
def test_rows_of_data_are_read_or_refused(cases, tmp_path):
    tokenizer = tiny.build_tokenizer()
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    whole = [b"\n".join([line] * 3) + b"\n" for line in lines]

    def read(data: Any) -> None:
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")
        dataset = _load_rows(tmp_path, tokenizer)
        assert len(dataset.train) == dataset.stats["train"].rows

    fuzz(cases, read, DataError, damaged(*whole), *(altered(row) for row in ROWS), JSON)


@pytest.mark.fault(8)
def test_a_run_with_any_metrics_and_status_is_shown(cases, real, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    names = ("config.yaml", "status.json", "metrics.jsonl")
    whole = {name: (real / name).read_bytes() for name in names}
    status = json.loads(whole["status.json"])
    row = json.loads(whole["metrics.jsonl"].splitlines()[0])

    def read(changed: tuple[str, Any]) -> None:
        name, data = changed
        for other in names:
            (run / other).write_bytes(whole[other])
        (run / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")
        audit_run(read_run(run))
        page = read_run_page(read_run(run))
        print_run_page(page, Screen(io.StringIO()))
        json.dumps(run_page_fields(page), default=str)

    fuzz(
        cases,
        read,
        _Never,
        *(st.tuples(st.just(name), damaged(whole[name])) for name in names),
        st.tuples(st.just("status.json"), altered(status) | JSON),
        st.tuples(st.just("metrics.jsonl"), altered(row) | JSON),
    )


class _Never(Exception):
    """Never raised: the reader must accept every input."""


@pytest.mark.fault(8, 23)
def test_a_sweep_manifest_is_read_or_refused(cases, tmp_path):
    old = {"schema": 1, "words": ["model=tiny", "seed=1,2"], "time": "2026-11-24T10:00:00Z"}
    head = {"schema": 2, "lines": 4, "arguments": ["seed=0,1"], "launcher": {"name": "process", "jobs": 2}}
    jobs = [{"job": i, "id": f"a{i}", "overrides": ["model=tiny", f"seed={i}"]} for i in range(2)]
    first = {**jobs[0], "folder": "0", "choices": {"model": "tiny"}, "config": {"seed": 0, "lora": {"rank": 8}}}
    second = {**jobs[1], "folder": "r-1", "like": 0, "changes": {"seed": 1, "lora.rank": 4}}
    changes, own = {"set": {"checkpoint.keep_last": 1}}, {"set": {"lora.rank": 1}, "job": 1}
    old_lines, lines = (
        [json.dumps(line).encode() + b"\n" for line in record] for record in ((old, *jobs), (head, first, second, own))
    )
    path = tmp_path / sweeps.NAME

    def read(data: Any) -> None:
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")
        print_sweep_page(read_sweep(tmp_path), Screen(io.StringIO()))
        for job in sweeps.read_manifest(tmp_path).jobs:
            assert type(job.number) is int and all("=" in word for word in job.overrides)
            assert job.folder and "/" not in job.folder and not job.folder.startswith(".")

    whole = [damaged(b"".join(old_lines)), damaged(b"".join(lines))]
    fuzz(cases, read, ConfigError, *whole, *map(altered, (old, jobs[0], head, first, second, changes, own)), JSON)


@pytest.mark.fault(23)
def test_a_stored_config_is_read_or_refused(cases, real, tmp_path):
    whole = (real / "config.yaml").read_bytes()
    record = yaml.safe_load(whole)

    def read(data: Any) -> None:
        text = data if isinstance(data, bytes) else yaml.safe_dump(data, allow_unicode=True).encode()
        (tmp_path / "config.yaml").write_bytes(text)
        verb_settings.read_settings(tmp_path)

    def parse(data: Any) -> None:
        if isinstance(data, bytes):
            safe_yaml.parse(data.decode("utf-8", errors="replace"))
        else:
            serialize.from_dict(data, "here")

    def both(data: Any) -> None:
        with contextlib.suppress(ValueError, ConfigError):
            parse(data)
        try:
            read(data)
        except UnicodeEncodeError as error:
            assert "surrogates" in str(error)  # not YAML that can be written

    fuzz(cases, both, ConfigError, damaged(whole), altered(record).filter(lambda one: isinstance(one, dict)))


OLD = {"model": "a/b", "data": "d", "iters": 9, "seed": 1, "learning_rate": 1e-5, "mask_prompt": True, "num_layers": 4}
OLD |= {"lora_parameters": {"rank": 8, "scale": 2.0, "keys": ["self_attn.q_proj"]}, "optimizer": "adamw", "test": True}
OLD |= {
    "lr_schedule": {"name": "cosine_decay", "warmup": 3, "arguments": [1e-5, 9, 1e-7]},
    "resume_adapter_file": "x.npz",
}


@pytest.mark.fault(23)
def test_an_old_config_is_imported_or_refused(cases, tmp_path):
    path = tmp_path / "old.yaml"

    def read(data: Any) -> None:
        text = data if isinstance(data, bytes) else json.dumps(data).encode()  # which is YAML, too
        path.write_bytes(text)
        carried = import_config(read_config(path), our_defaults=False)
        "\n".join([*import_.report(carried), import_.recipe(carried, ["x"]), import_.wrap_command(carried.overrides)])

    fuzz(cases, read, ConfigError, damaged(yaml.safe_dump(OLD).encode()), altered(OLD))


@pytest.mark.fault(23)
def test_an_adapter_config_is_read_or_refused(cases, checkpoint, real, tmp_path):
    whole = checkpoint.files["adapter_config.json"]

    def read(data: Any) -> None:
        adapter_source._parse_config(data if isinstance(data, bytes) else json.dumps(data).encode(), tmp_path)

    fuzz(cases, read, RunnerError, damaged(whole), altered(json.loads(whole)), JSON)


def _found(name: str) -> Any:
    return pytest.mark.parametrize("case", getattr(found, name).items(), ids=lambda case: case[0])


@pytest.mark.fault(8)
@_found("TRAIN_STATE")
def test_a_train_state_that_once_broke_the_reader_is_refused(checkpoint, case):
    path, text = case[1]
    data = json.loads(checkpoint.files[state_files.STATE])
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = "HERE"
    broken = json.dumps(data).encode().replace(b'"HERE"', text)
    with bounded(), pytest.raises(CheckpointError, match=r"train_state\.json"):
        state_files.read_state(LoadedCheckpoint(checkpoint.checkpoint, {**checkpoint.files, state_files.STATE: broken}))


@pytest.mark.fault(23)
@_found("YAML")
def test_a_config_that_once_broke_the_reader_is_refused(tmp_path, case):
    (tmp_path / "config.yaml").write_text(case[1])
    with bounded(), pytest.raises(ConfigError) as refused:
        verb_settings.read_settings(tmp_path)
    assert len(str(refused.value)) < 1000


@pytest.mark.fault(23)
@_found("SWEEP")
def test_a_sweep_manifest_that_once_broke_the_reader_is_refused(tmp_path, case):
    (tmp_path / sweeps.NAME).write_bytes(case[1])
    with bounded(), pytest.raises(ConfigError, match="line 1 cannot be understood"):
        sweeps.read_manifest(tmp_path)


@pytest.mark.fault(22)
@_found("SAFETENSORS")
def test_a_safetensors_file_that_once_broke_the_reader_is_refused(case):
    header = json.dumps(case[1]).encode()
    with bounded(), pytest.raises(CheckpointError, match="here: "):
        parse_arrays(len(header).to_bytes(8, "little") + header, source="here")


@pytest.mark.fault(16)
@_found("ROWS")
def test_rows_that_once_broke_the_reader_are_refused(tmp_path, case):
    (tmp_path / "train.jsonl").write_bytes(case[1])
    begun = time.process_time()
    with bounded(), pytest.raises(DataError) as refused:
        _load_rows(tmp_path, tiny.build_tokenizer())
    assert len(str(refused.value)) < 5000 and time.process_time() - begun < SECONDS


@pytest.mark.fault(8)
@_found("GGUF")
def test_a_gguf_file_that_once_broke_the_reader_is_refused(tmp_path, case):
    (tmp_path / "a.gguf").write_bytes(case[1])
    with bounded(), pytest.raises(ModelError) as refused:
        gguf.load_gguf(tmp_path / "a.gguf", keep_quantized=False, dtype=None)
    assert len(str(refused.value)) < 1000
