"""A trained model as others read it: a diffusers pipeline folder with one file of weights and a model card.

    FOLDER/
      model_index.json         stock DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True) opens it
      flowmill_pipeline.py     the pipeline: no stock one masks padded text as training did
      network/ vae/ scheduler/ text_encoder/ tokenizer/ (text_encoder_2/ ...)
      NAME.safetensors         the network alone under flowmill's own names, with modelspec metadata
      README.md                the model card, with curves.png and samples.png

The network is of diffusers' own class where one computes the same, else of flowmill's source beside it.
"""

import ast
import datetime
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from models.config import InputError
from models.exchange import layout_of, to_diffusers
from models.files import naming, publish
from models.networks import MODELS, build_model
from models.weights import HIDDEN_CLASS, TORCH_DTYPES, Dtype
from pipeline.inference.model_card import model_card, without_places
from pipeline.inference.painter import largest_bucket
from pipeline.objectives.config import Task
from pipeline.objectives.paths import EDM, NUM_TIMESTEPS, SCHEDULES, RectifiedFlow, VPDiscrete
from pipeline.objectives.timesteps import FluxShift, Shift
from pipeline.runs.trained import Trained, tensors_sha256

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"  # diffusers' name
# In front of exported source: what ours takes from packages that diffusers does not bring.
PRELUDE = '''"""A part of an exported flowmill model, flowmill's own source in one file: torch and diffusers suffice."""


class InputError(ValueError):
    pass


class Config:
    """Fields as a saved config gives them, else the class's; a section is of the class of its kind, if it has one."""

    kinds = {}

    def __init_subclass__(cls):
        Config.kinds[vars(cls).get("kind")] = cls

    def __init__(self, **values):
        Config.kinds[None] = Config
        for name, value in values.items():
            if isinstance(value, dict):
                value = Config.kinds[value.get("kind")](**value)
            setattr(self, name, value)


Field = lambda default=None, **_: default
model_validator = lambda **_: lambda method: method
BeforeValidator = lambda _: None
# Of shapes and ranges nothing is asked here.
Bool = Float = Int = Int8 = list
Place = str
PositiveFloat = NonNegativeFloat = float
PositiveInt = int'''
NETWORK = '''

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class FlowmillNetwork(ModelMixin, ConfigMixin):
    """`{model}` under diffusers' loading and saving."""

    @register_to_config
    def __init__(self, model: dict):
        super().__init__()
        self.network = {model}({config}(**model))

    def forward(self, x_t, t, **conditions):
        """The prediction for x_t (B, C, h, w) at t (B,) in [0, 1], fp32."""
        return self.network(x_t, t, Conditions(**conditions))
'''


def network_source(kind: str) -> str:
    """One Python file with an architecture, under diffusers' loading and saving."""
    config, module, model = MODELS[kind]
    return whole_source(module) + NETWORK.format(model=model, config=config.__name__)


def whole_source(module: str) -> str:
    """One Python file with a module and all of ours that it imports, as written."""
    parts = {"models.config": PRELUDE}

    def visit(name: str) -> None:
        text = Path(importlib.import_module(name).__file__ or "").read_text()
        lines, tree = text.splitlines(), ast.parse(text)
        imports: list[Any] = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in imports if str(node.module).startswith(("models.", "pipeline."))]
        for node in ours:
            if node.module not in parts:
                visit(node.module)
        given = [node for node in imports if node.module in ("jaxtyping", "pydantic")]
        docstring = tree.body[0]
        for node in {*ours, *given, docstring} & {*tree.body}:
            for number in range(node.lineno - 1, node.end_lineno or 0):
                lines[number] = ""
        parts[name] = "\n".join(lines).strip()

    visit(module)
    return "\n\n\n".join(parts.values()) + "\n"


def stock_class(trained: Trained) -> str | None:
    """diffusers' class that computes what the network does at every size of the data, if there is one."""
    square = all(bucket.height == bucket.width for bucket in trained.manifest.buckets)
    try:
        layout = layout_of(trained.config.model)
    except InputError:
        return None
    # Of other latents diffusers' DiT returns a wrong shape, silently.
    return layout if square or layout != "DiTTransformer2DModel" else None


