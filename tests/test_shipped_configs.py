"""The shipped configs: what each comment says can be done is tried, with tiny stand-ins for data and weights."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.submit import parse_arguments
from models.command import load_config, read_yaml
from models.config import STAGES, Config, parse_config
from models.networks import build_model
from pipeline import cli
from pipeline.config import TrainConfig
from pipeline.runs.setup import fit_run
from pipeline.runs.start import load_stages
from pipeline.show_config import config_class
from tests import train_factory
from tests.shard_factory import Kind, make_dataset

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "objectives.yaml")
COMMAND = re.compile(r"(?:flowmill (?P<stage>[\w-]+)|python -m (?P<module>[\w.]+)|-m (?P<short>pipeline\.\w+)) (?P<rest>[^`]*)")  # fmt: skip
OVERRIDE = re.compile(r"\b[a-z]\w*(?:\.\w+)*=[^\s`]+")


def comments(path: Path) -> list[str]:
    """Each comment of a file, one that goes on in the next lines as one text."""
    found: list[str] = []
    for line in path.read_text().splitlines():
        code, mark, text = line.partition("#")
        if mark and not code and found and found[-1].startswith("\n"):
            found[-1] += " " + text.strip()
        elif mark:
            found.append(("" if code else "\n") + text.strip())
        else:
            found.append("")
    return [text.strip() for text in found if text.strip()]


def load(path: Path, *changes: str | dict[str, Any]) -> Config:
    """A config with overrides, or with other sections in place of its own."""
    tree = read_yaml(path, [change for change in changes if isinstance(change, str)])
    for sections in (change for change in changes if isinstance(change, dict)):
        tree |= sections
    stage = next(stage for stage, key in STAGES.items() if key in tree)
    return parse_config(config_class(stage), tree, str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_command_and_override_in_a_comment_is_accepted(path):
    for comment in (line.partition("#")[2] for line in path.read_text().splitlines()):
        for found in COMMAND.finditer(comment):
            words = [w for w in shlex.split(found["rest"].split(". ")[0]) if w != "..."]
            module = found["module"] or found["short"] or cli.module_of(found["stage"], words)
            named = [w for w in words if w.startswith("configs/")]
            assert all((CONFIGS.parent / name).is_file() for name in named), comment
            parse_arguments(module, words)
            if named and found["stage"] in ("prepare", "train"):
                load(CONFIGS.parent / named[0], *(word for word in words if "=" in word))
        # What is no command's is this file's.
        rest = COMMAND.sub("", comment)
        load(path, *(text.rstrip(".;:,") for text in OVERRIDE.findall(rest)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_head_says_the_cost_and_what_to_expect_or_that_nobody_measured_it(path):
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    head = " ".join(line.removeprefix("#").strip() for line in lines)
    assert re.search(r"\bCost: \w", head)
    (expected,) = re.findall(r"\bExpect: (.+)", head)
    # A figure with who measured it and where that is told, or that there is none.
    told = r"(measured|report)\b.*\d.*(\(\d{4}\.\d{5}\)|\(their repository|[\w/]+\.md)"
    assert re.search(rf"\bnobody has|{told}", expected)


def name_of(fragment: str) -> str:
    return fragment[:40]


TRIED = [
    ("train_dit_b", "datasets: {name: {path: ..., repeat: 1.0}, ...}", [{"data": {"datasets": {"a": {"path": "x", "repeat": 1.0}, "b": {"path": "y"}}}}]),
    ("train_dit_b", "or mmdit, uvit, unet", [{"model": {"kind": "mmdit", "size": "B"}}]),
    ("train_dit_b", "or mmdit, uvit, unet", [{"model": {"kind": "uvit", "size": "M"}}]),
    ("train_dit_b", "or mmdit, uvit, unet", [{"model": {"kind": "unet", "size": "sd15"}}]),
    *(("train_dit_b", "debug, tiny, S, B, L, XL", [f"model.size={size}"]) for size in ("debug", "tiny", "S", "B", "L", "XL")),
    ("train_dit_b", "hidden_size, depth and num_heads override it", ["model.hidden_size=128", "model.depth=3", "model.num_heads=4"]),
    ("train_dit_b", "or shared: fewer parameters", ["model.modulation=shared"]),
    ("train_dit_b", "muon: on the blocks' matrices", ["optimizer.kind=muon"]),
    ("train_dit_b", "cosine, linear, warmup_stable_decay", ["optimizer.schedule=cosine"]),
    ("train_dit_b", "cosine, linear, warmup_stable_decay", ["optimizer.schedule=linear"]),
    ("train_dit_b", "cosine, linear, warmup_stable_decay", ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_images=20_000_000"]),
    ("train_dit_b", "others beside it", ["ema.more_halflives_images=[1_000_000]"]),
    ("train_dit_b", "[0.05, 0.1] with snapshot_images", ["ema.sigma_rels=[0.05, 0.1]", "ema.snapshot_images=2_000_000"]),
    ("train_dit_b", "0: whole copies; 1 optimizer, 2 and gradients, 3 and weights", ["engine.zero_stage=3"]),
    ("train_dit_b", "or fp32, or auto", ["engine.precision=fp32"]),
    ("train_dit_b", "or fp32, or auto", ["engine.precision=auto"]),
    ("train_dit_b", "cpu: optimizer and averages in the host's memory", ["engine.offload_optimizer=cpu"]),
    ("train_dit_b", "cpu: weights too, with zero_stage 3", ["engine.offload_parameters=cpu", "engine.offload_optimizer=cpu", "engine.zero_stage=3"]),
    ("demo_train", "another data.path, a larger model.size and engine.precision: bf16", ["data.path=x", "model={kind: dit, size: B}", "engine.precision=bf16"]),
    ("fit_vae_openmoji", "or minutes: M", ["steps=null", "minutes=5"]),
    ("fit_vae_openmoji", "fp32 on a CPU without", ["precision=fp32"]),
    *(("prepare_folder", "or tars, table, imagefolder, classes", [f"sources={{mine: {source}}}"]) for source in (
        "{kind: tars, path: /x}", "{kind: table, path: /x, image: image, captions: {caption: 1}}",
        "{kind: imagefolder, path: /x, captions: {text: 1}}", "{kind: classes, path: /x, caption: 'a {name}'}")),
    ("prepare_folder", "any path may be a URL such as s3://bucket/pictures", ["sources.mine.path=s3://bucket/pictures"]),
    ("prepare_folder", "such as masks/*", ["sources.mine.exclude=[masks/*]"]),
    *(("prepare_folder", "train, validation or test", [f"sources.mine.split={split}"]) for split in ("train", "validation", "test")),
    ("prepare_folder", "1 makes all squares", ["images.bucket_max_aspect=1"]),
    ("prepare_folder", "or random, by the sample's key", ["images.crop=random"]),
    ("prepare_folder", "the mirrored picture as well", ["images.flip=true"]),
    ("prepare_folder", "first frame; or reject", ["images.animated=reject"]),
    ("prepare_folder", "pictures without a caption; or keep", ["captions.empty=keep"]),
    ("prepare_folder", "each: one each", ["captions.lines=each"]),
    ("prepare_folder", "null: off", ["filters.min_side=null"]),
    ("prepare_folder", "{aesthetic: {min: 5}, lang: {one_of: [en]}, nsfw: {max: 0.2, missing: keep}}", ["filters.metadata={aesthetic: {min: 5}, lang: {one_of: [en]}, nsfw: {max: 0.2, missing: keep}}"]),
    ("prepare_folder", "in any source; or keep", ["filters.duplicates=keep"]),
    ("prepare_folder", "3 for instance", ["filters.near_duplicates=3"]),
    *(("prepare_folder", "or tf32, bf16, fp16", [f"vae.dtype={dtype}"]) for dtype in ("tf32", "bf16", "fp16")),
    ("prepare_folder", "{path: /models/dinov2-base, patch_pixels: 16}", ["vision_encoder={path: /models/dinov2-base, patch_pixels: 16}"]),
    ("prepare_folder", "a number: train on what is there so far", ["publish_every_shards=10"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "fragment", "overrides"), TRIED, ids=lambda x: name_of(str(x)))
def test_what_a_comment_offers_is_accepted(file, fragment, overrides):
    path = CONFIGS / f"{file}.yaml"
    assert fragment in path.read_text()
    config = load(path, *overrides)
    if isinstance(config, TrainConfig):
        sizes = {"latent_channels": 4, "text_dim": 8, "pooled_dim": 8, "latent_downscale": 8}
        with torch.device("meta"):
            build_model(config.model.with_sizes(sizes))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_lines_that_are_commented_out_are_sound_once_they_are_not(path, tmp_path):
    """A commented line of YAML, `# key: ...`, uncommented by itself or with the lines that belong to it."""
    lines = path.read_text().splitlines()
    yaml_line = re.compile(r"^( *)# ( *)([a-z_]\w*): ?([\[{].*)?$")
    for number, line in enumerate(lines):
        match = yaml_line.match(line)
        if not match or match[2]:
            continue
        block = [line]
        for following in lines[number + 1 :]:
            if not (found := yaml_line.match(following)) or not found[2]:
                break
            block.append(following)
        if match[3] == "imagenet":  # labels come from all sources or from none
            continue
        opened = [text.replace("# ", "", 1) for text in block]
        changed = tmp_path / path.name
        changed.write_text("\n".join([*lines[:number], *opened, *lines[number + len(block) :]]))
        if match[3] == "stages":
            assert len(load_stages(changed, [])) == len(block) - 1
        else:
            load(changed)


ENCODERS = {
    "train_mmdit_2b_512": ({"t5": (256, 4096), "clip": (77, 768)}, 16),
    "train_mmdit_2b_1024": ({"t5": (256, 4096), "clip": (77, 768)}, 16),
    "train_pixart_512": ({"t5": (120, 4096)}, 4),
    "train_micro_budget_256": ({"clip": (77, 1024)}, 4),
    "train_unet_sd15_v": ({"clip": (77, 768)}, 4),
    "train_dit_b": ({"clip": (77, 768)}, 16),
    "train_sit_xl_imagenet256": ({}, 4),
    "demo_train": ({"minilm": (32, 384)}, 4),
    "train_mmdit_flux2": ({"t5gemma": (256, 2304)}, 128),
    "train_i1_xl_256": ({"t5gemma": (256, 2304)}, 128),
    "train_dit_dc_ae": ({"gemma2": (300, 2304)}, 32),
    "train_dit_qwen_image": ({"qwen3": (512, 2560)}, 16),
    "train_jit_pixels256": ({}, 3),
    "train_unet_sdxl": ({"clip_l": (77, 768), "clip_g": (77, 1280)}, 4),
}
# What one latent of the recipes' codecs stands for, in pixels; of the others' it is 8.
DOWNSCALE = {"train_mmdit_flux2": 16, "train_dit_dc_ae": 32, "train_jit_pixels256": 1}
DOWNSCALE["train_i1_xl_256"] = 16
SMALL = {"i1_xl_256": ["model.hidden_size=64", "model.depth=3", "model.num_heads=2"]}
SIDE_BY_SIDE = "data.text={tokens: [[clip_l, clip_g]], pooled: [clip_g]}"


def stand_in(file: str, folder: Path, width: int | None = None) -> list[str]:
    """Overrides that make a config train on a few samples of the shapes that it is for; width: of all text."""
    encoders, channels = ENCODERS[file]
    encoders = {name: (length, width or dim) for name, (length, dim) in encoders.items()}
    beside = "sdxl" in file
    kind = Kind(
        encoders=encoders,
        channels=channels,
        label=not encoders,
        downscale=DOWNSCALE.get(file, 8),
        pads="kept" if beside else "masked",
        ragged=not beside,
    )
    data = make_dataset(folder / "data", [((64, 64), 16)], kind)
    few = ["training.global_batch=8", "engine.micro_batch=null"]
    named = read_yaml(CONFIGS / f"{file}.yaml", [])["data"].get("datasets", {})
    few += [f"data.datasets.{name}.path={data}" for name in named] or [f"data.path={data}"]
    return [*few, f"run={folder}/run", *([SIDE_BY_SIDE] if beside else [])]


@pytest.mark.parametrize("file", sorted(p.stem for p in CONFIGS.glob("*train*.yaml")))
def test_a_config_fits_the_data_set_that_its_comments_name(file, tmp_path):
    config = load_config(TrainConfig, CONFIGS / f"{file}.yaml", stand_in(file, tmp_path))
    fit_run(config).loader.close()


RECIPES = ["i1_xl_256", "mmdit_flux2", "dit_dc_ae", "dit_qwen_image", "jit_pixels256", "unet_sdxl"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_of_today_trains_two_steps_with_small_stand_ins(recipe, tmp_path):
    file, options = f"train_{recipe}", ["training.images=16", "optimizer.warmup_images=0"]
    options += ["engine={zero_stage: 0, precision: fp32, compile: false}", "model.size=debug"]
    options += SMALL.get(recipe, [])
    options += ["monitor={every_steps: 1, mfu: false, prompts: []}", "checkpoint={every_steps: 2}"]
    if "jit" not in file:
        options += ["model.text_dim=null", "model.pooled_dim=null"]
    given = [*stand_in(file, tmp_path, width=8), *options]
    train_factory.train(CONFIGS / f"{file}.yaml", *given)
    losses = [loss for _, loss in train_factory.scalars(tmp_path / "run", "loss/train")]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)


FOLLOW_UPS = [
    ("train_mmdit_2b_512", "train_mmdit_2b_1024", ["start_from.run=/data/runs/mmdit_512"]),
    ("train_micro_budget_256", "train_micro_budget_256", ["model.masking=null", "model.depth=32", "run=/data/runs/finished", "start_from.run=/data/runs/micro_budget", "training.images=100_000_000"]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "overrides"), FOLLOW_UPS)
def test_a_run_that_goes_on_from_another_has_the_same_network(first, second, overrides):
    before = load_config(TrainConfig, CONFIGS / f"{first}.yaml", [])
    path = CONFIGS / f"{second}.yaml"
    said = " ".join(comments(path))
    assert all(override in said for override in overrides)
    after = load_config(TrainConfig, path, overrides)
    assert after.start_from is not None
    assert after.start_from.run == before.run != after.run
    assert after.objective.path == before.objective.path
    with torch.device("meta"):
        networks = [build_model(config.model).state_dict() for config in (before, after)]
    shapes = [{name: tensor.shape for name, tensor in network.items()} for network in networks]
    assert shapes[0] == shapes[1]
