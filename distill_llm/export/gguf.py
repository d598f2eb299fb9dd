"""One file for llama.cpp and all that is built on it: weights, config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from distill_llm.core.errors import ExportError
from distill_llm.export.base import Answering, Format, Writer
from distill_llm.export.in_torch import written_by

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel

FILE = "model.gguf"
_BLOCK = 32  # weights that share a scale in q8_0
_QWEN3_HEAD = 128
_FAMILIES = ("llama", "qwen2", "qwen3")
_INSTEAD = "llama.cpp's own convert_hf_to_gguf.py knows more models: docs/shipping.md has the command"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5  # kinds of tokens (llama.cpp, llama_token_type)
_PROBES = (
    " who pays more ?",
    " it's 1234.5 (ann's), isn't it",
    " a  b\n\n c\td",
    " Grüße, naïve — 日本",
    " x=3*(y+10)//2",
)
"""Texts that tokenizers cut differently. Each begins with a space: some put one before a text, llama.cpp does not."""


class Gguf(Format):
    """Llama, Qwen2 and Qwen3 with a byte-level BPE tokenizer, in one file for llama.cpp; q8_0 has weights of 8 bits."""

    packages = ("gguf", "transformers.integrations.gguf")
    runtime: ClassVar[str] = "transformers, of the file alone"
    weights = ("*.gguf",)
    kind: Literal["gguf"] = "gguf"
    variant: Literal["float32", "float16", "q8_0"] = "float32"

    def why_not(self, model: Any, tokenizer: Any) -> str:
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        why = ""
        if config.model_type not in _FAMILIES:
            why = f"a {config.model_type} is none of {', '.join(_FAMILIES)}"
        elif rope.get("rope_type", "default") != "default":
            why = f"its positions are scaled ({rope['rope_type']})"
        elif config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
            why = "its layers have biases"
        elif config.model_type == "qwen3" and config.head_dim != _QWEN3_HEAD:
            why = f"its heads are not {_QWEN3_HEAD} wide, as transformers takes those of a Qwen3 file to be"
        elif getattr(config, "use_sliding_window", False):
            why = "its attention has a sliding window"
        elif self.variant == "q8_0" and any(part.size(-1) % _BLOCK for part in model.parameters() if part.dim() > 1):
            why = f"{self.variant} needs widths that are multiples of {_BLOCK}"
        else:
            why = _why_no_tokenizer(tokenizer)
        return f"{why}; {_INSTEAD}" if why else ""

    def write(self, student: LoadedModel, folder: Path) -> None:
        import gguf

        config = student.model.config
        architecture = getattr(gguf.MODEL_ARCH, config.model_type.upper())
        writer = gguf.GGUFWriter(str(folder / FILE), gguf.MODEL_ARCH_NAMES[architecture])
        _add_sizes(writer, config)
        _add_tokenizer(writer, student.tokenizer, config.vocab_size)
        kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[kinds[self.variant]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, weight in _named(student.model, gguf.get_tensor_name_map(architecture, config.num_hidden_layers)):
            if self.variant == "q8_0" and weight.ndim > 1:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
            else:  # what has one axis stays in full precision: llama.cpp wants that of norms
                writer.add_tensor(name, weight.astype(np.float16) if self._halves(weight) else weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _must_cut_alike(student.tokenizer, _read_tokenizer(folder))

    def open(self, folder: Path, answering: Answering) -> Writer:
        from transformers import AutoModelForCausalLM

        # It makes full weights of the file's: answers are llama.cpp's but for its order of sums, the speed is not.
        model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=FILE, dtype="float32")
        return written_by(model, _read_tokenizer(folder), answering)

    def _halves(self, weight: np.ndarray) -> bool:
        return self.variant == "float16" and weight.ndim > 1


def _add_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """The vocabulary, filled up to the rows that the model has, merges, special tokens, and the chat template."""
    core = _core(tokenizer)
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for token, number in core["model"]["vocab"].items():
        tokens[number], kinds[number] = token, _NORMAL
    for added in core["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    # What is not said would be token 11, an ordinary one.
    writer.add_bos_token_id(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _named(model: Any, names: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight under llama.cpp's name; of a Llama, rows of queries and keys lie where its rotation expects them."""
    config = model.config
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ExportError(f"format gguf: llama.cpp has no name for the weight '{name}'; {_INSTEAD}.")
        rows = weight.float()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # It turns neighbours, transformers turns one half of a head with the other.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = rows.view(heads, 2, -1, rows.size(1)).transpose(1, 2).reshape(rows.shape)
        yield renamed, rows.numpy()


def _why_no_tokenizer(tokenizer: Any) -> str:
    core = _core(tokenizer)
    kind = core["model"]["type"] if core else type(tokenizer).__name__
    if kind != "BPE" or "ByteLevel" not in json.dumps(core["pre_tokenizer"]):
        return f"its tokenizer is no byte-level BPE ({kind})"
    if core.get("normalizer") is not None:
        return "its tokenizer changes the text before it cuts it"
    return "" if _pre_tokenizer(tokenizer) else "its tokenizer cuts texts to words in a way that has no name in GGUF"


def _core(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer as what its file says; empty for one in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


def _pre_tokenizer(tokenizer: Any) -> str:
    """GGUF's name for how a text is cut to words; "" where it has none that is known here."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    found = _core(tokenizer)["pre_tokenizer"]
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt-2"
    if len(steps) != 2 or steps[0]["type"] != "Split" or steps[1].get("use_regex", True):
        return ""
    split = steps[0]["pattern"].get("Regex", "")
    return next((name for name, known in GGUF_PRE_TOKENIZER_SPLITS.items() if known == split), "")


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), gguf_file=FILE)


def _must_cut_alike(tokenizer: Any, read_back: Any) -> None:
    for text in _PROBES:
        ours, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, read_back))
        if ours != theirs:
            raise ExportError(
                f"format gguf: the file's tokenizer cuts {text!r} to {theirs}, the student's to {ours}; {_INSTEAD}."
            )
