"""Run the fenced blocks of a page: its commands, the files it writes and its Python, in the working directory."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from rewurst.train import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(bash|yaml|python)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF$", re.MULTILINE | re.DOTALL)
Changes = list[tuple[str, str]]


def run_blocks(text: str, changes: Changes) -> list[str]:
    """Run the blocks of a Markdown text in order and return its commands.

    Args:
        text: Markdown. Blocks of other languages than bash, yaml and python are for reading only.
        changes: Pairs of a text that must occur and its replacement, which make the blocks small.
    """
    for large, small in changes:
        assert large in text, f"{large!r} does not occur"
        text = text.replace(large, small)
    commands = []
    for language, title, body in BLOCK.findall(text):
        if language == "yaml":
            assert title, "a config on a page needs a title, the file to save it in"
            yaml.safe_load(body)
            Path(title).write_text(body, encoding="utf8")
        elif language == "python":
            exec(compile(body, "page.py", "exec"), {"__name__": "page"})
        else:
            commands += _run_commands(body)
    return commands


def _run_commands(body: str) -> list[str]:
    """Write the files of a bash block, then run its commands in this process."""
    for name, content in FILE.findall(body):
        Path(name).write_text(content, encoding="utf8")
    commands = [line for line in FILE.sub("", body).replace("\\\n", " ").splitlines() if line.strip()]
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "rewurst"
        assert main(arguments) == 0, command
    return commands


def write_small_recipes(family: str) -> None:
    """Write Würstchen's recipes of a family under the working directory, with few steps, samples and channels."""
    recipes = Path("configs/wuerstchen") / family
    recipes.mkdir(parents=True)
    for stage, smaller in (
        ("stage_a", {"vqgan": {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 16}}),
        ("stage_b", {"sampling_steps": 2}),
        ("stage_c", {"sampling_steps": 2, "stage_b_steps": 2}),
    ):
        content = yaml.safe_load((ROOT / recipes / f"{stage}.yaml").read_text(encoding="utf8"))
        content["model"]["init_args"] |= smaller
        content["data"]["init_args"] |= {"micro_batch_size": 4, "global_batch_size": 4}
        content["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
        arguments = {callback["class_path"]: callback.get("init_args") for callback in content["trainer"]["callbacks"]}
        arguments["LogSamples"]["samples"] = 1
        (recipes / f"{stage}.yaml").write_text(yaml.safe_dump(content), encoding="utf8")
