"""Held-out error, picture metrics against torchmetrics on the same files, and the whole command."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from typer.testing import CliRunner

from data_prep.schema import read_shard_table
from models.config import InputError
from models.networks import build_model
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.evaluate import main
from pipeline.evaluation.config import Options
from pipeline.evaluation.measure import evaluate, find_copies
from pipeline.evaluation.metrics import (
    ClipNetwork,
    FeatureNetwork,
    clip_score,
    compare,
    precision_recall,
    squared_mmd,
)
from pipeline.evaluation.reference import (
    DatasetPictures,
    FilePictures,
    features_of,
    find_pictures,
)
from pipeline.evaluation.subjects import run_subject
from pipeline.inference.grid import read_picture
from pipeline.inference.heldout import LOG_SNR, time_at, x0_errors
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from pipeline.runs.trained import open_trained
from tests import prep_factory, train_factory
from tests.prep_factory import encoded
from tests.shard_factory import Kind, make_dataset
from tests.test_text_encoder import CLIP, save_tokenizer

PRESETS = ("sd15-epsilon", "nai3-v-ztsnr", "min-snr-v", "sd3-rf-logit-normal", "flux-shift", "edm")


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    data = make_dataset(
        tmp_path_factory.mktemp("heldout"), [((32, 32), 8)], Kind(), heldout=[((32, 32), 60)]
    )
    loader = Loader(DataConfig(path=str(data)), global_batch=8, seed=0)
    yield loader
    loader.close()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_network_that_implies_x0_of_zero_errs_by_the_latents_power_at_every_level(loader, preset):
    objective = Objective(ObjectiveConfig.model_validate({"preset": preset}))
    (batch,), codec = loader.heldout_batches(60), loader.manifest.codec

    def network(x_t, t, conditions):
        _, sigma = objective.alpha_sigma(t)
        noise = x_t / sigma.view(-1, 1, 1, 1)
        return objective.target(torch.zeros_like(x_t), noise, t)

    errors = x0_errors(network, objective, codec, batch)
    assert errors.shape == (len(LOG_SNR), 60)
    # Mean and std of the moments are uniform in [0, 1], the scale 0.5: 0.25 (1/3 + 1/3) = 1/6.
    # 1920 elements, a tenth is four standard deviations.
    assert errors.mean() == pytest.approx(1 / 6, rel=0.1)
    # fp32 and, at log SNR 6, noise recovered by a division by 0.05.
    assert (errors - errors[:1]).abs().max() < 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_levels_are_where_they_say(preset):
    objective = Objective(ObjectiveConfig.model_validate({"preset": preset}))
    for log_snr in LOG_SNR:
        alpha, sigma = objective.alpha_sigma(torch.tensor([time_at(objective, log_snr)]))
        # Discrete paths have 1000 levels; their gaps are widest where they are clean.
        assert float(2 * (alpha / sigma).log()) == pytest.approx(log_snr, abs=0.2)


def test_any_cut_of_the_heldout_batch_gives_the_same_errors(loader):
    objective = Objective(ObjectiveConfig())
    (batch,), codec = loader.heldout_batches(6), loader.manifest.codec
    network = lambda x_t, t, given: torch.tanh(x_t) * given.micro[:, :1, None, None]  # noqa: E731
    whole = x0_errors(network, objective, codec, batch.rows(2, 5), rounds=2)
    parts = [
        x0_errors(network, objective, codec, batch.rows(i, i + 1), rounds=2) for i in range(2, 5)
    ]
    assert torch.allclose(whole, torch.cat(parts, 1), rtol=1e-6)


# --- distances between sets of pictures -----------------------------------------------------------

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    """A fixed feature network as its file has it: uint8 in, 16 features out, whatever the size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh()
        )

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features  # NVIDIA's Inception file gives class scores unless asked
        found = self.layers(images.float() / 127.5 - 1).flatten(2)
        return 20 * torch.cat([found.mean(2), found.std(2)], dim=1)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "inception.pt"
    torch.jit.script(Convolutions()).save(str(path))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """60 smooth pictures, 60 more of the same kind, and noise."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name in ("real", "more", "noise"):
        (folder / name).mkdir()
        for i in range(60):
            pixels = prep_factory.pixels(i + 1000 * (name == "more"), 24, 24)
            if name == "noise":
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return {name: folder / name for name in ("real", "more", "noise")}


def measured(network_file: Path, sets: dict[str, Path], a: str, b: str) -> dict[str, float]:
    network = FeatureNetwork.load("inception", network_file, CPU)
    cache = sets[a].parent / "cache"
    pictures = (FilePictures(name, find_pictures(sets[name])) for name in (a, b))
    return compare(*(features_of(network, p, 7, CPU, cache) for p in pictures), CPU)


def test_fid_and_kid_from_files_and_from_the_cache_are_torchmetrics_own(network_file, sets):
    module = torch.jit.load(network_file)
    frechet = FrechetInceptionDistance(AskedForFeatures(module))
    kernel = KernelInceptionDistance(AskedForFeatures(module), subset_size=60)
    for name in ("real", "noise"):
        images = torch.stack([read_picture(path) for path in sorted(sets[name].iterdir())])
        for metric in (frechet, kernel):
            metric.update(images, real=name == "real")
    for _ in range(2):  # computed, then read back
        found = measured(network_file, sets, "real", "noise")
        # They keep float32 features where we compare in float64.
        assert found["fd"] == pytest.approx(float(frechet.compute()), rel=1e-4)
        assert found["kid"] == pytest.approx(float(kernel.compute()[0]), rel=1e-3)
    assert len(list((sets["real"].parent / "cache").glob("inception_*.safetensors"))) >= 2


class AskedForFeatures(nn.Module):
    num_features = 16

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images, return_features=True)


def test_real_against_itself_is_nothing_against_its_like_little_and_against_noise_much(
    network_file, sets
):
    same = measured(network_file, sets, "real", "real")
    like = measured(network_file, sets, "real", "more")
    noise = measured(network_file, sets, "real", "noise")
    assert abs(same["fd"]) < 1e-5 * noise["fd"]  # the root of a product of covariances
    assert same["precision"] == same["recall"] == 1
    assert like["fd"] < 0.1 * noise["fd"]  # of so few pictures it is biased upwards, KID is not
    assert abs(like["kid"]) < 0.05 * noise["kid"]
    assert like["precision"] > 0.7
    assert like["recall"] > 0.7
    assert noise["precision"] == noise["recall"] == 0


def test_a_changed_picture_or_network_is_not_taken_from_the_cache(tmp_path, network_file, sets):
    network, cache = FeatureNetwork.load("inception", network_file, CPU), tmp_path / "cache"
    for i, source in enumerate([*sorted(sets["real"].iterdir())[:3], sets["noise"] / "000.png"]):
        (tmp_path / f"{i}.bmp").write_bytes(encoded(Image.open(source), "BMP"))
    paths = [tmp_path / f"{i}.bmp" for i in range(3)]
    first = features_of(network, FilePictures("", paths), 2, CPU, cache)
    # Another picture of the same name, size and time.
    before = paths[1].stat()
    (tmp_path / "3.bmp").replace(paths[1])
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths[1].stat().st_size == before.st_size
    second = features_of(network, FilePictures("", paths), 2, CPU, cache)
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])
    other = replace(network, sha256="other", module=nn.Flatten())
    wide = features_of(other, FilePictures("", paths, (4, 4)), 2, CPU, cache)
    assert wide.shape == (3, 48)


def test_the_same_pictures_elsewhere_are_taken_from_the_cache(tmp_path, network_file, sets):
    network, cache = FeatureNetwork.load("inception", network_file, CPU), tmp_path / "cache"
    for folder in (sets["real"], Path(shutil.copytree(sets["real"], tmp_path / "moved"))):
        features_of(network, FilePictures("", find_pictures(folder)), 7, CPU, cache)
    assert len(list(cache.iterdir())) == 1


def test_what_feeds_a_network_belongs_to_its_hash(tmp_path):
    folder = save_clip(tmp_path / "clip")
    hashes = [ClipNetwork(folder, CPU).sha256]
    for name in ("preprocessor_config.json", "tokenizer_config.json", "model.safetensors"):
        file = folder / name
        if name.endswith(".json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0, 0, 0]}))
        else:
            save_file({n: t + 1 for n, t in load_file(file).items()}, file, {"format": "pt"})
        hashes.append(ClipNetwork(folder, CPU).sha256)
    assert len(set(hashes)) == 4


def test_a_part_of_a_model_that_draws_otherwise_gives_it_another_hash(trained_run):
    trained = open_trained(trained_run, "ema", None)
    state, config, manifest = dict(trained.state), trained.config, trained.manifest
    name = next(iter(state))
    others = {
        "weights": replace(trained, state=state | {name: state[name] + 1}),
        "objective": replace(
            trained,
            config=config.model_copy(update={"objective": ObjectiveConfig(uniform_fraction=0.1)}),
        ),
        "codec": replace(
            trained,
            manifest=manifest.model_copy(
                update={"codec": manifest.codec.model_copy(update={"weights_sha256": "0"})}
            ),
        ),
    }
    hashes = {name: other.model_sha256 for name, other in others.items()}
    assert len({*hashes.values(), trained.model_sha256}) == 4
    moved = manifest.codec.model_copy(update={"path": "elsewhere"})
    same = replace(trained, manifest=manifest.model_copy(update={"codec": moved}), run=Path("copy"))
    assert same.model_sha256 == trained.model_sha256


def test_a_network_whose_features_depend_on_the_size_is_refused():
    network = FeatureNetwork("flat", nn.Flatten(), "")
    pictures = [torch.zeros(3, 4, side, dtype=torch.uint8) for side in (4, 4, 6)]
    with pytest.raises(InputError, match="a network that resizes"):
        network.features(pictures, 2, CPU)


def test_precision_and_recall_are_the_paper_s_definition_counted_point_by_point():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.8 + 1.2

    def inside(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]  # 0: itself
        hits = [
            any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True))
            for p in points
        ]
        return np.mean(hits)

    found = precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == pytest.approx((inside(fake, real), inside(real, fake)))


def gaussians(number: int, width: int, mean: float, std: float) -> tuple[torch.Tensor, ...]:
    """Draws of N(0, 1) and of N(mean, std^2), each independent in every feature."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, number, width, generator=generator, dtype=torch.float64)
    return real, mean + std * fake


