"""All terms of a model's own loss, and the share of the busiest expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.modules.language.objective import busiest_share, find_objective

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
         "router_aux_loss_coef": 1.0}  # fmt: skip
ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 4},
}  # fmt: skip


def _logits_loss(module: CausalLM, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
    output = module.model(input_ids=ids[:, :-1], use_cache=False, **options)
    return F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten()), output


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("said", [False, True])
def test_the_balance_of_experts_is_part_of_the_training_loss(kind: str, said: bool) -> None:
    torch.manual_seed(0)
    config = {**SMALL, **ROUTED[kind], "model_type": kind, "output_router_logits": said}
    module, ids = CausalLM(config).double().eval(), torch.randint(64, (3, 9))  # PhiMoE's router jitters
    module.model.set_experts_implementation("eager")  # type: ignore[operator]  # the grouped product has no float64
    expected, output = _logits_loss(module, ids, output_router_logits=True)
    (expected + output.aux_loss).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    loss = module.loss(ids)
    loss.backward()
    assert loss.item() == pytest.approx((expected + output.aux_loss).item(), rel=1e-6)
    assert output.aux_loss.item() > 1
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)
    assert module.token_losses(ids).mean().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_over_the_logits_is_part_of_it() -> None:
    torch.manual_seed(0)
    config = {**{name: value for name, value in SMALL.items() if name != "router_aux_loss_coef"},
              "model_type": "bamba", "z_loss_coefficient": 0.5, "mamba_n_heads": 4, "mamba_d_head": 8,
              "mamba_d_state": 8, "attn_layer_indices": [1]}  # fmt: skip
    module, ids = CausalLM(config), torch.randint(64, (3, 9))
    plain, output = _logits_loss(module, ids)
    expected = plain + 0.5 * output.logits.logsumexp(-1).square().mean()
    assert module.loss(ids).item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.token_losses(ids).mean().item() == pytest.approx(plain.item(), rel=1e-5)


def test_probing_for_terms_does_not_change_the_model(tiny_config: dict[str, Any]) -> None:
    module = CausalLM({**SMALL, "model_type": "mixtral"})
    before, state = dict(module.model.__dict__), torch.get_rng_state()
    objective = find_objective(module.model)
    assert (objective.plain_head, objective.own_terms) == (True, True)
    assert module.model.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)
    objective = find_objective(CausalLM(tiny_config).model)
    assert (objective.own_terms, objective.arguments) == (False, {})


def test_the_share_of_the_busiest_expert() -> None:
    model = CausalLM({**SMALL, "model_type": "mixtral"}).model
    balanced = torch.eye(8).repeat(4, 1) + torch.eye(8).roll(1, 0).repeat(4, 1)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3], collapsed[:16, 5], collapsed[16:, 1] = 2, 1, 1
    share = busiest_share(model, (balanced, collapsed))
    assert share is not None
    assert share.item() == pytest.approx(0.5)
    assert busiest_share(model, (balanced,)) == pytest.approx(1 / 8)
    assert busiest_share(model, ()) is None


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_share_is_logged(write_corpus: Callable[..., str], tmp_path: Path) -> None:
    folder = write_corpus("prose")
    data = TextDataModule("prose", {"prose": Corpus(folder)}, {}, 8, 2, 4)
    logger = CSVLogger(tmp_path)
    run = Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, logger=logger, log_every_n_steps=1,
                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                  limit_val_batches=0)  # fmt: skip
    run.fit(CausalLM({**SMALL, "model_type": "mixtral"}), data)
    assert 1 / 8 <= float(run.callback_metrics["train/busiest_expert"]) <= 1 / 2
    assert "train/busiest_expert" in (Path(logger.log_dir) / "metrics.csv").read_text()
