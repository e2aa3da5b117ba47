"""The diffusers pipeline of an exported model: prompts to pictures with torch, diffusers and transformers alone.

`flowmill export` writes it as flowmill_pipeline.py, behind the sources of all of ours that it imports.
"""

from types import SimpleNamespace
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from models.codec_layouts import LAYOUTS
from models.prompts import TextReader, join_texts, parse_classes
from models.text_conventions import View
from pipeline.data.randomness import draw_noise
from pipeline.objectives.config import ObjectiveConfig, SamplerConfig
from pipeline.objectives.objective import Objective
from pipeline.objectives.sampling import Guidance, generate


class FlowmillPipeline(DiffusionPipeline):
    """`recipe` says what the model was trained with: objective, sampler, token limits, latent shape, classes.

    `scheduler` tells other tools of the noise levels; the pipeline itself samples as `flowmill sample` does.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->network->vae"
    _optional_components = ["vae"] + [
        f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
    ]

    def __init__(
        self,
        network,
        vae,
        scheduler,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        recipe=None,
    ):
        given = locals()
        super().__init__()
        names = ("network", "scheduler", *self._optional_components)
        self.register_modules(**{name: given[name] for name in names})
        self.register_to_config(recipe=recipe)
        self.recipe: Any = recipe

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        height=None,
        width=None,
        num_inference_steps=None,
        guidance_scale=None,
        guidance_rescale=None,
        sampler=None,
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        seed=None,
        places=None,
        output_type="pil",
        return_dict=True,
    ):
        """Pictures of the prompts, prompt by prompt; what is None is the trained run's own.

        A prompt of a class-conditional model is "207", or "207: TEXT" where there is text too. sampler: a dict of
        other settings, such as {"name": "heun"}. latents: standard normal noise (B, C, h, w); else it comes from
        `generator`, if there is one, else from `seed` and each picture's place (0, 1, ...) as in `flowmill sample`.
        output_type: pil, np, pt or latent (normalised).
        """
        recipe, device, down = self.recipe, self._execution_device, self.recipe["downscale"]
        height, width = height or recipe["height"], width or recipe["width"]
        layout = LAYOUTS[recipe["codec"]](self.vae.config if self.vae else {})
        layout.check_size((height, width), recipe["multiple"])
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        places = list(range(len(prompts))) if places is None else places
        shape = (len(prompts), recipe["channels"], height // down, width // down)
        if latents is None and generator is not None:
            latents = randn_tensor(shape, generator, device)
        named = {
            "num_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "seed": fresh_seed(generator) if seed is None else seed,
        }
        named = {key: value for key, value in named.items() if value is not None}
        config = self.configure({**(sampler or {}), **named})
        if latents is None:
            latents = draw_noise(config.seed, 0, places, shape[1:], device, "pictures")
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
        pictures = self.sample(latents.to(device, torch.float32), prompts, config, places)
        if output_type != "latent":
            factors = recipe["normalisation"]
            mean, std = (torch.tensor(factors[n], dtype=torch.float64) for n in ("mean", "std"))
            mean, scale = (v.float().view(-1, 1, 1).to(device) for v in (mean, 1 / std))
            raw = pictures / scale + mean
            pixels = layout.decode(self.vae, raw.to(self.vae.dtype) if self.vae else raw).float()
            pictures = VaeImageProcessor().postprocess(pixels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)  # pyright: ignore[reportArgumentType]

    def configure(self, changes) -> SamplerConfig:
        """The run's sampler with changes; raises ValueError for a setting or a sampler that does not exist."""
        saved = self.recipe["sampler"]
        if unknown := changes.keys() - saved.keys():
            raise ValueError(f"sampler: got {sorted(unknown)}, expected some of {sorted(saved)}")
        config = SamplerConfig(**{**saved, **changes})
        if config.name not in (names := get_args(SamplerConfig.__annotations__["name"])):
            raise ValueError(f"sampler: got the name {config.name!r}, expected one of {names}")
        return config

    def sample(self, noise, prompts, config, places):
        """Normalised latents, fp32."""
        down = self.recipe["downscale"]
        size = (noise.shape[-2] * down, noise.shape[-1] * down)
        guidance = self.encode(prompts, size, noise.device)
        objective = Objective(ObjectiveConfig(**self.recipe["objective"]))
        calls = 2 * config.num_steps - 1 if config.name == "heun" else config.num_steps
        progress_bar: Any = self.progress_bar
        with progress_bar(total=calls) as bar:

            def network(x_t, t, conditions):
                bar.update()
                return self.predict(x_t, t, conditions)

            return generate(network, objective, noise, guidance, config, places)

    def encode(self, prompts, size, device) -> Guidance:
        """What the network is told, with the prompts and without."""
        count, encoded, text = len(prompts), {}, self.recipe["text"]
        texts, label = parse_classes(prompts, self.recipe["num_classes"], device)
        names = [name for name in self._optional_components if name.startswith("text_encoder")]
        for name, (role, said) in zip(names, text["roles"].items(), strict=False):
            pair = getattr(self, name), getattr(self, name.replace("text_encoder", "tokenizer"))
            reader = TextReader(*pair, View(**said["view"]), device)
            encoded[role] = reader.encode_prompts(texts, said["store"], text["empty"])
        every = join_texts(encoded, SimpleNamespace(**text))._replace(label=label)
        every = every.drawn(count + 1, size, device)
        last = [count] * count
        prompted, unprompted = every.map(lambda x: x[:-1]), every.map(lambda x: x[last])
        return Guidance(prompted, unprompted)

    def predict(self, x_t, t, conditions: Any):
        """The network's own prediction at t in [0, 1], fp32."""
        kind, dtype, time = type(self.network).__name__, self.network.dtype, 1000 * t
        text, mask, pooled, micro, label, *_ = conditions
        x_t = x_t.to(dtype)
        cast: Any = (None if told is None else told.to(dtype) for told in (text, pooled))
        text, pooled = cast
        if kind == "FlowmillNetwork":
            return self.network(x_t, t, **conditions._asdict()).float()
        if kind == "DiTTransformer2DModel":
            return self.network(x_t, time, class_labels=label).sample.float()
        given: dict[str, Any] = {"encoder_attention_mask": mask}
        if kind == "PixArtTransformer2DModel":
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            return self.network(x_t, text, time, **given).sample.float()
        if kind == "SD3Transformer2DModel":
            # It takes no mask: each picture goes through with its own words.
            alone = [slice(i, i + 1) for i in range(len(x_t))]
            parts = [slice(None)] if mask.all() else alone
            each = [self.network(x_t[p], text[p][:, mask[p][0]], pooled[p], time[p]) for p in parts]
            return torch.cat([out.sample.float() for out in each])
        if self.network.config.addition_embed_type == "text_time":
            down = self.recipe["downscale"]
            target = torch.tensor([[s * down for s in x_t.shape[-2:]]], device=x_t.device)
            ids = torch.cat([micro, target.expand(len(x_t), 2)], dim=1)
            given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return self.network(x_t, time, text, class_labels=label, **given).sample.float()


def fresh_seed(generator) -> int:
    """The next number of a generator, of the first of several, or of torch's own."""
    first = generator[0] if isinstance(generator, list) else generator
    where = first.device if first is not None else "cpu"
    return int(torch.randint(2**31, (), generator=first, device=where))
