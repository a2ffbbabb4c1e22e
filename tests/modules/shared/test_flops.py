"""Counted FLOPs equal those of real training steps and published numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rewurst.modules import CausalLM, LatentDiffusion, StageA, StageB, StageC, latent_diffusion, stage_b, stage_c
from rewurst.modules.networks import VQGAN, SemanticCompressor
from rewurst.modules.shared import flops
from rewurst.modules.shared import text_diffusion as text_stage
from rewurst.preparation.tokenizer import train_tokenizer


def counted(step: Any, backward: bool = False) -> float:
    """Count the FLOPs of a call, with attention computed by products that the counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = step()
        if backward:
            out.backward()
    return float(counter.get_total_flops())


@pytest.fixture
def forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the forward pass of everything, as in a real step."""
    for module in (flops, latent_diffusion, stage_b, stage_c, text_stage):
        for name in ("TRAINED", "PASSED", "FROZEN"):
            monkeypatch.setattr(module, name, 1, raising=False)


def images(n: int = 2, side: int = 32) -> dict[str, Any]:
    pictures = torch.randint(256, (n, 3, side, side), dtype=torch.uint8)
    return {"image": pictures, "caption": ["a disc"] * n, "seed": torch.arange(n)}


NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
WIDE = {"vocab_size": 2048, "hidden_size": 64, "max_position_embeddings": 16}


@pytest.mark.parametrize(
    "settings",
    [
        NEOX | {"tie_word_embeddings": False},
        NEOX | {"tie_word_embeddings": True},
        {"model_type": "gpt2", "n_layer": 2, "n_head": 2},  # tied, learned positions
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    ],
    ids=lambda settings: f"{settings['model_type']} {settings.get('tie_word_embeddings', '')}",
)
def test_a_language_models_flops_are_those_of_its_products(settings: dict[str, Any]) -> None:
    module = CausalLM(WIDE | settings)
    ids = torch.randint(2048, (3, 17))
    model: Any = module.model
    real = counted(lambda: model(ids[:, :-1]).logits.square().mean(), backward=True)
    assert module.flops({"input_ids": ids}) == pytest.approx(real, rel=0.02)


def test_the_405m_models_figures() -> None:
    """With all parameters the published 3.04 GFLOP per token; without the embedding, which is looked up, 2.73."""
    assert flops.flops_per_token(405_334_016, 24, 1024, 2048) == pytest.approx(3.04e9, rel=0.002)
    embedding = 50_304 * 1024
    ratio = flops.flops_per_token(405_334_016, 24, 1024, 2048) / flops.flops_per_token(
        405_334_016 - embedding, 24, 1024, 2048
    )
    assert ratio == pytest.approx(1.11, abs=0.005)


def test_a_mixture_of_experts_has_no_count() -> None:
    experts = {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    experts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    assert CausalLM(experts).flops({"input_ids": torch.zeros(1, 9, dtype=torch.long)}) is None


@pytest.mark.usefixtures("forward_only")
@pytest.mark.parametrize("adversarial_start", [0, 5])
def test_stage_as_step(adversarial_start: int) -> None:
    module = StageA(
        {"preset": "tiny", "embed_dim": 16}, "tiny", perceptual_weight=0, adversarial_start=adversarial_start
    )
    batch = images()
    module._window.append({})
    assert module.flops(batch) == counted(lambda: module._losses(batch))


@pytest.mark.usefixtures("forward_only")
@pytest.mark.parametrize("with_text", [False, True])
def test_stage_bs_step(tmp_path: Path, text_encoder_folder: Path, with_text: bool) -> None:
    VQGAN.from_preset("tiny", embed_dim=16).save(tmp_path)
    text = str(text_encoder_folder) if with_text else None
    module = StageB(str(tmp_path), "tiny", "tiny", text, text_length=5)
    batch = images(2, 64)
    assert module.flops(batch) == counted(lambda: module.training_step(batch, 0))


@pytest.mark.usefixtures("forward_only")
@pytest.mark.parametrize("frozen", [False, True])
def test_stage_cs_step(tmp_path: Path, text_encoder_folder: Path, frozen: bool) -> None:
    SemanticCompressor.from_preset("tiny").save(tmp_path / "compressor")
    (tmp_path / "text.txt").write_text("disc square")
    train_tokenizer([str(tmp_path / "text.txt")], 260, tmp_path / "tokenizer", progress=False)
    own = {"tokenizer": str(tmp_path / "tokenizer"), "hidden_size": 32, "intermediate_size": 64}
    own |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 6}
    text: Any = str(text_encoder_folder) if frozen else own
    module = StageC(str(tmp_path / "compressor"), {"preset": "tiny", "c_cond": 32}, text)
    batch = images(2, 64)
    assert module.flops(batch) == counted(lambda: module.training_step(batch, 0))
    latents = {"z": module.compressor.module(batch["image"] / 255), "caption": batch["caption"], "seed": batch["seed"]}
    assert module.flops(latents) == counted(lambda: module.training_step(latents, 0))
    if frozen:
        states = latents | {"text": module.encode(batch["caption"])}
        assert module.flops(states) == counted(lambda: module.training_step(states, 0))


def test_a_backward_pass_takes_twice_the_forward_one() -> None:
    module = StageA({"preset": "tiny", "embed_dim": 16}, None, perceptual_weight=0)
    sides = (((2, 3, 32, 32), "encode"), ((2, 4, 8, 8), "decode"))
    assert module.flops(images()) == 3 * sum(flops.forward_flops(module.vqgan, [shape], side) for shape, side in sides)


def test_lpips_is_vgg16() -> None:
    """15.3 billion products at 224 pixels in its convolutions (Simonyan and Zisserman, 2014)."""
    assert flops.lpips_flops((1, 3, 224, 224)) == pytest.approx(2 * 15.35e9, rel=0.005)


def test_counting_draws_nothing() -> None:
    state = torch.get_rng_state()
    flops.forward_flops(VQGAN.from_preset("tiny", embed_dim=24), [(1, 3, 32, 32)], "encode")
    fresh = torch.get_rng_state()
    flops._counted.cache_clear()
    torch.set_rng_state(state)
    VQGAN.from_preset("tiny", embed_dim=24)
    assert torch.equal(torch.get_rng_state(), fresh)


@pytest.mark.usefixtures("forward_only")
def test_a_single_stages_step(tmp_path: Path, text_encoder_folder: Path) -> None:
    VQGAN.from_preset("tiny", embed_dim=16).save(tmp_path)
    module = LatentDiffusion(str(tmp_path), {"preset": "tiny", "clip_embd": 32}, str(text_encoder_folder))
    batch = images(2, 64)
    assert module.flops(batch) == counted(lambda: module.training_step(batch, 0))
    latents = {"a": module.data_of(batch), "caption": batch["caption"], "seed": batch["seed"]}
    assert module.flops(latents) == counted(lambda: module.training_step(latents, 0))
