"""Sparse storage: the same weights, the bytes of the closed form, before and after a pass and a save."""

from pathlib import Path

import pytest
import torch
from conftest import applied, calibrated, logits, random_system
from torch import Tensor, nn

from effbench import store
from effbench.contract import check
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.registry import get
from effbench.toolbox.grid import encode, fit_grid
from effbench.toolbox.kernels import two_four
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.sparse import SparseLinear, SparsePackedLinear, drop_zeros, fits_two_four
from effbench.toolbox.walk import matrices

FORMATS = [("bitmask", "unstructured"), ("bitmask", "2:4"), ("bitmask", "4:8"), ("2:4", "2:4"), ("csr", "unstructured")]


def pruned(out: int, width: int, dtype: torch.dtype, sparsity: float = 0.5, pattern: str = "unstructured") -> nn.Linear:
    linear = nn.Linear(width, out, dtype=dtype)
    layer = get("magnitude")(sparsity=sparsity, pattern=pattern).layer(linear, None)
    assert isinstance(layer, nn.Linear)
    return layer


def closed_form(bits: int, sparsity: float, format: str, out: int, width: int) -> float:
    """Bits of a weight as the specification has them, with CSR's row starts written out."""
    if format == "csr":
        return (bits + 16) * (1 - sparsity) + 32 * (out + 1) / (out * width)
    return bits * (1 - sparsity) + 1


