"""Prompts to what a network is told: by flowmill and by the pipelines that it exports alike."""

import re
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.conditions import Conditions
from models.config import InputError

EncodedText = tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"], Float[Tensor, "B P"]]
"""fp32 tokens, zero where masked; the mask, True keeps; fp32 pooled. L is the longest text's length."""


def encode_text(
    network: Any, tokenizer: Any, texts: list[str], max_length: int, device: torch.device
) -> EncodedText:
    """The texts as a transformers encoder sees them.

    A text longer than max_length is cut but keeps its end token. Pooled is CLIP's own pooled output; for any other
    encoder it is the mean over the real tokens.
    """
    batch = tokenizer(
        texts, padding="longest", truncation=True, max_length=max_length, return_tensors="pt"
    ).to(device)
    mask = batch["attention_mask"]
    output = network(input_ids=batch["input_ids"], attention_mask=mask)
    mask = mask.bool()
    tokens = output.last_hidden_state.float().masked_fill(~mask[..., None], 0.0)  # (B, L, D)
    if "text_embeds" in output:
        pooled = output.text_embeds.float()
    elif type(network).__name__ == "CLIPTextModel":
        pooled = output.pooler_output.float()
    else:
        pooled = tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return tokens, mask, pooled


def join_texts(encoded: list[EncodedText]) -> Conditions:
    """Every encoder's view of the texts, rounded as the dataset stores them; none without encoders."""
    if not encoded:
        return Conditions()
    tokens, masks, pooled = zip(*encoded, strict=True)
    width = max(part.shape[-1] for part in tokens)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in tokens]
    text_emb, side = torch.cat(padded, dim=1), torch.cat(pooled, dim=1)
    return Conditions(text_emb.half().float(), torch.cat(masks, dim=1), side.half().float())


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
