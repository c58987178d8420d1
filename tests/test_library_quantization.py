"""Techniques that other libraries bring: their errors, their bits, and the traps that lie in them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import applied, logits, random_system
from golden_layer import agrees, golden_inputs, golden_linear, output_error
from torch import nn

from effbench import store
from effbench.errors import PackageError, TechniqueError
from effbench.measure.memory import hidden_bytes, module_bytes, others, stored_bytes
from effbench.registry import get, parse
from effbench.toolbox import extras

PACKAGES = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "llm_int8": "bitsandbytes",
    "quanto": "optimum.quanto",
    "torchao_int8": "torchao",
    "torchao_int4": "torchao",
}
FOUR_BIT = ("nf4", "fp4")
HOMES = ("nf4:double_quant=true", "fp4", "llm_int8", "quanto")


@pytest.fixture(autouse=True)
def only_with_the_library(request: pytest.FixtureRequest) -> None:
    """Tests with a `name` run where what it needs is installed."""
    name = request.node.callspec.params.get("name", "nf4") if hasattr(request.node, "callspec") else "nf4"
    pytest.importorskip(PACKAGES[name.partition(":")[0]])


def layer(name: str, linear: nn.Linear, **options: object) -> Any:
    return get(name)(**options).layer(linear, None)


def heavy_tailed(seed: int, rows: int, columns: int) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False)
    weight = np.random.RandomState(seed).standard_t(4, (rows, columns)) * 0.02
    linear.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("name", "options", "golden"),
    [
        ("nf4", {}, "7.6993e-03"),
        ("fp4", {}, "1.3413e-02"),
        ("nf4", {"double_quant": True}, "7.617e-03"),
        ("fp4", {"double_quant": True}, "1.33554e-02"),
        ("nf4", {"block_size": 32}, "6.78312e-03"),
        ("fp4", {"block_size": 32}, "1.18867e-02"),
    ],
)
def test_the_golden_layer_errs_as_known(name: str, options: dict, golden: str) -> None:
    assert agrees(output_error(layer(name, golden_linear(), **options)), golden)


@pytest.mark.parametrize(
    ("seed", "rows", "columns", "nf4", "fp4"),
    [
        (1, 48, 192, "1.26650e-02", "3.06643e-02"),
        (2, 128, 64, "1.32718e-02", "3.05588e-02"),
        (3, 33, 640, "1.31609e-02", "2.86484e-02"),
    ],
)
def test_other_layers_err_as_with_its_own_functions(seed: int, rows: int, columns: int, nf4: str, fp4: str) -> None:
    """Squared weight errors by quantize_4bit and dequantize_4bit of bitsandbytes 0.50.2."""
    linear = heavy_tailed(seed, rows, columns)
    for name, golden in (("nf4", nf4), ("fp4", fp4)):
        lost = (layer(name, linear).dequantized().double() - linear.weight).square().sum()
        assert agrees(float(lost / linear.weight.double().square().sum()), golden)


def test_nf4_has_the_numbers_of_the_paper() -> None:
    linear = nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight[:] = torch.linspace(-1, 1, 1024).view(16, 64)
    linear.weight[:, 0] = -1
    found = layer("nf4", linear).dequantized().unique()
    known = "-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.09105 0 .0795803 .1609302 .2461123 .3379152"
    numbers = torch.tensor([float(number) for number in (known + " .4407098 .562617 .7229568 1").split()])
    distance = (found[:, None] - numbers).abs()
    assert (distance.amin(1) < 1e-6).all() and (distance.amin(0) < 1e-6).all()


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(33, 48), (64, 200), (6, 31), (16, 96), (96, 640)], ids=str)
def test_blocks_that_do_not_end_with_a_row_are_read_right(
    name: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    """Its own unpacking of such shapes on a CPU multiplies by the scales of other blocks."""
    import bitsandbytes.functional as theirs

    linear = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    packed = layer(name, linear, double_quant=double_quant)
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten().int()
    scales = packed._block_scales().repeat_interleave(64)[: codes.numel()]
    expected = (theirs.get_4bit_type(name, device="cpu")[codes] * scales).view(shape)
    assert torch.equal(packed.dequantized(), expected)
    assert (expected - linear.weight).norm() < 0.13 * linear.weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("nf4", {}, 4 + 32 / 64),
        ("fp4", {"block_size": 128}, 4 + 32 / 128),
        ("nf4", {"double_quant": True}, 4 + 8 / 64 + 32 / (64 * 256)),
        ("llm_int8", {}, 8 + 32 / 1024),
        ("torchao_int8", {}, 8 + 32 / 1024),
        ("torchao_int4", {"group_size": 128}, 4 + 32 / 128),
        ("quanto", {"bits": 8}, lambda d: 8 + d / 1024),
        ("quanto", {}, lambda d: 4 + 2 * d / 128),
        ("quanto", {"bits": 2, "group_size": 32}, lambda d: 2 + 2 * d / 32),
    ],
)
def test_stored_bits_meet_the_closed_form_after_a_pass_too(
    name: str, options: dict, bits: Any, dtype: torch.dtype
) -> None:
    linear = nn.Linear(1024, 512, dtype=dtype).requires_grad_(False)
    packed = layer(name, linear, **options)
    expected = bits(8 * dtype.itemsize) if callable(bits) else bits
    for rows in (1, 100):
        assert packed(torch.randn(rows, 1024, dtype=dtype)).dtype == dtype
        assert module_bytes(packed) * 8 / linear.weight.numel() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 256), (96, 640), (30, 256), (64, 40)], ids=str)
def test_a_pass_rewrites_nothing(name: str, double_quant: bool, shape: tuple[int, int]) -> None:
    """The library's own layers repack themselves here: shapes fail, unpacking gives garbage, gradients are wrong."""
    linear = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16).requires_grad_(False)
    packed = layer(name, linear, double_quant=double_quant).eval()
    before = {key: tensor.clone() for key, tensor in packed.named_buffers()}
    x = torch.randn(2, 3, shape[1], dtype=torch.bfloat16)
    with torch.no_grad():
        first = packed(x)
    assert all(torch.equal(tensor, before[key]) for key, tensor in packed.named_buffers())
    weight = packed.dequantized()
    assert (weight - linear.weight).norm() < 0.13 * linear.weight.norm()
    exact = nn.functional.linear(x.float(), weight, linear.bias.float())
    assert (first - exact).norm() < 0.01 * exact.norm()
    many = packed(x.expand(40, 2, 3, shape[1]))[0]
    assert (many - exact).norm() < 0.01 * exact.norm()
    x.requires_grad_(True)
    packed(x).float().sum().backward()
    assert x.grad is not None
    expected = weight.sum(0).expand_as(x.grad)
    assert (x.grad - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_where_there_is_a_kernel_a_few_rows_go_through_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.toolbox import bitsandbytes as ours

    if not ours._has_kernel():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    linear = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    packed = layer(name, linear)
    codes, state = ours.library().quantize_4bit(linear.weight, quant_type=name)
    theirs, _ = ours.library()._convert_weight_packed_for_cpu(codes.clone(), state)
    assert packed.tiled and torch.equal(packed.codes, theirs.flatten())
    assert torch.equal(ours._from_tiles(packed.codes, 64), codes.flatten())
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    by_kernel = packed(x)
    monkeypatch.setattr(ours, "_has_kernel", lambda: False)  # as where a saved system is loaded by a lesser machine
    unpacked = packed(x)
    assert not torch.equal(by_kernel, unpacked)
    assert (by_kernel - unpacked).norm() < 0.01 * unpacked.norm()


def test_a_layer_without_a_kernel_says_that_its_codes_are_unpacked() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed: Any = layer("nf4", nn.Linear(128, 64, dtype=dtype).requires_grad_(False))
        assert (packed.unpacked is None) == packed.tiled
        assert dtype == torch.bfloat16 or not packed.tiled


@pytest.mark.parametrize(
    "name",
    [
        "nf4",
        "nf4:double_quant=true",
        "fp4",
        "llm_int8",
        "quanto:bits=8",
        "quanto",
        "quanto:bits=2",
        "torchao_int8",
        "torchao_int4",
    ],
)
def test_every_architecture_is_taken_home(name: str, architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    dense = stored_bytes(system)
    system = applied(system, name)
    before, size = logits(system), stored_bytes(system)
    assert torch.isfinite(before).all() and size < dense
    store.save(system, tmp_path / "home", name)
    again = store.load(tmp_path / "home")
    assert torch.equal(logits(again), before) and stored_bytes(again) == size


def test_a_new_process_finds_the_same_logits_and_says_nothing(tmp_path: Path) -> None:
    systems = {name: applied(random_system("llama"), name) for name in HOMES}
    for number, (name, system) in enumerate(systems.items()):
        store.save(system, tmp_path / f"home{number}", name)
    load = (
        "import sys, torch; from effbench import store; from conftest import logits; from pathlib import Path; "
        "torch.save([logits(store.load(path)) for path in sorted(Path(sys.argv[1]).glob('home*'))], sys.argv[2])"
    )
    command = [sys.executable, "-W", "error", "-c", load, str(tmp_path), str(tmp_path / "logits")]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    for system, theirs in zip(systems.values(), torch.load(tmp_path / "logits"), strict=True):
        assert torch.equal(logits(system), theirs)


@pytest.mark.parametrize("name", ["nf4", "llm_int8", "quanto"])
def test_nothing_is_kept_beside_the_buffers(name: str) -> None:
    system = random_system("llama")
    known = others(system)
    system = applied(system, name)
    logits(system)
    assert hidden_bytes(system, known) < 4096  # the numbers that codes stand for, once


@pytest.mark.parametrize("name", PACKAGES)
def test_without_the_library_it_is_unfit_with_the_words_that_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    reason = get(name)().unfit(random_system("llama")) or ""
    extra = PACKAGES[name].removeprefix("optimum.")
    assert f"{PACKAGES[name]} is not installed; pip install 'effbench[{extra}]'" in reason
    with pytest.raises(PackageError, match="not installed"):
        extras.require(PACKAGES[name], extra)


def test_asking_about_techniques_imports_no_library() -> None:
    ask = (
        "import sys; from effbench.registry import get; "
        f"[get(name)() for name in {sorted(PACKAGES)}]; "
        f"print([name for name in {sorted(set(PACKAGES.values()))} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_bitsandbytes_does_not_ask_a_hub_for_a_kernel(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    raise SystemExit('asked')\n")
    ask = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from effbench.toolbox.bitsandbytes import library; "
    ask += "library(); import kernels; print(kernels.__file__)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "kernels.py")


def llm_int8_error(inputs: torch.Tensor, **options: float) -> float:
    linear = golden_linear()
    exact = linear(inputs).double()
    return float((layer("llm_int8", linear, **options)(inputs) - exact).square().sum() / exact.square().sum())


def test_llm_int8_without_a_threshold_is_plain_w8a8() -> None:
    # the figure is that of another code, whose scales are rounded elsewhere
    assert agrees(llm_int8_error(golden_inputs(), threshold=0.0), "7.9226e-04", relative=1e-3)


def test_large_inputs_left_out_of_the_rounding_no_longer_spoil_the_others() -> None:
    assert llm_int8_error(golden_inputs()) < 0.1 * llm_int8_error(golden_inputs(), threshold=0.0)


@pytest.mark.parametrize("rows", [1, 7])
def test_llm_int8_equals_the_librarys_own_layer(rows: int) -> None:
    import bitsandbytes

    linear, x = golden_linear().bfloat16(), golden_inputs()[:rows].bfloat16()
    weight = bitsandbytes.nn.Int8Params(linear.weight.data.clone(), has_fp16_weights=False, requires_grad=False)
    theirs = bitsandbytes.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = weight
    assert torch.equal(layer("llm_int8", linear)(x), theirs.to("cpu").eval()(x))


def test_llm_int8_leaves_its_inputs_alone_and_passes_gradients_on() -> None:
    packed, x = layer("llm_int8", golden_linear()), golden_inputs()[:5]
    kept = x.clone()
    forward = packed(x)
    assert torch.equal(x, kept)
    x.requires_grad_(True)
    assert torch.allclose(packed(x), forward, rtol=1e-5, atol=1e-5)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], packed.dequantized().sum(0))


