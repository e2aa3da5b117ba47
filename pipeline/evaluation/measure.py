"""The figures of an evaluation: measured, recorded, shown. None is given without what it was measured with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.tensorboard.summary import scalar

from data_prep.schema import fingerprint
from models.command import plain_console
from models.config import InputError, flatten
from models.files import write_text
from models.prompts import parse_class
from pipeline import distributed
from pipeline.arguments import parse_size, read_prompts
from pipeline.data.config import DataConfig
from pipeline.data.datasets import check_same
from pipeline.data.loader import Loader
from pipeline.evaluation.config import Options
from pipeline.evaluation.metrics import (
    ClipNetwork,
    FeatureNetwork,
    clip_score,
    compare,
    nearest,
)
from pipeline.evaluation.reference import (
    DatasetPictures,
    FilePictures,
    Pictures,
    features_of,
    find_pictures,
    share,
)
from pipeline.evaluation.subjects import Subject, open_exported
from pipeline.inference.grid import grid
from pipeline.inference.heldout import LOG_SNR, x0_errors
from pipeline.inference.painter import Request, draw_files, largest_bucket
from pipeline.objectives.objective import Objective
from pipeline.runs.trained import Trained
from pipeline.training.board import Board

ROUNDS = 4  # draws of noise for each held-out sample and level


class Measurement(NamedTuple):
    """Figures by name, and all that they depend on."""

    figures: dict[str, float]
    measured_with: dict[str, Any]


def measure_heldout(
    trained: Trained, loader: Loader, options: Options, device: torch.device
) -> Measurement | None:
    """The x0 error of held-out samples at each level; None where the dataset holds nothing out. Collective."""
    batches = loader.heldout_batches(options.heldout)
    count = sum(len(batch.indices) for batch in batches)
    if not count:
        distributed.say("held-out error: left out, for the dataset holds nothing out")
        return None
    network, objective = trained.network(device), Objective(trained.config.objective)
    sums = torch.zeros(len(LOG_SNR), dtype=torch.float64)
    for batch in batches:
        for part in batch.rows(*share(len(batch.indices))).parts(options.batch_size):
            errors = x0_errors(network, objective, loader.manifest.codec, part.to(device), ROUNDS)
            sums += errors.double().sum(1).cpu()
    means = sum(distributed.gather_objects(sums), torch.zeros_like(sums)) / count
    figures = {
        f"x0_error_at_log_snr_{level:+d}": mean
        for level, mean in zip(LOG_SNR, means.tolist(), strict=True)
    }
    about = {"num_pictures": count, "noise": f"{ROUNDS} draws each"}
    about |= {"reference": "held-out latents", "sizes": len(batches)}
    return Measurement(figures, trained.facts | about)


def draw_missing(
    subject: Subject,
    folder: Path,
    prompts: list[str],
    sizes: list[tuple[int, int]],
    batch_size: int,
) -> FilePictures:
    """One picture per prompt under `folder`, those drawn before left as they are. Collective."""
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
    every = [
        Request(folder / f"{place:06d}.png", prompt, place, size, subject.sampler)
        for place, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]
    missing = [r for r in every if not r.path.is_file()] if distributed.is_main() else []
    missing = distributed.gather_objects(missing)[0]
    distributed.say(f"{len(every)} pictures in {folder}, {len(missing)} to draw")
    if missing:
        draw_files(missing, subject.make_draw(), subject.about, batch_size)
    distributed.barrier()
    return FilePictures(str(folder), [request.path for request in every])


def show(measurements: list[Measurement]) -> None:
    table = Table("figure", "value", "measured with", show_lines=True)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[2].overflow = "fold"
    for figures, measured_with in measurements:
        values = [f"{value:.5g}" for value in figures.values()]
        facts = [f"{k} {v}" for k, v in flatten(measured_with).items() if v is not None]
        table.add_row("\n".join(figures), "\n".join(values), "; ".join(facts))
    plain_console().print(table)


def record(path: Path, measurements: list[Measurement]) -> list[Measurement]:
    """Put them among those of a JSON file; returns the ones that were not measured so before."""
    saved = [Measurement(**m) for m in json.loads(path.read_text())] if path.is_file() else []
    known, again = ([m.measured_with for m in part] for part in (saved, measurements))
    every = [*(m for m in saved if m.measured_with not in again), *measurements]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([m._asdict() for m in every], indent=1) + "\n")
    return [m for m in measurements if m.measured_with not in known]


def write_tensorboard(run: Path, step: int, measurements: list[Measurement]) -> None:
    """Points at the checkpoint's step; what a figure was measured with is in its name."""
    board = Board(run / "tensorboard")
    for figures, given in measurements:
        name = f"{given['weights']}_{given['num_pictures']}_pictures"
        if sampler := given.get("sampler"):
            name += f"_{sampler['name']}_{sampler['num_steps']}_cfg_{sampler['guidance_scale']:g}"
            name += f"_from_{given['guide'].rpartition(':')[2]}" if "guide" in given else ""
        for figure, value in figures.items():
            board.add(scalar(f"evaluate/{figure}/{name}", value), step)
    with distributed.beside("TensorBoard"):
        board.flush()


