"""What an evaluation measures and against what: the options of `flowmill evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.schema import MANIFEST
from models.config import InputError
from pipeline.arguments import (
    BatchSize,
    Guide,
    SamplerOverrides,
    Step,
    Weights,
    parse_size,
    read_prompts,
)


@dataclass(frozen=True)
class Options:
    """What is measured, and against what."""

    target: Annotated[Path, typer.Argument(help="a run's folder, or a diffusers pipeline's")]
    overrides: SamplerOverrides = None
    features: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH of a TorchScript file or a transformers folder; repeated"),
    ] = None
    clip: Annotated[Path | None, typer.Option(help="CLIP's folder, for CLIP score")] = None
    num_pictures: Annotated[int, typer.Option(min=2, help="to draw")] = 1000
    reference: Annotated[
        Path | None, typer.Option(help="prepared dataset or folder of pictures; the run's dataset")
    ] = None
    split: Annotated[Literal["heldout", "train"], typer.Option(help="of a dataset")] = "heldout"
    num_reference: Annotated[int, typer.Option(min=2, help="at most")] = 50_000
    train_pictures: Annotated[
        int, typer.Option(min=0, help="of the run's, among which to look for copies")
    ] = 0
    prompts_file: Annotated[
        Path | None, typer.Option(help="one per line; else the reference's captions")
    ] = None
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; else the reference's")] = None
    heldout: Annotated[int, typer.Option(min=0, help="samples for the held-out error")] = 256
    weights: Weights = "ema"
    step: Step = None
    guide: Guide = None
    batch_size: BatchSize = 32
    output: Annotated[Path | None, typer.Option(help="folder; TARGET/evaluations")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run a pipeline folder's own code")
    ] = False

    @property
    def results(self) -> Path:
        return self.output or self.target / "evaluations"

    @property
    def dataset(self) -> Path | None:
        """The reference, if it is a prepared dataset."""
        is_one = self.reference is not None and (self.reference / MANIFEST).is_file()
        return self.reference if is_one else None

    @property
    def networks(self) -> dict[str, Path]:
        """Path by name of `features`; raises InputError."""
        pairs = [item.partition("=") for item in self.features or []]
        if bad := [item for item in pairs if not item[0] or not item[2]]:
            raise InputError(f"--features: got {''.join(bad[0])!r}, expected NAME=PATH")
        return {name: Path(path) for name, _, path in pairs}

    def check(self) -> None:
        """Raise InputError where something named is not there: before anything is loaded or drawn."""
        named = {f"--features {name}": path for name, path in self.networks.items()}
        named |= {"--clip": self.clip, "--reference": self.reference}
        for option, path in named.items():
            if path is not None and not path.exists():
                raise InputError(
                    f"{option}: {path}: no such file or folder; nothing is fetched by name"
                )
        if self.train_pictures and (not self.networks or self.split == "train"):
            raise InputError("--train-pictures: needs --features, and --split heldout to judge by")
        draws = (self.networks or self.clip) and not (self.target / "model_index.json").is_file()
        if self.guide and not draws:
            raise InputError("--guide: leads a run's pictures alone. Remedy: --features or --clip")
        if self.prompts_file is not None:
            read_prompts([], self.prompts_file)
        if self.size is not None:
            parse_size(self.size)
