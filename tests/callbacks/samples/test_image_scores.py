"""Scores of drawn pictures in validation: values, averaged weights, several processes, missing files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_oracles import clip_score, frechet
from lightning.pytorch import LightningModule, Trainer
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from rewurst import UsageError
from rewurst.callbacks import ImageScores, WeightAverage
from rewurst.callbacks.samples import image_scores

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty")


class Corners(nn.Module):
    """Small extractor with random weights: six features of a picture's four quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).double()

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return functional.adaptive_avg_pool2d(images.double(), 2).flatten(1) @ self.weight.T


class Draws(LightningModule):
    """Module that draws a picture's brightness, shifted by a trained weight, with noise from the sample's seed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight - torch.rand(())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.asked.append(batch)
        return draw(batch, float(self.weight))

    def draw_samples(self, batch: Any) -> dict[str, Tensor]:
        return {"B": 1 - batch["image"] / 255, "C": self.predict_step(batch, 0)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def draw(batch: Any, shift: float) -> Tensor:
    noise = [torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(seed))) for seed in batch["seed"]]
    return (batch["image"].float().mean((2, 3), keepdim=True) / 255 + shift + 0.2 * torch.stack(noise)).clamp(0, 1)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": -1}
    return Trainer(accelerator="cpu", logger=False, callbacks=[*callbacks], **quiet | every | options)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace the file of Inception's weights."""
    monkeypatch.setattr(image_scores, "load_inception", lambda path: Corners())
    return "weights.pth"


def corpus(data: Any, name: str, count: int) -> dict[str, Any]:
    """Return the samples of a validation corpus as one batch."""
    batches = list(data.val_dataloader()[name])
    whole = {key: torch.cat([b[key] for b in batches]) for key in ("image", "valid")}
    seeds = np.concatenate([b["seed"] for b in batches])
    captions = [caption for b in batches for caption in b["caption"]]
    assert whole["valid"].sum() == count
    return {"image": whole["image"][:count], "seed": seeds[:count], "caption": captions[:count]}


def features(pictures: Tensor) -> np.ndarray[Any, Any]:
    if pictures.dtype != torch.uint8:
        pictures = (pictures * 255).round().byte()
    return Corners()(pictures).numpy()


@pytest.mark.parametrize("micro_batch_size", [3, 4])
def test_values_are_the_definitions(
    picture_data: Any, extractor: str, clip_folder: str, tmp_path: Path, micro_batch_size: int
) -> None:
    """For any batches, without padding samples."""
    data, module = picture_data(micro_batch_size, 12, val=11), Draws()
    run = trainer(tmp_path, ImageScores(extractor, clip_folder))
    run.validate(module, data, verbose=False)
    for name in ("seen", "unseen"):
        samples = corpus(data, name, 11)
        drawn = draw(samples, 0.0)
        expected = frechet(features(samples["image"]), features(drawn))
        assert expected > 10
        assert float(run.callback_metrics[f"val/fid/{name}"]) == pytest.approx(expected, rel=1e-4)
        by_hand = clip_score(clip_folder, drawn, samples["caption"])
        assert float(run.callback_metrics[f"val/clip_score/{name}"]) == pytest.approx(by_hand, rel=1e-3)


def test_later_measurements_use_the_current_weights(picture_data: Any, extractor: str, tmp_path: Path) -> None:
    """Averaged weights if there are any; some samples of one corpus, not at every validation."""
    scores = ImageScores(extractor, samples=7, corpora=["seen"], every_n_steps=4)
    average = WeightAverage(0.5)
    data, module = picture_data(4, 4, val=11), Draws()
    run = trainer(tmp_path, scores, average, max_steps=6)
    run.fit(module, data)
    samples = {key: value[:7] for key, value in corpus(data, "seen", 11).items()}
    assert len(module.asked) == 4, "at two of three validations, two batches each"
    assert [len(batch["seed"]) for batch in module.asked] == [4, 3, 4, 3]
    weight = 0.0
    for step in range(1, 5):  # the second validation, at step 4; that at step 6 does not measure
        weight = 0.5 * weight + 0.5 * -0.05 * step  # d loss / d weight is 1
    expected = frechet(features(samples["image"]), features(draw(samples, weight)))
    assert float(run.callback_metrics["val/fid/seen"]) == pytest.approx(expected, rel=1e-4)
    assert scores.state_dict() == {"scored_at": scores._scored_at}


