"""What the tests share: small random models of several architectures, and where the real data lie."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from effbench.coverage import ARCHITECTURES  # noqa: E402
from effbench.data import Data, WorldSource  # noqa: E402
from effbench.reference.tokenizer import build_tokenizer  # noqa: E402
from effbench.reference.world import World  # noqa: E402
from effbench.registry import parse  # noqa: E402
from effbench.technique import System  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real text and a real checkpoint, beside the repository where there are any."""

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen3")
"""Architectures on which a technique's own claims are tested; `effbench.coverage` has small models of all."""


def random_model(architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A small model with random weights."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=dtype).eval()


def random_system(architecture: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> System:
    """The same as a dense system with the synthetic world's tokenizer."""
    return System.dense(random_model(architecture, dtype, seed), build_tokenizer(World().vocabulary))


def applied(system: System, pipeline: str) -> System:
    """`system` after a pipeline whose techniques all fit it and need no text."""
    data = Data(None, context=64, load=lambda name: pytest.fail(f"asked for {name}"))
    for technique in parse(pipeline):
        assert technique.unfit(system) is None
        system = technique.apply(system, data)
    return system


def calibrated(system: System, pipeline: str, context: int = 64) -> System:
    """`system` after a pipeline whose techniques all fit it and read the synthetic world's text."""
    data = Data(WorldSource(system.tokenizer), context, load=lambda name: pytest.fail(f"asked for {name}"))
    for technique in parse(pipeline):
        assert technique.unfit(system) is None
        system = technique.apply(system, data)
    return system


def logits(system: System) -> torch.Tensor:
    """What the model itself says to two rows of twelve tokens."""
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        found: torch.Tensor = system.model(input_ids=ids).logits.float()
    return found


@pytest.fixture(params=FAMILIES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture that has to work."""
    name: str = request.param
    return name


@pytest.fixture
def stories() -> tuple[Path, Path]:
    """A real checkpoint's folder and a file of real stories."""
    model, text = SHARED / "models" / "TinyStories-656K", SHARED / "text" / "tinystories_train_ascii.jsonl"
    if not (model.is_dir() and text.is_file()):
        pytest.skip("the real checkpoint and stories are not beside this repository")
    return model, text
