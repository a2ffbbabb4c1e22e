"""Exchange of weights with diffusers' names and the authors' layout, and files that must be refused."""

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from safetensors.torch import save_file
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.modules.networks import VQGAN, Network, Prior, SemanticCompressor, StageBUNet, describe, weight_files

PAIRS = [(VQGAN, PaellaVQModel), (StageBUNet, WuerstchenDiffNeXt), (Prior, WuerstchenPrior)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_ours_to_diffusers_to_ours_is_bit_equal(ours: Any, theirs: Any, tmp_path: Path, randomize: Any) -> None:
    one = randomize(ours.from_preset("tiny"))
    one.save(tmp_path / "ours")
    other = theirs.from_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    back = ours.from_folder(tmp_path / "theirs")
    assert same(one.state_dict(), back.state_dict())
    assert one.config == back.config


def test_diffusers_shards_are_read(tmp_path: Path, randomize: Any) -> None:
    one = randomize(StageBUNet.from_preset("tiny"))
    other = WuerstchenDiffNeXt(**one.config)
    other.load_state_dict(one.state_dict())
    other.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(one.state_dict(), StageBUNet.from_folder(tmp_path).state_dict())


class AuthorsBlock(nn.Module):
    """An attention block in the authors' layout."""

    def __init__(self, c: int, c_cond: int, nhead: int) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.attn = nn.MultiheadAttention(c, nhead, bias=True, batch_first=True)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))


