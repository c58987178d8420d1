"""Structured pruning beside the released code: what it says of heads, channels and blocks of small models."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from effbench.registry import get
from effbench.toolbox.structure import channels, heads
from effbench.toolbox.walk import blocks

SHAPES = {1: (32, 48, 3, 4), 2: (48, 96, 2, 6), 3: (40, 56, 3, 5)}
"""Width, channels, blocks and heads of each model, by its seed."""

# From running horseee/LLM-Pruner 128a07d on these models, with the dependency groups that it finds itself: its
# `TaylorImportance` (group_reduction "sum"), summed over the rows of a head as `MetaPruner.prune_local` does. Of the
# first and the last block: the first three heads and the sum of all, the first three channels and the sum of all.
IMPORTANCE = {
    (1, "vector"): (
        ("2.194404e+00", "1.881146e+00", "1.819203e+00", "7.788633e+00"),
        ("4.036176e-02", "5.522294e-02", "1.963188e-02", "2.606797e+00"),
        ("3.443977e-01", "2.479991e-01", "3.279900e-01", "1.156960e+00"),
        ("7.181859e-03", "2.528102e-02", "5.089772e-02", "1.345714e+00"),
    ),
    (1, "param_first"): (
        ("7.465868e+00", "7.627173e+00", "8.590300e+00", "3.243298e+01"),
        ("3.708726e-01", "1.851075e-01", "1.853867e-01", "1.417771e+01"),
        ("1.465733e+00", "1.205736e+00", "1.490429e+00", "5.442245e+00"),
        ("5.800710e-02", "7.262397e-02", "1.261566e-01", "5.298759e+00"),
    ),
    (2, "vector"): (
        ("8.336984e-01", "7.254834e-01", "7.665103e-01", "5.309689e+00"),
        ("2.727799e-02", "3.889224e-03", "1.502689e-02", "4.424466e+00"),
        ("4.680505e-01", "2.869110e-01", "3.900976e-01", "2.239979e+00"),
        ("1.019556e-02", "4.325921e-03", "2.836853e-02", "2.428868e+00"),
    ),
    (2, "param_first"): (
        ("5.185266e+00", "6.066193e+00", "5.292599e+00", "3.638936e+01"),
        ("1.768545e-01", "2.103356e-01", "1.276709e-01", "2.142825e+01"),
        ("1.954915e+00", "1.646872e+00", "2.346265e+00", "1.155311e+01"),
        ("1.036883e-01", "1.221626e-01", "1.129160e-01", "1.110766e+01"),
    ),
    (3, "vector"): (
        ("1.296916e+00", "1.455339e+00", "1.276873e+00", "6.736407e+00"),
        ("7.487579e-02", "1.690679e-01", "1.572263e-02", "3.416378e+00"),
        ("3.711604e-01", "2.080954e-01", "1.831679e-01", "1.272381e+00"),
        ("1.893954e-02", "2.286929e-02", "1.369582e-02", "1.230982e+00"),
    ),
    (3, "param_first"): (
        ("6.618341e+00", "7.993466e+00", "7.116914e+00", "3.532156e+01"),
        ("2.608847e-01", "5.119714e-01", "2.247479e-01", "1.738900e+01"),
        ("1.247225e+00", "1.189422e+00", "1.037177e+00", "6.080611e+00"),
        ("1.398693e-01", "9.115563e-02", "1.428950e-01", "5.907336e+00"),
    ),
}
# From `block_influence` of sramshetty/ShortGPT 78d9615, fed what each block of these models is fed and gives.
INFLUENCE = {
    1: (8.9559805e-01, 3.0849415e-01, 2.2760123e-01),
    2: (9.2131114e-01, 3.1577513e-01),
    3: (9.1417718e-01, 3.3827713e-01, 2.1312079e-01),
}


def model_and_text(seed: int) -> tuple[Any, Tensor]:
    """A Llama whose weights are drawn in the order of their names, and token ids (4, 32)."""
    width, inner, depth, count = SHAPES[seed]
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=count,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).float().eval()
    random = np.random.RandomState(seed)
    for _, weight in sorted(model.named_parameters()):
        drawn = random.standard_normal(weight.shape)
        drawn = 1 + 0.3 * drawn if weight.ndim == 1 else drawn * 1.5 / np.sqrt(weight.shape[1])
        weight.data = torch.from_numpy(drawn).float()
    return model, torch.from_numpy(random.randint(0, 97, (4, 32)))


@pytest.mark.parametrize(("seed", "kind"), sorted(IMPORTANCE))
def test_heads_and_channels_are_as_important_as_the_released_code_says(seed: int, kind: str) -> None:
    model, ids = model_and_text(seed)
    module: Any = __import__("sys").modules[get("llm_pruner").__module__]
    scores = module.taylor(model, ids, vector=kind == "vector")
    found = []
    for block in (blocks(model)[1][0], blocks(model)[1][-1]):
        for units in (heads(block), channels(block)):
            important = module.importance(block, units, scores)
            found.append([*important[:3].tolist(), float(important.sum())])
    for values, published in zip(found, IMPORTANCE[seed, kind], strict=True):
        assert values == pytest.approx([float(value) for value in published], rel=1e-5)


@pytest.mark.parametrize("seed", sorted(INFLUENCE))
def test_blocks_have_the_influence_that_the_released_code_says(seed: int) -> None:
    model, ids = model_and_text(seed)
    module: Any = __import__("sys").modules[get("shortgpt").__module__]
    assert module.block_influence(model, ids) == pytest.approx(INFLUENCE[seed], rel=1e-6)
