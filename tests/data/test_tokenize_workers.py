"""Several processes tokenize a file exactly as one does, and none of them outlives its work."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.common.cores import usable_cores
from runner.common.errors import DataError, RunnerError
from runner.data import encode, tokenize_workers
from runner.data import tokenize as tokenize_module
from runner.data.encode import TokenBuffer, read_chunks
from runner.data.jsonl import MAX_LINE_BYTES, read_jsonl
from runner.data.readers import first_rows
from runner.data.row_errors import RowErrors
from runner.data.tokenize import tokenize_file


@pytest.fixture
def parallel(monkeypatch):
    """Encode small chunks in two worker processes."""
    monkeypatch.setattr(encode, "CHUNK_BYTES", 300)
    monkeypatch.setattr(tokenize_module, "worker_count", lambda size: 2)


@pytest.fixture
def tokenize_serially(file, tokenizer, make_options):
    """Tokenize `file` in this process, as one chunk; return the columns, the stats and the errors."""

    def do(**options):
        errors, buffer = RowErrors(), TokenBuffer()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "CHUNK_BYTES", 1 << 20)
            patch.setattr(tokenize_module, "worker_count", lambda size: 0)
            tokenize_file(file, tokenizer, make_options(**options), errors, buffer, lambda: None)
        return columns(buffer), errors

    return do


@pytest.fixture
def file(tmp_path):
    """300 rows: some invalid as JSON, some as rows, some over max_length, blank lines, a byte order mark."""
    lines = []
    for n in range(300):
        row = {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a" * (n % 50 + 1)}]}
        bad = {70: "{", 71: '{"text": 3}', 72: "[]", 200: '{"messages": []}'}
        lines += [bad.get(n, json.dumps(row)), *([""] if n % 40 == 0 else [])]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def columns(buffer):
    tokens = buffer.to_token_set()
    return [a.tobytes() for a in (tokens.tokens, tokens.supervised, tokens.offsets, tokens.lines)], buffer.stats


def test_parallel_workers_give_the_tokens_and_errors_of_one_process(
    file, tokenizer, make_options, parallel, tokenize_serially
):
    (arrays, stats), errors = tokenize_serially(max_length=40)
    parallel_errors, buffer = RowErrors(), TokenBuffer()
    digest = tokenize_file(file, tokenizer, make_options(max_length=40), parallel_errors, buffer, lambda: None)
    assert columns(buffer) == (arrays, stats)
    assert (errors.count, errors.listed) == (parallel_errors.count, parallel_errors.listed)
    assert (errors.count, stats.rows, stats.truncated > 0) == (4, 296, True)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_error_that_ends_reading_names_the_same_line_as_one_process(
    file, tokenizer, make_options, parallel, monkeypatch
):
    with file.open("ab") as more:
        more.write(b"\r\n" + b"x" * (MAX_LINE_BYTES + 5_000_000) + b"\r\n[]\n[]\n" + b"x" * (MAX_LINE_BYTES + 5))

    def message():
        with pytest.raises(DataError) as caught:
            tokenize_file(file, tokenizer, make_options(), RowErrors(), TokenBuffer(), lambda: None)
        return str(caught.value)

    parallel_message = message()
    assert "train.jsonl:309: the line is longer than 4 MB" in parallel_message
    monkeypatch.setattr(tokenize_module, "worker_count", lambda size: 0)
    assert message() == parallel_message
    with pytest.raises(DataError) as caught:
        list(read_jsonl(file, RowErrors()))
    assert str(caught.value) == parallel_message


def living(workers):
    return [worker.process.pid for worker in workers if worker.process.is_alive()]


@pytest.fixture
def started(monkeypatch):
    """The workers that were started, as a growing list."""
    workers = []
    start = tokenize_workers._Worker.__init__

    def recording(self):
        start(self)
        workers.append(self)

    monkeypatch.setattr(tokenize_workers._Worker, "__init__", recording)
    return workers


def test_a_dead_worker_is_reported_and_the_others_are_stopped(file, tokenizer, make_options, parallel, started):
    class KillingBuffer(TokenBuffer):
        def append(self, chunk):
            os.kill(started[0].process.pid, signal.SIGKILL)
            super().append(chunk)

    with pytest.raises(RunnerError, match=r"ended unexpectedly \(signal 9\).*out of memory.*start again"):
        tokenize_file(file, tokenizer, make_options(), RowErrors(), KillingBuffer(), lambda: None)
    assert len(started) == 2
    assert living(started) == []


def test_a_stop_request_stops_all_workers(file, tokenizer, make_options, parallel, started):
    class Stop(Exception):
        pass

    def check_stop():
        if len(started) == 2:
            raise Stop

    with pytest.raises(Stop):
        tokenize_file(file, tokenizer, make_options(), RowErrors(), TokenBuffer(), check_stop)
    assert living(started) == []


class UnpicklableTokenizer:
    """A tokenizer that cannot be sent to another process."""

    def __init__(self, inner):
        self._inner = inner
        self.has_chat_template = True

    def __getattr__(self, name):
        return getattr(self.__dict__["_inner"], name)

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def test_a_tokenizer_that_cannot_be_pickled_is_used_in_this_process(
    file, tokenizer, make_options, parallel, started, tokenize_serially
):
    errors, buffer = RowErrors(), TokenBuffer()
    tokenize_file(file, UnpicklableTokenizer(tokenizer), make_options(), errors, buffer, lambda: None)
    expected, expected_errors = tokenize_serially()
    assert columns(buffer) == expected
    assert (errors.count, errors.listed) == (expected_errors.count, expected_errors.listed)
    assert started == []


def test_tokenizing_continues_in_this_process_if_workers_cannot_unpickle_their_task(
    file, tokenizer, make_options, parallel, started, monkeypatch
):
    monkeypatch.setattr(tokenize_workers.ForkingPickler, "dumps", lambda task: b"cposix_no\nsuch\n.")
    errors, buffer = RowErrors(), TokenBuffer()
    tokenize_file(file, tokenizer, make_options(), errors, buffer, lambda: None)
    assert buffer.stats.rows == 296
    assert len(started) == 2
    assert living(started) == []


def test_small_files_and_single_cores_use_no_workers(monkeypatch):
    monkeypatch.setattr(tokenize_workers, "usable_cores", lambda: 32)
    assert tokenize_workers.worker_count(tokenize_workers.PARALLEL_MIN_BYTES - 1) == 0
    assert tokenize_workers.worker_count(tokenize_workers.PARALLEL_MIN_BYTES) == tokenize_workers.MAX_WORKERS
    monkeypatch.setattr(tokenize_workers, "usable_cores", lambda: 1)
    assert tokenize_workers.worker_count(1 << 40) == 0


@given(
    st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=30),
    st.booleans(),
    st.integers(1, 60),
)
def test_chunks_are_whole_lines_and_cover_the_file(lines, ended, size):
    data = b"\n".join(lines) + b"\n" * ended
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK_BYTES", size)
        chunks = list(read_chunks(io.BytesIO(data), read.append))
    assert b"".join(chunk.lines for chunk in chunks) == b"".join(read) == data
    assert all(chunk.lines.endswith(b"\n") for chunk in chunks[:-1])
    assert [chunk.first_line for chunk in chunks] == [
        1 + b"".join(read[:number]).count(b"\n") for number in range(len(chunks))
    ]


def test_the_first_rows_are_read_without_the_later_ones(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\nnot JSON\n')
    assert [row.value["n"] for row in first_rows(path, 2)] == [1, 2]
    with pytest.raises(DataError):
        first_rows(path, 3)
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    assert [row.value["n"] for row in first_rows(path, -1)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="one core")
@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_while_tokenizing_leaves_no_process(number, tmp_path, make_cli):
    cli = make_cli(tmp_path)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40}] * 4}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * (10 * tokenize_workers.PARALLEL_MIN_BYTES // 500))
    process = cli.start("model=tiny", "data.path=.", "data.cache_folder=cache", "hydra.run.dir=run", process_group=0)
    deadline = time.monotonic() + 60
    while len(group(process.pid)) < 4:  # the run, at least two workers, and Python's resource tracker
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, out
        assert "Traceback" not in out
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
        assert not list((tmp_path / "cache").glob(".draft-*"))
    deadline = time.monotonic() + 30
    while group(process.pid):
        assert time.monotonic() < deadline, group(process.pid)
        time.sleep(0.05)


def group(number):
    """Return the processes of a process group, without zombies."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,pid=,stat="], capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in listed.splitlines()]
    return [pid for pgid, pid, state in found if pgid == str(number) and not state.startswith("Z")]
