"""Small folders and tars of pictures, and configs to prepare them."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from webdataset.compat import WebDataset

from data_prep.schema import read_shard_table

CAPTIONS = ["a red apple", "a green apple", "volcano", "a red volcano"]


def pixels(seed: int, height: int = 40, width: int = 40) -> np.ndarray:
    """A smooth picture of its own, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file's bytes."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill_folder(folder: Path, count: int, first: int = 0) -> Path:
    """`count` captioned pictures of three shapes in two folders, PNG and JPEG by turns."""
    for i in range(first, first + count):
        place = folder / ("even" if i % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        size = [(40, 40), (40, 40), (60, 36), (36, 60)][i % 4]
        kind, extension = [("PNG", "png"), ("JPEG", "jpg")][i % 2]
        (place / f"{i:04d}.{extension}").write_bytes(encoded(pixels(i, *size), kind))
        (place / f"{i:04d}.txt").write_text(f"{CAPTIONS[i % 4]}\n")
    return folder


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A tar with these members in this order, as img2dataset writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample_members(i: int, **facts: Any) -> list[tuple[str, bytes]]:
    """KEY.png, KEY.txt and KEY.json of a sample."""
    picture, caption = encoded(pixels(i)), CAPTIONS[i % 4]
    record = json.dumps({"caption": caption, "status": "success", **facts})
    key = f"{i:09d}"
    return [
        (f"{key}.png", picture),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", record.encode()),
    ]


def write_config(path: Path, sources: dict[str, Any], vae: Path, text: Path, **more: Any) -> Path:
    """A YAML file for prepare; a path that ends in .tar or tars is one of tars."""
    config = {
        "sources": {
            name: source
            if isinstance(source, dict)
            else {"kind": "tars" if "tar" in source.name else "folder", "path": str(source)}
            for name, source in sources.items()
        },
        "images": {"resolution": 32, "bucket_multiple": 8},
        "vae": {"path": str(vae)},
        "text_encoders": {"bert": {"path": str(text), "max_length": 8}},
        "encode": {"batch_size": 4},
        "samples_per_shard": 8,
        "ray": {"num_actors": 1},
        "output": str(path.parent / "dataset"),
        **more,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def config_of_pictures(folder: Path, count: int, vae: Path, text: Path, **more: Any) -> Path:
    """A config beside so many pictures, which are made."""
    pictures = fill_folder(folder / "pictures", count)
    return write_config(folder / "c.yaml", {"p": pictures}, vae, text, **more)


def dataset_bytes(dataset: Path) -> dict[str, bytes]:
    """Every file that a preparation leaves, but for its working folder."""
    files = (p for p in sorted(dataset.rglob("*")) if p.is_file())
    return {
        str(p.relative_to(dataset)): p.read_bytes() for p in files if "work" not in p.parts[-4:]
    }


def read_samples(dataset: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each sample as plain WebDataset reads it, after its shard's row of the table."""
    for row in read_shard_table(dataset).to_pylist():
        path = str(dataset / row["path"])
        for sample in WebDataset(path, shardshuffle=False, empty_check=False):
            yield row, sample
