"""What a run shows: counted FLOPs, time by part, held-out loss, histogram, trace."""

import contextlib
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.summary import scalar

from models.networks import DiTConfig, MMDiTConfig, build_model
from pipeline.config import load_run_config
from pipeline.data.loader import Loader
from pipeline.data.randomness import draw_noise
from pipeline.objectives.objective import Objective
from pipeline.training import monitor
from pipeline.training.board import GLANCE, LAYOUT, Board
from pipeline.training.checkpoint import load_weights
from pipeline.training.flops import ModelFlops, peak_flops
from pipeline.training.norms import block_of
from tests import train_factory
from tests.shard_factory import Kind, make_dataset
from tests.train_factory import ROOT

DIT = DiTConfig(size="debug", latent_channels=4, text_dim=8, pooled_dim=8)


I1 = MMDiTConfig(
    size="debug",
    depth=3,
    latent_channels=4,
    text_dim=8,
    pooled_dim=0,
    modulation="none",
    sandwich_norm=True,
    swiglu=True,
    long_skips=True,
    text_adapter=2,
    text_rope=True,
    position_grid=8,
)


@pytest.mark.parametrize("config", [DIT, I1], ids=lambda config: config.kind)
def test_flops_at_any_size_and_length_are_those_counted_there(config):
    counter = ModelFlops(config)
    with torch.device("meta"):
        network = build_model(counter.config)
    for height, width, length in ((32, 32, 77), (16, 64, 1), (128, 24, 300)):
        counted = counter._count(network, height, width, length)
        assert counter.picture(height, width, length) == pytest.approx(counted, rel=1e-9)


def test_flops_of_dit_xl_2_are_three_times_the_papers_forward():
    # 118.64 Gflops (2212.09748, table 4) are multiply-accumulates, and backward is twice forward. The
    # paper leaves out the modulation and counts no backward of attention's recomputed scores: 2%.
    xl = DiTConfig(
        size="XL", depth=2, latent_channels=4, text_dim=0, pooled_dim=0, num_classes=1000
    )
    short = ModelFlops(xl.model_copy(update={"depth": 1})).picture(32, 32, 0)
    layer = ModelFlops(xl).picture(32, 32, 0) - short
    assert short + 27 * layer == pytest.approx(3 * 2 * 118.64e9, rel=0.02)


def test_gradient_checkpointing_adds_no_flops_to_the_models():
    plain = ModelFlops(DIT).picture(32, 32, 16)
    assert (
        ModelFlops(DIT.model_copy(update={"gradient_checkpointing": True})).picture(32, 32, 16)
        == plain
    )


def test_the_peak_says_whence_it_is():
    peak, source = peak_flops(torch.device("cpu"), "fp32")
    assert peak > 1e8
    assert "measured here" in source


def test_the_parts_of_a_steps_time_are_what_lies_between_the_marks(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0, 6.5, 10.0, 10.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(ticks))
    clock = monitor.Stopwatch(torch.device("cpu"))
    for part in ("data", "forward", "backward", "forward", "other"):
        clock.mark(part)
    assert clock.collect() == {"data": 1.0, "forward": 2.5, "backward": 3.0, "other": 3.5}


