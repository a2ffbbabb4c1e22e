"""Every config parses with the command at its head, and the recipes contain the papers' numbers."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningArgumentParser
from recipes import (
    COMMAND,
    CONFIGS,
    PARTS,
    RECIPES,
    ROOT,
    Parse,
    assert_divides,
    command,
    data,
    name,
    run_folder,
    schedule,
    share,
)

from rewurst.callbacks import InfiniteCosine
from rewurst.cli.options.class_names import import_named


# The lengths of your_text follow from the text that it is given; test_your_text.py runs it.
@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "your_text"], ids=name)
def test_parses_as_its_head_says(path: Path, parse: Parse) -> None:
    assert any(word.endswith(str(path.relative_to(ROOT))) for word in command(path)), "its command leaves it out"
    config = parse(name(path))
    assert config["trainer"]["max_steps"] > 0
    schedule(config)
    if share(config):
        assert data(config).replay_corpora
    assert data(config).tokens_per_step > 0


@pytest.mark.parametrize("devices", [8, 64, 256])
def test_language_models_on_many_devices(devices: int, parse: Parse) -> None:
    assert_divides(parse(f"scale/gpus_{devices}"), devices)


@pytest.mark.parametrize("devices", [8, 64])
@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_stages_of_wuerstchen_on_many_devices(stage: str, devices: int, parser: LightningArgumentParser) -> None:
    head = (ROOT / "configs" / "wuerstchen" / "scale" / f"gpus_{devices}.yaml").read_text(encoding="utf8")
    [words] = [words for words in COMMAND.findall(head) if f"paper/{stage}.yaml" in words]
    import_named(shlex.split(words))
    config = parser.parse_args(["fit", *shlex.split(words)]).fit.as_dict()
    assert config["trainer"]["val_check_interval"] == 10_000 * assert_divides(config, devices)


def test_every_part_is_named_by_a_recipe() -> None:
    named = set()
    for path in RECIPES:
        for word in re.findall(r"[\w./-]+\.yaml", COMMAND.sub("", path.read_text(encoding="utf8"))):
            named.add((path.parent / word).resolve())
    assert set(PARTS) <= named


def test_every_folder_of_configs_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]
    folders = {".".join(["rewurst", *path.parent.relative_to(ROOT).parts]) for path in CONFIGS}
    assert folders <= set(setuptools["packages"])
    assert folders <= {folder for folder, patterns in setuptools["package-data"].items() if "*.yaml" in patterns}


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "configs" / "continual" / "README.md").read_text(encoding="utf8")
    files = re.findall(r"[`,]((?:models|ibrahim|gupta|pythia_70m)/[\w.-]+)(?=[`,])", readme)
    assert len(set(files)) > 10
    for file in files:
        assert (ROOT / "configs" / "continual" / f"{file}.yaml").is_file(), file
    for folder in ("models", "ibrahim", "gupta", "pythia_70m"):
        for path in (ROOT / "configs" / "continual" / folder).glob("*.yaml"):
            assert path.stem.rpartition("_")[2] in readme, path


def test_runs_go_to_folders_of_their_own(parse: Parse) -> None:
    alone = [path for path in RECIPES if path.parent.name in ("ibrahim", "pythia_70m") and path.stem != "one_gpu"]
    grid = [path for path in RECIPES if path.parent.name == "gupta" and path.stem.startswith(("w", "peak", "constant"))]
    folders = [run_folder(parse(name(path))) for path in [*alone, *grid]]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_begins_at_the_last_step_of_the_run_before(path: Path, parse: Parse) -> None:
    config = parse(name(path))
    _, before = config["ckpt_path"].split(":") if ":" in config["ckpt_path"] else ("", None)
    if before is None or path.stem.startswith("demo"):
        return
    earlier = parse(before.removeprefix("runs/"))
    assert run_folder(earlier) == before
    assert earlier["data"]["init_args"]["dataset"] != config["data"]["init_args"]["dataset"]
    assert earlier["model"] == config["model"]
    steps = config["trainer"]["max_steps"] - earlier["trainer"]["max_steps"]
    bound, length = schedule(config)
    assert steps == length or (isinstance(bound, InfiniteCosine) and steps == bound.constant_phase(length)[1])
