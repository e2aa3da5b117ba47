"""Pictures of any kind to RGB uint8 of one bucket's size, or a reason why not. Imports no torch."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Annotated, Literal, Self

import numpy as np
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError
from pydantic import Field, model_validator

from data_prep.text import encodable
from models.config import Config

# Pillow's name of each format, and the extensions that people give to its files.
EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "jif", "mpo"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif", "avifs"),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "HEIF": ("heic", "heif", "hif"),
    "JXL": ("jxl",),
}
# The packages of formats that Pillow itself does not read.
PLUGINS = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
Image.init()
with suppress(ImportError):
    import_module("pillow_heif").register_heif_opener()
with suppress(ImportError):
    import_module("pillow_jxl")
FORMATS = [name for name in EXTENSIONS if name in Image.OPEN]
PICTURE_EXTENSIONS = tuple(sorted(e for name in FORMATS for e in EXTENSIONS[name]))
# Extension -> the package without which its pictures cannot be decoded here.
UNDECODABLE = {e: p for f, p in PLUGINS.items() if f not in FORMATS for e in EXTENSIONS[f]}
# Our own limit is checked on the header, before decoding.
Image.MAX_IMAGE_PIXELS = None
# Blocks of 16 MiB that Pillow keeps for its next picture, else each page of each picture is handed out anew.
Image.core.set_blocks_max(4)
# Workflows and XMP in a PNG are often over Pillow's 1 MiB; the limits on bytes and memory are ours.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30
# A JPEG is decoded at no less than this many times the size wanted.
DRAFT_GAP = 2.0
# Below this gap Pillow's box reduction before Lanczos becomes visible.
REDUCING_GAP = 3.0
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PNG's greys of few bits: what one step is in the eight bits that Pillow makes of them.
STEPS = {"L;2": 85, "L;4": 17}
# The colour spaces of a profile that fit a picture's own.
FITTING = {"CMYK": ("CMYK",), "RGB": ("RGB",), "GRAY": ("GRAY", "RGB")}
# Mean difference in levels below which a profile that is named sRGB is taken for it.
SAME_COLOURS = 8.0

Bucket = tuple[int, int]  # height, width
Level = Annotated[int, Field(ge=0, le=255)]


class Rejected(Exception):
    """This input is not taken; `reason` is counted, `detail` is for people and the same on every run."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, encodable(detail)


class ImagesConfig(Config):
    """How pictures become pixels."""

    resolution: int = Field(default=256, ge=8)
    """Side of the square bucket in pixels; every bucket has about its area."""
    bucket_multiple: int = Field(default=16, ge=1)
    """The VAE's downscale times the patch size of the model to be trained."""
    bucket_max_aspect: float = Field(default=2.0, ge=1)
    """Long over short side; 1: squares only."""
    crop: Literal["center", "random"] = "center"
    background: tuple[Level, Level, Level] = (255, 255, 255)
    """RGB behind transparent pixels."""
    flip: bool = False
    """Store the latents of mirror images as well, in the train split."""
    animated: Literal["first", "reject"] = "first"
    max_pixels: int = Field(default=64_000_000, ge=1)
    max_bytes: int = Field(default=64 << 20, ge=1)
    timeout_s: int = Field(default=60, ge=1)
    """Limit for decoding one picture."""

    @model_validator(mode="after")
    def _resolution_fits(self) -> Self:
        if self.resolution % self.bucket_multiple:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of bucket_multiple {self.bucket_multiple}"
            )
        return self