def rbf_kernel(x: torch.Tensor, y: torch.Tensor, gamma: float) -> np.ndarray:
    return np.exp(-gamma * cdist(x, y, "sqeuclidean"))


def test_mmd_of_gaussians_is_the_integral_and_that_of_scipys_distances():
    sigma, width, mean, std = 3.0, 4, 0.8, 0.5
    real, fake = gaussians(3000, width, mean, std)

    def kernel(variance: float, shift: float) -> float:
        """Mean of the kernel over a difference that is N(shift, variance) in every feature."""
        whole = sigma**2 + variance
        return (sigma**2 / whole) ** (width / 2) * np.exp(-width * shift**2 / (2 * whole))

    expected = kernel(2, 0) + kernel(2 * std**2, 0) - 2 * kernel(1 + std**2, mean)
    found = squared_mmd(real, fake, sigma)
    assert found == pytest.approx(expected, rel=0.05)
    rbf = [
        rbf_kernel(a, b, 1 / (2 * sigma**2)).mean()
        for a, b in ((real, real), (fake, fake), (real, fake))
    ]
    assert found == pytest.approx(rbf[0] + rbf[1] - 2 * rbf[2], rel=1e-9)


def test_cmmd_takes_features_of_length_one_its_sigma_and_its_scale():
    real, fake = gaussians(50, 8, 1.0, 1.0)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (real, fake)]
    pairs = [rbf_kernel(a, b, 1 / 200).mean() for a, b in ((unit[0],) * 2, (unit[1],) * 2, unit)]
    found = compare(real, fake, CPU)["cmmd"]
    assert found == pytest.approx(1000 * (pairs[0] + pairs[1] - 2 * pairs[2]), rel=1e-6)


