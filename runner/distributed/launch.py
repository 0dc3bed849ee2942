"""How this process was started as one of several ranks of a run: by `mlx.launch`, by mpirun, or by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError

_MPI = "OMPI_COMM_WORLD_"
"""Variables of Open MPI begin with it: MLX supports no other MPI."""
RANK0_ADDRESS = "RUNNER_RANK0"
"""Names HOST:PORT of rank 0 for the second connection, where not every rank reaches the address in the hostfile: a ring
over Thunderbolt gives each pair of neighbours a network of its own."""


@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks of one run."""

    backend: str
    """Of `mx.distributed`: ring, jaccl, nccl or mpi."""
    rank: int
    size: int
    """Number of ranks, at least 2."""
    address: tuple[str, int] | None
    """Host and port at which rank 0 waits for the others; None with MPI, where they are told it."""
    local: int = 1
    """Ranks on this machine, which share its cores."""
    own_addresses: tuple[tuple[str, int], ...] = ()
    """Where MLX will wait for a neighbour of this rank, with the ring."""


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return how this process was launched; None where it is alone.

    The variables are those that `mlx.launch` sets; for the ring backend a person can set MLX_RANK and MLX_HOSTFILE too.

    Raises:
        ConfigError: the variables contradict each other, or the hostfile cannot be read.
    """
    launch = _of_mlx_launch(environment) or _of_mpi(environment)
    if launch is None or launch.size == 1:
        return None
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(f"This is rank {launch.rank} of {launch.size}: ranks count from 0.")
    if text := environment.get(RANK0_ADDRESS):
        return replace(launch, address=_address(text))
    return launch


def _of_mlx_launch(environment: Mapping[str, str]) -> Launch | None:
    if "MLX_RANK" not in environment:
        return None
    rank = _number(environment, "MLX_RANK")
    if "MLX_JACCL_COORDINATOR" in environment and "MLX_IBV_DEVICES" in environment:
        devices = _read(environment, "MLX_IBV_DEVICES")
        return Launch("jaccl", rank, len(devices), _address(environment["MLX_JACCL_COORDINATOR"]))
    if "NCCL_HOST_IP" in environment and "MLX_WORLD_SIZE" in environment:
        address = environment["NCCL_HOST_IP"], _number(environment, "NCCL_PORT")
        return Launch("nccl", rank, _number(environment, "MLX_WORLD_SIZE"), address)
    if "MLX_HOSTFILE" in environment:
        hosts = _read(environment, "MLX_HOSTFILE")
        if not hosts:
            return None  # mlx.launch -n 1
        by_rank = [[_address(text) for text in (host if isinstance(host, list) else [host])] for host in hosts]
        if not all(by_rank):
            raise ConfigError("MLX_HOSTFILE names no address of some rank.")
        own = by_rank[rank] if 0 <= rank < len(by_rank) else [("", 0)]
        local = sum(addresses[0][0] == own[0][0] for addresses in by_rank)
        return Launch("ring", rank, len(hosts), by_rank[0][0], local, tuple(own))
    return None


def _of_mpi(environment: Mapping[str, str]) -> Launch | None:
    if f"{_MPI}RANK" not in environment or f"{_MPI}SIZE" not in environment:
        return None
    local = _number(environment, f"{_MPI}LOCAL_SIZE") if f"{_MPI}LOCAL_SIZE" in environment else 1
    return Launch("mpi", _number(environment, f"{_MPI}RANK"), _number(environment, f"{_MPI}SIZE"), None, local)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={environment.get(name, '')} is invalid: must be a whole number.") from None


def _address(text: Any) -> tuple[str, int]:
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{text!r} is no address of a rank: must be HOST:PORT.")
    return host, int(port)


def _read(environment: Mapping[str, str], name: str) -> list[Any]:
    """Return the list that the JSON file named by a variable holds; an empty one where the file is empty."""
    path = Path(environment[name])
    try:
        text = path.read_text().strip()
        found = json.loads(text) if text else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}={path} cannot be read: {error}") from None
    if not isinstance(found, list):
        raise ConfigError(f"{name}={path} is invalid: must be a list with an entry for each rank.")
    return found
