"""A training step on fake tensors compared with a real one, and with torch's tracker of sharded training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from rewurst.callbacks.fsdp.blocks import find_blocks
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.memory.arithmetic import Layout, extrapolate, plan
from rewurst.memory.counting import LiveBytes, optimizer_bytes, without_memory
from rewurst.memory.module import Measured, measure
from rewurst.memory.simulation import measure_step
from rewurst.memory.stand_ins import rows_of_one_sequence
from rewurst.modules import CausalLM

SETTINGS = {"model_type": "gpt_neox", "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3}
SETTINGS |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
DATA = {"dataset": "d", "corpora": {"c": {"path": "nowhere"}}, "val": {}, "sequence_length": 64}
DATA |= {"micro_batch_size": 16, "global_batch_size": 16}


def language_model(rows: int, every: int | None = None, **arguments: Any) -> Measured:
    config = {
        "model": {"class_path": "rewurst.modules.CausalLM", "init_args": {"model": SETTINGS, **arguments}},
        "data": {"class_path": "rewurst.datamodules.TextDataModule", "init_args": DATA},
    }
    return measure(config, rows, "32-true", on_cpu=False, every=every)


@pytest.mark.parametrize("rows", [4, 16])
def test_a_step_on_fake_tensors_counts_the_memory_of_a_real_one(rows: int) -> None:
    expected = language_model(rows).step
    data = TextDataModule("d", {"c": Corpus("nowhere")}, {}, 64, rows, rows)
    with LiveBytes() as live:
        module = CausalLM(dict(SETTINGS))
        found, _ = measure_step(live, module, data, data.example_batch(rows), "32-true")
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.01), name


def test_recomputed_blocks_keep_less_and_larger_batches_are_in_proportion() -> None:
    known = {rows: language_model(rows).step for rows in (16, 32)}
    assert language_model(16, every=1).step.kept < 0.6 * known[16].kept
    larger = language_model(64).step
    for name, value in vars(extrapolate(known, 64)).items():
        if name == "largest":  # said of the config's own micro-batch only: another tensor may become the largest
            continue
        assert value == pytest.approx(getattr(larger, name), rel=0.02), name


def test_document_masks_are_part_of_the_plan() -> None:
    plain, apart = (language_model(16, document_masks=masks).step for masks in (False, True))
    assert apart.forward >= plain.forward + 16 * 64 * 64  # a byte per pair of positions in a row


class Chain(LightningModule):
    """Network of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_gradients_of_a_chain_are_counted_as_they_appear() -> None:
    batch = torch.zeros(10, 100)
    with without_memory() as live:
        found, _ = measure_step(live, Chain(), LightningDataModule(), batch, "32-true")
    weight, layer = 4 * 100 * 100, 4 * 10 * 100
    assert found.kept == pytest.approx(3 * layer, abs=16)  # inputs of three layers; a scalar or two
    assert found.gradients in (2 * weight, 3 * weight)
    assert 3 * weight <= found.with_gradients <= 3 * weight + 5 * layer + 16
    assert found.largest == weight


@pytest.mark.parametrize(
    ("name", "share"),
    [("adamw", 8.0), ("lion", 4.0), ("adamw_8bit", 2 + 8 / 256), ("lion_8bit", 1 + 4 / 256), ("muon", 8.0)],
)
def test_bytes_of_states(name: str, share: float) -> None:
    with without_memory() as live:
        module = CausalLM(dict(SETTINGS), optimizer=name)  # type: ignore[arg-type]
        states, workspace = optimizer_bytes(module.configure_optimizers(), live)
        head = module.get_parameter("model.lm_head.weight")
        embedding = module.get_parameter("model.gpt_neox.embed_in.weight")
        matrix = module.get_parameter("model.gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
    assert states[head] == share * head.numel()
    assert states[embedding] == (4 if "lion" in name else 8) * embedding.numel()
    assert states[matrix] == (8 if "adamw" in name else 4) * matrix.numel()
    assert (workspace > 4 * matrix.numel()) == (name == "muon")


def test_frozen_networks_count_if_the_step_uses_them() -> None:
    arguments = {"stage_b": "nowhere.ckpt", "prior": "tiny", "text_encoder": "no/encoder"}
    model = {"class_path": "rewurst.modules.StageC", "init_args": arguments}
    sizes: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 2, "corpora": {"c": {"path": "nowhere"}}}
    sizes |= {"dataset": "d", "val": {}}
    found = {}
    for kind, extra in (("ImageTextDataModule", {"image_size": 128}), ("LatentDataModule", {})):
        data = {"class_path": f"rewurst.datamodules.{kind}", "init_args": {**sizes, **extra}}
        found[kind] = measure({"model": model, "data": data}, 2, "32-true", False, image_size=128)
    images, latents = found["ImageTextDataModule"], found["LatentDataModule"]
    assert "z 2x16x3x3" in latents.batch
    assert "text 2x77x32" in latents.batch
    assert images.batch == "image 2x3x128x128"
    assert latents.step.extra < 1e4
    assert images.step.extra > 80e6  # 20 million parameters of the compressor, and the text encoder's
    assert sum(weight.elements for weight in images.weights) == sum(weight.elements for weight in latents.weights)
    assert [note.split(":")[0] for note in images.notes] == [
        "nowhere.ckpt is missing",
        "the text encoder of width 32 is not one of CLIP's",
    ]


