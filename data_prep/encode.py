"""One planned shard to one committed shard: decode, encode, write. The class is the Ray actor's body."""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.config import LayerConfig, PrepareConfig
from data_prep.decoder import Address, DecodePool, DecodeRequest
from data_prep.encoders import Arrays, Codec, Encoder, Text, Vision, configured
from data_prep.images import Picture, Rejected
from data_prep.plan import ShardSpec, read_planned
from data_prep.schema import Member, captions_sha256
from data_prep.schema.proof import ProofSample, ProofSamples, make_proof
from data_prep.shards import ShardWriter, commit_path, read_commit, work_of, write_text
from data_prep.workers import ATTEMPTS, LOST, Actors, Worker
from models.config import InputError

CRASH = f"its encoder died {ATTEMPTS} times"
# Where each bin begins.
SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
WORDS = (0, 1, 2, 5, 10, 20, 40, 80, 160)
HISTOGRAMS = {"Shorter side of the original, pixels": SIDES, "Words per caption": WORDS}
# A row of the plan and its Picture, None where no encoder looks at it.
Decoded = tuple[dict[str, Any], Any]
# Of a shard by role: tokens, sum and largest of their errors.
TextErrors = dict[str, tuple[int, float, float]]
Kind = TypeVar("Kind", bound=Encoder)

# torch is imported by `describe`: this module is also imported where only decoding is done.


@dataclass(frozen=True)
class Encoders:
    """What the encoders said of themselves once loaded."""

    record: dict[str, Any]
    """Their part of the manifest."""
    members: dict[str, Member]
    empty_caption: dict[str, np.ndarray]


@dataclass(frozen=True)
class EncoderSettings:
    """What an actor is made with; `check` raises InputError where the dataset is another process's by now."""

    config: PrepareConfig | LayerConfig
    dataset: Path
    check: Callable[[], None] = lambda: None
    base: Path = Path()
    of_base: PrepareConfig | None = None
    """A layer's base, and the preparation that made it."""

    @property
    def pictures(self) -> PrepareConfig:
        """What says how pictures are looked at."""
        found = self.of_base or self.config
        assert isinstance(found, PrepareConfig)
        return found

    def beside(self) -> dict[str, Member]:
        """The members of no encoder."""
        if self.of_base:
            return {}
        members = {"micro": Member(dtype="float32", shape=(4,))}
        if any(source.labels for source in self.pictures.sources.values()):
            members["label"] = Member(dtype="int64", shape=())
        return members


@dataclass(frozen=True)
class Making:
    """A shard as far as it is made: of the rows of its plan some are kept, others rejected."""

    spec: ShardSpec
    planned: list[dict[str, Any]]
    kept: list[dict[str, Any]]
    rejects: list[dict[str, str]]
    writer: ShardWriter
    samples: ProofSamples
    errors: TextErrors = field(default_factory=dict)


