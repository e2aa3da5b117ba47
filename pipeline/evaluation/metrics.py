"""Distances between sets of pictures in the features of frozen networks, and CLIP score.

torchmetrics computes FID and KID; features come from networks in local files. Their values depend
on the number of pictures, the network's very weights and how pictures are resized, so all of that is reported.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from data_prep.schema import fingerprint
from models.config import InputError
from models.files import file_sha256
from models.weights import (
    brief,
    load_network,
    load_processor,
    read_model_config,
    weights_sha256,
)
from pipeline import distributed

KID_SUBSET = 1000  # pictures; torchmetrics' own, of 100 subsets
NEIGHBOURS = 3  # k of precision and recall
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of the paper (2401.09603) and its authors' code


Network = Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]


def torchscript(path: Path, device: torch.device) -> Network:
    """A TorchScript file that takes uint8 pictures and resizes them itself.

    Such is NVIDIA's inception-2015-12-05.pt, which returns features when asked so.
    """
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise InputError(f"{path}: not a TorchScript file: {brief(error)}") from error
    names = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in names else {}
    return lambda images: network(images, **options).flatten(1)


def transformer(path: Path, device: torch.device) -> Network:
    """A transformers vision model in a folder, safetensors: CLIP's image embedding, of others the pooled output."""
    read_model_config(path, "a transformers vision model")
    processor = load_processor("AutoImageProcessor", path)
    # The pooled output is what is measured: a pooler without weights of its own would be noise.
    model = load_network("transformers", "AutoModel", path, unused=()).to(device)
    of_images = getattr(model.eval(), "get_image_features", model)

    @torch.inference_mode()
    def pooled(images: Tensor) -> Tensor:
        pixels = processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        output = of_images(pixel_values=pixels.to(device))
        if (found := getattr(output, "pooler_output", None)) is None:
            raise InputError(
                f"{path}: {type(model).__name__} pools nothing, expected a network of one vector per picture. "
                "Remedy: another network, or a TorchScript file that pools"
            )
        return found.flatten(1)

    pooled(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    return pooled


def folder_sha256(path: Path) -> str:
    """Hash of a network's weights and of the settings beside them, which say how pictures and texts are fed to it."""
    settings = {file.name: file_sha256(file) for file in path.glob("*.json")}
    return fingerprint({"weights": weights_sha256(path), **settings})


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network under the name that its figures go by; "inception" makes FID of the distance."""

    name: str
    module: Network
    sha256: str

    @classmethod
    def load(cls, name: str, path: Path, device: torch.device) -> "FeatureNetwork":
        """A TorchScript file or a transformers folder; raises InputError."""
        if path.is_dir():
            return cls(name, transformer(path, device), folder_sha256(path))
        return cls(name, torchscript(path, device), file_sha256(path))

    @torch.inference_mode()
    def features(
        self, pictures: Iterable[UInt8[Tensor, "3 H W"]], batch_size: int, device: torch.device
    ) -> Float[Tensor, "n D"]:
        """fp32, in order; neighbours of one size go through together."""
        parts = list[Tensor]()
        for _, alike in itertools.groupby(pictures, key=lambda picture: picture.shape):
            while batch := list(itertools.islice(alike, batch_size)):
                parts.append(self.module(torch.stack(batch).to(device)).float().cpu())
        if len(lengths := {part.shape[1] for part in parts}) > 1:
            raise InputError(
                f"--features {self.name}: pictures of several sizes gave {sorted(lengths)} features. Remedy: a "
                "network that resizes them"
            )
        return torch.cat(parts) if parts else torch.zeros(0, 0)


def compare(
    real: Float[Tensor, "n D"], fake: Float[Tensor, "m D"], device: torch.device
) -> dict[str, float]:
    """`distances`, each with its mean over the two halves of both sets, which shows how it hangs on their number.

    Bias of FD and CMMD falls as 1 / number: `extrapolated` is where the two values point (1911.07023).
    """
    whole, found = distances(real, fake, device), dict[str, float]()
    if min(len(real), len(fake)) < 4:
        return whole
    halves = [distances(real[i::2], fake[i::2], device) for i in range(2)]
    for name, value in whole.items():
        half = sum(part[name] for part in halves) / 2
        found |= {name: value, f"{name}_at_half": half}
        if name in ("fd", "cmmd"):
            found[f"{name}_extrapolated"] = 2 * value - half
    return found


def squared_mmd(x: Float[Tensor, "n D"], y: Float[Tensor, "m D"], sigma: float) -> float:
    """Squared MMD with the kernel exp(-|a - b|^2 / 2 sigma^2) over all pairs (Gretton 2012, eq. 5)."""

    def mean(a: Tensor, b: Tensor) -> float:
        parts = [torch.cdist(part, b).square() / (-2 * sigma**2) for part in a.split(1000)]
        return sum(float(part.exp().sum()) for part in parts) / (len(a) * len(b))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def nearest(points: Float[Tensor, "n D"], others: Float[Tensor, "m D"]) -> tuple[Tensor, Tensor]:
    """Distance of each point to the nearest of the others, and which that is."""
    found = [torch.cdist(part, others).min(1) for part in points.split(1000)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def distances(
    real: Float[Tensor, "n D"], fake: Float[Tensor, "m D"], device: torch.device
) -> dict[str, float]:
    """Frechet distance (1706.08500), KID (1801.01401) with its deviation, CMMD (2401.09603), precision and recall.

    CMMD is defined on CLIP's embeddings, of length 1; other networks' features are brought to that length.
    torchmetrics draws KID's subsets; the seed is fixed, so a figure comes out again.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # optional
    from torchmetrics.image.kid import KernelInceptionDistance

    # Features are given to torchmetrics as they are.
    given: Any = nn.Identity()
    given.num_features = real.shape[1]
    frechet = FrechetInceptionDistance(given, sync_on_compute=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features
        size = min(KID_SUBSET, len(real), len(fake))
        kernel = KernelInceptionDistance(given, subset_size=size, sync_on_compute=False)
    for metric in (frechet, kernel):
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = kernel.compute()
    real, fake = real.double().to(device), fake.double().to(device)
    precision, recall = precision_recall(real, fake)
    unit = nn.functional.normalize(real), nn.functional.normalize(fake)
    return {
        "fd": float(frechet.compute()),
        "kid": float(mean),
        "kid_std": float(std),
        "cmmd": CMMD_SCALE * squared_mmd(*unit, CMMD_SIGMA),
        "precision": precision,
        "recall": recall,
    }


def precision_recall(real: Float[Tensor, "n D"], fake: Float[Tensor, "m D"]) -> tuple[float, float]:
    """Share of fake within the real manifold, and of real within the fake (Kynkaanniemi 1904.06991, eq. 1).

    A manifold is the union of balls around its points that reach their k-th neighbours.
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        near = min(NEIGHBOURS, len(manifold) - 1)
        radii = torch.cat(
            [torch.cdist(p, manifold).kthvalue(near + 1).values for p in manifold.split(1000)]
        )
        covered = [(torch.cdist(p, manifold) <= radii).any(1) for p in points.split(1000)]
        return float(torch.cat(covered).float().mean())

    return inside(fake, real), inside(real, fake)


class ClipNetwork:
    """A CLIP model in a folder, safetensors, with what prepares its pictures and captions."""

    def __init__(self, path: Path, device: torch.device):
        kind = read_model_config(path, "a CLIP model").get("model_type")
        if kind != "clip":
            raise InputError(f"--clip {path}: model_type got {kind!r}, expected clip")
        self.images = load_processor("AutoImageProcessor", path)
        self.tokenizer = load_processor("AutoTokenizer", path)
        model = load_network("transformers", "CLIPModel", path, unused=())
        self.model, self.device = model.eval().requires_grad_(False).to(device), device
        self.name, self.sha256 = path.name, folder_sha256(path)

    @torch.inference_mode()
    def cosines(
        self, pictures: Sequence[UInt8[Tensor, "3 H W"]], captions: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """Between each picture and its caption; longer captions are cut, their end token kept."""
        length = self.model.config.text_config.max_position_embeddings
        cut: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length}
        texts = self.tokenizer(list(captions), return_tensors="pt", **cut)
        pixels = self.images(images=list(pictures), return_tensors="pt")
        output = self.model(**(texts | pixels).to(self.device))
        return (output.image_embeds * output.text_embeds).sum(1)  # of length 1 as they come


def clip_score(
    clip: ClipNetwork,
    pictures: Iterable[UInt8[Tensor, "3 H W"]],
    captions: list[str],
    batch_size: int,
) -> float:
    """100 cos between picture and caption, at least 0, averaged (2104.08718) over all ranks' pictures. Collective."""
    total, paired = 0.0, zip(pictures, captions, strict=True)
    while batch := list(itertools.islice(paired, batch_size)):
        total += float(clip.cosines(*zip(*batch, strict=True)).double().sum())
    sums = distributed.gather_objects((total, len(captions)))
    return max(0.0, 100 * sum(t for t, _ in sums) / sum(n for _, n in sums))
