"""How diffusers' pipelines tell their networks of a prompt: text conventions, which are data alone.

A view is what is kept of a text encoder's states; a convention names a view for each role, and says how the
network reads the roles together. Each equals the encode_prompt of its pipeline in diffusers 0.42.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

from pydantic import Field

from models.config import Config, InputError

Store = Literal["float16", "bfloat16", "int8"]
SCALE_BYTES = 2
"""A token in int8 ends with its scale, float16."""


def width_stored(store: Store, dim: int) -> int:
    """Numbers of a stored token of width `dim`."""
    return dim + SCALE_BYTES * (store == "int8")


class Chat(Config):
    """The prompt as a message in a chat, by the tokenizer's own template, which writes the special tokens."""

    system: str | None = None
    parts: bool = False
    """Each content is a list of parts, as in templates of models that also read pictures."""
    thinking: bool | None = None
    prompt: bool = False
    """Ends where the model's answer would begin."""


class View(Config):
    """Which states of a text encoder are stored, and of which text. The defaults are convention `plain`."""

    family: str | None = None
    """The class of transformers that it must be; null: any."""
    layers: list[int | Literal["last"]] = ["last"]
    """States that are put side by side: `last` as the network gives it, or a layer, before any final norm."""
    final_norm: bool = False
    """Puts layers given by number through the network's final norm."""
    clean: Literal["none", "lower_strip", "deepfloyd", "no_img", "space_if_empty"] = "none"
    template: str | Chat | None = None
    """Text with {} for the prompt; or a chat."""
    drop: int | str = 0
    """Tokens of the template that are not kept: a number, which is checked; `counted`, all before the {}; or those of
    a text with which it begins."""
    keep_first: bool = False
    """Keeps the first and the last one of the dropped tokens, as Sana does."""
    max_length: int = Field(default=77, ge=1)
    """Tokens kept, at most."""
    side: Literal["right", "left", "tokenizer"] = "tokenizer"
    """Where padding goes."""
    mask_inside: bool = True
    """Whether the encoder is told which tokens are padding."""
    pads: Literal["masked", "zeros", "kept", "first"] = "masked"
    """Rows of padding: masked, zeros that are not masked, as encoded and not masked, or one as encoded."""
    pooled: Literal["own", "projected", "eos", "mean", "none"] = "own"
    """CLIP's own, projected or not; the mean over the real tokens; none; or CLIP's own where it is, else the mean."""

    @property
    def prefix(self) -> str:
        """The text in front of the prompt, whose tokens may be dropped."""
        if isinstance(self.drop, str) and self.drop != "counted":
            return self.drop
        return self.template.split("{}")[0] if isinstance(self.template, str) else ""

    def refusals(self) -> Iterator[str]:
        text = self.template if isinstance(self.template, str) else None
        if -1 in self.layers and "final_norm" not in self.model_fields_set:
            yield "layers: -1 is the last layer before its norm. Remedy: say last, or final_norm too"
        if not self.layers and self.pooled in ("mean", "none"):
            yield f"layers: got none with pooled {self.pooled}, so that nothing is stored"
        if text is not None and text.count("{}") != 1:
            yield f"template: got {text!r}, expected one {{}} for the prompt"
        if self.drop and not (text and text.startswith(self.prefix)):
            yield "drop: expected a template that begins with what is dropped"
        if self.keep_first and not self.drop:
            yield "keep_first: has no effect without drop"
        if self.pads in ("zeros", "first") and self.side != "right":
            yield f"pads: {self.pads} needs side right, got {self.side}"


