"""A shard's proof: a few of its pictures, small, with what was made of them, to look at and to compare with.

Which pictures is decided by their keys alone, so that any two preparations of a shard chose the same.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_prep.schema import proof_path

SIDE = 128
"""Pixels of a thumbnail's longer side, at most."""
PROJECTED = 64


@dataclass(frozen=True)
class ProofSample:
    """A picture as it was encoded, (H, W, 3) uint8, None of a layer, and its stored arrays by member."""

    key: str
    caption: str
    pixels: np.ndarray | None
    arrays: dict[str, np.ndarray]


class ProofSamples:
    """The `count` pictures of a shard whose keys have the least hashes, in whichever order they come."""

    def __init__(self, count: int):
        self._count, self._kept = count, dict[bytes, ProofSample]()

    def add(self, sample: ProofSample) -> None:
        self._kept[hashlib.sha256(f"proof\0{sample.key}".encode()).digest()] = sample
        if len(self._kept) > self._count:
            del self._kept[max(self._kept)]

    def in_order(self) -> list[ProofSample]:
        return [self._kept[rank] for rank in sorted(self._kept)]


def make_proof(
    samples: list[ProofSample], decoded: list[np.ndarray], texts: list[str]
) -> tuple[bytes, list[float]]:
    """The file's bytes, and the PSNR in dB of each decoded picture; texts: members to be projected.

    A layer's proof shows no pictures.
    """
    keys = [np.frombuffer(s.key.encode(), np.uint8) for s in samples]
    hashes = [caption_hash(s.caption) for s in samples]
    arrays, psnr = {"key": np.stack(keys), "caption_sha256": np.stack(hashes)}, list[float]()
    if originals := [s.pixels for s in samples if s.pixels is not None]:
        psnr = [psnr_db(*pair) for pair in zip(originals, decoded, strict=True)]
        arrays["original"] = np.stack([thumbnail(pixels) for pixels in originals])
        arrays["decoded"] = np.stack([thumbnail(pixels) for pixels in decoded])
        arrays["psnr_db"] = np.array(psnr, np.float32)
    for name in texts:
        arrays[f"{name}.projection"] = np.stack([project(s.arrays[name]) for s in samples])
    return save(arrays), psnr


def read_proof(dataset: Path, shard: str) -> dict[str, np.ndarray]:
    """The arrays of a shard's proof by name, a row per picture; raises ValueError where it is none.

    There are none where a layer has none of the shard's pictures: the file is then empty.
    """
    data = (dataset / proof_path(shard)).read_bytes()
    try:
        return load(data) if data else {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def proof_keys(proof: dict[str, np.ndarray]) -> list[str]:
    return [row.tobytes().decode() for row in proof.get("key", ())]


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with sides of at most SIDE."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def caption_hash(caption: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(caption.encode()).digest(), np.uint8)


def project(values: np.ndarray) -> np.ndarray:
    """64 float32 of tokens (L, D) or of one vector (D,): sums with fixed signs by token and by feature.

    Sums of float16 numbers are exact in float64, so every machine and order of summing gives the same.
    """
    tokens = np.atleast_2d(values).astype(np.float64)
    length, width = tokens.shape
    vector = _signs("token", length) @ tokens  # (D,)
    return (vector @ _signs("feature", width * PROJECTED).reshape(width, -1)).astype(np.float32)


def _signs(purpose: str, count: int) -> np.ndarray:
    """The first `count` of an endless row of -1 and 1."""
    data = hashlib.shake_256(f"proof\0{purpose}".encode()).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count) * 2.0 - 1.0


def psnr_db(before: np.ndarray, after: np.ndarray) -> float:
    error = ((before.astype(np.float64) - after) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))
