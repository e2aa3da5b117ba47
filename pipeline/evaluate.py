"""What a trained model is worth: `python -m pipeline.evaluate RUN --features inception=FILE.pt`.

Held-out error by noise level; FID, KID, precision, recall, CLIP score of drawn pictures. Under torchrun the ranks
share the work; run again, it goes on where it stopped. No figure is given without what it was measured with.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from data_prep.schema import MANIFEST, fingerprint, read_manifest
from models.config import InputError, package_folder, parse_config, run_command
from models.files import write_text
from models.weights import brief
from pipeline import distributed
from pipeline.config import TrainConfig, load_run_config
from pipeline.data import DataConfig, Loader
from pipeline.heldout import LOG_SNR, x0_errors
from pipeline.metrics import ClipNetwork, FeatureNetwork, clip_score, compare
from pipeline.objective import Objective
from pipeline.pictures import Draw, Request, draw_files, drawer, largest_bucket
from pipeline.randomness import make_generator
from pipeline.reference import DatasetPictures, FolderPictures, features_of, share
from pipeline.sample import Trained, join, open_trained, parse_sampler, parse_size, read_prompts
from pipeline.sampling import SamplerConfig

ROUNDS = 4  # draws of noise for each held-out sample and level


@dataclass(frozen=True)
class Figure:
    """A number and what it was measured with; None where that has no part in it."""

    metric: str
    value: float
    num_pictures: int
    num_reference: int | None
    reference: str
    network: str
    network_sha256: str | None
    weights: str
    sampler: str | None
    num_steps: int | None
    guidance_scale: float | None
    spread: float | None = None  # standard deviation, of KID over its subsets

    def conditions(self) -> dict[str, Any]:
        return asdict(replace(self, value=0.0, spread=None))


def heldout_figures(
    trained: Trained, loader: Loader, size: int, batch_size: int, device: torch.device
) -> list[Figure]:
    """The x0 error of `size` held-out samples at each level. Collective."""
    batch = loader.heldout_batch(size)
    if batch is None:
        distributed.say("held-out error: left out, for the dataset holds nothing out")
        return []
    network, objective = trained.network(device), Objective(trained.config.objective)
    begin, end = share(len(batch.indices))
    sums = torch.zeros(len(LOG_SNR), dtype=torch.float64)
    for first in range(begin, end, batch_size):
        part = batch.rows(first, min(first + batch_size, end)).to(device)
        errors = x0_errors(network, objective, loader.manifest.codec, part, ROUNDS)
        sums += errors.double().sum(1).cpu()
    means = sum(distributed.gather_objects(sums), torch.zeros_like(sums)) / len(batch.indices)
    name, reference = trained.config.model.kind, f"held-out latents, {ROUNDS} draws of noise each"
    given = len(batch.indices), None, reference, name, None, trained.weights, None, None, None
    return [
        Figure(f"x0_error_at_log_snr_{level:+d}", float(mean), *given)
        for level, mean in zip(LOG_SNR, means, strict=True)
    ]


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a run's checkpoint or a diffusers pipeline, and how it draws."""

    path: Path
    name: str  # of its folder among the results
    about: dict[str, Any]
    weights: str
    sampler: SamplerConfig
    sampler_name: str
    make_draw: Callable[[], Draw]  # loads what drawing needs


def run_subject(trained: Trained, overrides: list[str], device: torch.device) -> Subject:
    sampler = parse_sampler(trained.config.sampler, overrides)

    def make_draw() -> Draw:
        objective = Objective(trained.config.objective)
        return drawer(trained.encoders(device), trained.network(device), objective)

    name = f"step_{trained.step:08d}_{trained.weights}"
    return Subject(
        trained.run, name, trained.facts, trained.weights, sampler, sampler.name, make_draw
    )


