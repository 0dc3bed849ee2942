"""Hostile model folders, chat templates, GGUF files, adapter configs and data are refused and run no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.fault(23), pytest.mark.slow]

TINY = ("data=tiny", "train.iters=1", "hydra.run.dir=new")


class Canary:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as a model folder."""
    from runner.config.schema import ModelConfig
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), path)
    return path


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **values}))

    return change


def replaced(name: str, data: bytes, size: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)
        if size is not None:
            os.truncate(folder / name, size)

    return change


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def custom_architecture(folder: Path) -> None:
    (folder / "mine.py").write_text("open('ran', 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n")
    edited("config.json", model_file="mine.py")(folder)


def custom_tokenizer(folder: Path) -> None:
    (folder / "mine.py").write_text("open('ran', 'w')\n")
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T")(folder)


NESTED_LOOPS = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING_TEXT = b"{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
MODELS: dict[str, Callable[[Path], None]] = {
    "a tokenizer of 2 GB": replaced("tokenizer.json", b"{", 2 << 30),
    "a tokenizer of 33 million lists": replaced("tokenizer.json", b"[" + b"[]," * 33_000_000 + b"0]"),
    "a tokenizer four million deep": replaced("tokenizer.json", b"[" * 4_000_000),
    "a tokenizer that is a FIFO": fifo("tokenizer.json"),
    "a tokenizer that is a pickle": replaced("tokenizer.json", pickle.dumps(Canary())),
    "a config 300,000 deep": replaced("config.json", b'{"a":' * 300_000),
    "a config of 2 GB": replaced("config.json", b"{", 2 << 30),
    "a config that is a list": replaced("config.json", b"[]"),
    "a billion layers": edited("config.json", num_hidden_layers=10**9),
    "layers of a billion": edited("config.json", hidden_size=10**9),
    "a vocabulary of a billion": edited("config.json", vocab_size=10**9),
    "no heads": edited("config.json", num_attention_heads=0),
    "a negative width": edited("config.json", intermediate_size=-5),
    "a model type that is a path": edited("config.json", model_type="/tmp/ran"),
    "a model type that is a list": edited("config.json", model_type=["llama"]),
    "a template type that is a module": edited("tokenizer_config.json", chat_template_type="os"),
    "a tool parser that is a path": edited("tokenizer_config.json", tool_parser_type="../../ran"),
    "weights that are a FIFO": fifo("model.safetensors"),
    "weights that are a pickle": replaced("model.safetensors", pickle.dumps(Canary())),
    "a custom architecture": custom_architecture,
    "a custom tokenizer": custom_tokenizer,
}
TEMPLATES = {
    "a text of 10 GB": b"{{ 'a' * 10**10 }}",
    "a text that doubles": DOUBLING_TEXT,
    "ten billion iterations": NESTED_LOOPS,
    "access to Python's classes": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an included file": b"{% include '/etc/passwd' %}",
    "100 MB per row": b"{{ 'a' * 100000000 }}",
}
STOPPED_BY_MEMORY = ("a text of 10 GB", "a text that doubles", "100 MB per row")
"""Where a process's memory can be limited: on Linux."""


def test_a_hostile_model_folder_is_refused(cases, fresh_cli, folder, hostile):
    for name in cases.some(list(MODELS), 4):
        cli = fresh_cli()
        shutil.copytree(folder, cli.folder / "theirs")
        MODELS[name](cli.folder / "theirs")
        out = hostile.invoke(cli, "model.path=theirs", *TINY)
        assert "theirs" in out, name
        cases.done()


def test_hostile_model_folders_are_refused_within_a_second_and_200_mb(cases, cli, folder, tmp_path, hostile):
    paths = []
    for number, change in enumerate(MODELS.values()):
        paths.append(shutil.copytree(folder, tmp_path / str(number)))
        change(paths[-1])
    for name, result in zip(MODELS, hostile.measure(cli, "model", paths), strict=True):
        assert result["error"] == "ModelError", (name, result)
        assert result["seconds"] < hostile.SECONDS and result["bytes"] < hostile.BYTES, (name, result)
        cases.done()
    assert not list(tmp_path.rglob("ran"))


