"""Packed weights: exactly as many bits as said, lossless, and computed with."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.measure.memory import module_bytes
from effbench.toolbox.grid import decode, encode, fit_grid
from effbench.toolbox.kernels import compiled
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.kernels.tiles import TILES, machine_tile, pack_tiles, unpack_tiles
from effbench.toolbox.packed import PackedLinear


def random_codes(*shape: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def random_packed(
    out_features: int, in_features: int, bits: int, group_size: int = 0, *, low: float = -1.0, **options: object
) -> PackedLinear:
    """A packed layer of weights between `low` and 1."""
    generator = torch.Generator().manual_seed(7)
    weight = low + (1 - low) * torch.rand(out_features, in_features, generator=generator)
    groups = weight.unflatten(1, (-1, group_size or in_features))
    scales, zeros = fit_grid(groups, bits, symmetric=options.pop("symmetric", False) is True)
    codes = encode(groups, scales, zeros, bits).flatten(1)
    return PackedLinear.pack(codes, scales, zeros, bits, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 63, 1001])
def test_codes_come_back_from_their_bytes_whatever_their_number(bits: int, count: int) -> None:
    codes = random_codes(count, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_code_takes_its_bits_and_no_more(bits: int) -> None:
    assert packed_bytes(64 * 100, bits) * 8 == 64 * 100 * bits


@pytest.mark.parametrize("tile", TILES)
def test_codes_come_back_from_tiles(tile: int) -> None:
    codes = random_codes(3 * tile, 10, bits=4)
    assert torch.equal(unpack_tiles(pack_tiles(codes, tile), tile, 3 * tile), codes)


on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the tiles known are those of x86")


@on_x86
def test_the_tile_is_that_of_the_kernel_here() -> None:
    assert machine_tile() == {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)


@on_x86
@pytest.mark.parametrize(("capability", "tile"), [("avx2", 32), ("default", 0)])
def test_a_lesser_machine_has_a_smaller_tile_or_none(capability: str, tile: int) -> None:
    ask = "from effbench.toolbox.kernels.tiles import machine_tile; print(machine_tile())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    found = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == tile


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 128, 0), (64, 128, 32), (5, 33, 11), (3, 7, 0)])
def test_what_is_packed_stands_for_the_weights_that_were_coded(
    bits: int, rows: int, columns: int, group_size: int
) -> None:
    codes = random_codes(rows, columns, bits=bits)
    groups = columns // (group_size or columns)
    scales, zeros = 0.01 + torch.rand(rows, groups), random_codes(rows, groups, bits=bits)
    packed = PackedLinear.pack(codes, scales, zeros, bits, scale_dtype="float32")
    expected = decode(codes.unflatten(1, (groups, -1)), scales, zeros).flatten(1)
    assert torch.equal(packed.dequantized(), expected)
    x = torch.randn(4, columns)
    torch.testing.assert_close(packed(x), x @ expected.T)


def test_zero_points_need_not_be_whole_numbers() -> None:
    codes, scales, zeros = random_codes(8, 64, bits=4), torch.full((8, 1), 0.5), torch.full((8, 1), 7.25)
    packed = PackedLinear.pack(codes, scales, zeros, 4, zeros_dtype="float16")
    assert torch.equal(packed.dequantized(), (codes.float() - 7.25) * 0.5)


@pytest.mark.parametrize(
    ("bits", "group_size", "options", "per_group"),
    [
        (8, 0, {}, 16 + 8),
        (4, 64, {}, 16 + 4),
        (3, 64, {}, 16 + 3),
        (2, 32, {}, 16 + 2),
        (4, 128, {"zeros_dtype": "float16"}, 16 + 16),
        (4, 128, {"scale_dtype": "float32"}, 32 + 4),
        (3, 64, {"symmetric": True}, 16),
        (3, 64, {"tile": 16}, 16 + 3),
        (2, 0, {"tile": 16}, 16 + 2),
        (2, 32, {"tile": 16, "zeros_dtype": "float16"}, 16 + 16),
        (4, 64, {"tile": 64}, 16 + 16),
        (4, 0, {"tile": 32}, 16 + 16),
    ],
)
def test_stored_bits_meet_the_closed_form(bits: int, group_size: int, options: dict, per_group: int) -> None:
    if options.get("symmetric"):
        packed = PackedLinear.pack(random_codes(192, 512, bits=bits), torch.ones(192, 512 // group_size), None, bits)
    else:
        packed = random_packed(192, 512, bits, group_size, **options)
    expected = bits + per_group / (group_size or 512)
    before = module_bytes(packed)
    assert before * 8 / (192 * 512) == pytest.approx(expected, rel=1e-3)
    packed(torch.randn(2, 512, dtype=torch.bfloat16))
    assert module_bytes(packed) == before


@pytest.mark.parametrize("low", [-1.0, -0.2, 0.0, 0.5], ids=lambda low: f"weights from {low}")
@pytest.mark.parametrize(
    ("bits", "group_size", "tile"), [(8, 0, 0), (4, 0, 64), (4, 32, 64), (4, 64, 64), (4, 128, 64), (4, 192, 64)]
)
def test_a_kernel_of_aten_equals_its_own_unpacked_product(
    monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int, tile: int, low: float
) -> None:
    monkeypatch.setattr(compiled, "kernel", lambda: None)
    tile = tile and machine_tile()
    if bits == 4 and not tile:
        pytest.skip("no int4 kernel here")
    packed = random_packed(192, 768, bits, group_size, low=low, tile=tile, bias=torch.randn(192).bfloat16())
    x = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(1)).bfloat16()
    calls = []
    kernel = f"int{bits}_product"
    real = getattr(sys.modules[PackedLinear.__module__], kernel)
    monkeypatch.setattr(f"{PackedLinear.__module__}.{kernel}", lambda *args: calls.append(1) or real(*args))
    found = packed(x).float()
    assert calls, "the kernel was not used"
    assert packed.bias is not None
    exact = nn.functional.linear(x.float(), packed.dequantized(), packed.bias.float())
    assert (found - exact).norm() / exact.norm() < 1e-2
    plain = nn.functional.linear(x, packed.dequantized(torch.bfloat16), packed.bias).float()
    assert (found - plain).norm() / plain.norm() < 1e-2


@pytest.mark.parametrize("columns", [13, 17, 30, 40])
def test_a_width_that_the_int8_kernel_would_read_past_is_unpacked(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(compiled, "kernel", lambda: None)
    packed = random_packed(24, columns, 8)
    x = torch.randn(5, columns).bfloat16()
    assert torch.equal(packed(x), nn.functional.linear(x, packed.dequantized(torch.bfloat16)))


@pytest.mark.parametrize("offset", [4, 16, 52])
@pytest.mark.parametrize("rows", [1, 4, 24])
@pytest.mark.parametrize("own", [False, True])
def test_the_int8_kernel_is_kept_from_memory_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, offset: int, rows: int, own: bool
) -> None:
    if not own:
        monkeypatch.setattr(compiled, "kernel", lambda: None)
    packed = random_packed(19, 64, 8)
    x = torch.randn(rows, 64).bfloat16()
    expected = packed(x)
    memory = torch.empty(rows * 64 + offset, dtype=torch.bfloat16)
    shifted = memory[offset:].view(rows, 64).copy_(x)
    assert torch.equal(packed(shifted), expected)
    packed.codes = torch.cat([packed.codes.new_zeros(offset), packed.codes])[offset:]
    assert (packed(x) - expected).float().norm() / expected.float().norm() < 1e-2


@pytest.mark.parametrize("tile", TILES)
def test_tiles_stand_for_the_same_weights_up_to_the_rounding_of_their_grids(tile: int) -> None:
    plain, tiled = random_packed(192, 256, 4, 64), random_packed(192, 256, 4, 64, tile=tile)
    step = plain.scales.float().repeat_interleave(64, 1)
    # scale and zero point are each off by up to 2^-9 of themselves, and both are at most 8 steps from the middle
    assert ((plain.dequantized() - tiled.dequantized()).abs() <= step * 16 * 2**-8).all()


def test_tiles_of_another_machine_are_unpacked_and_not_misread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernel", lambda: None)
    foreign = next(tile for tile in TILES if tile != machine_tile())
    packed = random_packed(192, 256, 4, 64, tile=foreign)
    x = torch.randn(2, 256).bfloat16()
    expected = nn.functional.linear(x, packed.dequantized(torch.bfloat16))
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed.dequantized(), random_packed(192, 256, 4, 64, tile=96 - foreign).dequantized())


@pytest.mark.parametrize(("bits", "tile"), [(8, 0), (4, 64), (2, 0)])
def test_gradients_pass_through_to_the_inputs(bits: int, tile: int) -> None:
    packed = random_packed(64, 64, bits, tile=tile)
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], packed.dequantized(torch.bfloat16).sum(0), rtol=0.02, atol=0.02)


def test_weights_too_large_for_their_scales_are_refused() -> None:
    scales = torch.tensor([[1e6]])
    with pytest.raises(UnfitError, match="scale_dtype=float32"):
        PackedLinear.pack(random_codes(1, 8, bits=4), scales, None, 4)
    assert PackedLinear.pack(random_codes(1, 8, bits=4), scales, None, 4, scale_dtype="float32").bits == 4


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_weight_is_further_from_its_level_than_a_step_whatever_its_row_looks_like(
    symmetric: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[3], weight[4], weight[5] = 0, weight[4].abs(), -weight[5].abs()
    for bits in (8, 4, 3, 2):
        scales, zeros = fit_grid(weight, bits, symmetric=symmetric, dtype=dtype)
        distance = (decode(encode(weight, scales, zeros, bits), scales, zeros) - weight).abs().amax(-1)
        # half a step within the grid; at its ends half a step more, since the zero point is a whole number, and
        # what rounding the scale to its dtype adds up to over 2^bits steps
        slack = 1 + 2**bits * torch.finfo(dtype).eps
        assert (distance <= scales * slack).all()
        assert distance[3] == 0