def test_a_block_is_a_name_up_to_its_first_number():
    names = {
        "transformer_blocks.11.attn1.to_q.weight": "transformer_blocks.11",
        "down.2.resnets.0.conv.weight": "down.2",
        "timestep_embedder.linear_1.weight": "timestep_embedder",
        "scale_shift_table": "scale_shift_table",
    }
    assert {name: block_of(name) for name in names} == names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on data with held-out samples, everything watched."""
    folder = tmp_path_factory.mktemp("watched")
    kind = Kind(encoders={"mini": (5, 8)}, channels=4)
    shards = [((32, 32), 40), ((16, 64), 30)]
    make_dataset(folder / "dataset", shards, kind, heldout=[((32, 32), 10)])
    config = train_factory.write_config(folder)
    train_factory.train(
        config,
        "training.images=96",
        "monitor.every_steps=4",
        "monitor.mfu=true",
        "monitor.sample_every_steps=6",
        "monitor.profile_steps=[3,4]",
        "engine.micro_batch=4",
    )
    return folder / "run"


@pytest.fixture(scope="module")
def events(run):
    accumulator = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}
    )
    accumulator.Reload()
    return accumulator


@pytest.mark.distributed
def test_everything_promised_is_logged(events):
    tags = set(events.Tags()["scalars"])
    parts = {f"step_ms/{part}" for part in ("data", "forward", "backward", "optimizer", "other")}
    speeds = {f"speed/{name}" for name in ("images_per_s", "tokens_per_s", "mfu", "step_ms")}
    kinds = ("gradient", "update", "weight", "ema_distance")
    blocks = {f"weights_by_block/{kind}_norm/transformer_blocks.1" for kind in kinds}
    totals = {"norm/update", "norm/weight", "norm/ema_distance", "memory/peak_gib"}
    heldout = {f"heldout_{which}/loss_t_0.5625" for which in ("raw", "ema")}
    assert parts | speeds | blocks | totals | heldout <= tags
    for name in parts | speeds | blocks | totals:
        assert [e.step for e in events.Scalars(name)] == [4, 8, 12], name
        assert all(e.value >= 0 for e in events.Scalars(name))
    total = sum(events.Scalars(part)[1].value for part in parts)
    assert total == pytest.approx(events.Scalars("speed/step_ms")[1].value, rel=0.1)
    assert [e.step for e in events.Histograms("log_snr")] == [4, 8, 12]
    assert events.Histograms("log_snr")[0].histogram_value.num == 4 * 8
    assert "measured here" in str(events.Tensors("peak/text_summary")[0].tensor_proto)


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
GROUPS = "at_a_glance data evaluate heldout_ema heldout_raw log_snr loss loss_by_noise_level memory norm optimizer progress speed step_ms weights_by_block"  # fmt: skip
# Written by `flowmill evaluate`, or only where `data.on_corrupt` is skip.
ELSEWHERE = {"data", "evaluate"}


def test_the_pages_name_every_group_of_curves_and_no_tag_that_is_not_written(events):
    tags = events.Tags()
    written = {*tags["scalars"], *tags["images"], *tags["histograms"]}
    groups = {tag.split("/")[0] for tag in written}
    text = "\n".join(page.read_text() for page in PAGES)
    assert groups | ELSEWHERE == set(GROUPS.split())
    assert [g for g in sorted(groups | ELSEWHERE) if not re.search(rf"`{g}(/\w*)?`", text)] == []
    # `time/` and `optimizer/skipped_steps` were named, and were nowhere.
    named = set(re.findall(rf"`((?:time|{'|'.join(groups)})/\w*)`", text))
    assert len(named) > 8
    assert [n for n in named if not any(t == n or (n[-1] == "/" and t.startswith(n)) for t in written)] == []  # fmt: skip


def test_the_first_group_holds_what_one_looks_for_and_the_blocks_come_last(events):
    tags = events.Tags()
    groups = sorted({tag.split("/")[0] for part in ("scalars", "images") for tag in tags[part]})
    assert (groups[0], groups[-1]) == ("at_a_glance", "weights_by_block")
    first = {tag for tag in tags["scalars"] if tag.startswith("at_a_glance/")}
    assert first == {f"at_a_glance/{name}" for name in ("loss", "heldout_x0_mse", "images_per_s")}
    for tag, name in GLANCE.items():
        copies = [events.Scalars(t) for t in (tag, f"at_a_glance/{name}")]
        assert [(e.step, e.value) for e in copies[0]] == [(e.step, e.value) for e in copies[1]]


def test_every_curve_of_the_layout_is_written(events):
    tags = events.Tags()
    patterns = [p for charts in LAYOUT.values() for _, found in charts.values() for p in found]
    assert "custom_scalars__config__" in tags["tensors"]
    for pattern in patterns:
        assert [tag for tag in tags["scalars"] if re.fullmatch(pattern, tag)], pattern


def points(folder: Path) -> dict[int, float]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    found = accumulator.Scalars("a") if "a" in accumulator.Tags()["scalars"] else []
    return {event.step: event.value for event in found}


@pytest.mark.parametrize("room", range(0, 400, 33))
def test_what_a_full_disk_refuses_is_shown_when_there_is_room_and_nothing_twice(tmp_path, room):
    board = Board(tmp_path)
    for step in range(3):
        board.add(scalar("a", step), step)
    board.flush()
    board.add(scalar("a", 3), 3)
    before = board.path.stat().st_size
    # Room for part of what waits.
    unlimited, limit = (resource.RLIM_INFINITY,) * 2, (before + room, resource.RLIM_INFINITY)
    for step in range(4, 9):
        board.add(scalar("a", step), step)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with contextlib.suppress(OSError):
            board.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert set(points(tmp_path)) in ({0, 1, 2}, set(range(9)))
    board.flush()
    assert points(tmp_path) == {step: float(step) for step in range(9)}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.distributed
def test_the_heldout_loss_is_that_of_the_checkpoints_weights(run, events):
    config = load_run_config(run)
    loader = Loader(config.data, global_batch=8, seed=0)
    (batch,) = loader.heldout_batches(64)
    assert len(batch.indices) == 10
    objective, shape = Objective(config.objective), tuple(batch.moments.shape[-2:])
    mean, std = batch.moments.float().chunk(2, dim=1)
    codec = loader.manifest.codec
    drawn = draw_noise(0, 0, range(10), (4, *shape), purpose="posterior")
    normalisation = codec.normalisation
    latents = ((mean + std * drawn) - normalisation.mean[0]) / normalisation.std[0]
    for which in ("raw", "ema"):
        network = build_model(config.model)
        network.load_state_dict(load_weights(run, which)[0])
        logged = {k: events.Scalars(f"heldout_{which}/loss{k}")[-1] for k in ("", "_t_0.3125")}
        assert logged[""].step == 12
        losses = []
        for level in range(8):
            t, noise = (
                torch.full((10,), (level + 0.5) / 8),
                draw_noise(1, level, range(10), (4, *shape)),
            )
            x_t = (1 - t[0]) * latents + t[0] * noise
            with torch.no_grad():
                pred = network(x_t, t, batch.conditions)
            losses.append(objective.loss(pred, latents, noise, t).loss.mean().item())
        assert logged["_t_0.3125"].value == pytest.approx(
            losses[2], rel=1e-5
        )  # fp32, in other parts
        assert logged[""].value == pytest.approx(sum(losses) / 8, rel=1e-5)
    loader.close()


@pytest.mark.distributed
def test_the_steps_asked_for_are_traced(run):
    trace = json.loads((run / "profile" / "steps_3_4.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("AdamW" in name and "step" in name for name in names) == 2
