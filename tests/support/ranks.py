"""Scripts that one process or several run together, as a launcher such as torchrun starts them."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import fork_server

DEADLINE_SECONDS = 300


def run_ranks(script: Path, *args: str, processes: int = 1) -> str:
    """Run a script to its end, once for each rank, and return what all ranks printed.

    Args:
        script: Script to run.
        args: Arguments of the script.
        processes: Number of ranks; one is started as a plain script.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    command = [sys.executable, str(script), *args]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        running = [
            fork_server.Popen(command, stdout=output, stderr=output, env={**shared, **rank})
            for output, rank in zip(outputs, ranks, strict=True)
        ]
        try:
            statuses = [process.wait(DEADLINE_SECONDS) for process in running]
        finally:
            for process in running:
                process.kill()
        said = [output.seek(0) or output.read() for output in outputs]
    assert not any(statuses), f"exit statuses {statuses}\n" + "\n".join(text[-3000:] for text in said)
    return "".join(said)
