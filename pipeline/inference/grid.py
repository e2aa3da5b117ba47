"""Pictures in files, and side by side with labels."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from models.config import InputError


def read_picture(path: Path, size: tuple[int, int] | None = None) -> UInt8[Tensor, "3 H W"]:
    """A picture as a viewer shows it, on white; cut to `size` (height, width) about the middle if given.

    Raises InputError where it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be decoded: {error}. Remedy: remove it") from error
    image = Image.new("RGBA", upright.size, "white")
    image = Image.alpha_composite(image, upright).convert("RGB")
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pil(picture: UInt8[Tensor, "3 H W"]) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def grid(
    pictures: UInt8[Tensor, "B 3 H W"], labels: list[str], columns: int, cell: int = 128
) -> Image.Image:
    """Pictures in rows, each over its label, small ones enlarged to about `cell` pixels."""
    height, width = pictures.shape[-2:]
    scale = max(1, cell // max(height, width))
    height, width, gap, line = height * scale, width * scale, 6, 13
    font = ImageFont.load_default(11)
    wrapped = [_wrap(label, font, width) for label in labels]
    text = max([len(lines) for lines in wrapped] or [0]) * line
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x = gap + number % columns * (width + gap)
        y = gap + number // columns * (height + text + gap)
        sheet.paste(to_pil(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for row, words in enumerate(wrapped[number] if number < len(wrapped) else []):
            draw.text((x, y + height + 1 + row * line), words, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Words in at most three lines no wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:3]
