"""Start processes that have imported everything already: forks of one process, which pays for the imports once.

Run as a script this file is that process. It reads requests from its standard input, forks, and reports on its
standard output which processes it started and how they ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.002
DEADLINE_SECONDS = 300


class Process:
    """A forked process, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        server: Server that forked it.
        pid: Its number.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid, self._server = pid, server
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        if self.returncode is None:
            self._server.collect()
            self.returncode = self._server.ended.get(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process and return its exit status."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._server.collect(POLL_SECONDS)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that has imported torch, Lightning, transformers and rewurst, and forks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.ended: dict[int, int] = {}
        self._started: list[int] = []
        self._rest = b""

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Process:
        """Start ``rewurst``, or a Python file, with arguments; its output is appended to a file.

        It gets a session of its own, as processes that are killed with their group want it.
        """
        request = {"command": list(command), "log": str(log), "env": dict(environment or {}), "cwd": str(cwd or Path())}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        while not self._started:
            self.collect(1.0)
        return Process(self, self._started.pop(0))

    def run_script(self, script: Path, *arguments: str, processes: int = 1) -> str:
        """Run a Python file in processes that know each other as ranks, and return what they printed.

        Raises:
            AssertionError: One of them failed.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        log = script.with_name(f"{script.stem}-{port}.txt")
        ranks = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        running = []
        for rank in range(processes):
            own = ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            running.append(self.start([str(script), *arguments], log, {"GLOO_SOCKET_IFNAME": "lo", **own}))
        statuses = [process.wait(DEADLINE_SECONDS) for process in running]
        printed = log.read_text(errors="replace")
        assert statuses == [0] * processes, printed[-3000:]
        return printed

    def collect(self, seconds: float = 0.0) -> None:
        """Take in what the server has reported, waiting at most so long for it."""
        assert self._server.stdout is not None
        descriptor = self._server.stdout.fileno()
        if not select.select([descriptor], [], [], seconds)[0]:
            return
        content = os.read(descriptor, 65536)
        assert content, "the fork server has died"
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            report = json.loads(line)
            if "started" in report:
                self._started.append(report["started"])
            else:
                self.ended[report["ended"]] = report["status"]

    def close(self) -> None:
        """End the server; processes that it has started go on."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def _serve() -> None:
    import rewurst.cli.lightning
    import rewurst.datamodules.images
    import rewurst.datamodules.latents
    import rewurst.modules.stage_a
    import rewurst.modules.stage_b
    import rewurst.modules.stage_c  # noqa: F401

    reports = os.dup(1)
    children: set[int] = set()
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01 if children else None)
        if ready:
            content = os.read(0, 65536)
            if not content:
                return
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                children.add(_fork(json.loads(line), reports))
        for child in sorted(children):
            if os.waitpid(child, os.WNOHANG)[0]:
                children.discard(child)


def _fork(request: dict[str, Any], reports: int) -> int:
    """Fork a guardian, which forks the process itself and reports its start and its end."""
    if guardian := os.fork():
        return guardian
    pid = os.fork()
    if pid == 0:
        os._exit(_child(request))
    os.write(reports, json.dumps({"started": pid}).encode() + b"\n")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(reports, json.dumps({"ended": pid, "status": status}).encode() + b"\n")
    os._exit(0)


def _child(request: dict[str, Any]) -> int:
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.path[:0] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, descriptor)
    script, *arguments = request["command"]
    try:
        if script.endswith(".py"):
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return 0
        from rewurst.train import main

        sys.argv = ["rewurst", *request["command"]]
        return main(request["command"])
    except BaseException as error:
        import traceback

        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else 1
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