def test_training_draws_the_same_random_numbers(picture_data: Any, extractor: str, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([ImageScores(extractor)], []):
        torch.manual_seed(0)
        module = Draws()
        trainer(tmp_path, *callbacks, max_steps=4, num_sanity_val_steps=1).fit(module, picture_data(4, 4))
        weights.append(module.weight.item())
    assert weights[0] == weights[1] != 0


def test_latents_are_compared_with_their_decoded_images(picture_data: Any, extractor: str, tmp_path: Path) -> None:
    data, module = picture_data(4, 4, val=6), Draws()
    run = trainer(tmp_path, ImageScores(extractor, reference="B", corpora=["seen"]))
    run.validate(module, data, verbose=False)
    samples = corpus(data, "seen", 6)
    expected = frechet(features(1 - samples["image"] / 255), features(draw(samples, 0.0)))
    assert float(run.callback_metrics["val/fid/seen"]) == pytest.approx(expected, rel=1e-4)


TWO_PROCESSES = """
import json, runpy, sys
from pathlib import Path

settings = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, settings["support"])
tests = runpy.run_path(settings["tests"])
Pictures = runpy.run_path(settings["conftest"])["picture_data"].__wrapped__()
tests["image_scores"].load_inception = lambda path: tests["Corners"]()
scores = tests["ImageScores"]("weights.pth", settings["clip"])
devices = settings["devices"]
strategy = "ddp" if devices > 1 else "auto"
run = tests["trainer"](None, scores, devices=devices, strategy=strategy, use_distributed_sampler=False)
run.validate(tests["Draws"](), Pictures(3, 6, val=7), verbose=False)
if run.is_global_zero:
    Path(settings["out"]).write_text(json.dumps({k: float(v) for k, v in run.callback_metrics.items()}))
"""


def test_two_processes_give_the_scores_of_one(clip_folder: str, tmp_path: Path) -> None:
    """The processes have unequal shares."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    tests = Path(__file__).parents[2]
    found = []
    for devices in (1, 2):
        settings = {"tests": __file__, "conftest": str(tests / "conftest.py"), "support": str(tests / "support")}
        settings |= {"clip": clip_folder, "devices": devices, "out": str(tmp_path / f"{devices}.json")}  # type: ignore[dict-item]
        (tmp_path / f"settings{devices}.json").write_text(json.dumps(settings))
        run_ranks(tmp_path / "script.py", str(tmp_path / f"settings{devices}.json"), processes=devices)
        found.append(json.loads((tmp_path / f"{devices}.json").read_text()))
    assert set(found[0]) == {
        f"val/{measure}/{name}" for measure in ("fid", "clip_score") for name in ("seen", "unseen")
    }
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give inception, the file pt_inception-2015-12-05-6726825d.pth of torch-fidelity, for FID, or clip"),
        ({"inception": "x", "samples": 1}, "samples 1 must be at least 2, and every_n_steps None at least 1"),
        ({"inception": "no.pth"}, "inception no.pth is not a file: give pt_inception-2015"),
        ({"clip": "/no/clip"}, "clip /no/clip cannot be loaded as a CLIP model with its processor"),
    ],
)
def test_missing_files_are_reported_before_the_run(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        ImageScores(**arguments).setup(trainer(tmp_path), Draws(), "fit")
    assert "\n" not in str(error.value)


def test_a_file_with_other_contents(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(UsageError, match=f"{name} does not have the weights of pt_inception"):
            ImageScores(str(tmp_path / name)).setup(trainer(tmp_path), Draws(), "fit")


class Flat(Draws):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return torch.zeros(len(batch["image"]), 10)


@pytest.mark.parametrize(
    ("module", "arguments", "val", "message"),
    [
        (Draws(), {"corpora": ["sean"]}, 6, "there is no validation corpus 'sean'; did you mean 'seen'"),
        (Draws(), {"reference": "A"}, 6, "Draws.draw_samples returns B, C, not reference 'A'"),
        (Flat(), {}, 6, r"Flat.predict_step returns shape \(4, 10\), expected images of shape 4 x 3 x height x width"),
        (Draws(), {}, 1, "FID needs at least two images"),
    ],
)
def test_bad_use(
    picture_data: Any, extractor: str, tmp_path: Path, module: Any, arguments: Any, val: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, ImageScores(extractor, **arguments)).validate(module, picture_data(4, 4, val=val))
