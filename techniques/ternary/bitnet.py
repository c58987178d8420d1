"""Ternary weights: every matrix becomes -1, 0, 1 times one scale, trained to bear it, and inputs become 8 bits.

Rounding alone destroys a model that was not trained for it, so the loaded checkpoint is trained on with rounded weights
and inputs in every pass; gradients go straight through the rounding. What is left is packed. The paper trains such a
model from scratch and with a norm before every matrix; here the architecture stays what it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effbench.technique import Data, Inputs, LayerTechnique, System
from effbench.toolbox.checks import one_of
from effbench.toolbox.ternary import PACKINGS, TernaryLinear, TernaryTraining
from effbench.toolbox.training import Recipe, check_training, next_token_loss, train
from effbench.toolbox.walk import blocks, matrices, replace_module


@dataclass(frozen=True)
class BitNet(LayerTechnique):
    """Round the blocks' matrices to -1, 0, 1 (b1.58), train through the rounding, and pack the result.

    steps: of training; 0 for plain rounding.
    batch_size, length: sequences in a step, and tokens in each.
    lr: the highest learning rate, of AdamW.
    packing: "2" bits a weight, or "1.6": five weights a byte, slower to unpack.
    seed: of the order in which text is read.
    """

    paper: ClassVar[str] = "Ma et al. 2024, arXiv:2402.17764"
    needs_inputs: ClassVar[bool] = False

    steps: int = 300
    batch_size: int = 4
    length: int = 256
    lr: float = 2e-3
    packing: str = "2"
    seed: int = 0

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch_size, self.length, self.lr, fewest_steps=0)
        one_of("packing", self.packing, PACKINGS)

    def unfit_layer(self, linear: nn.Linear) -> str | None:
        return None if torch.isfinite(linear.weight).all() else "it has weights that are not finite"

    def layer(self, linear: nn.Linear, inputs: Inputs | Tensor | None) -> nn.Module:
        return TernaryLinear.pack(linear.weight, linear.bias, self.packing, linear.weight.dtype)

    def apply(self, system: System, data: Data) -> System:
        model = system.model
        stored = {name: linear.weight.dtype for name, linear in matrices(model)}
        for name, linear in matrices(model):
            replace_module(model, name, TernaryTraining(linear))
        if self.steps:
            batches = data.batches(self.steps, self.batch_size, self.length, seed=self.seed)
            weights = list(blocks(model)[1].parameters())
            train(model, batches, next_token_loss, Recipe(self.steps, self.lr), parameters=weights)
        for name, dtype in stored.items():
            # packed from the float32 weights: bfloat16 would move some across the edge between two codes
            trained = model.get_submodule(name)
            replace_module(model, name, TernaryLinear.pack(trained.weight, trained.bias, self.packing, dtype))
        return system
