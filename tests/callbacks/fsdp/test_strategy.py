"""FSDP in real processes gives the losses of one process for every kind of sharding."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_pool import Pool
from token_corpora import write_tokens
from torch import nn

from rewurst import UsageError
from rewurst.checkpoints import sharded_files as shard_files
from rewurst.checkpoints.newest import newest_checkpoint, remove_leftovers
from rewurst.checkpoints.sharded_reading import describe_checkpoint, read_checkpoint
from rewurst.checkpoints.sharded_writing import consolidate
from rewurst.modules import CausalLM
from rewurst.modules.networks import VQGAN, Prior, SemanticCompressor
from rewurst.modules.shared.text_encoder import checkpoint_text_encoder
from rewurst.modules.stage_c import LowerStages
from rewurst.preparation.tokenizer import train_tokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "shard_your_own.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write tokens for language models, and the checkpoints that Stages B and C need."""
    folder = tmp_path_factory.mktemp("fsdp")
    for seed, name in enumerate(("code", "prose")):
        tokens = np.random.default_rng(seed).integers(64, size=200 * 8 + 1)
        write_tokens(folder, name, tokens)
    (folder / "captions.txt").write_text("row 0 1 2 3 4 5 6 7 8 9 row row")
    train_tokenizer([str(folder / "captions.txt")], 270, folder / "tokenizer", progress=False)
    torch.manual_seed(0)
    SemanticCompressor.from_preset("tiny", widths=[8, 16], c_latent=4).save(folder / "compressor")
    VQGAN.from_preset("tiny", embed_dim=16, num_vq_embeddings=32).save(folder / "vqgan")
    return str(folder)


LAYOUTS = [(processes, strategy) for processes in (2, 4) for strategy in ("fsdp", "hybrid", "ddp")]
BOUND = {"atol": 1e-5, "rtol": 0}


@pytest.mark.parametrize("module", ["neox", "stage_c", "foreign"])
def test_losses_equal_one_process(pool: Pool, folder: str, module: str) -> None:
    alone = pool.run("losses", 1, module=module, strategy="auto", folder=folder)["losses"]
    assert len(alone) == 20
    for world_size, strategy in LAYOUTS[: 1 if module == "foreign" else None]:
        result = pool.run("losses", world_size, module=module, strategy=strategy, folder=folder)
        np.testing.assert_allclose(result["losses"], alone, **BOUND, err_msg=f"{strategy} {world_size}")
        if strategy != "ddp":
            assert result["sharded"] == result["parameters"] - 2 * (module == "foreign")


def test_a_prior_resumes_on_other_numbers_of_processes(pool: Pool, folder: str) -> None:
    same = {"module": "stage_c", "folder": folder}
    whole = pool.run("losses", 4, **same, steps=9, save="whole_prior")["losses"]
    third = f"{folder}/whole_prior/step=3.ckpt"
    assert pool.run("losses", 4, **same, steps=9, resume=third)["losses"] == whole[3:]
    two = pool.run("losses", 2, **same, resume=third, steps=6, save="two")["losses"]
    np.testing.assert_allclose(two, whole[3:6], **BOUND)
    one = pool.run("losses", 1, **same, steps=9, resume=f"{folder}/two/step=6.ckpt")["losses"]
    np.testing.assert_allclose(one, whole[6:], **BOUND)
    state = read_checkpoint(Path(third))["state_dict"]
    networks = {"prior": Prior.from_checkpoint(third), "text_model": checkpoint_text_encoder(third)}
    for name, network in networks.items():
        assert isinstance(network, nn.Module)
        assert all(torch.equal(tensor, state[f"{name}.{key}"]) for key, tensor in network.state_dict().items())


def test_statistics_of_batches_are_the_first_processs_as_under_ddp(pool: Pool, folder: str) -> None:
    same = {"module": "stage_b", "folder": folder, "steps": 6, "limit_val_batches": 2, "val_check_interval": 12}
    ddp = pool.run("losses", 2, **same, strategy="ddp", save="ddp")
    pool.start("losses", 2, **same, save="fsdp")
    result, other = (answer["ok"] for answer in pool.answers(2))
    assert result["statistics"] == other["statistics"] != [], "they were validated last"
    np.testing.assert_allclose(result["losses"], ddp["losses"], **BOUND)
    assert result["validated"] == pytest.approx(ddp["validated"], abs=1e-5)
    own = read_checkpoint(Path(folder, "fsdp/step=6.ckpt"))["state_dict"]
    theirs = torch.load(Path(folder, "ddp/step=6.ckpt"), weights_only=True)["state_dict"]
    unet = LowerStages(f"{folder}/fsdp/step=6.ckpt", None, 32).unet.module
    assert all(torch.equal(tensor, own[f"unet.{name}"]) for name, tensor in unet.state_dict().items())
    means = [name for name in own if name.endswith("running_mean")]
    assert means
    for name in means:
        torch.testing.assert_close(own[name], theirs[name], **BOUND)


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
    np.testing.assert_allclose(result["losses"], alone, **BOUND)
    assert result["sharded"] == result["parameters"]
    assert bool(result["graphs"]) == options.get("compile", False)