@pytest.mark.parametrize(("format", "pattern"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 256), (37, 104), (5, 8)])
def test_the_weights_are_the_same_and_so_is_the_product(
    format: str, pattern: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    linear = pruned(*shape, dtype, pattern=pattern)
    layer = SparseLinear.pack(linear, format)
    assert torch.equal(layer.dense(), linear.weight)
    x = torch.randn(3, 70, shape[1], dtype=dtype)  # more rows than the sparse product is for
    with torch.inference_mode():
        assert torch.equal(layer(x), linear(x))
        assert layer(x[:0]).shape == (0, 70, shape[0])


@pytest.mark.parametrize(("format", "pattern"), FORMATS)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float32, 32)])
def test_bytes_are_those_of_the_closed_form(format: str, pattern: str, dtype: torch.dtype, bits: int) -> None:
    layer = SparseLinear.pack(pruned(256, 512, dtype, pattern=pattern), format)
    before = module_bytes(layer)
    with torch.inference_mode():
        layer(torch.randn(4, 512, dtype=dtype))
    assert module_bytes(layer) == before
    assert 8 * before / (256 * 512) == pytest.approx(closed_form(bits, 0.5, format, 256, 512), rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("format", ["bitmask", "csr"])
def test_bytes_follow_the_sparsity(format: str, sparsity: float) -> None:
    layer = SparseLinear.pack(pruned(256, 512, torch.bfloat16, sparsity), format)
    assert 8 * module_bytes(layer) / (256 * 512) == pytest.approx(closed_form(16, sparsity, format, 256, 512), rel=1e-3)


def test_csr_numbers_wide_matrices_with_more_bits() -> None:
    linear = pruned(2, 32768, torch.bfloat16, 0.99)
    linear.weight.data[0, -1] = 7
    layer = SparseLinear.pack(linear, "csr")
    assert layer.columns.dtype == torch.int32 and torch.equal(layer.dense(), linear.weight)


@pytest.mark.parametrize(
    "pipeline",
    [
        "magnitude:store=bitmask",
        "magnitude:sparsity=0.7,store=csr",
        "magnitude:pattern=2:4,store=2:4",
        "random:pattern=4:8,store=bitmask",
        "random:sparsity=0.8,compare=row,store=bitmask",
    ],
)
def test_every_architecture_is_as_small_as_promised_and_stays_so(
    architecture: str, pipeline: str, tmp_path: Path
) -> None:
    system = random_system(architecture)
    dense, promised = stored_bytes(system), 0.0
    masked = applied(random_system(architecture), pipeline.rpartition(",")[0] if "," in pipeline else "magnitude")
    for _, linear in matrices(masked.model):
        share = float((linear.weight == 0).double().mean())
        format = pipeline.rpartition("=")[2]
        promised += (16 - closed_form(16, share, format, *linear.weight.shape)) * linear.weight.numel() / 8
    system = applied(system, pipeline)
    before, size = logits(system), stored_bytes(system)
    assert dense - size == pytest.approx(promised, rel=1e-3)
    assert matrices(system.model) == [] and stored_bytes(system) == size
    torch.testing.assert_close(before, logits(masked), rtol=0.02, atol=0.02)
    store.save(system, tmp_path / "taken_home", pipeline)
    again = store.load(tmp_path / "taken_home")
    assert torch.equal(logits(again), before) and stored_bytes(again) == size


@pytest.mark.parametrize("format", ["bitmask", "2:4", "csr"])
def test_each_format_keeps_the_contract(format: str) -> None:
    technique = get("magnitude")(pattern="2:4" if format == "2:4" else "unstructured", store=format)
    assert [result for result in check(technique, "pruning") if result.problem] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_go_through_the_sparse_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pruned(96, 128, dtype, 0.95)
    layer, x = SparseLinear.pack(linear, "csr"), torch.randn(2, 3, 128, dtype=dtype)
    monkeypatch.setattr(SparseLinear, "dense", lambda self: pytest.fail("the zeros were filled in"))
    with torch.inference_mode():
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2, atol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layout_of_the_gpus_kernel_stores_the_same_in_as_many_bytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made and read back on a CPU; what cannot be tried here is the product itself."""
    linear = pruned(64, 128, dtype, pattern="2:4")
    linear.weight.data[0, :8] = 0  # more zeros than the pattern asks for
    plain = SparseLinear.pack(linear, "2:4")
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda _: None)  # it asks for a GPU
    monkeypatch.setattr(two_four, "layout", lambda weight: "cutlass")
    layer = SparseLinear.pack(linear, "2:4")
    assert (plain.layout, layer.layout) == ("plain", "cutlass")
    assert torch.equal(layer.dense(), linear.weight)
    assert module_bytes(layer) == module_bytes(plain)
    again = SparseLinear(**layer.options)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dense(), linear.weight)
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(again(x), linear(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_two_four_product_on_a_gpu_is_that_of_the_matrix(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pruned(128, 256, torch.bfloat16, pattern="2:4").cuda()
    layer = SparseLinear.pack(linear, "2:4")
    assert layer.layout != "plain"
    monkeypatch.setattr(SparseLinear, "dense", lambda self: pytest.fail("the zeros were filled in"))
    x = torch.randn(2, rows, 256, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("format", "pattern"), FORMATS)
def test_a_gradient_passes_on_to_the_inputs(format: str, pattern: str) -> None:
    linear = pruned(24, 32, torch.float32, pattern=pattern)
    gradients = []
    for layer in (linear, SparseLinear.pack(linear, format)):
        x = torch.ones(2, 32, requires_grad=True)
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_a_matrix_of_zeros_and_rows_of_zeros_are_no_special_case() -> None:
    for keep in (0, 3):
        linear = nn.Linear(8, 4)
        linear.weight.data[keep:] = 0
        linear.weight.data[:keep, ::2] = 0
        for format in ("bitmask", "2:4", "csr"):
            layer = SparseLinear.pack(linear, format)
            x = torch.randn(2, 8)
            torch.testing.assert_close(layer(x), linear(x))


def test_more_than_two_in_a_run_do_not_fit_two_four() -> None:
    with pytest.raises(ValueError, match="2:4 holds two weights in each run of four inputs, and some run has more"):
        SparseLinear.pack(nn.Linear(8, 4), "2:4")


def quantized(weight: Tensor, bits: int, group_size: int = 0, bias: Tensor | None = None) -> PackedLinear:
    groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    scales, zeros = fit_grid(groups, bits, dtype=torch.float16)
    return PackedLinear.pack(encode(groups, scales, zeros, bits).flatten(1), scales, zeros, bits, bias)


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantized_two_four_matrix_stores_two_codes_of_four(bits: int, group_size: int) -> None:
    weight = pruned(64, 256, torch.float32, pattern="2:4").weight.detach()
    weight[0, :4] = 0  # more zeros than the pattern asks for
    packed = quantized(weight, bits, group_size, torch.randn(64))
    layer = drop_zeros(packed, weight)
    assert isinstance(layer, SparsePackedLinear)
    assert torch.equal(layer.dequantized(), packed.dequantized()) and (layer.dequantized()[weight == 0] == 0).all()
    width = group_size or 256
    promised = bits / 2 + 1 + (16 + bits) / width  # 2 + 1 and the scales, at 4 bits
    assert 8 * module_bytes(layer) / weight.numel() == pytest.approx(promised, rel=1e-3)
    x = torch.randn(5, 256)
    assert torch.equal(layer(x), packed(x))


def test_zeros_stay_zero_whatever_code_they_were_given() -> None:
    weight = pruned(16, 32, torch.float32, pattern="2:4").weight.detach()
    packed = quantized(torch.randn(16, 32), 4)
    layer = drop_zeros(packed, weight)
    assert (packed.dequantized()[weight == 0] != 0).any()
    assert torch.equal(layer.dequantized(), packed.dequantized() * (weight != 0))


def test_what_is_no_two_four_matrix_or_saves_nothing_is_left_as_it_is() -> None:
    halved = pruned(16, 32, torch.float32).weight.detach()
    fitting = pruned(16, 32, torch.float32, pattern="2:4").weight.detach()
    for weight, bits in ((halved, 4), (fitting, 2)):
        packed = quantized(weight, bits)
        assert drop_zeros(packed, weight) is packed


@pytest.mark.parametrize(
    "pruner, quantizer",
    [("magnitude:pattern=2:4", "rtn:bits=4"), ("sparsegpt:pattern=2:4,samples=4", "gptq:bits=4,samples=4")],
)
def test_a_stack_of_two_four_and_codes_keeps_the_zeros_and_stores_them_nowhere(
    pruner: str, quantizer: str, architecture: str, tmp_path: Path
) -> None:
    system = calibrated(random_system(architecture, torch.bfloat16), pruner)
    weights = {name: linear.weight.detach().clone() for name, linear in matrices(system.model)}
    assert all(fits_two_four(weight) for weight in weights.values())
    system = calibrated(system, quantizer)
    for name, weight in weights.items():
        packed = system.model.get_submodule(name)
        assert isinstance(packed, SparsePackedLinear) and packed.store == "2:4"
        assert (packed.dequantized()[weight == 0] == 0).all()
        bits = 8 * module_bytes(packed) / weight.numel()
        assert bits == pytest.approx(4 / 2 + 1 + (16 + 4) / weight.shape[1], rel=1e-3)
    before, size = logits(system), stored_bytes(system)
    store.save(system, tmp_path / "taken_home", "stack")
    again = store.load(tmp_path / "taken_home")
    assert torch.equal(logits(again), before) and stored_bytes(again) == size
