"""Model folders, chat templates, GGUF files, adapter configs and data from strangers: no code, no bombs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.fault(23), pytest.mark.slow]

TINY = ("data=tiny", "train.iters=1", "hydra.run.dir=new")


class Canary:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as a folder of the hub."""
    from runner.config.schema import ModelConfig
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), path)
    return path


def edited(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**about, **values}))

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


def own_code(folder: Path) -> None:
    (folder / "mine.py").write_text("open('ran', 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n")
    edited("config.json", model_file="mine.py")(folder)


def own_tokenizer(folder: Path) -> None:
    (folder / "mine.py").write_text("open('ran', 'w')\n")
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="T")(folder)


LOOPS = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = b"{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
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
    "a kind of model that is a path": edited("config.json", model_type="/tmp/ran"),
    "a kind of model that is a list": edited("config.json", model_type=["llama"]),
    "a template type that is a module": edited("tokenizer_config.json", chat_template_type="os"),
    "a tool parser that is a path": edited("tokenizer_config.json", tool_parser_type="../../ran"),
    "weights that are a FIFO": fifo("model.safetensors"),
    "weights that are a pickle": replaced("model.safetensors", pickle.dumps(Canary())),
    "code of its own": own_code,
    "a tokenizer's code of its own": own_tokenizer,
}
TEMPLATES = {
    "a text of 10 GB": b"{{ 'a' * 10**10 }}",
    "a text that doubles": DOUBLES,
    "ten billion rounds": LOOPS,
    "the classes of Python": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": b"{% include '/etc/passwd' %}",
    "100 MB a row": b"{{ 'a' * 100000000 }}",
}


def test_a_model_folder_of_a_stranger_is_refused(cases, fresh_cli, folder, hostile):
    for name in cases.some(list(MODELS), 4):
        cli = fresh_cli()
        shutil.copytree(folder, cli.folder / "theirs")
        MODELS[name](cli.folder / "theirs")
        out = hostile.invoke(cli, "model.path=theirs", *TINY)
        assert "theirs" in out, name
        cases.done()


def test_model_folders_are_refused_within_a_second_and_200_mb(cases, cli, folder, tmp_path, hostile):
    paths = []
    for number, change in enumerate(MODELS.values()):
        paths.append(shutil.copytree(folder, tmp_path / str(number)))
        change(paths[-1])
    for name, found in zip(MODELS, hostile.measure("model", paths, cli.environment), strict=True):
        assert found["error"] == "ModelError", (name, found)
        assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
    assert not list(tmp_path.rglob("ran"))


def test_a_chat_template_of_a_stranger_is_stopped(cases, fresh_cli, folder, hostile):
    for name in cases.some(list(TEMPLATES), 3):
        cli = fresh_cli()
        shutil.copytree(folder, cli.folder / "theirs")
        replaced("chat_template.jinja", TEMPLATES[name])(cli.folder / "theirs")
        assert "chat template" in hostile.invoke(cli, "model.path=theirs", *TINY), name
        cases.done()


def test_code_that_is_trusted_runs_and_every_run_says_so(cli, folder):
    shutil.copytree(folder, cli.folder / "theirs")
    own_code(cli.folder / "theirs")
    for number in range(2):
        out = cli("model.path=theirs", "model.trust_remote_code=true", *TINY[:-1], f"hydra.run.dir={number}")
        assert "code that came with" in out and (cli.folder / "ran").exists()
        (cli.folder / "ran").unlink()


def head(tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: bytes, shape: tuple[int, ...], offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


LLAMA = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
GGUF = {
    "2^60 tensors": head(tensors=1 << 60),
    "2^60 metadata": head(keys=1 << 60),
    "a text of 2^60": head() + struct.pack("<Q", 1 << 60),
    "an array of 2^60": head() + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60),
    "2^60 texts": head() + text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60),
    "a tensor outside the file": head(1) + LLAMA + tensor(b"a", (1 << 40,), 0),
    "a tensor that overflows": head(1) + LLAMA + tensor(b"a", (1 << 62, 1 << 62), 0),
    "two tensors at one place": head(2) + LLAMA + tensor(b"a", (8,), 0) + tensor(b"b", (8,), 0) + bytes(128),
    "an architecture of 20 MB": head() + text(b"general.architecture") + struct.pack("<I", 8) + text(b"x" * (20 << 20)),
    "a key of 20 MB": head() + text(b"\x1b[2J" * (5 << 20)) + struct.pack("<I", 77),
    "a pickle": pickle.dumps(Canary()),
}


