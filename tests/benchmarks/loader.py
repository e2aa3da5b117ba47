"""flowmill's loader, its peers, and the memory copy: the same arrays, from page cache.

One process, one thread, batches of 64, every side in turn; medians of the rounds' rates and ratios.
Plain webdataset and flowmill read the very same files, which webdataset's own TarWriter wrote with its
defaults. The tuned pipeline gets what helps it: USTAR tars and a decoder without np.load. megatron-energon,
datasets (streaming) and LitData take part where they are installed.
"""

import contextlib
import io
import itertools
import json
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import webdataset
from rich.console import Console
from rich.table import Table

from data_prep.schema import index_path
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from tests.shard_factory import Kind, Sample, make_dataset, write_tar

BATCH = 64
BUCKET = (128, 256)  # latents of 16 x 32: 2 x 4 channels, fp16, make 8 KiB
CASES = {  # what a sample has, shards, samples per shard
    "124k": (Kind({"text": (77, 768)}, ragged=False, channels=4, bare=True), 24, 256),
    "8k": (Kind({}, channels=4, bare=True), 24, 1024),
    # 124 KiB too, of which each layer has nearly half.
    "stack": (
        Kind({"clip": (77, 384), "t5": (77, 384)}, ragged=False, channels=4, bare=True),
        24,
        256,
    ),
    # The text of 124k in half the bytes.
    "int8": (
        Kind({"text": (77, 768)}, ragged=False, channels=4, bare=True, int8=("text",)),
        24,
        256,
    ),
}
LEAST_S = 0.5  # a turn: a few epochs of what is fast
SLOW_SAMPLES = 2048  # of the sides that are known to be slow
Side = Callable[[], int]  # reads everything once and returns how many samples that were


def write_default_tar(path: Path, samples: list[Sample], keys: list[str]) -> None:
    """What webdataset writes if left alone: a float mtime, so a PAX header before each member."""
    with webdataset.TarWriter(str(path)) as tar:
        for key, sample in zip(keys, samples, strict=True):
            tar.write({"__key__": key} | {f"{name}.npy": array for name, array in sample.items()})


