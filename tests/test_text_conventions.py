"""Every text convention against the encode_prompt of its pipeline in diffusers; what is refused; what is read."""

import inspect
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.pipelines.prx.pipeline_prx as prx
import pytest
import torch
import transformers as tf
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers.models.t5gemma import modeling_t5gemma

from data_prep.audit import verify
from data_prep.config import PrepareConfig
from data_prep.encoders import Text
from data_prep.preparation import prepare
from data_prep.schema.recorded import load_encoders
from models.command import load_config
from models.config import InputError, parse_config
from models.prompts import TextReader, join_texts
from models.text_conventions import (
    CONVENTIONS,
    QWEN_21_SYSTEM,
    Arrangement,
    Chat,
    Convention,
    View,
)
from models.text_encoder import TextEncoder, count_cut
from pipeline.config import TrainConfig
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.inference.painter import Painter
from pipeline.runs.setup import fit_data
from tests import train_factory
from tests.prep_factory import config_of_pictures

CPU = torch.device("cpu")
FEW = ["a red apple", "", "Une Pomme, NÉ 苹果 🍎 {[IMG]}"]
LONG = " ".join(["apple", "volcano,", "red"] * 400)
PROMPTS = [*FEW, LONG]
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}think\n{% endif %}{% endif %}"
)


def split() -> Any:
    """Words, punctuation, and each new line."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )


def spelled(view: Any) -> str:
    if isinstance(view.template, Chat):
        return f"{view.template.system or ''} system user assistant think \n"
    return view.template or ""


TEXTS = " ".join([*PROMPTS, *(spelled(v) for c in CONVENTIONS.values() for v in c.roles.values())])
WORDS = [word for word, _ in split().pre_tokenize_str(TEXTS) if word not in ("苹果",)]
VOCABULARY = list(dict.fromkeys([*SPECIAL, *WORDS, *(w.lower() for w in WORDS)]))


def tokenizer(ends: str, length: int = 4096, side: str = "right") -> Any:
    """Words to numbers between the special tokens `ends`, such as "[BOS] $A"."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "[UNK]"))
    words.pre_tokenizer = split()
    pairs = [(word, VOCABULARY.index(word)) for word in ends.split() if word != "$A"]
    words.post_processor = processors.TemplateProcessing(single=ends, special_tokens=pairs)
    words.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=length,
        padding_side=side,
    )
    made.chat_template = CHAT
    return made


