"""Configs of objectives and samplers, with those of weightings and losses; reading them imports no torch."""

from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from models.config import Config
from pipeline.objectives.paths import ByKind, Path, RectifiedFlow
from pipeline.objectives.timesteps import LogitNormal, LogNormal, Shift, Timesteps, Uniform

if TYPE_CHECKING:
    from torch import Tensor

PRESETS = FilePath(__file__).parents[2] / "configs" / "objectives.yaml"
MIN_TERMINAL_SNR = 1e-6
"""Below it, dividing by alpha_t multiplies an error of epsilon by over 1000."""


class Unweighted(Config):
    """Weight 1 on the loss of the prediction itself."""

    kind: Literal["none"] = "none"


class MinSNR(Config):
    """min(SNR, gamma) on the x0 loss (Hang 2303.09556); `terminal_weight` where SNR is 0."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: "Tensor", sigma: "Tensor") -> "Tensor":
        return (alpha**2).minimum(self.gamma * sigma**2)


class SoftMinSNR(Config):
    """SNR gamma / (SNR + gamma) on the x0 loss (Crowson 2401.11605); `terminal_weight` where SNR is 0."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: PositiveFloat = 5.0
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: "Tensor", sigma: "Tensor") -> "Tensor":
        return self.gamma * alpha**2 * sigma**2 / (alpha**2 + self.gamma * sigma**2)


class Debiased(Config):
    """sqrt(SNR) on the x0 loss (Yu 2310.08442); `terminal_weight` where SNR is 0."""

    kind: Literal["debiased"] = "debiased"
    terminal_weight: NonNegativeFloat = 1.0

    def numerator(self, alpha: "Tensor", sigma: "Tensor") -> "Tensor":
        return alpha * sigma


class Velocity(Config):
    """1 / max(t, t_min)^2 on the x0 loss, t = sigma/(alpha + sigma): the loss of flow, as JiT (2511.13720) trains `sample`."""

    kind: Literal["velocity"] = "velocity"
    t_min: float = Field(default=0.05, gt=0, lt=1)
    terminal_weight: ClassVar[float] = 1.0

    def numerator(self, alpha: "Tensor", sigma: "Tensor") -> "Tensor":
        return (alpha + sigma).minimum(sigma / self.t_min) ** 2


class MSE(Config):
    kind: Literal["mse"] = "mse"


class PseudoHuber(Config):
    """2c (sqrt(e^2 + c^2) - c) per element: about e^2 where e is small against `c`, 2c|e| where it is large."""

    kind: Literal["pseudo_huber"] = "pseudo_huber"
    c: PositiveFloat = 0.1


Weighting = ByKind[Unweighted | MinSNR | SoftMinSNR | Debiased | Velocity]
Loss = ByKind[MSE | PseudoHuber]
Share = Annotated[float, Field(ge=0, lt=1)]


class Task(Config):
    """What a network's output means at each t, on which its weights depend."""

    path: Path = RectifiedFlow()
    prediction: Literal["epsilon", "v", "sample", "flow", "edm"] = "flow"
    """The "cosine velocity" of SiT and REPA is pi/2 times `v` on vp_cosine, not `flow`."""

    @property
    def task(self) -> str:
        """It all in words."""
        options = ", ".join(f"{name} {value}" for name, value in self.path if name != "kind")
        what = f"prediction {self.prediction} on path {self.path.kind}"
        return f"{what} ({options})" if options else what

    @model_validator(mode="after")
    def _can_learn(self) -> "Task":
        if reasons := list(self._refusals()):
            raise ValueError("; ".join(reasons))
        return self

    def _refusals(self) -> Iterator[str]:
        """The reasons why this combination is meaningless or cannot be learned."""
        (_, alpha), _ = self.path.ends()
        if self.prediction == "epsilon" and alpha == 0:
            yield (
                "prediction epsilon on a path that ends at SNR 0: there x_t is the noise itself, so "
                "predicting it teaches nothing, and a sampler divides by alpha = 0. Remedy: v, flow or sample"
            )
        if self.prediction == "edm" and self.path.sigma_range is None:
            yield f"prediction edm needs sigma_data, which path {self.path.kind} has not. Remedy: path edm"


