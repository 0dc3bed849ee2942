"""What loggers wrote, read back from their files: each reader returns a record as name, step and value of every number.

The readers know the formats of the files, and take from the libraries their protocol buffers only.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Number = tuple[str, int, float]


@dataclass
class Record:
    """A run as a logger shows it."""

    numbers: list[Number]
    """Sorted, with every repetition."""
    config: Any = None
    group: str | None = None
    state: str | None = None
    samples: dict[int, list[str]] = field(default_factory=dict)
    """Step to the prompts of the samples."""


def expected(run: Path) -> Record:
    """What the files of the run itself hold."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples: dict[int, list[str]] = {}
    if (run / "samples.jsonl").exists():
        for line in (run / "samples.jsonl").read_text().splitlines():
            samples.setdefault(json.loads(line)["step"], []).append(json.loads(line)["prompt"])
    numbers = [
        (f"{row['split']}/{name}", row["step"], value)
        for row in rows
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    ]
    return Record(sorted(numbers), samples=samples)


def tensorboard(run: Path) -> Record:
    """The one event file of the run: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = run.glob("events.out.tfevents.*")
    data, position = path.read_bytes(), 0
    record = Record([])
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        event = Event.FromString(data[position + 12 : position + 12 + length])
        position += 16 + length
        for value in event.summary.value:
            if value.HasField("simple_value"):
                record.numbers.append((value.tag, event.step, value.simple_value))
            elif value.tag == "config/text_summary":
                record.config = value.tensor.string_val[0].decode()
            elif "/samples/" in value.tag:
                prompt = value.tensor.string_val[0].decode().split("**")[2].strip()
                record.samples.setdefault(event.step, []).append(prompt.replace("\n    ", "\n"))
    record.numbers.sort()
    return record


def mlflow(uri: str, run_id: str) -> Record:
    """The run in MLflow's store with the tag of our `run_id`, by MLflow's client."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("runner")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`runner.run_id` = '{run_id}'")
    numbers = [
        (metric.key, metric.step, metric.value)
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    ]
    samples: dict[int, list[str]] = {}
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    if (folder / "samples.jsonl").exists():
        for line in (folder / "samples.jsonl").read_text().splitlines():
            samples.setdefault(json.loads(line)["step"], []).append(json.loads(line)["prompt"])
    assert (folder / "config.yaml").is_file()
    return Record(sorted(numbers), run.data.params, run.data.tags.get("runner.sweep"), run.info.status, samples)


def wandb(run: Path) -> Record:
    """The one offline record of the run."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    record = Record([])
    for data in leveldb_records(path.read_bytes(), start=7):
        message = Message.FromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            record.group = message.run.run_group
            record.config = {item.key: json.loads(item.value_json) for item in message.run.config.update}
        elif kind == "exit":
            record.state = str(message.exit.exit_code)
        elif kind == "history":
            items = [(item.nested_key or [item.key], json.loads(item.value_json)) for item in message.history.item]
            step = next(value for keys, value in items if keys == ["step"])
            for keys, value in items:
                if keys[0].endswith("/samples"):
                    if keys[-1] == "path":
                        table = json.loads((path.parent / "files" / value).read_text())
                        column = table["columns"].index("prompt")
                        record.samples[step] = [row[column] for row in table["data"]]
                elif keys != ["step"] and not keys[0].startswith("_"):
                    record.numbers.append((keys[0], step, value))
    record.numbers.sort()
    return record


def leveldb_records(data: bytes, start: int) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 kB; checksum, length and type before each part."""
    position, parts = start, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def trackio(folder: Path, run_id: str) -> Record:
    """The run of that id in the database of the project `runner`."""
    record = Record([])
    with closing(sqlite3.connect(folder / "runner.db")) as database:
        for step, text in database.execute("SELECT step, metrics FROM metrics WHERE run_id = ?", [run_id]):
            for name, value in json.loads(text).items():
                if name.endswith("/samples"):
                    record.samples[step] = [row["prompt"] for row in value["_value"]]
                else:
                    record.numbers.append((name, step, value))
        ((config,),) = database.execute("SELECT config FROM configs WHERE run_id = ?", [run_id])
        record.config = json.loads(config)
        record.group = record.config["_Group"]
    record.numbers.sort()
    return record


def labels(place: Path, run: Path, run_id: str) -> dict[str, tuple[str, list[str], str]]:
    """Name, tags and note of the run in each service."""
    from mlflow.tracking import MlflowClient
    from wandb.proto.wandb_internal_pb2 import Record as Message

    client = MlflowClient(f"sqlite:///{place}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("runner")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`runner.run_id` = '{run_id}'")
    tags = found.data.tags
    result = {"mlflow": (found.info.run_name, tags["runner.tags"].split(", "), tags["mlflow.note.content"])}
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    for data in leveldb_records(path.read_bytes(), start=7):
        message = Message.FromString(data)
        if message.WhichOneof("record_type") == "run":
            result["wandb"] = (message.run.display_name, list(message.run.tags), message.run.notes)
    with closing(sqlite3.connect(place / "outputs/trackio/runner.db")) as database:
        ((text, name),) = database.execute("SELECT config, run_name FROM configs WHERE run_id = ?", [run_id])
        names = {row[0] for row in database.execute("SELECT run_name FROM metrics WHERE run_id = ?", [run_id])}
    config = json.loads(text)
    assert names == {name}
    result["trackio"] = (name, config["_Tags"], config["_Note"])
    return result
