"""The kernel that is compiled of C++: the same numbers as unpacking, everywhere, and never a lock to wait for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from effbench.registry import get
from effbench.toolbox.grid import encode, fit_grid
from effbench.toolbox.kernels import compiled
from effbench.toolbox.kernels.words import pack_masks, pack_words, unpack_masks, unpack_words
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.packing import tile_for


@pytest.fixture
def anew() -> Iterator[None]:
    """What was found out about this machine's compiler is forgotten before and after."""
    compiled._built.cache_clear()
    yield
    compiled._built.cache_clear()


@pytest.fixture(params=["vectors", "portable"])
def kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> compiled.Kernel:
    """The kernel as it is compiled here, and as it would be without AVX-512."""
    found = compiled.kernel()
    if found is None:
        pytest.skip(f"no compiled kernel: {compiled.absent()}")
    if request.param == "portable":
        found = portable(tmp_path_factory)
    elif not found.vectors:
        pytest.skip("this processor has no AVX-512 for bfloat16")
    monkeypatch.setattr(compiled, "kernel", lambda: found)
    monkeypatch.setattr(found, "rows", compiled.ROWS)
    return found


PORTABLE: list[compiled.Kernel] = []


def portable(folders: pytest.TempPathFactory) -> compiled.Kernel:
    if not PORTABLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folders.mktemp("cache")))
            flags = ["-O1", *compiled.FLAGS[1:], "-DEFFBENCH_PORTABLE"]
            PORTABLE.append(compiled._load(compiled._compiler() or "", flags))
    assert not PORTABLE[0].vectors
    return PORTABLE[0]


def random_layer(bits: int, tile: int, group_size: int, zeros: str, out_features: int = 192) -> PackedLinear:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(out_features, 384, generator=generator) - 0.3
    groups = weight.unflatten(1, (-1, group_size or 384))
    scales, middle = fit_grid(groups, bits, symmetric=zeros == "middle", dtype=torch.float16)
    if zeros == "float16":
        middle = middle + 0.25
    codes = encode(groups, scales, middle, bits).flatten(1)
    points = None if zeros == "middle" else middle
    dtype = "codes" if zeros == "middle" else zeros
    return PackedLinear.pack(codes, scales, points, bits, zeros_dtype=dtype, tile=tile)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_and_zero_points_come_back_from_words(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (48, 96), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (3, 48), dtype=torch.uint8, generator=generator)
    packed, masks = pack_words(codes, bits), pack_masks(zeros, bits)
    assert packed.numel() * 8 == codes.numel() * bits and masks.numel() * 8 == zeros.numel() * bits
    assert torch.equal(unpack_words(packed, 48, 96, bits), codes.short())
    assert torch.equal(unpack_masks(masks, 48, bits), zeros)


LAYOUTS = [(2, 16), (3, 16), (4, 16), (4, 32), (4, 64)]