def test_a_hostile_chat_template_is_stopped(cases, fresh_cli, folder, hostile):
    names = [name for name in TEMPLATES if sys.platform == "linux" or name not in STOPPED_BY_MEMORY]
    for name in cases.some(names, 3):
        cli = fresh_cli()
        shutil.copytree(folder, cli.folder / "theirs")
        replaced("chat_template.jinja", TEMPLATES[name])(cli.folder / "theirs")
        assert "chat template" in hostile.invoke(cli, "model.path=theirs", *TINY), name
        cases.done()


def test_trusted_code_runs_and_every_run_reports_it(cli, folder):
    shutil.copytree(folder, cli.folder / "theirs")
    custom_architecture(cli.folder / "theirs")
    for number in range(2):
        out = cli("model.path=theirs", "model.trust_remote_code=true", *TINY[:-1], f"hydra.run.dir={number}")
        assert "code that came with" in out and (cli.folder / "ran").exists()
        (cli.folder / "ran").unlink()


def gguf_header(tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def gguf_string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def gguf_tensor(name: bytes, shape: tuple[int, ...], offset: int) -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


LLAMA = gguf_string(b"general.architecture") + struct.pack("<I", 8) + gguf_string(b"llama")
GGUF = {
    "2^60 tensors": gguf_header(tensors=1 << 60),
    "2^60 metadata": gguf_header(keys=1 << 60),
    "a string of 2^60": gguf_header() + struct.pack("<Q", 1 << 60),
    "an array of 2^60": gguf_header() + gguf_string(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60),
    "2^60 strings": gguf_header() + gguf_string(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60),
    "a tensor outside the file": gguf_header(1) + LLAMA + gguf_tensor(b"a", (1 << 40,), 0),
    "a tensor that overflows": gguf_header(1) + LLAMA + gguf_tensor(b"a", (1 << 62, 1 << 62), 0),
    "two tensors at the same offset": gguf_header(2)
    + LLAMA
    + gguf_tensor(b"a", (8,), 0)
    + gguf_tensor(b"b", (8,), 0)
    + bytes(128),
    "an architecture of 20 MB": gguf_header()
    + gguf_string(b"general.architecture")
    + struct.pack("<I", 8)
    + gguf_string(b"x" * (20 << 20)),
    "a key of 20 MB": gguf_header() + gguf_string(b"\x1b[2J" * (5 << 20)) + struct.pack("<I", 77),
    "a pickle": pickle.dumps(Canary()),
}


def test_a_hostile_gguf_file_is_refused_within_a_second_and_200_mb(cases, fresh_cli, tmp_path, hostile):
    paths = []
    for number, data in enumerate(GGUF.values()):
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(data)
    cli = fresh_cli()
    for name, result in zip(GGUF, hostile.measure(cli, "model", paths), strict=True):
        assert result["error"] == "ModelError" and len(result["message"]) < 1000, (name, result)
        assert result["seconds"] < hostile.SECONDS and result["bytes"] < hostile.BYTES, (name, result)
        cases.done()
    for path in cases.some(paths, 1):  # a directory for each, because a failed run keeps its own
        assert path.name in hostile.invoke(fresh_cli(), f"model.path={path}", *TINY)
        cases.done()


ADAPTER_CONFIGS = {
    "40 MB": b'{"lora_parameters": "' + b"x" * 40_000_000 + b'"}',
    "300,000 deep": b'{"lora_parameters":' * 300_000,
    "lists": b'{"lora_parameters": [' + b"[]," * 300_000 + b"0]}",
    "terminal control sequences": json.dumps(
        {"lora_parameters": {"rank": "\x1b]0;x\x07" * 100_000}, "num_layers": "\x1b[2J"}, ensure_ascii=False
    ).encode(),
    "a number of 5,000 digits": b'{"lora_parameters": {"rank": ' + b"9" * 5000 + b'}, "num_layers": 4}',
    "a list for an object": b'{"lora_parameters": {"rank": [[]], "keys": {"a": 1}}, "num_layers": NaN}',
    "a pickle": pickle.dumps(Canary()),
    "a FIFO": b"",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_cli) -> Path:
    """A finished run of the tiny model."""
    cli = make_cli(tmp_path_factory.mktemp("run"))
    cli("model=tiny", "data=tiny", "train.iters=2", "hydra.run.dir=run")
    return cli.folder / "run"


def test_a_hostile_adapter_config_is_ignored_or_refused(cases, fresh_cli, run, tmp_path, hostile):
    paths = []
    for number, data in enumerate(ADAPTER_CONFIGS.values()):
        paths.append(shutil.copytree(run, tmp_path / f"r{number}"))
        for manifest in (paths[-1] / "adapters").glob("manifest.json"):
            manifest.unlink()
        config = paths[-1] / "adapters/adapter_config.json"
        config.write_bytes(data)
        if not data:
            fifo(config.name)(config.parent)
    for reader in ("generate", "export"):
        for name, result in zip(ADAPTER_CONFIGS, hostile.measure(fresh_cli(), reader, paths), strict=True):
            assert result["error"] in ("CheckpointError", "ModelError", None), (name, result)
            assert result["error"] or reader == "generate", name
            assert result["seconds"] < hostile.SECONDS and result["bytes"] < hostile.BYTES, (name, result)
            cases.done()
    # The error for an adapter that does not fit quotes its config, as far as it is readable.
    for path in cases.some(paths, 2):
        overrides = ("model=tiny", "lora.rank=3", *TINY)
        assert "does not fit" in hostile.invoke(fresh_cli(), f"adapter={path / 'adapters'}", *overrides)
        cases.done()


def data_file(data: bytes, size: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        folder.mkdir()
        replaced("train.jsonl", data, size)(folder)

    return change


def special_file(make: Callable[[Path], None], at: str = "train.jsonl") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if at:
            folder.mkdir()
        make(folder / at if at else folder)

    return change


ROW_OF_1000_KEYS = b"{" + b",".join(b'"text%d":1' % i for i in range(1000)) + b"}\n"
DATA: dict[str, Callable[[Path], None]] = {
    "one line of 2 GB": data_file(b'{"text": "', 2 << 30),
    "a folder that is a FIFO": special_file(os.mkfifo, at=""),
    "a file that is a FIFO": special_file(os.mkfifo),
    "a file that is /dev/zero": special_file(lambda path: path.symlink_to("/dev/zero")),
    "a file that is a folder": special_file(lambda path: path.mkdir()),
    "three million brackets": data_file(b'{"text":' + b"[" * 3_000_000 + b"\n"),
    "a million lists": data_file(b'{"text": [' + b"[]," * 1_000_000 + b"0]}\n"),
    "a row of 300,000 keys": data_file(b"{" + b",".join(b'"t%d":1' % i for i in range(300_000)) + b"}\n"),
    "rows of 1,000 keys": data_file(b'{"text": "a"}\n' + ROW_OF_1000_KEYS * 300),
    "a role of 3 MB": data_file(
        json.dumps({"messages": [{"role": "user" * 750_000, "content": "x"}]}).encode() + b"\n"
    ),
    "a number of 3 million digits": data_file(b'{"text": ' + b"9" * 3_000_000 + b"}\n"),
    "keys with terminal control sequences": data_file(
        json.dumps({"\x1b[2J\x07": 1}, ensure_ascii=False).encode() + b"\n"
    ),
    "a pickle": data_file(pickle.dumps(Canary())),
}


@pytest.mark.fault(16)
def test_hostile_data_is_refused_within_a_second_and_200_mb(cases, fresh_cli, tmp_path, hostile):
    paths = []
    for number, make in enumerate(DATA.values()):
        paths.append(tmp_path / f"d{number}")
        make(paths[-1])
    for name, result in zip(DATA, hostile.measure(fresh_cli(), "data", paths), strict=True):
        assert result["error"] == "DataError" and len(result["message"]) < 5000, (name, result)
        assert result["seconds"] < hostile.SECONDS and result["bytes"] < hostile.BYTES, (name, result)
        cases.done()
    for path in cases.some(paths, 2):
        out = hostile.invoke(fresh_cli(), f"data.path={path}", "model=tiny", "train.iters=1", "hydra.run.dir=new")
        assert path.name in out and out.replace("\n", "").isprintable()
        cases.done()


def test_the_canary_writes_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "ran").exists()