V = len(VOCABULARY)
LM: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def randomised(network: nn.Module, seed: int = 0) -> Any:
    """The network with norms of unequal weights, so that a normed state differs from a raw one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.rand(parameter.shape, generator=generator)
        parameter.data = noise + 0.5 if parameter.ndim == 1 else noise - 0.5
    return network.eval().requires_grad_(False)


def clip(projected: bool, width: int = 16, eos: int = 3) -> Any:
    config = tf.CLIPTextConfig(
        vocab_size=V, hidden_size=width, intermediate_size=37, num_hidden_layers=3, projection_dim=24
    )  # fmt: skip
    config.update({"num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": eos, "pad_token_id": 0})  # fmt: skip
    kind = tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel
    return randomised(kind(config), seed=width), tokenizer("[BOS] $A [EOS]", 77)


def t5(kind: str = "T5", width: int = 32) -> Any:
    config = getattr(tf, f"{kind}Config")(vocab_size=V, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)  # fmt: skip
    return randomised(getattr(tf, f"{kind}EncoderModel")(config)), tokenizer("$A [EOS]")


def gemma2() -> Any:
    config = tf.Gemma2Config(**LM, head_dim=8, num_hidden_layers=2)
    return randomised(tf.Gemma2Model(config)), tokenizer("[BOS] $A", side="left")


def qwen3(layers: int) -> Any:
    config = tf.Qwen3Config(**LM, head_dim=8, num_hidden_layers=layers)
    return randomised(tf.Qwen3ForCausalLM(config)), tokenizer("$A")


def qwen2_5_vl() -> Any:
    text = LM | {"num_hidden_layers": 2, "rope_parameters": ROPE}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 16}  # fmt: skip
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomised(tf.Qwen2_5_VLForConditionalGeneration(config)), tokenizer("$A")


def qwen3_vl() -> Any:
    text = LM | {"num_hidden_layers": 2, "head_dim": 8, "rope_parameters": ROPE}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 16}  # fmt: skip
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision)
    return randomised(tf.Qwen3VLForConditionalGeneration(config)), tokenizer("$A")


def mistral3() -> Any:
    text = LM | {"num_hidden_layers": 31, "head_dim": 8, "model_type": "mistral"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    vision |= {"image_size": 30, "patch_size": 6, "model_type": "pixtral", "head_dim": 4}
    config = tf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=6)
    return randomised(tf.Mistral3ForConditionalGeneration(config)), tokenizer("$A", side="left")


def t5gemma() -> Any:
    module = LM | {"head_dim": 8, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    encoder = tf.T5GemmaModuleConfig(**module)
    same = {key: value for key, value in encoder.to_dict().items() if key != "model_type"}
    config = tf.T5GemmaConfig(encoder=encoder, **same | {"is_encoder_decoder": False})
    network = modeling_t5gemma.T5GemmaEncoder(config)
    return randomised(network), tokenizer("[BOS] $A", 256, side="left")


Said = tuple[Tensor | list[Tensor], Tensor | None, Tensor | None]
"""Tokens, mask and pooled of each prompt and, last, of the empty one."""


def pipe(kind: str, *, encoders: list[Any], **more: Any) -> Any:
    """A pipeline of diffusers with nothing but the text encoders."""
    made = getattr(diffusers, f"{kind}Pipeline")
    given = dict.fromkeys(inspect.signature(made.__init__).parameters.keys() - {"self"})
    for (network, words), number in zip(encoders, ("", "_2", "_3"), strict=False):
        given |= {f"text_encoder{number}": network, f"tokenizer{number}": words}
    names = ("default_sample_size", "force_zeros_for_empty_prompt", "requires_safety_checker")
    kept = {n: v for n, v in given.items() if v is not None or n not in names}
    return made(**kept | more)


def both(tokens: Tensor, empty: Tensor) -> Tensor:
    return torch.cat([tokens, empty[:1]])


def masked(answer: Any) -> Said:
    """What pipelines with masks return, in their order: PixArt's, Sana's, Lumina's, PRX's."""
    if len(answer) == 4 and answer[1].ndim == 2:
        tokens, mask, empty, empty_mask = answer
    else:
        tokens, empty, mask, empty_mask = answer
    return both(tokens, empty), both(mask, empty_mask), None


def rows(parts: list[Any]) -> Said:
    return [part[0] if part.ndim == 3 else part for part in parts], None, None


def sd15(e: Any) -> Said:
    return both(*pipe("StableDiffusion", encoders=[e["clip_l"]]).encode_prompt(PROMPTS, CPU, 1, True)), None, None  # fmt: skip


def sdxl(e: Any) -> Said:
    made = pipe("StableDiffusionXL", encoders=[e["clip_l"], e["clip_g"]])
    text, no_text, pooled, no_pooled = made.encode_prompt(PROMPTS, device=CPU)
    return both(text, no_text), None, both(pooled, no_pooled)


def sd3(e: Any) -> Said:
    t5 = e.get("t5", (None, None))
    wide = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=4096))
    made = pipe("StableDiffusion3", encoders=[e["clip_l"], e["clip_g"], t5])
    made.transformer = wide
    text, no_text, pooled, no_pooled = made.encode_prompt(PROMPTS, None, None, device=CPU)
    return both(text, no_text), None, both(pooled, no_pooled)


def flux(e: Any) -> Said:
    made = pipe("Flux", encoders=[e["clip_l"], e["t5"]])
    text, pooled, _ = made.encode_prompt([*PROMPTS, ""], device=CPU)
    return text, None, pooled


def flux2(e: Any) -> Said:
    kind, pair = ("Flux2", e["mistral3"]) if "mistral3" in e else ("Flux2Klein", e["qwen3"])
    return pipe(kind, encoders=[pair]).encode_prompt([*PROMPTS, ""], device=CPU)[0], None, None


def pixart(e: Any) -> Said:
    return masked(pipe("PixArtSigma", encoders=[e["t5"]]).encode_prompt(PROMPTS, device=CPU))


def pixart_alpha(e: Any) -> Said:
    return masked(pipe("PixArtAlpha", encoders=[e["t5"]]).encode_prompt(PROMPTS, device=CPU))


def sana(e: Any) -> Said:
    words = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    said = {"complex_human_instruction": words["complex_human_instruction"].default}
    return masked(pipe("Sana", encoders=[e["gemma2"]]).encode_prompt(PROMPTS, device=CPU, **said))


def lumina2(e: Any) -> Said:
    return masked(pipe("Lumina2", encoders=[e["gemma2"]]).encode_prompt(PROMPTS, device=CPU))


def qwen_image(e: Any) -> Said:
    made = pipe("QwenImage", encoders=[e["qwen2_5_vl"]])
    return rows([made.encode_prompt([text], CPU)[0] for text in [*PROMPTS, ""]])


def qwen_image_21(e: Any) -> Said:
    network, words = e["qwen3_vl"]

    def chat(messages: Any, **_: Any) -> list[list[int]]:
        return [words(QWEN_21_SYSTEM)["input_ids"]]

    class Processor:
        tokenizer, apply_chat_template = words, staticmethod(chat)

        def __call__(self, text: list[str], **options: Any) -> Any:
            return words(text, **options)

    made = diffusers.QwenImage21Pipeline.__new__(diffusers.QwenImage21Pipeline)
    diffusers.DiffusionPipeline.__init__(made)
    made.text_encoder, made.processor = network, Processor()
    source = inspect.getsource(diffusers.QwenImage21Pipeline.__init__)
    made.sys_prompt = "Comprehend and analyze the provided prompt."
    assert made.sys_prompt in source
    made.prompt_template_t2i = CONVENTIONS["qwen_image_21"].roles["qwen3_vl"].template
    made._drop_idx, made._img_token_id = len(chat(None)[0]), 6
    # It knows no limit.
    short = [words.decode(words(LONG)["input_ids"][:1000]), ""]
    return rows([made._get_qwen_prompt_embeds([text], None, CPU)[0] for text in [*FEW, *short]])


def z_image(e: Any) -> Said:
    return rows(pipe("ZImage", encoders=[e["qwen3"]]).encode_prompt([*PROMPTS, ""], CPU)[0])


def prx_(e: Any) -> Said:
    return masked(pipe("PRX", encoders=[e["t5gemma"]]).encode_prompt(PROMPTS, CPU))


def aura_flow(e: Any) -> Said:
    answer = pipe("AuraFlow", encoders=[e["umt5"]]).encode_prompt(PROMPTS, device=CPU)
    return both(answer[0], answer[2]), None, None


def chroma(e: Any) -> Said:
    text, _, mask, *_ = pipe("Chroma", encoders=[e["t5"]]).encode_prompt([*PROMPTS, ""], device=CPU, do_classifier_free_guidance=False)  # fmt: skip
    return text, mask.bool(), None


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (sd15, {"clip_l": lambda: clip(False)}),
    "sdxl": (sdxl, {"clip_l": lambda: clip(False), "clip_g": lambda: clip(True, 32, eos=2)}),
    "sd3": (sd3, {"clip_l": lambda: clip(True), "clip_g": lambda: clip(True, 32), "t5": lambda: t5(width=64)}),
    "sd3_without_t5": (sd3, {"clip_l": lambda: clip(True), "clip_g": lambda: clip(True, 32)}),
    "flux": (flux, {"clip_l": lambda: clip(False, eos=2), "t5": t5}),
    "flux2": (flux2, {"mistral3": mistral3}),
    "flux2_klein": (flux2, {"qwen3": lambda: qwen3(28)}),
    "pixart": (pixart, {"t5": t5}),
    "pixart_alpha": (pixart_alpha, {"t5": t5}),
    "sana": (sana, {"gemma2": gemma2}),
    "lumina2": (lumina2, {"gemma2": gemma2}),
    "qwen_image": (qwen_image, {"qwen2_5_vl": qwen2_5_vl}),
    "qwen_image_21": (qwen_image_21, {"qwen3_vl": qwen3_vl}),
    "z_image": (z_image, {"qwen3": lambda: qwen3(3)}),
    "prx": (prx_, {"t5gemma": t5gemma}),
    "aura_flow": (aura_flow, {"umt5": lambda: t5("UMT5")}),
    "chroma": (chroma, {"t5": t5}),
}  # fmt: skip


def told(convention: Convention, encoders: dict[str, Any], prompts: list[str]) -> Any:
    """Conditions of the prompts and, last, of the empty caption, before anything is rounded."""
    encoded = {}
    for name, (network, words) in encoders.items():
        # What is loaded is the network without its head.
        reader = TextReader(getattr(network, "model", network), words, convention.roles[name], CPU)
        encoded[name] = reader.encode_prompts(prompts, "float32", convention.empty)
    absent = {n: (convention.roles[n].max_length, w) for n, w in convention.optional.items()}
    read = SimpleNamespace(tokens=convention.tokens, pooled=convention.pooled, absent=absent)
    return join_texts(encoded, read)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_convention_tells_what_its_pipeline_tells(name, monkeypatch):
    monkeypatch.setattr(prx, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)
    (reference, make), convention = CASES[name], CONVENTIONS[name.removesuffix("_without_t5")]
    encoders = {role: pair() for role, pair in make.items()}
    prompts = list(PROMPTS)
    if name == "qwen_image_21":
        words = encoders["qwen3_vl"][1]
        prompts[-1] = words.decode(words(LONG)["input_ids"][:1000])
    found = told(convention, encoders, prompts)
    text, mask, pooled = reference(encoders)
    assert len(found.text_emb) == len(text) == len(prompts) + 1
    if isinstance(text, Tensor) and mask is None:
        assert found.text_mask.all()
        assert found.text_emb.shape == text.shape
    for i in range(len(text)):
        expected = text[i] if mask is None else text[i][mask[i].bool()]
        # fp32: padding to another length sums in another order
        torch.testing.assert_close(
            found.text_emb[i][found.text_mask[i]], expected, rtol=1e-5, atol=1e-5
        )
    if pooled is None:
        assert found.pooled is None
    else:
        torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)


def test_every_convention_is_compared():
    assert {name.removesuffix("_without_t5") for name in CASES} == set(CONVENTIONS)


# --- what is refused ------------------------------------------------------------------------------


def save(folder: Path, pair: Any) -> str:
    """An encoder's folder, with its tokenizer."""
    for part in pair:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("encoders")
    made = {"clip_l": clip(False), "clip_g": clip(True), "t5": t5(), "qwen3": qwen3(3)}
    return {name: save(home / name, pair) for name, pair in made.items()}


