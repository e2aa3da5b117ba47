"""The diffusers pipeline of an exported model: prompts to pictures with torch, diffusers and transformers alone.

`flowmill export` copies this file beside the weights as flowmill_pipeline.py; it is flowmill's sampling for
the exported scheduler. Load it with

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
"""

import math
import re
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class FlowmillPipeline(DiffusionPipeline):
    """`recipe` says what the model was trained with: objective, sampler, token limits, latent shape, classes."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->network->vae"
    _optional_components = [
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
        super().__init__()
        self.register_modules(
            network=network,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
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
        num_images_per_prompt=1,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Pictures of the prompts, prompt by prompt; what is None is the trained run's own.

        Of a class-conditional model a prompt is "207", or "207: TEXT" where there is text too. `latents` is
        standard normal noise (B, C, h, w). output_type: pil, np, pt or latent (normalised).
        """
        recipe, sampler = self.recipe, self.recipe["sampler"]
        given = {
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "num_steps": num_inference_steps,
        }
        sampler = sampler | {key: value for key, value in given.items() if value is not None}
        height, width = height or recipe["height"], width or recipe["width"]
        if height % recipe["multiple"] or width % recipe["multiple"]:
            raise ValueError(f"{height}x{width}: expected multiples of {recipe['multiple']}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        device, down = self._execution_device, recipe["downscale"]
        shape = (len(prompts), recipe["channels"], height // down, width // down)
        if latents is None:
            latents = randn(shape, generator, device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
        cond, uncond = self.encode(prompts, (height, width), device)

        def predict(x_t, t):
            return self.guided(x_t, t, cond, uncond, sampler)

        noise = latents.to(device, torch.float32)
        walk = (
            self.walk_table if recipe["objective"]["path"]["kind"] == "vp_discrete" else self.walk
        )
        latents = walk(predict, noise, sampler["num_steps"])
        if output_type == "latent":
            pictures = latents
        else:
            raw = latents / recipe["scaling_factor"] + recipe["shift_factor"]
            pixels = self.vae.decode(raw.to(self.vae.dtype)).sample.float()
            pictures = (pixels / 2 + 0.5).clamp(0, 1).cpu()
            if output_type != "pt":
                pictures = pictures.permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                pictures = self.numpy_to_pil(pictures)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)  # pyright: ignore[reportArgumentType]

    # --- conditioning

    def encode(self, prompts, size, device):
        """What the network is conditioned on, with the prompts and without: two dicts of tensors."""
        texts, count, classes = prompts, len(prompts), self.recipe["num_classes"]
        conditions = {
            "micro": torch.tensor([[*size, 0.0, 0.0]], device=device).expand(count + 1, 4)
        }
        if classes:
            found: list[Any] = [
                re.fullmatch(r"(\d+)(?:: *(.*))?", text.strip()) for text in prompts
            ]
            if not all(match and int(match[1]) < classes for match in found):
                raise ValueError(
                    f"prompt: expected a class from 0 to {classes - 1}, or CLASS: TEXT"
                )
            labels = [*(int(match[1]) for match in found), classes]
            conditions["label"] = torch.tensor(labels, device=device)
            texts = [match[2] or "" for match in found]
        tokens, masks, pooled = [], [], []
        names = [name for name in self._optional_components if name.startswith("text_encoder")]
        for name, max_length in zip(names, self.recipe["max_lengths"], strict=False):
            tokenizer = getattr(self, name.replace("text_encoder", "tokenizer"))
            parts = embed(getattr(self, name), tokenizer, [*texts, ""], max_length, device)
            for into, part in zip((tokens, masks, pooled), parts, strict=True):
                into.append(part)
        if tokens:
            wide = max(part.shape[-1] for part in tokens)
            padded = [torch.nn.functional.pad(part, (0, wide - part.shape[-1])) for part in tokens]
            # Rounded as the dataset stored them.
            conditions["text_emb"] = torch.cat(padded, dim=1).half().float()
            conditions["text_mask"] = torch.cat(masks, dim=1)
            conditions["pooled"] = torch.cat(pooled, dim=1).half().float()
        cond = {key: value[:-1] for key, value in conditions.items()}
        return cond, {key: value[-1:].expand_as(cond[key]) for key, value in conditions.items()}

    # --- the network, whatever its class

    def guided(self, x_t, t, cond, uncond, sampler):
        """The prediction under classifier-free guidance (2207.12598), fp32."""
        scale, rescale = sampler["guidance_scale"], sampler["guidance_rescale"]
        low, high = sampler["guidance_interval"]
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        if scale == 1 or not low <= t <= high:
            return self.predict(x_t, times, cond)
        both = {key: torch.cat([uncond[key], value]) for key, value in cond.items()}
        pred = self.predict(torch.cat([x_t, x_t]), torch.cat([times, times]), both)
        without, pred_cond = pred.chunk(2)
        pred = without + scale * (pred_cond - without)
        if rescale > 0:  # 2305.08891, section 3.4
            ratio = pred_cond.flatten(1).std(1) / pred.flatten(1).std(1).clamp_min(1e-12)
            pred = pred * (rescale * ratio + 1 - rescale).view(-1, 1, 1, 1)
        return pred

    def predict(self, x_t, t, conditions):
        """The network's own prediction at t in [0, 1], fp32."""
        kind, x_t = type(self.network).__name__, x_t.to(self.network.dtype)
        text = conditions.get("text_emb")
        mask, pooled = conditions.get("text_mask"), conditions.get("pooled")
        label, time = conditions.get("label"), 1000 * t
        if text is not None:
            text, pooled = text.to(x_t.dtype), pooled.to(x_t.dtype)
        if kind == "FlowmillNetwork":
            return self.network(x_t, t, **conditions).float()
        if kind == "DiTTransformer2DModel":
            return self.network(x_t, time, class_labels=label).sample.float()
        if kind == "PixArtTransformer2DModel":
            sizes = {"resolution": None, "aspect_ratio": None}
            out = self.network(
                x_t, text, time, added_cond_kwargs=sizes, encoder_attention_mask=mask
            )
            return out.sample.float()
        if kind == "SD3Transformer2DModel":  # takes no mask: each picture with its own words
            rows = range(len(x_t))
            return torch.cat(
                [
                    self.network(
                        x_t[i : i + 1],
                        text[i : i + 1, mask[i]],  # pyright: ignore[reportOptionalSubscript]
                        pooled[i : i + 1],
                        time[i : i + 1],
                    ).sample.float()
                    for i in rows
                ]
            )
        added = None
        if self.network.config.addition_embed_type == "text_time":
            down = self.recipe["downscale"]
            target = torch.tensor([[s * down for s in x_t.shape[-2:]]], device=x_t.device)
            ids = torch.cat([conditions["micro"], target.expand(len(x_t), 2)], dim=1)
            added = {"text_embeds": pooled, "time_ids": ids}
        classes = label if self.recipe["num_classes"] else None
        out = self.network(
            x_t,
            time,
            text,
            class_labels=classes,
            encoder_attention_mask=mask,
            added_cond_kwargs=added,
        )
        return out.sample.float()

    # --- from noise to latents

    def walk_table(self, predict, noise, num_steps):
        """The 1000 levels of a discrete schedule, with any scheduler of such.

        DDIM takes flowmill's own steps where num_steps divides 1000.
        """
        self.scheduler.set_timesteps(num_steps, device=noise.device)
        x = noise * self.scheduler.init_noise_sigma
        for k in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            x_t = self.scheduler.scale_model_input(x, k)
            pred = predict(x_t, float(k) / 1000)
            if (
                self.recipe["objective"]["prediction"] == "flow"
            ):  # schedulers of tables know the sample
                alpha = self.scheduler.alphas_cumprod[int(k)].sqrt().to(x)
                sigma = (1 - alpha**2).sqrt()
                pred = (x_t - sigma * pred) / (alpha + sigma)
            x = self.scheduler.step(pred, k, x).prev_sample
        return x

    def walk(self, predict, noise, num_steps):
        """A continuous path with a flow-matching scheduler.

        x_t / (alpha + sigma) is (1 - tau) x0 + tau noise at tau = sigma / (alpha + sigma), whatever the path: the
        scheduler is given tau, which it shifts, and the velocity noise - x0.
        """
        path, (height, width) = self.recipe["objective"]["path"], noise.shape[-2:]
        mu = None
        if self.scheduler.config.get("use_dynamic_shifting"):
            mu = self.shift_exponent(height * width)
        self.scheduler.set_timesteps(
            sigmas=start_levels(path, num_steps), device=noise.device, mu=mu
        )
        levels = [level_of(path, float(tau)) for tau in self.scheduler.sigmas[:-1]]
        _, alpha, sigma = levels[0]
        x = noise * math.hypot(alpha, sigma) / (alpha + sigma)
        steps = zip(levels, self.scheduler.timesteps, strict=True)
        self.scheduler.set_begin_index(0)
        for (t, alpha, sigma), timestep in self.progress_bar(list(steps)):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue, reportArgumentType]
            x_t = x * (alpha + sigma)
            velocity = self.velocity(predict(x_t, t), x_t, alpha, sigma)
            x = self.scheduler.step(velocity, timestep, x).prev_sample
        return x

    def velocity(self, pred, x_t, alpha, sigma):
        """noise - x0 from the prediction c0 x0 + c1 noise and x_t = alpha x0 + sigma noise."""
        kind, root = self.recipe["objective"]["prediction"], 1.0
        data = self.recipe["objective"]["path"].get("sigma_data", 1.0)
        if kind == "edm":
            root = math.hypot(alpha * data, sigma)
        c0, c1 = {
            "sample": (1.0, 0.0),
            "epsilon": (0.0, 1.0),
            "v": (-sigma, alpha),
            "flow": (-1.0, 1.0),
            "edm": (sigma / data / root, -alpha * data / root),
        }[kind]
        return ((alpha + sigma) * pred - (c0 + c1) * x_t) / (alpha * c1 - sigma * c0)

    def shift_exponent(self, pixels):
        """mu of sigma/alpha times e^mu, for a latent of so many pixels."""
        shift = self.recipe["shift"]
        if shift["kind"] == "resolution":
            return math.log(math.sqrt(pixels / shift["base_pixels"]))
        slope = (shift["max_mu"] - shift["base_mu"]) / (4096 - 256)
        return shift["base_mu"] + slope * (pixels / 4 - 256)


def start_levels(path, num_steps):
    """tau of each step before any shift, noisiest first."""
    if path["kind"] == "edm":  # 2206.00364, eq. 5 with rho 7
        low, high = path["sigma_min"] ** (1 / 7), path["sigma_max"] ** (1 / 7)
        sigma = np.linspace(high, low, num_steps) ** 7
        return sigma / (1 + sigma)
    t = np.linspace(1, 0, num_steps + 1)[:-1]
    if path["kind"] == "rectified_flow":
        return t
    sine, cosine = np.sin(math.pi / 2 * t), np.sin(math.pi / 2 * (1 - t))
    return sine / (sine + cosine)


def level_of(path, tau):
    """t, alpha and sigma where sigma / (alpha + sigma) is tau."""
    if path["kind"] == "rectified_flow":
        return tau, 1 - tau, tau
    if path["kind"] == "vp_cosine":
        t = 2 / math.pi * math.atan2(tau, 1 - tau)
        return t, math.sin(math.pi / 2 * (1 - t)), math.sin(math.pi / 2 * t)
    sigma = tau / (1 - tau)
    t = math.log(sigma / path["sigma_min"]) / math.log(path["sigma_max"] / path["sigma_min"])
    alpha = 1 / math.hypot(sigma, path["sigma_data"])
    return t, alpha, alpha * sigma


def embed(encoder, tokenizer, texts, max_length, device):
    """Tokens (B, L, D), mask (B, L) and pooled (B, P): CLIP's own pooled output, else the mean of the tokens."""
    batch = tokenizer(
        texts, padding="longest", truncation=True, max_length=max_length, return_tensors="pt"
    ).to(device)
    mask = batch["attention_mask"]
    output = encoder(input_ids=batch["input_ids"], attention_mask=mask)
    mask = mask.bool()
    tokens = output.last_hidden_state.float().masked_fill(~mask[..., None], 0.0)
    if "text_embeds" in output:
        pooled = output.text_embeds.float()
    elif type(encoder).__name__ == "CLIPTextModel":
        pooled = output.pooler_output.float()
    else:
        pooled = tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return tokens, mask, pooled


def randn(shape, generator, device):
    """Standard normal; of a list of generators one a picture."""
    if isinstance(generator, list):
        return torch.cat([randn((1, *shape[1:]), one, device) for one in generator])
    where = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=where).to(device)
