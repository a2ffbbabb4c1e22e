"""Evaluation of exported models: perplexity, lm-eval's tasks on local files, pictures compared with a corpus."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_oracles import clip_score, frechet
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.evaluation import images as evaluate_images
from rewurst.evaluation.results import Results
from rewurst.modules import CausalLM
from rewurst.modules.networks import VQGAN, Prior, SemanticCompressor, StageBUNet, describe
from rewurst.modules.pipeline.export import export_diffusers
from rewurst.modules.pipeline.text_to_image import TextToImage
from rewurst.modules.shared.image_metrics import psnr
from rewurst.preparation.images import prepare_images
from rewurst.preparation.text import prepare_text
from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.train import main


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a language model, and prepare a corpus for it and one for another tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n\n".join(f"the number after {i} is {i + 1}" for i in range(200)))
    for name, size in (("tokenizer", 270), ("other", 280)):
        train_tokenizer([str(folder / "text.txt")], size, folder / name, progress=False)
        prepare_text([str(folder / "text.txt")], str(folder / name), folder / f"of_{name}", sequence_length=16)
    config = {"model_type": "gpt_neox", "vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    CausalLM(config).model.save_pretrained(folder / "model")  # type: ignore[operator]
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "model")
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def scalars(folder: Path) -> dict[str, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"] if name != "epoch"}


def test_perplexity_is_transformers_own(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(text_folder / "of_tokenizer" / "train")
    arguments = ["--corpus", f"numbers={corpus}", "--batch_size", "5", "--out", str(tmp_path)]
    assert main(["evaluate", str(text_folder / "model"), *arguments]) == 0
    shards = TokenShards(corpus)
    ids = torch.from_numpy(shards.read(np.arange(len(shards))).astype(np.int64))
    assert len(ids) % 5, "the last batch is filled up"
    model = AutoModelForCausalLM.from_pretrained(text_folder / "model").eval()
    expected = model(input_ids=ids, labels=ids).loss.item()
    found = results(tmp_path)["corpora"]["numbers"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["tokens"] == len(ids) * 16
    assert scalars(tmp_path)["eval/numbers/loss"] == pytest.approx(expected, rel=1e-5)
    assert f"numbers: loss {expected:.4f}" in capsys.readouterr().out


def test_another_tokenizer_is_refused(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(text_folder / "of_other" / "train")
    assert main(["evaluate", str(text_folder / "model"), "--corpus", other, "--out", str(tmp_path)]) == 2
    assert "was not prepared with the tokenizer of" in capsys.readouterr().err


TASK = """
task: numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a task of lm-eval with questions in a local file."""
    import datasets

    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"question": f"the number after {i} is", "choices": [f" {i + 1}", " the"], "label": i % 2} for i in range(6)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "numbers.yaml").write_text(TASK.format(questions=folder / "questions.jsonl"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_task_of_local_files(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("lm_eval")
    task_folder = request.getfixturevalue("task_folder")
    out = tmp_path / "out"
    model = str(text_folder / "model")
    tasks = ["--tasks", "numbers", "--task_folder", str(task_folder), "--limit", "4", "--out", str(out)]
    assert main(["evaluate", model, *tasks]) == 0
    found = results(out)["tasks"]["numbers"]
    assert found["acc"] == own_accuracy(text_folder / "model", task_folder / "questions.jsonl", 4)
    assert (found["samples"], found["version"]) == (4, 1.5)
    assert scalars(out)["eval/numbers/acc"] == found["acc"]

    capsys.readouterr()
    assert main(["evaluate", model, "--tasks", "numbrs", "--task_folder", str(task_folder), "--out", str(out)]) == 2
    assert "tasks: lm-eval has no 'numbrs'; did you mean 'numbers'?" in capsys.readouterr().err


def own_accuracy(folder: Path, questions: Path, limit: int) -> float:
    """Compute the accuracy from the summed log-likelihoods of the choices."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for line in questions.read_text().splitlines()[:limit]:
        question = json.loads(line)
        chances = []
        begin = len(tokenizer(question["question"]).input_ids)
        for choice in question["choices"]:
            ids = tokenizer(question["question"] + choice, return_tensors="pt").input_ids
            logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            chances.append(float(logs[begin - 1 :].sum()))
        right += int(np.argmax(chances)) == question["label"]
    return right / limit


