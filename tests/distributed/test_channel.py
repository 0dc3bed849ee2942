"""The channel between ranks: what it exchanges, and how it finds out that one is gone. Real sockets, in threads."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from runner.common.errors import EXIT_CONFIG, EXIT_RANK_LOST, ConfigError, RankLost
from runner.common.free_ports import free_ports
from runner.config.schema import Config
from runner.distributed import channel as channels
from runner.distributed import join as joining
from runner.distributed import rendezvous
from runner.distributed.frames import ConnectionLost, FrameSocket, Kind, pack, to_json, unpack
from runner.distributed.identity import RankIdentity
from runner.distributed.join import open_channel
from runner.distributed.launch import Launch
from runner.training import shared_start
from runner.training.shared_start import compare_inputs
from runner.training.signals import StopRequested, StopSignals
from runner.training.world import ALONE, Ranks, _count, _limbs


@pytest.fixture
def worlds():
    """`worlds(3)`: the worlds of so many ranks, which are threads of this process."""
    made: list[Ranks] = []

    def make(size: int) -> list[Ranks]:
        address = "127.0.0.1", free_ports(1)[0]
        with ThreadPoolExecutor(size) as pool:
            found = pool.map(lambda rank: open_channel(rank, size, address), range(size))
            made.extend(
                Ranks(Launch("ring", rank, size, address), channel, SimpleNamespace())  # type: ignore[arg-type]
                for rank, channel in enumerate(found)
            )
        return made

    yield make
    for world in made:
        world.channel.close()


def connect(port: int) -> socket.socket:
    until = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.05)


def on_all(worlds, function):
    """Return what `function` of each world returns or raises."""

    def call(world):
        try:
            return function(world)
        except (Exception, SystemExit) as error:
            return error

    with ThreadPoolExecutor(len(worlds)) as pool:
        return list(pool.map(call, worlds))


def test_all_ranks_receive_what_each_gives(worlds):
    found = worlds(3)
    assert on_all(found, lambda world: world.gather(bytes([world.rank]) * 3)) == [[b"\0\0\0", b"\1\1\1", b"\2\2\2"]] * 3
    assert on_all(found, lambda world: world.broadcast(b"first" if world.is_first else b"not")) == [b"first"] * 3
    big = np.random.default_rng(0).bytes(5_000_001)
    assert on_all(found, lambda world: world.broadcast(big)) == [big] * 3

    def arrays(world):
        return world.gather_arrays(np.arange(world.rank, dtype=np.int64), np.full(2, 0.1 * world.rank))

    for integers, floats in on_all(found, arrays):
        assert [part.tolist() for part in integers] == [[], [0], [0, 1]]
        assert np.concatenate(floats).tolist() == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]


def test_a_stop_signal_counts_at_the_same_point_on_all_ranks(worlds):
    found = worlds(2)
    stops = [StopSignals(), StopSignals()]
    for world, each in zip(found, stops, strict=True):
        each.share(world.channel.broadcast_stop)
        world._stops = each
        world.channel.on_stop = each.request
    stops[1].request(signal.SIGHUP)
    until = time.monotonic() + 5
    while stops[0].requested is None and time.monotonic() < until:
        time.sleep(0.01)
    assert [each.requested for each in stops] == [signal.SIGHUP] * 2, "all hear of it at once"
    assert [each.signal for each in stops] == [None, None], "it does not count before they agree"
    on_all(found, lambda world: world.gather())
    assert [each.signal for each in stops] == [signal.SIGHUP] * 2
    errors = on_all(found, lambda world: world.gather(abandoned=world.rank == 1))
    assert all(isinstance(error, StopRequested) for error in errors)


def test_a_rank_that_closes_its_connection_is_named_by_all_others(worlds):
    found = worlds(3)
    found[1].channel.close()
    for error in on_all([found[0], found[2]], lambda world: world.gather()):
        assert isinstance(error, RankLost) and "rank 1 (" in str(error) and "its process ended" in str(error)
        assert error.exit_code == 9


def test_the_failure_of_a_rank_ends_all_with_its_exit_code(worlds):
    found = worlds(3)
    found[2].channel.end(6, "out of memory")
    for error in on_all(found[:2], lambda world: world.gather()):
        assert isinstance(error, RankLost) and "rank 2 (" in str(error) and "out of memory" in str(error)
        assert error.exit_code == 6


def test_rank_0_ends_all_with_its_exit_code(worlds):
    found = worlds(3)
    found[0].channel.end(143)
    assert [world.channel.wait_for_end() for world in found[1:]] == [143, 143]


def test_silence_is_noticed(worlds, monkeypatch):
    for module in (rendezvous, joining):
        monkeypatch.setattr(module, "SILENCE_SECONDS", 1.5)
    found = worlds(2)
    monkeypatch.setattr(channels.Channel, "_send", lambda *_, **__: True)  # from now on nobody sends anything
    for error in on_all(found, lambda world: world.channel.wait_for_loss(10)):
        assert isinstance(error, RankLost) and "did not answer" in str(error)


def test_strangers_and_damaged_messages_do_not_disturb_ranks_that_join():
    port = free_ports(1)[0]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(open_channel, 0, 2, ("127.0.0.1", port))
        hostile = (
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            struct.pack("!4sBQ", b"RNR1", Kind.HELLO, 1 << 60),
            struct.pack("!4sBQ", b"RNR1", 99, 0),
            struct.pack("!4sBQ", b"RNR1", Kind.HELLO, 4) + b"null",
            struct.pack("!4sBQ", b"RNR1", Kind.HELLO, 20) + b'{"rank": [], "a": 1}',
        )
        for content in hostile:
            connection = connect(port)
            connection.sendall(content)
            connection.close()
        second = pool.submit(open_channel, 1, 2, ("127.0.0.1", port))
        for channel in (first.result(10), second.result(10)):
            channel.close()


def test_a_rank_that_does_not_come_is_named():
    port = free_ports(1)[0]
    with pytest.raises(RankLost, match=r"ranks 1, 2 of 3 did not come"):
        open_channel(0, 3, ("127.0.0.1", port), seconds=0.3)
    with pytest.raises(RankLost, match=r"rank 0 is not at 127.0.0.1"):
        open_channel(1, 3, ("127.0.0.1", port), seconds=0.3)


def arrive(port: int, **changes: object) -> FrameSocket:
    """Connect with rank 0 of 3 as rank 1, and wait until it has answered where that one is welcome."""
    frames = FrameSocket(connect(port), 5)
    frames.send(Kind.HELLO, to_json({**RankIdentity.own(1, 3).as_json(), **changes}))
    if not changes:
        assert frames.receive()[0] is Kind.BEAT
    return frames


@pytest.mark.parametrize(
    ("changes", "reason", "code"),
    [
        ({"version": "0.0"}, "it has version 0.0 of runner", EXIT_CONFIG),
        ({"code": 1}, "its source files of runner .* differ from rank 0's", EXIT_CONFIG),
        ({"size": 2}, "it was started as rank 1 of 2, and the run has 3 ranks", EXIT_CONFIG),
        ({"problem": "it cannot wait at 10.0.0.1:1: in use."}, "it cannot wait at 10.0.0.1:1", EXIT_RANK_LOST),
    ],
)
def test_a_rank_that_cannot_take_part_ends_all_and_each_says_why(changes, reason, code):
    port = free_ports(1)[0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_channel, 0, 3, ("127.0.0.1", port))
        other = pool.submit(open_channel, 2, 3, ("127.0.0.1", port))
        time.sleep(0.3)
        kind, content = arrive(port, **changes).receive()
        told = json.loads(content)
        assert kind is Kind.END and re.search(reason, told["reason"]) and told["code"] == code
        with pytest.raises(RankLost, match=rf"rank 1 \(.*{reason}") as raised:
            first.result(5)
        assert raised.value.exit_code == code
        with pytest.raises(SystemExit) as ended:  # rank 0 says it
            other.result(5)
        assert ended.value.code == code


def test_a_rank_that_is_gone_before_all_have_come_is_named_at_once():
    port = free_ports(1)[0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_channel, 0, 3, ("127.0.0.1", port))
        lost = arrive(port)
        lost.close()
        with pytest.raises(RankLost, match=r"rank 1 \(.*is lost before the run began: its process ended"):
            first.result(5)


def test_ranks_that_wait_notice_that_another_one_is_silent(monkeypatch):
    for module in (rendezvous, joining):
        monkeypatch.setattr(module, "SILENCE_SECONDS", 1.5)
    port = free_ports(1)[0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_channel, 0, 3, ("127.0.0.1", port))
        silent = arrive(port)
        with pytest.raises(RankLost, match=r"rank 1 \(.*is lost before the run began: it did not answer"):
            first.result(10)
        silent.close()
    with joining.listen(("127.0.0.1", port)) as listener, ThreadPoolExecutor(1) as pool:
        other = pool.submit(open_channel, 1, 2, ("127.0.0.1", port))
        connection, _ = listener.accept()
        with connection:
            FrameSocket(connection, 5).send(Kind.BEAT, to_json(RankIdentity.own(0, 2).as_json()))
            with pytest.raises(RankLost, match=r"rank 0 \(.*is lost before the run began: it did not answer"):
                other.result(10)


def test_ranks_that_wait_notice_that_rank_0_is_gone(monkeypatch):
    """Where it had answered: else it may be another program, or one that ends and is started again."""
    port = free_ports(1)[0]
    with joining.listen(("127.0.0.1", port)) as listener, ThreadPoolExecutor(1) as pool:
        other = pool.submit(open_channel, 1, 2, ("127.0.0.1", port))
        listener.accept()[0].close()
        connection, _ = listener.accept()
        FrameSocket(connection, 5).send(Kind.BEAT, to_json(RankIdentity.own(0, 2).as_json()))
        connection.close()
        with pytest.raises(RankLost, match=r"rank 0 \(.*is lost before the run began: its process ended"):
            other.result(5)


def test_a_rank_that_comes_twice_is_refused():
    port = free_ports(1)[0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_channel, 0, 3, ("127.0.0.1", port), seconds=1)
        twin = arrive(port)
        with pytest.raises(RankLost, match=r"came too, .* does another run use this port"):
            open_channel(1, 3, ("127.0.0.1", port))
        with pytest.raises(RankLost, match=r"rank 2 of 3 did not come .* in time. rank 1 .* came too"):
            first.result(5)
        twin.close()


def test_waiting_ends_where_the_launch_says_so():
    port = free_ports(1)[0]

    def check():
        raise RankLost("rank 1 was killed")

    for rank in (0, 1):
        with pytest.raises(RankLost, match="rank 1 was killed"):
            open_channel(rank, 2, ("127.0.0.1", port), check=check)


def test_a_port_where_another_program_waits_is_refused():
    """Also where it lets others wait there too, as MLX does: two runs would share the ranks that come."""
    with socket.socket() as other:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = other.getsockname()
        with pytest.raises(RankLost, match=r"rank 0: it cannot wait at .*starting-port"):
            joining.listen(address)
        assert "starting-port" in joining.port_problem([address])
    assert joining.port_problem([address]) is None
    assert "one of its machine" in joining.port_problem([("192.0.2.1", 1)])


def test_the_port_is_free_for_mlx_once_all_have_joined(worlds):
    [first, _] = worlds(2)
    with joining.listen(first.channel.peers[0].socket._connection.getsockname()):
        pass


def test_rank_0_is_found_at_the_first_address_that_answers():
    with joining.listen(("", 0)) as listener:
        port = listener.getsockname()[1]
        unused = free_ports(1)[0]
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(open_channel, 0, 2, ("", port), listener=listener)
            second = pool.submit(open_channel, 1, 2, ("127.0.0.1", unused), ("127.0.0.1", port))
            for channel in (first.result(10), second.result(10)):
                channel.close()
    assert joining.own_addresses()[-1] == "127.0.0.1"


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(RankLost, match="has to be one of its machine"):
        joining.listen(("192.0.2.1", 32323))


def test_a_frame_that_stops_in_the_middle_is_a_lost_rank():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack("!4sBQ", b"RNR1", Kind.DATA, 100) + b"half")
        left.close()
        with pytest.raises(ConnectionLost, match="its process ended"):
            FrameSocket(right, 5).receive()


def test_ranks_with_another_model_are_refused(worlds):
    def compare(world):
        identity = SimpleNamespace(
            fingerprints={"model": "a", "data_train": "b" + "c" * world.rank}, numeric_environment={"mlx": world.rank}
        )
        return compare_inputs(world, SimpleNamespace(identity=identity))  # type: ignore[arg-type]

    errors = on_all(worlds(2), compare)
    assert all(isinstance(error, ConfigError) and "rank 1: the training data differ" in str(error) for error in errors)


def test_packed_messages_and_counts_are_exact():
    parts = [b"", b"a", bytes(1000)]
    assert unpack(pack(parts)) == parts and unpack(pack([])) == []
    for count in (0, 1, 4095, 4096, 10**9, (1 << 36) - 1):
        summed = np.sum([np.array(_limbs(count), np.float32)] * 3, axis=0)
        assert _count(summed.tolist()) == 3 * count


def test_the_items_of_an_update_are_dealt_in_turn():
    items = np.arange(10)
    shares = []
    for rank in range(3):
        world = SimpleNamespace(rank=rank, size=3)
        shares.append([items[4 * i : 4 * i + 4][Ranks.share(world, 4 * i)].tolist() for i in range(3)])  # type: ignore[arg-type]
    assert shares == [[[0, 3], [6], [9]], [[1], [4, 7], []], [[2], [5], [8]]]
    assert items[ALONE.share(7)].tolist() == items.tolist()
    assert threading.active_count() < 50


def test_ranks_that_are_of_no_use_are_named(monkeypatch):
    config = Config()
    config.train.batch_size, config.train.grad_accumulation = 2, 1
    world = SimpleNamespace(size=3, local=3)
    for name, value in (("usable_cores", 2), ("on_cpu", True)):
        monkeypatch.setattr(shared_start, name, lambda value=value: value)
    lines = shared_start.describe_ranks(world, config)  # type: ignore[arg-type]
    assert "only 2 of 3 ranks have something to compute" in lines[1] and "3 on this machine share 2 cores" in lines[2]
    config.train.grad_accumulation, world.local = 2, 2
    assert len(shared_start.describe_ranks(world, config)) == 1  # type: ignore[arg-type]
    assert shared_start.describe_ranks(ALONE, config) == []
