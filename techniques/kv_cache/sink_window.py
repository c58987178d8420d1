"""StreamingLLM: the first tokens and the most recent ones stay in the cache, all between them are forgotten.

Attention needs somewhere to go when nothing is relevant, and models learn to send it to the first tokens, the sinks.
Dropping those breaks a model; keeping four of them and a window of recent tokens does not, and bounds the cache.

A query sees the sinks, the `window` tokens before it, and itself. Up to sinks + window tokens nothing differs from
the dense model. Text fed in chunks gets the result of text fed token by token, since each query has its own mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from effbench.errors import UnfitError
from effbench.technique import CachePolicy, Data, System, Technique
from effbench.toolbox.architectures import has_slopes
from effbench.toolbox.checks import one_of, within
from effbench.toolbox.decoding import MaskedCache
from effbench.toolbox.rotary import Rotation, frequencies, layer_kinds, rotary_layout


@dataclass(frozen=True)
class SinkWindow(Technique):
    """Keep the first `sinks` and the last `window` tokens of the cache.

    sinks: first tokens that are never evicted; with 0 this is window attention, which collapses.
    window: most recent tokens that are kept.
    positions: "cache": the sinks are rotated to stand right before the window, so that no distance grows beyond
        what the model was trained on (the paper's method); "original": every key stays where it was.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv:2309.17453"

    sinks: int = 4
    window: int = 252
    positions: str = "cache"

    def __post_init__(self) -> None:
        within("sinks", self.sinks, 0)
        within("window", self.window, 1)
        one_of("positions", self.positions, ("cache", "original"))

    def unfit(self, system: System) -> str | None:
        config, kept = system.config.get_text_config(decoder=True), self.sinks + self.window
        if type(system.new_cache) is not CachePolicy:
            return f"a {type(system.new_cache).__name__} is already how this system keeps keys and values"
        if has_slopes(config):
            return "its attention counts distance by place in the cache (ALiBi), which eviction would change"
        if config._attn_implementation not in ("eager", "sdpa"):
            return f"attention {config._attn_implementation!r} takes no mask of ours; load it with eager or sdpa"
        layers = DynamicCache(config=config).layers
        other = next((layer for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
        if other is not None or "chunked_attention" in layer_kinds(config, len(layers)):
            name = type(other).__name__ if other is not None else "chunked attention"
            return f"not all of its layers keep one key and value for each token ({name})"
        if all(0 < _local(layer) <= self.window + 1 for layer in layers):
            return f"its own sliding window of {_local(layers[0])} tokens already keeps no more than that"
        if kept >= system.context:
            return f"it keeps {kept} tokens and the model's context is {system.context}: nothing would be evicted"
        if self.positions == "cache":
            rope = getattr(config, "rope_parameters", None)
            if not rope:
                return "its config gives no rotation by which keys could be moved; use positions=original"
            if rope.get("rope_type") in ("dynamic", "longrope"):
                return "its rotations change with the length of the text; use positions=original"
        return None

    def apply(self, system: System, data: Data) -> System:
        layout = rotary_layout(system.model) if self.positions == "cache" else ""
        system.new_cache = SinkWindowCachePolicy(
            system.config, self.sinks, self.window, layout, system.config.model_type if layout else ""
        )
        return system


@dataclass(frozen=True)
class SinkWindowCachePolicy(CachePolicy):
    """Makes caches that keep `sinks` and `window` tokens, rotating sinks by `layout` unless that is empty.

    `layout` was found out from the keys of a model of type `rotates_like`. Raises `UnfitError` for a config of
    another type: its keys may be made in another way.
    """

    sinks: int = 4
    window: int = 252
    layout: str = ""
    rotates_like: str = ""

    def __post_init__(self) -> None:
        if self.layout and self.config.model_type != self.rotates_like:
            raise UnfitError(
                f"sink_window learned how a {self.rotates_like} rotates its keys and the model became a "
                f"{self.config.model_type}; put it after the technique that changes the model"
            )

    def __call__(self) -> Cache:
        config = self.config.get_text_config(decoder=True)
        dense = DynamicCache(config=config).layers
        kinds = layer_kinds(config, len(dense))
        rotations = {kind: Rotation(frequencies(config, kind), self.layout) for kind in set(kinds) if self.layout}
        layers = [
            SinkWindowLayer(self.sinks, self.window, _local(layer), rotations.get(kind))
            for layer, kind in zip(dense, kinds, strict=True)
        ]
        return SinkWindowCache(layers, kinds, additive=config._attn_implementation == "eager")


def _local(layer: Any) -> int:
    """The model's own sliding window in a layer; 0 where it has none."""
    return int(getattr(layer, "sliding_window", 0))


class SinkWindowLayer(DynamicLayer):
    """One layer's kept keys and values (batch, heads, tokens, width): sinks first, then the recent ones in order.

    `local` is the model's own sliding window (0: none); it holds besides the technique's, on the distances that
    the model sees. After `activate_past_recording` nothing is evicted until `crop`, so that a pass can be undone.
    """

    def __init__(self, sinks: int, window: int, local: int, rotation: Rotation | None) -> None:
        super().__init__()
        self.sinks, self.window, self.local, self.rotation = sinks, window, local, rotation
        self.is_sliding = bool(local)
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.first_sink, self.first_recent = 0, self.sinks

    @property
    def kept(self) -> list[int]:
        """The places in the text of what is stored."""
        return [*range(self.first_sink, min(self.sinks, self.seen)), *range(self.first_recent, self.seen)]

    def activate_past_recording(self) -> None:
        """Let `crop` undo what comes from now on."""
        self.record_past = True

    def _shift(self, place: int) -> int:
        """How many places the sinks have moved up for a query at `place`."""
        return max(0, place - self.sinks - self.window) if self.rotation else 0

    def _oldest(self, place: int) -> tuple[int, int]:
        """The first sink and the first recent token that a query at `place` may see."""
        sink, recent = 0, max(self.sinks, place - self.window)
        if self.local:
            recent = max(recent, place - self.local + 1)
            sink = min(max(0, place - self._shift(place) - self.local + 1), self.sinks)
        return sink, recent

    def needs_mask(self, tokens: int) -> bool:
        """Whether the next `tokens` tokens do not all see all that is stored before them."""
        return self._oldest(self.seen + tokens - 1) != (self.first_sink, self.first_recent)

    def visible(self, tokens: int) -> Tensor:
        """Which of the keys that `update` will give each of the next `tokens` tokens sees, (tokens, keys)."""
        places = range(self.seen, self.seen + tokens)
        query = torch.tensor([(place, self._shift(place), *self._oldest(place)) for place in places])
        place, shift, oldest_sink, oldest_recent = query[:, :, None].unbind(1)
        sink = torch.arange(self.first_sink, min(self.sinks, places.stop))
        recent = torch.arange(self.first_recent, max(self.first_recent, places.stop))
        turned = self._shift(places[0]) + torch.arange(self._shift(places[-1]) - self._shift(places[0]) + 1)
        turned, sink = turned.repeat_interleave(len(sink)), sink.repeat(len(turned))
        seen_sinks = (sink >= oldest_sink) & (sink <= place) & (turned == shift)
        return torch.cat([seen_sinks, (recent >= oldest_recent) & (recent <= place)], 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values and give those that their queries attend to, in the order of `visible`."""
        first = self.seen
        self.keys, self.values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        keys, values = self.keys, self.values
        sinks = min(self.sinks, self.seen) - self.first_sink
        last_shift = self._shift(self.seen - 1)
        if last_shift and sinks and self.rotation:
            # A query stands at its true place, so the sinks come to it: one turned copy for each different distance.
            steps = range(self._shift(first), last_shift + 1)
            turned = self.rotation(keys[..., :sinks, :], steps)
            keys = torch.cat([turned, keys[..., sinks:, :]], -2)
            if len(steps) > 1:
                values = torch.cat([values[..., :sinks, :].repeat(1, 1, len(steps), 1), values[..., sinks:, :]], -2)
        if not self.record_past:
            self._keep(*self._oldest(self.seen))
        return keys, values

    def _keep(self, sink: int, recent: int, removed: int = 0) -> None:
        """Drop what is older than the first `sink` and `recent` token, and the last `removed` tokens."""
        held, end = max(0, min(self.sinks, self.seen) - self.first_sink), self.keys.shape[-2] - removed
        from_sink, from_recent = sink - self.first_sink, held + recent - self.first_recent
        if from_sink or from_recent > held or removed:
            # Copied, since a slice would keep all that was evicted alive.
            parts = [slice(from_sink, min(held, end)), slice(from_recent, max(from_recent, end))]
            self.keys = torch.cat([self.keys[..., part, :] for part in parts], -2)
            self.values = torch.cat([self.values[..., part, :] for part in parts], -2)
        self.first_sink, self.first_recent = sink, recent
        self.seen -= removed

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, then evict.

        Raises `RuntimeError` where what they had pushed out would be needed again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        sink, recent = self._oldest(self.seen + tokens_to_remove)
        if sink < self.first_sink or recent < self.first_recent:
            raise RuntimeError("evicted tokens cannot come back: call activate_past_recording before the pass")
        self._keep(sink, recent, -tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens kept: the next token's place."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked by a model that makes its own mask: how many keys there will be, and the first one's place.

        Raises `RuntimeError` where a causal mask would let a query see what was evicted for it.
        """
        if self.needs_mask(query_length):
            raise RuntimeError(
                f"{query_length} tokens at once do not fit into {self.sinks} sinks and a window of {self.window} "
                "without a mask; feed them through effbench.toolbox.decoding.forward"
            )
        stored = self.keys.shape[-2] if self.is_initialized else 0
        return stored + query_length, self.seen - stored


class SinkWindowCache(MaskedCache):
    """The layers of a model whose cache is `SinkWindowLayer`s; `kinds` are their types, `additive` its mask's form."""

    tokens_at_once = 256
    layers: list[SinkWindowLayer]

    def __init__(self, layers: list[SinkWindowLayer], kinds: list[str], *, additive: bool) -> None:
        super().__init__(layers=layers)
        self._first = dict(zip(reversed(kinds), reversed(layers), strict=True))
        self._additive = additive

    def mask(self, tokens: int, device: torch.device) -> Tensor | dict[str, Tensor] | None:
        """Layers of one kind share a mask."""
        if not any(layer.needs_mask(tokens) for layer in self._first.values()):
            return None
        masks = {}
        for kind, layer in self._first.items():
            mask = layer.visible(tokens)[None, None].to(device)
            if self._additive:
                mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))
