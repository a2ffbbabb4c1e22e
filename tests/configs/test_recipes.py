"""Every config parses as the command at its head composes it, and the recipes hold the papers' numbers."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from rewurst import callbacks
from rewurst.callbacks import FSDP, InfiniteCosine, LRRewarming, ReplayScheduler, Schedule
from rewurst.callbacks.learning_rate.lengths import in_steps
from rewurst.cli import lightning as cli
from rewurst.cli.class_names import import_named
from rewurst.datamodules.sampling.mixture import Mixture, RunningShare
from rewurst.datamodules.text import Corpus, TextDataModule
from rewurst.modules.language.building import build

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMAND = re.compile(r"^# (?:by hand: )?rewurst fit (.+)$", re.MULTILINE)
PART = re.compile(r"\A(?:#.*\n)*class_path:")  # a file that recipes name in the place of a class
PEAK = "--trainer.callbacks.init_args.schedule.init_args"
OF_PILE, OF_GERMAN, OF_SPLIT = 132_366, 88_458, 44_229

Config = dict[str, Any]
Parse = Callable[..., Config]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs" / "continual").with_suffix(""))


def command(path: Path) -> list[str]:
    """The words behind ``rewurst``, with braces expanded as bash does."""
    match = COMMAND.search(path.read_text(encoding="utf8"))
    assert match is not None, f"{path} names no command in its head"
    words = []
    for word in shlex.split(match[1]):
        before, brace, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        words += [f"{before}{choice}{after}" for choice in inside.split(",")] if brace else [word]
    return ["fit", *words]


PARTS = [path for path in CONFIGS if PART.match(path.read_text(encoding="utf8"))]
OF_IMAGES = [path for path in CONFIGS if "wuerstchen" in path.parts]  # tested beside their modules
RECIPES = [path for path in CONFIGS if path not in PARTS and path not in OF_IMAGES]


class Built(Exception):  # noqa: N818  # no error
    """Carries the parser out of the command line."""


@pytest.fixture(scope="module")
def parser() -> Iterator[LightningArgumentParser]:
    """The command line's own parser, built once."""

    def carry_out(self: cli.CLI, parser: LightningArgumentParser, args: Any) -> None:
        raise Built(parser)

    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(cli.CLI, "parse_arguments", carry_out)
        with pytest.raises(Built) as built:
            cli.run(["fit"])
        yield built.value.args[0]
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def parse(parser: LightningArgumentParser) -> Parse:
    """Parses the command of a config."""
    known: dict[tuple[str, ...], Config] = {}

    def parse(recipe: str, *more: str) -> Config:
        if (recipe, *more) not in known:
            args = [*command(ROOT / "configs" / "continual" / f"{recipe}.yaml"), *more]
            known[recipe, *more] = parser.parse_args(args).fit.as_dict()
        return known[recipe, *more]

    return parse


