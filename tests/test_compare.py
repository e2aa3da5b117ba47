"""Variants compared at equal compute: the statistics against closed forms and many experiments, the command end to end."""

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from models.command import load_config
from models.config import InputError
from pipeline.compare import main, measure_all, parse_changes, plan_job, share_machine
from pipeline.config import TrainConfig, load_run_config
from pipeline.evaluation.comparison import LEVEL, compare_runs, paired, t_quantile
from pipeline.inference.heldout import LOG_SNR
from pipeline.runs.planning import flops_per_step
from tests import train_factory
from tests.ray_cluster import RAY
from tests.train_factory import scalars, write_config

HELD_OUT = [((32, 32), 24)]


@pytest.mark.parametrize("dof", [1, 2, 3, 9, 30])
def test_the_quantile_is_students(dof):
    for probability in (0.5, 0.9, 0.975, 0.99636):
        # The error of the sum of a million parts.
        expected = stats.t.ppf(probability, dof)
        assert t_quantile(probability, dof) == pytest.approx(expected, rel=1e-5, abs=1e-5)


CORRELATION = [
    [1.00, 0.93, 0.87, 0.89, 0.74, -0.05, -0.00],
    [0.93, 1.00, 0.91, 0.88, 0.74, 0.03, 0.07],
    [0.87, 0.91, 1.00, 0.91, 0.75, -0.13, -0.04],
    [0.89, 0.88, 0.91, 1.00, 0.86, -0.14, -0.08],
    [0.74, 0.74, 0.75, 0.86, 1.00, -0.15, -0.22],
    [-0.05, 0.03, -0.13, -0.14, -0.15, 1.00, 0.85],
    [-0.00, 0.07, -0.04, -0.08, -0.22, 0.85, 1.00],
]
"""Correlation of the differences at LOG_SNR, as 30 pairs of the last test's runs had them."""


