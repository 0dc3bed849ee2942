"""How a process learns that it is one of several ranks."""

from __future__ import annotations

import json

import pytest

from runner.common.errors import ConfigError
from runner.distributed.launch import Launch, find_launch


def file(tmp_path, content):
    path = tmp_path / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_what_mlx_launch_and_mpirun_set_is_understood(tmp_path):
    hosts = file(tmp_path, [["10.0.0.1:32323", "10.1.0.1:32324"], ["10.0.0.1:32325"], ["10.0.0.2:32323"]])
    ring = {"MLX_HOSTFILE": hosts}
    first, own = ("10.0.0.1", 32323), (("10.0.0.1", 32325),)
    assert find_launch({**ring, "MLX_RANK": "1"}) == Launch("ring", 1, 3, first, local=2, own_addresses=own)
    both = (first, ("10.1.0.1", 32324))
    assert find_launch({**ring, "MLX_RANK": "0"}) == Launch("ring", 0, 3, first, local=2, own_addresses=both)
    assert find_launch({**ring, "MLX_RANK": "2"}).local == 1
    elsewhere = {**ring, "MLX_RANK": "2", "RUNNER_RANK0": "192.168.1.10:32400"}  # neighbours have networks of their own
    assert find_launch(elsewhere).address == ("192.168.1.10", 32400)
    nccl = {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345"}
    assert find_launch(nccl) == Launch("nccl", 0, 2, ("10.0.0.1", 12345))
    devices = file(tmp_path, [[None, "rdma_en2"], ["rdma_en2", None]])
    jaccl = {"MLX_RANK": "1", "MLX_IBV_DEVICES": devices, "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    assert find_launch(jaccl) == Launch("jaccl", 1, 2, ("10.0.0.1", 32323))
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert find_launch(mpi) == Launch("mpi", 3, 4, None, local=2)


def test_a_process_alone_is_none(tmp_path):
    assert find_launch({}) is None
    assert find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": file(tmp_path, "\n")}) is None  # mlx.launch -n 1
    assert find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": file(tmp_path, [["127.0.0.1:1"]])}) is None
    assert find_launch({"PMI_RANK": "0", "PMI_SIZE": "2"}) is None  # srun of two tasks that are no ranks


@pytest.mark.parametrize(
    ("rank", "hosts", "message"),
    [
        ("2", [["a:1"], ["b:1"]], "rank 2 of 2"),
        ("one", [["a:1"], ["b:1"]], "MLX_RANK=one"),
        ("0", "{", "cannot be read"),
        ("0", {"hosts": []}, "must be a list"),
        ("0", [["a"], ["b:1"]], "HOST:PORT"),
        ("0", [["a:1"], []], "no address"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, rank, hosts, message):
    with pytest.raises(ConfigError, match=message):
        find_launch({"MLX_RANK": rank, "MLX_HOSTFILE": file(tmp_path, hosts)})