@pytest.fixture(scope="module")
def whole(pool: Pool, folder: str) -> dict[str, Any]:
    """Run four processes without a stop, with checkpoints at steps 4, 8 and 12."""
    return {"folder": folder, **pool.run("run", 4, folder=folder, name="whole", steps=12)}


def test_resume_is_exact_and_at_other_numbers_of_processes_near(pool: Pool, whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    again = pool.run("run", 4, folder=folder, name="again", steps=12, resume=f"{folder}/whole/step=4.ckpt")
    assert again["losses"] == whole["losses"][4:]
    assert again["validation"] == whole["validation"]
    assert again["start"] == whole["start"]
    two = pool.run("run", 2, folder=folder, name="two", steps=8, resume=f"{folder}/whole/step=4.ckpt")
    np.testing.assert_allclose(two["losses"], whole["losses"][4:8], **BOUND)
    one = pool.run("run", 1, folder=folder, name="one", steps=12, resume=f"{folder}/two/step=8.ckpt")
    np.testing.assert_allclose(one["losses"], whole["losses"][8:], **BOUND)
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
    assert "contains only weights" in answer["usage"]
    check_exports(kinds / "last.ckpt", gathered, tmp_path)


def check_exports(path: Path, gathered: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from rewurst.modules.language.hugging_face import export_hugging_face
    from rewurst.modules.networks.weight_files import read_file

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


def test_a_module_that_no_process_built(pool: Pool) -> None:
    assert "so the values of" in pool.run("built_on_rank_zero", 2, nobody=True)["usage"]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("blocks", "did you mean 'TransformerEncoderLayer'?; these classes repeat in it: "),
        ("no blocks", "does not name its blocks"),
        ("replicas", "replicas 3 do not divide 2 processes"),
        ("frozen", "sibling of Foreign was built without memory"),
        ("manual", "use strategy ddp"),
        ("bitsandbytes", "AdamW8bit cannot step on shards"),
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
    with pytest.warns(UserWarning, match="is truncated"):
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
    with pytest.warns(UserWarning, match="is truncated: an older checkpoint is used"):
        assert newest_checkpoint([tmp_path]) is None
    answer = pool.run("run", 2, folder=whole["folder"], name="no", steps=8, resume=str(folder))
    assert "lacks __1_0.distcp" in answer["usage"]


def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If names cannot be exchanged, the previous checkpoint is restored."""
    target, new = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.0123abcd.tmp"
    for folder, content in ((target, "before"), (new, "after")):
        folder.mkdir()
        (folder / "meta.pt").write_text(content)
    rename = os.rename

    def killed(old: Path, to: Path) -> None:
        if to == target:
            raise KeyboardInterrupt
        rename(old, to)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "_renameat2", lambda new, target: False)
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            shard_files.exchange(new, target)
    assert not target.exists()
    with pytest.warns(UserWarning, match="left by an interrupted save"):
        remove_leftovers([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (target / "meta.pt").read_text() == "before"


def test_an_unsharded_checkpoint_resumes_sharded(pool: Pool, whole: dict[str, Any]) -> None:
    folder = whole["folder"]
    alone = pool.run("run", 1, folder=folder, name="alone", steps=12, strategy="auto")
    np.testing.assert_allclose(alone["losses"], whole["losses"], **BOUND)
    result = pool.run("run", 2, folder=folder, name="on", steps=12, resume=f"{folder}/alone/step=8.ckpt")
    np.testing.assert_allclose(result["losses"], alone["losses"][8:], **BOUND)
    assert abs(result["validation"] - alone["validation"]) < 1e-5


def test_the_example_shards_a_foreign_module(pool: Pool, tmp_path: Path) -> None:
    said = pool.run("script", 2, path=str(EXAMPLE), args=[str(tmp_path)])
    first, second = said.strip().splitlines()[-2:]
    assert first.startswith("40 steps: ")
    assert second.startswith("20 more: ")
    assert float(first.split()[-1]) < float(first.split()[2])