@pytest.mark.parametrize(("bits", "tile"), LAYOUTS)
@pytest.mark.parametrize("group_size", [0, 32, 96])
@pytest.mark.parametrize("zeros", ["codes", "middle", "float16"])
def test_a_product_is_that_of_the_unpacked_weights(
    kernel: compiled.Kernel, bits: int, tile: int, group_size: int, zeros: str
) -> None:
    layer = random_layer(bits, tile, group_size, zeros)
    exact = layer.dequantized()
    assert torch.equal(layer.dequantized(torch.bfloat16), exact.bfloat16())
    for rows in (1, 2, 5, 13):
        x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(rows)).bfloat16()
        expected = x.float() @ exact.T
        # float32 sums, rounded once: half a unit in the last of 8 bits at most, and less in the mean
        assert (layer(x).float() - expected).norm() <= 2**-8.5 * expected.norm()
        if kernel.vectors:
            assert torch.equal(layer(x), kernel.product(x, layer._told(), 192))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(kernel: compiled.Kernel, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(3, 16, 0, "codes"), torch.randn(3, 384).bfloat16()
    alone, weight = layer(x), layer.dequantized(torch.bfloat16)
    monkeypatch.setattr(compiled, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(layer(x), alone) and torch.equal(layer.dequantized(torch.bfloat16), weight)


def test_weights_that_overflow_bfloat16_or_inputs_that_are_not_numbers_stay_such(kernel: compiled.Kernel) -> None:
    layer = random_layer(2, 16, 0, "codes")
    x = torch.ones(2, 384).bfloat16()
    x[1, 7] = float("nan")
    found = layer(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_a_layer_takes_the_layout_that_suits_it() -> None:
    def tile(rows: int, columns: int, bits: int, group_size: int = 0, dtype: torch.dtype = torch.bfloat16) -> int:
        return tile_for(nn.Linear(columns, rows, dtype=dtype), bits, group_size, "float16")

    assert tile(48, 64, 3) == tile(48, 64, 2, 32) == 16
    assert tile(40, 64, 3) == tile(48, 72, 3) == tile(48, 64, 3, 16) == tile(48, 64, 8) == 0
    assert tile(48, 64, 3, dtype=torch.float32) == 0
    assert tile(48, 64, 4) == 16  # no whole tile of ATen's


@pytest.mark.parametrize("bits", [3, 2])
def test_without_a_compiler_it_is_unpacked_and_says_so(
    bits: int, anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = get("rtn")(bits=bits).layer(nn.Linear(96, 64, dtype=torch.bfloat16), None)
    x = torch.randn(2, 96).bfloat16()
    with_kernel = layer(x)
    compiled._built.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.kernel() is None and compiled.absent() == "no C++ compiler no-such-compiler was found"
    torch.testing.assert_close(layer(x), with_kernel, rtol=0.02, atol=0.02)


def script(folder: Path, text: str) -> str:
    """A program in the place of a compiler."""
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_a_compiler_that_fails_is_quoted(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "echo it is broken >&2; exit 1"))
    assert compiled.kernel() is None and compiled.absent() == "compiler said: it is broken"


def test_what_computes_wrong_is_not_used(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if compiled._compiler() is None:
        pytest.skip("no C++ compiler")
    broken = tmp_path / "broken.cpp"
    text = compiled.SOURCE.read_text()
    assert "- (1 << (BITS - 1))" in text
    broken.write_text(text.replace("- (1 << (BITS - 1))", "- (1 << BITS)"))
    monkeypatch.setattr(compiled, "SOURCE", broken)
    monkeypatch.setattr(compiled, "FLAGS", ("-O1", *compiled.FLAGS[1:]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.kernel() is None and "computes wrong" in (compiled.absent() or "")


def test_processes_that_start_together_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Nor for what a process left behind that was killed while it compiled."""
    if compiled._compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "effbench").mkdir()
    (tmp_path / "effbench" / "tmpleftover").write_text("half of a library")
    ask = (
        "from effbench.toolbox.kernels import compiled; compiled.FLAGS = ('-O0', *compiled.FLAGS[1:]); "
        "print(compiled.kernel() is not None)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    together = [
        subprocess.Popen([sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in together] == ["True", "True"]
    assert len(list((tmp_path / "effbench").glob("packed-*.so"))) == 1


def test_importing_it_compiles_nothing(tmp_path: Path) -> None:
    ask = "import effbench.toolbox.packed, effbench.techniques.quantization.rtn"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": script(tmp_path, f"touch {tmp_path}/called")}
    subprocess.run([sys.executable, "-c", ask], env=environment, check=True)
    assert not (tmp_path / "called").exists() and not (tmp_path / "effbench").exists()


@pytest.mark.parametrize(("out_features", "in_features"), [(37, 70), (64, 64), (5, 300), (1, 31)])
def test_int8_products_are_those_of_the_unpacked_weights(out_features: int, in_features: int) -> None:
    kernel = compiled.kernel()
    if kernel is None or not kernel.vectors:
        pytest.skip("no kernel for int8 here")
    generator = torch.Generator().manual_seed(in_features)
    codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8, generator=generator)
    scales, zeros = torch.rand(out_features, generator=generator), torch.randn(out_features, generator=generator)
    exact = (codes.float() - zeros.unsqueeze(1)) * scales.unsqueeze(1)
    assert torch.equal(kernel.int8_unpacked(codes, scales, zeros), exact.bfloat16())
    for rows in (1, 3, 9):
        x = torch.randn(rows, in_features, generator=generator).bfloat16()
        expected = x.float() @ exact.T
        assert (kernel.int8_product(x, codes, scales, zeros).float() - expected).norm() <= 2**-8 * expected.norm()


def test_eight_bits_go_through_it_for_a_few_rows_and_are_unpacked_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compiled.kernel()
    if kernel is None or not kernel.vectors:
        pytest.skip("no kernel for int8 here")
    layer = get("rtn")(bits=8).layer(nn.Linear(70, 40, dtype=torch.bfloat16), None)
    calls: list[str] = []
    for name in ("int8_product", "int8_unpacked"):
        real = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    for rows in (1, compiled.INT8_ROWS, compiled.INT8_ROWS + 1):
        layer(torch.randn(rows, 70).bfloat16())
    assert calls == ["int8_product", "int8_product", "int8_unpacked"]