def test_a_gguf_file_of_a_stranger_is_refused_within_a_second_and_200_mb(cases, fresh_cli, tmp_path, hostile):
    paths = []
    for number, data in enumerate(GGUF.values()):
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(data)
    cli = fresh_cli()
    for name, found in zip(GGUF, hostile.measure("model", paths, cli.environment), strict=True):
        assert found["error"] == "ModelError" and len(found["told"]) < 1000, (name, found)
        assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
    for path in cases.some(paths, 1):  # a room each: a run that failed keeps its directory
        assert path.name in hostile.invoke(fresh_cli(), f"model.path={path}", *TINY)
        cases.done()


ABOUT = {
    "40 MB": b'{"lora_parameters": "' + b"x" * 40_000_000 + b'"}',
    "300,000 deep": b'{"lora_parameters":' * 300_000,
    "lists": b'{"lora_parameters": [' + b"[]," * 300_000 + b"0]}",
    "a text that steers a terminal": json.dumps(
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


def test_an_adapter_config_of_a_stranger_is_passed_over_or_refused(cases, fresh_cli, run, tmp_path, hostile):
    paths = []
    for number, data in enumerate(ABOUT.values()):
        paths.append(shutil.copytree(run, tmp_path / f"r{number}"))
        for sealed in (paths[-1] / "adapters").glob("manifest.json"):
            sealed.unlink()
        about = paths[-1] / "adapters/adapter_config.json"
        about.write_bytes(data)
        if not data:
            fifo(about.name)(about.parent)
    for reader in ("generate", "export"):
        for name, found in zip(ABOUT, hostile.measure(reader, paths, fresh_cli().environment), strict=True):
            assert found["error"] in ("CheckpointError", "ModelError", None), (name, found)
            assert found["error"] or reader == "generate", name
            assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
            cases.done()
    # Where the adapter does not fit, its config is quoted: for what could be read of it.
    for path in cases.some(paths, 2):
        overrides = ("model=tiny", "lora.rank=3", *TINY)
        assert "does not fit" in hostile.invoke(fresh_cli(), f"adapter={path / 'adapters'}", *overrides)
        cases.done()


def lines(data: bytes, size: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        folder.mkdir()
        replaced("train.jsonl", data, size)(folder)

    return change


def special(make: Callable[[Path], None], at: str = "train.jsonl") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if at:
            folder.mkdir()
        make(folder / at if at else folder)

    return change


KEYS = b"{" + b",".join(b'"text%d":1' % i for i in range(1000)) + b"}\n"
DATA: dict[str, Callable[[Path], None]] = {
    "one line of 2 GB": lines(b'{"text": "', 2 << 30),
    "a folder that is a FIFO": special(os.mkfifo, at=""),
    "a file that is a FIFO": special(os.mkfifo),
    "a file that is /dev/zero": special(lambda path: path.symlink_to("/dev/zero")),
    "a file that is a folder": special(lambda path: path.mkdir()),
    "three million brackets": lines(b'{"text":' + b"[" * 3_000_000 + b"\n"),
    "a million lists": lines(b'{"text": [' + b"[]," * 1_000_000 + b"0]}\n"),
    "a row of 300,000 keys": lines(b"{" + b",".join(b'"t%d":1' % i for i in range(300_000)) + b"}\n"),
    "rows of 1,000 keys": lines(b'{"text": "a"}\n' + KEYS * 300),
    "a role of 3 MB": lines(json.dumps({"messages": [{"role": "user" * 750_000, "content": "x"}]}).encode() + b"\n"),
    "a number of 3 million digits": lines(b'{"text": ' + b"9" * 3_000_000 + b"}\n"),
    "keys that steer a terminal": lines(json.dumps({"\x1b[2J\x07": 1}, ensure_ascii=False).encode() + b"\n"),
    "a pickle": lines(pickle.dumps(Canary())),
}


@pytest.mark.fault(16)
def test_data_of_a_stranger_are_refused_within_a_second_and_200_mb(cases, fresh_cli, tmp_path, hostile):
    paths = []
    for number, make in enumerate(DATA.values()):
        paths.append(tmp_path / f"d{number}")
        make(paths[-1])
    for name, found in zip(DATA, hostile.measure("data", paths, fresh_cli().environment), strict=True):
        assert found["error"] == "DataError" and len(found["told"]) < 5000, (name, found)
        assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
    for path in cases.some(paths, 2):
        out = hostile.invoke(fresh_cli(), f"data.path={path}", "model=tiny", "train.iters=1", "hydra.run.dir=new")
        assert path.name in out and out.replace("\n", "").isprintable()
        cases.done()


def test_the_canary_sings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "ran").exists()
