"""Captions by an image-text-to-text model: what is drawn hangs on the picture's key, never on its neighbours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_prep.encoders import CaptionerConfig
from models.captioner import Answer, Captioner, _Choice, repeats, uniform
from models.config import InputError

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "<image>", "user", "assistant", "describe"]
WORDS += [f"w{i}" for i in range(56)]
CHAT = (
    "[BOS]{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}assistant"
)


def save_captioner(folder: Path, chat: str | None = CHAT, seed: int = 0) -> Path:
    """A tiny Llava of random weights with its processor, which says any of 56 words, or ends."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [AddedToken(word, normalized=False) for word in WORDS[:5]]
    words.add_special_tokens(special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "bos", "eos")}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    size = {"height": 16, "width": 16}
    images = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    processor: Any = tf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=chat,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    same = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(**same, num_attention_heads=2, image_size=16, patch_size=8)
    text = tf.LlamaConfig(
        **same, vocab_size=len(WORDS), num_attention_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    torch.manual_seed(seed)
    network = tf.LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        scale = 0.5 if parameter.ndim > 1 else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    network.generation_config = tf.GenerationConfig(
        eos_token_id=3, pad_token_id=0, do_sample=True, temperature=3.0, repetition_penalty=5.0
    )
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Captioner:
    return Captioner(save_captioner(tmp_path_factory.mktemp("captioner")))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 24, 32), generator=generator, dtype=torch.uint8)


KEYS = [f"{i:020x}" for i in range(6)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_hangs_on_its_picture_and_key_alone(captioner, temperature):
    shown = pictures(6)
    ask = lambda *order: [  # noqa: E731
        captioner.answer(shown[list(order)], [KEYS[i] for i in order], "describe", 8, temperature)[
            n
        ]
        for n in range(len(order))
    ]
    whole = ask(0, 1, 2, 3, 4, 5)
    assert ask(5, 3, 1, 0, 2, 4) == [whole[i] for i in (5, 3, 1, 0, 2, 4)]
    assert captioner.answer(shown, KEYS, "describe", 8, temperature) == whole
    assert len({answer.answer for answer in whole}) > 1
    if temperature:
        others = captioner.answer(shown, KEYS, "w1", 8, temperature)
        assert [a.answer for a in others] != [a.answer for a in whole]
        assert captioner.answer(shown, KEYS[::-1], "describe", 8, temperature) != whole


def test_without_temperature_it_says_what_the_model_itself_finds_likeliest(captioner):
    shown, network = pictures(4), captioner.network
    inputs = captioner._inputs(shown, "describe")
    tokens = inputs["input_ids"]
    assert (tokens == 4).sum(1).tolist() == [4] * 4  # 2x2 patches
    assert (inputs["attention_mask"] == 1).all()
    assert tokens[0, 0] == 2
    assert (tokens == 2).sum() == 4  # one beginning each
    for _ in range(6):  # token by token, without a cache
        mask = torch.ones_like(tokens)
        logits = network(
            input_ids=tokens, attention_mask=mask, pixel_values=inputs["pixel_values"]
        ).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    for answer, row in zip(
        captioner.answer(shown, KEYS[:4], "describe", 6), tokens[:, -6:].tolist(), strict=True
    ):
        assert answer == captioner._judged(row, broken=False)


def test_words_are_drawn_as_often_as_they_are_likely():
    scores = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)) * 2
    keys = [f"{i:x}" for i in range(20_000)]
    drawn = _Choice(keys, "p", 0.7)(
        torch.zeros(len(keys), 0).long(), scores.expand(len(keys), -1)
    ).argmax(1)
    shares = drawn.bincount(minlength=5) / len(keys)
    torch.testing.assert_close(shares, (scores[0] / 0.7).softmax(0), atol=0.015, rtol=0)
    assert (
        0
        <= min(uniform(key, "p", 0) for key in keys)
        < max(uniform(key, "p", 3) for key in keys)
        < 1
    )


def test_what_is_no_caption_has_a_reason(captioner):
    judged = captioner._judged
    assert judged([8, 9, 3, 0], broken=False) == Answer("w0 w1", "w0 w1", 2, "")
    assert judged([8, 9, 10], broken=False).reason == "caption_cut"
    assert judged([3, 0], broken=False).reason == "caption_empty"
    assert judged([8, 9, 10, 11] * 3 + [3], broken=False).reason == "caption_repeats"
    assert judged([8, 3], broken=True) == Answer(None, "w0", 1, "caption_not_finite")
    assert repeats("a b c d e f g h a b c d")
    assert not repeats("a b c d e f g h i j k l")
    assert not repeats("a b c d a b c d")


def test_one_picture_whose_logits_are_nan_changes_no_other(captioner):
    shown = pictures(3)
    sound = captioner.answer(shown, KEYS[:3], "describe", 4, 1.0)
    once = captioner.network.lm_head.register_forward_hook(
        lambda _, __, output: output.index_fill(0, torch.tensor([1]), torch.nan)
    )
    try:
        found = captioner.answer(shown, KEYS[:3], "describe", 4, 1.0)
    finally:
        once.remove()
    assert found[1].reason == "caption_not_finite"
    assert [found[0], found[2]] == [sound[0], sound[2]]


def test_a_folder_that_is_no_captioner_is_refused(tmp_path):
    folder = save_captioner(tmp_path / "plain", chat=None)
    open_one = Captioner(folder)
    with pytest.raises(InputError, match=r"prompt .*<image>"):
        open_one.answer(pictures(1), KEYS[:1], "describe", 2)
    assert open_one.answer(pictures(1), KEYS[:1], "<image> describe", 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(InputError, match="cannot load AutoModelForImageTextToText"):
        Captioner(folder)
    with pytest.raises(InputError, match="no such folder, expected a transformers image-text"):
        CaptionerConfig(path=str(tmp_path / "none"), prompts=["x"]).hashes()
