"""FSDP in real processes: the losses of one process, whatever is sharded how."""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewurst import UsageError
from rewurst.callbacks.checkpoints import newest_checkpoint
from rewurst.callbacks.shard_loading import describe_checkpoint, read_checkpoint
from rewurst.callbacks.sharded_checkpoint import consolidate
from rewurst.datamodules.shards import TokenWriter
from rewurst.datamodules.tokenizer import train_tokenizer
from rewurst.modules import CausalLM
from rewurst.modules.networks import SemanticCompressor

WORKER = Path(__file__).parent / "fsdp_worker.py"
DEADLINE_SECONDS = 120


class Pool:
    """Four processes that stay: importing torch takes longer than most scenarios."""

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
        """The first process's answer; any failure is the test's."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = {"name": scenario, "world_size": world_size, "port": port, "arguments": arguments}
        for tasks in self._tasks[:world_size]:
            os.write(tasks, json.dumps(task).encode() + b"\n")
        answers = [self._answer(answers) for answers in self._answers[:world_size]]
        for answer in answers:
            assert "failed" not in answer, answer["failed"]
        assert len({frozenset(answer) for answer in answers}) == 1, answers
        return answers[0].get("ok", answers[0])

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


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def folder(write_corpus: Callable[..., str], tmp_path: Path) -> str:
    """Tokens for language models; a tokenizer and a compressor for Stage C."""
    write_corpus("code", 200)
    (tmp_path / "captions.txt").write_text("row 0 1 2 3 4 5 6 7 8 9 row row")
    train_tokenizer([str(tmp_path / "captions.txt")], 270, tmp_path / "tokenizer", progress=False)
    torch.manual_seed(0)
    SemanticCompressor.from_preset("tiny", widths=[8, 16], c_latent=4).save(tmp_path / "compressor")
    return str(tmp_path)


LAYOUTS = {
    "neox": [(4, "fsdp"), (4, "hybrid"), (2, "ddp")],
    "stage_c": [(2, "fsdp"), (4, "hybrid")],
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


OPTIONS: list[dict[str, Any]] = [
    {"activation_checkpointing": 2, "compile": True},
    {"cpu_offload": True},
    {"reshard_after_forward": False, "settings": {"tie_word_embeddings": True}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_with_options(pool: Pool, folder: str, options: dict[str, Any]) -> None:
    same = {key: value for key, value in options.items() if key == "settings"}
    alone = pool.run("losses", 1, strategy="auto", folder=folder, steps=4, **same)["losses"]
    result = pool.run("losses", 2, folder=folder, steps=4, **options)
    np.testing.assert_allclose(result["losses"], alone, atol=1e-5, rtol=0)
    assert result["sharded"] == result["parameters"]
    assert bool(result["graphs"]) == options.get("compile", False)


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
        settings={"tie_word_embeddings": True},
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
    tied = {"tie_word_embeddings": True}
    answer = pool.run("run", 2, folder=folder, name="no", steps=8, resume=str(weights), settings=tied)
    assert "holds weights only" in answer["usage"]
    check_exports(kinds / "last.ckpt", gathered, tmp_path)


def check_exports(path: Path, gathered: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from rewurst.modules.hugging_face import export_hugging_face
    from rewurst.modules.weights import read_file

    own = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
    assert consolidate(path, tmp_path / "weights.safetensors", "model.") == len(own)
    loaded = load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)
    for source in (path, tmp_path / "weights.safetensors"):
        module = CausalLM(dict(read_file(path)["model_config"]), init_from=str(source))
        assert all(torch.equal(tensor, own[name]) for name, tensor in module.model.state_dict().items())
    (tmp_path / "words.txt").write_text("words words")
    train_tokenizer([str(tmp_path / "words.txt")], 260, tmp_path / "tokenizer", progress=False)
    export_hugging_face(path, tmp_path / "hf", tmp_path / "tokenizer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_pictures_are_drawn_together_and_change_nothing(pool: Pool, tmp_path: Path) -> None:
    drawn = pool.run("pictures", 2, folder=str(tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert drawn == pool.run("pictures", 2, folder=str(tmp_path), limit_val_batches=0)


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
        ("frozen", "beside of Foreign was built without memory"),
        ("manual", "use strategy ddp"),
        ("optimizer", "LBFGS cannot step on shards: use torch.optim.AdamW"),
    ],
)
def test_wrong_use(pool: Pool, what: str, expected: str) -> None:
    assert expected in pool.run("refused", 2, what=what)["usage"]


def test_foreign_objects_are_not_unpickled(whole: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(Path(whole["folder"]) / "whole" / "step=4.ckpt", tmp_path / "bad.ckpt")
    (folder / ".metadata").write_bytes(pickle.dumps(Path.unlink))
    with pytest.raises(UsageError, match="which is not loaded"):
        read_checkpoint(folder)
    with pytest.warns(UserWarning, match="is cut off"):
        assert newest_checkpoint([tmp_path]) is None


def test_lost_files_and_other_models(pool: Pool, whole: dict[str, Any], tmp_path: Path) -> None:
    good = Path(whole["folder"]) / "whole" / "step=4.ckpt"
    answer = pool.run(
        "run", 2, folder=whole["folder"], name="no", steps=8, resume=str(good), settings={"num_hidden_layers": 3}
    )
    assert "is of another model: it lacks model.gpt_neox.layers.2" in answer["usage"]
    folder = shutil.copytree(good, tmp_path / "newer.ckpt")
    assert newest_checkpoint([tmp_path]) == folder
    (folder / "__1_0.distcp").unlink()
    with pytest.warns(UserWarning, match="is cut off: an older checkpoint is taken"):
        assert newest_checkpoint([tmp_path]) is None
    answer = pool.run("run", 2, folder=whole["folder"], name="no", steps=8, resume=str(folder))
    assert "lacks __1_0.distcp" in answer["usage"]


def test_an_unsharded_checkpoint_goes_on_sharded(pool: Pool, whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    alone = pool.run("run", 1, folder=folder, name="alone", steps=12, strategy="auto")
    np.testing.assert_allclose(alone["losses"], whole["losses"], atol=1e-5, rtol=0)
    result = pool.run("run", 2, folder=folder, name="on", steps=12, resume=f"{folder}/alone/step=8.ckpt")
    np.testing.assert_allclose(result["losses"], alone["losses"][8:], atol=1e-5, rtol=0)
    assert abs(result["validation"] - alone["validation"]) < 1e-5


def test_the_example_shards_a_module_that_knows_nothing_of_it(tmp_path: Path) -> None:
    example = WORKER.parents[2] / "examples" / "shard_your_own.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(
        [sys.executable, str(example), str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert said.returncode == 0, said.stderr[-2000:]
    first, second = said.stdout.strip().splitlines()[-2:]
    assert first.startswith("40 steps: ")
    assert second.startswith("20 more: ")
    assert float(first.split()[-1]) < float(first.split()[2])


WIDE = {"hidden_size": 64, "intermediate_size": 128}
IN_8_BITS = 2 * 4 + 1  # four matrices a block and the head; the embedding has as many elements as the head


@pytest.fixture(scope="module")
def in_8_bits(pool: Pool, whole: dict[str, Any]) -> dict[str, Any]:
    """A run of two processes with 8-bit AdamW, on the corpora of the other one."""
    own = {"folder": whole["folder"], "settings": WIDE, "optimizer": "adamw_8bit", "average": False}
    return {"own": own, **pool.run("run", 2, name="in_8_bits", steps=12, **own)}


@pytest.mark.parametrize(("optimizer", "margin"), [("adamw_8bit", 0.01), ("lion", 1e-5), ("lion_8bit", 0.01)])
def test_8_bit_losses_are_near_those_of_one_process(pool: Pool, folder: str, optimizer: str, margin: float) -> None:
    same: dict[str, Any] = {"folder": folder, "settings": WIDE, "optimizer": optimizer}
    alone = pool.run("losses", 1, strategy="auto", **same)["losses"]
    for world_size, strategy in [(4, "fsdp"), (4, "hybrid"), (2, "ddp")]:
        losses = pool.run("losses", world_size, strategy=strategy, **same)["losses"]
        limit = 1e-5 if strategy == "ddp" else margin
        np.testing.assert_allclose(losses, alone, rtol=limit, err_msg=f"{strategy} {world_size}")


def test_8_bit_states_outlive_the_number_of_processes(pool: Pool, in_8_bits: dict[str, Any]) -> None:
    own, losses = in_8_bits["own"], in_8_bits["losses"]
    assert in_8_bits["in_8_bits"] == IN_8_BITS
    first = f"{own['folder']}/in_8_bits/step=4.ckpt"
    again = pool.run("run", 2, name="again_8", steps=12, resume=first, **own)
    assert again["losses"] == losses[4:]  # to the bit: blocks are where they were
    one = pool.run("run", 1, name="one_8", steps=8, resume=first, **own)
    np.testing.assert_allclose(one["losses"], losses[4:8], rtol=0.01)
    two = pool.run("run", 2, name="two_8", steps=12, resume=f"{own['folder']}/one_8/step=8.ckpt", **own)
    np.testing.assert_allclose(two["losses"], losses[8:], rtol=0.01)
    assert (two["counts"], two["in_8_bits"]) == ([12.0], IN_8_BITS)


def test_8_bit_states_go_on_in_32_bits_and_without_sharding(pool: Pool, in_8_bits: dict[str, Any]) -> None:
    own, losses = in_8_bits["own"], in_8_bits["losses"]
    in_32 = own | {"optimizer": "adamw"}
    first = f"{own['folder']}/in_8_bits/step=4.ckpt"
    wider = pool.run("run", 4, name="wider", steps=8, resume=first, **in_32)
    np.testing.assert_allclose(wider["losses"], losses[4:8], rtol=0.01)
    assert wider["in_8_bits"] == 0
    back = pool.run("run", 2, name="back", steps=12, resume=f"{own['folder']}/wider/step=8.ckpt", **own)
    np.testing.assert_allclose(back["losses"], losses[8:], rtol=0.01)
    file = pool.run("run", 2, name="ddp_8", steps=8, strategy="ddp", **own)
    np.testing.assert_allclose(file["losses"], losses[:8], rtol=0.01)
    for strategy, optimizer in [
        ("fsdp", "adamw_8bit"),
        ("ddp", "adamw_8bit"),
        ("auto", "adamw"),
        ("auto", "adamw_8bit"),
    ]:
        options = own | {"optimizer": optimizer, "strategy": strategy}
        world_size = 1 if strategy == "auto" else 2
        on = pool.run("run", world_size, name="on_8", steps=12, resume=f"{own['folder']}/ddp_8/step=8.ckpt", **options)
        np.testing.assert_allclose(on["losses"], losses[8:], rtol=0.01)
        assert on["counts"] == [12.0]


def test_another_optimizers_states_are_refused(pool: Pool, in_8_bits: dict[str, Any]) -> None:
    own = in_8_bits["own"] | {"resume": f"{in_8_bits['own']['folder']}/in_8_bits/step=4.ckpt", "optimizer": "lion_8bit"}
    answer = pool.run("run", 2, name="no", steps=12, **own)
    assert "keeps exp_avg and exp_avg_sq of a parameter and Lion8bit exp_avg: keep the optimizer" in answer["usage"]
