"""Python processes that start in milliseconds: forked from one that has already imported everything.

:class:`Popen` takes what ``subprocess.Popen`` takes for ``[sys.executable, SCRIPT, ...]`` or ``[sys.executable, "-m",
MODULE, ...]``. The process is a real one, in a session of its own, that signals reach and kill like any other. All of
them share the hash seed of their server, so each kind of start also has a test that starts a new interpreter.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

TimeoutExpired = subprocess.TimeoutExpired  # this module stands in for subprocess
MAXIMUM_MESSAGE, MAXIMUM_DESCRIPTORS = 1 << 17, 64
CLEAR_OF_TARGETS = 512  # received descriptors are moved above every number that a request asks for
PRELOADED = (
    "lightning.pytorch.cli",
    "rewurst.cli.lightning",
    "rewurst.callbacks",
    "rewurst.datamodules",
    "rewurst.modules",
    "rewurst.preparation.images",
    "rewurst.preparation.latents",
    "tensorboard.compat",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "torchmetrics",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)

_running: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


class Popen:
    """A process that is forked from the server, which the first one starts.

    Args:
        command: The interpreter's path and its arguments: a script or ``-m`` and a module, and their arguments.
        stdout: File that takes the standard output, or none for the caller's.
        stderr: File that takes the standard error, or none for the caller's.
        env: Environment of the process, or none for the caller's.
        pass_fds: Descriptors that the process keeps, under the same numbers.
        start_new_session: Accepted for the sake of the interface; there always is a new session.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = True,
    ) -> None:
        assert command[0] == sys.executable, command
        self.args, self.returncode = list(command), None
        self._status, theirs = os.pipe()
        self._null = os.open(os.devnull, os.O_RDWR)
        targets = {1: self._descriptor(stdout, 1), 2: self._descriptor(stderr, 2), **{fd: fd for fd in pass_fds}}
        request = {"args": self.args[1:], "cwd": os.getcwd(), "targets": list(targets)}
        request["env"] = dict(os.environ if env is None else env)
        try:
            socket.send_fds(_server(), [json.dumps(request).encode()], [theirs, *targets.values()])
        finally:
            os.close(theirs)
            os.close(self._null)
        self._said = os.fdopen(self._status, "rb", buffering=0)
        self.pid = int(self._said.readline())

    def _descriptor(self, given: IO[Any] | int | None, default: int) -> int:
        if given is None:
            return default
        if isinstance(given, int):
            assert given == subprocess.DEVNULL, "give a file"
            return self._null
        return given.fileno()

    def poll(self) -> int | None:
        """Return the exit status if the process has ended: negative for the signal that ended it."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, or raise ``subprocess.TimeoutExpired``."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._said], [], [], timeout)[0]:
            self.returncode = int(self._said.readline() or -signal.SIGKILL)
            self._said.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it may end in between
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _server() -> socket.socket:
    """Return the connection to the server of this process, which ends when the connection does."""
    if not _running:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(theirs.fileno())]
        with theirs:
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, env=environment)
        _running.append((ours, server))
    return _running[0][0]


def stop() -> None:
    """End the server, if there is one, and all of its processes."""
    while _running:
        connection, server = _running.pop()
        connection.close()
        server.wait()


def serve(connection: socket.socket) -> None:
    """Fork a process for every request, and report its exit status, until the connection ends."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    statuses: dict[int, int] = {}
    while True:
        ready = select.select([connection, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _report(statuses)
        if connection in ready:
            message, descriptors = _receive(connection)
            if not message:
                break
            if (child := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for inherited in (connection.detach(), woken, wake, *statuses.values()):
                    os.close(inherited)
                _become(json.loads(message), descriptors)
            os.write(descriptors[0], b"%d\n" % child)
            statuses[child] = descriptors[0]
            for descriptor in descriptors[1:]:
                os.close(descriptor)
    for child in statuses:
        os.killpg(child, signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(connection, MAXIMUM_MESSAGE, MAXIMUM_DESCRIPTORS)
    return message, descriptors


def _report(statuses: dict[int, int]) -> None:
    while statuses:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if not ended:
            return
        pipe = statuses.pop(ended)
        with suppress(BrokenPipeError):  # nobody waits for it
            os.write(pipe, b"%d\n" % os.waitstatus_to_exitcode(status))
        os.close(pipe)


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Turn a fork of the server into the process that was asked for, and end it."""
    os.setsid()
    os.close(descriptors[0])
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, CLEAR_OF_TARGETS) for descriptor in descriptors[1:]]
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    for descriptor, target in zip(moved, request["targets"], strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os._exit(_run(request["args"]))


def _run(args: list[str]) -> int:
    """Run a script or a module as the interpreter does, to the exit status."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    status: Any = 0
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    import importlib

    sys.path.append(sys.path.pop(0))  # this folder: what scripts share with tests
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not outlive a fork"
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
