"""The recipe's side of a student: where its weights, its tokenizer and its adapters come from."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator

from distill_llm.core.component import Component
from distill_llm.core.example import Target
from distill_llm.models.cut_spec import Cut


class LoraSpec(Component):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), through peft."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    modules: tuple[str, ...] | Literal["all_linear", "by_architecture"] = Field(
        default="all_linear",
        description="names of layers; all_linear: every linear layer but the head; by_architecture: those that peft "
        "names for the model's architecture, in most the attention's query and value",
    )
    dora: bool = Field(
        default=False, description="learn magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)"
    )
    rank_stabilized: bool = Field(
        default=False,
        description="scale by alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023, arXiv:2312.03732)",
    )


class FreshTokenizer(Component):
    """A tokenizer trained on the recipe's own training text; no download."""

    kind: Literal["words", "bytes_bpe"] = Field(
        default="bytes_bpe", description="words: one token a word and punctuation mark; bytes_bpe: byte-level BPE"
    )
    vocab_size: int = Field(default=4096, ge=64)


class Prefixes(Component):
    """What stands before the input, so that one model knows which target is asked of it."""

    label: str = "predict: "
    rationale: str = "explain: "
    rationale_then_label: str = "reason: "

    @model_validator(mode="after")
    def _distinct(self) -> Prefixes:
        if len({text.rstrip() for text in (self.label, self.rationale, self.rationale_then_label)}) < len(
            type(self).model_fields
        ):
            raise ValueError("two targets have the same prefix: the student could not tell them apart")
        return self

    def of(self, target: Target) -> str:
        return getattr(self, target)


class PictureSpec(Component):
    """What a model sees in place of text: black letters on white, or the example's own image."""

    source: Literal["text", "data"] = Field(
        default="text", description="text: the input is drawn; data: each example brings its image (`fields.picture`)"
    )
    width: int = Field(default=384, gt=0, le=4096, description="pixels")
    height: int = Field(default=384, gt=0, le=4096, description="pixels; what does not fit below is cut, and counted")
    font: str = Field(
        default="outline",
        min_length=1,
        description="outline: the one that Pillow brings, ASCII alone; fixed: Pillow's bitmap font, 6 x 11 pixels a "
        "character, Latin-1 alone; or a font file",
    )
    font_size: int = Field(default=16, ge=4, le=512, description="of an outline font, in pixels")


Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
PrefixSide = Literal["encoder", "decoder"]
Bits = Literal["full", "8bit", "4bit"]
HubConfig: TypeAlias = dict[str, JsonValue]
"""A Hugging Face model config: open by nature, checked against the config class of its ``model_type``."""


class StudentSpec(Component):
    """A model from the Hub or a folder (`model`), or a fresh one (`config`, with a `model_type`)."""

    model: str = Field(default="", description="Hub id or folder")
    config: HubConfig = Field(default_factory=dict, description="a fresh model: model_type and its sizes")
    revision: str = Field(default="main", description="branch, tag or commit on the Hub")
    cut: Cut | None = Field(default=None, description="a smaller model out of `model`; absent: all of it")
    fresh: bool = Field(
        default=False, description="draw the weights anew: `model`, with its `cut`, gives the sizes alone"
    )
    tokenizer: str | FreshTokenizer = Field(
        default="", description="Hub id, folder, or one to be trained; empty: the model's own"
    )
    lora: LoraSpec | None = Field(default=None, description="absent: all weights are trained")
    load_in: Bits = Field(
        default="full",
        description="8bit (int8) and 4bit (nf4) quantize the base below its adapters, through bitsandbytes "
        "(QLoRA, Dettmers et al. 2023, arXiv:2305.14314)",
    )
    prefixes: Prefixes = Prefixes()
    prefix_side: PrefixSide = Field(
        default="encoder",
        description="decoder: the prefix begins what the decoder reads, so that one pass of the encoder serves all "
        "targets of an example; encoder-decoder students only",
    )
    attention: Attention = Field(
        default="auto", description="how attention is computed while it is trained; auto: as transformers chooses"
    )
    chat: bool = Field(default=False, description="wrap the input in the tokenizer's chat template")
    picture: PictureSpec | None = Field(
        default=None, description="it reads a picture of the input (vision-encoder-decoder models); absent: text"
    )

    @model_validator(mode="after")
    def _one_source(self) -> StudentSpec:
        if bool(self.model) == bool(self.config):
            raise ValueError(
                "give either `model` (a Hub id or folder) or `config` (a fresh model with a model_type), not both or "
                "neither. To replace one by the other on the command line: student.model=... student.config={}"
            )
        if self.config and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` needs a `model_type`, such as t5 or llama")
        if self.config and self.lora is not None:
            raise ValueError("`lora` on a fresh model would freeze random weights: remove `lora` or give a `model`")
        if self.config and self.tokenizer == "":
            raise ValueError(
                "a fresh model needs a `tokenizer`: a Hub id, a folder, or one to be trained ({kind: words})"
            )
        if self.load_in != "full" and self.lora is None:
            raise ValueError(
                f"`load_in: {self.load_in}` keeps the weights as they are, so that nothing would be trained. Add "
                "`lora: {rank: 16}`, or remove `load_in`"
            )
        if self.prefix_side == "decoder" and self.chat:
            raise ValueError("`prefix_side: decoder` is for encoder-decoder students, `chat` for decoder-only ones")
        self._cut_fits()
        self._pictures_fit()
        return self

    @property
    def measures(self) -> bool:
        """Whether its cut has to be measured on data before it can be made."""
        return self.cut is not None and self.cut.measures and not self.fresh

    def in_size(self) -> StudentSpec:
        """A student of the same sizes that needs no measurement: for what does not look at the weights."""
        if self.cut is None or not self.measures:
            return self
        return self.model_copy(update={"cut": self.cut.model_copy(update={"by": "first"})})

    def whole(self, **changes: object) -> StudentSpec:
        """The student with other weights to start from, which are taken as they are."""
        return self.model_copy(update={"cut": None, "fresh": False, **changes})

    def _cut_fits(self) -> None:
        for key in ("cut", "fresh"):
            if not getattr(self, key):
                continue
            if self.config:
                raise ValueError(f"`{key}` is for a `model`: a fresh one (`config`) has the sizes that it is given")
            if self.lora is not None:
                raise ValueError(
                    f"`{key}` with `lora`: the adapters would be saved without the base that they belong to, which "
                    "lies nowhere. Train all weights, or cut in one recipe and put adapters on its model in the next"
                )
            if self.picture is not None:
                raise ValueError(f"`{key}` is for students that read text: remove it, or `picture`")

    def _pictures_fit(self) -> None:
        sees = self.config.get("model_type") == "vision-encoder-decoder"
        if self.config and sees != (self.picture is not None):
            raise ValueError(
                "a fresh model reads pictures if it is a vision-encoder-decoder, and text otherwise: "
                + ("add `picture`" if sees else "remove `picture`, or change config.model_type")
            )
        if self.picture is None:
            return
        if self.lora is not None or self.chat:
            raise ValueError("`lora` and `chat` are for students that read text: remove them, or `picture`")
        if self.picture.source == "data" and self.prefix_side == "encoder":
            raise ValueError(
                "the prefix that tells what to write cannot be drawn into the data's own pictures: set "
                "prefix_side: decoder"
            )