class Arrangement(Config):
    """How a network reads the roles."""

    tokens: list[list[str]]
    """Roles one after another; those of an inner list are side by side, narrower ones padded with zeros."""
    pooled: list[str]
    """Roles whose vectors are put side by side."""

    @property
    def names(self) -> list[str]:
        """The roles that are read."""
        return list(dict.fromkeys([*chain(*self.tokens), *self.pooled]))

    def check(self, views: dict[str, View]) -> None:
        """Raise InputError where it does not suit these roles."""
        for name in self.names:
            if name not in views:
                raise InputError(
                    f"text: got {name}, expected some of {', '.join(views) or 'no role'}"
                )
        for group in self.tokens:
            lengths = {views[name].max_length for name in group}
            if len(group) > 1 and (len(lengths) > 1 or any(not fixed(views[n]) for n in group)):
                raise InputError(
                    f"text.tokens: {', '.join(group)} cannot be side by side. Remedy: pads kept or zeros, and one max_length"
                )
            if lost := [name for name in group if not views[name].layers]:
                raise InputError(f"text.tokens: {lost[0]} has no tokens, its layers being []")
        if lost := [name for name in self.pooled if views[name].pooled == "none"]:
            raise InputError(f"text.pooled: {lost[0]} has no vector, its pooled being none")


class Combination(Arrangement):
    """A convention of one's own: how a network reads the encoders, each of which says its view."""

    empty: Literal["caption", "zeros", "bare"] = "caption"
    """What a caption without words is: encoded as any other, zeros, or encoded without the template."""


class Convention(Combination):
    """What a pipeline of diffusers does."""

    roles: dict[str, View]
    optional: dict[str, int] = {}
    """Roles that may be missing, whose rows are then zeros of this width."""


def fixed(view: Any) -> bool:
    """Whether the network reads max_length rows of every caption, none of them masked."""
    return view.pads in ("kept", "zeros")


def rows_stored(view: Any, tokens: int) -> int:
    """How many rows are stored of a caption of so many tokens."""
    more = {"kept": view.max_length, "first": tokens + 1}
    return min(more.get(view.pads, tokens), view.max_length)


CLIP: dict[str, Any] = {"max_length": 77, "side": "right", "mask_inside": False, "pads": "kept"}
CLIP_L = View(family="CLIPTextModel", layers=[-2], pooled="none", **CLIP)
CLIP_G = View(family="CLIPTextModelWithProjection", layers=[-2], pooled="projected", **CLIP)
T5: dict[str, Any] = {"family": "T5EncoderModel", "side": "right", "pooled": "none"}
T5_KEPT: dict[str, Any] = T5 | {"mask_inside": False, "pads": "kept"}
GEMMA: dict[str, Any] = {"family": "Gemma2Model", "side": "right", "pooled": "none"}
FLUX2_SYSTEM = """You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object
attribution and actions without speculation."""
SANA_INSTRUCTION = """Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:
User Prompt: """  # fmt: skip
LUMINA2 = "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on textual prompts or user prompts. <Prompt Start> {}"
QWEN = "<|im_start|>system\n{system}<|im_end|>\n"
QWEN_REST = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QWEN_SYSTEM = QWEN.format(
    system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"
)
QWEN_21_SYSTEM = QWEN.format(system="Comprehend and analyze the provided prompt.")


def _single(name: str, empty: Any = "caption", **view: Any) -> Convention:
    """A convention of one role without a vector."""
    said: dict[str, Any] = {"pooled": "none", **view}
    return Convention(tokens=[[name]], pooled=[], empty=empty, roles={name: View(**said)})


