"""Processes that run scenarios of :mod:`fsdp_worker` together, as one process group."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "fsdp_worker.py"
DEADLINE_SECONDS = 300


class Pool:
    """Pool of four lasting processes, because importing torch takes long; killed ones are replaced."""

    def __init__(self) -> None:
        theirs: list[int] = []
        self._tasks: list[int] = []
        self._answers: list[Any] = []
        for _ in range(4):
            (tasks, mine), (answers, their_answers) = os.pipe(), os.pipe()
            theirs += [tasks, their_answers]
            self._tasks.append(mine)
            self._answers.append(os.fdopen(answers, "rb", buffering=0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in the process that asks
        environment["REWURST_TRACEBACK"] = "1"  # errors of a command line are answers
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, theirs)],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        for descriptor in theirs:
            os.close(descriptor)

    def run(self, scenario: str, world_size: int = 4, /, **arguments: Any) -> Any:
        """Return the first process's answer; any failure fails the test."""
        self.start(scenario, world_size, **arguments)
        answers = self.answers(world_size)
        assert len({frozenset(answer) for answer in answers}) == 1, answers
        return answers[0].get("ok", answers[0])

    def start(self, scenario: str, world_size: int, /, **arguments: Any) -> None:
        """Start a scenario."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = {"name": scenario, "world_size": world_size, "port": port, "arguments": arguments}
        for tasks in self._tasks[:world_size]:
            os.write(tasks, json.dumps(task).encode() + b"\n")

    def answers(self, world_size: int) -> list[Any]:
        """Return the answers of all processes of the scenario."""
        answers = [self._answer(answers) for answers in self._answers[:world_size]]
        for answer in answers:
            assert "failed" not in answer, answer["failed"]
        return answers

    def pids(self, world_size: int) -> list[int]:
        """Return the ids of the first processes."""
        self.start("pid", world_size)
        return [answer["ok"] for answer in self.answers(world_size)]

    def has_answered(self, seconds: float) -> bool:
        """Return whether the first process answers within the given seconds."""
        return bool(select.select([self._answers[0]], [], [], seconds)[0])

    def _answer(self, answers: Any) -> Any:
        assert select.select([answers], [], [], DEADLINE_SECONDS)[0], "a process of the pool hangs"
        line = answers.readline()
        assert line, "the pool has ended"
        return json.loads(line)

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for tasks, answers in zip(self._tasks, self._answers, strict=True):
            os.close(tasks)
            answers.close()
