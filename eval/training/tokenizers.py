"""The tokenizers: words of the pocket models, one token each, and a byte-level BPE for any text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scout_hf.eval.pocket import vocabulary as vocab

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
# Words with the space before them, numbers digit by digit, line ends with the indentation that follows them.
_PIECES = r"\r?\n[ \t]*|[ ]?[A-Za-z_]+|[ ]?\d|[ ]?[^\sA-Za-z_\d]+|[^\S\n]+"


def build_text_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """`VOCABULARY` tokens learnt from `texts`, with which decoding gives every text back; pads on the left."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def words() -> list[str]:
    """The vocabulary in order of token id: `vocab.SIZE` distinct words, the special ones first."""
    return [word for group in vocab.GROUPS for word in group]


def build_pocket_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A whitespace tokenizer: one word, one token, nothing added, padding on the left, as `generate()` needs."""
    ids = {word: index for index, word in enumerate(words())}
    core = Tokenizer(models.WordLevel(ids, unk_token=vocab.UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=vocab.PAD,
        unk_token=vocab.UNKNOWN,
        bos_token=vocab.BEGIN,
        eos_token=vocab.END,
        padding_side="left",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
