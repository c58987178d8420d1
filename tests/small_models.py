"""Random models of several architectures, small enough to be built in each test."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from effbench.technique import System

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
MODELS = {
    "llama": GATED,
    "qwen3": {**GATED, "head_dim": 16},
    "gpt2": SMALL,
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "mistral": {**GATED, "sliding_window": 24},
    "gptj": {**SMALL, "rotary_dim": 4},
    "cohere": GATED,
    "gemma3_text": {
        **GATED,
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def build(kind: str = "llama", seed: int = 0, words: int = VOCABULARY, **options: object) -> System:
    """A model in float32 whose weights are large enough for attention to be sharp, and its next token neither certain
    nor uniform; its tokenizer knows so many words."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**MODELS[kind], **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    known = {"<unk>": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, "<unk>")), unk_token="<unk>")
    return System.dense(model, tokenizer)
