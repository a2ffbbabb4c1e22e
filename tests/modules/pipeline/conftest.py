"""Fixtures: checkpoints of tiny stages, exported folders and their pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rewurst.modules.networks import VQGAN, Prior, SemanticCompressor, StageBUNet, describe
from rewurst.modules.networks.layers import Attention
from rewurst.modules.pipeline.export import export_diffusers
from rewurst.modules.pipeline.text_to_image import TextToImage


@pytest.fixture(autouse=True)
def _no_modules_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep diffusers from copying the one-line files that it executes to the user's cache."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def tame(network: nn.Module) -> nn.Module:
    """Scale weights so that sampling stays small and pictures are gray rather than black and white."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Attention):  # so that the text matters more than rounding
                module.to_v.weight.mul_(2)
        if isinstance(network, Prior):  # |1 - b| away from 0, where rounding is amplified
            network.get_parameter("out.1.weight").mul_(0.2)
        elif isinstance(network, StageBUNet):  # b near 1; rows are channels, a before b, each with its 2x2 patch
            network.get_parameter("clf.1.weight").mul_(0.3)
            network.get_parameter("clf.1.bias")[16:] = 3.0
        elif isinstance(network, VQGAN):
            network.get_parameter("out_block.0.bias").fill_(0.5)
    return network


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, text_encoder_folder: Path) -> dict[str, Path]:
    """Write checkpoints as the LightningModules do, of the released compression and of another."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)

    def write(name: str, **networks: nn.Module) -> Path:
        module = nn.Module()
        for attribute, network in networks.items():
            for tensor_name, tensor in network.state_dict().items():
                if tensor.is_floating_point():
                    tensor.uniform_(-0.15, 0.17)
                    if tensor_name.endswith("running_var"):
                        tensor.abs_().add_(0.5)
            setattr(module, attribute, tame(network))
        content = {"state_dict": module.state_dict(), "networks": describe(module)}
        if name != "a":
            content["text_encoder"] = str(text_encoder_folder)
        torch.save(content, folder / f"{name}.ckpt")
        return folder / f"{name}.ckpt"

    tiny = SemanticCompressor.from_preset("tiny")
    large = SemanticCompressor.from_preset("tiny", widths=[8, 8, 8, 8, 8], input_scale=0.75)
    return {
        "a": write("a", vqgan=VQGAN.from_preset("tiny")),
        "b": write("b", unet=StageBUNet.from_preset("tiny"), compressor=tiny),
        "b_large": write("b_large", unet=StageBUNet.from_preset("tiny"), compressor=large),
        "c": write("c", prior=Prior.from_preset("tiny")),
        "c2": write("c2", prior=Prior.from_preset("tiny")),
    }


@pytest.fixture(scope="module")
def combined(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the released compression: 42.67 pixels per latent."""
    out = tmp_path_factory.mktemp("combined") / "out"
    return export_diffusers(checkpoints["a"], checkpoints["b_large"], checkpoints["c"], out)


@pytest.fixture(scope="module")
def pair(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export 16 pixels per latent as a prior's and a decoder's folder."""
    out = tmp_path_factory.mktemp("pair") / "out"
    return export_diffusers(checkpoints["a"], checkpoints["b"], checkpoints["c"], out)


@pytest.fixture(scope="module")
def pipeline(pair: Path) -> TextToImage:
    return TextToImage.from_folder(pair)
