"""The loader: a prepared dataset's shards to batches. The order is order.py's; this module reads.

A shard is mapped, its index turned into addresses, and a batch gathered by one call a member from those
addresses into a reused buffer: no tar parsing and no Python for each sample.
"""

import mmap
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from data_prep.schema import EMPTY_CAPTION, Manifest
from models.config import Config, InputError
from pipeline.order import Order, Plan, Window, choose_partitions
from pipeline.remote import CacheConfig, ShardCache, is_remote
from pipeline.shards import Rows, ShardStore, gather
from pipeline.snapshots import Bucket, DatasetConfig, Record, Snapshot, check_dataset, read_dataset

__all__ = ["Batch", "DataConfig", "EmptyCaption", "Loader", "check_dataset", "load_empty_caption"]

BLOCK = 256  # samples of a partition whose addresses are put together at once
ALIGNMENT = 64  # bytes, of every member in a batch buffer


class DataConfig(Config):
    """Either `path`, one dataset, or `datasets`, several mixed by their repeat factors."""

    path: str | None = None
    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    # What changes the order, beside the run's seed and global batch.
    canonical_partitions: Annotated[int, Field(ge=1)] | None = None  # None: see choose_partitions
    window_shards: int = Field(4, ge=1)  # shuffled together, in every partition and bucket
    # What changes the tensors.
    text_length: Annotated[int, Field(ge=1)] | None = (
        None  # keep so many tokens; None: all prepared
    )
    pad_text: Literal["max", "longest"] = "max"  # to text_length, or to the batch's longest
    grow: bool = False  # look for more shards at the beginning of every epoch
    on_corrupt: Literal["fail", "skip"] = "fail"  # skip: others take the places of its samples
    # Reading.
    verify: Literal["first_use", "size"] = "first_use"  # hash each shard once, or trust its size
    prefetch: int = Field(2, ge=0)  # batches read ahead by a thread; 0 reads when asked
    cache: CacheConfig | None = None  # for datasets at URLs

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.datasets):
            raise ValueError("give either path (one dataset) or datasets (several), and not both")
        remote = [source.path for source in self.sources.values() if is_remote(source.path)]
        if remote and not self.cache:
            raise ValueError(f"{remote[0]} is remote: give cache.path and cache.max_gib")
        if self.cache and not remote:
            raise ValueError("cache has no effect: every dataset is a local folder")
        return self

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        return self.datasets or {"data": DatasetConfig(path=self.path or "")}


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket; b is this rank's share of the global batch, or of a micro-batch.

    Without text, pooled or labels in the dataset the fields are None. The tensors lie in a buffer that is
    used again once none of them, nor a view of them, is alive.
    """

    step: int
    epoch: int
    bucket: tuple[int, int]  # height and width of the pictures, pixels
    indices: Tensor  # int64 (b,), places in the global batch, whatever the world size
    sample_ids: Tensor  # int64 (b,), numbers of the samples in the snapshot
    moments: (
        Tensor  # float16 (b, 2C, h, w), mean then std, raw; (b, C, h, w) of a deterministic codec
    )
    text_emb: Tensor | None = (
        None  # float16 (b, L, D), encoders one after another, zeros where masked
    )
    text_mask: Tensor | None = None  # bool (b, L), True keeps
    pooled: Tensor | None = None  # float16 (b, P), encoders side by side
    micro: Tensor | None = None  # float32 (b, 4), original height and width, crop top and left
    label: Tensor | None = None  # int64 (b,)
    text_lengths: tuple[int, ...] = ()  # of each encoder's part of L
    micro_step: int = 0
    buffer: "Buffer | None" = field(default=None, repr=False)

    def _map(self, function: Any) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: function(t) for n, t in tensors.items() if torch.is_tensor(t)})

    def split(self, micro_batch: int) -> list["Batch"]:
        """Micro-batches, views in order; raises InputError where they would not be equal."""
        size = len(self.indices)
        if size % micro_batch:
            raise InputError(f"micro batch: got {micro_batch}, expected a divisor of {size} a rank")
        starts = range(0, size, micro_batch)
        parts = [self._map(lambda t, s=s: t[s : s + micro_batch]) for s in starts]
        return [replace(part, micro_step=number) for number, part in enumerate(parts)]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from a pinned buffer the copy does not wait."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.buffer is not None and device.type == "cuda":
            self.buffer.copied = torch.cuda.Event()
            self.buffer.copied.record(torch.cuda.current_stream(device))
        return replace(moved, buffer=None)


@dataclass(frozen=True)
class EmptyCaption:
    """A caption of no words as each encoder sees it: (tokens (l, D), pooled (P,)) by encoder, float16."""

    parts: list[tuple[Tensor, Tensor]]

    def put(self, batch: Batch, dropped: Tensor) -> Batch:
        """The batch with this caption in place of the dropped ones; dropped bool (b,)."""
        if batch.text_emb is None or batch.text_mask is None or batch.pooled is None:
            return batch
        text, mask = torch.zeros_like(batch.text_emb[:1]), torch.zeros_like(batch.text_mask[:1])
        begin = 0
        for (tokens, _), length in zip(self.parts, batch.text_lengths, strict=True):
            kept = min(len(tokens), length)
            text[:, begin : begin + kept, : tokens.shape[1]] = tokens[:kept].to(text.device)
            mask[:, begin : begin + kept] = True
            begin += length
        pooled = torch.cat([pooled for _, pooled in self.parts])[None].to(batch.pooled)
        dropped = dropped.to(text.device)[:, None]
        return replace(
            batch,
            text_emb=torch.where(dropped[..., None], text, batch.text_emb),
            text_mask=torch.where(dropped, mask, batch.text_mask),
            pooled=torch.where(dropped, pooled, batch.pooled),
        )


def load_empty_caption(dataset: Path, manifest: Manifest) -> EmptyCaption | None:
    """The dataset's empty_caption.safetensors, whose tensors are named as the members; None without text."""
    if not manifest.text_encoders:
        return None
    path = dataset / EMPTY_CAPTION
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, needed for caption dropout. Remedy: prepare again."
        )
    tensors = load_file(path)
    parts = []
    for name, record in manifest.text_encoders.items():
        pair = tensors.get(name), tensors.get(f"{name}_pooled")
        if pair[0] is None or pair[1] is None:
            raise InputError(f"{path}: got {sorted(tensors)}, expected {name} and {name}_pooled")
        parts.append((pair[0].reshape(-1, record.dim).half(), pair[1].reshape(-1).half()))
    return EmptyCaption(parts)


