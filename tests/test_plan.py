"""Plans against what really happens: memory, checkpoints, datasets; and every recipe planned."""

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from data_prep.encoders import Codec, Text
from models.codec_layouts import LAYOUTS, PIXELS, Normalisation
from models.command import load_config
from models.config import InputError
from models.networks import DiTConfig, UNetConfig, build_model
from models.text_conventions import CONVENTIONS
from models.text_encoder import widths, with_own_pooled
from models.weights import network_class
from pipeline import plan
from pipeline.config import TrainConfig
from pipeline.runs import planning
from pipeline.runs.planning import (
    Sample,
    activation_bytes,
    assumed_data,
    checkpoint_bytes,
    num_small,
    prepared_data,
    state_bytes,
    stored_bytes,
)
from pipeline.training.config import EngineConfig, OptimizerConfig
from tests import ranks_traffic
from tests.shard_factory import Kind, make_manifest
from tests.train_factory import ROOT, environment, results, run, write_config

RECIPES = sorted((ROOT / "configs").glob("train_*.yaml"))
ALL = [(stage, dtype, "adamw") for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]
ALL += [(stage, dtype, "muon") for stage, dtype in ((0, "bf16"), (2, "fp32"), (3, "bf16"))]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [c if c == (2, "bf16", "adamw") else pytest.param(*c, marks=pytest.mark.slow) for c in ALL],
)
def test_predicted_states_and_checkpoints_are_those_of_two_ranks_within_2_percent(
    tmp_path, stage, precision, kind
):
    done = run("tests.ranks_plan", str(stage), precision, kind, str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    line = next(li for li in done.stdout.splitlines() if li.startswith("result "))
    found = json.loads(line.removeprefix("result "))
    engine = EngineConfig(zero_stage=stage, precision=precision)
    numel, by_muon = found["numel"], found["by_muon"]
    assert (by_muon > 0.2 * numel) == (kind == "muon")
    predicted = state_bytes(numel, engine, ranks=2, small=found["small"], by_muon=by_muon)
    assert found["held"] == pytest.approx(predicted.total, rel=0.02)
    written = checkpoint_bytes(numel, by_muon=by_muon)
    assert found["written"] == pytest.approx(written, rel=0.02)


ACTIVATIONS = """
import json, sys, torch
from models.conditions import Conditions
from models.networks import DiTConfig, build_model
torch.set_num_threads(1)
network = build_model(DiTConfig(**json.loads(sys.argv[3]), gradient_checkpointing=sys.argv[1] == "True"))
for p in network.parameters():
    p.grad = torch.zeros_like(p)
def step(batch):
    text, mask = torch.randn(batch, 16, 64), torch.ones(batch, 16, dtype=torch.bool)
    given = Conditions(text, mask, torch.randn(batch, 64))
    network(torch.randn(batch, 4, 32, 32), torch.rand(batch), given).square().mean().backward()
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
step(2)
before = peak()
step(int(sys.argv[2]))
print("result", peak() - before)
"""
NETWORK = {"size": "tiny", "latent_channels": 4, "text_dim": 64, "pooled_dim": 64}


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "batch"), [(False, 32), (True, 96)])
def test_predicted_activations_are_the_memory_that_a_step_takes_within_15_percent(checkpointing, batch):  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATIONS, str(checkpointing), str(batch), json.dumps(NETWORK)],
        capture_output=True, text=True, cwd=ROOT,
        # What is freed goes back to the system at once, so that the peak is not that of fragments.
        env=environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("result")[1])
    predicted = activation_bytes(
        DiTConfig(**NETWORK), Sample(32, 32, 16, 0.0), "fp32", checkpointing
    )
    assert measured == pytest.approx((batch - 2) * predicted, rel=0.15)


@pytest.mark.slow
def test_checkpointing_and_bf16_take_less():
    sample, config = Sample(16, 16, 8, 0.0), DiTConfig(**(NETWORK | {"size": "debug"}))
    plain = activation_bytes(config, sample, "fp32", False)
    assert activation_bytes(config, sample, "fp32", True) < 0.7 * plain
    assert activation_bytes(config, sample, "bf16", False) < 0.7 * plain


