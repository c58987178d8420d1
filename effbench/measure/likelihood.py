"""Log-likelihoods of choices after their contexts, with every token that several of them share run once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench.measure.encoding import Choices
from effbench.measure.prefixes import Row, fitting, lay_out
from effbench.measure.quality import scored_through_cache, window_logits
from effbench.technique import System
from effbench.toolbox.decoding import takes

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens in a batch. More do not make a CPU faster; a GPU with too little memory is given half, and half again."""
BATCH_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""The most that a batch's float32 logits may take, unless those of one row take more. A CPU's should not be far larger
than what it keeps at hand."""
REACH = re.compile(r"(^|_)(window|chunk|local)")
"""Names of a config's numbers that say how far a layer looks back."""
NO_REACH = re.compile(r"(^|_)(layers?|pattern|use|every|experts?)(_|$)")
"""What such names are about if not a length."""


class Likelihoods:
    """Scores choices with a system.

    Sequences that begin alike become one row, where each token is told its place and which tokens it sees. Whether
    a model can be given that is tried out on it; if not, each sequence is a row. Systems with a cache policy of
    their own are scored through their cache, with sequences of one length together, since nothing that fills up
    a row may enter it.
    """

    def __init__(self, system: System, batch_tokens: int | None = None) -> None:
        self.system = system
        device = "cpu" if system.device.type == "cpu" else "cuda"
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device]
        self._through_cache = scored_through_cache(system)
        self._branching: bool | None = False if self._through_cache else None
        config = system.config.get_text_config(decoder=True)
        self._most_scored = max(1, BATCH_BYTES[device] // (4 * config.vocab_size))
        self._width = int(getattr(config, "hidden_size", 512))
        self._reach = reach(config)

    def answer(self, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood (choices,) of each choice after its context, and whether greedy decoding would give it.

        What does not fit into the model's context is left out at the start, as in lm-eval.
        """
        sequences, firsts, targets = self._sequences(choices)
        values, greedy = np.zeros(len(sequences)), np.zeros(len(sequences), bool)
        if self._branching is None:
            self._branching = takes_trees(self.system)
        long = [place for place, sequence in enumerate(sequences) if len(sequence) > self._reach]
        short = [place for place, sequence in enumerate(sequences) if len(sequence) <= self._reach]
        for places, branching in ((long, False), (short, self._branching)):
            rows = lay_out(
                [sequences[place] for place in places],
                longest=self.system.context,
                branching=branching,
                width=self._width,
            )
            for row in rows:
                row.members = [(places[number], slots[firsts[places[number]] :]) for number, slots in row.members]
            self._score(rows, targets, values, greedy)
        return values, greedy

    def _sequences(self, choices: Choices) -> tuple[list[np.ndarray], list[int], list[np.ndarray]]:
        """What is run for each choice: its context and all its tokens but the last; where the first token that
        predicts one of the choice stands; and the tokens that are to be predicted."""
        sequences, firsts, targets = [], [], []
        for place, start, length in zip(choices.context_of, choices.starts, choices.lengths, strict=True):
            target = choices.tokens[start : start + length]
            context = choices.contexts[place][-max(1, self.system.context + 1 - length) :]
            sequences.append(np.concatenate([context, target[:-1]]))
            firsts.append(len(context) - 1)
            targets.append(target)
        return sequences, firsts, targets

    def _score(self, rows: list[Row], targets: list[np.ndarray], values: np.ndarray, greedy: np.ndarray) -> None:
        wanted = [np.unique(np.concatenate([slots for _, slots in row.members])) for row in rows]
        start = 0
        while start < len(rows):
            count = self._together(rows[start:], [len(slots) for slots in wanted[start:]])
            here = slice(start, start + count)
            try:
                self._score_batch(rows[here], wanted[here], targets, values, greedy)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch_tokens = count * len(rows[start]) // 2
                continue
            start += count

    def _together(self, rows: list[Row], scored: list[int]) -> int:
        """How many of the first rows are run together."""
        if not self._through_cache:
            return fitting(rows, scored, tokens=self.batch_tokens, most_scored=self._most_scored)
        equal = sum(len(row) == len(rows[0]) for row in rows)
        return min(equal, max(1, self.batch_tokens // len(rows[0])))

    def _score_batch(
        self,
        rows: list[Row],
        wanted: list[np.ndarray],
        targets: list[np.ndarray],
        values: np.ndarray,
        greedy: np.ndarray,
    ) -> None:
        log_probabilities = torch.log_softmax(self._logits(rows, wanted), -1)
        starts = np.cumsum([0, *(len(slots) for slots in wanted)])
        numbers = [number for row in rows for number, _ in row.members]
        places = [
            start + np.searchsorted(slots, mine)
            for row, slots, start in zip(rows, wanted, starts, strict=False)
            for _, mine in row.members
        ]
        place = torch.from_numpy(np.concatenate(places)).to(log_probabilities.device)
        target = torch.from_numpy(np.concatenate([targets[number] for number in numbers])).to(place.device)
        found = log_probabilities[place, target]
        best = found == log_probabilities.amax(-1)[place]
        best[best.clone()] = log_probabilities[place[best]].argmax(-1) == target[best]  # of equals the first one
        missed = (~best).cpu().numpy()
        firsts = np.cumsum([0, *(len(mine) for mine in places)])[:-1]
        values[numbers] = np.add.reduceat(found.double().cpu().numpy(), firsts)
        greedy[numbers] = ~np.logical_or.reduceat(missed, firsts)

    def _logits(self, rows: list[Row], wanted: list[np.ndarray]) -> Tensor:
        """The float32 logits (scored tokens, vocabulary) of the slots that are `wanted` of each row."""
        if self._through_cache:
            ids = torch.from_numpy(np.stack([row.ids for row in rows]))
            keep = len(rows[0]) - min(int(slots[0]) for slots in wanted)
            logits = window_logits(self.system, ids, through_cache=True, keep=keep)
            skipped = len(rows[0]) - keep
            return torch.cat([logits[row, slots - skipped] for row, slots in enumerate(wanted)]).float()
        return tree_logits(self.system.model, rows, wanted, self.system.device)


@torch.inference_mode()
def tree_logits(model: nn.Module, rows: list[Row], wanted: list[np.ndarray], device: torch.device) -> Tensor:
    """The float32 logits (scored tokens, vocabulary) of the slots `wanted` of each row, from one pass over all rows."""
    count, length = len(rows), max(len(row) for row in rows)
    ids, places = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
    ends = np.tile(np.arange(1, length + 1), (count, 1))  # what fills up a row sees itself, and nothing sees it
    for number, row in enumerate(rows):
        ids[number, : len(row)], places[number, : len(row)], ends[number, : len(row)] = row.ids, row.places, row.ends
    options: dict[str, Any] = {}
    if any(row.branches for row in rows):
        slot = torch.arange(length, device=device)
        until = torch.from_numpy(ends).to(device)[:, None, None, :]
        seen = (slot[:, None] >= slot) & (slot[:, None] < until)
        options = {"attention_mask": _as_mask(seen, model), "position_ids": torch.from_numpy(places).to(device)}
    index = torch.from_numpy(np.repeat(np.arange(count), [len(slots) for slots in wanted])).to(device)
    slots = torch.from_numpy(np.concatenate(wanted)).to(device)
    with _only(model, index, slots, (count, length)) as picked:
        logits: Tensor = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **options).logits
    return (logits[0] if picked else logits[index.to(logits.device), slots.to(logits.device)]).float()


def _as_mask(seen: Tensor, model: nn.Module) -> Tensor:
    """Which keys a query sees (rows, 1, queries, keys), as the model's attention wants it."""
    if getattr(model.config, "_attn_implementation", "") != "eager":
        return seen
    kind = getattr(model, "dtype", torch.float32)
    return torch.zeros(seen.shape, dtype=kind, device=seen.device).masked_fill(~seen, torch.finfo(kind).min)


@contextmanager
def _only(model: nn.Module, index: Tensor, slots: Tensor, shape: tuple[int, int]) -> Iterator[list[bool]]:
    """Let the head see only some tokens (row `index`, `slots`), as one row; what is given holds an item if it did.

    Over a large vocabulary the head outweighs a small model, and few tokens are scored.
    """
    picked: list[bool] = []

    def pick(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != shape:
            return None
        picked.append(True)
        return hidden[index.to(hidden.device), slots.to(hidden.device)][None], *arguments[1:]

    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    handle = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
    try:
        yield picked
    finally:
        if handle is not None:
            handle.remove()


def reach(config: Any) -> int:
    """The longest sequence in which every token sees all before it, and positions mean what they do in a longer one:
    that of the smallest window or chunk that a model's config names, or of its unscaled rotations."""
    found = [2**31]
    for name, value in config.to_dict().items():
        if isinstance(value, int) and value > 1 and REACH.search(name) and not NO_REACH.search(name):
            found.append(value)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            first = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            found.append(int(first))
    return min(found)


@torch.inference_mode()
def takes_trees(system: System) -> bool:
    """Whether a row with branches gives this system's model what each of its sequences gives alone.

    It is tried out: a model may know places by counting (ALiBi, state spaces, older learned positions) or make its
    own mask. How far two ways of running the same sequence lie apart is measured with it, and allowed.
    """
    model, config = system.model, system.config.get_text_config(decoder=True)
    if not takes(model, "position_ids"):
        return False
    if getattr(model.config, "_attn_implementation", "") not in ("eager", "sdpa"):
        return False
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    start, one, other = tokens[:12], tokens[12:30], tokens[30:]
    sequences = [np.concatenate([start, one]), np.concatenate([start, other])]
    (row,) = lay_out(sequences, longest=len(tokens), branching=True, width=2**30)
    pairs = []
    try:
        for number, slots in row.members:
            (alone,) = lay_out([sequences[number]], longest=len(tokens), branching=False, width=1)
            everything = np.arange(len(alone))
            # run with another row, so that the products are of other shapes: their rounding is what is allowed
            twice = tree_logits(model, [alone] * 3, [everything, everything[:0], everything[:0]], system.device)
            once = tree_logits(model, [alone], [everything], system.device)
            pairs.append((tree_logits(model, [row], [slots], system.device), once, twice))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
        return False
    apart = max(float((tree - once).square().mean().sqrt()) for tree, once, _ in pairs)
    rounding = max(float((twice - once).square().mean().sqrt()) for _, once, twice in pairs)
    size = max(float(once.square().mean().sqrt()) for _, once, _ in pairs)
    return apart <= 4 * rounding + 8 * torch.finfo(getattr(model, "dtype", torch.float32)).eps * size