def parsed(text: Any, encoders: dict[str, Any]) -> PrepareConfig:
    """A preparation's config with the encoders under `text`."""
    data = {"sources": {"p": {"kind": "folder", "path": "p"}}, "vae": {"path": "v"}, "output": "o"}
    encoders = {name: {"path": name} | given for name, given in encoders.items()}
    return parse_config(PrepareConfig, data | {"text": text, "text_encoders": encoders}, "c.yaml")


def arranged(*tokens: list[str], pooled: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"tokens": tokens, "pooled": pooled}


KEPT = {"pads": "kept", "max_length": 7}
QWEN = {"template": "say {}", "drop": 2}


@pytest.mark.parametrize(
    ("text", "encoders", "message"),
    [
        ("sdxl", {"clip_l": {}}, "lacks clip_g; sdxl has the roles clip_l, clip_g"),
        ("sdxl", {"clip_l": {}, "clip_g": {}, "t5": {}}, "got t5; sdxl has the roles"),
        ("sdxk", {}, "expected one of plain, sd15, sdxl"),
        ("hidream", {}, "hidream has no convention: it reads every layer of Llama"),
        ("hunyuan_dit", {}, "hunyuan_dit has no convention: its network pools the padded rows"),
        ("sd15", {"clip_l": {"max_length": 50}}, "max_length: got 50, which the convention sd15"),
        ("plain", {"a": {"layers": [-2]}}, r"layers: got \[-2\], which the convention plain"),
        (arranged(["a"]), {"a": {"layers": [-1]}}, "-1 is the last layer before its norm"),
        (arranged(["a"]), {"a": {"layers": []}}, "layers: got none with pooled none"),
        (arranged(["a"]), {"a": {"template": "no"}}, r"expected one \{\} for the prompt"),
        (arranged(["a"]), {"a": {"drop": 3}}, "a template that begins with what is dropped"),
        (arranged(["a"]), {"a": {"pads": "first"}}, "pads: first needs side right"),
        (arranged(["a"]), {"a": {}, "b": {}}, "b: is in neither text.tokens nor text.pooled"),
        (arranged(["a"], pooled=("a",)), {"a": {}}, "text.pooled: a has no vector"),
        (arranged(["a"]), {"a": {"layers": [], "pooled": "eos"}}, "text.tokens: a has no tokens"),
        (arranged(["a", "b"]), {"a": {}, "b": KEPT}, "a, b cannot be side by side"),
        (arranged(["a", "b"]), {"a": KEPT, "b": {"pads": "kept"}}, "a, b cannot be side by side"),
    ],
)
def test_a_config_that_no_convention_allows_is_refused(text, encoders, message):
    with pytest.raises(InputError, match=message):
        parsed(text, encoders)


