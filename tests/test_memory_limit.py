"""Short of memory: what torch and the system say becomes a status, and a model stays on disk until it is looked at."""

import resource
import sys
from pathlib import Path

import pytest
import torch
import transformers

from effbench.errors import is_out_of_memory
from effbench.mapped import LEAST_BYTES, keep_on_disk
from effbench.toolbox.walk import compress_blocks, replace_module
from effbench.worker import OUT_OF_MEMORY, Workers

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and maps are Linux's")


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("unable to mmap 64 bytes from file <a>: Cannot allocate memory (12)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_all_ways_to_say_that_memory_is_short_are_known(error: BaseException, short: bool) -> None:
    assert is_out_of_memory(error) is short


@linux
def test_a_job_beyond_a_data_limit_ran_out_of_memory_and_the_next_one_works(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, hard))
    try:
        workers = Workers()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        codes = {}
        for size in (1 << 34, 16):
            job = workers.submit("torch:ones", {"size": [size]}, threads=1, log=tmp_path / "log")
            while (ended := workers.collect(timeout=60)) is None:
                pass
            assert ended[0] == job
            codes[size] = ended[1]
    finally:
        workers.close()
    assert codes == {1 << 34: OUT_OF_MEMORY, 16: 0}


def mapped_bytes(folder: Path) -> int:
    """Of this process's memory, what is mapped from files in a folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ends = [[int(place, 16) for place in line[0].split("-")] for line in lines]
    return sum(end - start for start, end in ends)


@linux
def test_a_matrix_that_is_replaced_gives_its_pages_back_and_writing_leaves_the_file_alone(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    torch.manual_seed(0)
    given = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    given.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    keep_on_disk(model, tmp_path)
    for (name, one), other in zip(given.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
    large = [parameter for parameter in model.parameters() if parameter.nbytes > LEAST_BYTES]
    whole = mapped_bytes(tmp_path)
    assert sum(p.nbytes for p in large) <= whole <= sum(p.nbytes + 8192 for p in large)
    with torch.no_grad():
        large[0].add_(1)
    each = 2048 * 512 * 2
    for place in range(2):
        for matrix in ("gate_proj", "up_proj"):
            replace_module(model, f"model.layers.{place}.mlp.{matrix}", torch.nn.Identity())
    del large
    assert whole - mapped_bytes(tmp_path) >= 4 * each
    compress_blocks(model, lambda linear, _: torch.nn.Identity(), None)
    assert mapped_bytes(tmp_path) <= 2 * 1024 * 512 * 2 + 8192 * 2
    assert (tmp_path / "model.safetensors").read_bytes() == content
