"""What runs on a GPU gives what it gives on a CPU; skipped without one."""

import pytest
import torch
from torch import Tensor, nn

from effbench.toolbox.grid import encode, fit_grid
from effbench.toolbox.int8 import Int8Linear
from effbench.toolbox.kernels import of_gpus
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.ternary import TernaryLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def packed(shape: tuple[int, ...], bits: int, group_size: int, kind: str) -> PackedLinear:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    groups = weight.unflatten(1, (-1, group_size or shape[1]))
    scales, zeros = fit_grid(groups, bits, symmetric=kind == "middle")
    codes = encode(groups, scales, zeros, bits).flatten(1)
    stored, bias = "codes" if kind == "middle" else kind, torch.randn(shape[0])
    return PackedLinear.pack(codes, scales, None if kind == "middle" else zeros, bits, bias, zeros_dtype=stored)


HALF = (torch.bfloat16,)
CASES = [
    *((bits, "codes", shape, HALF) for bits in range(1, 9) for shape in ((64, 128, 0), (72, 192, 64))),
    *((bits, kind, (72, 192, 64), HALF) for bits in (3, 4) for kind in ("middle", "float16", "float32")),
    (4, "codes", (256, 1056, 32), (torch.float32, torch.float16)),
]
"""Each is compiled anew."""


@pytest.mark.parametrize(("bits", "kind", "shape", "dtypes"), CASES)
def test_packed_codes_are_multiplied_by_a_kernel(
    bits: int,
    kind: str,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert of_gpus() is not None
    layer = packed(shape[:2], bits, shape[2], kind)
    exact, bias = layer.dequantized(), layer.bias
    assert bias is not None
    layer.cuda()
    assert layer.simulated is None and layer.unpacked is None
    assert torch.equal(layer.dequantized().cpu(), exact)
    monkeypatch.setattr(PackedLinear, "dequantized", lambda *_: pytest.fail("the codes were unpacked"))
    for rows in (1, 9):
        x = torch.randn(rows, shape[1])
        for dtype in dtypes:
            close = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
            expected = x.to(dtype).double() @ exact.double().T + bias
            found = layer(x.to("cuda", dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.cpu().double(), expected, rtol=close, atol=close * float(expected.abs().max())
            )


def test_what_no_kernel_reads_is_unpacked_and_says_so() -> None:
    layer = packed((64, 120), 4, 0, "codes").cuda()
    assert layer.simulated is not None
    x = torch.randn(3, 120, device="cuda")
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T + layer.bias, rtol=1e-4, atol=1e-4)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [1, 5, 17, 100])
def test_eight_bits_times_eight_bits(rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128), torch.randn(rows, 256)
    with torch.inference_mode():
        eight, trits = Int8Linear.pack(linear), TernaryLinear.pack(linear.weight, linear.bias, "2", torch.float32)
        for layer in (eight, trits):
            assert relative_error(layer.cuda()(x.cuda()), layer.cpu()(x)) < 1e-5


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_the_library(kind: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from effbench.toolbox.bitsandbytes import FourBitLinear

    linear = nn.Linear(256, 128, dtype=torch.bfloat16, device="cuda")
    layer = FourBitLinear.pack(linear, kind, 64, double_quant)
    weight = layer.dequantized(torch.float32)
    monkeypatch.setattr(FourBitLinear, "dequantized", lambda *_: pytest.fail("the codes were unpacked"))
    with torch.inference_mode():
        for rows in (1, 7):
            x = torch.randn(rows, 256, dtype=torch.bfloat16, device="cuda")
            assert relative_error(layer(x), (x.float() @ weight.T + linear.bias).cpu()) < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_llm_int8(rows: int) -> None:
    pytest.importorskip("bitsandbytes")
    from effbench.toolbox.llm_int8 import LLMInt8Linear

    linear = nn.Linear(256, 128, dtype=torch.bfloat16, device="cuda")
    layer = LLMInt8Linear.pack(linear, 6.0)
    x = torch.randn(rows, 256, dtype=torch.bfloat16, device="cuda")
    x[0, 3] = 40  # one that stays unrounded
    with torch.inference_mode():
        assert relative_error(layer(x), linear(x).cpu()) < 2e-2
