"""LightningCLI over every module and data module, with errors of one line and runs that resume by themselves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from .. import UsageError
from ..callbacks import AtomicCheckpointIO, StepProgressBar, construct_on_rank_zero
from ..callbacks.learning_rate.lengths import counted_optimizers
from ..checkpoints.newest import newest_checkpoint, remove_leftovers
from ..checkpoints.runs import (
    RunIdentity,
    checkpoint_folders,
    resume_version,
    run_folder,
    run_name,
    stored_dataset,
    stored_name,
)
from ..checkpoints.sharded_files import is_sharded
from ..checkpoints.sharded_reading import describe_checkpoint
from ..datamodules import text as _text  # noqa: F401  # imported so that YAML may name the classes without a path
from ..modules import causal_lm as _causal_lm  # noqa: F401
from ..modules.language.initial_weights import check_weights
from ..modules.networks.weight_files import read_file
from .error_messages import one_line
from .options.class_names import import_named, with_public_paths
from .options.named_callbacks import apply_changes, take_changes
from .options.shipped_configs import with_shipped_configs
from .options.short_options import add_short_options, apply_short_options


def run(args: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with the rest of a command line."""
    args = with_shipped_configs(args)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any; nothing changes on a CPU
    for what in _SAID_ALREADY:
        warnings.filterwarnings("ignore", message=what)
    _check_yaml(args)
    import_named(args)
    with _lightning_errors():
        CLI([with_public_paths(arg) for arg in args])


def parse(args: list[str]) -> dict[str, Any]:
    """Return the config that a command line means, without building anything."""
    args = with_shipped_configs(args)
    _check_yaml(args)
    import_named(args)
    with _lightning_errors():
        config: dict[str, Any] = _ParseOnly([with_public_paths(arg) for arg in args]).config[args[0]].as_dict()
    return config


def instantiate(kind: type, settings: Mapping[str, Any]) -> Any:
    """Build one class of a parsed config, from its ``class_path`` and ``init_args``."""
    parser = Parser()
    parser.add_subclass_arguments(kind, "it")
    with _lightning_errors():
        return parser.instantiate_classes(parser.parse_object({"it": dict(settings)})).it


