"""JPEG to the pixels of a bucket: ours beside simplejpeg and PyTurboJPEG with the same resizing, on one core.

    python -m tests.benchmarks.decode [--json FILE]

Peers decode at the scale that our draft decodes at, and are resized by the same Lanczos filter; neither looks at
EXIF, profiles, transparency or cut files as ours does. They take part where they are installed.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_prep.images import DRAFT_GAP, REDUCING_GAP, ImagesConfig, decode
from tests.prep_factory import encoded, pixels

SIDES, COUNT, BUCKET = (512, 1024, 2048), 40, (256, 256)
IMAGES = ImagesConfig(resolution=256, bucket_max_aspect=1.0)


def resized(image: np.ndarray) -> np.ndarray:
    box = Image.fromarray(image).resize(BUCKET, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    return np.asarray(box)


def simplejpeg(side: int) -> Callable[[bytes], Any]:
    import simplejpeg

    least = round(BUCKET[0] * DRAFT_GAP)
    sides = {"min_height": least, "min_width": least} if side > least else {}
    return lambda data: resized(simplejpeg.decode_jpeg(data, **sides))


def turbojpeg(side: int) -> Callable[[bytes], Any]:
    from turbojpeg import TJPF_RGB, TurboJPEG

    library, scale = TurboJPEG(), 1
    while side // (2 * scale) >= BUCKET[0] * DRAFT_GAP:
        scale *= 2
    return lambda data: resized(library.decode(data, TJPF_RGB, scaling_factor=(1, scale)))


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the ratios here")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 7,
) -> None:
    """Milliseconds per picture of each side, in turn, and ours over theirs in speed."""
    figures: dict[str, float] = {}
    table = Table("side", "decoder", "ms", "flowmill is", title="JPEG to 256 x 256")
    for side in SIDES:
        rng = np.random.default_rng(side)
        noisy = [
            pixels(i, side, side) // 2 + rng.integers(0, 60, (side, side, 3), np.uint8)
            for i in range(4)
        ]
        files = [encoded(image, "JPEG", quality=90) for image in noisy]
        sides: dict[str, Callable[[bytes], Any]] = {"flowmill": lambda d: decode(d, BUCKET, IMAGES)}
        for name, peer in (("simplejpeg", simplejpeg), ("PyTurboJPEG", turbojpeg)):
            with contextlib.suppress(ImportError, RuntimeError):
                sides[name] = peer(side)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                begun = time.perf_counter()
                for number in range(COUNT):
                    run(files[number % len(files)])
                taken[name].append((time.perf_counter() - begun) / COUNT)
        for name, times in taken.items():
            pairs = zip(times, taken["flowmill"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            table.add_row(
                str(side), name, f"{1000 * statistics.median(times):.2f}", f"{ratio:.2f}x"
            )
            if name != "flowmill":
                figures[f"x_{name.lower()}_{side}"] = round(ratio, 3)
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
