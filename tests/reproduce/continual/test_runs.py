"""The grid is complete and well formed, and a run's key changes only with what decides its outcome."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewurst.cli.lightning import parse
from rewurst.reproduce.configs import Config, load, merge, write_config
from rewurst.reproduce.continual.corpora import Data, of_recipe
from rewurst.reproduce.continual.jobs import RunJob, config_key, interval, make_jobs
from rewurst.reproduce.continual.runs import (
    PEAKS,
    SHARES,
    WARMUPS,
    grid,
    peak_name,
    replay_name,
    total_steps,
    warmup_name,
)
from rewurst.reproduce.continual.scales import CONFIGS, SCALES, Scale, base_config


def test_every_question_of_the_papers_has_its_runs() -> None:
    runs = {run.name: run for run in grid(100, 50, 1e-3)}
    asked = {"old", "constant", "new_from_scratch", "both_from_scratch", "again_peak_1", "again_peak_2"}
    asked |= (
        {replay_name(share) for share in (0.0, *SHARES)} | set(map(warmup_name, WARMUPS)) | set(map(peak_name, PEAKS))
    )
    chains = ("cosine", "infinite_cosine", "infinite_inverse_sqrt")
    asked |= {f"{chain}_split_{split}" for chain in chains for split in (1, 2, 3)}
    assert set(runs) == asked
    assert {run.share for run in runs.values()} == {0.0, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5}
    assert total_steps(runs["both_from_scratch"], runs) == total_steps(runs["replay_5"], runs) == 200
    assert {total_steps(runs[f"{chain}_split_3"], runs) for chain in chains} == {150}


def test_a_run_comes_after_the_one_it_continues_and_none_occurs_twice() -> None:
    runs = grid(100, 50, 1e-3)
    place = {run.name: index for index, run in enumerate(runs)}
    assert len(place) == len(runs)
    assert all(place[run.parent] < place[run.name] for run in runs if run.parent)
    what = Counter(str((run.content, run.parent, run.share, run.schedule, run.steps)) for run in runs)
    assert max(what.values()) == 1


@pytest.mark.parametrize("name", SCALES)
def test_the_end_of_every_run_is_validated(name: str) -> None:
    scale = SCALES[name]
    for run in grid(scale.steps, scale.split_steps, scale.peak):
        every = interval(run.steps, scale.every)
        assert run.steps % every == 0
        assert scale.every / 2 < every < scale.every * 2


def test_configs_parse_and_continue_one_another(jobs: list[RunJob]) -> None:
    seed = [job for job in jobs if job.seed == 1]
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in (seed[0], seed[2], seed[-1], next(job for job in seed if job.run.extension)):
        config = parse(["fit", "--config", str(write_config(job.folder, job.config))])
        assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 1
        assert config["trainer"]["max_steps"] == job.steps
        assert config["trainer"]["val_check_interval"] == 10
        assert config["ckpt_path"] == (f"auto:{job.parent.folder}" if job.parent else "auto")
        names = [callback["class_path"].split(".")[-1] for callback in config["trainer"]["callbacks"]]
        assert ("ReplayScheduler" in names) == bool(job.run.share)
        assert names.count("LRRewarming") == 1


def test_paper_scales_use_the_papers_recipes() -> None:
    scale = SCALES["405m"]
    data, config = of_recipe(scale), base_config(scale)
    assert list(data.old) == ["pile"]
    assert len(data.new) == 7
    assert data.val == {"pile": "data/pile/val", "slimpajama": "data/slimpajama/val/train"}
    assert [list(split) for split in data.splits] == [["split_1"], ["split_2"], ["split_3"]]
    assert (
        config["data"]["init_args"]["global_batch_size"] * config["data"]["init_args"]["sequence_length"] == 2_260_992
    )
    published = load(CONFIGS / "ibrahim" / "slimpajama_replay_5.yaml")
    base = next(run for run in grid(scale.steps, scale.split_steps, scale.peak) if run.name == "replay_5")
    assert published["trainer"]["max_steps"] == 2 * base.steps
    peak = load(CONFIGS / "ibrahim" / "schedules" / "peak_3e-4.yaml")
    assert peak["class_path"] == base.schedule["class_path"]
    assert peak["init_args"] == pytest.approx(base.schedule["init_args"])
    infinite = next(run for run in grid(scale.steps, scale.split_steps, scale.peak) if "infinite_cosine" in run.name)
    phases = load(CONFIGS / "ibrahim" / "schedules" / "infinite_cosine.yaml")
    assert phases["init_args"] == pytest.approx(infinite.schedule["init_args"])


def keys(scale: Scale, data: Data, out: Path, peak: float = 2e-3) -> dict[tuple[str, int], str]:
    runs = grid(scale.steps, scale.split_steps, peak)
    return {(job.run.name, job.seed): job.key for job in make_jobs(runs, [0, 1], scale, data, out)}


def test_keys_are_stable_and_change_with_what_matters(scale: Scale, data: Data, tmp_path: Path) -> None:
    known = keys(scale, data, tmp_path)
    assert len(set(known.values())) == len(known)
    assert keys(scale, data, tmp_path / "elsewhere") == known
    moved = tmp_path / "moved"
    shutil.copytree(data.new["new"]["path"], moved)
    assert keys(scale, replace(data, new={"new": {"path": str(moved)}}), tmp_path) == known, (
        "a moved corpus is the same"
    )

    other = keys(scale, replace(data, new={"new": data.splits[0]["split_1"]}), tmp_path)
    changed = {name for name in known if known[name] != other[name]}
    assert ("old", 0) not in changed
    assert {("replay_5", 0), ("both_from_scratch", 1), ("new_from_scratch", 0)} <= changed
    longer = keys(replace(scale, steps=40), data, tmp_path)
    assert {name for name, _ in known if known[name, 0] == longer[name, 0]} == {
        name for name, _ in known if "split" in name
    }, "of another length are all but the splits, and what continues another run changes with it"
    assert not set(keys(scale, data, tmp_path, peak=1e-3).values()) & set(known.values())


def test_loggers_and_the_like_are_not_part_of_the_key(jobs: list[RunJob]) -> None:
    job = next(job for job in jobs if job.run.name == "replay_5")
    trainer = job.config["trainer"]
    watched = {"callbacks": [*trainer["callbacks"], {"class_path": "LogSamples"}], "log_every_n_steps": 1, "devices": 2}

    def key(trainer: Config, **more: Any) -> str:
        return config_key(job.config | {"trainer": trainer} | more, job.every, job.parent.key if job.parent else "")

    assert key(trainer) == key(trainer | watched) == job.key
    replay = {"class_path": "ReplayScheduler", "init_args": {"share": 0.06}}
    others = [each for each in trainer["callbacks"] if each["class_path"] != "ReplayScheduler"]
    changed = [key(trainer | {"callbacks": [*others, replay]}), key(trainer | {"max_steps": 1})]
    changed += [key(trainer | {"precision": "bf16-mixed"}), key(trainer, seed_everything=7)]
    assert len({job.key, *changed}) == 5


def test_merging_appends_and_replaces() -> None:
    under = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert merge(under, {"a": {"c+": [2]}, "d": {"e": 1}}) == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert under == {"a": {"b": 1, "c": [1]}, "d": 1}


def test_a_config_on_disk_contains_its_command(jobs: list[RunJob]) -> None:
    path = write_config(jobs[0].folder, jobs[0].config)
    text = path.read_text()
    assert text.startswith(f"# rewurst fit --config {path}\n")
    assert yaml.safe_load(text) == jobs[0].config


def test_keys_of_earlier_runs_do_not_change(tmp_path: Path) -> None:
    """A reproduction of many hours must not start over because the program changed."""
    for name in ("old", "new", "s1", "s2", "s3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(name)
    one = {name: {"path": str(tmp_path / name)} for name in ("old", "new")}
    splits = tuple({f"split_{n}": {"path": str(tmp_path / f"s{n}")}} for n in (1, 2, 3))
    data = Data({"old": one["old"]}, {"new": one["new"]}, {name: str(tmp_path / name) for name in one}, splits)
    config = {
        "model": {"class_path": "CausalLM", "init_args": {"model": {"vocab_size": 64}}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"sequence_length": 8, "micro_batch_size": 4, "global_batch_size": 8},
        },
        "trainer": {"devices": 1, "precision": "bf16-mixed", "logger": False},
    }
    config["trainer"]["callbacks"] = [{"class_path": name} for name in ("LRRewarming", "ModelCheckpoint")]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    changes = {"configs": (str(tmp_path / "base.yaml"),), "steps": 20, "split_steps": 20, "every": 10}
    known = keys(replace(SCALES["tiny"], **changes), data, tmp_path / "out")
    assert {name: key[:16] for name, key in known.items() if name[0] in ("old", "replay_5", "both_from_scratch")} == {
        ("old", 0): "cfc85027a1934554",
        ("old", 1): "7593ada73b452b55",
        ("replay_5", 0): "567b1090ccad230f",
        ("replay_5", 1): "b78aed0406d8b504",
        ("both_from_scratch", 0): "23a71e29c9103826",
        ("both_from_scratch", 1): "e92b291ffd887e5c",
    }
    assert known["infinite_cosine_split_3", 0].startswith("adbc9cdc3d15aa79")
