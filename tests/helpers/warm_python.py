"""A Python that starts fast: each command is a fork of one process with the slow imports done.

``serve`` runs that process. Run as a script, this file is the client: it passes its arguments, folder, environment and
standard streams to the server, and exits with the status of the fork.
"""

import array
import json
import os
import runpy
import socket
import sys
import traceback
from contextlib import suppress

SLOW_IMPORTS = (
    *("torch", "transformers", "datasets", "sentence_transformers", "matplotlib.pyplot", "pyarrow.parquet"),
    *("jasper_fast.train", "jasper_fast.training.finish", "jasper_fast.search", "jasper_fast.compare"),
)
STREAMS = 3


def serve(path: str) -> None:
    """Import the slow modules, then run requests one after another until the process is killed."""
    for name in SLOW_IMPORTS:
        __import__(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)  # whoever sees the path can connect
        while True:
            connection, _ = server.accept()
            with connection:
                request, streams = _receive(connection)
                child = os.fork()
                if not child:
                    _become(request, streams)
                for stream in streams:
                    os.close(stream)
                _, status = os.waitpid(child, 0)
                connection.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))


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
