"""Layer by layer: a model of 300M parameters is compressed in little more memory than it takes itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World

SPARE = 1.5e9
"""Bytes beside the weights: interpreter, libraries, hidden states, one block's inputs, Hessians."""
HIDDEN = 128 * 2048 * 1024 * 2
"""Of these, the hidden states of the papers' calibration, 128 sequences of 2048 tokens 1024 wide in bfloat16."""

APPLY = """
import json, sys
import numpy as np
from effbench import models
from effbench.data import Data
from effbench.measure.memory import peak_bytes
from effbench.registry import parse

class Words:
    def training(self, count, length, seed):
        return np.random.default_rng(seed).integers(3, 1024, (count, length))

folder, pipeline = sys.argv[1:]
system = models.load(folder, "bfloat16")
loaded = peak_bytes()
for technique in parse(pipeline):
    system = technique.apply(system, Data(Words(), system.context, load=None))
print(json.dumps([loaded, peak_bytes()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A random Llama on disk, and the bytes of its parameters."""
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=2048,
        initializer_range=0.03,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    build_tokenizer(World().vocabulary).save_pretrained(path)
    return path, sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["wanda:samples=1", "sparsegpt:samples=1", "svd_llm:samples=1"])
def test_the_peak_is_the_models_bytes_and_little_more(folder: tuple[Path, int], pipeline: str) -> None:
    """With one sequence, for time's sake; what hidden states of as many as in the papers would add is taken off."""
    path, weights = folder
    assert weights > 2 * 300e6
    done = subprocess.run([sys.executable, "-c", APPLY, path, pipeline], capture_output=True, text=True, check=True)
    loaded, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"{pipeline}: weights {weights / 1e9:.3f} GB, loaded {loaded / 1e9:.3f}, peak {peak / 1e9:.3f}")
    assert peak < weights + SPARE - HIDDEN