_SAID_ALREADY = (
    "The dirpath has changed",  # a resumed run may write to a folder with files, on purpose
    ".*LeafSpec.*deprecated",  # Lightning's own use of torch
    # Keys of checkpoints from before there could be several of these callbacks, which still find their state.
    r"(?s)Be aware .* callbacks: \[(?:'(?:Forgetting|WeightAverage|LogSamples|LogText|ImageScores)'(?:, )?)+\]",
)


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: _load_yaml(with_public_paths(text)), (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, and which does not guess abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing usage and 60 lines of tried alternatives."""
        _raise_usage_error(ex)
        raise UsageError(one_line(message, self)) from ex


class SaveConfig(SaveConfigCallback):
    """Save the config in the run's own folder. Without a logger that would be the working directory, over any file.

    A run that resumes in the same folder keeps the earlier config as ``config.1.yaml`` if it differs.

    Raises:
        UsageError: The folder belongs to a run that this one does not resume.
    """

    resumes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it once."""
        folder = run_folder(trainer) if trainer.loggers and not self.already_saved else None
        if folder is None:
            return
        self.already_saved = True
        path = folder / self.config_filename
        if trainer.strategy.broadcast(path.is_file()):
            if stage != "fit":
                return
            if not self.resumes:
                raise UsageError(
                    f"{folder} belongs to an earlier run: resume it with --ckpt_path auto, or give the logger another "
                    "version"
                )
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            if path.is_file() and path.read_text("utf8") != text:
                path.rename(next(other for n in count(1) if not (other := folder / f"config.{n}.yaml").exists()))
            path.write_text(text, encoding="utf8")
            self.save_config(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI whose ``ckpt_path`` may be ``auto``, and which loads checkpoints without executing anything.

    ``auto`` is the whole checkpoint with the latest step of this run, and nothing if there is none yet. A run is
    identified by its folder, the name that its logger has for it, and its dataset. ``auto:FOLDER`` falls back on the
    latest checkpoint under another folder, the run that this one continues.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            trainer_defaults={"use_distributed_sampler": False},  # the data modules give every rank its rows
            load_from_checkpoint_support=False,  # a checkpoint's hyper-parameters would win over the YAML
            seed_everything_default=0,
            auto_configure_optimizers=False,  # modules make their own, over the right parameter groups
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this project."""
        add_short_options(parser)
        parser.add_argument(
            "--construct_on_rank_zero",
            type=bool,
            default=False,
            help="build the module with memory in the first process alone; the strategy FSDP hands its values out",
        )

    def before_instantiate_classes(self) -> None:
        """Apply the short options, and build modules where there is memory for them."""
        apply_short_options(self.config[self.subcommand] if self.subcommand else self.config)
        if not self._get(self.config, "construct_on_rank_zero"):
            return
        strategy = str(self._get(self.config, "trainer").get("strategy"))
        if "FSDP" not in strategy:
            raise UsageError(
                f"construct_on_rank_zero needs the strategy rewurst.callbacks.FSDP, this one is {strategy}"
            )
        self.parser.add_instantiator(_on_rank_zero, LightningModule)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; the process's own do not matter when ``main`` is called in process."""
        args, changes = take_changes(args)
        self.config = parser.parse_args(args)
        if changes:
            callbacks = self.config[self.config.subcommand].trainer.callbacks or []
            apply_changes(callbacks if isinstance(callbacks, list) else [callbacks], changes, _parsed_callback)

    def instantiate_classes(self) -> None:
        """Build everything; what a class says against its arguments, or lacks, is one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            _raise_usage_error(error)
            if match := re.search(r"Problem with given class_path '([^']+)':\n((?:\s*[^\s-].*\n?)+)", str(error)):
                raise UsageError(f"{match[1]}: {' '.join(match[2].split())}") from error
            raise
        except RuntimeError as error:
            if match := re.search(r"more than one stateful callback of type `(\w+)`", str(error)):
                raise UsageError(f"trainer.callbacks: there are two of {match[1]}, take one of them out") from error
            raise

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyper-parameters win over the YAML."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add a progress bar that counts steps, unless the config has one or wants none."""
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        shown = config.get("enable_progress_bar") is not False and not config.get("barebones")
        if shown and not any(isinstance(callback, ProgressBar) for callback in own):
            callbacks = [*callbacks, StepProgressBar()]
        callbacks = [*callbacks, RunIdentity()]
        if not _saves_by_itself(config.get("strategy")):
            config["plugins"] = _with_atomic_checkpoints(config.get("plugins"))
        return super()._instantiate_trainer(config, callbacks)

    def fit(self, ckpt_path: str | None = None, weights_only: bool | None = None, **kwargs: Any) -> None:
        """``Trainer.fit`` from the checkpoint that ``ckpt_path`` means."""
        path = self._resolve(ckpt_path, must_exist=False)
        safe = _safe(weights_only)
        content = self._checked(path, safe)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.resumes = ckpt_path is not None
        if path is not None and str(ckpt_path).startswith("auto"):
            rank_zero_info(f"resuming from {path}")
            if self._is_complete(path, content):
                return
            optimizers = counted_optimizers(self.model, len(content.get("optimizer_states", [])))
            resume_version(self.trainer, Path(path), content.get("global_step", 0) // optimizers)
        self.trainer.fit(ckpt_path=path, weights_only=safe, **kwargs)

    def validate(self, ckpt_path: str | None = None, weights_only: bool | None = None, **kwargs: Any) -> None:
        """``Trainer.validate`` with the checkpoint that ``ckpt_path`` means."""
        self.trainer.validate(ckpt_path=self._resolve(ckpt_path), weights_only=_safe(weights_only), **kwargs)

    def test(self, ckpt_path: str | None = None, weights_only: bool | None = None, **kwargs: Any) -> None:
        """``Trainer.test`` with the checkpoint that ``ckpt_path`` means."""
        self.trainer.test(ckpt_path=self._resolve(ckpt_path), weights_only=_safe(weights_only), **kwargs)

    def predict(self, ckpt_path: str | None = None, weights_only: bool | None = None, **kwargs: Any) -> None:
        """``Trainer.predict`` with the checkpoint that ``ckpt_path`` means."""
        self.trainer.predict(ckpt_path=self._resolve(ckpt_path), weights_only=_safe(weights_only), **kwargs)

    def _resolve(self, ckpt_path: str | None, must_exist: bool = True) -> str | None:
        if ckpt_path is None or ckpt_path in ("best", "last", "hpc"):
            return ckpt_path
        if ckpt_path == "auto" or ckpt_path.startswith("auto:"):
            return self._newest(ckpt_path, must_exist)
        path = Path(ckpt_path)
        if not path.exists():
            raise UsageError(f"ckpt_path {ckpt_path} does not exist; `auto` takes the newest of the run's folder")
        if path.is_dir() and not is_sharded(path):
            raise UsageError(
                f"ckpt_path {ckpt_path} is a folder: give a .ckpt file, or auto:{ckpt_path} for its newest"
            )
        self._require_sharding(path)
        return ckpt_path

    def _newest(self, ckpt_path: str, must_exist: bool) -> str | None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None  # a trial of a few batches, not part of a run
        folders, training = checkpoint_folders(self.trainer), not must_exist
        if self.trainer.is_global_zero and training:
            remove_leftovers(folders)
        newest = newest_checkpoint(folders, self._belongs if training else self._has_our_name, resumable=training)
        other = ckpt_path.removeprefix("auto").removeprefix(":")
        if newest is None and other:
            folders = [Path(other)]
            newest = newest_checkpoint(folders, resumable=training)
        if newest is None and (must_exist or other):
            raise UsageError(f"ckpt_path {ckpt_path}: there is no whole checkpoint under {folders[0]}")
        if newest is None:
            self._refuse_another_dataset(folders)
        else:
            self._require_sharding(newest)
        return None if newest is None else str(newest)

    def _has_our_name(self, content: Mapping[str, Any]) -> bool:
        return stored_name(content) in (None, run_name(self.trainer))

    def _belongs(self, content: Mapping[str, Any]) -> bool:
        own = getattr(self.datamodule, "dataset", None)
        return self._has_our_name(content) and (own is None or stored_dataset(content) in (None, own))

    def _refuse_another_dataset(self, folders: list[Path]) -> None:
        """Raise if a named run, or a folder, has checkpoints of another dataset; unnamed runs may share one."""
        if self.trainer.loggers and run_name(self.trainer) is None:
            return
        another: list[str] = []

        def look(content: Mapping[str, Any]) -> bool:
            if self._has_our_name(content):
                another.append(str(stored_dataset(content)))
            return False

        newest_checkpoint(folders, look, resumable=True)
        if another:
            raise UsageError(
                f"ckpt_path auto: the checkpoints under {folders[0]} are of dataset {another[0]!r}, this run learns "
                f"{self.datamodule.dataset!r}: give its logger another name, or ckpt_path auto:{folders[0]} to "
                "continue that run"
            )

    def _require_sharding(self, path: Path) -> None:
        if path.is_dir() and not _saves_by_itself(self.trainer.strategy):
            raise UsageError(
                f"ckpt_path {path} is sharded: give --trainer.strategy rewurst.callbacks.FSDP and any number of devices"
            )

    def _checked(self, path: str | None, safe: bool) -> dict[str, Any]:
        """Return a checkpoint that is whole and of this model: Lightning's own errors are pages long."""
        if path is None or not Path(path).exists():
            return {}
        if Path(path).is_dir():
            content = describe_checkpoint(Path(path))
        else:
            content = read_file(path) if safe else torch.load(path, map_location="cpu", weights_only=False)
        if "global_step" not in content:
            raise UsageError(
                f"{path} is not a Lightning checkpoint; for weights of other layouts use --model.init_from {path}"
            )
        if "optimizer_states" not in content:
            raise UsageError(
                f"{path} contains only weights, so there is no run to resume; pass it to --model.init_from {path}"
            )
        fit = getattr(self.model, "fit_to_checkpoint", None)
        if fit is not None:
            fit(content)
        own = self.model.state_dict()
        if own and self.model.strict_loading:
            check_weights(own, content["state_dict"], path)
        return content

    def _is_complete(self, path: str, content: dict[str, Any]) -> bool:
        """Return whether the same command finds its work done, which is not an error."""
        under_run = any(Path(path).is_relative_to(folder) for folder in checkpoint_folders(self.trainer))
        step, epochs = content.get("global_step", 0), _finished_epochs(content)
        another = stored_dataset(content) not in (None, getattr(self.datamodule, "dataset", None))
        if another or not under_run:  # then fit says what it needs
            return False
        max_steps, max_epochs = self.trainer.max_steps, self.trainer.max_epochs
        for at, name, limit in ((step, "step", max_steps), (epochs, "epoch", max_epochs or -1)):
            if 0 < limit <= at:
                what = f"{path} is at {name} {at} of max_{name}s {limit}"
                print(f"complete: {what}; use a larger --trainer.max_{name}s to train longer")
                return True
        return False


def _parsed_callback(settings: dict[str, Any]) -> Any:
    parser = Parser()
    parser.add_subclass_arguments(Callback, "it")
    return parser.parse_object({"it": settings}).it


def _on_rank_zero(kind: type[LightningModule], *args: Any, **kwargs: Any) -> LightningModule:
    with construct_on_rank_zero() as first:
        if not first and "init_from" in kwargs:
            kwargs["init_from"] = None  # values come from the first process, which has read them
        return kind(*args, **kwargs)


class _ParseOnly(CLI):
    def instantiate_classes(self) -> None:
        pass

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _saves_by_itself(strategy: Any) -> bool:
    """Sharded strategies write folders of their own kind and take no CheckpointIO."""
    named = strategy if isinstance(strategy, str) else type(strategy).__name__
    return bool(re.search("fsdp|deepspeed|model_?parallel", named, re.IGNORECASE))


def _with_atomic_checkpoints(plugins: Any) -> list[Any]:
    listed = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    return listed if any(isinstance(plugin, CheckpointIO) for plugin in listed) else [*listed, AtomicCheckpointIO()]


def _finished_epochs(content: Mapping[str, Any]) -> int:
    progress = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {})
    return int(progress.get("current", {}).get("processed", 0))


def _safe(weights_only: bool | None) -> bool:
    return True if weights_only is None else weights_only


def _check_yaml(args: list[str]) -> None:
    """Raise with the file and the line if a config is not valid YAML; the parser would skip the file."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        path = Path(option.removeprefix("--config=") if option.startswith("--config=") else value)
        if option.split("=")[0] in ("--config", "-c") and path.is_file():
            try:
                yaml.safe_load(path.read_text(encoding="utf8"))
            except yaml.YAMLError as error:
                raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


@contextmanager
def _lightning_errors() -> Iterator[None]:
    """Raise Lightning's own complaints about a configuration as errors of one line."""
    try:
        yield
    except MisconfigurationException as error:
        text = " ".join(str(error).split())
        hint = ": pass --trainer.accelerator cpu" if re.search("No supported .* backend found", text) else ""
        raise UsageError(text.rstrip(".!") + hint) from error
    except (ValueError, TypeError) as error:  # what instantiating a class raised, wrapped by the parser
        _raise_usage_error(error)
        raise


def _raise_usage_error(error: BaseException | None) -> None:
    """Raise the user's error that caused another one, if there is any."""
    while error is not None:
        if isinstance(error, UsageError):
            raise error
        error = error.__cause__ or error.__context__
