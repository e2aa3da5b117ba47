"""Pictures of every kind against what Pillow, or arithmetic, says they look like."""

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data_prep.images import (
    FORMATS,
    ImagesConfig,
    Rejected,
    decode,
    list_buckets,
    nearest_bucket,
    probe,
)
from models.config import InputError, parse_config
from tests.prep_factory import encoded, pixels


def config(**options: Any) -> ImagesConfig:
    return ImagesConfig.model_validate({"resolution": 32, "bucket_multiple": 8, **options})


def decoded(data: bytes, bucket=(32, 32), **options) -> np.ndarray:
    return decode(data, bucket, config(**options)).pixels


def png(rows: bytes, depth: int, colours: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 32 equal lines of 32 pixels, with what Pillow does not write."""
    header = struct.pack(">IIBBBBB", 32, 32, depth, colours, 0, 0, 0)
    pixels = zlib.compress((b"\0" + rows) * 32)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def distance(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


@pytest.mark.parametrize("multiple", [8, 16, 64])
@pytest.mark.parametrize("aspect", [1.0, 2.0, 4.0])
def test_buckets_have_about_the_area_and_come_in_both_orientations(multiple, aspect):
    settings = ImagesConfig(resolution=256, bucket_multiple=multiple, bucket_max_aspect=aspect)
    buckets = list_buckets(settings)
    assert (256, 256) in buckets
    assert len(buckets) == len(set(buckets))
    for height, width in buckets:
        assert (width, height) in buckets
        assert height % multiple == 0
        assert width % multiple == 0
        assert max(height, width) / min(height, width) <= aspect
        # Rounding the long side to the multiple moves the area by half a step at most.
        assert abs(height * width - 256**2) <= multiple / 2 * min(height, width)


def test_the_nearest_bucket_is_the_one_of_least_log_ratio():
    buckets = list_buckets(ImagesConfig(resolution=256, bucket_multiple=16, bucket_max_aspect=3))
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 3000, (2, 500)).astype(float)
    ratios = np.log([h / w for h, w in buckets])
    gaps = np.abs(np.log(heights / widths)[:, None] - ratios)
    found = nearest_bucket(heights, widths, buckets)
    np.testing.assert_allclose(gaps[np.arange(500), found], gaps.min(axis=1), atol=1e-12)


def test_squares_only_still_find_a_bucket():
    assert nearest_bucket(np.array([9.0]), np.array([1.0]), [(32, 32)]).tolist() == [0]


def test_a_resolution_off_the_multiple_is_refused():
    with pytest.raises(InputError, match="resolution 100 is not a multiple"):
        parse_config(ImagesConfig, {"resolution": 100, "bucket_multiple": 16}, "x")


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (33, 47), (32, 32), (8, 300)])
def test_it_is_resized_to_cover_then_cropped_at_the_centre(size):
    image = Image.fromarray(pixels(1, *size))
    height, width = size
    scale = max(32 / height, 32 / width)
    whole = np.asarray(
        image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    )
    top, left = (whole.shape[0] - 32) // 2, (whole.shape[1] - 32) // 2
    picture = decode(encoded(image), (32, 32), config())
    # Half a pixel of crop and of rounded size, on smooth pictures.
    assert distance(picture.pixels, whole[top : top + 32, left : left + 32]) < 3
    expected = [height, width, (height * scale - 32) / 2, (width * scale - 32) / 2]
    np.testing.assert_allclose(picture.micro, expected, rtol=1e-6, atol=1e-5)


def test_a_picture_of_the_buckets_size_is_left_as_it_is():
    image = pixels(2, 32, 40)
    np.testing.assert_array_equal(decoded(encoded(image), (32, 40)), image)


def test_the_crop_follows_the_point_asked_for():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 64:] = 255
    right = decode(encoded(image), (32, 32), config(), crop_at=(0.5, 1.0))
    assert right.pixels[:, 4:].min() > 250
    assert right.micro.tolist() == [32, 96, 0, 64]
    assert decode(encoded(image), (32, 32), config(), crop_at=(0.5, 0.0)).pixels.max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_scan_and_decode_alike(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels(3, 32, 64), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    size = (upright.height, upright.width)
    assert probe(data, config()) == size
    picture = decode(data, size, config())
    np.testing.assert_array_equal(picture.pixels, np.asarray(upright.convert("RGB")))
    assert picture.micro.tolist() == [*size, 0, 0]


def test_broken_exif_does_not_cost_the_picture():
    data = encoded(pixels(3, 32, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert probe(data, config()) == (32, 32)


def test_colour_hidden_under_transparency_does_not_show():
    image = np.zeros((32, 32, 4), np.uint8)
    image[..., 0] = 255  # red, transparent everywhere but in the corner
    image[:8, :8, 3] = 255
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        shown = decoded(encoded(Image.fromarray(image), kind, **options), background=(0, 0, 255))
        assert (shown[16:, 16:] == (0, 0, 255)).all()
        assert (shown[:8, :8] == (255, 0, 0)).all()


def test_half_transparent_pixels_mix_with_the_background():
    image = np.full((32, 32, 4), (200, 100, 0, 128), np.uint8)
    assert distance(decoded(encoded(Image.fromarray(image))), (227, 177, 127)) < 1  # by arithmetic


def test_palettes_greys_and_bits_become_rgb():
    rgb = Image.fromarray(pixels(4, 32, 32))
    palette = rgb.quantize(16)
    np.testing.assert_array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))
    clear = decoded(encoded(palette, transparency=palette.getpixel((0, 0))))
    assert (clear[0, 0] == 255).all()
    for mode in ("L", "1"):
        image = rgb.convert(mode)
        np.testing.assert_array_equal(decoded(encoded(image)), np.asarray(image.convert("RGB")))
    grey = Image.merge("LA", (rgb.convert("L"), Image.new("L", rgb.size, 0)))
    assert (decoded(encoded(grey)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    shown = decoded(encoded(Image.fromarray(values), kind))
    np.testing.assert_array_equal(shown[..., 0], np.round(values / 257))
    np.testing.assert_array_equal(shown[..., 0], shown[..., 2])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded_or_where_it_is_cut_rejected(kind):
    """HEIF and JXL too, where their plugins are installed."""
    data = encoded(pixels(6, 32, 48), kind)
    assert probe(data, config()) == (32, 48)
    # What the lossy ones lose.
    assert distance(decoded(data, (32, 48)), pixels(6, 32, 48)) < (30 if kind == "GIF" else 8)
    with pytest.raises(Rejected):
        decoded(data[: len(data) // 3])


def test_float_pictures_are_rejected_as_of_no_known_range():
    data = encoded(Image.fromarray(np.zeros((32, 32), np.float32)), "TIFF")
    with pytest.raises(Rejected, match="unsupported_mode"):
        decoded(data)


def test_cmyk_comes_out_in_its_colours():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16], image[16:] = (250, 10, 10), (10, 10, 250)
    shown = decoded(encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95))
    assert distance(shown[:12], image[:12]) < 4  # JPEG's loss
    assert distance(shown[20:], image[20:]) < 4


def swapped_profile() -> bytes:
    """sRGB with its red and blue primaries exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_colour_profile_is_converted_to_srgb(kind):
    image = np.full((32, 32, 3), (230, 60, 20), np.uint8)
    shown = decoded(encoded(image, kind, icc_profile=swapped_profile()))
    assert distance(shown, (20, 60, 230)) < 3  # JPEG's loss, and tables of the transform


def test_a_colour_profile_keeps_transparency():
    image = np.full((32, 32, 4), (230, 60, 20, 255), np.uint8)
    image[16:, :, 3] = 0
    shown = decoded(encoded(Image.fromarray(image), icc_profile=swapped_profile()))
    assert distance(shown[:14], (20, 60, 230)) < 2
    assert (shown[18:] == 255).all()


def profile_for(space: bytes) -> bytes:
    """A profile that says it is for that space; for GRAY it is one, with sRGB's curve."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[16:20] = space
    return bytes(data).replace(b"rTRC", b"kTRC", 1)


@pytest.mark.parametrize("space", [b"GRAY", b"CMYK", b"Lab ", b"4CLR"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16"])
def test_a_profile_of_another_colour_space_changes_no_colour(space, mode):
    """A grey picture may have a grey profile; every other of these is left aside, and noted."""
    if mode == "I;16":
        image = Image.fromarray(pixels(5, 32, 32)[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels(5, 32, 32)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    plain = decoded(encoded(image, kind))
    data = encoded(image, kind, icc_profile=profile_for(space))
    picture = decode(data, (32, 32), config())
    # The curve is sRGB's: a grey profile changes a grey picture by rounding at most.
    assert np.abs(picture.pixels.astype(int) - plain).max() <= 1
    assert bool(picture.notes) is (space != b"GRAY" or mode not in ("L", "LA", "1", "I;16"))


def test_a_profile_that_is_srgb_by_name_alone_is_applied():
    named = swapped_profile().replace("test".encode("utf-16-be"), "sRGB".encode("utf-16-be"))
    image = np.full((32, 32, 3), (230, 60, 20), np.uint8)
    assert distance(decoded(encoded(image, icc_profile=named)), (20, 60, 230)) < 3
    true = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decoded(encoded(image, icc_profile=true)) == image).all()


# Grey is 0, RGB 2.
@pytest.mark.parametrize(
    ("colours", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)]
)
def test_the_transparent_colour_of_a_png_is_not_seen_at_any_depth(depth, colours):
    """The left half has it; the right half does not."""
    most, channels = (1 << depth) - 1, 3 if colours == 2 else 1
    for clear, other in ((most, 0), (0, most), (most * 2 // 3, most // 3)):
        values = np.repeat([clear, other], 16 * channels)
        bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
        key = struct.pack(f">{channels}H", *[clear] * channels)
        data = png(np.packbits(bits).tobytes(), depth, colours, (b"tRNS", key))
        shown = decoded(data, background=(0, 0, 255))
        assert (shown[:, :16] == (0, 0, 255)).all()
        if clear != other:
            assert np.abs(shown[:, 16:] - other * 255.0 / most).max() <= 1


def test_a_broken_colour_profile_is_noted_and_the_picture_kept():
    image = pixels(5, 32, 32)
    picture = decode(encoded(image, icc_profile=b"no profile" * 20), (32, 32), config())
    np.testing.assert_array_equal(picture.pixels, image)
    assert "ICC profile ignored" in picture.notes[0]


@pytest.mark.parametrize("mib", [0, 70])
@pytest.mark.parametrize("name", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_what_is_no_picture_in_a_png_costs_no_picture_however_large_it_is(mib, name):
    """ComfyUI's workflows, XMP and profiles of tables may be larger than their picture."""
    text = b"x" * (1 + (mib << 20))
    chunk = {
        "zTXt": b"prompt\0\0" + zlib.compress(text),
        "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text),
        "tEXt": b"prompt\0" + text[: 60 << 20],
        "iCCP": b"icc\0\0" + zlib.compress(text),
    }[name]
    data = png(bytes([77] * 32), 8, 0, (name.encode(), chunk))
    assert probe(data, config()) == (32, 32)
    assert (decoded(data) == 77).all()


def test_a_large_jpeg_decoded_small_looks_like_the_same_decoded_whole():
    image = Image.fromarray(pixels(6, 1200, 900))
    data = encoded(image, "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((48, 64), Image.Resampling.LANCZOS))
    assert distance(decoded(data, (64, 48)), whole) < 1  # of 255
    assert decode(data, (64, 48), config()).micro[:2].tolist() == [1200, 900]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_stripes_too_fine_to_be_seen_become_grey_and_no_pattern(kind):
    stripes = np.zeros((233, 233, 3), np.uint8)
    stripes[:, ::2] = 255
    for image in (stripes, stripes.transpose(1, 0, 2)):
        shown = decoded(encoded(image, kind)).astype(int)
        # The border is 21 away; a pixel picked from the stripes is 128 away.
        assert np.abs(shown - 128).max() < 32


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(pixels(i, 32, 32)) for i in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken_or_none(kind):
    # A GIF's palette of 256 colours costs a little; another frame is some 80 away.
    assert distance(decoded(animation(kind)), pixels(0, 32, 32)) < 8
    with pytest.raises(Rejected, match="animated"):
        probe(animation(kind), config(animated="reject"))
    assert probe(encoded(pixels(0), kind), config(animated="reject")) == (40, 40)


def test_a_bomb_is_rejected_on_its_header():
    bomb = encoded(Image.new("1", (30_000, 30_000)))
    assert len(bomb) < 200_000
    start = time.monotonic()
    with pytest.raises(Rejected, match="too_many_pixels"):
        decoded(bomb)
    assert time.monotonic() - start < 0.5  # decoding it takes seconds


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_at_any_tenth_is_rejected(kind):
    whole = encoded(pixels(7, 100, 100), kind)
    for tenth in range(10):
        with pytest.raises(Rejected) as caught:
            decoded(whole[: len(whole) * tenth // 10])
        assert caught.value.reason == ("undecodable" if tenth else "empty_file")


@pytest.mark.parametrize(
    "data", [b"<html>404 not found</html>", b"\0" * 500, b"\xff\xd8\xff" + b"x" * 99, b"GIF89a"]
)
def test_what_is_no_picture_is_rejected_with_the_same_words_every_time(data):
    details = set()
    for _ in range(2):
        with pytest.raises(Rejected) as caught:
            decoded(data)
        assert caught.value.reason == "undecodable"
        details.add(caught.value.detail)
    assert len(details) == 1
    assert "0x7" not in details.pop()  # no address in memory


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_either_pictures_or_rejected(count):
    rng = np.random.default_rng(0)
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    seeds = [encoded(pixels(i, 50, 60), kind) for i, kind in enumerate(kinds)]
    taken, reasons = 0, set()
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        try:
            taken += decoded(bytes(data)).shape == (32, 32, 3)
        except Rejected as rejected:
            reasons.add(rejected.reason)
    assert 0 < taken < count
    assert reasons <= {"undecodable", "too_many_pixels", "unsupported_mode"}
