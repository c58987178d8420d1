"""How techniques are found and pipelines are written."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from effbench import registry
from effbench.errors import PackageError, TechniqueError


def test_every_file_in_a_family_is_a_technique_with_a_summary_and_defaults() -> None:
    for name in registry.names():
        assert registry.entries()[name].summary
        registry.get(name)()


def test_listing_names_imports_no_technique() -> None:
    import subprocess
    import sys

    code = "import sys; from effbench import registry; registry.names(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("", "dense"),
        ("dense", "dense"),
        ("magnitude", "magnitude"),
        (" magnitude : sparsity = 0.50 ", "magnitude:sparsity=0.5"),
        ("magnitude:pattern=2:4,sparsity=.5", "magnitude:sparsity=0.5,pattern=2:4"),
        ("magnitude+rtn:bits=4", "magnitude+rtn:bits=4"),
    ],
)
def test_a_pipeline_has_one_canonical_form(asked: str, written: str) -> None:
    assert registry.canonical(asked) == written
    assert registry.canonical(written) == written


@pytest.mark.parametrize("pipeline", ["bitstack:megabytes=14483.456", "magnitude:sparsity=0.33333333"])
def test_a_number_is_written_in_full(pipeline: str) -> None:
    assert registry.canonical(pipeline) == pipeline


def test_an_option_that_is_a_number_may_be_a_fraction() -> None:
    assert registry.canonical("recover:alpha=0.5") == "recover:alpha=0.5"


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("magnitud", "did you mean 'magnitude'.*effbench list"),
        ("magnitude:sparsty=0.5", "did you mean 'sparsity'"),
        ("magnitude:sparsity=1.5", "got 1.5"),
        ("magnitude:sparsity=half", "must be a number, got 'half'"),
        ("magnitude:sparsity=0.5,sparsity=0.6", "twice"),
        ("magnitude:", "malformed"),
        ("magnitude:sparsity", "malformed"),
        ("+magnitude", "malformed"),
        ("magnitude++magnitude", "malformed"),
    ],
)
def test_a_wrong_pipeline_is_refused_in_one_sentence(pipeline: str, message: str) -> None:
    with pytest.raises(TechniqueError, match=message) as caught:
        registry.parse(pipeline)
    assert "\n" not in str(caught.value)


def test_a_seed_reaches_techniques_that_have_one_and_were_not_told() -> None:
    assert getattr(registry.parse("distill", seed=7)[0], "seed") == 7  # noqa: B009
    assert getattr(registry.parse("distill:seed=3", seed=7)[0], "seed") == 3  # noqa: B009


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are seen as installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, point: str, code: str) -> None:
    """A package with one entry point."""
    name, _, module = point.partition(" = ")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[effbench.techniques]\n{name} = {module}\n")
    (site / f"{module}.py").write_text(code)
    registry.entries.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """No test sees another's packages."""
    yield
    registry.entries.cache_clear()


def test_two_techniques_of_one_name_are_an_error_that_names_both(site: Path) -> None:
    install(site, "pruning.magnitude = stranger", "")
    with pytest.raises(TechniqueError, match="stranger"):
        registry.entries()


def test_a_missing_package_breaks_only_its_technique_and_is_named(site: Path) -> None:
    install(site, "quantization.odd = odd_technique", "import a_package_that_is_not_there\n")
    with pytest.raises(PackageError, match="a_package_that_is_not_there"):
        registry.get("odd")
    registry.get("magnitude")


def test_a_module_without_a_technique_is_refused(site: Path) -> None:
    install(site, "quantization.none = empty_module", "")
    with pytest.raises(TechniqueError, match="exactly one"):
        registry.get("none")
