"""Processes of tests that begin with everything imported: forks of a process that did nothing but import.

A process of a run takes longer to import torch and transformers than its test takes to train, and the slow tests start
hundreds. So one template a rank imports once, and each process is a fork of it. Templates have no thread and have
computed nothing, so that a fork is what a fresh interpreter would be; each has a hash seed of its own, as processes of
a launcher do. Trade-off: what happens at import, and what reads an environment at import, is not tested this way;
`start_processes(..., fresh=True)` starts interpreters, and so do the tests of examples and launchers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("torch", "torch.distributed", "datasets", "accelerate", "transformers", "transformers.trainer", "mates_hf")
ALLOCATOR = "jemalloc_bg_thd"  # pyarrow's, which knows of forks


class ForkedProcess:
    """A fork of a template, used as a `subprocess.Popen` is; its standard error is read from a file."""

    def __init__(self, connection: socket.socket, errors: IO[bytes]) -> None:
        self._connection, self._errors = connection, errors
        self.pid = int(connection.recv(32))
        self.returncode: int | None = None

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end; its standard error.

        Raises:
            subprocess.TimeoutExpired: it does not end in so many seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                said = self._connection.recv(32)
            except TimeoutError:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0) from None
            self.returncode = int(said)
            self._connection.close()
        self._errors.seek(0)
        return None, self._errors.read().decode(errors="replace")

    def kill(self) -> None:
        """End it, if it goes on."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def start(arguments: list[str], environment: Mapping[str, str], rank: int) -> ForkedProcess:
    """A fork of a rank's template that does what `python *arguments` would with this environment."""
    connection, errors = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), tempfile.TemporaryFile()  # noqa: SIM115
    connection.connect(_template(rank))
    request = json.dumps({"arguments": arguments, "environment": dict(environment)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [errors.fileno()])
    connection.sendall(request)
    return ForkedProcess(connection, errors)


@functools.cache
def _template(rank: int) -> str:
    """Address of a rank's template, started where there is none yet; it ends with this process."""
    folder = tempfile.mkdtemp(prefix="template-")
    address = os.path.join(folder, "socket")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.forked", address]
    template = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    atexit.register(template.kill)
    assert template.stdout is not None
    said = template.stdout.readline()
    assert said == "ready\n", f"The template said {said!r}."
    return address


def serve(address: str) -> None:
    """Fork for each that connects, and tell it the process's number and, later, its exit code."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    threads = [Path("/proc/self/task", thread, "comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    others = sorted(name for name in threads[1:] if name != ALLOCATOR)
    if others:
        raise RuntimeError(f"A template must have one thread, and imports started others: {others}.")
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(16)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    running: dict[int, tuple[int, socket.socket]] = {}  # by file descriptor: the process and who waits for it
    while os.getppid() == parent:
        ready, _, _ = select.select([listener, *running], [], [], 5.0)
        for found in ready:
            if found is listener:
                connection, _ = listener.accept()
                pid = _fork(connection, listener, running)
                running[os.pidfd_open(pid)] = pid, connection
            else:
                pid, connection = running.pop(found)
                os.close(found)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError), connection:  # nobody may wait any more
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _fork(connection: socket.socket, listener: socket.socket, running: dict[int, Any]) -> int:
    """Fork what a connection asks for; the number of the process."""
    length, descriptors, _, _ = socket.recv_fds(connection, 8, 1)
    request = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid:
        os.close(descriptors[0])
        connection.sendall(str(pid).encode())
        return pid
    os.dup2(descriptors[0], 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the template's is a pipe that nobody reads any more
    for descriptor in running:
        os.close(descriptor)
    for other in (connection, listener, *(waiting for _, waiting in running.values())):
        other.close()
    os._exit(_become(request["arguments"], request["environment"]))


def _become(arguments: list[str], environment: dict[str, str]) -> int:
    """Run a script, a module or a line of code as `python` would; the exit code."""
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.path.insert(0, "")
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends: non-daemon threads, then what is registered, then what is not written yet.
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
