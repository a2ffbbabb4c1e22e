"""Base class of the networks: it records their arguments, builds presets, and reads and writes folders."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import torch
from torch import nn

from ... import UsageError
from . import lora, weight_files

Presets: TypeAlias = dict[str, dict[str, Any]]
"""Constructor arguments of each preset, by the preset's name."""


class Network(nn.Module):
    """A network that records the arguments it was built with.

    Subclasses pass all their arguments to ``super().__init__``. A saved network is a folder with ``config.json`` and
    ``diffusion_pytorch_model.safetensors``, in diffusers' format and with diffusers' names.
    """

    presets: ClassVar[Presets]
    diffusers_class: ClassVar[str]
    _no_split_modules: ClassVar[list[str]]
    lora: dict[str, float] | None = None
    """The result of :func:`.lora.add_lora`, if the network has adapters."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
        }

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> Self:
        """Build a network with new weights from a preset, with some of its arguments changed.

        Raises:
            UsageError: There is no preset or no argument of that name.
        """
        if preset not in cls.presets:
            raise UsageError(f"{cls.__name__} has no preset {preset!r}: choose one of {', '.join(cls.presets)}")
        return cls.from_config({**cls.presets[preset], **changes})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a network with new weights, skipping keys that start with an underscore (diffusers' metadata).

        Raises:
            UsageError: A key is not an argument of the class.
        """
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        known = inspect.signature(cls.__init__).parameters
        if unknown := sorted(set(arguments) - set(known)):
            raise UsageError(f"{cls.__name__} has no argument {unknown[0]!r}: it has {', '.join(list(known)[1:])}")
        return cls(**arguments)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Self:
        """Load a network, ready for inference, from a folder written by ``save`` or diffusers' ``save_pretrained``.

        Args:
            folder: Folder with ``config.json`` and the weights.
            dtype: Data type to convert the weights to (default: the type they are stored in).
            variant: Variant of the files to prefer, such as ``fp16``.

        Raises:
            UsageError: A file is missing, the folder contains a different network, or a weight is not finite.
        """
        path = Path(folder) / "config.json"
        config = weight_files.read_json(path)
        if config.get("_class_name", cls.diffusers_class) not in (cls.diffusers_class, cls.__name__):
            raise UsageError(f"{path} describes a {config['_class_name']}: {cls.__name__} needs {cls.diffusers_class}")
        return cls.from_weights(config, weight_files.read_folder(folder, variant), str(folder), dtype)

    @classmethod
    def from_checkpoint(cls, path: str | Path, dtype: torch.dtype | None = None) -> Self:
        """Load from a folder, a Lightning checkpoint of rewurst, the authors' file, or a file with only tensors.

        The "networks" entry of a Lightning checkpoint tells which attribute is which network (see ``describe``). If a
        file does not contain the arguments, the preset whose shapes fit is used.

        Raises:
            UsageError: The file cannot be read or does not contain this network.
        """
        if Path(path).is_dir() and not weight_files.is_one_file(path):
            return cls.from_folder(path, dtype)
        content = weight_files.read_file(path)
        if "networks" in content:
            for attribute, entry in content["networks"].items():
                if entry["class"] == cls.__name__:
                    prefix, state = f"{attribute}.", content["state_dict"]
                    own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
                    own = lora.merged(own, entry["lora"]) if "lora" in entry else own
                    return cls.from_weights(entry["config"], own, str(path), dtype)
            held = ", ".join(entry["class"] for entry in content["networks"].values())
            raise UsageError(f"{path} contains {held}: give a checkpoint with a {cls.__name__}")
        key = weight_files.AUTHORS_FILES.get(cls.__name__, "state_dict")
        nested = content.get(key, content.get("state_dict", content))
        tensors = {name: value for name, value in nested.items() if isinstance(value, torch.Tensor)}
        state = weight_files.from_authors(tensors)
        return cls.from_weights(cls._fitting_preset(state), state, str(path), dtype)

    @classmethod
    def _fitting_preset(cls, state: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """Return the preset that fits best: most tensors of the right shape, then fewest differing names."""

        def fitting(preset: str) -> tuple[int, int]:
            with torch.device("meta"):
                expected = cls.from_preset(preset).state_dict()
            alike = sum(name in state and state[name].shape == tensor.shape for name, tensor in expected.items())
            return alike, -len(expected.keys() ^ state.keys())

        return cls.presets[max(reversed(cls.presets), key=fitting)]

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        state: Mapping[str, torch.Tensor],
        where: str,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the network around given tensors, without initializing weights first, ready for inference.

        Raises:
            UsageError: Names, shapes or values do not fit. The message names their source, ``where``.
        """
        with torch.device("meta"):
            network = cls.from_config(config)
        weight_files.check(state, network.state_dict(), cls.__name__, where)
        network.load_state_dict(state, assign=True)
        return network.to(dtype=dtype).eval()

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and the weights in diffusers' format."""
        config = {"_class_name": self.diffusers_class, **self.config}
        state = self.state_dict()
        weight_files.write_folder(folder, config, state if self.lora is None else lora.merged(state, self.lora))

    def add_lora(self, settings: Mapping[str, Any]) -> None:
        """Freeze the network and add low-rank adapters, the only part to train; see :func:`.lora.add_lora`."""
        self.lora = lora.add_lora(self, settings)


def describe(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the class and arguments of each network in ``module``: the "networks" entry of a checkpoint."""
    return {
        name: {"class": type(child).__name__, "config": child.config} | ({"lora": child.lora} if child.lora else {})
        for name, child in module.named_children()
        if isinstance(child, Network)
    }


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile each block of ``_no_split_modules`` in place, so that blocks of equal shape share a compilation."""
    names = getattr(network, "_no_split_modules", [])
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(**options)


Settings: TypeAlias = str | dict[str, Any]
"""A preset's name, or a network's arguments. If "preset" is one of them, the others change that preset."""

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def build(network: type[AnyNetwork], settings: Settings) -> AnyNetwork:
    """Build a network with new weights from its settings in a config.

    Raises:
        UsageError: There is no preset or argument of that name.
    """
    if isinstance(settings, str):
        return network.from_preset(settings)
    arguments = dict(settings)
    preset = arguments.pop("preset", None)
    return network.from_config(arguments) if preset is None else network.from_preset(preset, **arguments)


def initialise(network: Network, path: str) -> None:
    """Load weights into a network from any format that ``Network.from_checkpoint`` reads.

    Raises:
        UsageError: The file contains a different network, or one of a different size.
    """
    state = type(network).from_checkpoint(path).state_dict()
    weight_files.check(state, network.state_dict(), type(network).__name__, path)
    network.load_state_dict(state)


def holds(path: str, network: type[Network]) -> bool:
    """Return whether a checkpoint file contains, possibly among others, a network of a class."""
    if not weight_files.is_one_file(path):
        return False
    content = weight_files.read_file(path)
    classes = [entry["class"] for entry in content.get("networks", {}).values()]
    return network.__name__ in classes or weight_files.AUTHORS_FILES.get(network.__name__, "networks") in content
