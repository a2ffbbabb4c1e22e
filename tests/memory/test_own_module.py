"""`rewurst plan` on modules of another project, against torch's own tracker of memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed._tools.mem_tracker import MemTracker

from rewurst.memory.counting import without_memory
from rewurst.train import main


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import own_project

    return own_project


def config(folder: Path, module: str, data: str = "Pictures", **arguments: Any) -> list[str]:
    """Return a config that names classes by their paths."""
    content = {
        "model": {"class_path": f"own_project.{module}"},
        "data": {"class_path": f"own_project.{data}", "init_args": arguments},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 10},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return ["plan", "--config", str(folder / "config.yaml"), "--memory", "1000GiB"]


def peak(text: str) -> float:
    """Return the peak in bytes, without recomputation."""
    [value] = re.findall(r"^at the peak +([\d.]+)", text, re.MULTILINE)
    return 1e9 * float(value)


def tracked(project: Any, name: str, batch_size: int, steps: Any) -> int:
    """Return torch's tracked peak of two steps."""
    device = torch.device("cpu")
    with without_memory():  # in which torch's tracker counts by itself
        module = getattr(project, name)()
        batch = project.Pictures().example_batch(batch_size)
        made = module.configure_optimizers()
        optimizers = made if isinstance(made, list) else [made["optimizer"]]
        tracker = MemTracker()
        tracker.track_external(module, *optimizers, *batch)
        with tracker:
            for _ in range(2):
                steps(module, batch, optimizers, tracker.reset_mod_stats)  # it takes a second call for an error
        return int(tracker.get_tracker_snapshot("peak")[device]["Total"])


def automatic(module: Any, batch: Any, optimizers: list[torch.optim.Optimizer], before: Any) -> None:
    before()
    loss = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
    optimizers[0].zero_grad()  # Lightning does so after the forward pass
    loss.backward()
    optimizers[0].step()


def manual(module: Any, batch: Any, optimizers: list[torch.optim.Optimizer], before: Any) -> None:
    for optimizer, judging in zip(optimizers, (False, True), strict=True):
        before()
        loss = module.losses(batch, judging)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "batch_size", "steps"), [("Classifier", 4096, automatic), ("Adversaries", 16384, manual)]
)
def test_the_plan_agrees_with_torchs_tracker(
    name: str, batch_size: int, steps: Any, project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(config(tmp_path, name, batch_size=batch_size)) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}, ")
    assert f"fp32; {batch_size} samples per device ({batch_size}x3x64x64, {batch_size})" in text
    expected = tracked(project, name, batch_size, steps)
    assert expected > 2e9  # of which the table shows a hundredth of a gigabyte
    assert peak(text) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        ("Curious", "Pictures", "training step of Curious needs the values of tensors (aten._local_scalar_dense."),
        ("Broken", "Pictures", "training step of Broken failed on the example batch: RuntimeError: Given groups=1"),
        ("Classifier", "Undescribed", "Undescribed does not describe a batch: add a method example_batch(micro_batch"),
    ],
)
def test_modules_that_cannot_be_planned(
    module: str, data: str, message: str, project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(config(tmp_path, module, data)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert len([line for line in lines if "error" in line]) == 1
    assert module != "Curious" or "own_project.py:" in lines[-1]