@dataclass
class Buffer:
    """Page-locked where a GPU reads it; `copied` is set by a copy that may still run."""

    bytes: Tensor
    copied: Any = None


class BufferPool:
    """Buffers that come back by themselves when the last tensor in them dies."""

    def __init__(self, pin: bool):
        self.pin = pin
        self.free: deque[Buffer] = deque()

    def carve(self, sizes: dict[str, int]) -> tuple[Buffer, dict[str, Tensor]]:
        """A buffer, and parts of it, uint8, of the sizes asked for."""
        begins = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())])
        buffer = self.free.popleft() if self.free else None
        if buffer is not None and buffer.copied is not None:
            buffer.copied.synchronize()
            buffer.copied = None
        if buffer is None or len(buffer.bytes) < begins[-1]:
            buffer = Buffer(torch.empty(int(begins[-1]), dtype=torch.uint8, pin_memory=self.pin))
        # Torch keeps `view` for as long as any tensor uses its memory.
        view = buffer.bytes.numpy().view()
        weakref.finalize(view, self.free.append, buffer).atexit = False
        memory = torch.from_numpy(view)
        parts = zip(sizes.items(), begins.tolist(), strict=False)
        return buffer, {name: memory[begin : begin + size] for (name, size), begin in parts}


class Assembler:
    """Turns samples in memory into a Batch in a buffer."""

    def __init__(self, snapshot: Snapshot, config: DataConfig, pin: bool):
        self.snapshot, self.config = snapshot, config
        self.encoders = snapshot.manifest.text_encoders
        members = snapshot.manifest.members
        self.columns = {member.name: column for column, member in enumerate(members)}
        self.dtypes = {member.name: getattr(torch, member.dtype) for member in members}
        self.fixed = [member.name for member in members if member.name not in self.encoders]
        self.width = max([record.dim for record in self.encoders.values()] or [1])
        self.pool = BufferPool(pin)
        self.zeros = mmap.mmap(-1, 2 * self.width)  # a masked token, at an address of its own
        self.zero = int(np.frombuffer(self.zeros, np.uint8).__array_interface__["data"][0])
        caption = load_empty_caption(snapshot.datasets[0].home, snapshot.manifest)
        self.empty = [len(tokens) for tokens, _ in caption.parts] if caption else []

    def __call__(
        self, rows: Rows, bucket: Bucket, indices: np.ndarray, step: int, epoch: int
    ) -> Batch:
        count, lengths = len(rows.ids), self._text_lengths(rows.spans)
        padded = tuple(length for _, length in lengths)
        shapes = dict(zip(self.columns, self.snapshot.shapes(bucket), strict=True))
        kinds = {name: (shapes[name], self.dtypes[name]) for name in self.fixed}
        if self.encoders:
            kinds["text"] = (sum(padded), self.width), torch.float16
        buffer, flat = self.pool.carve({n: count * _bytes(*kind) for n, kind in kinds.items()})
        for name in self.fixed:
            gather(rows.spans[:, self.columns[name], 0], flat[name].view(count, -1))
        out = {n: flat[n].view(d).view([count, *shape]) for n, (shape, d) in kinds.items()}
        pooled = [out[p] for name in self.encoders if (p := f"{name}_pooled") in out]
        return Batch(
            step=step,
            epoch=epoch,
            bucket=bucket,
            indices=torch.from_numpy(indices),
            sample_ids=torch.from_numpy(rows.ids.copy()),
            moments=out["moments"],
            text_emb=out.get("text"),
            text_mask=self._gather_text(out["text"], rows.spans, lengths)
            if self.encoders
            else None,
            pooled=torch.cat(pooled, dim=1) if len(pooled) > 1 else next(iter(pooled), None),
            micro=out.get("micro"),
            label=out["label"].view(count) if "label" in out else None,
            text_lengths=padded,
            buffer=buffer,
        )

    def _text_lengths(self, spans: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """An encoder each: the samples' tokens, int64 (b,), and the length to pad to."""
        lengths = []
        for number, (name, record) in enumerate(self.encoders.items()):
            limit = min(self.config.text_length or record.max_length, record.max_length)
            tokens = np.minimum(spans[:, self.columns[name], 1] // (2 * record.dim), limit)
            # Room for the empty caption, which may take any sample's place.
            longest = max(int(tokens.max()), min(self.empty[number], limit))
            lengths.append((tokens, longest if self.config.pad_text == "longest" else limit))
        return lengths

    def _gather_text(
        self, out: Tensor, spans: np.ndarray, lengths: list[tuple[np.ndarray, int]]
    ) -> Tensor:
        """Fill out, float16 (b, L, D), and return the mask, bool (b, L)."""
        masks, begin = [], 0
        for (name, record), (tokens, length) in zip(self.encoders.items(), lengths, strict=True):
            address, row = spans[:, self.columns[name], 0], 2 * record.dim
            alone = len(self.encoders) == 1
            part = out if alone else torch.empty(len(out), length, record.dim, dtype=out.dtype)
            mask = np.arange(length) < tokens[:, None]
            if mask.all():
                gather(address, part.view(torch.uint8).view(len(out), length * row))
            else:
                places = np.where(mask, address[:, None] + np.arange(length) * row, self.zero)
                gather(places.reshape(-1), part.view(torch.uint8).view(-1, row))
            if not alone:
                out[:, begin : begin + length, : record.dim] = part
                out[:, begin : begin + length, record.dim :] = 0
            masks.append(mask)
            begin += length
        return torch.from_numpy(np.concatenate(masks, axis=1))


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


class PartitionReader:
    """The samples of one partition of a bucket, one after another; its next window is on the way."""

    def __init__(self, store: ShardStore, windows: Iterator[Window]):
        self.store, self.windows = store, windows
        self.rows: Rows | None = None
        self.coming = self._request()

    def _request(self) -> Window:
        window = next(self.windows)
        self.store.request(window)
        return window

    def take(self, count: int) -> list[Rows]:
        taken = []
        while count:
            if self.rows is None or not len(self.rows.ids):
                window, self.coming = self.coming, self._request()
                self.rows = self.store.read(window)
            taken.append(self.rows[:count])
            self.rows = self.rows[count:]
            count -= len(taken[-1].ids)
        return taken


class BucketReader:
    """This rank's share of a bucket's batches, from one place on: (epoch, bucket, batch number)."""

    def __init__(self, era: "Era", partitions: range, place: tuple[int, int, int]):
        epoch, bucket, number = place
        order, plan = era.order.buckets[bucket], era.plan
        self.share = plan.global_batch // plan.partitions
        self.readers = [
            PartitionReader(
                era.store, order.windows(p, number * self.share, epoch - plan.first_epoch)
            )
            for p in partitions
        ]
        self.epoch_batches = order.batches(1)
        self.batches: deque[Rows] = deque()

    def next(self) -> Rows:
        if not self.batches:
            self._fill(max(1, min(BLOCK // self.share, self.epoch_batches)))
        return self.batches.popleft()

    def _fill(self, count: int) -> None:
        """The rows of the next `count` batches at once, so that a partition costs little a batch."""
        taken = [reader.take(count * self.share) for reader in self.readers]
        spans = np.stack([np.concatenate([r.spans for r in rows]) for rows in taken])
        ids = np.stack([np.concatenate([r.ids for r in rows]) for rows in taken])
        shards = [shard for rows in taken for r in rows for shard in r.shards]
        # (partitions, count * share, ...) -> (count, partitions * share, ...)
        spans = spans.reshape(len(taken), count, self.share, *spans.shape[2:]).swapaxes(0, 1)
        spans = spans.reshape(count, -1, *spans.shape[3:])
        ids = ids.reshape(len(taken), count, self.share).swapaxes(0, 1).reshape(count, -1)
        self.batches.extend(Rows(s, i, shards) for s, i in zip(spans, ids, strict=True))


@dataclass(frozen=True)
class Era:
    """Epochs that use one snapshot, from plan.first_epoch on."""

    snapshot: Snapshot
    plan: Plan
    order: Order
    store: ShardStore
    assemble: Assembler


class Loader:
    """Batches of one rank. Its whole state is the step: `batches(step)` goes on from anywhere.

    A batch holds the rank's `global_batch / world_size` samples; Batch.split cuts it in micro-batches.
    `record` is a folder of the run that all ranks see, in which the run keeps which shards its epochs use;
    without it a resumed run takes the datasets as they are. Raises InputError where the batch, the
    partitions and the ranks do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        record: Path | None = None,
    ):
        self.config, self.pin = config, pin
        self._stop = threading.Event()
        if config.grow and record is None:
            raise ValueError("a dataset that grows needs a record")
        self.record = Record(record, rank, self._stop) if record else None
        partitions = choose_partitions(config.canonical_partitions, global_batch, world_size)
        self.plan = Plan(seed, global_batch, partitions, config.window_shards)
        self.partitions = range(rank, partitions, world_size)
        share = global_batch // partitions
        self.indices = np.concatenate([p * share + np.arange(share) for p in self.partitions])
        self.wait_s = 0.0  # that `batches` made its caller wait, in all
        self._threads: list[threading.Thread] = []
        self.caches = {
            name: ShardCache(source.path, config.cache, self._stop)
            for name, source in config.sources.items()
            if config.cache and is_remote(source.path)
        }
        self.eras = [self._era(self._look(), 0, 0)]
        for entry in self.record.entries() if self.record else []:
            self._follow(entry)

    def _look(self) -> Snapshot:
        """The datasets as they are now."""
        sources = self.config.sources.items()
        return Snapshot([read_dataset(name, s, self.caches.get(name)) for name, s in sources])

    def _era(self, snapshot: Snapshot, epoch: int, step: int) -> Era:
        plan = replace(self.plan, first_epoch=epoch, first_step=step)
        store = ShardStore(snapshot, self.config.verify, self.config.on_corrupt)
        assemble = Assembler(snapshot, self.config, self.pin)
        return Era(snapshot, plan, Order(snapshot.buckets(), plan), store, assemble)

    def _follow(self, entry: dict[str, Any]) -> None:
        """Add what the record says of an epoch, later than any that the loader has, or the first."""
        assert self.record is not None
        snapshot = self.eras[-1].snapshot
        if entry["datasets"] != snapshot.fingerprints():
            snapshot = self.record.load(entry, self._look())
            if entry["epoch"] == 0:
                self.eras.clear()
            self.eras.append(self._era(snapshot, entry["epoch"], entry["first_step"]))

    def _begin(self, epoch: int, step: int) -> None:
        """Settle which snapshot an epoch uses, as rank 0 finds or finds recorded."""
        if self.record is None or (epoch and not self.config.grow):
            return
        known = {entry["epoch"]: entry for entry in self.record.entries()}
        if epoch not in known and self.record.rank == 0:
            snapshot = self._look() if epoch else self.eras[-1].snapshot
            self.record.decide(epoch, step, snapshot)
        self._follow(known.get(epoch) or self.record.wait(epoch))

    @property
    def snapshot(self) -> Snapshot:
        """The run's first, which decides what is held out."""
        return self.eras[0].snapshot

    @property
    def manifest(self) -> Manifest:
        return self.snapshot.manifest

    @cached_property
    def empty_caption(self) -> EmptyCaption | None:
        return load_empty_caption(self.snapshot.datasets[0].home, self.manifest)

    def era_of(self, step: int) -> Era:
        return [era for era in self.eras if era.plan.first_step <= step][-1]

    def epoch_of(self, step: int) -> int:
        return self.era_of(step).order.epoch_of(step)

    def steps_per_epoch(self, epoch: int) -> int:
        """As the datasets known now will have it."""
        order = [era for era in self.eras if era.plan.first_epoch <= epoch][-1].order
        return order.first_step(epoch + 1) - order.first_step(epoch)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of every global batch from `start_step` on, for ever."""
        produce = self._produce(start_step)
        if not self.config.prefetch:
            yield from self._timed(produce.__next__)
        ready: queue.Queue[Batch | Exception] = queue.Queue(self.config.prefetch)
        stop = threading.Event()
        thread = threading.Thread(
            target=_read_ahead, args=(produce, ready, stop, self._stop), daemon=True
        )
        thread.start()
        self._threads.append(thread)
        try:
            yield from self._timed(ready.get)
        finally:
            stop.set()

    def _timed(self, get: Callable[[], Batch | Exception]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = get()
            self.wait_s += time.perf_counter() - begin
            if isinstance(batch, Exception):
                raise batch
            yield batch
            del batch  # so that its buffer is free while the next one is awaited

    def _produce(self, step: int) -> Iterator[Batch]:
        self._begin(0, 0)
        era, readers = self.era_of(step), {}
        epoch = era.order.epoch_of(step)
        while True:
            first, sequence = era.order.first_step(epoch), era.order.sequence(epoch)
            for bucket in sequence[step - first :].tolist():
                if bucket not in readers:
                    readers[bucket] = BucketReader(era, self.partitions, era.order.locate(step))
                key = era.order.buckets[bucket].key
                yield era.assemble(readers[bucket].next(), key, self.indices, step, epoch)
                step += 1
            epoch += 1
            self._begin(epoch, step)
            if era is not self.era_of(step):
                era.store.close()
                era, readers = self.era_of(step), {}

    def heldout_batch(self, size: int) -> Batch | None:
        """The same `size` held-out samples always (fewer if there are fewer), of the bucket that has most.

        None where the dataset holds nothing out.
        """
        buckets = self.snapshot.buckets(heldout=True)
        if not buckets:
            return None
        counts = {
            key: sum(int(part.sizes.sum()) for part in parts) for key, parts in buckets.items()
        }
        bucket = max(counts, key=lambda key: (counts[key], key))
        shards, spans, ids = [], [], []
        for number in np.concatenate([part.shards for part in buckets[bucket]]).tolist():
            if sum(map(len, ids)) < size:
                shards.append(self.eras[0].store.open(number))
                spans.append(shards[-1].spans)
                ids.append(self.snapshot.first_id[number] + np.arange(len(spans[-1])))
        rows = Rows(np.concatenate(spans), np.concatenate(ids), shards)[:size]
        return self.eras[0].assemble(rows, bucket, np.arange(len(rows.ids)), step=0, epoch=0)

    def close(self) -> None:
        """Stop reading ahead, and fetching."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for era in self.eras:
            era.store.close()


def _read_ahead(
    produce: Iterator[Batch],
    ready: "queue.Queue[Any]",
    *stops: threading.Event,
) -> None:
    """The reading thread: batches, or what went wrong, into the queue until told to stop."""
    # Of this thread alone: the copies are bound by memory, and the cores are the trainer's.
    torch.set_num_threads(1)
    while not any(stop.is_set() for stop in stops):
        try:
            item: Any = next(produce)
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for the batch
            item = error
        while not any(stop.is_set() for stop in stops):
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, Exception):
            return
        del item  # or it would hold its buffer while the next one is read