TRAFFIC: list[dict] = [
    {"zero_stage": stage, "precision": precision, "micro_batch": size, "reduce_precision": summed}
    for stage in (0, 1, 2, 3)
    for precision, summed in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32"))
    for size in (4, 1)
    if not (stage == 0 and precision == "bf16" and size < 4)  # refused: summed in bf16
]
# Nothing is kept from forward to backward, as in a model of more than 10^9 parameters.
RELEASED = [
    {"zero_stage": 3, "precision": "bf16", "micro_batch": 1, "live": 0, "checkpointing": repeats}
    for repeats in (False, True)
]
# ZeRO 2 and 3 in bf16, four micro-batches, sums in fp32.
SOME = [n for n, c in enumerate(TRAFFIC) if c["zero_stage"] > 1][1::6]
# Several buckets, of which all but the last are to be reduced while backward goes on.
BUCKETS = {"zero_stage": 1, "precision": "fp32", "micro_batch": 4, "bucket": 100_000}
MUON = [
    {"zero_stage": stage, "precision": "bf16", "micro_batch": 2, "kind": "muon"}
    for stage in (0, 1, 2, 3)
]
# Two nodes of two ranks each.
HPZ = [case | {"hpz_partition_size": 2} for case in RELEASED]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            2,
            [*(TRAFFIC[number] for number in SOME), BUCKETS, MUON[3]],
        ),
        pytest.param(2, TRAFFIC + RELEASED, marks=pytest.mark.slow),
        pytest.param(4, HPZ + MUON, marks=pytest.mark.slow),
    ],
    ids=["some", "all", "two nodes"],
)
def test_what_ranks_hand_to_torch_distributed_is_what_the_plan_says(ranks, cases, monkeypatch):
    with torch.device("meta"):
        network = build_model(ranks_traffic.MODEL)
    numel, small = sum(p.numel() for p in network.parameters()), num_small(network)
    assert 0 < small < numel
    found = results("traffic", "tests.ranks_traffic", json.dumps(cases), ranks=ranks)
    for case, words in zip(cases, found, strict=True):
        case, (elements, early) = dict(case), json.loads(" ".join(words))
        if case.pop("bucket", None):
            assert early
        monkeypatch.setattr(planning, "LIVE_ELEMENTS", case.pop("live", numel))
        repeats, micro_steps = case.pop("checkpointing", False), 8 // ranks // case["micro_batch"]
        config = SimpleNamespace(optimizer=OptimizerConfig(kind=case.pop("kind", "adamw")))
        matrices = planning.muon_matrices(config, network)  # pyright: ignore[reportArgumentType]
        engine, expected = EngineConfig(**case), defaultdict[str, float](float)
        sent = planning.collectives(engine, numel, small, ranks, micro_steps, repeats)
        for c in sent + planning.muon_collectives(matrices, engine.zero_stage, ranks):
            expected[f"{c.kind} {c.dtype}"] += c.elements
        assert elements == {k: n for k, n in expected.items() if n}, case


