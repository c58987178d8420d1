"""What applying says of bits: the promise, what is realised of it, and of how much of the model."""

import pytest
import torch
import transformers
from conftest import applied, calibrated, random_system

from effbench.coverage import LLAMA
from effbench.jobs.applying import Before, _record_size, promised_bits
from effbench.measure.derived import rows
from effbench.registry import parse
from effbench.results import Record
from effbench.suite import Suite
from effbench.technique import System
from effbench.toolbox.kernels import compiled
from effbench.toolbox.stored import remarks
from effbench.toolbox.walk import matrices


@pytest.mark.parametrize(
    ("pipeline", "promises"),
    [
        ("dense", []),
        ("sink_window", []),
        ("rtn:bits=4", [4, 16]),
        ("magnitude:sparsity=0.5", [9, 16]),
        ("magnitude:pattern=2:4", [9, 16]),
        ("svd:keep=0.8+rtn:bits=8", [6.4, 8, 12.8]),
        ("magnitude:sparsity=0.5+rtn:bits=4+sink_window", [3, 4, 9]),
        ("bitnet:packing=1.6", [1.6, 16]),
        ("nf4", [4, 16]),
        ("fp4", [4, 16]),
        ("mx:format=mxfp6_e3m2", [6, 16]),
        ("llm_int8", [8, 16]),
        ("smoothquant", [8, 16]),
        ("quanto:bits=2", [2, 16]),
        ("torchao_int4", [4, 16]),
        ("torchao_int8", [8, 16]),
        ("quarot:bits=3", [3, 16]),
        ("llm_pruner:sparsity=0.2", [12.8, 16]),
        ("shortgpt:sparsity=0.25", [12, 16]),
    ],
)
def test_a_promise_follows_from_the_standard_options(pipeline: str, promises: list[float]) -> None:
    assert promised_bits(parse(pipeline), 16.0) == pytest.approx(promises)


def sized(dense: System, result: System) -> Record:
    """The record of a dense system that became another one."""
    record = Record("custom", "none", "x", 0, Suite().settings, "ok")
    _record_size(record, result, Before(dense))
    return record


def test_an_untouched_model_has_no_changed_weights() -> None:
    record = sized(random_system("llama"), random_system("llama"))
    assert record.values["compressed_share"] == 0 and record.values["bits_per_weight"] is None


def test_one_changed_matrix_is_its_share_of_all_block_weights() -> None:
    changed = random_system("gpt2")
    name, linear = matrices(changed.model)[0]
    linear.weight.data += 1
    record = sized(random_system("gpt2"), changed)
    whole = sum(linear.weight.numel() for _, linear in matrices(changed.model))
    assert record.values["compressed_share"] == pytest.approx(linear.weight.numel() / whole)
    assert record.values["bits_per_weight"] == 16


def test_a_student_of_another_architecture_is_charged_in_full() -> None:
    student = random_system("gpt_neox")
    record = sized(random_system("llama"), student)
    weights = sum(linear.weight.numel() for _, linear in matrices(random_system("llama").model))
    held = sum(linear.weight.numel() for _, linear in matrices(student.model))
    assert record.values["compressed_share"] == 1
    assert record.values["bits_per_weight"] == pytest.approx(16 * held / weights)


@pytest.mark.parametrize("touched", ["self_attn", "mlp.experts"])
def test_experts_count_by_what_was_done_to_them(touched: str) -> None:
    def mixture() -> System:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return System.dense(model, random_system("llama").tokenizer)

    changed = mixture()
    for name, linear in matrices(changed.model):
        if touched in name:
            linear.weight.data += 1
    record = sized(mixture(), changed)
    layer = 64 * (64 + 32 + 32 + 64), 4 * 64 * (256 + 128), 4 * 64  # attention, experts, router
    share = layer[0 if touched == "self_attn" else 1] / sum(layer)
    assert record.values["compressed_share"] == pytest.approx(share)
    assert record.values["bits_per_weight"] == 16


@pytest.mark.parametrize(
    ("pipeline", "realised", "simulated"),
    [
        ("rtn:bits=4", 4.3, False),
        ("rtn:bits=2", 2.5, False),
        ("magnitude:sparsity=0.5", 16.0, True),
        ("magnitude:sparsity=0.5+rtn:bits=4", 4.2, True),
        ("sparsegpt:pattern=2:4+gptq:bits=4", 3.1, False),
        ("svd:keep=0.8+rtn:bits=8", 6.5, False),
    ],
)
def test_bits_that_a_part_of_the_pipeline_would_have_needed_anyway_are_called_simulated(
    pipeline: str, realised: float, simulated: bool
) -> None:
    record = Record("custom", "ref-1m", pipeline, 0, Suite().settings, "ok")
    promises = promised_bits(parse(pipeline), 16.0)
    record.put("promised_bits_per_weight", promises[0])
    record.samples["promised_bits_without_one"] = promises[1:]
    record.put("bits_per_weight", realised)
    assert rows([record])[0].simulated is simulated


@pytest.mark.parametrize(
    ("pipeline", "simulated", "unpacked"),
    [
        ("rtn:bits=4", [], []),
        ("rtn:bits=8", [], []),
        ("rtn:bits=3", [], []),
        ("rtn:bits=3,group_size=16", [], ["codes are unpacked for each product: no kernel suits such rows"]),
        ("magnitude:pattern=2:4+rtn:bits=8", [], ["codes are unpacked for each product: no kernel leaves zeros out"]),
        ("mx", ["no kernel here multiplies mxfp4: it is unpacked"], []),
        (
            "quarot:bits=4,method=rtn,activation_bits=4",
            ["inputs are rounded to 4 bits and multiplied in the model"],
            [],
        ),
        ("smoothquant:samples=2", [], []),
    ],
)
def test_a_system_says_what_it_only_imitates(pipeline: str, simulated: list[str], unpacked: list[str]) -> None:
    if compiled.kernel() is None:
        pytest.skip(f"no compiled kernel: {compiled.absent()}")
    system = calibrated(random_system("llama"), pipeline)
    for kind, expected in (("simulated", simulated), ("unpacked", unpacked)):
        said = remarks(system.model.modules(), kind)
        assert len(said) == len(expected) and all(map(str.startswith, said, expected))


def test_a_matrix_that_blocks_share_takes_its_bits_once() -> None:
    dense = random_system("llama")
    before = Before(dense)
    record = Record("custom", "ref-1m", "fold", 0)
    _record_size(record, calibrated(dense, "fold:sparsity=0,group_size=2"), before)
    assert record.values["bits_per_weight"] == 0  # of the second block's weights, which are gone


def test_without_a_compiler_three_bits_say_so() -> None:
    with compiled.switched_off():
        system = applied(random_system("llama"), "rtn:bits=3")
        assert remarks(system.model.modules(), "unpacked") == [
            "codes are unpacked for each product: it is switched off"
        ]


def test_a_row_that_imitates_is_simulated_though_its_bytes_are_small() -> None:
    record = Record("suite", "model", "mx", 0, status="ok")
    record.put("promised_bits_per_weight", 4.0)
    record.put("bits_per_weight", 4.25)
    assert not rows([record])[0].simulated
    record.provenance["simulated"] = ["no kernel here multiplies mxfp4: it is unpacked for each product"]
    assert rows([record])[0].simulated
