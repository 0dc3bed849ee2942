"""Ranks on hosts of their own, network namespaces of Linux, one of which is cut off during the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = ("model=tiny", "data=tiny", "train.batch_size=8", "train.iters=100000", "train.eval_every=100000")
WORDS += ("train.report_every=5", "checkpoint.every=10")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


class Hosts:
    """Network namespaces joined by a bridge in one more of them; nothing else is reached from them."""

    def __init__(self, count: int) -> None:
        self.names = [f"rn{os.getpid()}-{i}" for i in range(count)]
        self.switch = f"rn{os.getpid()}-s"
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("-n", self.switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut_off(self, host: int) -> None:
        """Cut the cable of a host: nothing tells the others."""
        ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def start(self, host: int, words: tuple[str, ...], **options: object) -> subprocess.Popen[str]:
        """Start the program on a host."""
        command = ["ip", "netns", "exec", self.names[host], sys.executable, "-m", "runner", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload, no-any-return]

    def close(self) -> None:
        """Remove all."""
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and iproute2")
    found = Hosts.__new__(Hosts)
    try:
        found.__init__(3)  # type: ignore[misc]
    except subprocess.CalledProcessError as error:
        found.close()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode()[:200]}")
    yield found
    found.close()


@pytest.mark.long
@pytest.mark.parametrize("victim", [2, 0])
def test_a_host_that_is_cut_off_ends_all_and_the_others_go_on(make_cli, tmp_path, hosts, victim):
    cli = make_cli(tmp_path)

    def start(chosen: list[int], *words: str) -> list[subprocess.Popen[str]]:
        file = tmp_path / f"hosts{len(chosen)}.json"
        file.write_text(json.dumps([[f"{hosts.addresses[host]}:32323"] for host in chosen]))
        environments = [
            {**cli.environment, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)} for rank in range(len(chosen))
        ]
        return [
            hosts.start(host, (*WORDS, *words), cwd=tmp_path, env=environment)
            for host, environment in zip(chosen, environments, strict=True)
        ]

    ranks = start([0, 1, 2], "hydra.run.dir=run")
    cli.wait_for(tmp_path / "run", 15, ranks[0])
    hosts.cut_off(victim)
    cut = time.monotonic()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert time.monotonic() - cut < 10
    assert [rank.returncode for rank in ranks] == [9, 9, 9], outputs
    said = [
        line.split(" is lost")[0].split(" (")[0].removeprefix("runner: ")
        for output in outputs
        for line in output.splitlines()
        if "is lost" in line
    ]
    # Rank 0 speaks for all that it reaches. Of those that it has not reached, each sees only that rank 0 is gone.
    assert said == (["rank 2", "rank 0"] if victim == 2 else [said[0], "rank 0", "rank 0"])
    assert said[0] in ("rank 1", "rank 2")

    newest = sorted(Path(tmp_path / "run" / "checkpoints").iterdir())[-1]
    left = [host for host in range(3) if host != victim]
    stop = int(newest.name[5:]) + 5
    ranks = [*start(left, "resume=run", f"train.stop_at={stop}")]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert f"resumed from {newest}" in outputs[0]