def test_authors_layout_of_attention() -> None:
    """The split projections compute what the authors' fused ones do."""
    authors = AuthorsBlock(32, 32, 4)
    state = weight_files.from_authors({f"blocks.2.{name}": tensor for name, tensor in authors.state_dict().items()})
    prior = Prior.from_preset("tiny", c=32, depth=1).eval()
    expected = {name for name in prior.state_dict() if name.startswith("blocks.2.")}
    assert set(state) == expected
    block = prior.blocks[2]
    block.load_state_dict({name.removeprefix("blocks.2."): tensor for name, tensor in state.items()})
    x, text = torch.randn(2, 3, 4, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        tokens = torch.nn.functional.layer_norm(x, (32,), eps=1e-6).flatten(1, 2)
        seen = torch.cat([tokens, authors.kv_mapper(text)], dim=1)
        attended = authors.attention.attn(tokens, seen, seen, need_weights=False)[0]
        torch.testing.assert_close(block(x, text)[0], x + attended.view_as(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [VQGAN, StageBUNet, Prior, SemanticCompressor])
def test_authors_to_ours_is_bit_equal(network: type[Network], tmp_path: Path, randomize: Any) -> None:
    one = randomize(network.from_preset("tiny"))
    authors = weight_files.to_authors(one.state_dict())
    assert same(weight_files.from_authors(authors), one.state_dict())
    if network is VQGAN:
        assert "vquantizer.codebook.weight" in authors
    if network is Prior:
        assert authors["blocks.2.attention.attn.in_proj_weight"].shape == (192, 64)
        assert "blocks.2.attention.attn.out_proj.bias" in authors
    torch.save({weight_files.AUTHORS_FILES[network.__name__]: authors, "iter": 5}, tmp_path / "stage.pt")
    back = network.from_checkpoint(tmp_path / "stage.pt")
    assert same(back.state_dict(), one.state_dict())
    assert back.config == one.config


def test_full_size_names_survive_the_authors_layout() -> None:
    for network in (VQGAN, StageBUNet, Prior):
        with torch.device("meta"):
            state = network.from_preset("released").state_dict()
        there_and_back = weight_files.from_authors(weight_files.to_authors(state))
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in there_and_back.items()
        }


def test_lightning_checkpoint(tmp_path: Path, randomize: Any) -> None:
    module = nn.Module()
    module.unet = randomize(StageBUNet.from_preset("tiny", c_r=32))
    module.compressor = randomize(SemanticCompressor.from_preset("tiny"))
    torch.save({"state_dict": module.state_dict(), "networks": describe(module)}, tmp_path / "b.ckpt")
    for network, attribute in ((StageBUNet, "unet"), (SemanticCompressor, "compressor")):
        back = network.from_checkpoint(tmp_path / "b.ckpt")
        assert same(back.state_dict(), getattr(module, attribute).state_dict())
        assert back.config == getattr(module, attribute).config
    with pytest.raises(
        UsageError, match=r"b\.ckpt contains StageBUNet, SemanticCompressor: give a checkpoint with a Prior"
    ):
        Prior.from_checkpoint(tmp_path / "b.ckpt")


def test_mean() -> None:
    one, two = (
        {"w": torch.tensor([1.0, 2.0]).half(), "n": torch.tensor(3)},
        {"w": torch.tensor([2.0, 4.0]).half(), "n": torch.tensor(3)},
    )
    mean = weight_files.mean([one, two])
    assert mean["w"].tolist() == [1.5, 3.0]
    assert mean["w"].dtype == torch.float16
    assert mean["n"] == 3


class Executed:
    """Object that leaves a trace when its pickle is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.trace)!r}, 'w').write('executed')",))


def corrupt(folder: Path) -> Path:
    prior = Prior.from_preset("tiny")
    prior.save(folder)
    return folder


def write(name: str) -> Any:
    """Return a function that writes one kind of bad file and returns its path."""

    def missing(folder: Path) -> Path:
        return folder / "none.pt"

    def pickled(folder: Path) -> Path:
        torch.save({"state_dict": Executed(folder / "trace")}, folder / "evil.pt")
        return folder / "evil.pt"

    def bare_pickle(folder: Path) -> Path:
        (folder / "evil.pkl").write_bytes(pickle.dumps(Executed(folder / "trace")))
        return folder / "evil.pkl"

    def truncated(folder: Path) -> Path:
        path = corrupt(folder) / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        return folder

    def no_config(folder: Path) -> Path:
        (corrupt(folder) / "config.json").unlink()
        return folder

    def broken_config(folder: Path) -> Path:
        (corrupt(folder) / "config.json").write_text('{"c":')
        return folder

    def no_weights(folder: Path) -> Path:
        (corrupt(folder) / "diffusion_pytorch_model.safetensors").unlink()
        return folder

    def not_finite(folder: Path) -> Path:
        prior = Prior.from_preset("tiny")
        with torch.no_grad():
            prior.blocks[3].depthwise.bias[2] = float("nan")
        prior.save(folder)
        return folder

    def other_stage(folder: Path) -> Path:
        torch.save({"state_dict": StageBUNet.from_preset("tiny").state_dict()}, folder / "b.pt")
        return folder / "b.pt"

    def other_stage_folder(folder: Path) -> Path:
        VQGAN.from_preset("tiny").save(folder)
        return folder

    def incomplete(folder: Path) -> Path:
        state = Prior.from_preset("tiny").state_dict()
        del state["blocks.1.mapper.weight"]
        save_file(state, folder / "c.safetensors")
        return folder / "c.safetensors"

    def surplus(folder: Path) -> Path:
        save_file(Prior.from_preset("tiny").state_dict() | {"lora": torch.zeros(1)}, folder / "c.safetensors")
        return folder / "c.safetensors"

    def misshapen(folder: Path) -> Path:
        save_file(Prior.from_preset("tiny", c=32).state_dict(), folder / "c.safetensors")
        return folder / "c.safetensors"

    def a_list(folder: Path) -> Path:
        torch.save([torch.zeros(1)], folder / "list.pt")
        return folder / "list.pt"

    return locals()[name]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "none.pt is not a file: give a .safetensors, .pt or .ckpt file with weights"),
        ("pickled", "evil.pt contains "),
        ("bare_pickle", "evil.pkl "),
        ("truncated", "diffusion_pytorch_model.safetensors cannot be read as weights"),
        ("no_config", "does not contain config.json: give a folder that rewurst or diffusers wrote"),
        (
            "broken_config",
            "config.json is not valid JSON (Expecting value: line 1 column 6 (char 5)): copy or download it again",
        ),
        ("no_weights", "does not contain weights: diffusion_pytorch_model.safetensors is missing"),
        ("not_finite", "blocks.3.depthwise.bias has values that are not finite"),
        ("other_stage", "b.pt contains Stage B (StageBUNet): give a checkpoint of Stage C (Prior)"),
        ("other_stage_folder", "describes a PaellaVQModel: Prior needs WuerstchenPrior"),
        ("incomplete", "c.safetensors lacks blocks.1.mapper.weight: it is not a complete Prior"),
        ("surplus", "c.safetensors contains lora, which Prior does not have"),
        ("misshapen", "c.safetensors: projection.weight has shape (32, 16, 1, 1), not (64, 16, 1, 1)"),
        ("a_list", "list.pt contains a list: give a file with a dictionary of tensors"),
    ],
)
def test_bad_files(kind: str, message: str, tmp_path: Path) -> None:
    path = write(kind)(tmp_path)
    with pytest.raises(UsageError) as error:
        Prior.from_checkpoint(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_plain_values_next_to_tensors_are_accepted(tmp_path: Path, randomize: Any) -> None:
    prior = randomize(Prior.from_preset("tiny"))
    extra = collections.OrderedDict(epoch=3, note="x", numbers=[1, 2.5])
    torch.save({"ema_state_dict": prior.state_dict(), **extra}, tmp_path / "c.pt")
    assert same(Prior.from_checkpoint(tmp_path / "c.pt").state_dict(), prior.state_dict())