def test_the_layout_follows_from_bytes_and_bandwidths():
    """Two nodes of eight GPUs, four micro-batches: ZeRO 2 sums four times, and 1 and 3 send less."""
    engine = EngineConfig(precision="bf16")
    machines = planning.Machines(16, 8, "H100", 1.0, 0.4, None, within=300.0, between=50.0)
    sent = [
        planning.collectives(engine.model_copy(update=layout), 2 * 10**9, 0, 16, 4, False)
        for layout in ({"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3},
                       {"zero_stage": 3, "hpz_partition_size": 8})
    ]  # fmt: skip
    one, two, three, within = (sum(c.sent_bytes for c in part) / (2e9 * 15 / 16) for part in sent)
    # Sums pass twice in fp32, what is scattered once; eight gathers in bf16.
    assert (one, two, three) == pytest.approx((2 * 4 + 2, 4 * 2 * 4 + 2, 4 * 4 + 8 * 2))
    assert within < three
    seconds = [machines.seconds(part) for part in sent]
    assert seconds[3] < seconds[2] - 5 * 2e9 * 2 / 50e9  # seven gathers do not leave their node
    fits = [
        planning.Fit(stage, False, state_bytes(10, engine, 16), 1.0, 8, part, time)
        for stage, part, time in zip((1, 2, 3), sent, seconds, strict=False)
    ]
    assert planning.best_layout(fits[1:], 32) is fits[2 if seconds[2] < seconds[1] else 1]
    assert planning.best_layout(fits, 32) is fits[0]


def test_stages_divide_what_they_say():
    n, ranks = 10**9, 64
    engines = [EngineConfig(zero_stage=s, precision="bf16") for s in (0, 1, 2, 3)]
    by_stage = [state_bytes(n, engine, ranks) for engine in engines]
    assert by_stage[0].optimizer == 16 * n
    assert by_stage[1].optimizer == 16 * n / ranks
    assert by_stage[2].gradients == 4 * n / ranks
    assert by_stage[3].weights == 2 * n / ranks
    assert state_bytes(n, engines[2], ranks, averages=3).optimizer == 24 * n / ranks


def test_a_prepared_dataset_is_planned_from_its_own_numbers(tmp_path, capsys):
    codec = {"normalisation": {"mean": [0.0] * 4, "std": [10.0] * 4}}
    path = write_config(tmp_path, codec=codec)
    plan.main(path, gpus=2, gpu_memory=1.0, fit=True)
    out = capsys.readouterr().out
    config = load_config(TrainConfig, path, [])
    data = prepared_data(config)
    assert data.num_pictures == 90
    # A network that needs all that the data fix, as `train` takes it.
    unet = UNetConfig(size="debug", size_conditioning=True)
    assumed = assumed_data(9, 64, 8, 5, DiTConfig(**NETWORK))
    for dataset in (data, assumed):
        with torch.device("meta"):
            build_model(unet.with_sizes(dataset.sizes))
    tars = list((tmp_path / "dataset").glob("shards/*/*.tar"))
    assert data.total_bytes == sum(p.stat().st_size for p in tars)
    assert "90 pictures" in out
    # Of a text that varies the longest caption; all latents are of one size here.
    indices = [np.load(path)[..., 1] for path in (tmp_path / "dataset").rglob("*.idx.npy")]
    assert list(data.stored.values()) == np.concatenate(indices).max(axis=0).tolist()
    assert re.search(r"^of these +moments \(float16\) [\d.]+ KiB, mini \(float16\) ", out, re.M)
    assert "normalised latents have a std of 0.1, expected 0.5 to 2" in out
    # What --fit prints is a valid change of the same config.
    best = out.splitlines()[-1].split()
    changed = load_config(TrainConfig, path, best)
    assert config.training.global_batch // 2 % (changed.engine.micro_batch or 0) == 0


@pytest.mark.slow
def test_a_model_too_large_is_said_not_to_fit(tmp_path, capsys):
    overrides = ["model.size=XL"]
    plan.main(write_config(tmp_path), overrides, gpus=1, gpu_memory=1.0, fit=True)
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "Nothing fits" in out
    assert "engine.zero_stage=" not in out


def plan_line(path) -> list[str]:
    """The `flowmill plan` line that a recipe's first lines hold, without the command."""
    found = re.search(r"flowmill plan (configs/[^\n]*)", path.read_text())
    assert found, f"{path}: no `flowmill plan` line"
    return shlex.split(found[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_built_and_has_the_size_that_it_states(path):
    overrides = [a for a in plan_line(path) if a.startswith("model.")]
    config = load_config(TrainConfig, path, overrides)
    with torch.device("meta"):
        numel = sum(p.numel() for p in build_model(config.model).parameters())
    assert f" {numel / 1e6:,.1f} M parameters" in path.read_text(), numel


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_planned_as_it_says_and_fits(path):
    done = run("pipeline.plan", *plan_line(path), COLUMNS="150")
    assert done.returncode == 0, done.stderr
    assert "over all GPUs" in done.stdout
    assert "Nothing fits" not in done.stdout


def test_what_cannot_be_planned_is_refused(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(InputError, match=r"expected a divisor of training\.global_batch, 8"):
        plan.main(path, gpus=3)
    with pytest.raises(InputError, match="expected one of B200"):
        plan.main(path, gpus=2, gpu="H1000")
    with pytest.raises(InputError, match="no dataset to take them from"):
        plan.main(path, gpus=2, pictures=1000)
    with pytest.raises(InputError, match=r"/nowhere: no such dataset. Remedy: --pictures COUNT"):
        plan.main(path, ["data.path=/nowhere"], gpus=2)
    with pytest.raises(InputError, match=r"manifest.json"):
        plan.main(path, [f"data.path={tmp_path}"], gpus=2)


# What their config.json says of the published weights.
CODECS = {
    "SD, SDXL: 4 channels at 1/8": ("AutoencoderKL", {"latent_channels": 4}),
    "SD3, FLUX.1: 16 channels at 1/8": ("AutoencoderKL", {"latent_channels": 16}),
    "FLUX.2: 128 channels at 1/16": ("AutoencoderKLFlux2", {"latent_channels": 32}),
    "DC-AE: 32 channels at 1/32": ("AutoencoderDC", {"latent_channels": 32}),
    "pixels: uint8": (PIXELS, {}),
}
CLIP_L = transformers.CLIPTextConfig(hidden_size=768, projection_dim=768, num_hidden_layers=1)
CLIP_G = transformers.CLIPTextConfig(hidden_size=1280, projection_dim=1280, num_hidden_layers=1)
T5 = transformers.T5Config(d_model=4096, num_layers=1)
GEMMA = transformers.Gemma2Config(hidden_size=2304, num_hidden_layers=1)
MODULE = transformers.T5GemmaModuleConfig(num_hidden_layers=1, layer_types=["full_attention"])
SAME = {key: value for key, value in MODULE.to_dict().items() if key != "model_type"}
T5GEMMA = transformers.T5GemmaConfig(encoder=MODULE, **SAME | {"is_encoder_decoder": False})
TEXTS = {
    "CLIP-L: 77 tokens": (CLIP_L, "sd15", "clip_l", 77),
    "CLIP-G: 77 tokens, a vector": (CLIP_G, "sdxl", "clip_g", 77),
    "T5-XXL: 77 tokens": (T5, "sd3", "t5", 77),
    "T5-XXL: 256 tokens": (T5, "sd3", "t5", 256),
    "Gemma 2 2B: 300 tokens": (GEMMA, "sana", "gemma2", 300),
    "T5Gemma 2B: 256 tokens": (T5GEMMA, "prx", "t5gemma", 256),
}


def kib_of_latents(name: str, config: dict) -> list[float]:
    """At 256 and at 512 pixels."""
    blocks = {"block_out_channels": [1] * 4, "encoder_block_out_channels": [1] * 6}
    layout, same = LAYOUTS[name](config | blocks), ("channels", "downscale", "deterministic")
    flat = Normalisation(mean=(0.0,) * layout.channels, std=(1.0,) * layout.channels)
    record = {field: getattr(layout, field) for field in same} | {"normalisation": flat}
    sizes = SimpleNamespace(
        channels=layout.channels, deterministic=layout.deterministic, layout=layout
    )
    members = Codec(sizes, "vae").members()
    manifest = make_manifest(Kind(encoders={}), [], record).model_copy(update={"members": members})
    return [stored_bytes(manifest, "moments", side) / 1024 for side in (256, 512)]


def kib_of_text(config, convention: str, name: str, length: int) -> float:
    """The real class of the encoder, of one layer and without weights."""
    view = CONVENTIONS[convention].roles[name].model_copy(update={"max_length": length})
    with torch.device("meta"):
        network = network_class(transformers, view.family)(config)
    dim, pooled_dim = widths(network.config, with_own_pooled(view, type(network).__name__))
    kind = Kind(encoders={name: (length, dim)})
    sizes = SimpleNamespace(dim=dim, pooled_dim=pooled_dim)
    members = Text(sizes, name, "float16").members()
    manifest = make_manifest(kind, [], {}).model_copy(update={"members": members})
    return sum(stored_bytes(manifest, member, 256) for member in members) / 1024


def test_the_readme_says_how_many_bytes_usual_encoders_take_per_picture():
    lines = (ROOT / "data_prep" / "README.md").read_text().splitlines()
    expected = {name: kib_of_latents(*codec) for name, codec in CODECS.items()}
    expected |= {name: [kib_of_text(*text)] for name, text in TEXTS.items()}
    for name, sizes in expected.items():
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
        assert cells == [f"{size:,.1f}".removesuffix(".0") for size in sizes], name
