"""LightningCLI over every module and data module, with errors of one line and runs that go on by themselves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info

from .. import UsageError
from ..callbacks import AtomicCheckpointIO, StepProgressBar, construct_on_rank_zero
from ..checkpoints.newest import newest_checkpoint, remove_leftovers
from ..checkpoints.sharded_files import is_sharded
from ..checkpoints.sharded_reading import describe_checkpoint
from ..datamodules import text as _text  # noqa: F401  # imported so that YAML may name the classes without a path
from ..modules import causal_lm as _causal_lm  # noqa: F401
from ..modules.language.initial_weights import check_weights
from ..modules.networks.weight_files import read_file
from .class_names import import_named, with_public_paths
from .error_messages import one_line
from .shipped_configs import with_shipped_configs
from .short_options import add_short_options, apply_short_options


def run(args: list[str]) -> None:
    """Runs ``fit``, ``validate``, ``test`` or ``predict`` with the rest of a command line."""
    args = with_shipped_configs(args)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any; nothing changes on a CPU
    for what in _SAID_ALREADY:
        warnings.filterwarnings("ignore", message=what)
    _check_yaml(args)
    import_named(args)
    with _lightning_errors():
        CLI([with_public_paths(arg) for arg in args])


def parse(args: list[str]) -> dict[str, Any]:
    """The config that a command line means; nothing is made of it."""
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
    "The dirpath has changed",  # a run that goes on has a new version_N, on purpose
    ".*LeafSpec.*deprecated",  # Lightning's own use of torch
)


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: _load_yaml(with_public_paths(text)), (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises instead of printing usage and 60 lines of tried alternatives."""
        _raise_usage_error(ex)
        raise UsageError(one_line(message, self)) from ex


class SaveConfig(SaveConfigCallback):
    """Saves the config in the logger's folder. Without a logger that would be the working directory, over any file."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves it once."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI whose ``ckpt_path`` may be ``auto``, and which loads checkpoints without executing anything.

    ``auto`` is the newest whole checkpoint under the run's folder, and nothing where there is none yet;
    ``auto:FOLDER`` falls back on the newest one under another folder, the run that this one continues.
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
        """Adds what is ours."""
        add_short_options(parser)
        parser.add_argument(
            "--construct_on_rank_zero",
            type=bool,
            default=False,
            help="build the module with memory in the first process alone; the strategy FSDP hands its values out",
        )

    def before_instantiate_classes(self) -> None:
        """Applies the short options, and has modules built where there is memory for them."""
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
        """Parses the given arguments; the process's own do not matter when ``main`` is called in process."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyper-parameters win over the YAML."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Adds a progress bar that counts steps, unless the config has one or wants none."""
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in own):
            callbacks = [*callbacks, StepProgressBar()]
        if not _saves_by_itself(config.get("strategy")):
            config["plugins"] = _with_atomic_checkpoints(config.get("plugins"))
        return super()._instantiate_trainer(config, callbacks)

    def fit(self, ckpt_path: str | None = None, weights_only: bool | None = None, **kwargs: Any) -> None:
        """``Trainer.fit`` from the checkpoint that ``ckpt_path`` means."""
        path = self._resolve(ckpt_path, must_exist=False)
        safe = _safe(weights_only)
        content = self._checked(path, safe)
        if path is not None and str(ckpt_path).startswith("auto"):
            rank_zero_info(f"going on from {path}")
            if self._is_complete(path, content):
                return
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
        folders = _run_folders(self.trainer)
        if self.trainer.is_global_zero and not must_exist:
            remove_leftovers(folders)
        newest = newest_checkpoint(folders)
        other = ckpt_path.removeprefix("auto").removeprefix(":")
        if newest is None and other:
            folders = [Path(other)]
            newest = newest_checkpoint(folders)
        if newest is None and (must_exist or other):
            raise UsageError(f"ckpt_path {ckpt_path}: there is no whole checkpoint under {folders[0]}")
        if newest is not None:
            self._require_sharding(newest)
        return None if newest is None else str(newest)

    def _require_sharding(self, path: Path) -> None:
        if path.is_dir() and not _saves_by_itself(self.trainer.strategy):
            raise UsageError(
                f"ckpt_path {path} is sharded: give --trainer.strategy rewurst.callbacks.FSDP and any number of devices"
            )

    def _checked(self, path: str | None, safe: bool) -> dict[str, Any]:
        """A checkpoint that is whole, Lightning's, and this model's: Lightning's own errors are pages long."""
        if path is None or not Path(path).exists():
            return {}
        if Path(path).is_dir():
            content = describe_checkpoint(Path(path))
        else:
            content = read_file(path) if safe else torch.load(path, map_location="cpu", weights_only=False)
        if "global_step" not in content:
            raise UsageError(f"{path} is no Lightning checkpoint; weights of other layouts: --model.init_from {path}")
        if "optimizer_states" not in content:
            raise UsageError(f"{path} holds weights only, no run to go on: begin with them by --model.init_from {path}")
        own = self.model.state_dict()
        if own and self.model.strict_loading:
            check_weights(own, content["state_dict"], path)
        return content

    def _is_complete(self, path: str, content: dict[str, Any]) -> bool:
        """Whether typing the same command again finds its work done, which is no error."""
        under_run = any(Path(path).is_relative_to(folder) for folder in _run_folders(self.trainer))
        step, data = content.get("global_step", 0), content.get(type(self.datamodule).__qualname__, {})
        another = data.get("dataset") != getattr(self.datamodule, "dataset", None)  # then fit says what it needs
        if another or not under_run or not 0 < self.trainer.max_steps <= step:
            return False
        print(
            f"complete: {path} is at step {step} of max_steps {self.trainer.max_steps}; "
            "a larger --trainer.max_steps goes on"
        )
        return True


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


def _run_folders(trainer: Trainer) -> list[Path]:
    """Where this run's checkpoints lie: its loggers' folders over all versions, and explicit folders of callbacks."""
    folders = [_logger_folder(logger) for logger in trainer.loggers]
    explicit = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders += [Path(str(folder)) for folder in explicit if folder]
    return folders or [Path(trainer.default_root_dir) / "checkpoints"]  # where Lightning saves without a logger


def _logger_folder(logger: Logger) -> Path:
    root = getattr(logger, "root_dir", None)
    return Path(str(root)) if root else Path(str(logger.save_dir)) / str(logger.name)


def _safe(weights_only: bool | None) -> bool:
    return True if weights_only is None else weights_only


def _check_yaml(args: list[str]) -> None:
    """Names the file and the line where a config is no YAML; the parser would leave the file out."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        path = Path(option.removeprefix("--config=") if option.startswith("--config=") else value)
        if option.split("=")[0] in ("--config", "-c") and path.is_file():
            try:
                yaml.safe_load(path.read_text(encoding="utf8"))
            except yaml.YAMLError as error:
                raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


@contextmanager
def _lightning_errors() -> Iterator[None]:
    """What Lightning finds wrong with a configuration is the user's to put right as well."""
    try:
        yield
    except MisconfigurationException as error:
        raise UsageError(" ".join(str(error).split())) from error
    except (ValueError, TypeError) as error:  # what instantiating a class raised, wrapped by the parser
        _raise_usage_error(error)
        raise


def _raise_usage_error(error: BaseException | None) -> None:
    """Raises the user's error that lies beneath another one, if there is any."""
    while error is not None:
        if isinstance(error, UsageError):
            raise error
        error = error.__cause__ or error.__context__
