"""Cheats, each planted and each caught: a number that flatters is a defect."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from effbench import contract
from effbench.technique import CachePolicy, Data, DecodingPolicy, Generation, System, Technique
from effbench.toolbox.stored import StoredModule
from effbench.toolbox.walk import matrices, replace_module


def problems(technique: Technique, family: str = "") -> dict[str, str]:
    """What the contract has against it, by check."""
    return {result.name: result.problem for result in contract.check(technique, family) if result.problem}


class ListedLinear(StoredModule):
    """Keeps its weight in a list, where nobody counts it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features=in_features, out_features=out_features)
        self.secret: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.secret[0])


@dataclass(frozen=True)
class HiddenWeights(Technique):
    bits: int = 1

    def apply(self, system: System, data: Data) -> System:
        for name, linear in matrices(system.model):
            new = ListedLinear(linear.in_features, linear.out_features)
            new.secret.append(linear.weight.detach())
            replace_module(system.model, name, new)
        return system


def test_weights_hidden_in_a_list_are_found_alive() -> None:
    found = problems(HiddenWeights())
    assert "outside the model's parameters" in found["honest"]


@dataclass(frozen=True)
class FakeQuantization(Technique):
    """Rounds the weights to four bits and stores them at sixteen."""

    bits: int = 4

    def apply(self, system: System, data: Data) -> System:
        for _, linear in matrices(system.model):
            step = linear.weight.abs().amax() / 7
            linear.weight.data = (linear.weight / step).round() * step
        return system


def test_fake_quantization_is_called_simulated() -> None:
    notes = [result.note for result in contract.check(FakeQuantization()) if result.name == "honest"]
    assert any("simulated" in note for note in notes)


class BaseKeepingLayer(DynamicLayer):
    """Shows the last eight keys and keeps all of them alive behind the slice."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys[:, :, -8:], values[:, :, -8:]
        return keys, values


@dataclass(frozen=True)
class BaseKeepingCache(CachePolicy):
    def __call__(self) -> Cache:
        return Cache(layer_class_to_replicate=BaseKeepingLayer)


@dataclass(frozen=True)
class SlicedCache(Technique):
    def apply(self, system: System, data: Data) -> System:
        system.new_cache = BaseKeepingCache(system.config)
        return system


def test_a_cache_slice_that_keeps_its_base_is_charged_the_base() -> None:
    assert "keeps" in problems(SlicedCache(), "kv_cache")["cache is charged"]


@dataclass(frozen=True)
class CachelessDecoding(DecodingPolicy):
    def __call__(self, system: System, ids: Tensor, max_new_tokens: int, **options: Any) -> Generation:  # type: ignore[override]
        for _ in range(max_new_tokens):
            logits = system.model(input_ids=ids, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        return Generation(ids, max_new_tokens)


@dataclass(frozen=True)
class IgnoresCache(Technique):
    def apply(self, system: System, data: Data) -> System:
        system.generate = CachelessDecoding()
        return system


def test_a_generate_that_ignores_the_cache_is_seen() -> None:
    assert "system.new_cache()" in problems(IgnoresCache(), "speculative")["generates"]


@dataclass(frozen=True)
class TouchesModel(Technique):
    """Says that it changes the cache, and improves the model on the side."""

    scales: list[float] = field(default_factory=lambda: [1.5])

    def apply(self, system: System, data: Data) -> System:
        _, linear = matrices(system.model)[0]
        linear.weight.data.mul_(self.scales[0])
        return system


def test_a_cache_technique_that_changes_the_model_is_seen() -> None:
    assert "leave the model" in problems(TouchesModel(), "kv_cache")["untouched"]
    assert "untouched" not in problems(TouchesModel(), "quantization")


class GrowingLinear(nn.Linear):
    """Unpacks at the first pass and keeps what it unpacked."""

    def forward(self, x: Tensor) -> Tensor:
        if "copy" not in dict(self.named_buffers()):
            self.register_buffer("copy", self.weight.detach().clone())
        return super().forward(x)


@dataclass(frozen=True)
class GrowsByRunning(Technique):
    def apply(self, system: System, data: Data) -> System:
        for _, linear in matrices(system.model):
            linear.__class__ = GrowingLinear
        return system


def test_bytes_that_appear_by_running_are_seen() -> None:
    assert "change by running" in problems(GrowsByRunning())["honest"]


def test_a_technique_that_changes_nothing_is_caught_for_that_alone() -> None:
    @dataclass(frozen=True)
    class Nothing(Technique):
        def apply(self, system: System, data: Data) -> System:
            return system

    assert list(problems(Nothing(), "kv_cache")) == ["changes"], "its policies are honest"
