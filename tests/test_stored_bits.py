"""Bits of a weight of every quantizer, read from the storages: after a pass, and of a saved and reloaded file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import calibrated, logits
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from effbench import store
from effbench.measure.memory import module_bytes
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World
from effbench.technique import System
from effbench.toolbox.extras import lacks
from effbench.toolbox.kernels.tiles import machine_tile
from effbench.toolbox.walk import matrices

SHAPE = {
    **{"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512},
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4},
}
Bits = Callable[[int, int], float]
"""From outputs m and inputs n to bits of a weight."""


def codes(bits: int, group: int = 0, symmetric: bool = False) -> Bits:
    """Codes with a float16 scale a group, and a zero point of as many bits unless symmetric (specification, 10).

    4 bits are laid out for ATen's kernel where the machine has it: a scale and a zero point of bfloat16.
    """
    each = 32 if bits == 4 and machine_tile() else 16 if symmetric else 16 + bits
    return lambda m, n: bits + each / (group or n)


def per_group(bits: float, each: float, group: int = 0) -> Bits:
    """`bits`, and `each` more for a group."""
    return lambda m, n: bits + each / (group or n)


CASES: dict[str, Bits] = {
    "rtn:bits=8": codes(8),
    "rtn:bits=8,group_size=64": codes(8, 64),
    "rtn:bits=4": codes(4),
    "rtn:bits=4,group_size=32": codes(4, 32),
    "rtn:bits=3": codes(3),
    "rtn:bits=3,group_size=128": codes(3, 128),
    "rtn:bits=2,symmetric=true": codes(2, 0, True),
    "rtn:bits=2,group_size=64": codes(2, 64),
    "gptq:bits=4,samples=2": codes(4),
    "gptq:bits=3,group_size=64,samples=2": codes(3, 64),
    "gptq:bits=2,group_size=32,symmetric=true,samples=2": codes(2, 32, True),
    "gptq:bits=4,group_size=64,act_order=true,static_groups=true,samples=2": codes(4, 64),
    "gptq:bits=3,group_size=64,act_order=true,samples=2": lambda m, n: codes(3, 64)(m, n) + 32 / m,
    "awq:bits=4,group_size=64,samples=2": codes(4, 64),
    "awq:bits=3,samples=2": codes(3),
    "smoothquant:samples=2": per_group(8, 16),
    "hqq:bits=4,group_size=64": per_group(4, 32, 64),
    "hqq:bits=3,group_size=32": per_group(3, 32, 32),
    "hqq:bits=2": per_group(2, 32, 64),
    "quarot:bits=4,samples=2": codes(4, 0, True),
    "quarot:bits=3,method=rtn,group_size=64": codes(3, 64, True),
    "mx:format=mxfp4": per_group(4, 8, 32),
    "mx:format=mxfp8": per_group(8, 8, 32),
    "mx:format=nvfp4": lambda m, n: 4 + 8 / 16 + 32 / (m * n),
    "nf4": per_group(4, 32, 64),
    "nf4:double_quant=true": lambda m, n: 4 + 8 / 64 + 32 / (64 * 256) + 32 / (m * n),
    "fp4:block_size=128": per_group(4, 32, 128),
    "llm_int8": per_group(8, 32),
    "quanto:bits=8": per_group(8, 16),
    "quanto:bits=4,group_size=64": per_group(4, 32, 64),
    "torchao_int8": per_group(8, 32),
    "torchao_int4:group_size=32": per_group(4, 32, 32),
}
LIBRARIES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "llm_int8": "bitsandbytes", "quanto": "optimum.quanto"}


def found_bits(system: System, shapes: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Bits of a weight by the name of the matrix."""
    held: dict[str, nn.Module] = {name: system.model.get_submodule(name) for name in shapes}
    return {name: 8 * module_bytes(module) / (shapes[name][0] * shapes[name][1]) for name, module in held.items()}


@pytest.mark.parametrize("pipeline", CASES)
def test_bits_are_those_of_the_closed_form_after_a_pass_and_from_a_file(pipeline: str, tmp_path: Path) -> None:
    name = pipeline.partition(":")[0]
    library = LIBRARIES.get(name) or ("torchao" if name.startswith("torchao") else None)
    if library and lacks(library, library):
        pytest.skip(f"{library} is not installed")
    config = LlamaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16").eval()
    system = System.dense(model, build_tokenizer(World().vocabulary))
    shapes = {name: tuple(linear.weight.shape) for name, linear in matrices(model)}
    system = calibrated(system, pipeline)
    said = logits(system)
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    assert bool((logits(again) == said).all())
    for one in (system, again):
        for matrix, bits in found_bits(one, shapes).items():
            assert bits == pytest.approx(CASES[pipeline](*shapes[matrix]), rel=1e-3), matrix
