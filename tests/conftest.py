from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import lightning.pytorch  # noqa: F401  # first imported under a captured stderr, its handler would keep that one
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from torch import nn

# Shapes in annotations are checked. Here, before any test imports the modules: those that are collected first too.
# (Beartype cannot check `Self`, which base and cascade use.)
NETWORKS = ("layers", "conditioned", "vqgan", "unet", "prior", "encoders", "diffusion")
install_import_hook(
    [
        *(f"rewurst.modules.networks.{name}" for name in NETWORKS),
        "rewurst.modules.pipeline.prompts",
        "rewurst.modules.pipeline.text_to_image",
    ],
    "beartype.beartype",
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


Randomize = Callable[..., nn.Module]
TINY = {
    "model_type": "gpt_neox",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    fork_server.stop()


@pytest.fixture
def randomize() -> Randomize:
    """Move every parameter and buffer away from what it starts as."""

    def move(network: nn.Module, scale: float = 0.2) -> nn.Module:
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(-scale, scale).add_(0.02)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
        return network.eval()

    return move


# Slow files, the slowest first, so that both processes of `make test` end together.
LONG = (
    "fsdp/test_strategy", "test_kill", "continual/test_runner", "modules/test_stage_a", "fsdp/test_optimizers",
    "test_causal_lm", "test_causal_lm_steps", "fsdp/test_killed", "language/test_loss", "wuerstchen/test_study",
    "engine/test_ray", "datamodules/test_text_resume", "learning_rate/test_next_dataset",
    "samples/test_image_scores", "modules/test_stage_b", "memory/test_plan", "evaluation/test_evaluation",
    "test_packaging", "test_tutorials", "sources/test_builtin_text",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by the time they take; within a file the order stays."""

    def place(item: pytest.Item) -> int:
        name = item.path.with_suffix("").as_posix()
        return next((number for number, long in enumerate(LONG) if name.endswith(f"/{long}")), len(LONG))

    items.sort(key=place)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A GPT-NeoX that trains a step in a few milliseconds."""
    return dict(TINY)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Write rows of random tokens as a corpus folder and return its path."""
    from rewurst.preparation.writing.token_writer import TokenWriter

    def write(name: str, rows: int = 50, seed: int = 0, vocab_size: int = 64, sequence_length: int = 8) -> str:
        folder = tmp_path / "corpora" / name
        tokens = np.random.default_rng(seed).integers(vocab_size, size=rows * sequence_length + 1)
        with TokenWriter(
            folder,
            name=name,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            tokenizer_sha256="same",
            rows_per_sample=4,
            rows_per_shard=16,
        ) as writer:
            writer.append(tokens)
            writer.close()
        return str(folder)

    return write


def _picture(corpus: int, row: int, side: int) -> np.ndarray[Any, Any]:
    """Return a disc on a plain background, (3, side, side) bytes."""
    draw = np.random.default_rng([corpus, row])
    y, x = np.mgrid[:side, :side] / side
    middle, radius = draw.uniform(0.3, 0.7, 2), draw.uniform(0.15, 0.3)
    inside = (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < radius**2
    colors = draw.integers(0, 256, (2, 3, 1, 1))
    return np.where(inside, colors[0], colors[1]).astype(np.uint8)


class _Batches:
    """Dataset whose batch i is a pure function of i in every process."""

    def __init__(self, corpus: int, rows: list[list[int]], side: int, training: bool, count: int = 0) -> None:
        self.corpus, self.rows, self.side, self.training, self.count = corpus, rows, side, training, count

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        rows = np.array(self.rows[index])
        samples = rows % self.count if self.training else rows
        batch = {
            "image": torch.from_numpy(np.stack([_picture(self.corpus, int(row), self.side) for row in samples])),
            "caption": [f"disc {row}" for row in samples],
            "seed": np.array([np.random.default_rng([self.corpus, row, 7]).integers(2**63) for row in rows]),
            "row": samples,
        }
        if self.training:
            batch["quantile"] = rows * 0.6180339887 % 1
        else:
            batch["valid"] = torch.from_numpy(samples < self.count)
        return batch


@pytest.fixture
def picture_data() -> Callable[..., Any]:
    """Build a data module of discs that follows the contract of image data modules and resumes by completed steps."""
    from lightning.pytorch import LightningDataModule
    from torch import Generator
    from torch.utils.data import DataLoader

    class Pictures(LightningDataModule):
        def __init__(
            self,
            micro_batch_size: int = 4,
            global_batch_size: int = 4,
            steps: int = 100,
            dataset: str = "discs",
            pictures: int = 16,
            val: int = 6,
            side: int = 32,
        ) -> None:
            super().__init__()
            self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
            self.steps, self.dataset, self.pictures, self.val, self.side = steps, dataset, pictures, val, side
            self.start = 0

        def setup(self, stage: str) -> None:
            assert self.trainer is not None
            self.accumulation = self.global_batch_size // (self.micro_batch_size * self.trainer.world_size)
            if self.trainer.lightning_module.automatic_optimization:
                self.trainer.accumulate_grad_batches = self.accumulation

        def state_dict(self) -> dict[str, Any]:
            assert self.trainer is not None
            ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            return {"step": ready // self.accumulation}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.start = state_dict["step"]

        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            size, mine = self.micro_batch_size, self.global_batch_size // self.trainer.world_size
            rows = []
            for step in range(self.start, self.steps):
                first = step * self.global_batch_size + self.trainer.global_rank * mine
                rows += [list(range(at, at + size)) for at in range(first, first + mine, size)]
            return DataLoader(_Batches(0, rows, self.side, True, self.pictures), batch_size=None, generator=Generator())

        def val_dataloader(self) -> Any:
            assert self.trainer is not None
            size, ranks = self.micro_batch_size, self.trainer.world_size
            padded = -(-self.val // (size * ranks)) * size * ranks
            begin = self.trainer.global_rank * padded // ranks
            rows = [list(range(at, at + size)) for at in range(begin, begin + padded // ranks, size)]
            return {
                name: DataLoader(
                    _Batches(corpus, rows, self.side, False, self.val), batch_size=None, generator=Generator()
                )
                for corpus, name in ((0, "seen"), (1, "unseen"))
            }

    return Pictures


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a CLIP text model of width 32 with 16 tokens, and its byte-level tokenizer."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=vocab["<|endoftext|>"],
        )
    )
    folder = tmp_path_factory.mktemp("text") / "clip"
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, text_encoder_folder: Path) -> str:
    """Write a CLIP model with random weights, 32 pixels, with its processor."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from loopback import Server

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a bucket on moto's S3 server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    from rewurst.datamodules.storage import remote

    remote._file_systems.clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora")
    yield client
    client.close()
    remote._file_systems.clear()
    running.stop()
