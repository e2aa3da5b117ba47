"""A batch: its tensors, the buffer that they lie in, and how samples in memory become one."""

import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.schema import EMPTY_CAPTION, Manifest, TextRecord
from models.conditions import Conditions
from models.config import InputError
from models.networks import NetworkConfig, RoutedConfig
from models.prompts import dequantised
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Bucket, Dataset, Mixture
from pipeline.data.randomness import fill_noise
from pipeline.data.shards import Rows, gather, gather_ragged

ALIGNMENT_BYTES = 64
"""What the place of every member in a batch buffer is a multiple of."""

LENGTHS = 16
"""What the length of a text is a multiple of: kernels are chosen, and some planned, for each shape."""

PURPOSES = {"posterior": "posterior", "noise": "noise", "token_scores": "tokens"}
"""What each of a batch's random tensors is drawn for."""


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket; b is this rank's share of the global batch, or a micro-batch's size.

    `indices` are places in the global batch, whatever the world size; `sample_ids` are the samples'
    numbers in the mixture. `moments` are raw, mean then std, or one value where the codec is
    deterministic. Groups of encoders' tokens lie one after another, `text_lengths` of each, zeros where
    masked; within a group they lie side by side, and so do pooled vectors. Text of several encoders, or in
    int8, is `packed` until the batch is on its device. A field is None where the dataset lacks it, or the
    network that the batch is for needs none. The tensors lie in a buffer that is used again once neither
    one of them nor a view of one is alive.
    """

    step: int
    epoch: int
    bucket: Bucket
    indices: Tensor  # int64 (b,)
    sample_ids: Tensor  # int64 (b,)
    moments: Tensor  # float16 (b, 2C, h, w) or (b, C, h, w)
    text_emb: Tensor | None = None  # (b, L, D), float16 unless bfloat16 is stored
    text_mask: Tensor | None = None  # bool (b, L), True keeps
    pooled: Tensor | None = None  # (b, P), likewise
    micro: Tensor | None = None  # float32 (b, 4): original height and width, crop top and left
    label: Tensor | None = None  # int64 (b,)
    vision: Tensor | None = None  # float16 (b, V, g, j): features of the picture's squares
    posterior: Tensor | None = None  # float32 (b, C, h, w): picks latents by the moments
    noise: Tensor | None = None  # float32 (b, C, h, w)
    token_scores: Tensor | None = None  # float32 (b, patches)
    text_lengths: tuple[int, ...] = ()
    packed: "Packed | None" = None
    buffer: "Buffer | None" = field(default=None, repr=False)

    def _map(self, function: Any) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped = {n: function(t) for n, t in tensors.items() if torch.is_tensor(t)}
        if self.packed:
            parts = {name: function(part) for name, part in self.packed.parts.items()}
            mapped["packed"] = replace(self.packed, parts=parts)
        return replace(self, **mapped)

    @property
    def conditions(self) -> Conditions:
        """What a network is told about the samples."""
        return Conditions(*(getattr(self, name) for name in Conditions._fields))

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.moments.shape[-2], self.moments.shape[-1]

    def drop(self, dropped: Tensor, caption: "EmptyCaption | None", num_classes: int) -> "Batch":
        """The batch with the empty caption and no class where `dropped`, bool (b,)."""
        nothing = Conditions() if caption is None else caption.as_in(self)
        if self.label is not None:
            nothing = nothing._replace(label=self.label.new_full((1,), num_classes))
        told: dict[str, Tensor] = {}
        for name, value, none in zip(Conditions._fields, self.conditions, nothing, strict=True):
            if value is not None and none is not None:
                rows = dropped.view(-1, *[1] * (value.ndim - 1))
                told[name] = torch.where(rows, none, value)
        return replace(self, **told)

    def draw(self, seed: int, step: int) -> None:
        """Fill the random tensors as those of a step, each a pure function of the seed and the step."""
        for name, purpose in PURPOSES.items():
            if (tensor := getattr(self, name)) is not None:
                fill_noise(tensor, seed, step, self.indices.tolist(), purpose)

    def rows(self, begin: int, end: int) -> "Batch":
        """Samples begin..end, as views."""
        return self._map(lambda t: t[begin:end])

    def parts(self, size: int) -> list["Batch"]:
        """Batches of `size` samples in order, the last one perhaps smaller, as views."""
        return [self.rows(start, start + size) for start in range(0, len(self.indices), size)]

    def split(self, micro_batch: int) -> list["Batch"]:
        """Equal micro-batches in order, as views."""
        assert len(self.indices) % micro_batch == 0
        return self.parts(micro_batch)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, its text unpacked there; the copy from a pinned buffer does not block.

        Indices and numbers stay: only the CPU reads them, and from a GPU each read would wait.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self._unpacked()
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.buffer is not None and device.type == "cuda":
            self.buffer.copied = torch.cuda.Event()
            self.buffer.copied.record(torch.cuda.current_stream(device))
        moved = replace(moved, indices=self.indices, sample_ids=self.sample_ids, buffer=None)
        return moved._unpacked()

    def _unpacked(self) -> "Batch":
        if self.packed is None:
            return self
        return replace(self, text_emb=self.packed.unpacked(self.text_lengths), packed=None)


@dataclass(frozen=True)
class Packed:
    """Text as it is stored: by role (b, length, width), which in int8 is two wider."""

    parts: dict[str, Tensor]
    text: TextRecord

    def unpacked(self, lengths: tuple[int, ...]) -> Tensor:
        """As a network reads it, (b, L, D), on the device where the parts are; zeros where no role is."""
        parts = {n: dequantised(p) if p.dtype == torch.int8 else p for n, p in self.parts.items()}
        first, dtypes = next(iter(parts.values())), {part.dtype for part in parts.values()}
        # float32 holds the numbers of all.
        dtype = first.dtype if len(dtypes) == 1 else torch.float32
        out = first.new_zeros((len(first), sum(lengths), self.text.width), dtype=dtype)
        for name, rows, columns in places(self.text, lengths):
            if name in parts:
                out[:, rows, columns] = parts[name]
        return out


def places(text: TextRecord, lengths: tuple[int, ...]) -> Iterator[tuple[str, slice, slice]]:
    """The rows and columns of each role in a text whose groups have these lengths."""
    begin = 0
    for group, length in zip(text.tokens, lengths, strict=True):
        offset = 0
        for name in group:
            width = text.shape(name)[1]
            yield name, slice(begin, begin + length), slice(offset, offset + width)
            offset += width
        begin += length


@dataclass(frozen=True)
class EmptyCaption:
    """The caption without words as each encoder sees it: `arrays` by member, tokens (l, D) and pooled (P,)."""

    arrays: dict[str, Tensor]
    text: TextRecord

    def to(self, device: torch.device) -> "EmptyCaption":
        return replace(self, arrays={n: array.to(device) for n, array in self.arrays.items()})

    def as_in(self, batch: Batch) -> Conditions:
        """One row of text, mask and pooled text, laid out and padded as in the batch."""
        text, mask = batch.text_emb, batch.text_mask
        if text is not None and mask is not None:
            text, mask = torch.zeros_like(text[:1]), torch.zeros_like(mask[:1])
            for name, rows, columns in places(self.text, batch.text_lengths):
                if name not in self.text.absent:
                    tokens = self.arrays[name][: rows.stop - rows.start]
                    text[:, rows, columns][:, : len(tokens)] = tokens
                    if not self.text.unmasked(name):
                        rows = slice(rows.start, rows.start + len(tokens))
                mask[:, rows] = True
        pooled = [self.arrays[f"{name}_pooled"] for name in self.text.pooled]
        return Conditions(text, mask, torch.cat(pooled)[None] if pooled else None)


def load_empty_caption(dataset: Dataset, manifest: Manifest) -> EmptyCaption | None:
    """The dataset's empty caption, stored under the members' names; None without text."""
    if not manifest.text.roles:
        return None
    arrays = dict[str, Tensor]()
    for name in manifest.text_members():
        path = dataset.folder_of(name).home / EMPTY_CAPTION
        if not path.is_file():
            raise InputError(
                f"{path}: no such file, needed for caption dropout. Remedy: prepare again."
            )
        tensors = load_file(path)
        if name not in tensors:
            raise InputError(f"{path}: got {sorted(tensors)}, expected {name}")
        member, role = manifest.members[name], manifest.text.roles.get(name)
        # No empty caption is in int8.
        dtype = torch.float16 if member.dtype == "int8" else getattr(torch, member.dtype)
        arrays[name] = (
            tensors[name].view(dtype).view(-1, role.dim) if role else tensors[name].view(dtype)
        )
    return EmptyCaption(arrays, manifest.text)


@dataclass
class Buffer:
    """Memory of one batch, page-locked where a GPU reads it.

    `copied` is the CUDA event of a copy that may still run; `user` lives as long as any tensor in it.
    """

    bytes: Tensor
    copied: Any = None
    user: "weakref.ref[np.ndarray] | None" = None


class BufferPool:
    """Buffers, each free again when the last tensor in it dies."""

    def __init__(self, pin: bool):
        self.pin = pin
        self.free: deque[Buffer] = deque()

    def take(self, size: int) -> tuple[Buffer, Tensor]:
        """A buffer and its bytes as a tensor, uint8 (at least size,)."""
        # The last one used is most likely still in the CPU's caches.
        buffer = self.free.pop() if self.free else None
        if buffer is not None and buffer.copied is not None:
            buffer.copied.synchronize()
            buffer.copied = None
        if buffer is None or buffer.bytes.nbytes < size:
            buffer = Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=self.pin))
        # Torch keeps `view` for as long as any tensor uses its memory.
        view, taken = buffer.bytes.numpy().view(), buffer
        buffer.user = weakref.ref(view, lambda _: self.free.append(taken))
        return buffer, torch.from_numpy(view)


@dataclass(frozen=True)
class Slot:
    """Where a member lies in a batch buffer; `column` is that of its addresses, None where it has none."""

    name: str
    column: int | None
    begin: int
    row_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Assembler:
    """Turns samples in memory into a Batch in a buffer, with room for what `model` draws for each."""

    def __init__(self, mixture: Mixture, config: DataConfig, model: NetworkConfig | None = None):
        self.mixture, self.pad_to_longest = mixture, config.pad_text == "longest"
        self.left_out = set() if getattr(model, "alignment", None) else {"vision"}
        self.model = model
        self.scored = isinstance(model, RoutedConfig) and model.span is not None
        self.text, members = mixture.manifest.text, mixture.manifest.members
        self.limits = [
            min(config.text_length or length, length)
            for length in (self.text.shape(group[0])[0] for group in self.text.tokens)
        ]
        self.roles = [name for name in chain(*self.text.tokens) if name in members]
        # Text of one encoder alone is what a network reads.
        several = len([*chain(*self.text.tokens)]) > 1
        self.packs = several or any(members[name].dtype == "int8" for name in self.roles)
        self.columns = {name: column for column, name in enumerate(members)}
        # The rows of `Rows.tokens`.
        self.counted = [name for name in members if name in self.text.roles]
        unread = [n for n in mixture.manifest.text_members() if n not in self.text.pooled_members]
        self.left_out |= set(unread)
        self.pool = BufferPool(pin=torch.cuda.is_available())
        self.parts = lru_cache(maxsize=1024)(self._parts)
        caption = load_empty_caption(mixture.datasets[0], mixture.manifest)
        self.empty = {n: len(array) for n, array in caption.arrays.items()} if caption else {}

    def __call__(self, rows: Rows, bucket: Bucket, indices: Tensor, step: int, epoch: int) -> Batch:
        padded, count = self._padded(rows.tokens), len(rows)
        parts, size = self.parts(bucket, padded, count)
        buffer, memory = self.pool.take(size)
        out: dict[str, Tensor] = {}
        for part in parts:
            flat = memory.as_strided((count, part.row_bytes), (part.row_bytes, 1), part.begin)
            if part.column is not None:
                gather(rows.address(part.column), rows.low, rows.high, flat)
            out[part.name] = flat.view(part.dtype).view(*part.shape)
        pooled = [out[name] for name in self.text.pooled_members]
        texts = {name: out[name] for name in self.roles}
        for name, part in texts.items():
            self._gather_text(name, rows, part)
        alone = None if self.packs else next(iter(texts.values()), None)
        return Batch(
            step=step,
            epoch=epoch,
            bucket=bucket,
            indices=indices,
            sample_ids=torch.from_numpy(rows.ids),
            moments=out["moments"],
            text_emb=alone,
            text_mask=self._masks(rows, padded) if self.text.width else None,
            pooled=torch.cat(pooled, dim=1) if len(pooled) > 1 else next(iter(pooled), None),
            micro=out.get("micro"),
            label=out["label"].view(-1) if "label" in out else None,
            vision=out.get("vision"),
            **{name: out.get(name) for name in PURPOSES},
            text_lengths=padded,
            packed=Packed(texts, self.text) if self.packs and texts else None,
            buffer=buffer,
        )

    def _parts(self, bucket: Bucket, padded: tuple[int, ...], count: int) -> tuple[list[Slot], int]:
        """The members of a batch in its buffer, and the bytes of all."""
        members = self.mixture.manifest.members
        kinds: list[tuple[str, int | None, tuple[int, ...], torch.dtype]] = [
            (name, self.columns[name], shape, getattr(torch, members[name].dtype))
            for name, shape in self.mixture.shapes(bucket).items()
            if name not in self.left_out
        ]
        for name, part, _ in places(self.text, padded):
            if name in self.roles:
                shape = part.stop - part.start, members[name].shape[-1] or 0
                kinds.append((name, None, shape, getattr(torch, members[name].dtype)))
        kinds += [(name, None, s, torch.float32) for name, s in self._drawn(bucket).items()]
        parts, begin = [], 0
        for name, column, shape, dtype in kinds:
            row_bytes = math.prod(shape) * dtype.itemsize
            parts.append(Slot(name, column, begin, row_bytes, (count, *shape), dtype))
            begin += -(-count * row_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return parts, begin

    def _drawn(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's random tensors."""
        if self.model is None:
            return {}
        codec = self.mixture.manifest.codec
        height, width = (side // codec.downscale for side in bucket)
        latents = (codec.channels, height, width)
        shapes: dict[str, tuple[int, ...]] = {"noise": latents}
        if not codec.deterministic:
            shapes["posterior"] = latents
        if self.scored:
            shapes["token_scores"] = (height * width // self.model.latent_multiple**2,)
        return shapes

    def _padded(self, tokens: np.ndarray) -> tuple[int, ...]:
        """Length of each group's part of the text; `tokens` is int64 (encoders, b)."""
        if not self.pad_to_longest:
            return tuple(self.limits)
        # The empty caption needs room too: it may take any sample's place.
        names = [group[0] for group in self.text.tokens]
        longest = [max(tokens[self.counted.index(n)].max(), self.empty[n]) for n in names]
        rounded = (-(-int(length) // LENGTHS) * LENGTHS for length in longest)
        return tuple(min(pair) for pair in zip(rounded, self.limits, strict=True))

    def _masks(self, rows: Rows, padded: tuple[int, ...]) -> Tensor:
        """Which tokens a network reads, bool (b, L)."""
        groups = zip(self.text.tokens, padded, strict=True)
        masks = [self._mask(group[0], rows, length) for group, length in groups]
        return torch.from_numpy(masks[0] if len(masks) == 1 else np.concatenate(masks, axis=1))

    def _mask(self, name: str, rows: Rows, length: int) -> np.ndarray:
        """Which of a group's places a network reads, bool (b, length)."""
        if self.text.unmasked(name):
            return np.ones((len(rows), length), bool)
        tokens = np.minimum(rows.tokens[self.counted.index(name)], length)
        return np.arange(length) < tokens[:, None]

    def _gather_text(self, name: str, rows: Rows, out: Tensor) -> None:
        """Fill `out`, (b, length, width), with one role's tokens, zeros behind them."""
        count, length, width = out.shape
        address, token_bytes = rows.address(self.columns[name]), width * out.itemsize
        flat = out.view(torch.uint8).view(count, length * token_bytes)
        tokens = np.minimum(rows.tokens[self.counted.index(name)], length)
        if (tokens == length).all():
            gather(address, rows.low, rows.high, flat)
        else:
            gather_ragged(address, tokens * token_bytes, flat)