class ShardEncoder(Worker):
    """Holds the encoders; `encode_shard` may run in two threads, so that one decodes while one encodes.

    It counts in Ray's dashboard and Prometheus endpoint: ray_flowmill_pictures_total and so on.
    """

    def __init__(self, settings: EncoderSettings, num_decoders: int):
        from ray.util.metrics import Counter

        self._config, self._dataset = settings.config, settings.dataset
        self._check, self._beside = settings.check, settings.beside()
        self._images, self._sources = settings.pictures.images, settings.pictures.sources
        self._numbers = self._config.encode or settings.pictures.encode
        self._pool = DecodePool(self._images, num_decoders)
        self._encoding = threading.Lock()
        self._encoders: list[Encoder] = []
        self._pictures = Counter("flowmill_pictures", "pictures encoded and committed")
        self._rejects = Counter("flowmill_rejects", "pictures rejected when encoding", ("reason",))
        self._bytes = Counter("flowmill_bytes", "bytes of committed shards")

    def describe(self) -> Encoders:
        """Open the encoders; returns what they say of themselves. Raises InputError."""
        self._open()
        text = self._config.text_record({text.name: text.record() for text in self._texts})
        one = {"codec": self._only(Codec), "vision": self._only(Vision)}
        record = {name: encoder and encoder.record() for name, encoder in one.items()}
        record |= {"text": text}
        empty_caption = dict[str, np.ndarray]()
        for encoder in self._texts:
            empty_caption |= encoder.encode_empty(text["empty"])
        return Encoders(record, self._members(), empty_caption)

    def _open(self) -> None:
        os.environ["OMP_NUM_THREADS"] = str(self._numbers.threads)
        # Torch takes a VAE's activations from the kernel anew at every layer; of small pages that alone
        # is a third of the time on CPUs.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        import torch

        from models.numerics import be_deterministic

        torch.set_num_threads(self._numbers.threads)
        be_deterministic()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoders = [
            encoder.open(place.split(".")[-1], device)
            for place, encoder in configured(self._config).items()
        ]

    def _only(self, kind: type[Kind]) -> Kind | None:
        """The encoder of a kind of which there is one at most."""
        return next((encoder for encoder in self._encoders if isinstance(encoder, kind)), None)

    @property
    def _texts(self) -> list[Text]:
        return [encoder for encoder in self._encoders if isinstance(encoder, Text)]

    def _members(self, reads: str | None = None) -> dict[str, Member]:
        """All members in the order of the index, or those of the encoders that read so alone."""
        members: dict[str, Member] = {}
        for encoder in self._encoders:
            if reads in (None, encoder.reads):
                members |= encoder.members()
        return members | (self._beside if reads is None else {})

    def encode_shard(
        self, spec: ShardSpec, number: int, deadly: Collection[int] = ()
    ) -> dict[str, Any]:
        """Write and commit the shard that is the plan's `number`th, unless that is done; its commit record.

        The pictures in the `deadly` places are rejected for having killed their encoder.
        """
        if commit := read_commit(self._dataset, spec.path):
            return commit
        planned, flip = self._planned(spec, number), self._flips(spec)
        rows = [row for place, row in enumerate(planned) if place not in deadly]
        rejects = [reject(planned[place], "encoder_crash", CRASH) for place in deadly]
        writer = ShardWriter(self._dataset, spec.path, list(self._members()))
        samples = ProofSamples(self._config.thumbnails_per_shard)
        made, codec = Making(spec, planned, [], rejects, writer, samples), self._only(Codec)
        sums = np.zeros((3, codec.model.channels if codec else 0))
        try:
            for batch in self._batches(spec, rows, rejects):
                for row, picture, arrays in self._encode_batch(batch, rejects, flip):
                    take_errors(arrays, made.errors)
                    captions, pixels = row["captions"], picture.pixels if codec else None
                    variants = self._variants(captions, flip)
                    writer.add(row["key"], arrays, _facts(row, picture), variants)
                    made.kept.append(row)
                    samples.add(ProofSample(row["key"], captions[0], pixels, arrays))
                    for name in ("moments", "moments.flip")[: (1 + flip) * bool(codec)]:
                        _add_latents(sums, arrays[name])
            commit = self._finish(made)
            commit |= {"latent_count": int(sums[0, :1].sum()), "latent_sum": sums[1].tolist()}
            commit |= {"latent_square_sum": sums[2].tolist()}
            self._commit(commit, made.kept)
        finally:
            writer.abandon()
        return commit

    def _finish(self, made: Making, keys: Sequence[str] = (), each: int = 0) -> dict[str, Any]:
        """Let a shard's files appear; returns what its commit says. `keys` and `each` as ShardWriter.commit has them."""
        proof, psnr_db = self._prove(made.samples.in_order())
        self._check()
        files = made.writer.commit(proof, keys, each) | {"psnr_db": psnr_db}
        summary = _summary(made.kept) | {"rejects": made.rejects, "text_errors": made.errors}
        return asdict(made.spec) | files | summary

    def _commit(self, commit: dict[str, Any], kept: list[dict[str, Any]]) -> None:
        """Write a shard's commit record, and count."""
        from models.text_encoder import count_cut

        captions = [caption for row in kept for caption in row["captions"]]
        commit["cut_captions"] = {
            text.name: count_cut(text.model.tokenizer, captions, text.model.view)
            for text in self._texts
        }
        write_text(commit_path(self._dataset, commit["path"]), json.dumps(commit))
        if kept:
            self._pictures.inc(len(kept))
            self._bytes.inc(commit["bytes"])
        for rejected in commit["rejects"]:
            self._rejects.inc(1, {"reason": rejected["reason"]})

    def _planned(self, spec: ShardSpec, number: int) -> list[dict[str, Any]]:
        """The rows of the plan for the shard that is its `number`th."""
        return read_planned(work_of(self._dataset, spec.generation), number).to_pylist()

    def try_picture(self, spec: ShardSpec, number: int, place: int) -> None:
        """Encode one picture of a shard for nothing, which finds the one that kills its encoder."""
        rows = self._planned(spec, number)[place : place + 1]
        for batch in self._batches(spec, rows, []):
            for _ in self._encode_batch(batch, [], self._flips(spec)):
                pass

    def _flips(self, spec: ShardSpec) -> bool:
        return self._images.flip and spec.split == "train"

    def _batches(
        self, spec: ShardSpec, rows: list[dict[str, Any]], rejects: list[dict[str, str]]
    ) -> Iterator[list[Decoded]]:
        """Decoded pictures in the plan's order, `batch_size` at a time; at most two batches are ahead."""
        size, batch = self._numbers.batch_size, list[Decoded]()
        asked = ((row, self._pool.submit(self._request(row, spec))) for row in rows)
        waiting = deque(islice(asked, 2 * size))
        while waiting:
            row, future = waiting.popleft()
            answer = future.result()
            if isinstance(answer, Picture):
                batch.append((row, answer))
            else:
                assert isinstance(answer, Rejected)
                rejects.append(reject(row, answer.reason, answer.detail))
            waiting.extend(islice(asked, 1))
            if len(batch) == size or (batch and not waiting):
                yield batch
                batch = []

    def _request(self, row: dict[str, Any], spec: ShardSpec) -> DecodeRequest:
        named = self._sources[row["source"]].names_pictures
        address = Address(row["path"], row["offset"], row["length"], named=named)
        crop_at = (0.5, 0.5) if self._images.crop == "center" else _random_pair(row["key"])
        return DecodeRequest(address, row["content_hash"], (spec.height, spec.width), crop_at)

    def _encode_batch(
        self, batch: list[Decoded], rejects: list[dict[str, str]], flip: bool
    ) -> Iterator[tuple[dict[str, Any], Picture, dict[str, np.ndarray]]]:
        """Every picture's arrays by name: of its distinct captions, the second's end in .2, and so on."""
        captions = [list(dict.fromkeys(row["captions"])) for row, _ in batch]
        with self._encoding:
            seen = self._see(batch, flip) if self._members("pixels") else {}
            text = in_halves(partial(self._encode, "captions"), list(chain(*captions)))
        place = 0
        for i, (row, picture) in enumerate(batch):
            arrays = {name: values[i] for name, values in seen.items()}
            for number in range(len(captions[i])):
                arrays |= {_numbered(n, number): v[place + number] for n, v in text.items()}
            place += len(captions[i])
            if "micro" in self._beside:
                arrays["micro"] = picture.micro
                if flip:
                    arrays["micro.flip"] = _mirrored(picture)
            if "label" in self._beside:
                arrays["label"] = np.array(row["label"], np.int64)
            if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
                detail = f"{', '.join(bad)}: NaN, or over 65504, what float16 holds"
                rejects.append(reject(row, "not_finite", detail))
            else:
                yield row, picture, arrays

    def _see(self, batch: list[Decoded], flip: bool) -> dict[str, Any]:
        """What the encoders of pictures make of a batch, and of its mirror images where those are wanted."""
        pixels = np.stack([picture.pixels for _, picture in batch])  # (B, H, W, 3)
        seen = in_halves(partial(self._encode, "pixels"), pixels)
        if flip:
            mirrored = in_halves(partial(self._encode, "pixels"), pixels[:, :, ::-1].copy())
            seen |= {f"{name}.flip": values for name, values in mirrored.items()}
        return seen

    def _encode(self, reads: str, batch: Any) -> Arrays:
        """Every member's array of each picture, uint8 (B, H, W, 3), or of each caption."""
        if reads == "pixels":
            import torch

            batch = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()
        found: Arrays = {}
        for encoder in self._encoders:
            if encoder.reads == reads:
                found |= encoder.encode(batch)
        return found

    def _prove(self, samples: list[ProofSample]) -> tuple[bytes, list[float]]:
        """The shard's proof, and the PSNR of its pictures; none of a shard without samples.

        Pictures are decoded one by one: what a batch's bits are may depend on its size.
        """
        if not samples:
            return b"", []
        with self._encoding:
            codec = self._only(Codec)
            decoded = [codec.model.picture(s.arrays["moments"]) for s in samples if codec]
        return make_proof(samples, decoded, list(self._members("captions")))

    def _variants(self, captions: list[str], flip: bool) -> list[dict[str, str]]:
        """The samples made of one picture, as the arrays that stand for a member: captions by mirror images."""
        distinct = list(dict.fromkeys(captions))
        texts, seen = self._members("captions"), [*self._members("pixels"), "micro"]
        said = [{name: _numbered(name, distinct.index(c)) for name in texts} for c in captions]
        mirrored = [variant | {name: f"{name}.flip" for name in seen} for variant in said]
        return said + (mirrored if flip else [])


