"""From a name to a system, or to one sentence."""

import json
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import random_model, random_system
from safetensors.torch import load_file, save_file

from effbench import harness, models, registry, results, store
from effbench.data import Data
from effbench.errors import ModelError
from effbench.jobs.row import Job
from effbench.reference import NAMES
from effbench.suite import Suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with safetensors weights."""
    system = random_system("llama")
    system.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    system.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_model_loads_in_the_dtype_asked_for(name: str) -> None:
    system = models.load(name, "float32")
    assert system.model.dtype == torch.float32 and system.context == 512
    assert models.load(name).model.dtype == torch.bfloat16


def test_a_folder_loads(folder: Path) -> None:
    models.check(str(folder))
    ids = torch.arange(10, 20)[None]
    expected = random_model("llama")(input_ids=ids).logits
    assert torch.equal(models.load(str(folder)).model(input_ids=ids).logits, expected)


def test_outliers_leave_the_function_as_it_is() -> None:
    ids = torch.arange(10, 74)[None]
    plain, stressed = models.load("ref-70k", "float32"), models.load("ref-70k@outliers", "float32")
    assert torch.allclose(plain.model(ids).logits, stressed.model(ids).logits, atol=1e-3)
    norms = [name for name, _ in plain.model.named_parameters() if "layernorm" in name]
    assert any(
        stressed.model.get_parameter(name).abs().max() > 4 * plain.model.get_parameter(name).abs().max()
        for name in norms
    )


def refused(name: str, **trust: bool) -> str:
    with pytest.raises(ModelError) as caught:
        models.check(name, models.Trust(**trust))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_name_gets_a_suggestion() -> None:
    assert "did you mean 'ref-1m'" in refused("ref-1n")


def test_an_unknown_variant_is_refused() -> None:
    assert "ref-1m@outliers" in refused("ref-1m@odd")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no model" in refused(str(tmp_path / "nowhere"))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(str(folder))


def test_pickled_weights_are_refused_unless_allowed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert "--allow-pickle" in refused(str(folder))
    models.check(str(folder), models.Trust(pickle=True))


def test_weights_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in refused(str(folder))


@pytest.mark.parametrize("content", [b"", b"\0" * 5, b"\xff" * 64, struct.pack("<Q", 4) + b"{[}]"])
def test_a_corrupt_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "corrupt" in refused(str(folder))


def test_a_hub_id_without_a_network_is_refused_in_one_sentence() -> None:
    assert "hub" in refused("nobody/no-such-model")


def test_a_folder_whose_config_names_an_unknown_architecture_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "martian", "architectures": ["Martian"]}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(str(folder))


def test_only_a_model_larger_than_its_gpu_is_spread_and_then_not_read_back_to_one_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = models.weights_bytes(str(folder))
    for free, spread in ((size, True), (2 * size, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert models.is_spread(str(folder), "cuda") is spread
        assert (models._placement(str(folder), "cuda")["device_map"] == "auto") is spread
        job = Job(str(tmp_path), asdict(Suite(model=str(folder), device="cuda")), "dense", str(tmp_path / "system"))
        store.save(models.load(str(folder)), tmp_path / "system", "dense")
        monkeypatch.setattr(store, "load", lambda *_: "one device")
        monkeypatch.setattr(job, "dense", lambda: "all devices")
        assert job.load() == ("all devices" if spread else "one device")
    assert models._placement(str(folder), "cpu") == {} and not models.is_spread(str(folder), "cpu")


def test_float16_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="slower"):
        models.load("ref-70k", "float16")


def test_a_tensor_that_is_missing_is_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks model.layers.0.mlp.down_proj.weight"):
        models.load(str(folder))


def test_a_saved_member_of_the_family_still_speaks_its_language(tmp_path: Path) -> None:
    store.save(models.load("ref-70k"), tmp_path / "saved", "dense")
    assert models.speaks_reference(str(tmp_path / "saved")) and models.speaks_reference("ref-1m@outliers")
    assert not models.speaks_reference("someone/model")


def test_a_saved_system_is_measured_in_the_dtype_that_it_has(tmp_path: Path) -> None:
    store.save(models.load("ref-70k", "float32"), tmp_path / "saved", "dense")
    suite = Suite(model=str(tmp_path / "saved"), device="cpu", threads=1)
    assert suite.dtype == "bfloat16" and harness.resolve(suite).dtype == "float32"
    assert harness.resolve(Suite(model="ref-70k", device="cpu", threads=1)).dtype == "bfloat16"


def test_weights_of_unknown_size_are_never_loaded_twice_at_once(folder: Path) -> None:
    size = models.weights_bytes(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert models.weights_bytes(str(folder)) == size > 0
    assert Suite(model=str(folder), device="cpu", threads=2).rows_at_once == 2
    assert Suite(model="someone/model", device="cpu", threads=2).rows_at_once == 1


def test_a_policy_that_changed_is_another_input(tmp_path: Path) -> None:
    system = models.load("ref-70k")
    found = []
    for window in (60, 124):
        technique = registry.get("sink_window")(window=window)
        folder = tmp_path / str(window)
        store.save(technique.apply(system, Data(None, 512, models.load)), folder, f"sink_window:window={window}")
        found.append(results.inputs(str(folder)))
    assert found[0]["weights"] == found[1]["weights"] and found[0]["config"] != found[1]["config"]


def test_a_loaded_model_is_in_memory_of_its_own(folder: Path) -> None:
    """Mapped pages of a file would stay resident beside all that is made of them."""
    loaded = models.load(str(folder), "bfloat16").model
    for (name, one), other in zip(random_model("llama").named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(folder) not in maps.read_text()
