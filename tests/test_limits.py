"""The machine's limits, the work that is held against them, and what a row makes of both."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import applied, random_system
from synthetic_records import record

from effbench import cli
from effbench.measure import limits, roofline
from effbench.measure.derived import rows
from effbench.measure.limits import Limits, Work
from effbench.measure.memory import stored_bytes
from effbench.measure.speed import ideal
from effbench.measure.work import count
from effbench.technique import System
from effbench.toolbox.walk import matrices

LIMITS = Limits("cpu", 2, {2**20: 100e9, 2**28: 10e9}, {"float32": 1e9, "bfloat16": 4e9}, "2026-01-01", 0.1)
PROMPT = torch.arange(3, 23).view(1, 20)


def expected_bytes(system: System, held: float) -> float:
    """What a token needs by hand: all weights but the embedding's table, of which one row, and the cache."""
    table = system.model.get_input_embeddings().weight
    tied = system.model.get_output_embeddings().weight is table
    row = table.shape[1] * table.dtype.itemsize
    return stored_bytes(system) - (0 if tied else table.nbytes) + row + held


def mean_cache(system: System, lengths: list[int]) -> float:
    config = system.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * size * next(system.model.parameters()).dtype.itemsize
    return each * sum(lengths) / len(lengths)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_work_of_a_token_is_what_can_be_computed_by_hand(kind: str) -> None:
    system = random_system(kind)
    prefill, decode = count(system, PROMPT, 5)
    held = [20 + place for place in range(1, 5)]  # the cache behind each of the four passes after the first token
    expected = expected_bytes(system, mean_cache(system, held))
    table = system.config.max_position_embeddings + 2  # learned in opt, and one row of it is read
    positions = 0 if kind == "llama" else -(table - 1) * 64 * 2
    assert decode.bytes == pytest.approx(expected + positions, rel=1e-3)
    weights = sum(linear.weight.numel() for _, linear in matrices(system.model))
    products = 2 * (weights + system.model.get_output_embeddings().weight.numel())
    attention = 4 * system.config.num_hidden_layers * system.config.hidden_size * sum(held) / len(held)
    assert decode.operations["bfloat16"] == pytest.approx(products + attention, rel=0.01)
    assert decode.operations.get("float32", 0) < 1e-3 * products  # of positions, in some versions of transformers
    assert prefill.operations["bfloat16"] == pytest.approx(20 * 2 * weights, rel=0.5)
    assert decode.bytes < prefill.bytes + 4096 < decode.bytes + 2 * 20 * 64 * 2 + 4096


def test_a_packed_layer_needs_fewer_bytes_and_the_same_operations() -> None:
    dense, packed = random_system("llama"), applied(random_system("llama"), "rtn:bits=8")
    _, before = count(dense, PROMPT, 3)
    _, after = count(packed, PROMPT, 3)
    assert sum(after.operations.values()) == pytest.approx(sum(before.operations.values()), rel=1e-3)
    assert before.bytes - after.bytes == pytest.approx(stored_bytes(dense) - stored_bytes(packed), rel=1e-6)


def test_what_a_draft_does_counts_too() -> None:
    system = random_system("llama")
    alone, _ = count(system, PROMPT, 4)
    plain = system.generate

    def with_draft(system: System, ids: torch.Tensor, new_tokens: int) -> object:
        system.parts["draft"](input_ids=ids[:, :1], use_cache=False)
        return plain(system, ids, new_tokens)

    system.parts["draft"] = copy.deepcopy(system.model)
    system.generate = with_draft
    together, _ = count(system, PROMPT, 4)
    assert together.bytes - alone.bytes == pytest.approx(expected_bytes(random_system("llama"), 0), rel=1e-6)


def test_counting_leaves_the_model_as_it_was() -> None:
    system = random_system("llama")
    count(system, PROMPT, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in system.model.modules())