class NeoX(LightningModule):
    """Language model that computes its loss in ``forward``, as torch's tracker requires."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048}
        sizes |= {"num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 256}
        self.model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes))

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, foreach=False)


class Ids(LightningDataModule):
    """Rows of tokens."""

    def example_batch(self, micro_batch_size: int) -> Tensor:
        return torch.zeros(micro_batch_size, 256, dtype=torch.long)


@pytest.fixture
def four_fake_processes() -> Any:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_sharded_training_as_torch_counts_it(four_fake_processes: Any) -> None:
    def settings(kind: type) -> dict[str, str]:
        return {"class_path": f"{kind.__module__}.{kind.__name__}"}

    measured = measure({"model": settings(NeoX), "data": settings(Ids)}, 4, "32-true", on_cpu=False)
    planned = plan(measured.weights, measured.step, Layout(4, "fsdp"))
    assert planned.peak_in == "backward"
    tracked = tracked_under_fsdp(four_fake_processes)
    # The plan adds the largest activations to all that FSDP ever holds. Here they are at the beginning of the backward
    # pass, where torch's tracker has: no shards of gradients, as Lightning has just cleared them (and these come back
    # one by one while activations go); no gradients of what is outside of blocks; and one block gathered, instead of
    # the next one under way and its copy, its gradients and what they are reduced in, which overlap on a GPU.
    bytes_of: dict[int | None, int] = {}
    for weight in measured.weights:
        bytes_of[weight.block] = bytes_of.get(weight.block, 0) + weight.elements * weight.itemsize
    block, outside = bytes_of[0], bytes_of[None]
    not_there = planned.gradients + outside + (5 - 1) * block
    assert planned.total - not_there == pytest.approx(tracked, rel=0.001)
    assert tracked < planned.total < 1.5 * tracked


def tracked_under_fsdp(mesh: Any) -> int:
    """Return torch's tracked peak of one of four processes in two steps, in Lightning's order."""
    with without_memory():
        module = NeoX()
        for block in (*find_blocks(module), module):
            fully_shard(block, mesh=mesh)
        optimizer, ids = module.configure_optimizers(), Ids().example_batch(4)
        tracker = FSDPMemTracker(module, optimizer)
        tracker.track_inputs((ids,))
        with tracker, rows_of_one_sequence():
            for _ in range(2):
                loss = module(ids)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tracker.reset_mod_stats()  # it takes a second call for an error
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def test_an_existing_file_sets_the_network(tmp_path: Path) -> None:
    from rewurst.modules.networks import VQGAN

    VQGAN.from_preset("tiny").save(tmp_path / "stage_a")
    arguments = {"stage_a": str(tmp_path / "stage_a"), "unet": "tiny", "compressor": "tiny"}
    data = {"dataset": "d", "corpora": {"c": {"path": "nowhere"}}, "val": {}, "image_size": 64}
    data |= {"micro_batch_size": 2, "global_batch_size": 2}
    config = {
        "model": {"class_path": "rewurst.modules.StageB", "init_args": arguments},
        "data": {"class_path": "rewurst.datamodules.ImageTextDataModule", "init_args": data},
    }
    found = measure(config, 2, "32-true", on_cpu=False)
    assert found.notes == []
    tiny = sum(tensor.nbytes for tensor in VQGAN.from_preset("tiny").state_dict().values())
    assert tiny <= found.step.extra < tiny + 1e5  # and buffers of the compressor
