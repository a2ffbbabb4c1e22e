"""Recipes of language models match the papers' numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes import RECIPES, Parse, data, name, only, run_folder, schedule, share

from rewurst.callbacks import InfiniteCosine
from rewurst.datamodules.sampling.mixture import Mixture, RunningShare
from rewurst.modules.language.building import build

OF_PILE, OF_GERMAN, OF_SPLIT = 132_366, 88_458, 44_229
PEAK = "--trainer.callbacks.init_args.schedule.init_args"


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
        ("gupta/warmup_1", 106_148, 240e9, 0.001),
        ("ibrahim/chain_german_replay_25", OF_GERMAN, 200e9, 0.001),
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
    weights = source.new_weights()
    mixture = Mixture(source.global_batch_size, weights, {"pile": 1.0}, RunningShare(share(config)))
    length = schedule(config)[1]
    rows = mixture.read_before(length)
    assert rows.sum() == source.global_batch_size * length
    assert abs(rows[-1] - asked * rows.sum()) < 1 + 1e-6 * rows.sum()
    assert np.allclose(rows[:-1] / rows[:-1].sum(), np.array([*weights.values()]) / sum(weights.values()), atol=1e-6)


@pytest.mark.parametrize("recipe", ["ibrahim/slimpajama", "ibrahim/pile_slimpajama"])
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
    assert values.argmax() == (1_313 if recipe.startswith("gupta") else round(0.01 * length))
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
        extension = 0 if split == 3 else OF_SPLIT - 37_595
        assert ((only(config, "LRRewarming") or {})["constant_extension"] or 0) == extension
        first, end = bound.constant_phase(length)
        assert (first, end) == (26_537, 37_595)
        assert bound.value(round(0.01 * length), length) == 3e-4
        assert set(bound.value(np.arange(first, end + 1), length)) == {1.65e-4}
        assert bound.value(length, length) == 3e-5
        ends.append(config["trainer"]["max_steps"])
    assert ends == [OF_SPLIT, 2 * OF_SPLIT, 3 * OF_SPLIT], "all of each split is read"


def test_cosine_splits_are_rewarmed_over_the_same_tokens(parse: Parse) -> None:
    for split in (1, 2, 3):
        config = parse(f"ibrahim/cosine_split_{split}")
        bound, length = schedule(config)
        assert (length, config["trainer"]["max_steps"]) == (OF_SPLIT, split * OF_SPLIT)
        assert (bound.value(442, length), bound.value(length, length)) == (3e-4, 3e-5)


@pytest.mark.parametrize(("recipe", "steps"), [("0", 0), ("0.5", 656), ("1", 1_313), ("2", 2_626)])
def test_gupta_warmups(recipe: str, steps: int, parse: Parse) -> None:
    bound, length = schedule(parse(f"gupta/warmup_{recipe}"))
    values = bound.value(np.arange(length + 1), length)
    assert (values.argmax(), values.max(), values[-1]) == (steps, 3e-4, 3e-5)


@pytest.mark.parametrize("tokens", [100e9, 200e9, 240e9, 290e9])
def test_gupta_schedule_in_tokens(tokens: float, parse: Parse) -> None:
    """Warm-up over 1 % of 297B tokens, cosine to a tenth at 240B, constant afterwards (sections 2 and 4.2)."""
    config = parse("gupta/warmup_1")
    bound, length = schedule(config)
    step = round(tokens / (1104 * 2048))
    warmup, end = 0.01 * 297e9, 240e9
    expected = 3e-5
    if tokens < end:
        expected += (3e-4 - 3e-5) / 2 * (math.cos(math.pi * (tokens - warmup) / (end - warmup)) + 1)
    assert bound.value(step, length) == pytest.approx(expected, rel=1e-3)
    assert config["trainer"]["max_steps"] * 1104 * 2048 == pytest.approx(297e9, rel=1e-3)


@pytest.mark.parametrize("recipe", ["warmup_0", "warmup_0.5", "warmup_2", "from_10000", "from_27000", "pile"])
def test_gupta_compares_warm_ups_and_starts_at_50b_tokens(recipe: str, parse: Parse) -> None:
    assert parse(f"gupta/{recipe}")["trainer"]["max_steps"] * 1104 * 2048 == pytest.approx(50e9, rel=1e-4)


def test_gupta_samples_slimpajama_as_table_1_says(parse: Parse) -> None:
    assert data(parse("gupta/slimpajama")).new_weights() == {
        "commoncrawl": 67.0,
        "c4": 15.0,
        "github": 4.5,
        "wikipedia": 4.5,
        "book": 4.5,
        "arxiv": 2.5,
        "stackexchange": 2.0,
    }


def test_gupta_control_never_moves(parse: Parse) -> None:
    bound, length = schedule(parse("gupta/constant_3e-5"))
    assert set(bound.value(np.arange(0, length + 1, 1000), length)) == {3e-5}


@pytest.mark.parametrize(("step", "end"), [(10_000, 22_114), (27_000, 22_114), (143_000, 131_296)])
def test_gupta_starts_from_weights_only(step: int, end: int, parse: Parse) -> None:
    config = parse(f"gupta/from_{step}")
    assert config["model"]["init_args"]["init_from"].endswith(f"/step{step}")
    assert config["ckpt_path"] == "auto"
    assert config["trainer"]["max_steps"] == end
    assert run_folder(config) == f"runs/gupta/from_{step}/warmup_1"


def test_gupta_from_scratch_has_fresh_weights(parse: Parse) -> None:
    config = parse("gupta/from_scratch")
    assert config["model"]["init_args"].get("init_from") is None
    assert schedule(config)[0].numbers()["peak"] == 3e-4


def test_a_chain_of_three_replays_every_old_corpus(parse: Parse) -> None:
    config = parse("ibrahim/chain_german_replay_25")
    source = data(config)
    before = data(parse("ibrahim/slimpajama_replay_5"))
    assert set(source.replay_corpora) == set(before.corpora)
    assert {source.corpora[name].path for name in before.corpora} == {each.path for each in before.corpora.values()}
    assert {corpus.weight for corpus in source.corpora.values()} == {None}, "they weigh by what was learnt"


def test_gupta_crossed_on_the_command_line(parse: Parse) -> None:
    bound, _ = schedule(parse("gupta/warmup_2", f"{PEAK}.peak=6e-4", f"{PEAK}.minimum=6e-5"))
    assert bound.numbers() == {"peak": 6e-4, "minimum": 6e-5, "warmup": 0.02474}


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