def test_a_missing_lm_eval_is_one_line(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main(["evaluate", str(text_folder / "model"), "--tasks", "a", "--out", str(tmp_path)]) == 2
    assert "pip install 'rewurst[eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory, text_encoder_folder: Path) -> Path:
    """Export a cascade with random weights, 16 pixels per latent."""
    folder = tmp_path_factory.mktemp("cascade")
    torch.manual_seed(1)
    parts = {"a": {"vqgan": VQGAN.from_preset("tiny")}, "c": {"prior": Prior.from_preset("tiny")}}
    parts["b"] = {"unet": StageBUNet.from_preset("tiny"), "compressor": SemanticCompressor.from_preset("tiny")}
    for name, networks in parts.items():
        module = nn.Module()
        for attribute, network in networks.items():
            setattr(module, attribute, network)
        content: dict[str, Any] = {"state_dict": module.state_dict(), "networks": describe(module)}
        if name != "a":
            content["text_encoder"] = str(text_encoder_folder)
        torch.save(content, folder / f"{name}.ckpt")
    return export_diffusers(*(folder / f"{name}.ckpt" for name in "abc"), folder / "out")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five captioned pictures of 64 pixels in shards."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "source").mkdir()
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "source" / f"{index}.png")
        (folder / "source" / f"{index}.txt").write_text(f"picture {index}")
    prepare_images(str(folder / "source"), folder / "shards")
    return folder / "shards" / "train"


def few(*more: str) -> list[str]:
    return ["--image_size", "64", "--steps", "2", "--prior_steps", "2", "--guidance", "1", "--batch_size", "2", *more]


def test_psnr_of_reconstructions(
    cascade: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*few("--out", str(tmp_path)), "--images", f"random={pictures}"]
    assert main(["evaluate", str(cascade), *arguments]) == 0
    found = results(tmp_path)["images"]["random"]
    assert (found["images"], found["image_size"]) == (5, 64)
    vqgan = TextToImage.from_folder(cascade).vqgan
    values = []
    for index in range(5):
        with Image.open(pictures.parent.parent / "source" / f"{index}.png") as opened:
            image = torch.from_numpy(np.asarray(opened).copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            values.append(float(psnr(vqgan.to_images(vqgan.to_latents(image)), image)))
    assert found["A"]["psnr"] == pytest.approx(np.mean(values), rel=1e-4)
    assert found["B"].keys() == {"psnr", "ssim"}
    assert "C" not in found
    assert scalars(tmp_path)["eval/random/A/psnr"] == pytest.approx(found["A"]["psnr"], rel=1e-4)
    said = capsys.readouterr().out
    assert "| A | " in said
    assert "left out: FID: give --inception" in said
    assert "left out: CLIP score: give --clip" in said


class Mean(nn.Module):
    """Features with a simple Gaussian: the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))


def test_fid_and_clip_score_of_drawn_pictures(
    cascade: Path, pictures: Path, clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    original = evaluate_images.draw

    def kept(*args: Any) -> Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(evaluate_images, "load_inception", lambda path: Mean())
    monkeypatch.setattr(evaluate_images, "draw", kept)
    options: dict[str, Any] = {"drawing": evaluate_images.Drawing(2, 1.0, 2), "clip": clip_folder, "inception": "x.pth"}
    found, missing = evaluate_images.evaluate_images(str(cascade), str(pictures), 64, batch_size=2, **options)
    assert missing == []
    ours = np.stack([one for batch in drawn for one in (batch * 255).round().double().mean((2, 3)).numpy()])
    theirs = []
    for index in range(5):
        with Image.open(pictures.parent.parent / "source" / f"{index}.png") as opened:
            theirs.append(np.asarray(opened).astype(float).mean((0, 1)))
    assert found["C"]["fid"] == pytest.approx(frechet(np.stack(theirs), ours), rel=1e-3)

    by_hand = clip_score(clip_folder, torch.cat(drawn), [f"picture {index}" for index in range(5)])
    assert found["C"]["clip_score"] == pytest.approx(by_hand, rel=1e-3)

    again, _ = evaluate_images.evaluate_images(str(cascade), str(pictures), 64, batch_size=4, **options)
    assert again["C"]["clip_score"] == pytest.approx(found["C"]["clip_score"], rel=1e-3), "batches change no picture"


def test_results_of_a_model_gather(tmp_path: Path) -> None:
    Results(tmp_path, "m").add("corpora", {"a": {"loss": 1.0}})
    Results(tmp_path, "m").add("corpora", {"b": {"loss": 2.0}})
    Results(tmp_path, "m").add("tasks", {"t": {"acc": 0.5, "version": "x"}})
    corpora = {"a": {"loss": 1.0}, "b": {"loss": 2.0}}
    assert results(tmp_path) == {"model": "m", "corpora": corpora, "tasks": {"t": {"acc": 0.5, "version": "x"}}}
    with pytest.raises(UsageError, match="contains results of m: choose another --out"):
        Results(tmp_path, "n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --tasks, --corpus or --images"),
        (["--corpus", "a/x", "b/x"], "b/x and a/x would both be called 'x': say NAME=b/x"),
        (["--images", "x", "--image_size", "63"], "image_size=63 does not fit this model's stages"),
        (["--images", "x", "--image_size", "64", "--inception", "no.pth"], "inception no.pth is not a file"),
        (["--corpus", "x", "--limit", "0"], "limit 0 must be at least 1"),
    ],
)
def test_wrong_use(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run: Callable[[list[str]], int] = main
    assert run(["evaluate", str(cascade), *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
