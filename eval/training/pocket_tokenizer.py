"""The whitespace tokenizer over the words that a pocket model knows: one word, one token."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scout_hf.eval.pocket import vocabulary as vocab


def words() -> list[str]:
    """The vocabulary in order of token id: `vocab.SIZE` distinct words, the special ones first."""
    return [word for group in vocab.GROUPS for word in group]


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
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