def open_reference(
    subject: Subject,
    trained: Trained | None,
    loader: Loader | None,
    options: Options,
    device: torch.device,
) -> tuple[Pictures, list[str], list[tuple[int, int]]]:
    """The real pictures, and prompt and size of every picture to draw; raises InputError."""
    vae = trained.config.encoders.vae if trained else None
    size = parse_size(options.size) if options.size else None
    if size is None and loader is not None:
        size = largest_bucket(loader.manifest)
    prompts = read_prompts([], options.prompts_file) if options.prompts_file else []
    samples = loader and DatasetPictures(loader, options.split, options.num_reference, vae, device)
    reference = samples
    if options.reference is not None and options.dataset is None:
        paths = find_pictures(options.reference)[: options.num_reference]
        reference = FilePictures(str(options.reference), paths, size)
    if reference is None or (samples is None and not prompts) or size is None:
        raise InputError(
            "got too little to draw. Remedy: --reference with a prepared dataset, or with a folder of pictures "
            "beside --prompts-file and --size"
        )
    count, sizes = options.num_pictures, [size]
    if not prompts and samples is not None:
        prompts = samples.prompts(min(count, len(samples)), subject.num_classes > 0)
        if reference is samples and not options.size:
            sizes = samples.sizes()[: len(prompts)]
    every = [prompts[i % len(prompts)] for i in range(count)]
    return reference, every, [sizes[i % len(sizes)] for i in range(count)]


def find_copies(
    name: str, drawn: FilePictures, fake: Tensor, held: Tensor, train: Pictures, seen: Tensor
) -> dict[str, float]:
    """Share of drawn pictures nearer to one of training's than all but 1% of the held-out ones are: 0.01 by chance.

    The eight nearest pairs, in one size, lie beside the pictures, with their distance over the held-out ones' median.
    """
    near, places = nearest(fake, seen)
    usual = nearest(held, seen)[0]
    pairs, labels = list[Tensor](), list[str]()
    for place in near.argsort()[:8].tolist():
        theirs = int(places[place])
        pairs += [*drawn.read(place, place + 1), *train.read(theirs, theirs + 1)]
        labels += [f"{place}: {near[place] / usual.median():.2f}", f"training {theirs}"]
    pairs = [interpolate(p[None].float(), pairs[0].shape[1:]).to(torch.uint8) for p in pairs]
    grid(torch.cat(pairs), labels, 2).save(Path(drawn.name).with_name(f"copies_{name}.png"))
    return {f"copies_{name}": float((near < usual.quantile(0.01)).float().mean())}


