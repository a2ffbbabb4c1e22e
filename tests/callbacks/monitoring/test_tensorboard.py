"""TensorBoard shows the layout, the marks of datasets, hyper-parameters with metrics, and sample text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from stage_runs import trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from rewurst import UsageError
from rewurst.callbacks import (
    Forgetting,
    LogHyperparameters,
    LogText,
    LRRewarming,
    ReplayScheduler,
    TensorBoardLayout,
    Throughput,
    WarmupCosine,
)
from rewurst.callbacks.monitoring.tensorboard_layout import BY_CORPUS
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM, StageA
from rewurst.preparation.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:.*callbacks used to create the checkpoint.*",
    "ignore:.*in eval mode at the start",
)


@pytest.fixture
def corpora(write_corpus: Callable[..., str]) -> dict[str, str]:
    return {name: write_corpus(name, 23 + 4 * seed, seed) for seed, name in enumerate(("prose", "code"))}


def fit(
    folder: Path,
    corpora: dict[str, str],
    config: dict[str, Any],
    *callbacks: Any,
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """Run three steps on prose, or three more on code from a checkpoint."""
    again = ckpt_path is not None
    chosen = {"code": Corpus(corpora["code"]), "prose": Corpus(corpora["prose"], replay=True)}
    data = TextDataModule("code" if again else "prose", chosen if again else {"prose": Corpus(corpora["prose"])},
                          corpora, 8, 2, 4)  # fmt: skip
    run = trainer(
        folder, max_steps=6 if again else 3, callbacks=list(callbacks), logger=TensorBoardLogger(folder, name="run"),
        val_check_interval=2, limit_val_batches=1.0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    run.fit(CausalLM(config), data, ckpt_path=ckpt_path, weights_only=True)
    return run


def events(run: Any) -> EventAccumulator:
    found = EventAccumulator(run.logger.log_dir)
    found.Reload()
    return found


def schedule() -> LRRewarming:
    return LRRewarming(WarmupCosine(1e-2, 1e-3, 0.34), 3)


def test_the_layout_names_what_is_logged(corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "a", every_n_train_steps=3)
    fit(tmp_path, corpora, tiny_config, schedule(), saving)
    run = fit(
        tmp_path, corpora, tiny_config, schedule(), TensorBoardLayout({"Own": ["epoch"]}), LearningRateMonitor(),
        ReplayScheduler(0.25), Forgetting(old=["prose"], new=["code"]), Throughput(peak_flops=1e12),
        ckpt_path=tmp_path / "saved" / "a.ckpt",
    )  # fmt: skip
    found = events(run)
    [event] = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Learning", "Training", "Speed", "More"]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    corpora_runs = {path.name: EventAccumulator(str(path)) for path in Path(run.log_dir, "corpora").iterdir()}  # type: ignore[arg-type]
    for one in corpora_runs.values():
        one.Reload()
    assert {name: sorted(one.Tags()["scalars"]) for name, one in corpora_runs.items()} == {
        "prose": ["corpora/forgetting", "corpora/loss"],
        "code": ["corpora/adaptation", "corpora/loss"],
    }, "each corpus is a run of its own, with a color of its own"
    for name, one in corpora_runs.items():
        expected = [(event.step, event.value) for event in found.Scalars(f"val/loss/{name}")]
        assert [(event.step, event.value) for event in one.Scalars("corpora/loss")] == expected
    logged = [*found.Tags()["scalars"], *(tag for one in corpora_runs.values() for tag in one.Tags()["scalars"])]
    unused = {"throughput/seconds_per_step", "throughput/samples_per_s", "epoch"}
    shown = set()
    for title, expressions in charts.items():
        matching = {name for name in logged for one in expressions if re.fullmatch(one, name)}
        assert matching, f"{title} is empty"
        shown |= matching
    by_corpus = ("val/loss/", "forgetting/", "adaptation/", "val/perplexity", "replay/rows")
    rest = {name for name in logged if not name.startswith(by_corpus)} - unused
    assert rest <= shown, "everything that a person watches stands in a chart"
    assert charts["Validation loss"] == ["corpora/loss"]
    assert f"MFU: {CausalLM.flops_formula}, per second and device, over its peak" in charts


def test_the_start_of_a_dataset_is_marked(corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "a", every_n_train_steps=3)
    fit(tmp_path, corpora, tiny_config, schedule(), saving)
    callbacks = [schedule(), ReplayScheduler(0.25), TensorBoardLayout()]
    run = fit(tmp_path, corpora, tiny_config, *callbacks, ckpt_path=tmp_path / "saved" / "a.ckpt")
    found = events(run)
    marks = [(event.step, pytest.approx(event.value)) for event in found.Scalars("dataset/begins")]
    assert marks == [(3, 0.0), (3, 1e-2)], "a vertical line as high as the schedule"
    [text] = found.Tensors("dataset/text_summary")
    assert text.step == 3
    assert text.tensor_proto.string_val[0].decode().startswith("**code** begins at step 3: WarmupCosine(peak=0.01")


def test_a_resumed_dataset_is_not_marked_again(
    corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, corpora, tiny_config, schedule(), saving)
    data = TextDataModule("prose", {"prose": Corpus(corpora["prose"])}, corpora, 8, 2, 4)
    run = trainer(
        tmp_path, max_steps=3, callbacks=[schedule(), TensorBoardLayout()], logger=TensorBoardLogger(tmp_path)
    )
    run.fit(CausalLM(tiny_config), data, ckpt_path=str(tmp_path / "saved" / "step=2.ckpt"), weights_only=True)
    assert "dataset/begins" not in events(run).Tags()["scalars"]


def test_modules_bring_their_charts(picture_data: Any, tmp_path: Path) -> None:
    vqgan = {"preset": "tiny", "embed_dim": 16, "num_vq_embeddings": 16}
    layout, module = TensorBoardLayout(), StageA(vqgan, None, perceptual_weight=0)
    run = trainer(tmp_path, max_steps=2, val_check_interval=2, limit_val_batches=1.0, callbacks=[layout])
    run.fit(module, picture_data())
    charts = layout.layout(run, module)["Learning"]
    assert charts["PSNR of pictures (dB)"] == ["val/psnr/.*"]
    logged = {*run.logged_metrics, BY_CORPUS["val/loss/"]}
    for names in charts.values():
        assert any(re.fullmatch(one, name) for name in logged for one in names)


def test_settings_are_logged_with_metrics_of_the_same_run(
    corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    run = fit(
        tmp_path, corpora, tiny_config, schedule(), Forgetting(old=["prose"]), LogHyperparameters({"machine": "mine"})
    )
    found = events(run)
    assert not list(Path(run.logger.log_dir).glob("*/events*")), "no run under the run"
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info")
    }
    metrics = {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos}
    assert metrics == {"val/loss/prose", "val/loss/code", "val/loss/average", "forgetting/prose"}
    assert metrics <= set(found.Tags()["scalars"]), "the values are those of the curves"
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    assert values["dataset"].string_value == "prose"
    assert values["peak"].number_value == 1e-2
    assert values["global_batch_size"].number_value == 4
    assert values["optimizer"].string_value == "AdamW"
    assert values["machine"].string_value == "mine"
    assert content["_hparams_/session_end_info"].session_end_info.status == 1, "success"


def test_other_loggers_get_the_settings(corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    data = TextDataModule("prose", {"prose": Corpus(corpora["prose"])}, corpora, 8, 2, 4)
    callbacks = [schedule(), ReplayScheduler(0.0), LogHyperparameters(), TensorBoardLayout()]
    run = trainer(tmp_path, max_steps=2, callbacks=callbacks[:1] + callbacks[2:], logger=CSVLogger(tmp_path))
    run.fit(CausalLM(tiny_config), data)
    assert "peak: 0.01" in (Path(run.logger.log_dir) / "hparams.yaml").read_text()  # type: ignore[union-attr,arg-type]


class Writes(LightningModule):
    """Module that generates the prompt and a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight - torch.rand(())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def continue_text(self, prompts: list[str], max_new_tokens: int, temperature: float) -> list[str]:
        return [f" {max_new_tokens} {temperature}\n``` {float(torch.rand(())):.6f}" for _ in prompts]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def write(folder: Path, data: Any, *callbacks: Any) -> Any:
    torch.manual_seed(0)
    run = trainer(
        folder, max_steps=6, callbacks=list(callbacks), val_check_interval=2, limit_val_batches=1.0,
        logger=TensorBoardLogger(folder),
    )  # fmt: skip
    module = Writes()
    run.fit(module, data)
    return run, float(module.weight.detach())