class ObjectiveConfig(Task):
    """What the network learns. The default is SD3's; `preset: NAME` starts from configs/objectives.yaml."""

    network: Task | None = None
    """What the network computes where that is another task, as its weights learned it: it is called in those terms and
    answers in these. `start_from.convert` fills it in."""
    timesteps: Timesteps = LogitNormal()
    shift: Shift | None = None
    uniform_fraction: Share = 0.0
    """Share of the samples that draw t uniformly instead."""
    weighting: Weighting = Unweighted()
    loss: Loss = MSE()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Plain data in place of `preset: NAME` and the keys beside it, which override the preset's."""
        if not isinstance(data, dict) or "preset" not in data:
            return data
        import yaml

        presets, overrides = yaml.safe_load(PRESETS.read_text()), dict(data)
        if (name := overrides.pop("preset")) not in presets:
            raise ValueError(f"preset {name!r}: no such name; valid: {', '.join(presets)}")
        merged: dict[str, Any] = dict(presets[name])
        for key, value in overrides.items():
            base = merged.get(key)
            if isinstance(value, dict) and base and value.get("kind") in (None, base["kind"]):
                value = {**base, **value}
            merged[key] = value
        return merged

    @property
    def own(self) -> Task:
        """What the network computes."""
        return self.network or Task(path=self.path, prediction=self.prediction)

    def notes(self) -> list[str]:
        """What to know of a combination that can be learned."""
        (_, alpha), (_, sigma) = self.path.ends()
        snr = (alpha / sigma) ** 2
        if self.prediction != "epsilon" or snr >= MIN_TERMINAL_SNR:
            return []
        return [
            f"prediction epsilon on a path that ends at SNR {snr:.1g}, as iDDPM's: a sampler divides "
            f"its error there by alpha = {alpha:.1g}; v, flow or sample have no such end"
        ]

    def _refusals(self) -> Iterator[str]:
        yield from super()._refusals()
        path, timesteps, weighting = self.path, self.timesteps, self.weighting
        (_, alpha), (clean_sigma, _) = path.ends()
        if self.network == Task(path=path, prediction=self.prediction):
            yield "network has no effect: it is the objective's own. Remedy: remove it"
        if isinstance(timesteps, LogNormal) and path.sigma_range is None:
            yield (
                f"timesteps log_normal draw sigma, and path {path.kind} is not made of sigma. Remedy: path "
                "edm, or logit_normal (on rectified_flow a log-normal sigma/alpha)"
            )
        if self.shift is not None and not path.shiftable:
            yield (
                f"shift has no meaning on path {path.kind}, whose noise levels are fixed by its own options and, on "
                "edm, drawn by timesteps.mean. Remedy: remove it"
            )
        if self.uniform_fraction > 0 and isinstance(timesteps, Uniform) and self.shift is None:
            yield "uniform_fraction has no effect: every t is uniform already. Remedy: remove it"
        if getattr(weighting, "terminal_weight", 1.0) != 1.0 and not (path.discrete and alpha == 0):
            yield (
                f"weighting.terminal_weight has no effect: no t drawn on path {path.kind} as configured has "
                "SNR 0. Remedy: remove it, or path vp_discrete with zero_terminal_snr"
            )
        if isinstance(weighting, Debiased) and self.prediction == "sample" and clean_sigma == 0:
            yield (
                f"weighting debiased on prediction sample is alpha/sigma, infinite at t = 0 of path {path.kind}. "
                "Remedy: min_snr, or another prediction"
            )


Fraction = Annotated[float, Field(ge=0, le=1)]


class SamplerConfig(Config):
    """How pictures are drawn from a trained network."""

    name: Literal["ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "heun"] = "euler"
    """ddim takes the steps of euler; euler_ancestral adds fresh noise from `seed`; heun calls the network twice per step."""
    num_steps: Annotated[int, Field(ge=1, le=1000)] = 30
    shift: Shift | None = None
    """Shift of the sampler's times; null takes the objective's."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """1 for no guidance."""
    guidance_rescale: Fraction = 0.0
    """phi of Lin 2305.08891, sec. 3.4."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """The t that are guided, from and to (Kynkaanniemi 2404.07724)."""
    seed: int = 0

    @model_validator(mode="after")
    def _has_effect(self) -> "SamplerConfig":
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval {low}, {high}: expected low below high")
        if self.guidance_scale == 1 and (self.guidance_rescale > 0 or (low, high) != (0, 1)):
            raise ValueError(
                "guidance_rescale and guidance_interval have no effect at guidance_scale 1. "
                "Remedy: remove them, or another scale"
            )
        return self