def experiments(
    seeds: int, change: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of two variants, (seeds, levels), whose differences are correlated; a seed moves both alike."""
    mix = np.linalg.cholesky(CORRELATION).T
    alike, own = rng.standard_normal((2, seeds, len(LOG_SNR)))
    base = np.exp(-np.abs(LOG_SNR)) * (1 + 0.05 * alike @ mix)
    return base, base + base.mean(0) * (change + 0.01 * own @ mix)


@pytest.mark.parametrize("seeds", [3, 4])
def test_all_intervals_hold_the_truth_in_95_percent_of_experiments(seeds):
    rng, change, held = np.random.default_rng(seeds), -0.02, 0
    for _ in range(10_000):
        intervals = paired(*experiments(seeds, change, rng))
        held += all(low <= change <= high for _, low, high in intervals)
    assert 0.94 <= held / 10_000 <= 0.96


def test_a_variant_that_differs_by_chance_alone_is_not_found():
    rng, missed = np.random.default_rng(0), 0
    for _ in range(10):
        missed += any(interval.found for interval in paired(*experiments(3, 0.0, rng)))
    assert missed <= stats.binom.ppf(0.99, 10, 0.05)


def test_levels_are_a_family_and_every_other_figure_is_alone():
    rng = np.random.default_rng(1)
    names = [*(f"{LEVEL}{level:+d}" for level in LOG_SNR), "images_per_s"]
    base, other = (
        [dict(zip(names, rng.random(len(names)) + 1, strict=True)) for _ in range(4)]
        for _ in range(2)
    )
    found = compare_runs(base, other)
    assert list(found) == names
    for name, confidence in ((names[0], 0.95 ** (1 / len(LOG_SNR))), ("images_per_s", 0.95)):
        mean = np.mean([run[name] for run in base])
        change = [(b[name] - a[name]) / mean for a, b in zip(base, other, strict=True)]
        expected = stats.ttest_1samp(change, 0).confidence_interval(confidence)
        assert found[name][1:] == pytest.approx(tuple(expected), rel=1e-5)


def compare(folder: Path, *options: str, seeds: int = 2, **variables: str) -> tuple[dict, str]:
    words = [sys.executable, "-m", "pipeline.compare", str(folder / "run.yaml"), *options]
    words += [f"--output={folder / 'out'}", f"--seeds={seeds}"]
    variables = train_factory.environment() | variables
    done = subprocess.run(words, capture_output=True, text=True, env=variables, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "comparison.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_comparison_goes_on_and_nothing_is_trained_twice(tmp_path):
    """Begun two by two, ended one by one, and told once more from the records alone."""
    write_config(tmp_path, heldout=HELD_OUT)
    options = ("--change=fast=optimizer.lr=3e-3", "--change=fast=optimizer.clip=0.5")
    options += ("--steps=12", "monitor.log_samples=true", "engine.cpu_threads=1")
    arguments = (str(tmp_path / "run.yaml"), f"--output={tmp_path / 'out'}", "--seeds=2", *options)
    process = train_factory.start("pipeline.compare", *arguments, "--jobs=2")
    train_factory.wait_for(process, "fast_0: x0")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    done = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_0/checkpoints/*/*")
    }
    assert len(done) >= 2 * 3
    found, shown = compare(tmp_path, *options)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [len(found["runs"][name]) for name in ("base", "fast")] == [2, 2]
    assert found["differences"]["fast"]["x0_error"]["change"] < 0
    flops = [run["flops"] for run in found["runs"]["base"] + found["runs"]["fast"]]
    assert len(set(flops)) == 1
    assert "log SNR +2" in shown
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    (row,) = (r for r in (tmp_path / "out/comparison.md").read_text().splitlines() if "fast" in r)
    assert row.count("|") == 2 + len(found["runs"]["base"][0])
    seen = [
        (tmp_path / "out" / f"{name}_{seed}/samples_seen/rank_00000.txt").read_text()
        for seed in (0, 1)
        for name in ("base", "fast")
    ]
    # Pairs see the same pictures in the same order; another seed sees others.
    assert seen[0] == seen[1] != seen[2] == seen[3]
    refused = train_factory.run("pipeline.compare", *arguments, "--steps=13")
    assert refused.returncode == 2
    assert "base_0: was trained with another training.images" in refused.stderr
    for run in (tmp_path / "out").glob("*_[01]"):
        shutil.rmtree(run)
    assert compare(tmp_path, *options)[0] == found
    assert not list((tmp_path / "out").glob("*_[01]"))


@pytest.mark.slow
@pytest.mark.distributed
def test_equal_seconds_are_steps_by_the_measured_time_of_one(tmp_path):
    write_config(tmp_path, heldout=HELD_OUT)
    options = ("--change=wide=model.hidden_size=128", "--seconds=0.5")
    found, shown = compare(tmp_path, *options)
    assert found["equal_compute"] == "0.5 seconds of steps each, 2 seeds"
    for name in ("base", "wide"):
        _, step_ms = zip(*scalars(tmp_path / f"out/timed/{name}", "speed/step_ms"), strict=True)
        assert len(step_ms) == 5
        steps = int(500 / np.median(step_ms))
        assert f"{name}: {steps} steps" in shown
        assert load_run_config(tmp_path / f"out/{name}_1").training.num_steps == steps


def test_runs_side_by_side_share_the_cores_and_are_not_timed(tmp_path):
    assert share_machine(1) == [([sys.executable], {})]
    assert share_machine(2, "srun --gpus 1 python") == 2 * [(["srun", "--gpus", "1", "python"], {})]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    if not torch.cuda.is_available():
        assert share_machine(2) == 2 * [([sys.executable], threads)]
    for more in ({"jobs": 2}, {"launcher": "torchrun"}, {"dry_run": True}):
        with pytest.raises(InputError, match="--seconds: runs are timed here, one by one"):
            main(tmp_path / "run.yaml", change=["a=seed=1"], seconds=3.0, **more)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_run_of_a_comparison_may_have_two_ranks(tmp_path):
    write_config(tmp_path, heldout=HELD_OUT)
    launcher = f"--launcher={sys.executable} -m torch.distributed.run --nproc-per-node 2"
    options = ("--change=fast=optimizer.lr=3e-3", "--steps=12", "engine.cpu_threads=1")
    found, _ = compare(tmp_path, *options, launcher, "monitor.log_samples=true")
    for run in ("base_0", "base_1", "fast_0", "fast_1"):
        seen = tmp_path / "out" / run / "samples_seen"
        assert sorted(path.name for path in seen.iterdir()) == ["rank_00000.txt", "rank_00001.txt"]
    shutil.rmtree(tmp_path / "out")
    # One rank has the same pictures and noise.
    alone = compare(tmp_path, *options)[0]["runs"]
    for name, own in found["runs"].items():
        errors = [run["x0_error"] for run in own]
        assert errors == pytest.approx([run["x0_error"] for run in alone[name]], rel=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_runs_of_a_comparison_are_jobs_of_a_ray_cluster(tmp_path, job_cluster):
    """Side by side, each with a CPU of the cluster's two; what one prints is that cluster's."""
    write_config(tmp_path, heldout=HELD_OUT)
    ours = json.dumps({"env_vars": {"PYTHONPATH": str(train_factory.ROOT)}})
    submit = [RAY, "job", "submit", "--entrypoint-num-cpus", "1", f"--runtime-env-json={ours}"]
    options = ["--steps=12", "--jobs=2", "engine.cpu_threads=1"]
    options += ["--change=fast=optimizer={lr: 3e-3, betas: [0.9, 0.99]}"]
    launcher = f"--launcher={shlex.join([*submit, '--', sys.executable])}"
    found, _ = compare(tmp_path, *options, launcher, **job_cluster.environment)
    assert found["differences"]["fast"]["x0_error"]["change"] < 0
    listed = [RAY, "job", "list"]
    jobs = subprocess.run(listed, env=job_cluster.environment, capture_output=True, text=True)
    assert jobs.stdout.count("pipeline.train") >= 4, jobs.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_first_weights_alone_make_no_difference_in_ten_experiments(tmp_path):
    """Pairs of runs that see the same, three at a time: what another seed of first weights is worth is chance."""
    path, sides = write_config(tmp_path, heldout=HELD_OUT), list[list[dict[str, float]]]()
    for first in (0, 1000):
        jobs = []
        for seed in range(30):
            own = [f"run={tmp_path / 'runs' / f'{first + seed}'}", f"seed={seed}"]
            own += [f"weights_seed={first + seed}", "monitor.every_steps=50", "monitor.prompts=[]"]
            jobs.append(plan_job(path, own, 100, None, {}))
        sides.append(asyncio.run(measure_all(jobs, "", tmp_path / "records", share_machine(1))))
    assert all(a["x0_error"] != b["x0_error"] for a, b in zip(*sides, strict=True))
    found = 0
    for first in range(0, 30, 3):
        base, other = (side[first : first + 3] for side in sides)
        found += any(
            interval.found
            for name, interval in compare_runs(base, other).items()
            if name.startswith(LEVEL)
        )
    assert found <= stats.binom.ppf(0.99, 10, 0.05)


@pytest.mark.gpu
def test_runs_side_by_side_have_a_gpu_each_or_are_refused():
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"at most the GPUs here, {count}"):
        share_machine(count + 1)
    if count > 1:
        gpus = [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in share_machine(count)]
        assert len(set(gpus)) == count


def test_equal_flops_are_steps_by_what_a_step_costs(tmp_path):
    path = write_config(tmp_path, heldout=HELD_OUT)
    given = [f"run={tmp_path / 'new'}"]
    costs = dict[str, float]()
    plain = plan_job(path, given, 70, None, costs)
    assert plain.config.training.num_steps == 70
    muon = plan_job(path, [*given, "optimizer.kind=muon"], None, plain.flops, costs)
    cost = flops_per_step(muon.config)
    assert cost > plain.flops / 70
    assert muon.config.training.num_steps == plain.flops // cost
    with pytest.raises(InputError, match="at least a step's"):
        plan_job(path, given, None, 1.0, costs)


def test_a_record_is_of_all_settings_and_pictures_but_not_of_where_they_lie(tmp_path):
    path, costs = write_config(tmp_path, heldout=HELD_OUT), dict[str, float]()
    shutil.copytree(tmp_path / "dataset", tmp_path / "moved")
    same = [["run=a"], ["run=b", f"data.path={tmp_path / 'moved'}", "engine.cpu_threads=2"]]
    # Two that have no option but their kind, and are each no default.
    other = [["objective.weighting=min_snr"], ["objective.weighting=debiased"], ["seed=4"]]
    found = [plan_job(path, given, 5, None, costs).results_from for given in (*same, *other)]
    assert found[0] == found[1]
    assert all(a != b for i, a in enumerate(found[1:]) for b in found[1:][:i])


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(InputError, match="holds nothing out"):
        plan_job(path, [f"run={tmp_path / 'new'}"], 5, None, {})
    for change in ("lr", "base=seed=3", "a b=seed=3", "=x"):
        with pytest.raises(InputError, match=r"NAME=section\.key=value"):
            parse_changes(path, [], [change])
    other = tmp_path / "other.yaml"
    assert parse_changes(path, ["a=1"], [f"v={other}", "v=b=2", "w=c=3"]) == {
        "base": (path, ["a=1"]),
        "v": (other, ["a=1", "b=2"]),
        "w": (path, ["a=1", "c=3"]),
    }
    assert not list(tmp_path.glob("new*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_learning_rate_off_by_3_is_found_by_three_seeds_in_nine_of_ten(tmp_path):
    write_config(tmp_path, heldout=HELD_OUT)
    off = load_config(TrainConfig, tmp_path / "run.yaml", []).optimizer.lr / 3
    options = ("--steps=100", f"--change=low=optimizer.lr={off}", "monitor.every_steps=50")
    runs = compare(tmp_path, *options, seeds=30)[0]["runs"]
    found = 0
    for first in range(0, 30, 3):
        three = slice(first, first + 3)
        differences = compare_runs(runs["base"][three], runs["low"][three])
        found += differences["x0_error"].found
    assert found >= 9
