"""Prompts to what a network is told: by flowmill and by the pipelines that it exports alike."""

import re
import threading
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from models.conditions import Conditions
from models.config import InputError
from models.text_conventions import fixed

TOKENIZING = threading.Lock()

EncodedText = tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"], Float[Tensor, "B P"] | None]
"""fp32 tokens, each text's own first, zero behind them; the mask, True for its own; fp32 pooled."""


def spell(tokenizer: Any, text: str, view: Any) -> str:
    """The text cleaned, and in its template."""
    if view.clean == "deepfloyd":
        from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

        text = TextPreprocessor().clean_text(text)
    elif view.clean == "lower_strip":
        text = text.lower().strip()
    elif view.clean == "no_img":
        text = text.replace("[IMG]", "")
    elif view.clean == "space_if_empty":
        text = text or " "
    if view.template is None:
        return text
    if isinstance(view.template, str):
        return view.template.replace("{}", text)
    chat = view.template
    said = {"system": chat.system, "user": text}
    messages = [
        {"role": role, "content": [{"type": "text", "text": words}] if chat.parts else words}
        for role, words in said.items()
        if words is not None
    ]
    thinking = {} if chat.thinking is None else {"enable_thinking": chat.thinking}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=chat.prompt, **thinking
    )


def tokenize(tokenizer: Any, texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of the texts, of one thread at a time.

    transformers' fast tokenizers keep how they pad and cut from call to call: threads that differ in it would get
    each other's.
    """
    with TOKENIZING:
        return tokenizer(texts, **options)


def token_ids(tokenizer: Any, texts: list[str], view: Any, **options: Any) -> Any:
    """What the tokenizer makes of the texts; the template of a chat brings its own special tokens."""
    chat = not isinstance(view.template, str | None)
    words = [spell(tokenizer, text, view) for text in texts]
    return tokenize(tokenizer, words, add_special_tokens=not chat, **options)


def prefix_tokens(tokenizer: Any, view: Any) -> int:
    """How many tokens the text in front of the prompt has, a begin token among them."""
    whole, words = (
        tokenize(tokenizer, view.prefix, add_special_tokens=special)["input_ids"]
        for special in (True, False)
    )
    starts = range(len(whole) - len(words) + 1)
    return next((i for i in starts if whole[i : i + len(words)] == words), 0) + len(words)


def dropped(tokenizer: Any, view: Any) -> tuple[int, int]:
    """The first tokens that are not kept begin .. end."""
    end = prefix_tokens(tokenizer, view) if view.drop else 0
    return (1, end - 1) if view.keep_first else (0, end)


class TextReader:
    """A text encoder of transformers and its tokenizer, which see texts in a View, on a device."""

    def __init__(self, network: Any, tokenizer: Any, view: Any, device: torch.device):
        self.network, self.tokenizer, self.view, self.device = network, tokenizer, view, device

    def encode(self, texts: list[str]) -> EncodedText:
        """The texts as the encoder sees them; L is the longest one's number of rows.

        A text longer than the view's max_length is cut but keeps its end token. Raises InputError for one without tokens.
        """
        view, (begin, end) = self.view, dropped(self.tokenizer, self.view)
        longest = view.pads == "masked" and view.mask_inside
        options: dict[str, Any] = {"padding": "longest" if longest else "max_length"}
        if view.side != "tokenizer":
            options["padding_side"] = view.side
        options |= {"truncation": True, "max_length": view.max_length + end - begin}
        batch = token_ids(self.tokenizer, texts, view, return_tensors="pt", **options)
        batch = batch.to(self.device)
        real = batch["attention_mask"].bool()
        place = real.cumsum(dim=1) - 1
        own = real & ~((place >= begin) & (place < end))
        if not own.any(dim=1).all():
            raise InputError(
                "a caption without words has no token here. Remedy: text: {tokens: ...} and, for this encoder, clean: "
                "space_if_empty, or a template"
            )
        output, states = self.forward(batch)
        pooled = None
        if view.pooled == "mean":
            sums = states.masked_fill(~own[..., None], 0.0).sum(dim=1)
            pooled = sums / own.sum(dim=1, keepdim=True)
        elif view.pooled != "none":
            name = "text_embeds" if view.pooled == "projected" else "pooler_output"
            pooled = output[name].float()
        kept = own
        if view.pads == "kept":
            kept = own | ~real
        elif view.pads == "first":
            columns = torch.arange(real.shape[1], device=self.device)
            kept = own | (columns == real.sum(dim=1, keepdim=True))
        order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(dim=1).max())]
        mask, rows = kept.gather(1, order), order[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, rows).masked_fill(~mask[..., None], 0.0), mask, pooled

    def forward(self, batch: Any) -> tuple[Any, Tensor]:
        """What the encoder gives for tokens (B, L), and the view's layers of it side by side, fp32 (B, L, D)."""
        view, told, raw_last = self.view, {}, []
        if view.mask_inside:
            told["attention_mask"] = batch["attention_mask"]
        if numbers := [layer for layer in view.layers if layer != "last"]:
            told["output_hidden_states"] = numbers
        norm = final_norm(self.network) if view.final_norm or -1 in numbers else None
        # hidden_states[-1] is the one behind the norm.
        hook = norm and norm.register_forward_pre_hook(lambda _, args: raw_last.append(args[0]))
        output = self.network(input_ids=batch["input_ids"], **told)
        if hook:
            hook.remove()
        states = [batch["input_ids"].new_zeros((*batch["input_ids"].shape, 0), dtype=torch.float32)]
        for layer in view.layers:
            if layer == "last":
                states.append(output.last_hidden_state.float())
                continue
            raw = raw_last[0] if layer == -1 else output.hidden_states[layer]
            states.append((norm(raw) if norm and view.final_norm else raw).float())
        return output, torch.cat(states, dim=-1)

    def encode_empty(self, empty: str) -> EncodedText:
        """The caption without words as a convention has it: `caption`, `zeros` or `bare`."""
        reader, view = self, self.view
        if empty == "bare":
            alone = dict(vars(view)) | {"template": None, "drop": 0, "keep_first": False}
            reader = copy(self)
            reader.view = type(view)(**alone)
        tokens, mask, pooled = reader.encode([""])
        if empty != "zeros":
            return tokens, mask, pooled
        return torch.zeros_like(tokens), mask, None if pooled is None else torch.zeros_like(pooled)

    def encode_prompts(self, texts: list[str], store: str, empty: str) -> EncodedText:
        """The texts and, last, the empty caption, rounded as stored and laid out as a network reads them."""
        parts = [self.encode(texts), self.encode_empty(empty)]
        length, pad = max(part[0].shape[1] for part in parts), torch.nn.functional.pad
        if fixed(self.view):
            length = self.view.max_length
        tokens = torch.cat([pad(t, (0, 0, 0, length - t.shape[1])) for t, _, _ in parts])
        mask = torch.cat([pad(m, (0, length - m.shape[1])) for _, m, _ in parts])
        vectors = [pooled for _, _, pooled in parts if pooled is not None]
        whole = "float16" if store == "int8" else store
        pooled = as_stored(torch.cat(vectors), whole) if vectors else None
        # The empty caption, the last one, is never stored in int8.
        tokens = torch.cat([as_stored(tokens[:-1], store), as_stored(tokens[-1:], whole)])
        return tokens, mask | fixed(self.view), pooled


def final_norm(network: Any) -> Any:
    """The norm behind the last layer of a text encoder; raises InputError where it has none."""
    text = getattr(network, "language_model", network)
    names = ("norm", "final_layer_norm")
    found = [(n.count("."), n) for n, _ in text.named_modules() if n.split(".")[-1] in names]
    if not found:
        raise InputError(f"{type(network).__name__} has no norm behind its last layer: say last")
    return text.get_submodule(min(found)[1])


def quantised(tokens: Float[Tensor, "*L D"]) -> Int8[Tensor, "*L E"]:
    """Each token as int8 times a scale of its own, whose float16 makes up its last two bytes: E = D + 2."""
    peak = tokens.float().abs().amax(-1, keepdim=True)
    scale = (peak / 127).half()
    # Rounded up, so that the largest number is within 127 scales.
    scale = (scale.view(torch.int16) + (scale.float() * 127 < peak)).view(torch.float16)
    scale = scale.clamp(min=2**-14)
    numbers = (tokens.float() / scale.float()).round().to(torch.int8)
    return torch.cat([numbers, scale.view(torch.int8)], dim=-1)


def dequantised(stored: Int8[Tensor, "*L E"]) -> Float[Tensor, "*L D"]:
    """float16: the exact products, rounded once, so that every device gives the same."""
    return stored[..., :-2].half() * stored[..., -2:].contiguous().view(torch.float16)


def as_stored(tokens: Float[Tensor, "*L D"], store: str) -> Float[Tensor, "*L D"]:
    """fp32, as a dataset gives back what it stores."""
    if store == "int8":
        return dequantised(quantised(tokens)).float()
    return tokens.to(getattr(torch, store)).float()


def join_texts(encoded: Mapping[str, EncodedText], arrangement: Any) -> Conditions:
    """What a network is told by the roles that were encoded, or are absent: an Arrangement; nothing without roles."""
    if not encoded:
        return Conditions()
    pad, count = torch.nn.functional.pad, len(next(iter(encoded.values()))[0])
    groups = []
    for names in arrangement.tokens:
        parts = [encoded[name][:2] for name in names if name in encoded]
        for rows, width in (arrangement.absent[name] for name in names if name not in encoded):
            zeros = next(iter(encoded.values()))[0].new_zeros((count, rows, width))
            parts.append((zeros, zeros[..., 0] == 0))
        groups.append((torch.cat([tokens for tokens, _ in parts], dim=-1), parts[0][1]))
    width = max((tokens.shape[-1] for tokens, _ in groups), default=0)
    padded = [pad(tokens, (0, width - tokens.shape[-1])) for tokens, _ in groups]
    vectors: list[Any] = [encoded[name][2] for name in arrangement.pooled]
    return Conditions(
        torch.cat(padded, dim=1) if groups else None,
        torch.cat([mask for _, mask in groups], dim=1) if groups else None,
        torch.cat(vectors, dim=1) if vectors else None,
    )


def parse_class(prompt: str, num_classes: int) -> tuple[int, str]:
    """Class and text of "207" or "207: a retriever"; raises InputError."""
    match = re.fullmatch(r"(\d+)(?:: *(.*))?", prompt.strip())
    if not match or int(match[1]) >= num_classes:
        raise InputError(
            f'prompt {prompt!r}: expected a class from 0 to {num_classes - 1}, alone or before ": TEXT"'
        )
    return int(match[1]), match[2] or ""


def parse_classes(
    prompts: list[str], num_classes: int, device: torch.device
) -> tuple[list[str], Tensor | None]:
    """The texts of the prompts, and their classes with no class as the last; None of a network without classes."""
    if not num_classes:
        return prompts, None
    labels, texts = zip(*(parse_class(prompt, num_classes) for prompt in prompts), strict=True)
    return list(texts), torch.tensor([*labels, num_classes], device=device)
