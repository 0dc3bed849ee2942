"""What several processes make of a file is what one makes of it, and none of them outlives its work."""

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
from runner.data import tokenize as loading
from runner.data.encode import InMemoryColumns, encode_in_memory, read_chunks
from runner.data.jsonl import LONGEST_LINE, LazyRows, read_jsonl
from runner.data.row_errors import RowErrors
from runner.data.tokenize import tokenize_file, tokenize_rows


@pytest.fixture
def apart(monkeypatch):
    """Small pieces, each made by one of two processes."""
    monkeypatch.setattr(encode, "PIECE", 300)
    monkeypatch.setattr(loading, "workers_for", lambda size: 2)


@pytest.fixture
def file(tmp_path):
    """300 rows: some bad as JSON, some as rows, one too long for max_length, blank lines, a mark at the start."""
    lines = []
    for n in range(300):
        row = {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "a" * (n % 50 + 1)}]}
        bad = {70: "{", 71: '{"text": 3}', 72: "[]", 200: '{"messages": []}'}
        lines += [bad.get(n, json.dumps(row)), *([""] if n % 40 == 0 else [])]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def columns(made):
    tokens, counts = made
    return [a.tobytes() for a in (tokens.tokens, tokens.supervised, tokens.offsets, tokens.lines)], counts


def test_the_result_and_the_bad_rows_are_those_of_one_process(file, tokenizer, reading, apart):
    alone, together = RowErrors(), RowErrors()
    one = tokenize_rows(read_jsonl(file, alone), tokenizer, reading(max_length=40), alone)
    seen = []

    def fill(into, bad):
        seen.append(tokenize_file(file, tokenizer, reading(max_length=40), bad, into, lambda: None))
        return seen[0]

    other = encode_in_memory(fill, together)
    assert columns(one) == columns(other)
    assert (alone.count, alone._listed) == (together.count, together._listed)
    assert (alone.count, one[1].rows, one[1].truncated > 0) == (4, 296, True)
    assert seen == [hashlib.sha256(file.read_bytes()).hexdigest()]


def test_what_ends_the_reading_ends_it_at_the_same_line(file, tokenizer, reading, apart, monkeypatch):
    with file.open("ab") as more:
        more.write(b"\r\n" + b"x" * (LONGEST_LINE + 5_000_000) + b"\r\n[]\n[]\n" + b"x" * (LONGEST_LINE + 5))

    def words():
        with pytest.raises(DataError) as caught:
            tokenize_file(file, tokenizer, reading(), RowErrors(), InMemoryColumns(), lambda: None)
        return str(caught.value)

    together = words()
    assert "train.jsonl:309: the line is longer than 4 MB" in together
    monkeypatch.setattr(loading, "workers_for", lambda size: 0)
    assert words() == together
    with pytest.raises(DataError) as caught:
        list(read_jsonl(file, RowErrors()))
    assert str(caught.value) == together


def living(workers_):
    return [worker.process.pid for worker in workers_ if worker.process.is_alive()]


@pytest.fixture
def started(monkeypatch):
    """The workers that were started."""
    made = []
    own = tokenize_workers._Worker.__init__

    def begin(self):
        own(self)
        made.append(self)

    monkeypatch.setattr(tokenize_workers._Worker, "__init__", begin)
    return made


def test_a_worker_that_dies_is_told_and_the_others_end(file, tokenizer, reading, apart, started):
    class Into(InMemoryColumns):
        def append(self, part):
            os.kill(started[0].process.pid, signal.SIGKILL)
            super().append(part)

    with pytest.raises(RunnerError, match=r"ended too early \(signal 9\).*out of memory.*start again"):
        tokenize_file(file, tokenizer, reading(), RowErrors(), Into(), lambda: None)
    assert len(started) == 2
    assert living(started) == []


def test_a_stop_ends_all(file, tokenizer, reading, apart, started):
    class Stop(Exception):
        pass

    def each():
        if len(started) == 2:
            raise Stop

    with pytest.raises(Stop):
        tokenize_file(file, tokenizer, reading(), RowErrors(), InMemoryColumns(), each)
    assert living(started) == []


