"""Layout of TensorBoard's custom charts, with markers at the start of datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger

from ...lightning_compat import logged_step
from ..forgetting import Forgetting
from ..learning_rate.lengths import counted_optimizers
from ..learning_rate.rewarming import LRRewarming
from ..replay import ReplayScheduler
from ..samples.image_scores import ImageScores
from .throughput import Throughput

Charts = dict[str, list[str]]
BEGINS = "dataset/begins"


class TensorBoardLayout(Callback):
    """Callback that lays out TensorBoard's Custom Scalars tab and marks where datasets begin.

    Charts: the validation losses of all corpora, each in its own color; the training loss; forgetting and adaptation
    relative to the start of the dataset; the learning rate with a vertical line at re-warming; the replay share
    requested and read; tokens; the epoch of each corpus; tokens per second, MFU with its formula, shares of time; the
    gradient norm; and those in the module's attribute ``charts``, in the argument's format. Charts that need a
    callback are shown only with it. Image grids and sample text are under "Images" and "Text", logged by
    :class:`~rewurst.callbacks.LogSamples` and :class:`~rewurst.callbacks.LogText`.

    When a dataset begins (see :class:`~rewurst.callbacks.LRRewarming`), its name, step and schedule are logged as the
    text ``dataset``. With other loggers this callback does nothing.

    Args:
        charts: Additional charts: a list of regular expressions of names per title.

    Example::

        Trainer(callbacks=[TensorBoardLayout({"Accuracy": ["val/accuracy/.*"]})])
    """

    def __init__(self, charts: Mapping[str, Sequence[str]] | None = None) -> None:
        self.charts = {title: list(names) for title, names in (charts or {}).items()}
        self._writers: dict[tuple[str, str], Any] = {}
        self._begin: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout, once per run folder, and the mark."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                layout = self.layout(trainer, pl_module)
                logger.experiment.add_custom_scalars(
                    {
                        category: {title: ["Multiline", names] for title, names in charts.items()}
                        for category, charts in layout.items()
                    }
                )
                _mark(logger.experiment, next(_those(trainer, LRRewarming), None))
        # This run logs again what an interrupted run logged after the step that it resumes from.
        resumed = trainer.global_step // counted_optimizers(pl_module, len(trainer.optimizers))
        self._begin = resumed or None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write each corpus's values as a separate run, because TensorBoard has one color per run."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for name, value in trainer.callback_metrics.items() if folders else ():
            prefix = next((prefix for prefix in BY_CORPUS if name.startswith(prefix)), None)
            if prefix is None or name.endswith("/average"):
                continue
            for folder in folders:
                writer = self._writer(folder, name.removeprefix(prefix))
                writer.add_scalar(BY_CORPUS[prefix], float(value), logged_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files of the corpora."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the files of the corpora after an error."""
        self._close()

    def _writer(self, folder: str, corpus: str) -> Any:
        if (folder, corpus) not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # TensorBoard is imported only if used

            path = str(Path(folder) / "corpora" / corpus)
            self._writers[folder, corpus] = SummaryWriter(path, purge_step=self._begin)
        return self._writers[folder, corpus]

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def layout(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Charts]:
        """Return regular expressions of names by category and chart."""
        there = {type_ for type_ in CHARTS_OF if next(_those(trainer, type_), None) is not None}
        learning: Charts = {"Validation loss": ["corpora/loss"], "Training loss": ["train/loss"]}
        for type_ in (Forgetting, ReplayScheduler, ImageScores):
            learning |= CHARTS_OF[type_] if type_ in there else {}
        learning |= getattr(pl_module, "charts", {})
        training: Charts = CHARTS_OF[LearningRateMonitor] if LearningRateMonitor in there else {}
        training = training | {"Gradient norm": ["train/grad_norm.*"]}
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        by_tokens = getattr(datamodule, "tokens_per_step", None) is not None
        if by_tokens:
            training["Tokens"] = ["tokens"]
        if hasattr(datamodule, "rows_read"):  # corpora with an order, see ReplaySource
            training["Epoch of each corpus"] = ["data/epoch/.*"]
        layout = {"Learning": learning, "Training": training}
        if Throughput in there:
            formula = getattr(pl_module, "flops_formula", "FLOPs of a step")
            left_out = {SAMPLES if by_tokens else TOKENS}
            if not next(_those(trainer, Throughput)).available_flops:
                left_out.add(MFU)
            layout["Speed"] = {
                title.format(formula=formula): names
                for title, names in CHARTS_OF[Throughput].items()
                if title not in left_out
            }
        return layout | ({"More": self.charts} if self.charts else {})


TOKENS, SAMPLES = "Tokens per second", "Samples per second"
MFU = "MFU: {formula}, per second and device, over its peak"
BY_CORPUS = {
    "val/loss/": "corpora/loss",
    "val/fid/": "corpora/fid",
    "val/clip_score/": "corpora/clip_score",
    "forgetting/": "corpora/forgetting",
    "adaptation/": "corpora/adaptation",
}
CHARTS_OF: dict[type[Callback], Charts] = {
    Forgetting: {
        "Forgetting: old corpora, loss since the dataset began": ["corpora/forgetting"],
        "Adaptation: new corpora, loss won since the dataset began": ["corpora/adaptation"],
    },
    ReplayScheduler: {"Replay share, asked for and read": ["replay/share_.*"]},
    ImageScores: {"FID of pictures": ["corpora/fid"], "CLIP score of pictures": ["corpora/clip_score"]},
    LearningRateMonitor: {"Learning rate, and where a dataset begins": ["lr-.*", BEGINS]},
    Throughput: {
        TOKENS: ["throughput/tokens_per_s"],
        SAMPLES: ["throughput/samples_per_s"],
        MFU: ["throughput/mfu"],
        "TFLOP/s: {formula}": ["throughput/tflops_per_s"],
        "Shares of time": ["time/.*"],
    },
}


def _those(trainer: Trainer, kind: Any) -> Any:
    return (callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]


def _mark(experiment: Any, rewarming: LRRewarming | None) -> None:
    """Draw a vertical line where a dataset begins: values 0 and the schedule's highest at the same step."""
    if rewarming is None or rewarming.run.start != rewarming.step:
        return
    run, start = rewarming.run, rewarming.step
    highest = max(run.value(step) for step in range(start, run.end + 1, max(1, run.length // 1000)))
    for value in (0.0, highest):
        experiment.add_scalar(BEGINS, value, start)
    how = "its learning rate continues" if run.continues else f"optimizer state: {rewarming.optimizer_state}"
    text = f"**{run.dataset}** begins at step {start}: {run.schedule.describe()} over {run.length} steps; {how}"
    experiment.add_text("dataset", text, start)