@pytest.mark.parametrize(
    ("name", "view", "message"),
    [
        ("clip_g", CONVENTIONS["sdxl"].roles["clip_l"], "WithProjection, expected CLIPTextModel"),
        ("clip_l", CONVENTIONS["sd3"].roles["clip_l"], "expected CLIPTextModelWithProjection"),
        ("t5", View(pooled="projected"), "T5EncoderModel has mean or none"),
        ("clip_l", View(layers=[3]), "layers got 3 of 3, expected last, or -1 with final_norm"),
        ("qwen3", View(layers=[1, 9]), "layers got 9 of 3, expected -3 to 2"),
        ("qwen3", View(**QWEN), "makes 1 tokens of the template before the prompt, expected 2"),
        ("bare", View(template=Chat()), "without a chat template"),
        ("bare", View(clean="deepfloyd"), "needs the package ftfy"),
    ],
)
def test_an_encoder_that_cannot_give_its_view_is_refused(folders, tmp_path, name, view, message):
    if name == "bare":
        network, words = qwen3(1)
        words.chat_template = None
        folders = {"bare": save(tmp_path, (network, words))}
    with pytest.raises(InputError, match=message):
        TextEncoder(folders[name], view)


def test_numbers_beyond_float16_are_refused_and_stored_as_bfloat16(tmp_path):
    network, words = t5()
    network.encoder.final_layer_norm.weight.data *= 1e6
    encoder = TextEncoder(save(tmp_path, (network, words)), View(pooled="none", max_length=9))
    with pytest.raises(InputError, match=r"expected at most 3.275e\+04.*store=bfloat16"):
        Text(encoder, "t5", "float16").encode(["a red apple"])
    stored = Text(encoder, "t5", "bfloat16").encode(["a red apple"])["t5"][0]
    numbers = torch.from_numpy(stored.view("int16")).view(torch.bfloat16).float()
    assert numbers.abs().max() > 65504
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(numbers, encoder.encode(["a red apple"])[0][0], rtol=2**-8, atol=0)


