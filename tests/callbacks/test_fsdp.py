"""FSDP in real processes: the losses of one process, whatever is sharded how."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORKER = Path(__file__).parent / "fsdp_worker.py"
DEADLINE_SECONDS = 120


class Pool:
    """Four processes that stay: importing torch takes longer than most scenarios."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            for rank in range(4)
        ]

    def run(self, name: str, world_size: int = 4, **arguments: Any) -> Any:
        """The first process's answer; any failure is the test's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = {"name": name, "world_size": world_size, "port": port, "arguments": arguments}
        for process in self.processes[:world_size]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes[:world_size]]
        for answer in answers:
            assert "failed" not in answer, answer["failed"]
        assert len({frozenset(answer) for answer in answers}) == 1, answers
        return answers[0].get("ok", answers[0])

    def _answer(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        end = time.monotonic() + DEADLINE_SECONDS
        while select.select([process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            line = process.stdout.readline()
            assert line, f"a process of the pool ended with {process.wait()}"
            if line.startswith(b"@@"):
                return json.loads(line[2:])
        raise AssertionError("a process of the pool hangs")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def folder(write_corpus: Callable[..., str], tmp_path: Path) -> str:
    write_corpus("code", 200)
    return str(tmp_path)


LAYOUTS = {
    "neox": [(4, "fsdp"), (4, "hybrid"), (2, "ddp")],
    "prior": [(2, "fsdp"), (4, "hybrid")],
    "foreign": [(2, "fsdp")],
}


@pytest.mark.parametrize("module", LAYOUTS)
def test_losses_equal_one_process(pool: Pool, folder: str, module: str) -> None:
    alone = pool.run("losses", 1, module=module, strategy="auto", folder=folder)["losses"]
    assert len(alone) == 20
    for world_size, strategy in LAYOUTS[module]:
        result = pool.run("losses", world_size, module=module, strategy=strategy, folder=folder)
        np.testing.assert_allclose(result["losses"], alone, atol=1e-5, rtol=0, err_msg=f"{strategy} {world_size}")
        if strategy != "ddp":
            assert result["sharded"] == result["parameters"] - 2 * (module == "foreign")
