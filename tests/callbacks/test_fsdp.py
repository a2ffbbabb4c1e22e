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
import torch

from rewurst.callbacks.sharded_checkpoint import consolidate, describe_checkpoint, read_checkpoint
from rewurst.datamodules.shards import TokenWriter
from rewurst.modules import CausalLM

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

    def run(self, scenario: str, world_size: int = 4, /, **arguments: Any) -> Any:
        """The first process's answer; any failure is the test's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = {"name": scenario, "world_size": world_size, "port": port, "arguments": arguments}
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


@pytest.fixture(scope="module")
def whole(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of four processes that was never stopped, with its checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("fsdp")
    for seed, name in enumerate(("code", "prose")):
        tokens = np.random.default_rng(seed).integers(64, size=100 * 8 + 1)
        with TokenWriter(
            folder / "corpora" / name,
            name=name,
            sequence_length=8,
            vocab_size=64,
            tokenizer_sha256="same",
            rows_per_sample=4,
            rows_per_shard=16,
        ) as writer:
            writer.append(tokens)
            writer.close()
    return {"folder": str(folder), **pool.run("run", 4, folder=str(folder), name="whole", steps=12)}


def test_resume_is_exact_and_at_other_numbers_of_processes_near(pool: Pool, whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    again = pool.run("run", 4, folder=folder, name="again", steps=12, resume=f"{folder}/whole/step=4.ckpt")
    assert again["losses"] == whole["losses"][4:]
    assert again["validation"] == whole["validation"]
    assert again["start"] == whole["start"]
    two = pool.run("run", 2, folder=folder, name="two", steps=8, resume=f"{folder}/whole/step=4.ckpt")
    np.testing.assert_allclose(two["losses"], whole["losses"][4:8], atol=1e-5, rtol=0)
    one = pool.run("run", 1, folder=folder, name="one", steps=12, resume=f"{folder}/two/step=8.ckpt")
    np.testing.assert_allclose(one["losses"], whole["losses"][8:], atol=1e-5, rtol=0)
    assert one["counts"] == [12.0]


@pytest.mark.parametrize(("optimizer_state", "counts"), [("reset", [2.0]), ("keep", [10.0])])
def test_a_new_dataset_resets_or_keeps_the_optimizer(
    pool: Pool, whole: dict[str, Any], optimizer_state: str, counts: list[float]
) -> None:
    result = pool.run(
        "run",
        2,
        folder=whole["folder"],
        name=optimizer_state,
        steps=10,
        resume=f"{whole['folder']}/whole/step=8.ckpt",
        dataset="next",
        rewarming={"optimizer_state": optimizer_state},
    )
    assert result["counts"] == counts
    assert result["start"] != whole["start"]


def test_checkpoints_of_every_kind(pool: Pool, whole: dict[str, Any], tmp_path: Path) -> None:
    folder = whole["folder"]
    pool.run(
        "run",
        2,
        folder=folder,
        name="kinds",
        steps=6,
        average=False,
        gather=str(tmp_path / "gathered.pt"),
        val_check_interval=4,
        checkpoints=[
            {"every_n_train_steps": 2, "save_top_k": 1, "monitor": "step", "mode": "max", "save_last": True},
            {"save_weights_only": True, "dirpath": f"{folder}/weights", "every_n_train_steps": 6},
            {"every_n_epochs": 1, "save_on_train_epoch_end": True, "filename": "end-{step}"},
            {"monitor": "val/loss/average", "save_top_k": 1, "dirpath": f"{folder}/best"},
        ],
    )
    kinds = Path(folder) / "kinds"
    assert sorted(path.name for path in kinds.iterdir()) == ["end-step=6.ckpt", "last.ckpt", "step=6.ckpt"]
    assert len(list(Path(folder, "best").iterdir())) == 1
    weights = Path(folder) / "weights" / "step=6.ckpt"
    gathered = torch.load(tmp_path / "gathered.pt", weights_only=True)
    for path in (kinds / "end-step=6.ckpt", kinds / "last.ckpt", weights):
        content = read_checkpoint(path)
        assert content["global_step"] == 6
        assert content["state_dict"].keys() == gathered.keys()
        assert all(torch.equal(content["state_dict"][name], gathered[name]) for name in gathered)
    assert "optimizer_states" in describe_checkpoint(kinds / "last.ckpt")
    answer = pool.run("run", 2, folder=folder, name="no", steps=8, resume=str(weights))
    assert "holds weights only" in answer["usage"]
    check_exports(kinds / "last.ckpt", gathered, tmp_path)


def check_exports(path: Path, gathered: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from rewurst.modules.initial_weights import build, lightning_state
    from rewurst.modules.weights import read_file

    own = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
    assert consolidate(path, tmp_path / "weights.safetensors", "model.") == len(own)
    loaded = load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    for source in (path, tmp_path / "weights.safetensors"):
        module = CausalLM(dict(read_file(path)["model_config"]), init_from=str(source))
        assert all(torch.equal(tensor, own[name]) for name, tensor in module.model.state_dict().items())
    model = build(dict(read_file(path)["model_config"]))
    model.load_state_dict(lightning_state(read_file(path), path))
    model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", config=AutoConfig.from_pretrained(tmp_path / "hf"))
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_module_built_on_rank_zero_is_what_it_would_have_been(pool: Pool, hybrid: bool) -> None:
    result = pool.run("built_on_rank_zero", 4, hybrid=hybrid)
    assert result["equal"]
    assert result["inv_freq"]
    assert result["empty"] == 0


def test_nobody_built_it(pool: Pool) -> None:
    assert "nobody knows the values of" in pool.run("built_on_rank_zero", 2, nobody=True)["usage"]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("blocks", "did you mean 'TransformerEncoderLayer'?; what repeats in it is"),
        ("no blocks", "does not say which its blocks are"),
        ("replicas", "replicas 3 do not divide 2 processes"),
        ("manual", "use strategy ddp"),
        ("optimizer", "LBFGS cannot step on shards: use torch.optim.AdamW"),
    ],
)
def test_wrong_use(pool: Pool, what: str, expected: str) -> None:
    assert expected in pool.run("refused", 2, what=what)["usage"]