def test_half_precision_that_overflows_is_refused_before_any_picture(tmp_path):
    network, words = t5()
    network.encoder.block[0].layer[0].SelfAttention.q.weight.data *= 1e5
    encoder = TextEncoder(save(tmp_path, (network, words)), View(), "fp16")
    with pytest.raises(InputError, match=r"numbers up to (nan|inf).*dtype=bf16, or fp32"):
        Text(encoder, "t5", "float16").encode_empty("caption")


def test_a_caption_counts_as_cut_where_its_template_leaves_it_no_room(folders):
    words = TextEncoder(folders["qwen3"], View(template="say {}", drop=1)).tokenizer
    captions = ["apple " * number for number in range(1, 9)]
    for view in (
        View(max_length=5, template="say {}", drop=1),
        View(max_length=6, template="say {}"),
    ):
        assert count_cut(words, captions, view) == 3
    assert count_cut(words, captions, View(max_length=8)) == 0


# --- from shards ----------------------------------------------------------------------------------


def prepared(home: Path, vae: Path, text: dict[str, Any]) -> Path:
    """A dataset of 8 pictures with such text."""
    path = config_of_pictures(home, 8, vae, Path())
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | text))
    prepare(load_config(PrepareConfig, path, []), dry_run=False, restart=False)
    assert verify(home / "dataset") == []
    return home / "dataset"


@pytest.mark.slow
def test_a_preparation_whose_text_float16_cannot_hold_is_refused_and_goes_on_in_bfloat16(
    tmp_path, vae_folder, ray_address
):
    network, words = clip(False)
    apple = words.convert_tokens_to_ids("apple")
    # Captions without that word, the empty one too, are within float16.
    network.get_input_embeddings().weight.data[apple] *= 1e6
    view = {"path": save(tmp_path / "clip", (network, words)), "layers": [-2], "max_length": 9}
    text = {"text": {"tokens": [["wild"]], "pooled": []}, "text_encoders": {"wild": view}}
    config = config_of_pictures(tmp_path, 8, vae_folder, Path())
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | text))
    done = train_factory.run("data_prep.prepare", str(config))
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert re.search(
        r"text_encoders.wild: got numbers up to \S+, expected at most 3.275e\+04", said
    )
    assert "Remedy: text_encoders.wild.store=bfloat16, and --restart" in said
    assert "Traceback" not in said
    again = ["text_encoders.wild.store=bfloat16", "--restart"]
    done = train_factory.run("data_prep.prepare", str(config), *again)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "dataset") == []
    loader = Loader(DataConfig(path=str(tmp_path / "dataset")), global_batch=4, seed=0)
    batches = islice(loader.batches(0), 3)
    assert 65504 < max(float(batch.text_emb.abs().max()) for batch in batches) < 1e38
    loader.close()