def test_the_same_prompts_with_the_same_draws(picture_data: Any, tmp_path: Path) -> None:
    callback = LogText(["one", "two"], max_new_tokens=5, every_n_steps=4)
    run, weight = write(tmp_path, picture_data(), callback)
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events(run).Tensors("samples/text/text_summary")
    ]
    assert [step for step, _ in texts] == [2, 4]
    assert texts[0][1] == texts[1][1]
    assert texts[0][1].splitlines()[0] == "    one▸ 5 0.8"
    assert all(line.startswith("    ") or not line for line in texts[0][1].splitlines()), "nothing ends the block"
    assert sorted(path.name for path in (Path(run.log_dir) / "samples").iterdir()) == [
        "text-step=0000002.md",
        "text-step=0000004.md",
    ]
    assert weight == write(tmp_path, picture_data())[1], "training draws what it would without"


def test_a_language_model_writes(corpora: dict[str, str], tiny_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text to learn from")
    train_tokenizer([str(tmp_path / "text.txt")], 260, tmp_path / "tokenizer", progress=False)
    module = CausalLM(tiny_config | {"vocab_size": 300})
    module._trainer = type(
        "Fake", (), {"datamodule": type("Data", (), {"tokenizer_folder": str(tmp_path / "tokenizer")})}
    )()
    greedy = module.continue_text(["a text", ""], 6, 0.0)
    assert greedy == module.continue_text(["a text", ""], 6, 0.0)
    assert len(greedy) == 2
    assert module.model.training
    module._trainer.datamodule.tokenizer_folder = None  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="the data module knows no tokenizer_folder"):
        module.continue_text(["a text"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "give at least one prompt"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens 0 and every_n_steps None must be at least 1"),
    ],
)
def test_bad_use(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LogText(**arguments)


def test_a_module_that_cannot_write(picture_data: Any, tmp_path: Path) -> None:
    class Plain(LightningModule):
        pass

    with pytest.raises(UsageError, match=r"LogText: Plain has no continue_text\(prompts, ...\)"):
        LogText(["a"]).setup(trainer(tmp_path), Plain(), "fit")
