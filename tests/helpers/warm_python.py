"""A Python that starts fast: each command is a fork of one process with the slow imports done.

``serve`` runs that process. Run as a script, this file is the client: it passes its arguments, folder, environment and
standard streams to the server, and exits with the status of the fork. Signals are not passed on. What a library reads
from the environment when it is imported is that of the server, except for the number of torch's threads.
"""

import array
import gc
import json
import os
import runpy
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

SLOW_IMPORTS = (
    *("torch", "transformers", "datasets", "sentence_transformers", "matplotlib.pyplot", "pyarrow.parquet"),
    *("jasper_fast.train", "jasper_fast.training.finish", "jasper_fast.search", "jasper_fast.compare"),
)
STREAMS = 3


def serve(path: str) -> None:
    """Import the slow modules, then run requests, also several at a time, until the process is killed."""
    for name in SLOW_IMPORTS:
        __import__(name)
    gc.freeze()  # so that a fork collects only its own objects
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)  # whoever sees the path can connect
        while True:
            connection, _ = server.accept()
            with connection:
                if not os.fork():
                    _answer(connection)
            with suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def write_client(file: Path, path: str, arguments: str = "") -> None:
    """Write a command that runs as a fork of the server at ``path``.

    Args:
        file: file of the command.
        path: socket of the server.
        arguments: arguments to put before those of the command.
    """
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" "{path}" {arguments} "$@"\n')
    file.chmod(0o755)


def ask(path: str, arguments: list[str]) -> int:
    """Run Python with arguments, as the server's fork, and return its exit status."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        descriptors = array.array("i", range(STREAMS))
        connection.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(1)[0]


def _answer(connection: socket.socket) -> None:
    """Run one request in a fork, send its exit status, and end this process."""
    request, streams = _receive(connection)
    child = os.fork()
    if not child:
        _become(request, streams)
    _, status = os.waitpid(child, 0)
    connection.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    _, streams, _, _ = socket.recv_fds(connection, 1, STREAMS)
    with connection.makefile("rb") as file:
        return json.loads(file.read()), streams


def _become(request: dict, streams: list[int]) -> None:
    """Run the request in this process and end it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if (threads := os.environ.get("OMP_NUM_THREADS")) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    option, name, *arguments = request["arguments"]
    status: object = 0
    try:
        sys.argv = [option, *arguments]
        if option == "-c":
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
        else:
            assert option == "-m", option
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # closed by the program
            stream.flush()
    os._exit(status if isinstance(status, int) else int(bool(status)))


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
