"""A system on disk: what comes back is what was saved, and nothing else can be smuggled in."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import random_system
from torch import Tensor, nn
from transformers import Cache

from effbench import store
from effbench.data import Data
from effbench.errors import ModelError
from effbench.jobs.applying import apply_pipeline
from effbench.jobs.row import source_for
from effbench.measure.memory import stored_bytes
from effbench.suite import Suite
from effbench.technique import System
from effbench.toolbox.walk import replace_module


def applied(system: System, pipeline: str) -> System:
    """The system after a pipeline."""
    data = Data(source_for(Suite(), system), system.context, lambda name: random_system("llama", seed=3))
    return apply_pipeline(system, pipeline, data)[0]


@pytest.mark.parametrize(
    "pipeline",
    [
        "dense",
        "magnitude",
        "rtn:bits=4",
        "rtn:bits=3",
        "svd:keep=0.8",
        "svd:keep=0.8+rtn:bits=8,group_size=0",
        "sink_window:sinks=2,window=30",
        "bitnet:steps=0",
    ],
)
def test_a_saved_system_comes_back_bit_for_bit(architecture: str, pipeline: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    try:
        system = applied(random_system(architecture), pipeline)
    except Exception as reason:
        assert "UnfitError" in type(reason).__name__, reason
        return
    store.save(system, tmp_path / "saved", pipeline)
    loaded = store.load(tmp_path / "saved")
    ids = torch.randint(3, 1000, (2, 60))
    with torch.inference_mode():
        expected = system.model(input_ids=ids).logits
        assert torch.equal(loaded.model(input_ids=ids).logits, expected)
    assert stored_bytes(loaded) == stored_bytes(system)
    assert loaded.new_cache == system.new_cache and loaded.generate == system.generate
    assert store.pipeline_of(tmp_path / "saved") == pipeline
    assert {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()} <= {".json", ".safetensors"}


def test_parts_travel_with_the_system(tmp_path: Path) -> None:
    system = random_system("llama")
    system.parts["draft"] = random_system("gpt2", seed=2).model
    store.save(system, tmp_path / "saved", "x")
    loaded = store.load(tmp_path / "saved")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.parts["draft"](ids).logits, system.parts["draft"](ids).logits)
    assert stored_bytes(loaded) == stored_bytes(system)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    system = random_system("gpt2")
    store.save(system, tmp_path / "saved", "dense")
    loaded = store.load(tmp_path / "saved").model
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight  # type: ignore[operator]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_module_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    system = random_system("llama")
    replace_module(system.model, "model.layers.0.mlp.act_fn", Opaque())
    with pytest.raises(ModelError, match="StoredModule"):
        store.save(system, tmp_path / "saved", "x")
    assert not (tmp_path / "saved").exists()


@dataclass
class LoosePolicy:
    def __call__(self) -> Cache:
        raise AssertionError


def test_a_policy_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    system = random_system("llama")
    system.new_cache = LoosePolicy()
    with pytest.raises(ModelError, match="CachePolicy"):
        store.save(system, tmp_path / "saved", "x")


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "torch.nn.modules.container:Sequential"])
def test_a_folder_cannot_name_code_of_its_own_choice(tmp_path: Path, name: str) -> None:
    store.save(applied(random_system("llama"), "rtn:bits=4"), tmp_path / "saved", "x")
    path = tmp_path / "saved" / "model" / "structure.json"
    content = json.loads(path.read_text())
    first = next(iter(content["modules"]))
    content["modules"][first]["class"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not loaded"):
        store.load(tmp_path / "saved")


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    store.save(random_system("llama"), tmp_path / "saved", "dense")
    path = tmp_path / "saved" / "effbench.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ModelError, match="format 99"):
        store.load(tmp_path / "saved")


def test_code_that_a_folder_brings_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("loading must not ask whether to run a folder's code")

    monkeypatch.setattr("builtins.input", asked)
    store.save(random_system("llama"), tmp_path / "saved", "dense")
    path = tmp_path / "saved" / "model" / "config.json"
    content = {**json.loads(path.read_text()), "model_type": "strange", "auto_map": {"AutoConfig": "evil.Strange"}}
    path.write_text(json.dumps(content))
    (path.parent / "evil.py").write_text("raise AssertionError('this code must not run')")
    with pytest.raises(ModelError, match="not a whole saved system"):
        store.load(tmp_path / "saved")
