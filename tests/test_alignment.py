"""Representation alignment: features cached by prepare, a projection trained with the network, then left out."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.encoders import configured
from data_prep.preparation import prepare
from data_prep.schema import read_manifest, read_shard_table
from models.command import load_config
from models.conditions import Conditions
from models.config import InputError, parse_config
from models.networks import (
    AlignmentConfig,
    DiTConfig,
    MaskingConfig,
    MMDiTConfig,
    RoutingConfig,
    build_model,
)
from models.vision_encoder import VisionEncoder
from pipeline.config import TrainConfig
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.objectives.objective import alignment_loss
from pipeline.runs.setup import fit_run
from pipeline.training.checkpoint import load_weights
from pipeline.training.forward import alignment_weight
from tests import train_factory
from tests.prep_factory import fill_folder, write_config
from tests.train_factory import scalars

# The name of its classes, and how many tokens precede the patches.
KINDS = {
    "dinov2": ("Dinov2", 1),
    "dinov2_with_registers": ("Dinov2WithRegisters", 5),
    "vit": ("ViT", 1),
}


def save_vision(folder, kind="dinov2"):
    """A tiny vision transformer with random weights: patches of 14, trained at 28 x 28."""
    config, network = (getattr(transformers, KINDS[kind][0] + part) for part in ("Config", "Model"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    network(config(**sizes, intermediate_size=48, image_size=28, patch_size=14)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_encoders_own_of_each_square(tmp_path, kind):
    encoder = VisionEncoder(save_vision(tmp_path, kind), patch_pixels=16)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    features = encoder.encode(images)
    assert features.shape == (2, 24, 2, 4)
    pixels = F.interpolate(images / 255, size=(28, 56), mode="bicubic", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        hidden = encoder.network((pixels - mean) / std, **more).last_hidden_state
    prefix = KINDS[kind][1]
    assert hidden.shape[1] == prefix + 8
    torch.testing.assert_close(features[:, :, 1, 2], hidden[:, prefix + 4 + 2])


def test_other_networks_are_refused_as_vision_encoders(tmp_path, vae_folder):
    with pytest.raises(InputError, match="model_type got None, expected one of dinov2"):
        VisionEncoder(vae_folder, 16)


def test_the_loss_is_one_minus_the_mean_cosine_of_patch_and_square():
    features = torch.randn(3, 5, 2, 4)
    patches = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(alignment_loss(7 * patches, features), torch.zeros(3))
    torch.testing.assert_close(alignment_loss(-patches, features), 2 * torch.ones(3))
    half = torch.cat([patches[:, :4], -patches[:, 4:]], dim=1)
    torch.testing.assert_close(alignment_loss(half, features), torch.ones(3))


@pytest.mark.parametrize("kind", [DiTConfig, MMDiTConfig])
def test_the_projection_is_of_what_the_block_gave_and_in_training_alone(kind):
    sizes = {"depth": 3, "latent_channels": 4, "text_dim": 8, "register_tokens": 3, "vision_dim": 5}
    alignment = AlignmentConfig(block=2, hidden_size=16)
    config = kind(size="debug", alignment=alignment, **sizes)
    model = build_model(config)
    seen = []
    model.transformer_blocks[1].register_forward_hook(lambda *a: seen.append(a[2]))
    given = torch.randn(2, 4, 4, 8), torch.rand(2), Conditions(torch.randn(2, 6, 8))
    out, projection = model(*given)
    tokens = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert tokens.shape[1] == 8 + 3
    torch.testing.assert_close(projection, model.projector(tokens)[:, :8])
    torch.testing.assert_close(model.eval()(*given), out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "expected one of 1 after which"),
        ({"vision_dim": 0}, "prepare it with vision_encoder"),
        ({"depth": 8, "routing": RoutingConfig(start=1, end=5)}, "after which all patches"),
        ({"masking": MaskingConfig(mixer_depth=1)}, "after which all patches"),
    ],
)
def test_alignment_where_it_cannot_be_is_refused(options, message):
    config = DiTConfig(
        size="debug", latent_channels=4, **{"vision_dim": 5} | options, alignment={"block": 2}
    )
    with pytest.raises(InputError, match=message):
        build_model(config)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vae_folder, text_folder, ray_address):
    """48 pictures with features, mirrored as well."""
    folder = tmp_path_factory.mktemp("alignment")
    config = write_config(
        folder / "c.yaml",
        {"mine": fill_folder(folder / "pictures", 48)},
        vae_folder,
        text_folder,
        images={"resolution": 32, "bucket_multiple": 8, "flip": True},
        vision_encoder={"path": str(save_vision(folder / "vit")), "patch_pixels": 8},
    )
    prepare(load_config(PrepareConfig, config, []))
    return folder / "dataset"


def test_prepared_features_are_those_of_picture_and_mirror_image(dataset):
    assert verify(dataset) == []
    manifest = read_manifest(dataset)
    assert manifest.vision is not None
    assert manifest.vision.dim == 24
    config = load_config(PrepareConfig, dataset.parent / "c.yaml", [])
    needs = {"vae": 4, "text_encoders.bert": 1, "vision_encoder": 8}
    assert {place: e.divides for place, e in configured(config).items()} == needs
    flipped = False
    for row in read_shard_table(dataset).to_pylist():
        with tarfile.open(dataset / row["path"]) as tar:
            arrays = {n: tar.extractfile(n).read() for n in tar.getnames()}
        for key in {name.split(".")[0] for name in arrays}:
            plain, mirrored = (
                np.load(io.BytesIO(arrays[f"{key}.{n}.npy"])) for n in ("vision", "vision.flip")
            )
            assert plain.shape == (24, row["height"] // 8, row["width"] // 8)
            flipped |= not np.array_equal(plain, mirrored)
            assert json.loads(arrays[f"{key}.json"])["caption"]
    assert flipped


def test_features_of_two_encoders_are_not_mixed(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "other")
    manifest = read_manifest(dataset)
    vision = manifest.vision.model_copy(update={"weights_sha256": "other"})
    changed = manifest.model_copy(update={"vision": vision}).with_fingerprint()
    (tmp_path / "other" / "manifest.json").write_text(changed.model_dump_json())
    sources = {path.name: {"path": str(path)} for path in (dataset, tmp_path / "other")}
    with pytest.raises(InputError, match=r"vision\.weights_sha256: got other"):
        Loader(parse_config(DataConfig, {"datasets": sources}, "x"), global_batch=8, seed=1)


RUN = """
data: {{path: {data}}}
model: {{size: debug, alignment: {{block: 1, hidden_size: 128, until_images: {until}}}}}
training: {{images: 640, global_batch: 8}}
optimizer: {{lr: 3e-3}}
engine: {{zero_stage: {stage}, precision: fp32, cpu_threads: 1}}
run: {run}
checkpoint: {{every_steps: 80}}
monitor: {{every_steps: 1, mfu: false}}
"""


def test_training_aligns_and_what_is_given_away_has_no_projection(dataset, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(RUN.format(data=dataset, run=tmp_path / "run", stage=2, until=10**6))
    train_factory.train(config, ranks=2)
    values = [value for _, value in scalars(tmp_path / "run", "loss/alignment")]
    assert values[0] > 0.92  # of random vectors it is 1
    assert sum(values[-5:]) / 5 < 0.85
    assert any(name.startswith("projector.") for name in load_weights(tmp_path / "run", "ema")[0])
    done = train_factory.run("pipeline.export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (weights,) = (tmp_path / "out" / "network").glob("*.safetensors")
    assert not [name for name in load_file(weights) if "projector" in name]
    # Another run begins from it without alignment, and one with it from that.
    for name, changes in (("plain", ["model.alignment=null"]), ("again", [])):
        start = f"start_from.run={tmp_path / ('run' if name == 'plain' else 'plain')}"
        more = ["training.images=8", start, f"run={tmp_path / name}", *changes]
        train_factory.train(config, *more)


def test_features_of_other_squares_are_refused_in_words(dataset, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(RUN.format(data=dataset, run=tmp_path / "run", stage=0, until=10**6))
    with pytest.raises(InputError, match=r"vision_encoder\.patch_pixels: got 8, expected 4"):
        fit_run(load_config(TrainConfig, config, ["model.patch_size=1"]))


def test_the_weight_ends_after_so_many_pictures():
    model = DiTConfig(alignment=AlignmentConfig(until_images=100))
    assert [alignment_weight(model, n) for n in (0, 99, 100)] == [0.5, 0.5, 0.0]
    assert alignment_weight(DiTConfig(), 0) == 0
