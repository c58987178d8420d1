"""Rotary embeddings: how a model turns its keys with position, and turning stored keys further."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from effbench.errors import UnfitError
from effbench.toolbox.decoding import forward

LAYOUTS = ("halves", "pairs")
"""How channels are paired: i with i + half (Llama, GPT-NeoX), or neighbours (GPT-J, Cohere)."""


def layer_kinds(config: PretrainedConfig, layers: int) -> list[str]:
    """The type of each layer, for which a model may have its own mask and its own rotation."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * layers)


def frequencies(config: PretrainedConfig, kind: str) -> Tensor:
    """Radians for each step of position, (pairs,), in layers of this kind; the model's own scaling is in them."""
    rope = config.rope_parameters
    nested = kind in rope
    rope = rope[kind] if nested else rope
    if rope["rope_type"] != "default":
        found: Tensor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, **({"layer_type": kind} if nested else {}))[0]
        return found
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * rope.get("partial_rotary_factor", 1.0))
    return rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


@torch.inference_mode()
def rotary_layout(model: nn.Module, distance: int = 64) -> str:
    """Which of `LAYOUTS` this model's keys follow, seen on the keys of the same few tokens at two distances.

    Raises `UnfitError` where the keys of some layer are not rotated as the config says.
    """
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    whole: PretrainedConfig = model.config
    config = whole.get_text_config(decoder=True)
    near, far = DynamicCache(config=whole), DynamicCache(config=whole)
    forward(model, ids, near, 0)
    forward(model, ids, far, distance)
    kinds = layer_kinds(config, len(near.layers))
    worst = {}
    for layout in LAYOUTS:
        worst[layout] = 0.0
        for before, after, kind in zip(near.layers, far.layers, kinds, strict=True):
            turn = Rotation(frequencies(config, kind), layout)
            if 2 * len(turn.frequencies) > before.keys.shape[-1]:
                raise UnfitError("its keys are narrower than their rotation; use positions=original")
            wrong = (turn(before.keys, range(distance, distance + 1)) - after.keys).float().norm()
            worst[layout] = max(worst[layout], float(wrong / after.keys.float().norm()))
    best = min(LAYOUTS, key=lambda layout: worst[layout])
    if not worst[best] < 0.1:  # a wrong rotation is off by about 1, bfloat16 by about 0.01
        raise UnfitError(
            f"some layer's keys do not rotate with position as the config says (off by {worst[best]:.2f} of their "
            "length); use positions=original"
        )
    return best


class Rotation:
    """Turns rotated keys further. Turns add up, so a key stored at place j is moved to j + n by a turn of n steps."""

    def __init__(self, frequencies: Tensor, layout: str) -> None:
        self.frequencies, self.layout = frequencies, layout
        self._step, self._angles = range(0), (frequencies, frequencies)

    def __call__(self, keys: Tensor, steps: range) -> Tensor:
        """Copies of `keys` (batch, heads, tokens, width), one for each of `steps`, in a row of tokens."""
        cos, sin = self._cos_sin(steps, keys.device)
        width = 2 * len(self.frequencies)
        turning, still = keys.unsqueeze(2).split([width, keys.shape[-1] - width], -1)
        turning = turning.float()
        x, y = turning.chunk(2, -1) if self.layout == "halves" else turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = x * cos - y * sin, y * cos + x * sin
        both = torch.cat(turned, -1) if self.layout == "halves" else torch.stack(turned, -1).flatten(-2)
        still = still.expand(-1, -1, len(steps), -1, -1)
        return torch.cat([both.to(keys.dtype), still], -1).flatten(2, 3)

    def _cos_sin(self, steps: range, device: torch.device) -> tuple[Tensor, Tensor]:
        """(steps, 1, pairs) each. A single step's are kept, since all layers of a pass ask for the same."""
        if steps == self._step and self._angles[0].device == device:
            return self._angles
        places = torch.tensor(list(steps), dtype=torch.float64)
        angles = (places[:, None] * self.frequencies.double().cpu())[:, None]
        found = angles.cos().float().to(device), angles.sin().float().to(device)
        if len(steps) == 1:
            self._step, self._angles = steps, found
        return found
