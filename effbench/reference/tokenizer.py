"""The reference family's tokenizer: one word, one token, in the closed vocabulary of the synthetic world."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from effbench.reference import CONTEXT
from effbench.reference.lexicon import SPECIAL


def build_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space, puts `<bos>` before a text, and joins words by single spaces."""
    pad, bos, eos, unknown = SPECIAL
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