def measure_pictures(
    subject: Subject,
    trained: Trained | None,
    loaders: tuple[Loader | None, Loader | None],
    options: Options,
    device: torch.device,
) -> tuple[str, list[Measurement]]:
    """What the pictures go by, and what each network asked for says of them; figures on rank 0. Collective.

    `loaders` are of the run's own dataset and of the reference.
    """
    own, loader = loaders
    if options.train_pictures and own is None:
        raise InputError("--train-pictures: the dataset that this was trained on is not here")
    networks = [FeatureNetwork.load(name, path, device) for name, path in options.networks.items()]
    clip = ClipNetwork(options.clip, device) if options.clip else None
    reference, prompts, sizes = open_reference(subject, trained, loader, options, device)
    drawn = subject.about | {"sampler": subject.sampler.model_dump(mode="json")}
    name = fingerprint(drawn | {"prompts": prompts, "sizes": sizes})[:8]
    folder, batch_size = options.results / f"{subject.name}_{name}", options.batch_size
    pictures = draw_missing(subject, folder / "pictures", prompts, sizes, batch_size)
    drawn |= {"num_pictures": len(pictures)}
    measurements = []
    for network in networks:
        cache = options.results / "features"
        fake = features_of(network, pictures, batch_size, device, cache)
        real = features_of(network, reference, batch_size, device, cache)
        values = compare(real, fake, device) if distributed.is_main() else {}
        figures = {f"{m}_{network.name}": value for m, value in values.items()}
        if network.name == "inception":
            fid = {m.replace("fd", "fid"): v for m, v in values.items() if m.startswith("fd")}
            figures = fid | {m: v for m, v in figures.items() if not m.startswith("fd")}
        about = {"reference": reference.name, "num_reference": len(real)}
        about |= {"network": network.name, "network_sha256": network.sha256}
        measurements.append(Measurement(figures, drawn | about))
        if options.train_pictures and trained is not None and own is not None:
            vae, limit = trained.config.encoders.vae, options.train_pictures
            train = DatasetPictures(own, "train", limit, vae, device)
            seen, figures = features_of(network, train, batch_size, device, cache), {}
            if distributed.is_main():
                figures = find_copies(network.name, pictures, fake, real, train, seen)
            about |= {"num_train": len(seen)}
            measurements.append(Measurement(figures, drawn | about))
    captions = prompts
    if subject.num_classes:
        captions = [parse_class(prompt, subject.num_classes)[1] for prompt in prompts]
    if clip is not None and not all(captions):
        distributed.say("CLIP score: left out, for the prompts are classes without text")
    elif clip is not None:
        begin, end = share(len(pictures))
        score = clip_score(clip, pictures.read(begin, end), captions[begin:end], batch_size)
        about = {"network": clip.name, "network_sha256": clip.sha256}
        measurements.append(Measurement({"clip_score": score}, drawn | about))
    return name, measurements


def evaluate(
    subject: Subject, trained: Trained | None, options: Options, device: torch.device
) -> tuple[str, list[Measurement]]:
    """The name of the results' folder, and all figures; `trained` of a run. Collective."""
    if trained is None and options.heldout:
        trained = open_exported(subject.path, options.dataset)
        if trained is None:
            distributed.say(
                "held-out error: left out, for the folder does not say how it was trained"
            )
    own = other = None
    if trained is not None:
        # No order is asked for, so what decides it must not fit the batch of 1.
        update = {"grow": False, "canonical_partitions": None}
        data = trained.config.data.model_copy(update=update)
        own = Loader(data, global_batch=1, seed=0)
        check_same(own.manifest, trained.manifest, "data.path")
    if options.dataset is not None:
        data = DataConfig.model_validate({"path": str(options.dataset)})
        other = Loader(data, global_batch=1, seed=0)
    found, name = list[Measurement | None](), subject.name
    # Pictures first: what they are measured by may turn out not to be there.
    if options.features or options.clip:
        pictures, found = measure_pictures(subject, trained, (own, other or own), options, device)
        name = f"{name}_{pictures}"
    if trained is not None and own is not None and options.heldout:
        found = [measure_heldout(trained, own, options, device), *found]
    for loader in filter(None, (own, other)):
        loader.close()
    return name, [measurement for measurement in found if measurement]
