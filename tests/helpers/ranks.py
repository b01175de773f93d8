"""Start a run of several processes, and wait for its end."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import torch

from tests.helpers.processes import fork_server


def start(world: int, function, *arguments, environment=None) -> list[multiprocessing.Process]:
    """Start ``function(*arguments)`` in ``world`` processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = fork_server().Process(target=as_rank, args=(launch | (environment or {}), function, *arguments))
        process.start()
        processes.append(process)
    return processes


def as_rank(environment: dict, function, *arguments) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)


def end(processes: list, seconds: float = 90.0) -> list[int]:
    """Return the exit codes after all processes have ended by themselves."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, "a process hangs"
    return [process.exitcode for process in processes]
