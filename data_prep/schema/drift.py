"""Whether shards still hold what their pictures and captions give: a few are decoded and encoded again.

Hashes find a shard that has changed since it was written; this finds one that was never right, or that is read with
another codec than it was written with: latents that are scaled, shifted or of other pictures, other captions' text.
"""

from collections.abc import Callable
from typing import IO

import numpy as np

from data_prep.schema import read_pictures
from data_prep.schema.proof import caption_hash, proof_keys, psnr_db, thumbnail

SAME_DB = 36.0
"""PSNR from which two decodings are of the same latents: in another precision it is well over 40."""
SAME_TEXT = 0.1
"""Relative difference of a token up to which two encodings are of the same text: in bf16 it is a few percent."""
Arrays = dict[str, np.ndarray]


def drift(
    tar: IO[bytes],
    proof: Arrays,
    num_decoded: int,
    decode: Callable[[np.ndarray], np.ndarray] | None,
    num_encoded: int = 0,
    encode: Callable[[str], Arrays] | None = None,
) -> str:
    """What differs in the first pictures of a shard's proof, decoded and encoded again; "" if nothing does.

    decode: moments to the picture (H, W, 3) uint8; encode: a caption to the arrays of every text member.
    """
    keys = proof_keys(proof)[: max(num_decoded, num_encoded)]
    found = {key: (arrays, facts["caption"]) for key, _, arrays, facts in read_pictures(tar, keys)}
    for place, key in enumerate(keys):
        shown = {name: values[place] for name, values in proof.items()}
        if key not in found:
            return f"{key}: is not there"
        (arrays, caption), problem = found[key], ""
        if decode and place < num_decoded:
            problem = _other_picture(decode(arrays["moments"]), shown)
        if encode and place < num_encoded:
            problem = problem or _other_text(arrays, caption, encode, shown)
        if problem:
            return f"{key}: {problem}"
    return ""


def _other_picture(pixels: np.ndarray, shown: Arrays) -> str:
    """What is wrong with a picture (H, W, 3) that was decoded again."""
    now = thumbnail(pixels)
    if now.shape != shown["decoded"].shape:
        return f"its latents decode to {now.shape}, its proof shows {shown['decoded'].shape}"
    same = psnr_db(now, shown["decoded"])
    if same >= SAME_DB:
        return ""
    now_db, then_db = (psnr_db(shown["original"], x) for x in (now, shown["decoded"]))
    return (
        f"its latents decode to another picture than when they were made: {same:.1f} dB between the two, expected "
        f"{SAME_DB:g}; {now_db:.1f} dB from the original, then {then_db:.1f}. They are scaled, shifted, another "
        "picture's or another codec's"
    )


def numbers(stored: np.ndarray) -> np.ndarray:
    """What is stored, float64: uint16 holds the bits of bfloat16, a token in int8 ends with its scale."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if stored.dtype == np.int8:
        return stored[..., :-2] * stored[..., -2:].copy().view(np.float16).astype(np.float64)
    return stored.astype(np.float64)


def _other_text(
    arrays: Arrays, caption: str, encode: Callable[[str], Arrays], shown: Arrays
) -> str:
    """What is wrong with the stored text of a picture, whose caption is encoded again."""
    if not np.array_equal(shown["caption_sha256"], caption_hash(caption)):
        return "its caption is not the one that it was made with"
    for name, array in encode(caption).items():
        then, now = (np.atleast_2d(numbers(a)) for a in (arrays[name], array))
        if then.shape != now.shape:
            return f"{name}: {then.shape} are stored, its caption gives {now.shape}"
        lengths = np.linalg.norm(then, axis=1)
        worst = float((np.linalg.norm(now - then, axis=1) / np.maximum(lengths, 1e-6)).mean())
        if worst > SAME_TEXT:
            return (
                f"{name}: is not what its encoder gives of its caption: {worst:.0%} off, expected at most "
                f"{SAME_TEXT:.0%}. It is another caption's, or another layer's"
            )
    return ""