@dataclass(frozen=True)
class Picture:
    """A decoded picture; `micro` is original height, width, and the crop's top and left after resizing."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    micro: np.ndarray  # float32 (4,)
    notes: list[str] = field(default_factory=list)


def list_buckets(config: ImagesConfig) -> list[Bucket]:
    """Every size with sides of the multiple, an area near resolution^2 and no more than the aspect."""
    step, area = config.bucket_multiple, config.resolution**2
    found = set()
    for short in range(step, config.resolution + 1, step):
        long = max(round(area / short / step), 1) * step
        if long / short <= config.bucket_max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(heights: np.ndarray, widths: np.ndarray, buckets: list[Bucket]) -> np.ndarray:
    """For each picture, the index of the bucket whose log aspect ratio is nearest."""
    sides = np.asarray(buckets, dtype=np.float64)
    ratios = np.log(sides[:, 0] / sides[:, 1])
    order = np.argsort(ratios, kind="stable")
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(middles, np.log(heights / widths))]


def probe(data: bytes, config: ImagesConfig) -> tuple[int, int]:
    """Height and width as seen (EXIF orientation applied), from the header alone; raises Rejected."""
    with _open(data, config) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def decode(
    data: bytes, bucket: Bucket, config: ImagesConfig, crop_at: tuple[float, float] = (0.5, 0.5)
) -> Picture:
    """The picture resized to cover the bucket, then cropped at `crop_at` (0 top or left, 1 bottom or right)."""
    notes: list[str] = []
    rgb, (height, width) = _load_rgb(data, bucket, config, notes)
    scale = max(bucket[0] / height, bucket[1] / width)
    top = max(height * scale - bucket[0], 0.0) * crop_at[0]
    left = max(width * scale - bucket[1], 0.0) * crop_at[1]
    # Resizing the crop's box is resizing all and then cropping: the filter still sees past the box.
    shrink = max(bucket[0] / rgb.height, bucket[1] / rgb.width)
    x, y = left / (width * scale) * rgb.width, top / (height * scale) * rgb.height
    box = (x, y, min(x + bucket[1] / shrink, rgb.width), min(y + bucket[0] / shrink, rgb.height))
    resized = rgb.resize((bucket[1], bucket[0]), Image.Resampling.LANCZOS, box, REDUCING_GAP)
    micro = np.array([height, width, top, left], dtype=np.float32)
    return Picture(np.asarray(resized), micro, notes)


def perceptual_hash(data: bytes, config: ImagesConfig) -> int:
    """64-bit dHash (N. Krawetz, 2013): whether each pixel of the 9 x 8 grey miniature outshines its right
    neighbour. Pictures that look alike differ in few bits. Raises Rejected."""
    rgb, _ = _load_rgb(data, (72, 72), config, [])
    grey = rgb.resize((72, 64), Image.Resampling.BOX, reducing_gap=REDUCING_GAP).convert("L")
    values = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(values[:, :-1] > values[:, 1:]).tobytes(), "big")


def _load_rgb(
    data: bytes, cover: Bucket, config: ImagesConfig, notes: list[str]
) -> tuple[Image.Image, Bucket]:
    """sRGB pixels the right way up, and the picture's true height and width.

    A JPEG is decoded no larger than covering `cover` well needs. Raises Rejected.
    """
    with _open(data, config) as image:
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation >= 5 else image.size  # as seen
        with _broken_is_rejected():
            if image.format in ("JPEG", "MPO"):
                gap = max(cover[0] / height, cover[1] / width) * DRAFT_GAP
                wanted = max(int(image.width * gap), 1), max(int(image.height * gap), 1)
                image.draft(None, wanted)  # pyright: ignore[reportArgumentType] - None keeps the mode
            _scale_transparency(image)
            image.load()
            rgb = _to_rgb(image, config.background, notes)
            if orientation in TRANSPOSE:
                rgb = rgb.transpose(TRANSPOSE[orientation])
    return rgb, (height, width)


@contextmanager
def _broken_is_rejected() -> Iterator[None]:
    """Pillow raises nearly anything on a broken file: as Rejected."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise Rejected("undecodable", f"none of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise Rejected("undecodable", _describe(error)) from error


def _open(data: bytes, config: ImagesConfig) -> ImageFile.ImageFile:
    """The header, within limits; raises Rejected."""
    if not data:
        raise Rejected("empty_file")
    with _broken_is_rejected():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > config.max_pixels:
            raise Rejected("too_many_pixels", f"{image.width}x{image.height}")
        moving = image.format in ("GIF", "WEBP", "PNG", "AVIF", "JXL")
        if config.animated == "reject" and moving and getattr(image, "is_animated", False):
            raise Rejected("animated")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8, from what the header holds, so that scan and decode agree."""
    # Pillow turns TIFF by itself; for PNG it would decode all to look for EXIF behind the pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - broken EXIF: the pixels may be sound, as every viewer takes it
        return 1
    return orientation if orientation in TRANSPOSE else 1


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """The transparent colour of a PNG, which Pillow leaves at the file's depth, at that of the pixels."""
    clear = image.info.get("transparency")
    depth = image.tile[0].args if image.format == "PNG" and image.tile else None
    if clear is not None and depth in STEPS:
        image.info["transparency"] = clear * STEPS[depth]
    elif clear is not None and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _to_rgb(image: Image.Image, background: tuple[int, int, int], notes: list[str]) -> Image.Image:
    """sRGB pixels of a loaded picture of any mode, transparency laid over the background."""
    profile = image.info.get("icc_profile")
    grey = image.mode.startswith(("1", "I", "L")) and image.mode != "LAB"
    colours = "GRAY" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise Rejected("unsupported_mode", "32-bit floating point")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    if profile:
        image = _apply_profile(image, profile, colours, notes)
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies
    if alpha is not None and alpha.getextrema() != (255, 255):
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by scaling; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise Rejected("unsupported_mode", "32-bit integers")
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _apply_profile(
    image: Image.Image, profile: bytes, colours: str, notes: list[str]
) -> Image.Image:
    """Colours to sRGB; an unusable profile is noted and, as in browsers, taken for sRGB."""
    try:
        transform = _transform(profile, colours)
        if transform is None:
            return image
        result = ImageCms.applyTransform(image.convert(transform.input_mode), transform)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.append(f"ICC profile ignored: {_describe(error)}")
        return image
    assert result is not None  # it is None only where the transform works in place
    return result


@lru_cache(maxsize=64)
def _transform(profile: bytes, colours: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colour space to sRGB; None where it is sRGB already, by name and by colours."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
    if space not in FITTING[colours]:
        raise ValueError(f"profile for {space}, picture in {colours}")
    transform = ImageCms.buildTransform(
        opened, ImageCms.createProfile("sRGB"), "L" if space == "GRAY" else space, "RGB"
    )
    if space == "RGB" and "sRGB" in ImageCms.getProfileDescription(opened):
        before = np.indices((9, 9, 9)).reshape(3, 27, 27).transpose(1, 2, 0) * 31
        after = ImageCms.applyTransform(Image.fromarray(before.astype(np.uint8)), transform)
        if np.abs(np.asarray(after) - before).mean() < SAME_COLOURS:
            return None
    return transform


def _describe(error: Exception) -> str:
    """One line without addresses in memory, so that it is the same on every run."""
    text = re.sub(r"0x[0-9a-f]+", "0x..", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:200]