CONVENTIONS = {
    "sd15": _single("clip_l", family="CLIPTextModel", **CLIP),
    "sdxl": Convention(
        tokens=[["clip_l", "clip_g"]], pooled=["clip_g"], empty="zeros",
        roles={"clip_l": CLIP_L, "clip_g": CLIP_G},
    ),
    "sd3": Convention(
        tokens=[["clip_l", "clip_g"], ["t5"]], pooled=["clip_l", "clip_g"], optional={"t5": 4096},
        roles={"clip_l": CLIP_G, "clip_g": CLIP_G, "t5": View(max_length=256, **T5_KEPT)},
    ),
    "flux": Convention(
        tokens=[["t5"]], pooled=["clip_l"],
        roles={
            "clip_l": View(family="CLIPTextModel", layers=[], pooled="eos", **CLIP),
            "t5": View(max_length=512, **T5_KEPT),
        },
    ),
    "flux2": _single(
        "mistral3", family="Mistral3Model", layers=[10, 20, 30], clean="no_img",
        template=Chat(system=FLUX2_SYSTEM, parts=True), max_length=512, pads="kept",
    ),
    "flux2_klein": _single(
        "qwen3", family="Qwen3Model", layers=[9, 18, 27],
        template=Chat(thinking=False, prompt=True), max_length=512, pads="kept",
    ),
    "pixart_alpha": _single("t5", clean="lower_strip", max_length=120, **T5),
    "pixart": _single("t5", clean="lower_strip", max_length=300, **T5),
    "sana": _single(
        "gemma2", "bare", clean="lower_strip", template=SANA_INSTRUCTION + "{}", drop="counted",
        keep_first=True, max_length=300, **GEMMA,
    ),
    "lumina2": _single("gemma2", "bare", layers=[-2], template=LUMINA2, max_length=256, **GEMMA),
    "qwen_image": _single(
        "qwen2_5_vl", family="Qwen2_5_VLModel", template=QWEN_SYSTEM + QWEN_REST, drop=34,
        max_length=1024,
    ),
    # The pipeline knows no limit.
    "qwen_image_21": _single(
        "qwen3_vl", family="Qwen3VLModel", layers=[-1], final_norm=False, clean="space_if_empty",
        template=QWEN_21_SYSTEM + QWEN_REST, drop=QWEN_21_SYSTEM, max_length=1024, side="left",
    ),
    "z_image": _single(
        "qwen3", family="Qwen3Model", layers=[-2], template=Chat(thinking=True, prompt=True),
        max_length=512,
    ),
    "prx": _single("t5gemma", family="T5GemmaEncoder", clean="deepfloyd", max_length=256),
    "aura_flow": _single("umt5", family="UMT5EncoderModel", max_length=256, side="right", pads="zeros"),
    "chroma": _single("t5", max_length=512, pads="first", **T5),
}  # fmt: skip
REFUSED = {
    "hunyuan_dit": "its network pools the padded rows of T5 as well",
    "hidream": "it reads every layer of Llama, 32 MiB of each caption",
}


def combination(text: str | Combination, views: dict[str, View]) -> Combination:
    """What `text` says of roles with these views; raises InputError where they do not fit it."""
    if text == "plain":
        return Combination(
            tokens=[[name] for name, view in views.items() if view.layers],
            pooled=[name for name, view in views.items() if view.pooled != "none"],
        )
    if isinstance(text, str):
        named = CONVENTIONS[text]
        missing = named.roles.keys() - views.keys() - named.optional.keys()
        strange = views.keys() - named.roles.keys()
        if missing or strange:
            what = f"lacks {min(missing)}" if missing else f"got {min(strange)}"
            raise InputError(
                f"text_encoders: {what}; {text} has the roles {', '.join(named.roles)}"
            )
        return named
    text.check(views)
    if unused := views.keys() - text.names:
        raise InputError(f"text_encoders.{min(unused)}: is in neither text.tokens nor text.pooled")
    return text


def own_view(text: str | Combination, name: str, given: View) -> View:
    """The view of a role, which a named convention decides; raises InputError where `given` says another."""
    said = {
        field: getattr(given, field) for field in View.model_fields.keys() & given.model_fields_set
    }
    if not isinstance(text, str):
        return View.model_validate({"pooled": "none"} | said)
    if text == "plain":
        fixed_by = View.model_fields.keys() - {"max_length", "pooled"}
        named = View(max_length=given.max_length, pooled=given.pooled)
    else:
        fixed_by, named = View.model_fields.keys(), CONVENTIONS[text].roles.get(name, View())
    for field in sorted(fixed_by & said.keys()):
        if said[field] != getattr(named, field):
            raise InputError(
                f"text_encoders.{name}.{field}: got {said[field]!r}, which the convention {text} decides. Remedy: remove "
                "it, or spell out text: {tokens: [...], pooled: [...]}"
            )
    return named