@pytest.mark.parametrize("name", PACKAGES)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    linear = golden_linear()
    linear.weight[:4] = 0
    packed = layer(name, linear)
    assert (packed(golden_inputs()[:9])[:, :4] == 0).all()
    assert (packed(torch.zeros(3, 256)) == 0).all()
    assert packed(torch.zeros(0, 256)).shape == (0, 64)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_bias_is_kept(name: str) -> None:
    linear = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    for rows in (1, 100):
        x = torch.zeros(rows, 64, dtype=torch.bfloat16)
        assert torch.equal(layer(name, linear)(x), linear(x))


def unfit(name: str, linear: nn.Linear) -> str:
    return get(name)().unfit_layer(linear) or ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PACKAGES)
def test_weights_that_cannot_be_stored_are_named(name: str) -> None:
    linear = golden_linear()
    linear.weight[3, 5] = torch.nan
    assert "not finite" in unfit(name, linear)
    if name in FOUR_BIT:
        assert "odd number" in unfit(name, nn.Linear(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("shape", [(64, 256), (48, 192), (33, 640), (8, 100), (8, 200), (1, 256)], ids=str)
def test_quanto_has_the_numbers_of_the_librarys_own_layer(
    bits: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    linear = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    packed = layer("quanto", linear, bits=bits)
    kind = {8: quanto.qint8, 4: quanto.qint4, 2: quanto.qint2}[bits]
    theirs = quanto.nn.QLinear.from_module(linear, weights=kind)
    width = theirs.weight_group_size
    grid = theirs.optimizer(linear.weight, kind, 0, *([width] if bits < 8 else []))
    scales, shifts = grid if bits < 8 else (grid, None)
    # the form for any machine; the other one cannot hold these shapes
    theirs = quanto.quantize_weight(linear.weight, kind, 0, scales, shifts, width, optimized=False)
    if bits == 8:
        expected = theirs._scale * theirs._data
    else:
        # by its own unpacking it would compile C++
        codes = torch.cat([theirs._data._data >> shift & (2**bits - 1) for shift in range(0, 8, bits)])
        codes = codes[: theirs._data.shape[0]]
        expected = (theirs._scale * codes - theirs._shift).view(shape)
        assert packed.options["group_size"] == (width or 0)
    assert torch.equal(packed.dequantized(dtype), expected)
    assert (expected.float() - linear.weight).norm() < {8: 0.01, 4: 0.2, 2: 0.8}[bits] * linear.weight.float().norm()
    for rows in (1, 3, 100):
        x = torch.randn(rows, shape[1], dtype=dtype)
        plain = nn.functional.linear(x, expected, linear.bias).float()
        assert (packed(x).float() - plain).norm() < 0.01 * plain.norm()


def test_quanto_neither_compiles_nor_waits_for_a_lock_that_was_left_behind(tmp_path: Path) -> None:
    """A lock in its folder stops its own unpacking for ever; so would a compiler that is not there."""
    quanto = pytest.importorskip("optimum.quanto")
    build = Path(quanto.__file__).parent / "library" / "extensions" / "cpp" / "build"
    there = build.exists()
    run = (
        "import torch; from conftest import applied, logits, random_system; "
        "import torch.utils.cpp_extension as compiler; compiler.load = None; "
        "[logits(applied(random_system('llama'), f'quanto:bits={bits}')) for bits in (8, 4, 2)]"
    )
    lock = build / "lock"
    try:
        build.mkdir(exist_ok=True)
        lock.touch()
        subprocess.run([sys.executable, "-c", run], cwd=Path(__file__).parent, check=True, timeout=120)
        assert sorted(path.name for path in build.iterdir()) == ["lock"] or there
    finally:
        lock.unlink()
        if not there:
            build.rmdir()


@pytest.mark.parametrize(
    "wrong", ["quanto:bits=3", "quanto:group_size=-1", "nf4:block_size=48", "fp4:block_size=0", "llm_int8:threshold=-1"]
)
def test_an_option_out_of_range_is_named_with_what_was_got(wrong: str) -> None:
    option, _, value = wrong.partition(":")[2].partition("=")
    with pytest.raises(TechniqueError, match=f"{option} must .*got {value}"):
        parse(wrong)