def only(config: Config, class_name: str) -> Config | None:
    """Arguments of the callback of a class."""
    found = [c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{class_name}")]
    assert len(found) <= 1
    return found[0] if found else None


def schedule(config: Config) -> tuple[Schedule, int]:
    """The learning rate's schedule and length, as the callback gets them."""
    arguments = only(config, "LRRewarming")
    assert arguments is not None
    bound = arguments["schedule"]
    cls = getattr(callbacks, bound["class_path"].rpartition(".")[2])
    result: Schedule = cls(**bound["init_args"])
    LRRewarming(**{**arguments, "schedule": result})
    return result, in_steps(arguments["length"], None)


def data(config: Config) -> TextDataModule:
    arguments = config["data"]["init_args"]
    corpora = {key: Corpus(**value) for key, value in arguments["corpora"].items()}
    return TextDataModule(**{**arguments, "corpora": corpora})


def share(config: Config) -> float:
    arguments = only(config, "ReplayScheduler")
    if arguments is None:
        return 0.0
    ReplayScheduler(**arguments)
    return float(arguments["share"])


def run_folder(config: Config) -> str:
    logger = config["trainer"]["logger"]["init_args"]
    return f"{logger['save_dir']}/{logger['name']}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
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


def assert_divides(config: Config, devices: int) -> int:
    """Shards over so many devices, whose micro-batches make up the global batch; how many each takes for it."""
    trainer, source = config["trainer"], config["data"]["init_args"]
    assert trainer["devices"] * trainer["num_nodes"] == devices
    strategy = trainer["strategy"]
    assert "FSDP" in str(strategy)
    built = FSDP(**({} if isinstance(strategy, str) else strategy["init_args"]))
    replicas = trainer["num_nodes"] if built.replicas == "nodes" else built.replicas
    assert devices % replicas == 0
    accumulation, rest = divmod(source["global_batch_size"], devices * source["micro_batch_size"])
    assert rest == 0
    return accumulation


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


@pytest.mark.parametrize(
    ("model", "parameters", "digits"),
    [
        ("pythia_70m", 70.4e6, 1e5),
        ("pythia_160m", 162.3e6, 1e5),
        ("pythia_410m", 405.3e6, 1e5),
        ("neox_10b", 9.6e9, 1e8),
    ],
)
def test_published_parameter_counts(model: str, parameters: float, digits: float, parse: Parse) -> None:
    settings = parse(f"models/{model}")["model"]["init_args"]["model"]
    with torch.device("meta"):
        network = build(settings)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count - parameters) <= digits / 2
    head = settings["hidden_size"] // settings["num_attention_heads"]
    assert network.gpt_neox.rotary_emb.inv_freq.shape == (head // 4 // 2,)  # type: ignore[union-attr]


def test_pile_has_the_check_values(parse: Parse) -> None:
    config = parse("ibrahim/pile")
    bound, length = schedule(config)
    assert length == config["trainer"]["max_steps"] == OF_PILE
    warmup = round(0.01 * length)
    assert warmup == 1_324
    assert bound.value(warmup, length) == 3e-4
    assert bound.value(warmup // 2, length) == pytest.approx(1.5e-4, rel=1e-12)
    assert bound.value(warmup + (length - warmup) // 2, length) == pytest.approx(1.65e-4, rel=1e-12)
    assert bound.value(length, length) == 3e-5


def test_batches_are_the_papers(parse: Parse) -> None:
    for recipe in ("ibrahim/pile", "ibrahim/10b_pile", "ibrahim/german_replay_25", "gupta/warmup_1"):
        assert data(parse(recipe)).tokens_per_step == 1104 * 2048 == 2_260_992


@pytest.mark.parametrize(
    ("recipe", "steps", "tokens", "within"),
    [
        ("ibrahim/pile", OF_PILE, 300e9, 0.003),  # 299.3B: the papers round
        ("ibrahim/slimpajama", OF_PILE, 299e9, 0.001),
        ("ibrahim/pile_slimpajama", 264_732, 598.6e9, 0.001),
        ("ibrahim/german", OF_GERMAN, 200e9, 0.001),
        ("ibrahim/infinite_cosine_split_3", OF_SPLIT, 100e9, 0.001),
        ("gupta/warmup_1", 131_296, 297e9, 0.001),
        ("pythia_70m/pile", 5_300, 3e9, 0.002),
    ],
)
def test_lengths_are_so_many_tokens(recipe: str, steps: int, tokens: float, within: float, parse: Parse) -> None:
    config = parse(recipe)
    assert schedule(config)[1] == steps
    assert steps * data(config).tokens_per_step == pytest.approx(tokens, rel=within)


@pytest.mark.parametrize(
    ("recipe", "asked"),
    [
        *((f"ibrahim/slimpajama{tail}", s) for tail, s in [("", 0), ("_replay_0.5", 0.005), ("_replay_1", 0.01)]),
        *((f"ibrahim/slimpajama_replay_{s}", s / 100) for s in (5, 10, 50)),
        *((f"ibrahim/german_replay_{s}", s / 100) for s in (1, 5, 10, 25, 50)),
        ("ibrahim/german", 0),
        ("ibrahim/10b_slimpajama", 0),
        ("ibrahim/10b_slimpajama_replay_5", 0.05),
        ("pythia_70m/slimpajama_replay_5", 0.05),
        ("pythia_70m/german_replay_25", 0.25),
    ],
)
def test_replay_is_compute_equivalent(recipe: str, asked: float, parse: Parse) -> None:
    config = parse(recipe)
    source = data(config)
    assert share(config) == asked
    assert source.replay_corpora == ["pile"]
    weights = {key: corpus.weight for key, corpus in source.corpora.items() if not corpus.replay}
    mixture = Mixture(source.global_batch_size, weights, {"pile": 1.0}, RunningShare(share(config)))
    length = schedule(config)[1]
    rows = mixture.read_before(length)
    assert rows.sum() == source.global_batch_size * length
    assert abs(rows[-1] - asked * rows.sum()) < 1 + 1e-6 * rows.sum()
    assert np.allclose(rows[:-1] / rows[:-1].sum(), np.array([*weights.values()]) / sum(weights.values()), atol=1e-6)


@pytest.mark.parametrize("recipe", ["ibrahim/slimpajama", "ibrahim/pile_slimpajama", "gupta/warmup_1"])
def test_seven_domains(recipe: str, parse: Parse) -> None:
    weights = {key: corpus.weight for key, corpus in data(parse(recipe)).corpora.items() if key != "pile"}
    assert weights == {
        "commoncrawl": 52.09,
        "c4": 26.69,
        "github": 5.22,
        "arxiv": 4.43,
        "book": 4.20,
        "wikipedia": 4.00,
        "stackexchange": 3.37,
    }


def test_both_at_once_weigh_as_their_tokens(parse: Parse) -> None:
    for recipe, of_pile in (("ibrahim/pile_slimpajama", 0.5), ("ibrahim/pile_german", 0.6)):
        weights = {key: corpus.weight for key, corpus in data(parse(recipe)).corpora.items()}
        assert weights["pile"] / sum(weights.values()) == pytest.approx(of_pile, rel=1e-12)


@pytest.mark.parametrize(
    ("recipe", "peak"),
    [
        ("ibrahim/slimpajama_peak_1.5e-4", 1.5e-4),
        ("ibrahim/slimpajama", 3e-4),
        ("ibrahim/slimpajama_peak_6e-4", 6e-4),
        ("ibrahim/10b_pile", 1.2e-4),
        ("ibrahim/10b_slimpajama_replay_5", 1.2e-4),
        ("ibrahim/10b_pile_slimpajama", 1.2e-4),
        ("gupta/peak_1.5e-4", 1.5e-4),
        ("gupta/peak_6e-4", 6e-4),
    ],
)
def test_peaks_and_a_tenth_of_them(recipe: str, peak: float, parse: Parse) -> None:
    bound, length = schedule(parse(recipe))
    values = bound.value(np.arange(length + 1), length)
    assert values.max() == peak
    assert values.argmax() == round(0.01 * length)
    assert values[-1] == pytest.approx(peak / 10, rel=1e-12)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name in ("ibrahim", "pythia_70m")], ids=name)
def test_peak_is_the_models_unless_the_name_says_another(path: Path, parse: Parse) -> None:
    usual = 1e-3 if path.parent.name == "pythia_70m" else 1.2e-4 if path.stem.startswith("10b") else 3e-4
    named = re.search(r"_peak_(.+)", path.stem)
    numbers = schedule(parse(name(path)))[0].numbers()
    assert numbers["peak"] == (float(named[1]) if named else usual)
    assert numbers["warmup"] == 0.01


@pytest.mark.parametrize("kind", ["cosine", "inverse_sqrt"])
def test_infinite_splits_follow_one_another_in_the_constant_phase(kind: str, parse: Parse) -> None:
    ends = []
    for split in (1, 2, 3):
        config = parse(f"ibrahim/infinite_{kind}_split_{split}")
        bound, length = schedule(config)
        assert isinstance(bound, InfiniteCosine)
        assert length == OF_SPLIT
        first, end = bound.constant_phase(length)
        assert (first, end) == (26_537, 37_595)
        assert bound.value(round(0.01 * length), length) == 3e-4
        assert set(bound.value(np.arange(first, end + 1), length)) == {1.65e-4}
        assert bound.value(length, length) == 3e-5
        ends.append(config["trainer"]["max_steps"])
    assert ends == [37_595, 75_190, 75_190 + OF_SPLIT]


@pytest.mark.parametrize(("recipe", "steps"), [("0", 0), ("0.5", 656), ("1", 1_313), ("2", 2_626)])
def test_gupta_warmups(recipe: str, steps: int, parse: Parse) -> None:
    bound, length = schedule(parse(f"gupta/warmup_{recipe}"))
    values = bound.value(np.arange(length + 1), length)
    assert (values.argmax(), values.max(), values[-1]) == (steps, 3e-4, 3e-5)


@pytest.mark.parametrize("level", ["3e-5", "3e-4"])
def test_gupta_controls_never_move(level: str, parse: Parse) -> None:
    bound, length = schedule(parse(f"gupta/constant_{level}"))
    assert set(bound.value(np.arange(0, length + 1, 1000), length)) == {float(level)}


@pytest.mark.parametrize("step", [10_000, 27_000, 143_000])
def test_gupta_starts_from_weights_alone(step: int, parse: Parse) -> None:
    config = parse(f"gupta/from_{step}")
    assert config["model"]["init_args"]["init_from"].endswith(f"/step{step}")
    assert config["ckpt_path"] == "auto"
    assert schedule(config)[1] == config["trainer"]["max_steps"] == 131_296
    assert run_folder(config) == f"runs/gupta/from_{step}/warmup_1"


def test_gupta_crossed_on_the_command_line(parse: Parse) -> None:
    bound, _ = schedule(parse("gupta/warmup_2", f"{PEAK}.peak=6e-4", f"{PEAK}.minimum=6e-5"))
    assert bound.numbers() == {"peak": 6e-4, "minimum": 6e-5, "warmup": 0.02}


def test_one_gpu_takes_a_day(parse: Parse) -> None:
    config = parse("pythia_70m/slimpajama_replay_5")
    source = data(config)
    assert config["trainer"]["devices"] == 1
    assert source.global_batch_size * 4 == data(parse("ibrahim/pile")).global_batch_size
    settings = config["model"]["init_args"]["model"]
    layers, width = settings["num_hidden_layers"], settings["hidden_size"]
    flops = 6 * 70.4e6 + 12 * layers * width * source.sequence_length
    hours = 3 * 5_300 * source.tokens_per_step / (0.2 * 312e12 / flops) / 3600
    assert 18 < hours < 24


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_batches_divide_over_devices(devices: int, parse: Parse) -> None:
    for recipe in ("ibrahim/pile", "gupta/warmup_1", *(["pythia_70m/pile"] if devices == 1 else [])):
        source = data(parse(recipe))
        rows = source.micro_batch_size * devices
        assert source.global_batch_size % rows == 0
        if devices == 8 or recipe == "pythia_70m/pile":
            interval = parse(recipe)["trainer"]["val_check_interval"]
            assert interval % (source.global_batch_size // rows) == 0  # validates where a step ends