class Unsendable:
    """A tokenizer that stays in its process."""

    def __init__(self, inner):
        self._inner = inner
        self.has_chat_template = True

    def __getattr__(self, name):
        return getattr(self.__dict__["_inner"], name)

    def __reduce__(self):
        raise TypeError("cannot be sent")


def test_a_tokenizer_that_cannot_be_sent_is_used_here(file, tokenizer, reading, apart, started):
    bad = RowErrors()
    into = InMemoryColumns()
    tokenize_file(file, Unsendable(tokenizer), reading(), bad, into, lambda: None)
    assert columns((into.tokens(), into.counts)) == columns(
        tokenize_rows(read_jsonl(file, bad), tokenizer, reading(), bad)
    )
    assert started == []


def test_processes_that_do_not_understand_their_task_are_done_without(
    file, tokenizer, reading, apart, started, monkeypatch
):
    monkeypatch.setattr(tokenize_workers.ForkingPickler, "dumps", lambda task: b"cposix_no\nsuch\n.")
    bad = RowErrors()
    into = InMemoryColumns()
    tokenize_file(file, tokenizer, reading(), bad, into, lambda: None)
    assert into.counts.rows == 296
    assert len(started) == 2
    assert living(started) == []


def test_small_files_and_daemons_stay_alone(monkeypatch):
    monkeypatch.setattr(tokenize_workers, "usable_cores", lambda: 32)
    assert tokenize_workers.workers_for(tokenize_workers.PARALLEL_FROM - 1) == 0
    assert tokenize_workers.workers_for(tokenize_workers.PARALLEL_FROM) == tokenize_workers.MOST
    monkeypatch.setattr(tokenize_workers, "usable_cores", lambda: 1)
    assert tokenize_workers.workers_for(1 << 40) == 0


@given(
    st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=30),
    st.booleans(),
    st.integers(1, 60),
)
def test_pieces_are_whole_lines_and_nothing_is_lost(lines, ended, size):
    data = b"\n".join(lines) + b"\n" * ended
    seen = []
    own, encode.PIECE = encode.PIECE, size
    try:
        pieces = list(read_chunks(io.BytesIO(data), seen.append))
    finally:
        encode.PIECE = own
    assert b"".join(piece.lines for piece in pieces) == b"".join(seen) == data
    assert all(piece.lines.endswith(b"\n") for piece in pieces[:-1])
    assert [piece.first for piece in pieces] == [
        1 + b"".join(seen[:number]).count(b"\n") for number in range(len(pieces))
    ]


def test_the_first_rows_are_read_without_the_others(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\nnot JSON\n')
    assert [row.value["n"] for row in LazyRows(path).first(2)] == [1, 2]
    with pytest.raises(DataError):
        LazyRows(path).first(3)
    assert LazyRows(None).first(2) == []
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    assert [row.value["n"] for row in LazyRows(path).first(-1)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="one core")
@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_by_a_run_that_is_stopped_while_it_tokenises(number, tmp_path, make_cli):
    cli = make_cli(tmp_path)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40}] * 4}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * (10 * tokenize_workers.PARALLEL_FROM // 500))
    process = cli.start("model=tiny", "data.path=.", "data.cache_folder=cache", "hydra.run.dir=run", process_group=0)
    deadline = time.monotonic() + 60
    while len(group(process.pid)) < 4:  # the run, two workers or more, and Python's own tracker of resources
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
        assert not list((tmp_path / "cache").glob(".tokens-*"))
    deadline = time.monotonic() + 30
    while group(process.pid):
        assert time.monotonic() < deadline, group(process.pid)
        time.sleep(0.05)


def group(number):
    """The processes of a process group."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,pid=,stat="], capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in listed.splitlines()]
    return [pid for pgid, pid, state in found if pgid == str(number) and not state.startswith("Z")]
