"""Microscaling formats: every code, the published errors, the bits, and what blocks do at their limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import agrees, golden_linear, output_error
from torch import nn

from effbench import store
from effbench.errors import TechniqueError, UnfitError
from effbench.measure.memory import module_bytes, stored_bytes
from effbench.registry import get, parse
from effbench.toolbox.block_scaled import BLOCK_FORMATS, BlockScaledLinear
from effbench.toolbox.floats import FORMATS
from effbench.toolbox.walk import matrices

CODES = torch.arange(256).to(torch.uint8)
BITS = {
    "mxfp4": 4.25,
    "mxfp6_e3m2": 6.25,
    "mxfp6_e2m3": 6.25,
    "mxfp8": 8.25,
    "mxfp8_e5m2": 8.25,
    "mxint8": 8.25,
    "mxint4": 4.25,
    "nvfp4": 4.5,
}


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bits_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    kind, theirs = FORMATS[name], CODES.view(dtype).float()
    finite = theirs.isfinite()
    assert torch.equal(kind.decode(CODES)[finite], theirs[finite])
    torch.manual_seed(0)
    values = torch.randn(100_000).exp2() * torch.randn(100_000)
    for scale in (1e-6, 1e-3, 1.0, 30.0):
        some = (values * scale).clamp(-kind.largest, kind.largest)
        assert torch.equal(kind.encode(some), some.to(dtype).view(torch.uint8))


def test_four_bits_are_those_of_the_standard() -> None:
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["e2m1"].decode(CODES[:16]).tolist() == [*positive, *(-number for number in positive)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_comes_back_and_the_rest_goes_to_the_nearest(name: str) -> None:
    kind = FORMATS[name]
    numbers = kind.decode(CODES[: 2**kind.bits])
    numbers = numbers[numbers.abs() <= kind.largest].unique()
    assert numbers.max() == kind.largest
    assert torch.equal(kind.decode(kind.encode(numbers)), numbers)
    assert float(kind.decode(kind.encode(torch.tensor(1e30)))) == kind.largest
    values = torch.linspace(-1.1, 1.1, 4001) * kind.largest
    nearest = (values[:, None] - numbers).abs().amin(1)
    assert torch.equal((values - kind.decode(kind.encode(values))).abs(), nearest)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3"])
def test_ties_go_to_the_even_code(name: str) -> None:
    kind = FORMATS[name]
    numbers = kind.decode(CODES[: 2 ** (kind.bits - 1)])
    numbers = numbers[numbers <= kind.largest]
    codes = kind.encode((numbers[1:] + numbers[:-1]) / 2)
    assert (codes % 2 == 0).all()


@pytest.mark.parametrize(
    ("format", "golden"),
    [
        ("mxfp4", "1.6419e-02"),
        ("mxfp6_e3m2", "2.5739e-03"),
        ("mxfp6_e2m3", "8.6050e-04"),
        ("mxfp8", "8.9443e-04"),
        ("mxfp8_e5m2", "2.5735e-03"),
        ("mxint8", "5.4971e-05"),
        ("mxint4", "1.3418e-02"),
        ("nvfp4", "8.77556e-03"),
    ],
)
def test_the_golden_layer_errs_as_with_published_code(format: str, golden: str) -> None:
    assert agrees(output_error(get("mx")(format=format).layer(golden_linear(), None)), golden)


@pytest.mark.parametrize(
    ("seed", "rows", "columns", "goldens"),
    [
        (1, 48, 192, "1.76237e-02 3.03542e-03 1.03425e-03 1.18426e-03 3.03514e-03 1.16378e-04 8.35738e-03"),
        (2, 128, 64, "1.93726e-02 3.44571e-03 1.08356e-03 1.46820e-03 3.44538e-03 1.20807e-04 8.99746e-03"),
        (3, 33, 640, "1.87129e-02 3.16642e-03 9.72719e-04 1.27883e-03 3.16608e-03 1.15815e-04 8.37861e-03"),
    ],
)
def test_other_layers_err_as_with_published_code(seed: int, rows: int, columns: int, goldens: str) -> None:
    """Squared weight errors: MX of microsoft/microxcaling at 7bc4195, NVFP4 (the same bits) of torchao 0.18."""
    linear = nn.Linear(columns, rows, bias=False)
    weight = np.random.RandomState(seed).standard_t(4, (rows, columns)) * 0.02
    linear.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
    formats = ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "mxfp8_e5m2", "mxint8", "nvfp4")
    for format, golden in zip(formats, goldens.split(), strict=True):
        stored = get("mx")(format=format).layer(linear, None).dequantized().double()
        lost = (stored - linear.weight).square().sum() / linear.weight.double().square().sum()
        assert agrees(float(lost), golden), format


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_stored_bits_meet_the_closed_form(format: str) -> None:
    linear = nn.Linear(512, 192, dtype=torch.bfloat16)
    packed = get("mx")(format=format).layer(linear, None)
    x = torch.randn(2, 512, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, packed.dequantized(torch.bfloat16), linear.bias)
    assert torch.equal(packed(x), expected)
    assert module_bytes(packed) * 8 / linear.weight.numel() == pytest.approx(BITS[format], rel=1e-3)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8", "nvfp4", "mxfp6_e2m3"])
def test_a_model_taken_home_has_the_same_logits_and_bytes(architecture: str, format: str, tmp_path: Path) -> None:
    pipeline = f"mx:format={format}"
    system = random_system(architecture)
    dense, found = stored_bytes(system), matrices(system.model)
    weights, count = sum(linear.weight.numel() for _, linear in found), len(found)
    del found
    system = applied(system, pipeline)
    before, size = logits(system), stored_bytes(system)
    scales = 4 * count * (format == "nvfp4")
    assert dense - size == weights * (16 - BITS[format]) / 8 - scales
    store.save(system, tmp_path / "home", pipeline)
    again = store.load(tmp_path / "home")
    assert torch.equal(logits(again), before) and stored_bytes(again) == size


def test_the_shared_power_is_rounded_down_so_that_the_largest_weights_are_cut() -> None:
    linear = golden_linear()
    linear.weight[0, :32] = torch.linspace(0, 7.75, 32)
    block = get("mx")(format="mxfp4").layer(linear, None).dequantized()[0, :32]
    assert block[-1] == 6.0  # 7.75 < 8 has the power 2, that of the format's largest number
    linear.weight[0, :32] *= 8 / 7.75
    assert get("mx")(format="mxfp4").layer(linear, None).dequantized()[0, 31] == 8.0


@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1.0, 1e9])
def test_blocks_of_any_size_keep_their_digits(format: str, scale: float) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    stored = BlockScaledLinear.pack(weight, None, format).dequantized()
    assert torch.isfinite(stored).all() and (stored[3] == 0).all()
    if scale > 1e-10 or (scale and format != "nvfp4"):
        assert (stored - weight).norm() <= 0.2 * weight.norm()


def test_a_small_block_beside_a_large_one_is_not_lost_in_nvfp4() -> None:
    weight = torch.ones(1, 32)
    weight[:, 16:] = 1e-6
    weight[:, 0] = 6.0
    stored = BlockScaledLinear.pack(weight, None, "nvfp4").dequantized()
    assert torch.equal(stored[:, :16], weight[:, :16])
    assert (stored[:, 16:] <= 6.0 / 448 * 2**-9).all()  # the least scale there is beside this block


def test_more_bits_err_less() -> None:
    errors = {f: output_error(get("mx")(format=f).layer(golden_linear(), None)) for f in BLOCK_FORMATS}
    assert errors["mxfp8"] < errors["mxfp6_e3m2"] < errors["nvfp4"] < errors["mxfp4"]


def test_gradients_pass_through_to_the_inputs() -> None:
    packed = get("mx")().layer(golden_linear(), None)
    x = torch.randn(2, 256, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], packed.dequantized().sum(0))


def test_weights_that_are_not_finite_are_named() -> None:
    linear = golden_linear()
    linear.weight[3, 5] = torch.inf
    with pytest.raises(UnfitError, match="not finite"):
        get("mx")().layer(linear, None)


def test_an_unknown_format_is_named_with_what_there_is() -> None:
    with pytest.raises(TechniqueError, match="format must be one of mxfp4, .*, got mxfp5"):
        parse("mx:format=mxfp5")


def test_a_width_that_is_no_whole_number_of_blocks_is_unfit_with_a_sentence() -> None:
    linear = nn.Linear(40, 8)
    assert "40 inputs do not divide into the blocks of 32 of mxfp8" in (
        get("mx")(format="mxfp8").unfit_layer(linear) or ""
    )
