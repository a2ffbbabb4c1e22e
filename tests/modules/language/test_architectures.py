"""Published models, from a training step to a folder that a fresh process loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from byte_tokenizer import tokenizer_folder
from published_configs import PUBLISHED

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
pytestmark = pytest.mark.filterwarnings("ignore:model. .* does not read", "ignore:AutoTokenizer reads the tokenizer")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("words") / "tokenizer", "<|endoftext|>", None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_training(
    name: str, exports: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(8, 80, (2, 13), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as exact:
        if name != "XGLM":
            exact.setattr(torch.Tensor, "float", torch.Tensor.double)  # models cast to float32, which rounds
        module = architectures.build(name)
        expected = architectures.transformers_loss(module, ids)
        optimizer: Any = torch.optim.SGD(module.parameters(), lr=0.1)
        loss = module.loss(ids)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        optimizer.step()
        architectures.save(module, tmp_path / "a.ckpt", tokenizer)
        resumed = architectures.resume(tmp_path / "a.ckpt")
        torch.testing.assert_close(resumed.eval().token_losses(ids), module.eval().token_losses(ids), rtol=1e-6, atol=0)
        assert module.token_losses(ids).mean().item() != pytest.approx(loss.item(), rel=1e-6)
    architectures.export(module, exports / architectures.describe(name), tokenizer, ids)


def test_a_fresh_process_loads_every_export(exports: Path) -> None:
    names = sorted(path.stem for path in exports.glob("*.pt"))
    script = [sys.executable, "-c", architectures.RELOAD, str(exports)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line.removeprefix("equal ") for line in done.stdout.split("\n") if line) == names


def test_the_page_shows_the_results() -> None:
    page = architectures.table([architectures.row(name) for name in PUBLISHED])
    if os.environ.get("REWURST_WRITE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page
