"""What a system is, and what a technique is: one function from a system to a system.

Technique           writes `apply`
└── LayerTechnique  writes `layer`, for one weight matrix; the walk over the model is done here
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from effbench.errors import UnfitError
from effbench.toolbox.decoding import Generation, plain_decode
from effbench.toolbox.inputs import Inputs
from effbench.toolbox.walk import compress_blocks, matrices

if TYPE_CHECKING:
    from collections.abc import Iterator


class Data(Protocol):
    """The door to text and to other models that a technique is given (see `effbench.data`)."""

    seed: int

    def calibration(self, samples: int = 128, length: int | None = None) -> Tensor:
        """Token ids (samples, length) from the calibration split."""

    def batches(
        self, steps: int, batch_size: int, length: int | None = None, *, tokens: int = 0, seed: int | None = None
    ) -> Iterator[Tensor]:
        """`steps` batches of token ids (batch_size, length) from the training split; with `tokens`, only so many
        are drawn and read over and over."""

    def model(self, name: str) -> System:
        """Another model by name: a draft, a student, a teacher."""


@dataclass(frozen=True)
class CachePolicy:
    """How keys and values are kept: calling it gives a fresh, empty cache. Its fields are saved with the system."""

    config: PretrainedConfig = field(repr=False, compare=False)

    def __call__(self) -> Cache:
        return DynamicCache(config=self.config)

    @property
    def options(self) -> dict[str, Any]:
        """What must be written down to build this policy again for a model's config."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}


@dataclass(frozen=True)
class DecodingPolicy:
    """How tokens come out: one token for each pass over the model, greedy or sampled."""

    def __call__(
        self,
        system: System,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> Generation:
        """Continue `ids` (batch, tokens) by up to `max_new_tokens`; `stop` are token ids that end a text."""
        return plain_decode(
            system.model, system.new_cache(), ids, max_new_tokens, temperature=temperature, seed=seed, stop=stop
        )

    @property
    def options(self) -> dict[str, Any]:
        """What must be written down to build this policy again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class System:
    """Everything that would ship.

    `toolbox.decoding.forward(model, ids, cache, start)` is the door for quality; `new_cache()` gives the cache
    that is to be filled; `generate(system, ids, max_new_tokens, temperature=..., seed=..., stop=...)` is
    the door for speed; `parts` is whatever else ships, such as a draft model.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    new_cache: Callable[[], Cache]
    generate: Callable[..., Generation]
    parts: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def dense(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> System:
        """The model as it is: a growing cache and plain decoding."""
        return cls(model, tokenizer, CachePolicy(model.config), DecodingPolicy())

    def with_model(self, model: nn.Module) -> System:
        """This system around another model; its cache policy follows the new model's shape."""
        cache = self.new_cache
        if isinstance(cache, CachePolicy):
            cache = replace(cache, config=model.config)
        return replace(self, model=model, new_cache=cache)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """The number of tokens that the model was made for; 2048 where its config does not say."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)


@dataclass(frozen=True)
class Technique(ABC):
    """One in each file: the file's name is its name, the fields are the options, the docstring is the help."""

    paper: ClassVar[str] = ""

    def unfit(self, system: System) -> str | None:
        """Why this cannot be applied here, as a sentence for the table; `None` if it can."""
        return None

    def promised_bits(self) -> float | None:
        """Bits of a stored weight, scales left out, that the options promise; `None` if they promise none."""
        stored = getattr(self, "bits", getattr(self, "packing", None))
        return None if stored is None else float(stored)

    @abstractmethod
    def apply(self, system: System, data: Data) -> System:
        """The changed system. `system` may be changed in place: it belongs to this call.

        Raises `UnfitError` where only the work itself shows that it cannot be done.
        """


@dataclass(frozen=True)
class LayerTechnique(Technique):
    """A technique that treats one weight matrix at a time: it writes `layer`, this class walks the model."""

    needs_inputs: ClassVar[bool] = True
    """Whether `layer` looks at calibration inputs."""
    dense_inputs: ClassVar[bool] = False
    """Whether a block is fed by the dense blocks before it instead of by the compressed ones."""
    statistics: ClassVar[tuple[str, ...]] = ()
    """What `layer` reads of its inputs (such as "gram", see there), where that is all: inputs are then not kept."""

    def unfit(self, system: System) -> str | None:
        found = matrices(system.model)
        if not found:
            return "no plain weight matrix is left to compress: put this technique before the one that packs them"
        for name, linear in found:
            reason = self.unfit_layer(linear)
            if reason:
                return f"{name}: {reason}"
        return None

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        """Why one matrix cannot be treated; `None` if it can."""
        return None

    @abstractmethod
    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        """A module that takes the place of `linear` (out, in) and computes with what it stores.

        `inputs` are its calibration inputs, (tokens, in) if a plain tensor; `None` if no data are needed.
        """

    def apply(self, system: System, data: Data) -> System:
        ids = data.calibration(**self.calibration_size(system)) if self.needs_inputs else None
        compress_blocks(
            system.model,
            self.layer,
            ids,
            dense_inputs=self.dense_inputs,
            statistics=self.statistics,
            sequential=bool(getattr(self, "true_sequential", False)),
        )
        return system

    def calibration_size(self, system: System) -> dict[str, int]:
        """How many sequences, of what length, are read: the `samples` option by the model's context."""
        samples = int(getattr(self, "samples", 128))
        return {"samples": samples, "length": min(system.context, 2048)}


__all__ = [
    "CachePolicy",
    "Data",
    "DecodingPolicy",
    "Generation",
    "Inputs",
    "LayerTechnique",
    "System",
    "Technique",
    "UnfitError",
]
