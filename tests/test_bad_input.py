"""What every quantizer does with input that is wrong or empty: a sentence, or numbers that are finite."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibrated, logits, random_system
from torch import nn

from effbench.data import Data, FileSource
from effbench.errors import TechniqueError, UnfitError
from effbench.registry import entries, get, parse
from effbench.technique import LayerTechnique, System
from effbench.toolbox.walk import matrices

QUANTIZERS = sorted(name for name, entry in entries().items() if entry.family == "quantization")
OPTIONS = {name: {field.name for field in fields(get(name))} for name in QUANTIZERS}  # type: ignore[arg-type]
CALIBRATED = [name for name in QUANTIZERS if "samples" in OPTIONS[name]]


def pipeline(name: str) -> str:
    """With few samples, where it reads any."""
    return f"{name}:samples=2" if name in CALIBRATED else name


def ready(name: str, system: System) -> System:
    """`system`, or the test skipped where a package is missing."""
    reason = parse(name)[0].unfit(system)
    if reason and "is not installed" in reason:
        pytest.skip(reason)
    return system


@pytest.mark.parametrize("bits", [0, 9])
@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "bits" in OPTIONS[name]])
def test_bits_that_there_are_not_are_named(name: str, bits: int) -> None:
    with pytest.raises(TechniqueError, match=f"bits must .*got {bits}"):
        parse(f"{name}:bits={bits}")


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "group_size" in OPTIONS[name]])
def test_a_group_size_that_does_not_divide_the_width_works_or_is_a_sentence(name: str) -> None:
    system = ready(name, random_system("llama"))
    try:
        technique = parse(f"{name}:group_size=48")[0]
    except TechniqueError as reason:  # only powers of two are known
        assert "group_size must" in str(reason)
        return
    reason = technique.unfit(system)
    if reason is None:
        assert torch.isfinite(logits(calibrated(system, f"{name}:group_size=48"))).all()
    else:
        assert "do not divide into groups of 48" in reason


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rows_of_zeros_and_inputs_that_are_never_used_stay_finite(name: str) -> None:
    system = ready(name, random_system("llama"))
    for matrix, linear in matrices(system.model):
        linear.weight.data[3] = 0
        if matrix.endswith(("q_proj", "up_proj")):
            linear.weight.data[:, 5] = 0
    system.model.model.layers[0].input_layernorm.weight.data[7] = 0  # a dead input of three matrices
    system.model.model.layers[1].mlp.up_proj.weight.data[9] = 0  # and of one
    assert torch.isfinite(logits(calibrated(system, pipeline(name)))).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_not_a_number_names_the_layer(name: str) -> None:
    """In a weight, and by it in the calibration inputs of the matrices behind it."""
    system = ready(name, random_system("llama"))
    system.model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    technique = parse(pipeline(name))[0]
    with pytest.raises(UnfitError, match=r"^model\.layers\.1\.mlp\.(down|up)_proj: .*not .*finite"):
        if reason := technique.unfit(system):
            raise UnfitError(reason)
        calibrated(system, pipeline(name))


@pytest.mark.parametrize("name", CALIBRATED)
def test_text_shorter_than_a_sample_is_read_over_and_over(name: str, tmp_path: Path) -> None:
    """And of one token there is nothing to read, which is a sentence."""
    words, system = tmp_path / "words.txt", random_system("llama")
    word = system.tokenizer.convert_ids_to_tokens(20)
    for count in (9, 1):
        words.write_text(" ".join([word] * count))
        source = FileSource(words, system.tokenizer, words)
        data = Data(source, 64, load=lambda name: pytest.fail(f"asked for {name}"))
        technique: Any = parse(pipeline(name))[0]
        if count > 1:
            assert torch.isfinite(logits(technique.apply(system, data))).all()
        else:
            with pytest.raises(UnfitError, match="the text given is too short"):
                technique.apply(random_system("llama"), data)


def test_one_layer_of_zeros_is_one_of_zeros_again() -> None:
    for name in QUANTIZERS:
        technique: Any = get(name)()
        if not isinstance(technique, LayerTechnique):
            continue
        linear = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.zero_()
        if technique.unfit(random_system("llama")) or technique.unfit_layer(linear):
            continue
        given = torch.randn(64, 128) if name in CALIBRATED else None
        assert (technique.layer(linear, given)(torch.randn(3, 128, dtype=torch.bfloat16)) == 0).all(), name