def save_network(
    trained: Trained, folder: Path, dtype: torch.dtype, max_shard: str = "5GB"
) -> list[str]:
    """Write network/ and return its entry in model_index.json: library or file, and class."""
    config = trained.config.model
    model = build_model(config)
    model.load_state_dict(trained.state)
    model.to(dtype)
    layout = stock_class(trained)
    if layout is not None:
        side = max(largest_bucket(trained.manifest)) // trained.manifest.codec.downscale
        network = to_diffusers(model, sample_size=side)
        network.save_config(folder)
        weights: dict[str, Tensor] = network.state_dict()
    else:
        folder.mkdir()
        said = config.model_dump(mode="json") | {"gradient_checkpointing": False, "init_from": None}
        saved = {"_class_name": "FlowmillNetwork", "_diffusers_version": diffusers.__version__}
        saved |= {"model": said}
        (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
        (folder / f"flowmill_{config.kind}.py").write_text(network_source(config.kind))
        weights = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt"}
    save_torch_state_dict(
        weights, folder, filename_pattern=WEIGHTS, max_shard_size=max_shard, metadata=metadata
    )
    return ["diffusers", layout] if layout else [f"flowmill_{config.kind}", "FlowmillNetwork"]


def save_single(trained: Trained, path: Path, dtype: torch.dtype) -> None:
    """All weights in one file under our names; modelspec (Stability AI, 1.0.0), the config and the data in it."""
    weights = {k: v.to(dtype).contiguous() for k, v in sorted(trained.state.items())}
    height, width = largest_bucket(trained.manifest)
    data = trained.manifest.model_dump(
        mode="json", include={"codec", "text", "counts", "fingerprint"}
    )
    config, data = trained.config, without_places(data)
    save_file(
        weights,
        path,
        metadata={
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"flowmill-{config.model.kind}-{config.model.size}",
            "modelspec.implementation": "flowmill",
            "modelspec.title": path.stem,
            "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.prediction_type": config.objective.own.prediction,
            # All are of one dtype, so the order in the file is that of the names.
            "modelspec.hash_sha256": f"0x{tensors_sha256(weights)}",
            "flowmill.config": json.dumps(without_places(config.model_dump(mode="json"))),
            "flowmill.data": json.dumps(data),
            "flowmill.weights": f"{trained.weights} at step {trained.step}",
        },
    )


def make_scheduler(task: Task, shift: Shift | None, size: tuple[int, ...]) -> Any:
    """diffusers' scheduler of the noise levels of what the network computes, for tools that read no recipe.

    A shift that depends on the picture is that at the latents' `size` (C, h, w), unless diffusers has it too.
    """
    path = task.path
    # What the schedulers of tables have no name for is given to none of them right.
    names = {"epsilon": "epsilon", "v": "v_prediction"}
    table: dict[str, Any] = {
        "prediction_type": names.get(task.prediction, "sample"),
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    if isinstance(path, VPDiscrete):
        schedule, start, end = SCHEDULES[path.betas]
        table |= {"beta_schedule": schedule, "beta_start": start, "beta_end": end}
        return diffusers.DDIMScheduler(rescale_betas_zero_snr=path.zero_terminal_snr, **table)
    if isinstance(path, EDM):
        return diffusers.EDMEulerScheduler(path.sigma_min, path.sigma_max, path.sigma_data)
    if isinstance(path, RectifiedFlow):
        options: dict[str, Any] = {"shift": shift.factor(size) if shift else 1.0}
        if isinstance(shift, FluxShift):
            options = {"base_shift": shift.base_mu, "max_shift": shift.max_mu}
            options["use_dynamic_shifting"] = True
        return diffusers.FlowMatchEulerDiscreteScheduler(**options)
    t = np.maximum(np.arange(NUM_TIMESTEPS), 0.5) / NUM_TIMESTEPS
    if shift is not None:
        t = path.shift(t, shift.factor(size))
    alpha, sigma = path.alpha_sigma(torch.from_numpy(t))
    power = (alpha**2 / (alpha**2 + sigma**2)).numpy()
    betas = 1 - power / np.concatenate([[1.0], power[:-1]])
    return diffusers.DDIMScheduler(trained_betas=betas.tolist(), **table)


def make_recipe(trained: Trained) -> dict[str, Any]:
    """What flowmill_pipeline.py must know besides its components."""
    config, manifest, text = trained.config, trained.manifest, trained.manifest.text
    codec, (height, width) = manifest.codec, largest_bucket(manifest)
    roles = {n: role.model_dump(include={"view", "store"}) for n, role in text.used.items()}
    read = text.model_dump(mode="json", include={"tokens", "pooled", "absent", "empty"})
    return {
        "objective": config.objective.model_dump(
            mode="json", include={"path", "prediction", "network", "shift"}
        ),
        "sampler": config.sampler.model_dump(mode="json"),
        "text": read | {"roles": roles},
        "num_classes": config.model.num_classes,
        "codec": codec.class_name,
        **codec.model_dump(mode="json", include={"channels", "downscale", "normalisation"}),
        "multiple": codec.downscale * config.model.latent_multiple,
        "height": height,
        "width": width,
    }


def save_encoders(trained: Trained, folder: Path, how: str) -> dict[str, Any]:
    """VAE, text encoders and tokenizers, copied or as links to where they are here; their index entries."""
    encoders = trained.encoders(torch.device("cpu"))
    vae, where = encoders.codec.network, Path(encoders.codec.record()["path"])
    parts = [("vae", "diffusers", vae, where)] if vae else []
    if (count := len(encoders.text)) > 3:
        raise InputError(f"{count} text encoders: the exported pipeline holds at most 3")
    entries: dict[str, Any] = {} if vae else {"vae": [None, None]}
    for number, encoder in enumerate(encoders.text.values(), start=1):
        suffix = f"_{number}" if number > 1 else ""
        hidden = type(encoder.network).__name__ == HIDDEN_CLASS
        library = type(encoder.network).__module__ if hidden else "transformers"
        parts.append((f"text_encoder{suffix}", library, encoder.network, encoder.path))
        encoder.tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        entries[f"tokenizer{suffix}"] = ["transformers", type(encoder.tokenizer).__name__]
    for name, library, network, source in parts:
        if how == "link":
            (folder / name).symlink_to(source.resolve(), target_is_directory=True)
        else:
            if library == "diffusers":
                network.register_to_config(_name_or_path="")  # where it lies here
            network.to(memory_format=torch.contiguous_format).save_pretrained(folder / name)
        entries[name] = [library, type(network).__name__]
    return entries


def export(
    trained: Trained, folder: Path, dtype: Dtype, encoders: str, licence: str = "unknown"
) -> None:
    """Write the whole folder, or nothing under its name."""
    # Hidden, so that it is nobody else's.
    hidden = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    partial = hidden / folder.name
    partial.mkdir(parents=True)
    try:
        with naming(folder):
            _fill(trained, partial, dtype, encoders, licence)
            publish(partial, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _fill(trained: Trained, partial: Path, dtype: Dtype, encoders: str, licence: str) -> None:
    torch_dtype = getattr(torch, TORCH_DTYPES[dtype])
    config, down = trained.config, trained.manifest.codec.downscale
    height, width = largest_bucket(trained.manifest)
    shift = config.sampler.shift or config.objective.shift
    size = (trained.manifest.codec.channels, height // down, width // down)
    entry = save_network(trained, partial / "network", torch_dtype)
    scheduler = make_scheduler(config.objective.own, shift, size)
    scheduler.save_pretrained(partial / "scheduler")
    index: dict[str, Any] = {
        "_class_name": ["flowmill_pipeline", "FlowmillPipeline"],
        "_diffusers_version": diffusers.__version__,
        "network": entry,
        "scheduler": ["diffusers", type(scheduler).__name__],
        **save_encoders(trained, partial, encoders),
        "recipe": make_recipe(trained),
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partial / "flowmill_pipeline.py").write_text(
        whole_source("pipeline.inference.diffusers_pipeline")
    )
    save_single(trained, partial / f"{partial.name}.safetensors", torch_dtype)
    (partial / "README.md").write_text(model_card(trained, partial, dtype, entry, licence))