def pipeline_subject(
    folder: Path, overrides: list[str], trust_remote_code: bool, device: torch.device
) -> Subject:
    """A diffusers pipeline in a local folder; raises InputError where it would run code unasked."""
    index = json.loads((folder / "model_index.json").read_text())
    if isinstance(index.get("_class_name"), list) and not trust_remote_code:
        raise InputError(
            f"{folder}: has code of its own, {index['_class_name'][0]}.py. Remedy: read it, then "
            "--trust-remote-code"
        )
    known = ("num_steps", "guidance_scale", "seed")
    if bad := [o for o in overrides if o.removeprefix("sampler.").split("=")[0] not in known]:
        raise InputError(
            f"override {bad[0]!r}: of a pipeline only sampler.{', sampler.'.join(known)} can be set"
        )

    def make_draw() -> Draw:
        from diffusers import DiffusionPipeline

        try:
            pipeline: Any = DiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            ).to(device)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot load the pipeline: {brief(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        return lambda requests: draw_with(pipeline, requests)

    sampler, scheduler = parse_sampler(SamplerConfig(), overrides), str(index["scheduler"][1])
    about = {"pipeline": str(folder), "scheduler": scheduler}
    return Subject(folder, "pipeline", about, str(folder), sampler, scheduler, make_draw)


def draw_with(pipeline: Any, requests: list[Request]) -> torch.Tensor:
    """Requests of one size and sampler with a diffusers pipeline; seeds are functions of (seed, place)."""
    first = requests[0]
    draws = [make_generator(r.sampler.seed, "pipeline", r.place) for r in requests]
    pictures = pipeline(
        prompt=[request.prompt for request in requests],
        height=first.size[0],
        width=first.size[1],
        num_inference_steps=first.sampler.num_steps,
        guidance_scale=first.sampler.guidance_scale,
        generator=[torch.Generator().manual_seed(int(d.integers(2**63))) for d in draws],
        output_type="np",
    ).images
    return torch.from_numpy(pictures * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def draw_missing(
    subject: Subject,
    folder: Path,
    prompts: list[str],
    sizes: list[tuple[int, int]],
    batch_size: int,
) -> FolderPictures:
    """A picture a prompt under `folder`, those drawn before left as they are. Collective."""
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
    return FolderPictures(folder, None)


def show(figures: list[Figure], console: Console) -> None:
    table = Table("figure", "value", "measured with", show_lines=True)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for f in figures:
        network = f.network + (f" ({f.network_sha256[:8]})" if f.network_sha256 else "")
        against = f"{f.num_reference} of " if f.num_reference else ""
        parts = [f"{f.num_pictures} pictures, weights {f.weights}"]
        if f.sampler:
            parts.append(f"sampler {f.sampler}, {f.num_steps} steps, guidance {f.guidance_scale:g}")
        parts += [f"network {network}", f"against {against}{f.reference}"]
        spread = f" ± {f.spread:.2g}" if f.spread is not None else ""
        table.add_row(f.metric, f"{f.value:.5g}{spread}", "; ".join(parts))
    console.print(table)


def record(path: Path, about: dict[str, Any], figures: list[Figure]) -> list[Figure]:
    """Put the figures among those of figures.json; returns the ones that were not measured so before."""
    saved = json.loads(path.read_text())["figures"] if path.is_file() else []
    conditions = [figure.conditions() for figure in figures]
    others = [f for f in (Figure(**fields) for fields in saved) if f.conditions() not in conditions]
    known = [Figure(**fields).conditions() for fields in saved]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | {"figures": [asdict(f) for f in (*others, *figures)]}, indent=1)
    write_text(path, text + "\n")
    return [figure for figure in figures if figure.conditions() not in known]


def write_tensorboard(run: Path, step: int, figures: list[Figure]) -> None:
    """Points at the checkpoint's step; what a figure was measured with is in its name."""
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for f in figures:
            drawn = f"_{f.sampler}_{f.num_steps}_cfg_{f.guidance_scale:g}" if f.sampler else ""
            name = f"evaluate/{f.metric}/{f.weights}_{f.num_pictures}_pictures{drawn}"
            writer.add_scalar(name, f.value, step)


@dataclass(frozen=True)
class Options:
    """The command's, as given."""

    features: dict[str, Path]
    clip: Path | None
    num_pictures: int
    reference: Path | None
    split: str
    num_reference: int
    prompts_file: Path | None
    size: str | None
    heldout: int
    batch_size: int
    output: Path


def open_reference(
    options: Options, trained: Trained | None, loader: Loader | None, device: torch.device
) -> tuple[DatasetPictures | FolderPictures, list[str], list[tuple[int, int]]]:
    """The real pictures, and prompt and size of every picture to draw; raises InputError."""
    vae = trained.config.encoders.vae if trained else None
    size = parse_size(options.size) if options.size else None
    if size is None and loader is not None:
        size = largest_bucket(loader.manifest)
    prompts = read_prompts([], options.prompts_file) if options.prompts_file else []
    samples = None
    if loader is not None:
        samples = DatasetPictures(loader, options.split, options.num_reference, vae, device)
    reference = samples
    if options.reference is not None and not (options.reference / MANIFEST).is_file():
        reference = FolderPictures(options.reference, size, options.num_reference)
    if reference is None or (samples is None and not prompts) or size is None:
        raise InputError(
            "got too little to draw. Remedy: --reference with a prepared dataset, or with a folder of pictures "
            "beside --prompts-file and --size"
        )
    count, sizes = options.num_pictures, [size]
    if not prompts and samples is not None:
        prompts = samples.prompts(min(count, len(samples)))
        if reference is samples and not options.size:
            sizes = samples.sizes()[: len(prompts)]
    every = [prompts[i % len(prompts)] for i in range(count)]
    return reference, every, [sizes[i % len(sizes)] for i in range(count)]


def picture_figures(
    options: Options,
    reference: DatasetPictures | FolderPictures,
    pictures: FolderPictures,
    prompts: list[str],
    subject: Subject,
    device: torch.device,
) -> list[Figure]:
    """Every network's figures. Collective; those between two sets of features on rank 0 alone."""
    figures, sampler = [], subject.sampler
    drawn = subject.weights, subject.sampler_name, sampler.num_steps, sampler.guidance_scale
    count, cache, batch_size = len(pictures), options.output / "features", options.batch_size
    for name, path in options.features.items():
        network = FeatureNetwork.load(name, path, device)
        fake = features_of(network, pictures, batch_size, device, cache)
        real = features_of(network, reference, batch_size, device, cache)
        about = count, len(real), reference.name, name, network.sha256, *drawn
        if distributed.is_main():
            values = compare(real, fake, device)
            spread = values.pop("kid_std")
            for metric, value in values.items():
                label = "fid" if (metric, name) == ("fd", "inception") else f"{metric}_{name}"
                figures.append(
                    Figure(label, value, *about, spread=spread if metric == "kid" else None)
                )
    if options.clip is not None:
        clip = ClipNetwork(options.clip, device)
        begin, end = share(count)
        score = clip_score(clip, pictures.read(begin, end), prompts[begin:end], batch_size, device)
        about = count, None, "their prompts", options.clip.name, clip.sha256, *drawn
        figures.append(Figure("clip_score", score, *about))
    return figures


def open_exported(folder: Path, data: Path | None) -> Trained | None:
    """The network and config in the single file of an exported folder, on `data` or the dataset it was trained
    on; None where there is no such file or no such dataset here.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if "flowmill.config" not in about:
            continue
        config = parse_config(TrainConfig, json.loads(about["flowmill.config"]), str(path))
        data = data or Path(next(iter(config.data.sources.values())).path)
        if not (data / MANIFEST).is_file():
            return None
        manifest, codec = read_manifest(data), json.loads(about["flowmill.data"])["codec"]
        if manifest.codec.weights_sha256 != codec["weights_sha256"]:
            raise InputError(
                f"{data}: its latents are of VAE {manifest.codec.weights_sha256[:12]}, the network's of "
                f"{codec['weights_sha256'][:12]}. Remedy: --heldout 0, or a dataset of that VAE"
            )
        config = config.model_copy(update={"data": DataConfig.model_validate({"path": str(data)})})
        state = {name: weight.float() for name, weight in load_file(path).items()}
        return Trained(folder, config, manifest, str(folder), state, 0)
    return None


def evaluate(
    subject: Subject, trained: Trained | None, options: Options, device: torch.device
) -> tuple[str, list[Figure]]:
    """The name of the results' folder, and all figures; `trained` of a run. Collective."""
    own = other = None
    is_dataset = options.reference is not None and (options.reference / MANIFEST).is_file()
    if trained is None and options.heldout:
        trained = open_exported(subject.path, options.reference if is_dataset else None)
        if trained is None:
            distributed.say(
                "held-out error: left out, for the folder does not say how it was trained"
            )
    if trained is not None:
        data = trained.config.data.model_copy(update={"grow": False})
        own = Loader(data, global_batch=1, seed=0)
    if is_dataset:
        data = DataConfig.model_validate({"path": str(options.reference)})
        other = Loader(data, global_batch=1, seed=0)
    figures, name = [], subject.name
    if trained is not None and own is not None and options.heldout:
        figures += heldout_figures(trained, own, options.heldout, options.batch_size, device)
    if options.features or options.clip:
        reference, prompts, sizes = open_reference(options, trained, other or own, device)
        drawn = subject.about | subject.sampler.model_dump(mode="json")
        name += "_" + fingerprint(drawn | {"prompts": prompts, "sizes": sizes})[:8]
        folder = options.output / name / "pictures"
        pictures = draw_missing(subject, folder, prompts, sizes, options.batch_size)
        figures += picture_figures(options, reference, pictures, prompts, subject, device)
    for loader in filter(None, (own, other)):
        loader.close()
    return name, figures


def main(
    target: Annotated[Path, typer.Argument(help="a run's folder, or a diffusers pipeline's")],
    overrides: Annotated[list[str] | None, typer.Argument(help="sampler.key=value")] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a TorchScript file or a transformers folder; repeated"),
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP's folder, for CLIP score")] = None,
    num_pictures: Annotated[int, typer.Option(min=2, help="to draw")] = 1000,
    reference: Annotated[
        Path | None, typer.Option(help="prepared dataset or folder of pictures; the run's dataset")
    ] = None,
    split: Annotated[Literal["heldout", "train"], typer.Option(help="of a dataset")] = "heldout",
    num_reference: Annotated[int, typer.Option(min=2, help="at most")] = 50_000,
    prompts_file: Annotated[
        Path | None, typer.Option(help="one a line; else the reference's captions")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; else the reference's")] = None,
    heldout: Annotated[int, typer.Option(min=0, help="samples for the held-out error")] = 256,
    weights: Annotated[str, typer.Option(help="raw, ema, or another average")] = "ema",
    step: Annotated[int | None, typer.Option(help="of the checkpoint; the newest")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    output: Annotated[Path | None, typer.Option(help="folder; TARGET/evaluations")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run a pipeline folder's own code")
    ] = False,
) -> None:
    """Measure a run's checkpoint or a pipeline. Without --features and --clip only the held-out error."""
    options = Options(
        parse_features(features or []),
        clip,
        num_pictures,
        reference,
        split,
        num_reference,
        prompts_file,
        size,
        heldout,
        batch_size,
        output or target / "evaluations",
    )
    if features or clip:
        package_folder("torchmetrics")
    is_pipeline = (target / "model_index.json").is_file()
    device = join(1800 if is_pipeline else load_run_config(target).engine.timeout_s)
    trained = None if is_pipeline else open_trained(target, weights, step)
    if trained is None:
        subject = pipeline_subject(target, overrides or [], trust_remote_code, device)
    else:
        subject = run_subject(trained, overrides or [], device)
    name, figures = evaluate(subject, trained, options, device)
    if not figures:
        raise InputError(f"{target}: nothing to measure. Remedy: --features, --clip or --heldout")
    if distributed.is_main():
        report(target, subject, trained, options.output / name / "figures.json", figures)
    distributed.stop()


def report(
    target: Path, subject: Subject, trained: Trained | None, path: Path, figures: list[Figure]
) -> None:
    about = subject.about | {"sampler": subject.sampler.model_dump(mode="json")}
    new = record(path, about, figures)
    if trained is not None:
        write_tensorboard(target, trained.step, new)
    show(figures, Console())
    distributed.say(f"wrote {path}")


def parse_features(given: list[str]) -> dict[str, Path]:
    pairs = [item.partition("=") for item in given]
    if bad := [item for item in pairs if not item[0] or not item[2]]:
        raise InputError(f"--features: got {''.join(bad[0])!r}, expected NAME=PATH")
    return {name: Path(path) for name, _, path in pairs}


if __name__ == "__main__":
    run_command(main)
