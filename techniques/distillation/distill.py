"""Knowledge distillation: a smaller student learns the next-token distribution of the model, its teacher.

The student is a smaller model of the same family, or the teacher itself with some of its blocks left out. Its loss is
a mix of the divergence from the teacher's distribution and of the text's own cross-entropy, as in Hinton's paper. With
fresh text in every step the divergence adds little to what the text teaches; more is to be had where text is scarce.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from effbench.errors import UnfitError
from effbench.technique import CachePolicy, Data, System, Technique
from effbench.toolbox.checks import within
from effbench.toolbox.slicing import fixed_places
from effbench.toolbox.structure import keep_blocks
from effbench.toolbox.training import Recipe, check_training, next_token_loss, train
from effbench.toolbox.walk import blocks, matrices


@dataclass(frozen=True)
class Distill(Technique):
    """Train a smaller student to predict what the model predicts; the student takes its place.

    student: an embedded model, a folder or a hub id with the same vocabulary; without one, the model's own blocks,
        evenly chosen.
    layers: how many blocks are kept, without a student; 0 for half of them, rounded up.
    alpha: weight of the divergence from the teacher; the rest is the text's cross-entropy.
    temperature: by which both models' logits are divided in the divergence.
    steps: of training, with AdamW.
    batch_size, length: sequences in a step, and tokens in each.
    lr: the highest learning rate; a named student that is trained to its end wants a tenth of the default.
    tokens: of text, read over and over; 0 for fresh text in every step.
    seed: of the order in which text is read.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    student: str = ""
    layers: int = 0
    alpha: float = 0.5
    temperature: float = 1.0
    steps: int = 240
    batch_size: int = 4
    length: int = 256
    lr: float = 2e-3
    tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        within("layers", self.layers, 0)
        within("alpha", self.alpha, 0, 1)
        within("temperature", self.temperature, 0, open_ends=True)
        check_training(self.steps, self.batch_size, self.length, self.lr, fewest_steps=0)
        within("tokens", self.tokens, 0)
        if self.student and self.layers:
            raise ValueError(f"layers must be 0 where a student is named, got {self.layers}")

    def unfit(self, system: System) -> str | None:
        if self.student:
            return None
        layers = blocks(system.model)[1]
        depth = len(layers)
        if not matrices(system.model):
            return "a student cut from packed matrices cannot be trained: put this technique before the one that packs"
        if depth < 2:
            return "the model has a single block, so none can be left out: name a smaller student"
        if self.layers >= depth:
            return f"a student of {self.layers} blocks is no smaller than the model, which has {depth}"
        return fixed_places(layers)

    def apply(self, system: System, data: Data) -> System:
        teacher = system.model
        student = self._lent(system, data) if self.student else with_blocks(teacher, self._chosen(teacher))

        def loss(logits: Tensor, ids: Tensor) -> Tensor:
            value = logits.new_zeros((), dtype=torch.float32)
            if self.alpha < 1:
                value = value + (1 - self.alpha) * next_token_loss(logits, ids)
            if self.alpha > 0:
                with torch.no_grad():
                    wanted = teacher(input_ids=ids, use_cache=False).logits
                value = value + self.alpha * divergence(logits[:, :-1], wanted[:, :-1], self.temperature)
            return value

        if self.steps:
            batches = data.batches(self.steps, self.batch_size, self.length, tokens=self.tokens, seed=self.seed)
            train(student, batches, loss, Recipe(self.steps, self.lr))
        return system.with_model(student)

    def _chosen(self, teacher: nn.Module) -> list[int]:
        """Places of the blocks that are kept: the first, the last and evenly between; of one, the first."""
        depth = len(blocks(teacher)[1])
        kept = self.layers or -(-depth // 2)
        return [round(place * (depth - 1) / max(1, kept - 1)) for place in range(kept)]

    def _lent(self, system: System, data: Data) -> nn.Module:
        """The student by name.

        Raises `UnfitError` where it speaks another vocabulary, is more than a model, or is no smaller.
        """
        lent = data.model(self.student)
        if lent.tokenizer.get_vocab() != system.tokenizer.get_vocab():
            raise UnfitError(
                f"the student {self.student} has another vocabulary ({len(lent.tokenizer):,} tokens, the model has "
                f"{len(system.tokenizer):,}); give student= the name of a smaller model with the same tokenizer"
            )
        if type(lent.new_cache) is not CachePolicy or lent.parts:
            raise UnfitError(f"the student {self.student} has a cache or parts of its own; give student= a plain one")
        size, teacher_size = (_bytes(model) for model in (lent.model, system.model))
        if size >= teacher_size:
            raise UnfitError(
                f"the student {self.student} is no smaller than the model ({size:,} bytes, the model has "
                f"{teacher_size:,}); give student= the name of a smaller one"
            )
        return lent.model


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) in nats of the distributions at a temperature, averaged over tokens.

    Logits are (..., vocabulary), of which models may pad the same one to different widths. Multiplied by the
    temperature squared, so that gradients keep their size (section 2 of the paper).
    """
    width = min(student.shape[-1], teacher.shape[-1])
    guess, wanted = (
        functional.log_softmax(logits[..., :width].float().flatten(0, -2) / temperature, -1)
        for logits in (student, teacher)
    )
    return functional.kl_div(guess, wanted, reduction="batchmean", log_target=True) * temperature**2


def with_blocks(model: Any, places: list[int]) -> Any:
    """A copy of `model` with only the blocks at `places`, renumbered, and a config that says so."""
    _, layers = blocks(model)
    # the blocks that are left out are not even copied: deepcopy takes them for done
    left_out: dict[int, Any] = {id(layers[i]): None for i in range(len(layers)) if i not in places}
    smaller = copy.deepcopy(model, left_out)
    keep_blocks(smaller, places)
    return smaller


def _bytes(model: nn.Module) -> int:
    """What parameters and buffers take; tied ones count once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