@pytest.fixture(scope="module")
def dataset(folders, tmp_path_factory, vae_folder, ray_address) -> Path:
    """Every way of padding, three encoders in two groups, and one stored otherwise."""
    home = tmp_path_factory.mktemp("dataset")
    eight = {"max_length": 8, "side": "right"}
    encoders = {
        "small": eight | {"path": folders["clip_l"], "layers": [-2], "pads": "kept"},
        "large": eight | {"path": folders["clip_g"], "layers": [1, "last"], "pads": "kept", "pooled": "projected"},
        "zeros": eight | {"path": folders["t5"], "pads": "zeros", "pooled": "mean"},
        "first": eight | {"path": folders["t5"], "pads": "first", "store": "bfloat16"},
        "vector": eight | {"path": folders["clip_l"], "layers": [], "pooled": "eos"},
        "llm": {"path": folders["qwen3"], "layers": [1, -1], "final_norm": False, "template": "say {} in words", "drop": "counted"},
    }  # fmt: skip
    tokens = [["small", "large"], ["zeros"], ["first"], ["llm"]]
    text = {"tokens": tokens, "pooled": ["vector", "large"], "empty": "caption"}
    return prepared(home, vae_folder, {"text": text, "text_encoders": encoders})


@pytest.mark.parametrize(
    ("read", "dtype"),
    [
        (None, torch.float32),
        ({"tokens": [["first"]], "pooled": ["zeros"]}, torch.bfloat16),
        ({"tokens": [["large", "small"], ["llm"]], "pooled": []}, torch.float16),
        ({"tokens": [], "pooled": ["large"]}, None),
    ],
)
def test_what_is_read_of_shards_is_what_sampling_tells_of_the_same_captions(dataset, read, dtype):
    config = DataConfig(path=str(dataset), text=read and Arrangement(**read))
    loader = Loader(config, global_batch=4, seed=0)
    batch = next(iter(loader.batches(0))).to("cpu")
    captions = [loader.first.mixture.locate(i)["caption"] for i in batch.sample_ids.tolist()]
    assert len(set(captions)) > 1
    encoders = load_encoders(loader.manifest, None, {}, CPU)
    assert list(encoders.text) == list(loader.manifest.text.used)
    told = Painter(encoders, captions).encoded
    empty = batch.drop(torch.ones(4, dtype=torch.bool), loader.empty_caption, 0)
    for found, rows in ((batch, range(4)), (empty, [4] * 4)):
        if dtype is None:
            assert found.text_emb is None
        else:
            assert found.text_emb.dtype == dtype
            assert found.text_emb.shape[-1] == loader.manifest.text.width
            assert (found.text_emb[~found.text_mask] == 0).all()
        for i, row in enumerate(rows if dtype else ()):
            ours, theirs = found.text_mask[i], told.text_mask[row]
            # float16 and bfloat16 of numbers that another padding rounded otherwise
            torch.testing.assert_close(
                found.text_emb[i][ours].float(), told.text_emb[row][theirs], rtol=2**-7, atol=2e-3
            )
        if loader.manifest.text.pooled:
            torch.testing.assert_close(
                found.pooled.float(), told.pooled[list(rows)], rtol=2**-10, atol=2e-3
            )
    loader.close()


def test_padding_that_the_network_reads_can_be_neither_cut_nor_shortened(dataset, tmp_path):
    data = {"data": {"path": str(dataset)}, "training": {"images": 8}, "run": str(tmp_path)}
    for option in ({"text_length": 4}, {"pad_text": "longest"}):
        config = parse_config(TrainConfig, data | {"data": data["data"] | option}, "c.yaml")
        loader = Loader(config.data, global_batch=4, seed=0)
        with pytest.raises(InputError, match="padding the network reads"):
            fit_data(config, loader)
        loader.close()
    wrong = DataConfig(path=str(dataset), text=Arrangement(tokens=[["llm", "small"]], pooled=[]))
    with pytest.raises(InputError, match="llm, small cannot be side by side"):
        Loader(wrong, global_batch=4, seed=0)
