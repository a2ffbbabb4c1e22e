"""8-bit optimizers in real processes: sharded, replicated, single, and resuming from each other's checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from process_pool import Pool
from token_corpora import write_tokens

WIDE = {"hidden_size": 64, "intermediate_size": 128}
IN_8_BITS = 2 * 4 + 1  # four matrices per block and the head; the embedding has as many elements as the head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write tokens that each follow from the one before, so that losses fall."""
    folder = tmp_path_factory.mktemp("fsdp_8bit")
    for seed, name in enumerate(("code", "prose")):
        draw = np.random.default_rng(seed)
        tokens = (draw.integers(64) + np.cumsum(draw.integers(1, 3, size=200 * 8 + 1))) % 64
        write_tokens(folder, name, tokens)
    return str(folder)


@pytest.fixture(scope="module")
def in_8_bits(pool: Pool, folder: str) -> dict[str, Any]:
    """Run two processes with 8-bit AdamW."""
    own = {"folder": folder, "settings": WIDE, "optimizer": "adamw_8bit", "average": False}
    return {"own": own, **pool.run("run", 2, name="in_8_bits", steps=12, **own)}


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ("adamw_8bit", [(4, "fsdp"), (4, "hybrid"), (2, "ddp")]),
        ("lion_8bit", [(2, "fsdp")]),
        ("lion", [(2, "fsdp")]),
        ("muon", [(4, "fsdp"), (4, "hybrid"), (2, "ddp")]),
    ],
)
def test_losses_are_near_those_of_one_process(
    pool: Pool, folder: str, optimizer: str, layouts: list[tuple[int, str]]
) -> None:
    same: dict[str, Any] = {"folder": folder, "settings": WIDE, "optimizer": optimizer, "steps": 10}
    alone = pool.run("losses", 1, strategy="auto", **same)["losses"]
    for world_size, strategy in layouts:
        losses = pool.run("losses", world_size, strategy=strategy, **same)["losses"]
        exact = strategy == "ddp" or not optimizer.endswith(
            "8bit"
        )  # otherwise the boundaries of blocks of 256 elements move
        np.testing.assert_allclose(losses, alone, rtol=1e-5 if exact else 0.01, err_msg=f"{strategy} {world_size}")


def test_8_bit_states_resume_on_another_number_of_processes(pool: Pool, in_8_bits: dict[str, Any]) -> None:
    own, losses = in_8_bits["own"], in_8_bits["losses"]
    assert in_8_bits["in_8_bits"] == IN_8_BITS
    assert losses[-1] < 0.9 * losses[0]
    first = f"{own['folder']}/in_8_bits/step=4.ckpt"
    again = pool.run("run", 2, name="again_8", steps=12, resume=first, **own)
    assert again["losses"] == losses[4:]  # bit for bit, because blocks are unchanged
    one = pool.run("run", 1, name="one_8", steps=8, resume=first, **own)
    np.testing.assert_allclose(one["losses"], losses[4:8], rtol=0.01)
    two = pool.run("run", 2, name="two_8", steps=12, resume=f"{own['folder']}/one_8/step=8.ckpt", **own)
    np.testing.assert_allclose(two["losses"], losses[8:], rtol=0.01)
    assert (two["counts"], two["in_8_bits"]) == ([12.0], IN_8_BITS)


def test_8_bit_states_resume_in_32_bits_and_without_sharding(pool: Pool, in_8_bits: dict[str, Any]) -> None:
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
    assert (
        "stores exp_avg and exp_avg_sq per parameter, but Lion8bit needs exp_avg: keep the optimizer" in answer["usage"]
    )


def test_muons_states_resume_on_another_number_of_processes(pool: Pool, folder: str) -> None:
    own: dict[str, Any] = {"folder": folder, "settings": WIDE, "optimizer": "muon", "average": False}
    losses = pool.run("run", 2, name="muon", steps=12, **own)["losses"]
    assert losses[-1] < 0.9 * losses[0]
    first = f"{folder}/muon/step=4.ckpt"
    again = pool.run("run", 2, name="again_muon", steps=12, resume=first, **own)
    assert again["losses"] == losses[4:]
    one = pool.run("run", 1, name="one_muon", steps=8, resume=first, **own)
    np.testing.assert_allclose(one["losses"], losses[4:8], rtol=1e-5)
    two = pool.run("run", 2, name="two_muon", steps=12, resume=f"{folder}/one_muon/step=8.ckpt", **own)
    np.testing.assert_allclose(two["losses"], losses[8:], rtol=1e-5)