def test_half_the_pictures_show_the_bias_and_extrapolation_takes_most_of_it():
    """FD of Gaussians is |mean|^2 + sum (1 - std)^2 (1706.08500); that of finite sets is more by about c / number."""
    width, mean, std = 48, 0.1, 0.8
    found = compare(*gaussians(1000, width, mean, std), CPU)
    expected = width * (mean**2 + (1 - std) ** 2)
    bias, twice = found["fd"] - expected, found["fd_at_half"] - expected
    # 1.06 and 2.11 over 2.40; extrapolated 0.01.
    assert bias > 0.3 * expected
    assert 1.8 < twice / bias < 2.2
    assert abs(found["fd_extrapolated"] - expected) < 0.1 * bias
    assert found["cmmd_at_half"] > found["cmmd"] > found["cmmd_extrapolated"] > 0


def test_copies_of_training_pictures_are_counted_and_shown(tmp_path, network_file, sets):
    network = FeatureNetwork.load("inception", network_file, CPU)
    paths = {name: find_pictures(folder) for name, folder in sets.items()}
    (tmp_path / "pictures").mkdir()
    for i, source in enumerate([*paths["more"][:3], *paths["noise"][:7]]):
        shutil.copy(source, tmp_path / "pictures" / f"{i}.png")
    drawn = FilePictures(str(tmp_path / "pictures"), find_pictures(tmp_path / "pictures"))
    train, held = FilePictures("", paths["more"]), FilePictures("", paths["real"])
    fake, usual, seen = (features_of(network, p, 7, CPU, tmp_path) for p in (drawn, held, train))
    found = find_copies("inception", drawn, fake, usual, train, seen)
    assert found == {"copies_inception": pytest.approx(0.3)}
    picture = np.asarray(Image.open(tmp_path / "copies_inception.png"))
    side = 120  # 24 pixels, five times as large
    first, second = (
        picture[6 : 6 + side, 6 : 6 + side],
        picture[6 : 6 + side, 12 + side : 12 + 2 * side],
    )
    assert np.array_equal(first, second)
    assert np.array_equal(first[::5, ::5], np.asarray(Image.open(tmp_path / "pictures" / "0.png")))


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessorPil(
        size=size, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_clip_score_is_a_hundred_times_the_mean_cosine_of_clip_s_own_embeddings(tmp_path, sets):
    clip = ClipNetwork(save_clip(tmp_path / "clip"), CPU)
    pictures = [read_picture(path) for path in sorted(sets["real"].iterdir())[:5]]
    captions = ["a red apple", "volcano", "", "a green apple", "a red apple " * 20]  # one too long
    score = clip_score(clip, pictures, captions, 2)
    texts = clip.tokenizer(
        captions, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    pixels = clip.images(images=pictures, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**texts, **pixels)
    cosines = torch.nn.functional.cosine_similarity(output.text_embeds, output.image_embeds)
    assert score == pytest.approx(max(0.0, 100 * float(cosines.mean())), rel=1e-4)
    assert abs(float(cosines.mean())) > 1e-3


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
VIT = transformers.ViTConfig(**SIZES, intermediate_size=16)
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (lambda: transformers.ViTModel(VIT), None),
        (lambda: transformers.ResNetModel(transformers.ResNetConfig(**RESNET)), None),
        (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, patch_size=8)), None),
        (lambda: transformers.ViTModel(VIT, add_pooling_layer=False), "pooler.dense"),
        (lambda: transformers.ViTForImageClassification(VIT), "pooler.dense"),
        (
            lambda: transformers.ViTMAEModel(
                transformers.ViTMAEConfig(**SIZES, intermediate_size=16)
            ),
            "pools nothing",
        ),
    ],
)
def test_a_vision_network_is_measured_by_its_own_pooled_output_or_refused(
    tmp_path, sets, model, refused
):
    stock, pictures = model().eval(), [read_picture(p) for p in sorted(sets["real"].iterdir())[:3]]
    stock.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(tmp_path)
    if refused:
        with pytest.raises(InputError, match=refused):
            FeatureNetwork.load("vit", tmp_path, CPU)
        return
    with torch.no_grad():
        expected = stock(**processor(images=pictures, return_tensors="pt")).pooler_output.flatten(1)
    found = [FeatureNetwork.load("vit", tmp_path, CPU).features(pictures, 2, CPU) for _ in range(2)]
    assert torch.equal(*found)  # nothing in it is random
    torch.testing.assert_close(found[0].to(expected.dtype), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reference_picture_is_read_as_a_viewer_shows_it(tmp_path, orientation):
    pixels = prep_factory.pixels(1, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encoded(pixels, exif=exif))
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    expected = torch.from_numpy(np.array(turned)).permute(2, 0, 1)
    assert torch.equal(read_picture(tmp_path / "a.png"), expected)
    assert (expected.shape == (3, 16, 24)) == (orientation < 5)
    clear = Image.fromarray(np.dstack([pixels, np.zeros((16, 24), np.uint8)]))
    (tmp_path / "b.png").write_bytes(encoded(clear))
    assert (read_picture(tmp_path / "b.png") == 255).all()
    (tmp_path / "c.png").write_bytes(encoded(pixels)[: 100 * orientation])
    with pytest.raises(InputError, match=r"c\.png: cannot be decoded"):
        read_picture(tmp_path / "c.png")


def test_a_class_is_in_a_prompt_only_of_a_network_that_is_told_classes(tmp_path):
    data = make_dataset(tmp_path, [((32, 32), 4)], Kind(label=True))
    loader = Loader(DataConfig(path=str(data)), global_batch=4, seed=0)
    pictures = DatasetPictures(loader, "train", 9, None, CPU)
    plain, classed = pictures.prompts(4, False), pictures.prompts(4, True)
    assert plain == [f"number {i}" for i in range(4)]
    assert [prompt.partition(": ")[2] for prompt in classed] == plain
    loader.close()


# --- the command ----------------------------------------------------------------------------------


def call(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


FID = "evaluate/fid/ema_14_pictures_euler_3_cfg_2"


def measured_by(output: str) -> tuple[Path, dict[str, float], dict[str, dict]]:
    """Where `evaluate` wrote what it measured, the figures, and what each was measured with."""
    path = Path(output.split("wrote ")[1].strip())
    figures, measured_with = {}, {}
    for measurement in json.loads(path.read_text()):
        figures |= measurement["figures"]
        measured_with |= dict.fromkeys(measurement["figures"], measurement["measured_with"])
    return path, figures, measured_with


def test_every_figure_says_what_it_was_measured_with_and_a_second_call_draws_nothing(
    trained_run, network_file, tmp_path
):
    clip = save_clip(tmp_path / "clip")
    arguments = (trained_run, f"--features=inception={network_file}", f"--clip={clip}")
    more = ("--num-pictures=14", "sampler.num_steps=3", "sampler.guidance_scale=2", "--heldout=6")
    more += ("--train-pictures=9",)
    output = call(*arguments, *more, f"--output={tmp_path / 'out'}")
    path, figures, measured_with = measured_by(output)
    names = ("kid", "kid_std", "precision", "recall", "cmmd", "cmmd_extrapolated")
    names += tuple(f"{name}_at_half" for name in ("kid", "kid_std", "precision", "recall", "cmmd"))
    names += ("copies",)
    drawn = {"fid", "fid_at_half", "fid_extrapolated", "clip_score"}
    drawn |= {f"{name}_inception" for name in names}
    errors = {f"x0_error_at_log_snr_{level:+d}" for level in LOG_SNR}
    assert figures.keys() == drawn | errors
    for name in drawn:
        about, sampler = measured_with[name], measured_with[name]["sampler"]
        assert [sampler[key] for key in ("name", "num_steps", "guidance_scale")] == ["euler", 3, 2]
        assert (about["num_pictures"], about["weights"], about["step"]) == (14, "ema", 120)
        assert len(about["network_sha256"]) == 64
    table = read_shard_table(trained_run.parent / "dataset").to_pylist()
    heldout = sum(row["num_samples"] for row in table if row["split"] == "heldout")
    assert measured_with["fid"]["num_reference"] == heldout > 4
    assert "heldout, decoded" in measured_with["fid"]["reference"]
    for name, value in figures.items():
        (line,) = (line for line in output.splitlines() if f" {name} " in line)
        assert f"{value:.5g}" in line
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    said = " ".join(row[3].strip() for row in rows)
    assert (
        said.count("sampler.num_steps 3; sampler.guidance_scale 2") == 3
    )  # networks, and copies by one
    assert said.count("num_pictures 14") == 3
    assert measured_with["copies_inception"]["num_train"] == 9
    assert (path.parent / "copies_inception.png").is_file()
    logged = train_factory.scalars(trained_run, FID)
    assert logged[-1] == (120, pytest.approx(figures["fid"]))
    # Half of the pictures and the features of the rest are lost: only those are made again.
    pictures = sorted((path.parent / "pictures").glob("*.png"))
    assert len(pictures) == 14
    kept = {p: p.stat().st_mtime_ns for p in pictures[7:]}
    for lost in pictures[:7]:
        lost.unlink()
    again = call(*arguments, *more, f"--output={tmp_path / 'out'}")
    assert "14 pictures" in again
    assert "7 to draw" in again
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    # Measured alike, so it is no other point.
    assert train_factory.scalars(trained_run, FID) == logged
    assert measured_by(again)[1]["fid"] == pytest.approx(figures["fid"], rel=0.05)


def test_training_lowers_the_distance_and_the_heldout_error(trained_run, network_file, tmp_path):
    features = [f"inception={network_file}"]
    options = Options(
        trained_run, features=features, num_pictures=24, split="train", heldout=6, output=tmp_path
    )
    trained = open_trained(trained_run, "ema", None)
    torch.manual_seed(0)
    untrained = build_model(trained.config.model).state_dict()
    values = []
    # Both go by one name and step: what was drawn of the one must not stand for the other.
    for subject in (replace(trained, state=untrained), trained):
        drawn = run_subject(subject, ["sampler.num_steps=8"], CPU)
        _, measurements = evaluate(drawn, subject, options, CPU)
        values.append({k: v for m in measurements for k, v in m.figures.items()})
    print(*(f"{k} {a:.4g} -> {values[1][k]:.4g}" for k, a in values[0].items()), sep="\n")
    assert values[1]["fid"] < 0.9 * values[0]["fid"]
    assert values[1]["kid_inception"] < values[0]["kid_inception"]
    for level in (-5, -4, -2):  # where so short a training is felt
        name = f"x0_error_at_log_snr_{level:+d}"
        assert values[1][name] < 0.8 * values[0][name]


def test_a_run_of_several_partitions_is_measured(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    partitioned = config.replace("canonical_partitions: null", "canonical_partitions: 4")
    assert partitioned != config
    (run / "config.yaml").write_text(partitioned)
    _, figures, _ = measured_by(call(str(run), "--heldout=2", f"--output={tmp_path / 'out'}"))
    assert figures


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_measure_what_one_does(trained_run, network_file, tmp_path):
    arguments = (str(trained_run), f"--features=inception={network_file}", "--num-pictures=9")
    more = (f"--clip={save_clip(tmp_path / 'clip')}", "sampler.num_steps=3", "--heldout=5")
    _, one, _ = measured_by(call(*arguments, *more, f"--output={tmp_path / 'one'}"))
    output = f"--output={tmp_path / 'two'}"
    done = train_factory.run("pipeline.evaluate", *arguments, *more, output, ranks=2)
    assert done.returncode == 0, done.stderr
    _, two, _ = measured_by(done.stdout)
    assert one.keys() == two.keys()
    for name in one:
        # Pictures drawn in other batches may differ by a level here and there.
        assert two[name] == pytest.approx(one[name], rel=0.02, abs=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features=inception"], "expected NAME=PATH"),
        (["--features=inception=/absent.pt"], "no such file or folder"),
        (["--clip=/absent"], "no such file or folder"),
        (["--features=a=/absent", "--weights=none"], "no such file or folder"),
        (["--reference=/absent", "--weights=none"], "no such file or folder"),
        (["--prompts-file=/absent", "--weights=none"], "no such file"),
        (["--size=12", "--weights=none"], "HEIGHTxWIDTH"),
        (["--heldout=0"], "nothing to measure"),
        (["--guide=raw"], "leads a run's pictures alone"),
        (["model.size=B"], "sampler.key=value"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(trained_run, arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(trained_run, *arguments, "--num-pictures=2", f"--output={tmp_path}")