def plain(urls: list[str], names: list[str]) -> Side:
    def side() -> int:
        data = webdataset.WebDataset(urls, shardshuffle=False).decode()
        batches = data.to_tuple(*names).batched(BATCH)
        return sum(len(batch[0]) for batch in itertools.islice(batches, SLOW_SAMPLES // BATCH))

    return side


def frombuffer_decoder(key: str, data: bytes) -> np.ndarray | None:
    """An .npy without np.load's parsing: the header is read as a literal once for each distinct one."""
    if not key.endswith("npy"):
        return None
    begin = 10 + int.from_bytes(data[8:10], "little")
    header = data[:begin]
    if header not in _HEADERS:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        _HEADERS[header] = array.dtype, array.shape
    dtype, shape = _HEADERS[header]
    return np.frombuffer(data, dtype, offset=begin).reshape(shape)


_HEADERS: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}


def tuned(urls: list[str], names: list[str]) -> Side:
    def side() -> int:
        data = webdataset.WebDataset(urls, shardshuffle=False)
        batches = data.decode(frombuffer_decoder).to_tuple(*names).batched(BATCH)
        return sum(len(batch[0]) for batch in itertools.islice(batches, SLOW_SAMPLES // BATCH))

    return side


def energon(folder: Path, names: list[str]) -> Side:
    """megatron-energon with its index, in this process; raises ImportError where it is not installed."""
    from megatron.energon import (
        Cooker,
        CrudeWebdataset,
        DefaultTaskEncoder,
        Sample,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
    )
    from megatron.energon.task_encoder.base import stateless

    class Arrays(Sample):
        arrays: list[np.ndarray]

    Arrays = dataclass(Arrays)

    @stateless
    def cook(sample: dict[str, Any]) -> Arrays:
        keys = {name: sample[name] for name in ("__key__", "__restore_key__")}
        return Arrays(**keys, arrays=[sample[name] for name in names])

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder()
        cookers = [Cooker(cook)]

        @stateless
        def batch(self, samples: list[Arrays]) -> list[np.ndarray]:
            return [np.stack(arrays) for arrays in zip(*(s.arrays for s in samples), strict=True)]

        def encode_batch(self, batch: list[np.ndarray]) -> list[np.ndarray]:
            return batch

    paths = sorted(str(path.relative_to(folder)) for path in folder.glob("shards/*/*.tar"))
    CrudeWebdataset.prepare_dataset(folder, paths, split_parts_ratio=[("train", 1.0)], workers=1)
    kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(kind)
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"shuffle_buffer_size": None, "max_samples_per_sequence": None}
    data = get_train_dataset(
        folder, worker_config=workers, batch_size=BATCH, task_encoder=Encoder(), **options
    )
    batches = iter(get_loader(data))

    def side() -> int:
        return sum(len(next(batches)[0]) for _ in range(SLOW_SAMPLES // BATCH))

    return side


def streamed_datasets(urls: list[str], names: list[str]) -> Side:
    """Hugging Face's datasets, streaming the tars; raises ImportError where it is not installed."""
    from datasets import load_dataset

    features = [name.removesuffix(".npy") + ".npy" for name in names]
    data: Any = load_dataset(
        "webdataset", data_files={"train": urls}, split="train", streaming=True
    )
    data = data.select_columns(features)

    def side() -> int:
        batches = itertools.islice(data.iter(BATCH), SLOW_SAMPLES // BATCH)
        stacked = ([np.stack(batch[name]) for name in features] for batch in batches)
        return sum(len(arrays[0]) for arrays in stacked)

    return side


def lit_data(folder: Path, kind: Kind, shards: int, size: int) -> Side:
    """LitData on chunks of its own making, shuffled; raises ImportError where it is not installed."""
    from litdata.streaming import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    out = folder / "litdata"
    out.mkdir()
    writer = BinaryWriter(str(out), chunk_bytes="64MB")
    for number in range(shards * size):
        arrays = kind.sample(number, BUCKET)
        writer.add_item(number, {name: torch.from_numpy(array) for name, array in arrays.items()})
    writer.done()
    writer.merge()
    data = StreamingDataset(str(out), shuffle=True)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def side() -> int:
        return sum(len(next(batches)["moments"]) for _ in range(SLOW_SAMPLES // BATCH))

    return side


def flowmill(
    folder: Path, prefetch: int, samples: int, layers: dict[str, str] | None = None
) -> Side:
    """Shuffled, as in training, with the default windows and partitions; an epoch per round."""
    config = DataConfig(path=str(folder), prefetch=prefetch, layers=layers or {})
    batches = Loader(config, global_batch=BATCH, seed=0).batches()
    return lambda: sum(next(batches).moments.shape[0] for _ in range(samples // BATCH))


def stacked(folder: Path) -> dict[str, Side]:
    """One dataset with all members, and the same as a base with two layers of a text encoder each."""
    kind, shards, size = CASES["stack"]
    plan, samples = [(BUCKET, size)] * shards, shards * size
    flat = make_dataset(folder / "flat", plan, kind)
    base = make_dataset(folder / "base", plan, replace(kind, only=("moments",)))
    layers = {
        name: str(make_dataset(folder / name, plan, replace(kind, only=(name,)), base=base))
        for name in kind.encoders
    }
    return {
        "flowmill": flowmill(flat, 0, samples),
        "flowmill, base and 2 layers": flowmill(base, 0, samples, layers),
    }


def smaller_text(folder: Path) -> dict[str, Side]:
    """Text in int8, as it is read and as a network gets it, and in float16, which is both at once."""
    kind, shards, size = CASES["int8"]
    plan, samples = [(BUCKET, size)] * shards, shards * size
    whole = make_dataset(folder / "float16", plan, replace(kind, int8=()))
    small = make_dataset(folder / "int8", plan, kind)
    batches = Loader(DataConfig(path=str(small), prefetch=0), global_batch=BATCH, seed=0).batches()

    def unpacked() -> int:
        return sum(len(next(batches).to("cpu").moments) for _ in range(samples // BATCH))

    return {
        "flowmill": flowmill(small, 0, samples),
        "flowmill, float16": flowmill(whole, 0, samples),
        "flowmill, unpacked on the CPU": unpacked,
    }


def flowmill_anew(folder: Path, samples: int) -> Side:
    """A new loader each round: every shard is hashed, mapped and touched for the first time."""

    def side() -> int:
        batches = Loader(
            DataConfig(path=str(folder), prefetch=0), global_batch=BATCH, seed=0
        ).batches()
        return sum(next(batches).moments.shape[0] for _ in range(samples // BATCH))

    return side


class InWorker(torch.utils.data.IterableDataset):
    """The loader's tensors from a process of torch's DataLoader, through shared memory."""

    def __init__(self, folder: Path):
        self.config = DataConfig(path=str(folder), prefetch=0)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in Loader(self.config, global_batch=BATCH, seed=0).batches():
            tensors = {"moments": batch.moments, "text_emb": batch.text_emb}
            yield {name: tensor for name, tensor in tensors.items() if tensor is not None}


def flowmill_process(folder: Path, samples: int) -> Side:
    loader = torch.utils.data.DataLoader(InWorker(folder), batch_size=None, num_workers=1)
    batches = iter(loader)
    return lambda: sum(next(batches)["moments"].shape[0] for _ in range(samples // BATCH))


def memory_copy(files: list[Path], sample_bytes: int) -> Side:
    """The arrays' bytes from the mapped files, one after another, into one reused batch buffer."""
    maps = []
    for path in files:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        maps.append(np.frombuffer(mapped, np.uint8))
    step = BATCH * sample_bytes
    buffer = np.empty(step, np.uint8)

    def side() -> int:
        count = 0
        for source in maps:
            for begin in range(0, len(source) - step + 1, step):
                buffer[:] = source[begin : begin + step]
                count += BATCH
        return count

    return side


def shuffled_copy(files: list[Path], kind: Kind) -> Side:
    """The same bytes in a random order, array by array: what any loader that shuffles has to do."""
    arrays = []
    for path in files:
        with path.open("rb") as file:
            source = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        spans = np.load(index_path(str(path))).tolist()
        arrays += [[source[begin : begin + size] for begin, size in sample] for sample in spans]
    order = np.random.default_rng(0).permutation(len(arrays)).tolist()
    buffers = [
        np.empty((BATCH, array.nbytes), np.uint8) for array in kind.sample(0, BUCKET).values()
    ]

    def side() -> int:
        for place, number in enumerate(order):
            for buffer, array in zip(buffers, arrays[number], strict=True):
                buffer[place % BATCH] = array
        return len(order)

    return side


def measure(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Samples a second of wall and of CPU time: a warming round, then `rounds` with the sides in turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = 0
            while time.perf_counter() - wall < LEAST_S:
                count += side()
            rates = count / (time.perf_counter() - wall), count / (time.process_time() - cpu)
            if number:
                found[name]["wall"].append(rates[0])
                found[name]["cpu"].append(rates[1])
    return found


def build(folder: Path, case: str) -> dict[str, Side]:
    if case in ("stack", "int8"):
        return stacked(folder) if case == "stack" else smaller_text(folder)
    kind, shards, size = CASES[case]
    plan = [(BUCKET, size)] * shards
    default = make_dataset(folder / "default", plan, kind, write=write_default_tar)
    ustar = make_dataset(folder / "ustar", plan, kind, write=partial(write_tar, facts=False))
    tars = {root: sorted(root.glob("shards/*/*.tar")) for root in (default, ustar)}
    names = [f"{name}.npy" for name in kind.members()]
    sample_bytes = sum(array.nbytes for array in kind.sample(0, BUCKET).values())
    samples = shards * size
    sides = {
        "webdataset": plain([str(p) for p in tars[default]], names),
        "webdataset, USTAR": plain([str(p) for p in tars[ustar]], names),
        "webdataset, tuned": tuned([str(p) for p in tars[ustar]], names),
        "flowmill": flowmill(default, 0, samples),
        "flowmill, its thread": flowmill(default, 2, samples),
        "flowmill, a process": flowmill_process(default, samples),
        "flowmill, files anew": flowmill_anew(default, samples),
        "memory copy": memory_copy(tars[default], sample_bytes),
        "memory copy, shuffled": shuffled_copy(tars[default], kind),
    }
    peers: dict[str, Callable[[], Side]] = {
        "megatron-energon": lambda: energon(ustar, names),
        "datasets, streaming": lambda: streamed_datasets([str(p) for p in tars[ustar]], names),
        "LitData": lambda: lit_data(folder, kind, shards, size),
    }
    for name, peer in peers.items():
        with contextlib.suppress(ImportError):
            sides[name] = peer()
    return sides


def report(
    console: Console, case: str, found: dict[str, dict[str, list[float]]]
) -> dict[str, float]:
    table = Table(title=f"{case}: samples/s, medians of {len(found['flowmill']['wall'])}")
    for column in ("side", "wall", "CPU", "flowmill is (wall)", "(CPU)"):
        table.add_column(column, justify="left" if column == "side" else "right")
    ratios = {}
    for name, rates in found.items():
        row = [f"{statistics.median(rates[clock]):,.0f}" for clock in ("wall", "cpu")]
        for clock in ("wall", "cpu"):
            pairs = zip(found["flowmill"][clock], rates[clock], strict=True)
            ratios[name, clock] = statistics.median(ours / theirs for ours, theirs in pairs)
            row.append(f"{ratios[name, clock]:.2f}x")
        table.add_row(name, *row)
    console.print(table)
    keys = {
        f"x_energon_{case}": "megatron-energon",
        f"x_datasets_{case}": "datasets, streaming",
        f"x_litdata_{case}": "LitData",
        f"x_webdataset_{case}": "webdataset",
        f"x_tuned_webdataset_{case}": "webdataset, tuned",
        f"of_memcpy_{case}": "memory copy",
        f"of_shuffled_memcpy_{case}": "memory copy, shuffled",
        # How many times as fast one dataset is.
        f"x_stack_{case}": "flowmill, base and 2 layers",
        f"x_float16_{case}": "flowmill, float16",
    }
    flat = {key: round(ratios[name, "wall"], 3) for key, name in keys.items() if name in found}
    flat |= {
        f"{key}_cpu": round(ratios[name, "cpu"], 3) for key, name in keys.items() if name in found
    }
    return flat | {f"flowmill_{case}_per_s": round(statistics.median(found["flowmill"]["wall"]))}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the ratios here")] = None,
    rounds: Annotated[int, typer.Option(min=5)] = 5,
    cases: Annotated[list[str] | None, typer.Option("--case", help="all if none is given")] = None,
    folder: Annotated[Path | None, typer.Option(help="where to build the files (1 GB)")] = None,
) -> None:
    """Compare the loader with webdataset and with a memory copy."""
    torch.set_num_threads(1)
    console, results = Console(), {}
    for case in cases or CASES:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            results |= report(console, case, measure(build(Path(temporary), case), rounds))
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