def encode_shards(
    actors: Actors, todo: list[tuple[ShardSpec, int]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and commit of every shard, in any order; a picture that kills its encoders is rejected."""
    groups = ([shard] for shard in todo)
    pictures = lambda shard: shard[0].num_planned  # noqa: E731
    for (spec, number), commit in actors.run_all("encode_shard", "try_picture", groups, pictures):
        if commit is LOST:
            raise InputError(
                f"{spec.path}: kills its encoders, though none of its pictures does alone. Remedy: where "
                "memory is short, lower encode.batch_size, and run it again to go on."
            )
        yield number, commit


def in_halves(encode: Callable[[Any], dict[str, Any]], values: Any) -> dict[str, Any]:
    """encode(values) in halves, and halves of halves, where the GPU's memory is too small for all at once.

    Batches of another size may round otherwise in the last bit. A shard's bytes then depend on the memory
    that is free: a GPU of the same size with nothing else on it divides the same batches again, and only
    these; no batch is smaller because one before it was.
    """
    import torch

    try:
        return encode(values)
    except torch.cuda.OutOfMemoryError as error:
        if len(values) == 1:
            raise InputError(
                f"encode: out of memory on a GPU with a batch of one: {error}. Remedy: a smaller "
                "images.resolution, dtype bf16, or fewer actors on the GPU (ray.gpus_per_actor)."
            ) from error
    torch.cuda.empty_cache()
    middle = len(values) // 2
    first, second = (in_halves(encode, half) for half in (values[:middle], values[middle:]))
    return {name: [*first[name], *second[name]] for name in first}


def take_errors(arrays: dict[str, np.ndarray], errors: TextErrors) -> None:
    """Move what int8 loses of each token from a picture's arrays to its shard's errors."""
    for name in [name for name in arrays if ".error" in name]:
        values, role = arrays.pop(name), name.split(".")[0]
        count, total, worst = errors.get(role, (0, 0.0, 0.0))
        worst = max(worst, float(values.max(initial=0)))
        errors[role] = count + len(values), total + float(values.sum()), worst


def with_errors(text: dict[str, Any], commits: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's record of the text, with what int8 loses of the tokens of all shards."""
    roles = dict(text["roles"])
    for name in roles:
        every = (commit.get("text_errors", {}).get(name) for commit in commits)
        if found := list(filter(None, every)):
            counts, totals, worst = zip(*found, strict=True)
            errors = {"mean_error": sum(totals) / sum(counts), "worst_error": max(worst)}
            roles[name] = roles[name] | errors
    return text | {"roles": roles}


def _add_latents(sums: np.ndarray, moments: np.ndarray) -> None:
    """Add a picture's latents to float64 (3, C): per channel the pixels, and the sums of x and of x squared."""
    channels = sums.shape[1]
    mean = moments[:channels].astype(np.float64)
    sums[0] += mean[0].size
    sums[1] += mean.sum(axis=(1, 2))
    sums[2] += (mean**2).sum(axis=(1, 2))
    # A deterministic codec stores no std.
    if len(std := moments[channels:].astype(np.float64)):
        sums[2] += (std**2).sum(axis=(1, 2))


def _numbered(name: str, number: int) -> str:
    return f"{name}.{number + 1}" if number else name


def _mirrored(picture: Picture) -> np.ndarray:
    """`micro` of the mirror image: its crop begins as far from the left as the other's ended from the right."""
    height, width, top, left = picture.micro
    crop_height, crop_width = picture.pixels.shape[:2]
    resized = width * max(crop_height / height, crop_width / width)
    right = max(resized - crop_width - left, 0)
    return np.array([height, width, top, right], dtype=np.float32)


def _facts(row: dict[str, Any], picture: Picture | None) -> dict[str, Any]:
    """KEY.json: for people, and for the audit the captions as drawn; without a picture no more than that."""
    facts = {"source": row["source"], "name": row["name"], "caption": row["captions"][0]}
    if len(row["captions"]) > 1:
        facts["captions"] = row["captions"]
    if picture is None:
        return facts
    facts |= {"height": row["height"], "width": row["width"]}
    if row["metadata"]:
        facts["metadata"] = json.loads(row["metadata"])
    return facts | ({"notes": picture.notes} if picture.notes else {})


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a commit says of a shard's rows: histograms, captions' hash, and how many classes it needs."""
    captions = [(row["key"], row["captions"]) for row in rows]
    sides = [min(row["height"], row["width"]) for row in rows]
    words = [len(text.split()) for row in rows for text in row["captions"]]
    counts = {
        name: np.histogram(values, [*bins, np.inf])[0].tolist()
        for (name, bins), values in zip(HISTOGRAMS.items(), (sides, words), strict=True)
    }
    return {
        "histograms": counts,
        "captions_sha256": captions_sha256(captions),
        "num_labels": max((r["label"] + 1 for r in rows if r["label"] is not None), default=0),
    }


def reject(row: dict[str, Any], reason: str, detail: str) -> dict[str, str]:
    names = {name: row[name] for name in ("key", "source", "name")}
    return names | {"reason": reason, "detail": detail}


def _random_pair(key: str) -> tuple[float, float]:
    """Two numbers in [0, 1) that depend on the key alone."""
    digest = hashlib.sha256(f"crop\0{key}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:8]) / 2**32
