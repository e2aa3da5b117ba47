"""Exported folders, opened by stock diffusers where flowmill cannot be imported."""

import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.schema import TextRecord, read_shard_table
from models.config import InputError, differences, parse_config
from models.networks import build_model
from models.prompts import parse_class
from pipeline.config import TrainConfig
from pipeline.evaluation import subjects
from pipeline.evaluation.config import Options
from pipeline.evaluation.measure import evaluate
from pipeline.export import main
from pipeline.inference.exported import export, network_source, save_network, whole_source
from pipeline.inference.grid import read_picture
from pipeline.inference.model_card import model_card
from pipeline.inference.painter import Painter, largest_bucket
from pipeline.objectives.config import SamplerConfig
from pipeline.objectives.objective import Objective
from pipeline.runs.trained import Trained, open_trained
from tests.test_evaluate import Convolutions

CPU = torch.device("cpu")
TEXT = ("a red apple", "volcano")  # of two lengths, so that one is padded
SHARED = {"kind": "dit", "modulation": "shared", "position_extent": 4.0, "pooled_dim": 0}
CLASSES = {"kind": "dit", "num_classes": 5, "timestep_shift": 1}
MMDIT = {"kind": "mmdit", "qk_norm": True}
I1 = {"kind": "mmdit", "depth": 3, "modulation": "none", "pooled_dim": 0, "sandwich_norm": True}
I1 |= {"swiglu": True, "long_skips": True, "text_adapter": 1, "text_rope": True}
SQUARE = ("3", "0")
DDIM = {"name": "ddim", "guidance_scale": 2.0}
FLOW_TABLE = {"path": "vp_discrete", "prediction": "flow", "timesteps": "uniform"}
# Name -> model section, objective or its preset, sampler beside 10 steps and seed 7, prompts, class of network/.
CASES: dict[str, tuple[dict, Any, dict, tuple[str, ...], str]] = {
    "dit": (
        {"kind": "dit", "size_conditioning": True, "masking": {"mixer_depth": 1}},
        {"preset": "sd3-rf-logit-normal", "shift": {"kind": "constant", "value": 3.0}},
        {"name": "unipc", "guidance_scale": 3.0, "guidance_interval": [0.2, 0.9]},
        TEXT,
        "FlowmillNetwork",
    ),
    "dit_of_classes_and_text": (
        {"kind": "dit", "num_classes": 5, "rope": True, "register_tokens": 2, "qk_norm": True},
        {
            "path": "vp_cosine",
            "prediction": "v",
            "shift": {"kind": "resolution", "base_pixels": 20},
        },
        {"guidance_scale": 2.0},
        ("3: a red apple", "0: volcano"),
        "FlowmillNetwork",
    ),
    "dit_of_classes": (CLASSES, "min-snr-v", DDIM, SQUARE, "DiTTransformer2DModel"),
    "pixart": (SHARED, "sd15-epsilon", DDIM, TEXT, "PixArtTransformer2DModel"),
    "mmdit": (MMDIT, "flux-shift", {"guidance_scale": 2.0}, TEXT, "SD3Transformer2DModel"),
    "i1": (I1, "sd3-rf-logit-normal", {"guidance_scale": 2.0}, TEXT, "FlowmillNetwork"),
    "uvit": ({"kind": "uvit"}, "edm", {}, TEXT, "FlowmillNetwork"),
    "uvit_flow_on_a_table": (
        {"kind": "uvit"},
        FLOW_TABLE,
        {"name": "ddim"},
        TEXT,
        "FlowmillNetwork",
    ),
    "unet_carried_over": (
        {"kind": "unet"},
        {"network": {"path": "vp_discrete", "prediction": "epsilon"}},
        {"name": "heun", "guidance_scale": 2.0},
        TEXT,
        "UNet2DConditionModel",
    ),
    "unet": (
        {"kind": "unet", "size_conditioning": True},
        "nai3-v-ztsnr",
        {"name": "ddim", "guidance_scale": 3.0, "guidance_rescale": 0.7},
        TEXT,
        "UNet2DConditionModel",
    ),
}
# Drawn beside each case's own sampler; diffusers' DDIM walks 62 levels, the last -1, where 61 are asked for.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "uvit": [{"name": name} for name in ("euler_ancestral", "dpmpp_2m", "unipc", "heun")],
    "unet": [{"name": "ddim", "num_steps": 61}, {"name": "euler_ancestral", "num_steps": 28}],
    "dit": [{"shift": {"kind": "resolution", "base_pixels": 30}}],
}
# Opens every folder named, draws its prompts by each sampler, and fails if anything of ours is imported.
STOCK = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("models", "pipeline", "data_prep", "cluster"):
            raise ImportError(f"{name}: flowmill is not here")

