"""Commands next to LightningCLI's: what each one runs, and what it says at the end."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from .. import UsageError
from ..hints import closest
from .parser import call


class Tool(NamedTuple):
    """A command.

    Attributes:
        function: Module and function behind it, ``module:function`` below ``rewurst``; imported when it runs.
        positional: Parameters that are given by position; all others are options.
        summary: One line for the list of commands.
        report: Text to print, from the result and the arguments (default: the result, if it is text).
    """

    function: str
    positional: tuple[str, ...]
    summary: str
    report: Callable[[Any, dict[str, Any]], str] | None = None


TOOLS = {
    "prepare": {
        "tokenizer": Tool("cli.prepare:tokenizer", ("sources",), "train a byte-level BPE tokenizer"),
        "text": Tool("preparation.text:prepare_text", ("sources",), "tokenize text into shards"),
        "images": Tool("preparation.images:prepare_images", ("sources",), "put captioned images into shards"),
        "latents": Tool("preparation.latents:prepare_latents", ("source",), "encode images once, for training"),
        "index": Tool("cli.prepare:index", ("shards",), "index tar shards that are there already"),
        "verify": Tool("cli.prepare:verify", ("folder",), "compare shards with their index"),
    },
    "export": {
        "hf": Tool(
            "modules.language.hugging_face:export_hugging_face",
            ("checkpoint", "out"),
            "write a checkpoint as a Hugging Face folder",
            lambda _, given: f"{given['out']}: load it with AutoModelForCausalLM.from_pretrained",
        ),
        "weights": Tool(
            "checkpoints.sharded_writing:consolidate",
            ("path", "out"),
            "write a checkpoint's weights as one safetensors file",
            lambda count, given: f"{given['out']}: {count} tensors",
        ),
        "diffusers": Tool(
            "modules.pipeline.export:export_diffusers",
            ("out",),
            "write a cascade as folders that diffusers loads",
            lambda _, given: f"{given['out']}: its README.md says how to load it",
        ),
        "lora": Tool(
            "modules.pipeline.lora:export_lora",
            ("checkpoint", "out"),
            "write Stage C's LoRA adapters for diffusers",
            lambda count, given: f"{given['out']}: {count} layers; load it with load_lora_weights of diffusers",
        ),
    },
    "generate": {
        "text": Tool("modules.language.generation:generate_text", ("folder", "prompt"), "continue a prompt"),
        "image": Tool("cli.generate:image", ("folder", "prompt"), "draw pictures for a prompt"),
        "reconstruction": Tool(
            "cli.generate:reconstruction", ("folder", "image"), "show an image next to what the stages make of it"
        ),
    },
    "evaluate": {"": Tool("cli.evaluate:evaluate", ("folder",), "measure a language model or a cascade")},
    "reproduce": {
        "continual": Tool("reproduce.command:continual", (), "run the continual pre-training papers' experiments"),
        "wuerstchen": Tool("reproduce.command:wuerstchen", (), "compare the cascade with a single stage"),
    },
}


def run(args: list[str]) -> None:
    """Run a tool's command line."""
    group, *rest = args
    tools = TOOLS[group]
    if "" not in tools:
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: rewurst {group} COMMAND [--help] ...\n\n{listing(group)}")
            if not rest:
                raise UsageError(f"choose one of {', '.join(tools)}")
            return
        if rest[0] not in tools:
            raise UsageError(f"no command {rest[0]!r}{closest(rest[0], tools) or '; there are ' + ', '.join(tools)}")
    name = "" if "" in tools else rest.pop(0)
    tool = tools[name]
    module, _, function = tool.function.partition(":")
    found = getattr(import_module(f"rewurst.{module}"), function)
    result, given = call(found, rest, f"rewurst {group} {name}".strip(), tool.positional)
    if tool.report is not None:
        print(tool.report(result, given))
    elif isinstance(result, str):
        print(result)


def listing(group: str) -> str:
    """Return the commands of a group, one per line."""
    commands = {f"{group} {name}".strip(): tool.summary for name, tool in TOOLS[group].items()}
    return "\n".join(f"  {command:<26}{text}" for command, text in commands.items())
