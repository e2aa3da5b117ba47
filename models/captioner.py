"""An image-text-to-text model in a local folder that says what pictures show: the likeliest words, or drawn by seeds.

What is said of a picture depends on its key, never on its place in a batch.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from models.config import InputError
from models.numerics import tf32
from models.weights import EncoderDtype, brief, load_network, load_processor

CLASS = "AutoModelForImageTextToText"
# From so many words on an answer may be found to repeat itself: one run of four words is a third of it.
REPEAT_WORDS, REPEATED, REPEAT_SHARE = 12, 4, 1 / 3


@dataclass(frozen=True)
class Answer:
    """What a model said of a picture, and why that is no caption: "" where it is one."""

    caption: str | None
    answer: str
    num_tokens: int
    reason: str


class Captioner:
    """A transformers image-text-to-text model, frozen, with its processor."""

    def __init__(self, path: Path, dtype: EncoderDtype = "fp32", device: str = "cpu"):
        """Open a folder with config.json, safetensors and a processor; raises InputError where it is none."""
        self.path, self.dtype = path, dtype
        self.processor = load_processor("AutoProcessor", path)
        if getattr(self.processor, "tokenizer", None) is None:
            raise InputError(
                f"{path}: got {type(self.processor).__name__}, expected a processor of pictures and texts. "
                f"Remedy: the folder of a model that {CLASS} opens"
            )
        network = load_network("transformers", CLASS, path, dtype, unused=()).to(device)
        self.network = network.eval().requires_grad_(False)
        own = network.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if own is None else own
        if ends is None:
            raise InputError(f"{path}: names no token that ends an answer, expected eos_token_id")
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        self.chat = getattr(self.processor, "chat_template", None)
        self.processor.tokenizer.padding_side = "left"
        # Beams, penalties and temperatures that a model brings along would change what is asked for here.
        network.generation_config = transformers.GenerationConfig(
            eos_token_id=self.ends, pad_token_id=self.ends[0], do_sample=False, num_beams=1
        )

    @torch.inference_mode()
    def answer(
        self,
        pictures: UInt8[Tensor, "B 3 H W"],
        keys: Sequence[str],
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
    ) -> list[Answer]:
        """What the model answers to the prompt of each picture; raises InputError where it sees no picture.

        At temperature 0 the likeliest token is taken. Else each is drawn by a number that hangs on the key,
        the prompt and the token's place alone.
        """
        choice = _Choice(keys, prompt, temperature)
        inputs = self._inputs(pictures, prompt)
        with tf32(self.dtype == "tf32"):
            tokens = self.network.generate(
                **inputs, max_new_tokens=max_new_tokens, logits_processor=[choice]
            )
        # A model may repeat the prompt, or not; each new token was chosen in one step.
        new = tokens[:, tokens.shape[1] - choice.step :].tolist()
        return [self._judged(row, bad) for row, bad in zip(new, choice.broken, strict=True)]

    def _inputs(self, pictures: UInt8[Tensor, "B 3 H W"], prompt: str) -> Any:
        """Pictures of one size give prompts of one length, so that nothing is padded."""
        text, options = prompt, {}
        if self.chat:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            turn = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
            # The template writes the tokens that begin a text itself.
            options = {"add_special_tokens": False}
        images = [[picture.permute(1, 2, 0).numpy()] for picture in pictures.cpu()]
        texts, options = [text] * len(images), options | {"return_tensors": "pt", "padding": True}
        try:
            inputs = self.processor(images=images, text=texts, **options)
        except (ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"{self.path}: cannot read the prompt {text!r}: {brief(error)}"
            ) from error
        picture = getattr(self.processor, "image_token_id", None)
        if picture is not None and not (inputs["input_ids"] == picture).any():
            raise InputError(
                f"{self.path}: the prompt got {text!r}, expected {self.processor.image_token} in it, where the "
                "picture is to be"
            )
        return inputs.to(self.network.device, dtype=self.network.dtype)

    def _judged(self, tokens: list[int], broken: bool) -> Answer:
        """The answer in new tokens; behind its end others are padding."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        reason = "caption_cut" if end is None else "" if text else "caption_empty"
        reason = "caption_not_finite" if broken else reason or "caption_repeats" * repeats(text)
        return Answer(None if reason else text, text, len(tokens[:end]), reason)


class _Choice(transformers.LogitsProcessor):
    """Chooses every token; `step` counts them, and `broken` says of whom a logit was NaN or infinite."""

    def __init__(self, keys: Sequence[str], prompt: str, temperature: float):
        self.keys, self.prompt, self.temperature = keys, prompt, temperature
        self.step, self.broken = 0, [False] * len(keys)

    def __call__(
        self, input_ids: Int64[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        bad = (scores.isnan() | (scores == torch.inf)).any(1).tolist()
        self.broken = [before or now for before, now in zip(self.broken, bad, strict=True)]
        step, self.step = self.step, self.step + 1
        if not self.temperature:
            return scores
        # In float64 on the CPU a token's probability is the same on any device whose logits are.
        below = (scores.double().cpu() / self.temperature).softmax(1).cumsum(1)
        drawn = [[uniform(key, self.prompt, step)] for key in self.keys]
        numbers = torch.tensor(drawn, dtype=torch.float64)  # (B, 1)
        chosen = (below <= numbers * below[:, -1:]).sum(1, keepdim=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def uniform(key: str, prompt: str, step: int) -> float:
    """A number in [0, 1) that hangs on a picture's key, the prompt and the token's place alone."""
    digest = hashlib.sha256(f"token\0{key}\0{prompt}\0{step}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def repeats(text: str) -> bool:
    """Whether one run of four words, said again and again, makes over a third of a longer text."""
    words = text.split()
    runs = Counter(zip(*(words[i:] for i in range(REPEATED)), strict=False))
    most = max(runs.values(), default=0)
    long = len(words) >= REPEAT_WORDS
    return long and most > 1 and most * REPEATED > REPEAT_SHARE * len(words)
