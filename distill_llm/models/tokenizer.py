"""Tokenizers trained on the spot, for fresh models and for machines without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill_llm.models.spec import FreshTokenizer

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def train_tokenizer(spec: FreshTokenizer, texts: Iterable[str]) -> Any:
    """A fast tokenizer of at most ``vocab_size`` entries; ``</s>`` ends every encoded text that asks for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, UNKNOWN]
    if spec.kind == "words":
        core = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(
            vocab_size=spec.vocab_size, special_tokens=special, show_progress=False
        )
    else:
        core = Tokenizer(models.BPE(unk_token=UNKNOWN))
        # A word that begins a text gets the token that it has inside one: an answer can be copied from the input.
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    core.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # or `model.generate(**tokenizer(text))` is refused
    )


class AnyWords:
    """Stands for a tokenizer that is not there yet, where a model's words do not matter."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None

    def __len__(self) -> int:
        return 2
