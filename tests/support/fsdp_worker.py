"""One process of the pool in which tests of FSDP run their scenarios.

Reads a line of JSON for each scenario ({"name", "world_size", "port", "arguments"}), runs the function of that name in
a process group of so many, and answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import Any

import torch
from fsdp_scenarios import SCENARIOS
from torch import distributed

from rewurst import UsageError

warnings.filterwarnings("ignore")


def serve(rank: int, tasks: int, answers: int) -> None:
    """Run the tasks from one pipe and answer through another."""
    while task := read_task(tasks):
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(task["port"]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(task["world_size"]),
            "NODE_RANK": "0",
        }
        try:
            answer = {"ok": SCENARIOS[task["name"]](**task["arguments"])}
        except UsageError as error:
            answer = {"usage": str(error)}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        if distributed.is_initialized():
            distributed.destroy_process_group()
        os.write(answers, json.dumps(answer).encode() + b"\n")


def read_task(tasks: int) -> Any:
    """Read exactly one line: another process may read the next one."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(tasks, 1)):
            return None
        line += byte
    return json.loads(line)


if __name__ == "__main__":
    # Importing takes longer than most scenarios, so it is done once, and the processes are forked.
    torch.set_num_threads(1)
    pipes = [int(number) for number in sys.argv[1:]]
    waiting = list(range(len(pipes) // 2))
    children: dict[int, int] = {}
    while waiting or children:
        for rank in waiting:
            if (child := os.fork()) == 0:
                serve(rank, *pipes[2 * rank : 2 * rank + 2])
                os._exit(0)
            children[child] = rank
        ended, status = os.wait()
        rank = children.pop(ended)
        waiting = [rank] if os.WIFSIGNALED(status) else []
