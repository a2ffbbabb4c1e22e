"""The wheel in a foreign project: callbacks work without networks or data, and types are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Importing torchvision fails, and nothing says that it is installed: torchmetrics, which Lightning imports, would
# otherwise import it.
WITHOUT_TORCHVISION = """
import importlib.metadata
import sys

sys.modules["torchvision"] = None  # type: ignore[assignment]
version = importlib.metadata.version


def without_torchvision(distribution_name: str) -> str:
    if distribution_name == "torchvision":
        raise importlib.metadata.PackageNotFoundError(distribution_name)
    return version(distribution_name)


importlib.metadata.version = without_torchvision
"""

PROJECT = """
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from rewurst.callbacks import LRRewarming, ReplayScheduler, WarmupCosine


class Theirs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: torch.Tensor = self.layer(batch["x"]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TheirData(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(8)}


callbacks = [LRRewarming(WarmupCosine(peak=0.1, minimum=0.01, warmup=0.2), length=10, dataset="theirs")]
replay = ReplayScheduler(0.05)
module = Theirs()
Trainer(
    accelerator="cpu", max_steps=10, max_epochs=-1, callbacks=list(callbacks), logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(module, torch.utils.data.DataLoader(TheirData()))
assert module.rates == [callbacks[0].value(step) for step in range(10)]
assert max(module.rates) == 0.1
heavy = {"webdataset", "rewurst.modules", "rewurst.datamodules"} & set(sys.modules)
assert not heavy, heavy
import rewurst

print(rewurst.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it without dependencies into a separate folder."""
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT))
    [wheel] = folder.glob("rewurst-*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


def run(*args: str, cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_contains_one_package_its_configs_and_no_tests(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"rewurst", "bin"}
    assert (site / "rewurst" / "py.typed").exists()
    assert (site / "rewurst" / "configs" / "continual" / "demo.yaml").exists()
    installed = {path.relative_to(site / "rewurst") for path in (site / "rewurst").rglob("*.yaml")}
    assert installed == {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {path.relative_to(site / "rewurst") for path in (site / "rewurst").rglob("*.py")}
    for folder in ("modules", "datamodules", "callbacks"):
        expected = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert expected <= modules


def test_a_foreign_project_uses_the_callbacks(site: Path, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(WITHOUT_TORCHVISION + PROJECT)
    where = run("project.py", cwd=tmp_path, PYTHONPATH=str(site)).splitlines()[-1]
    assert Path(where).is_relative_to(site)


@pytest.mark.types
def test_the_types_of_a_foreign_project_are_right(site: Path, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(WITHOUT_TORCHVISION + PROJECT)
    options = ["--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache"), "--config-file="]
    run("-m", "mypy", *options, "project.py", cwd=tmp_path, MYPYPATH=str(site))


def test_the_example_rewarms_a_checkpoint_from_before(site: Path, tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "rewarm_your_own.py")
    code = f"{WITHOUT_TORCHVISION}\nimport runpy; runpy.run_path({example!r}, run_name='__main__')"
    said = run("-c", code, str(tmp_path / "runs"), cwd=tmp_path, PYTHONPATH=str(site))
    assert said.strip().splitlines()[-1] == "began at step 50: 0 -> 0.01 -> 0.00100274"


def test_importing_the_package_is_free() -> None:
    code = "import sys, rewurst; print(len({'torch', 'lightning', 'numpy', 'transformers'} & set(sys.modules)))"
    assert run("-c", code).strip() == "0"


def test_source_and_wheel_agree_on_the_links(tmp_path: Path) -> None:
    """A checkout whose links are text files is refused with what to do."""
    import shutil

    broken = tmp_path / "broken"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", ".*cache", "build", "*.egg-info")
    shutil.copytree(ROOT, broken, symlinks=True, ignore=ignore)
    (broken / "src" / "rewurst" / "modules").unlink()
    (broken / "src" / "rewurst" / "modules").write_text("../../modules")
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=broken, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "is not a working symbolic link: clone again with `git clone -c core.symlinks=true`" in result.stderr
