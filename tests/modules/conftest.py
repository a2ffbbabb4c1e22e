"""Networks are tiny, with every parameter away from its special initial value."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

Randomize = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text model of width 32 with 16 tokens, and its byte-level tokenizer."""
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
