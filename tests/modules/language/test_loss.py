"""Losses and gradients of CausalLM equal those of transformers, for all kinds of heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import LLAMA
from ranks import run_ranks

from rewurst import UsageError
from rewurst.modules import CausalLM
from rewurst.modules.language.objective import find_objective


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_loss_and_gradients_equal_transformers(
    tiny_config: dict[str, Any], architecture: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers casts logits with .float(), which in double precision would round them.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    config = {**(tiny_config if architecture == "gpt_neox" else LLAMA), "tie_word_embeddings": tied}
    module = CausalLM(config).double()
    ids = torch.randint(64, (3, 9))

    theirs = module.model(input_ids=ids, labels=ids).loss
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in module.model.named_parameters()}
    for ours in (lambda: module.loss(ids), lambda: module.token_losses(ids).mean()):
        module.zero_grad(set_to_none=True)
        loss = ours()
        loss.backward()
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-10)
        for name, parameter in module.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-14)


HEADS = {
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 4},
    "cohere": {"logit_scale": 0.1},
    "granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_that_do_more_get_all_logits_and_one_line(
    architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    module = CausalLM({**LLAMA, "model_type": architecture, "pad_token_id": 0, **HEADS[architecture]}).double()
    ids = torch.randint(64, (3, 9))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        losses = [module.loss(ids).item(), module.token_losses(ids).mean().item()]
    theirs = module.model(input_ids=ids, labels=ids).loss.item()
    assert losses == pytest.approx([theirs] * 2, rel=1e-10)
    [record] = [record for record in caplog.records if "linear head" in record.message]
    assert record.message.endswith("ForCausalLM does more than a linear head: its loss is computed over all logits")


def test_probing_the_head_changes_neither_modes_nor_random_state(tiny_config: dict[str, Any]) -> None:
    module = CausalLM({**tiny_config, "hidden_dropout": 0.5})
    module.model.gpt_neox.layers[0].eval()  # type: ignore[union-attr,index,operator]
    modes, state = [m.training for m in module.modules()], torch.get_rng_state()
    with torch.no_grad():
        assert find_objective(module.model).plain_head
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_z_loss_is_part_only_of_training(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = CausalLM(tiny_config, z_loss=0.1)
    ids = torch.randint(64, (3, 9))
    expected = module.token_losses(ids).mean() + 0.1 * module(ids[:, :-1]).logsumexp(-1).square().mean()
    torch.testing.assert_close(module.loss(ids), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation 'flash_attention_2' cannot be used here: "),
        ({"activation_checkpointing": 0}, "activation_checkpointing 0 must be at least 1, or null"),
        ({"z_loss": -1.0}, "z_loss -1.0 must not be below 0"),
    ],
)
def test_options_that_cannot_be(tiny_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM(tiny_config, **options)
    assert str(error.value).startswith(message)


def test_attention_is_computed_as_requested(tiny_config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 9))
    losses = []
    for asked, found in ((None, "sdpa"), ("eager", "eager")):
        torch.manual_seed(1)
        module = CausalLM(tiny_config, attn_implementation=asked)  # type: ignore[arg-type]
        assert module.model.config._attn_implementation == found  # type: ignore[union-attr]
        losses.append(module.loss(ids).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "gpt_neo_x"}, "model_type 'gpt_neo_x' is unknown to transformers; did you mean 'gpt_neox'?"),
        ({"hidden_size": 8}, "model_type None is unknown to transformers"),
        (
            {"model_type": "gpt_neox", "hidden_sise": 8},
            "'hidden_sise' is unknown to gpt_neox; did you mean 'hidden_size'?",
        ),
        ("./no/such/folder", "model folder ./no/such/folder does not exist"),
    ],
)
def test_models_that_do_not_exist(model: str | dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM(model)
    assert message in str(error.value)


SHARDED = """
import json, os, sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from rewurst.modules import CausalLM

distributed.init_process_group("gloo")
rank = distributed.get_rank()
config = json.loads(sys.argv[1])
torch.manual_seed(0)
ids = torch.randint(64, (4, 9))
whole, sharded = CausalLM(config), CausalLM(config)
sharded.load_state_dict(whole.state_dict())
whole.loss(ids).backward()
parts = {"blocks": [*sharded.model.gpt_neox.layers], "head": [*sharded.model.gpt_neox.layers, sharded.model.lm_head]}
for part in parts[sys.argv[2]]:
    fully_shard(part)
fully_shard(sharded.model)
for _ in range(2):  # the second time as the first, which looked at the head
    sharded.zero_grad()
    sharded.loss(ids[2 * rank : 2 * rank + 2]).backward()
assert sharded._objective.plain_head
for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad.full_tensor(), rtol=1e-5, atol=1e-7)
print("equal", flush=True)
distributed.barrier()
os._exit(0)  # gloo's threads may still be there when the interpreter ends, which then aborts
"""


@pytest.mark.parametrize("parts", ["blocks", "head"])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(
    tiny_config: dict[str, Any], tmp_path: Path, parts: str
) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    said = run_ranks(tmp_path / "script.py", json.dumps(tiny_config), parts, processes=2)
    assert said.count("equal") == 2