def test_the_least_time_is_that_of_bytes_or_of_operations_whichever_is_longer() -> None:
    assert LIMITS.bandwidth(2**21) == 100e9 and LIMITS.bandwidth(100) == 100e9 and LIMITS.bandwidth(2**30) == 10e9
    moving = Work(1e9, {"bfloat16": 1e6})
    assert LIMITS.least_seconds(moving) == pytest.approx(0.1)
    computing = Work(1e6, {"bfloat16": 4e9, "float16": 1e9})  # float16 was not measured: as float32
    assert LIMITS.least_seconds(computing) == pytest.approx(2.0)


def test_limits_are_measured_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "BLOCKS", dict.fromkeys(("cpu", "cuda"), (2**12, 2**16)))
    monkeypatch.setattr(limits, "SIDES", dict.fromkeys(("cpu", "cuda"), 32))
    monkeypatch.setattr(limits, "TRIES", 2)
    threads = torch.get_num_threads()
    assert limits.known("cpu", 1) is None
    assert cli.main(["doctor"]) == 0
    assert "limits        not measured; effbench doctor --measure" in capsys.readouterr().out
    assert cli.main(["doctor", "--measure"]) == 0
    said = capsys.readouterr().out
    assert "copies GB/s" in said and "bfloat16" in said
    one = limits.known("cpu", 1)
    assert one is not None and set(one.copy_bytes_per_second) == {2**12, 2**16}
    assert min(*one.copy_bytes_per_second.values(), *one.operations_per_second.values()) > 0
    assert torch.get_num_threads() == threads
    assert limits.known("cpu", 999) is None
    limits.path_of("cpu").write_text('[{"device": 1}]')
    assert limits.known("cpu", 1) is None


def test_a_row_shows_its_share_of_the_roofline_or_why_not() -> None:
    row = record("dense")
    row.put("decode_seconds_per_token", 0.4)
    row.put("prefill_seconds", 2.0)
    (found,) = rows([row])
    assert "decode_roofline_share" not in found.values  # it was measured before there was such a column
    row.put("decode_bytes_per_token", None, "its work could not be counted")
    (found,) = rows([row])
    assert "could not be counted" in found.missing["decode_roofline_share"]
    row.provenance["work"] = {
        "decode": {"bytes": 1e9, "operations": {"float32": 10.0}},
        "prefill": {"bytes": 1e9, "operations": {"float32": 1e9}},
    }
    (found,) = rows([row])
    assert "effbench doctor --measure" in found.missing["decode_roofline_share"]
    row.provenance["limits"] = {**vars(LIMITS), "copy_bytes_per_second": {"1048576": 100e9, "268435456": 10e9}}
    (found,) = rows([row])
    assert found.values["decode_roofline_share"] == pytest.approx(0.25)
    assert found.values["prefill_roofline_share"] == pytest.approx(0.5)


def test_idealized_time_is_the_table_between_its_lengths_and_the_slope_after() -> None:
    row = record("dense")
    row.samples["idealized_prompt_tokens"] = [32, 64, 128]
    row.samples["idealized_prefill_seconds"] = [1.0, 2.0, 6.0]
    row.samples["idealized_slope"] = [0.5]
    assert roofline.idealized(row, 64, 1) == 2.0
    assert roofline.idealized(row, 96, 3) == pytest.approx(4.0 + 1.0)
    assert roofline.idealized(row, 256, 1) == pytest.approx(14.0) and roofline.idealized(row, 16, 1) == 0.5


def test_a_run_without_noise_is_as_long_as_its_fastest_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    noise = iter([0.5, 0.0, 0.9] * 9)
    monkeypatch.setattr("effbench.measure.speed.time.perf_counter", lambda: clock[0])
    system = random_system("llama")

    def generate(system: System, ids: torch.Tensor, new_tokens: int) -> None:
        clock[0] += 0.01 * ids.shape[1] + 0.2 * (new_tokens - 1) + next(noise)

    system.generate = generate
    table, slope = ideal(system, PROMPT, 11)
    assert table == pytest.approx({5: 0.05, 10: 0.1, 20: 0.2}) and slope == pytest.approx(0.2)