sys.meta_path.insert(0, Blocked())
import numpy as np, torch
from diffusers import DiffusionPipeline
for folder in map(Path, sys.argv[1:]):
    case = json.loads((folder.parent / "case.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    height, width = case["size"]
    given = {"height": height, "width": width, "seed": 7, "output_type": "np"}
    for number, sampler in enumerate(case["samplers"]):
        out = pipeline(case["prompts"], sampler=sampler, **given)
        np.save(folder.parent / f"stock_{number}.npy", out.images)
assert not {"models", "pipeline", "data_prep"} & {name.split(".")[0] for name in sys.modules}
"""


def make_trained(run: Path, name: str) -> Trained:
    """The run with another network, of random weights none of which is zero, and another objective."""
    trained = open_trained(run, "ema", None)
    model, objective, sampler, prompts, _ = CASES[name]
    objective = {"preset": objective} if isinstance(objective, str) else objective
    manifest, sizes = trained.manifest, {"text_dim": 16, "pooled_dim": 16, "latent_downscale": 4}
    if prompts == SQUARE:
        bucket = manifest.buckets[0].model_copy(update={"height": 32, "width": 32})
        manifest = manifest.model_copy(
            update={"text": TextRecord(tokens=[], pooled=[], roles={}), "buckets": [bucket]}
        )
        sizes |= {"text_dim": 0, "pooled_dim": 0}
    data = trained.config.model_dump(mode="json")
    data["model"] = {"size": "debug", "latent_channels": 4, **model}
    data |= {"objective": objective, "sampler": {"num_steps": 10, "seed": 7, **sampler}}
    config = parse_config(TrainConfig, data, name)
    config = config.model_copy(update={"model": config.model.with_sizes(sizes)})
    torch.manual_seed(1)
    network = build_model(config.model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05 + 0.3 / parameter.shape[-1] ** 0.5)
    return replace(trained, config=config, manifest=manifest, state=network.state_dict())


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> dict[str, Path]:
    """Every case exported, and drawn by stock diffusers in one process of its own."""
    home, folders = tmp_path_factory.mktemp("exported"), {}
    for name, (*_, prompts, _) in CASES.items():
        trained = make_trained(trained_run, name)
        folder = home / name / "model"
        folder.parent.mkdir()
        export(trained, folder, "fp32", "link" if name == "uvit" else "copy")
        size = (32, 32) if prompts == SQUARE else (24, 40)
        case = {"prompts": prompts, "size": size, "samplers": [{}, *OTHERS.get(name, [])]}
        (home / name / "case.json").write_text(json.dumps(case))
        folders[name] = folder
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *(str(folder) for folder in folders.values())],
        cwd=home,
        env=environment | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folders


def draw(
    trained: Trained, case: dict[str, Any], changes: dict[str, Any], masked: bool = True
) -> torch.Tensor:
    """What `flowmill sample` draws."""
    painter = Painter(trained.encoders(CPU), case["prompts"], trained.config.model.num_classes)
    if not masked:
        painter.encoded.text_mask[:] = True
    sampler = parse_config(SamplerConfig, trained.config.sampler.model_dump() | changes, "test")
    network, objective = trained.network(CPU), Objective(trained.config.objective)
    return painter.draw(network, objective, sampler, tuple(case["size"]), [0, 1])


def opened(folder: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The case of an exported folder, and what stock diffusers drew with each sampler, 0 to 255."""
    case = json.loads((folder.parent / "case.json").read_text())
    drawn = [np.load(folder.parent / f"stock_{i}.npy") for i in range(len(case["samplers"]))]
    return case, [torch.from_numpy(part * 255).permute(0, 3, 1, 2) for part in drawn]


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_draws_the_picture_that_sample_draws(exported, trained_run, name):
    trained, (case, stock) = make_trained(trained_run, name), opened(exported[name])
    for changes, picture in zip(case["samplers"], stock, strict=True):
        ours = draw(trained, case, changes)
        apart = (ours.float() - picture).abs()
        print(f"{name} {changes}: {apart.max():.3f} of 255 at most, {apart.mean():.4f} on average")
        # Rounding alone is 0.5; networks of diffusers' classes sum in another order.
        assert apart.max() < 0.6, changes
        assert (ours[0].float() - ours[1].float()).abs().mean() > 1  # prompts and noise matter
    assert all((a - b).abs().max() > 2 for a, b in itertools.combinations(stock, 2))
    index = json.loads((exported[name] / "model_index.json").read_text())
    assert index["network"][1] == CASES[name][-1]


def test_the_comparison_notices_another_step_another_shift_and_a_lost_mask(exported, trained_run):
    trained, (case, (stock, _)) = make_trained(trained_run, "dit"), opened(exported["dit"])
    shift = {"kind": "constant", "value": 2.5}
    for changes in ({"num_steps": 9}, {"guidance_interval": (0.0, 1.0)}, {"shift": shift}):
        assert (draw(trained, case, changes).float() - stock).abs().max() > 4, changes
    assert (draw(trained, case, {}, masked=False).float() - stock).abs().max() > 4


SCHEDULERS = {
    "dit": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "dit_of_classes_and_text": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "mmdit": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "pixart": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
    "uvit": {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0, "sigma_data": 1.0},
    "unet_carried_over": {"prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
    "unet": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_s_config_has_the_noise_levels_of_the_path(exported, trained_run, name):
    trained, folder = make_trained(trained_run, name), exported[name] / "scheduler"
    config = json.loads((folder / "scheduler_config.json").read_text())
    assert config.items() >= SCHEDULERS[name].items()
    if config["_class_name"] == "DDIMScheduler":
        objective, t = trained.config.objective, np.array([0.05, 0.3, 0.7, 0.95])
        levels = diffusers.DDIMScheduler.from_pretrained(folder).alphas_cumprod[
            (t * 1000).round().astype(int)
        ]
        if objective.shift is not None:
            height, width = largest_bucket(trained.manifest)
            t = objective.path.shift(t, objective.shift.factor((height // 4, width // 4)))
        alpha, _ = objective.own.path.alpha_sigma(torch.from_numpy(t).float())
        # fp32 products of a thousand factors.
        assert torch.allclose(levels.sqrt(), alpha, atol=2e-4)


def test_an_exported_pipeline_refuses_what_it_has_not_and_takes_noise_as_diffusers_does(
    exported, trained_run
):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        exported["dit"], trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    for sampler, got in (({"name": "euler_a"}, "'euler_a'"), ({"steps": 3}, "'steps'")):
        with pytest.raises(ValueError, match=got):
            pipeline("volcano", sampler=sampler)
    given = {"num_inference_steps": 2, "height": 24, "width": 40, "output_type": "pt"}

    def drawn(**more: Any) -> torch.Tensor:
        return pipeline("volcano", **given, **more).images

    one = drawn(generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, drawn(latents=noise))
    assert torch.equal(one[0], drawn(generator=[torch.Generator().manual_seed(1)] * 1)[0])
    assert not torch.equal(drawn(), drawn())
    assert torch.equal(drawn(seed=3), drawn(seed=3, places=[0]))
    assert not torch.equal(drawn(seed=3), drawn(seed=3, places=[1]))


def test_the_single_file_says_what_it_is_and_holds_the_weights_under_our_names(
    exported, trained_run
):
    trained = make_trained(trained_run, "pixart")
    path = exported["pixart"] / "model.safetensors"
    weights = load_file(path)
    assert weights.keys() == trained.state.keys()
    assert all(torch.equal(weights[name], value) for name, value in trained.state.items())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "flowmill-dit-debug"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    config = parse_config(TrainConfig, json.loads(metadata["flowmill.config"]), "metadata")
    assert differences(config, trained.config).keys() == {"data.path", "run"}
    assert json.loads(metadata["flowmill.data"])["counts"]["kept"] == 48


def test_the_card_has_counts_objective_compute_curves_and_pictures(exported):
    folder = exported["mmdit"]
    card = (folder / "README.md").read_text()
    for text in ("48 pictures kept of 48", "120 steps of 8", "960 seen", "flux", "fp32", "mmdit"):
        assert text in card, text
    assert diffusers.utils.load_image(str(folder / "curves.png")).size[0] == 2 * 560
    assert diffusers.utils.load_image(str(folder / "samples.png")).size[0] > 100
    assert (exported["uvit"] / "text_encoder").is_symlink()
    assert not (folder / "text_encoder").is_symlink()


PROMPTS = [
    'a "red" apple', "it's", 'both "and" \'so\'', "back\\slash", "two\nlines", "```", "{braces}", "\u201cquoted\u201d",
    "# [title](x)", "\ud83d\ude00", "tab\there", '"""', "\u2028", "%s", "",
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["dit", "dit_of_classes"])
def test_the_card_s_example_is_python_that_draws_whatever_the_prompt_is(
    exported, trained_run, tmp_path, name, prompt
):
    trained = make_trained(trained_run, name)
    prompts = {"dit": [prompt], "dit_of_classes": []}[name]
    monitor = trained.config.monitor.model_copy(update={"prompts": prompts})
    trained = replace(trained, config=trained.config.model_copy(update={"monitor": monitor}))
    card = model_card(trained, tmp_path, "fp32", ["", name], "mit")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["license"] == "mit"
    blocks = re.findall(r"^```(\w+)\n(.*?)\n```$", body, re.M | re.S)
    kinds = dict(blocks)
    (call,) = [
        node.value.value.value
        for node in ast.parse(kinds["python"]).body
        if isinstance(node, ast.Expr)
    ]
    given = ast.literal_eval(call.args[0])
    assert given == (prompt if name == "dit" else "0")
    parse_class(given, 5) if name == "dit_of_classes" else None
    assert yaml.safe_load(kinds["yaml"])["monitor"]["prompts"] == prompts
    assert card.encode()


@pytest.mark.parametrize(("step", "shown"), [(120, True), (60, True), (90, False)])
def test_the_card_shows_pictures_and_curves_of_its_own_step(trained_run, tmp_path, step, shown):
    trained = replace(open_trained(trained_run, "ema", None), step=step)
    card = model_card(trained, tmp_path, "fp32", ["", ""], "unknown")
    assert (tmp_path / "samples.png").is_file() == ("samples.png" in card) == shown
    if shown:
        sheet = trained_run / "samples" / f"step_{step:08d}.png"
        assert (tmp_path / "samples.png").read_bytes() == sheet.read_bytes()
    raw = model_card(replace(trained, weights="raw"), tmp_path, "fp32", ["", ""], "unknown")
    assert "samples.png" not in raw
    pictures = read_shard_table(trained_run.parent / "dataset").to_pylist()
    trained_on = sum(row["num_samples"] for row in pictures if row["split"] == "train")
    assert f"{8 * step / trained_on:.2f} epochs" in card


def test_nothing_that_is_given_away_says_where_it_lay(exported, trained_run):
    places = [
        str(trained_run.parent),
        str(open_trained(trained_run, "ema", None).manifest.codec.path),
    ]
    for name, folder in exported.items():
        for path in folder.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert not [place for place in places if place.encode() in data], path
        assert name == "uvit" or not any(path.is_symlink() for path in folder.iterdir())


def test_large_weights_are_cut_into_shards_of_the_type_asked_for(trained_run, tmp_path):
    trained = make_trained(trained_run, "unet")
    entry = save_network(trained, tmp_path / "network", torch.bfloat16, max_shard="200KB")
    assert entry == ["diffusers", "UNet2DConditionModel"]
    assert len(list((tmp_path / "network").glob("*-of-*.safetensors"))) > 1
    network = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "network", torch_dtype=torch.bfloat16
    )
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained.state[f"unet.{name}"].bfloat16()), name


@pytest.mark.parametrize("kind", ["dit", "mmdit", "uvit", "pipeline"])
def test_exported_source_needs_torch_and_diffusers_alone_and_defines_no_name_twice(kind):
    whole = whole_source("pipeline.inference.diffusers_pipeline") if kind == "pipeline" else ""
    source = whole or network_source(kind)
    lines = [x for x in source.splitlines() if x.startswith(("import ", "from "))]
    others = {line.split()[1].split(".")[0] for line in lines} - sys.stdlib_module_names
    assert others <= {"torch", "diffusers", "numpy"}
    names = [node.name for node in ast.parse(source).body if hasattr(node, "name")]
    assert len(names) == len(set(names))


def test_a_folder_that_exists_is_not_written_over(trained_run, tmp_path):
    app = typer.Typer()
    app.command()(main)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        app([str(trained_run), str(tmp_path / "there")], standalone_mode=False)
    app([str(trained_run), str(tmp_path / "new"), "--dry-run"], standalone_mode=False)
    assert not (tmp_path / "new").exists()
    more = ["--dtype=fp16", "--weights=raw"]
    app([str(trained_run), str(tmp_path / "new"), *more], standalone_mode=False)
    with safe_open(tmp_path / "new" / "new.safetensors", "pt") as file:
        assert file.metadata()["flowmill.weights"] == "raw at step 120"
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_any_changed_file_that_a_pipeline_reads_gives_it_another_hash(exported, tmp_path):
    folder = Path(shutil.copytree(exported["pixart"], tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    hashes = [subjects.model_sha256(folder, index)]
    read = ["network", "vae", "text_encoder", "tokenizer", "scheduler"]
    for path in [
        *(min((folder / part).glob("*.*")) for part in read),
        folder / "flowmill_pipeline.py",
    ]:
        path.write_bytes(path.read_bytes() + b" ")
        hashes.append(subjects.model_sha256(folder, index))
    assert len(set(hashes)) == len(hashes) == 7
    (folder / "README.md").write_text("another card")
    assert subjects.model_sha256(folder, index) == hashes[-1]


def test_an_exported_folder_is_evaluated_as_the_run_that_it_is_of(exported, trained_run, tmp_path):
    """Its held-out error is the network's own, and its code is run only when that is asked for."""
    trained, folder = make_trained(trained_run, "dit"), exported["dit"]
    torch.jit.script(Convolutions()).save(str(tmp_path / "fixed.pt"))
    options = Options(
        folder,
        features=[f"fixed={tmp_path / 'fixed.pt'}"],
        num_pictures=3,
        reference=trained_run.parent / "dataset",
        split="train",
        num_reference=4,
        heldout=3,
        output=tmp_path,
    )
    with pytest.raises(InputError, match="code of its own"):
        subjects.pipeline_subject(folder, [], False, CPU)
    overrides = ["sampler.num_steps=2", "sampler.guidance_scale=1.5"]
    subject = subjects.pipeline_subject(folder, overrides, True, CPU)
    name, (errors, fixed) = evaluate(subject, None, options, CPU)
    about = fixed.measured_with
    assert "fd_fixed" in fixed.figures
    assert (about["num_pictures"], about["num_reference"]) == (3, 4)
    sampler = trained.config.sampler.model_dump(mode="json")
    assert about["sampler"] == sampler | {"num_steps": 2, "guidance_scale": 1.5}
    assert len(list((tmp_path / name / "pictures").glob("*.png"))) == 3
    run = subjects.run_subject(trained, overrides, CPU)
    options = replace(options, output=tmp_path / "run")
    own_name, (own, drawn) = evaluate(run, trained, options, CPU)
    assert own.figures == pytest.approx(errors.figures, rel=1e-5)
    for path in (tmp_path / name / "pictures").glob("*.png"):  # the very pictures of the run
        ours = read_picture(tmp_path / "run" / own_name / "pictures" / path.name).int()
        assert (ours - read_picture(path).int()).abs().max() <= 1
    assert drawn.measured_with["num_reference"] == about["num_reference"]
    index = json.loads((folder / "model_index.json").read_text())
    stock = {"_class_name": "StableDiffusionPipeline", "scheduler": index["scheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(stock))
    with pytest.raises(InputError, match=r"only sampler\.num_steps"):
        subjects.pipeline_subject(tmp_path, ["sampler.name=heun"], True, CPU)
