"""SliceGPT beside the released code: the same outputs of small models whose stream was cut."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from golden_layer import agrees
from torch import Tensor

from effbench.data import Data
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World
from effbench.registry import get
from effbench.technique import System

SHAPES = {1: (32, 48, 2, 4), 2: (48, 96, 3, 6), 3: (64, 56, 1, 2)}
"""Width, channels, blocks and heads of each model, by its seed."""
WIDTHS = {1: (24, 16), 2: (40, 24), 3: (48, 8)}
"""How wide the stream is left."""

# From running microsoft/TransformerCompression 6b12cde on these models: `fuse_modules`, then `rotate_and_slice` with a
# `ConstSlicingScheduler` of these widths that slices the head, too.
CASES = {
    1: ("1.844558e-01", "5.172307e-01"),
    2: ("1.092501e-01", "5.622497e-01"),
    3: ("1.786266e-02", "7.481412e-01"),
}


def model_and_text(seed: int) -> tuple[Any, Tensor]:
    """A Llama whose weights are drawn in the order of their names, and token ids (6, 32).

    Embeddings have a mean of zero, which the released code takes off for each model, needed or not; and the stream
    has some directions that are larger than others.
    """
    width, inner, depth, count = SHAPES[seed]
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=count,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).float().eval()
    random = np.random.RandomState(seed)
    for name, weight in sorted(model.named_parameters()):
        drawn = random.standard_normal(weight.shape)
        drawn = 1 + 0.3 * drawn if weight.ndim == 1 else drawn / np.sqrt(weight.shape[1])
        if name.endswith("embed_tokens.weight"):
            drawn = drawn * np.exp(random.standard_normal(width))
            drawn -= drawn.mean(1, keepdims=True)
        weight.data = torch.from_numpy(drawn).float()
    return model.requires_grad_(False), torch.from_numpy(random.randint(0, 97, (6, 32)))


def difference(model: Any, dense: Tensor, ids: Tensor) -> float:
    """The squared difference of the logits from those of the dense model, relative to these squared."""
    missed = model(input_ids=ids).logits.double() - dense.double()
    return float(missed.square().sum() / dense.double().square().sum())


class Text:
    """The calibration text is the one that both are compared on."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids.numpy()

    def training(self, count: int, length: int, seed: int) -> np.ndarray:
        return self.ids


@pytest.mark.parametrize("seed", sorted(CASES))
def test_a_cut_stream_says_what_it_says_in_the_released_code(seed: int) -> None:
    for narrow, published in zip(WIDTHS[seed], CASES[seed], strict=True):
        model, ids = model_and_text(seed)
        dense = model(input_ids=ids).logits
        system = System.dense(model, build_tokenizer(World().vocabulary))
        technique = get("slicegpt")(sliced=1 - narrow / SHAPES[seed][0], samples=len(ids))
        source: Any = Text(ids)
        cut = technique.apply(system, Data(source, ids.shape[1], load=lambda name: pytest.fail(name)))
        assert agrees(difference(cut.model, dense, ids), published, 1e-4)
