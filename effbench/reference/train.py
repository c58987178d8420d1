"""Train a member of the reference family from its seed: `python -m effbench.reference.train 1m --seed 0`.

The recipe, for models of 0.07 to 3 million parameters and minutes on one core:

- Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embedding and norms; a short warm-up, a constant
  rate, and a linear fall to zero over the last part of the tokens.
- Heads that look one and two tokens back are there from the start (`look_back`), and training opens with rows of
  repeated random words until the model copies them. Without the two, models of this size need far more tokens than
  there are here until in-context copying emerges (the induction heads of Olsson et al. 2022, section 4).
- Text is drawn anew for every step, so that no row is seen twice; what repeats is the world's facts.
- On a CPU one thread is fastest at these sizes; glibc is told to keep freed memory, which doubles the speed of a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from effbench.reference import CONTEXT
from effbench.reference.items import TASKS, items
from effbench.reference.lexicon import SPECIAL
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import HELDOUT_SEED, KINDS, TRAIN_SEED, World


@dataclass(frozen=True)
class Size:
    """The shape of a member."""

    width: int
    layers: int
    feedforward: int
    head_dim: int = 32


SIZES = {
    "70k": Size(64, 2, 128),
    "150k": Size(96, 2, 192, head_dim=24),
    "300k": Size(128, 2, 256),
    "550k": Size(144, 3, 280, head_dim=24),
    "1m": Size(192, 3, 384),
    "3m": Size(256, 4, 768),
}
"""By the number of parameters in the blocks; 150k and 550k do not ship."""

TOKENS = 9_000_000
"""What the shipped checkpoints have read."""

BATCH_TOKENS = 2048
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 4e-3, 0.05
WARM_UP_STEPS = 30
DECAY_SHARE = 0.4
"""Share of the steps over which the rates fall to zero."""

SHORT_CONTEXT, SHORT_SHARE = 256, 0.75
"""The first share of the tokens is read in short rows, which are faster; until the long ones come, the progress that
is printed, measured over the full context, is worse than the model."""

COPY_GATE, LONGEST_WARM_UP, FADE_FROM, FADE_SHARE = 0.95, 0.4, 0.5, 0.15
"""All rows are repeats until the gate's share of them is predicted, or for the longest share of the steps; then from
half of the rows they fade out over a share of the steps, so that the ability is not lost before text needs it."""

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Settings of glibc under which a step does not hand its memory back to the kernel."""

SEEDS_APART = 10_000_000
"""Distance between the text seeds of two training seeds: more than any run has steps."""


def build_model(size: Size, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and two query heads to a key head."""
    heads = size.width // size.head_dim
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=math.ceil(vocabulary / 64) * 64,
            hidden_size=size.width,
            intermediate_size=size.feedforward,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=size.head_dim,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )


@torch.no_grad()
def look_back(model: LlamaForCausalLM, sharpness: float = 6.0, frequencies: int = 6) -> None:
    """Let the first layer's key heads attend one, two, ... tokens back; a start only, all weights stay trainable.

    Channel 0 of every embedding gets one constant, from which the first layer's queries and keys are made: queries and
    keys that do not depend on the word, and keys rotated back by the distance, so that under rotary embeddings their
    product is largest at that distance.
    """
    config = model.config
    head_dim = config.head_dim
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 4 * embedding.std()
    constant = (embedding[:, 0] / embedding.square().mean(1).sqrt()).mean()  # channel 0 behind the first norm
    angle = model.model.rotary_emb.inv_freq[:frequencies]
    amplitude = math.sqrt(sharpness * math.sqrt(head_dim)) / constant
    attention = model.model.layers[0].self_attn
    queries = attention.q_proj.weight.view(config.num_key_value_heads, -1, head_dim, config.hidden_size)
    keys = attention.k_proj.weight.view(config.num_key_value_heads, head_dim, config.hidden_size)
    queries[:, :, :frequencies, 0] += amplitude
    for head in range(config.num_key_value_heads):
        distance = 1 + head % 2
        keys[head, :frequencies, 0] += amplitude * torch.cos(distance * angle)
        keys[head, head_dim // 2 : head_dim // 2 + frequencies, 0] += amplitude * torch.sin(distance * angle)


def repeats(world: World, rows: int, length: int, seed: int, cycle: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random words said over and over: ids (rows, length), and a mask of what an earlier turn determines."""
    random = np.random.default_rng(seed)
    words = np.arange(len(SPECIAL), len(world.vocabulary))
    ids = np.full((rows, length), world.bos, np.int64)
    determined = np.zeros((rows, length), bool)
    for row in range(rows):
        for start in range(0, length, cycle):
            period = int(random.integers(6, 30))
            span = min(cycle, length - start)
            ids[row, start + 1 : start + span] = np.resize(random.choice(words, period), span - 1)
            determined[row, start + 1 + period : start + span] = True
    return ids, determined


class Trainer:
    """One run: the model, its two optimizers, and where it stands in tokens."""

    def __init__(self, size: Size, seed: int, tokens: int, device: torch.device, compiled: bool = False) -> None:
        torch.manual_seed(seed)
        self.world, self.seed, self.tokens, self.device = World(), seed, tokens, device
        self.model = build_model(size, len(self.world.vocabulary))
        look_back(self.model)
        self.model.to(device)
        self.forward: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        matrices = [weight for weight in self.model.model.layers.parameters() if weight.ndim == 2]
        rest = [weight for weight in self.model.parameters() if all(weight is not other for other in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.rates = [MUON_RATE, ADAM_RATE]
        self.steps = 0
        self.repeated_tokens = 0

    def step(self, ids: np.ndarray, rate: float, watched: int) -> tuple[Tensor, Tensor]:
        """One update on rows (rows, length); returns the loss and which tokens of the first `watched` rows were
        predicted, (watched, length - 1)."""
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * rate * min(1.0, (self.steps + 1) / WARM_UP_STEPS)
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.forward(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        return loss.detach(), logits[:watched].argmax(-1) == tokens[:watched, 1:]

    def run(self) -> None:
        """Read repeats until these are copied, then the world's text."""
        total, started = self.tokens // BATCH_TOKENS, time.monotonic()
        repeated_share, copied = 1.0, 0.0
        while self.steps < total:
            length = SHORT_CONTEXT if self.steps < SHORT_SHARE * total else CONTEXT
            seed = self.seed * SEEDS_APART + self.steps
            rows = BATCH_TOKENS // length
            repeated = round(rows * repeated_share)
            ids, determined = repeats(self.world, repeated, length, seed)
            stream = self.world.stream(rows - repeated, length, TRAIN_SEED + seed)
            rate = min(1.0, (total - self.steps) / (DECAY_SHARE * total))
            loss, right = self.step(np.concatenate([ids, stream.ids]), rate, repeated)
            if repeated:
                hits = right.cpu().numpy()[determined[:, 1:]].mean()
                copied += 0.1 * (float(hits) - copied)
            self.repeated_tokens += repeated * length
            if repeated_share < 1 or copied > COPY_GATE or self.steps > LONGEST_WARM_UP * total:
                repeated_share = max(0.0, min(repeated_share, FADE_FROM) - FADE_FROM / (FADE_SHARE * total))
            if self.steps % max(1, total // 12) == 0:
                speed = self.steps * BATCH_TOKENS / (time.monotonic() - started)
                progress = f"{self.steps}/{total} steps, copied {copied:.3f}, loss {loss:.3f}, {speed:.0f} tokens/s"
                print(progress, short(evaluate(self.model, self.world, 32, 100)), file=sys.stderr, flush=True)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, world: World, rows: int, count: int) -> dict[str, Any]:
    """Held-out nats per token, in all, by kind and by row, and the share of items answered right, by task."""
    model.eval()
    device = model.device
    losses = []
    stream = world.stream(rows, CONTEXT, HELDOUT_SEED)
    for start in range(0, rows, 16):
        tokens = torch.from_numpy(stream.ids[start : start + 16].astype(np.int64)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        losses.append(functional.cross_entropy(logits.float().mT, tokens[:, 1:], reduction="none").cpu())
    nats = torch.cat(losses).numpy()
    kinds = stream.kinds[:, 1:]
    by_kind = {name: float(nats[kinds == kind].mean()) for kind, name in enumerate(KINDS)}
    accuracy = {task: _accuracy(model, world, task, count) for task in TASKS}
    model.train()
    by_row = [round(row, 5) for row in nats.mean(1).tolist()]
    return {"nats": float(nats.mean()), "nats_by_kind": by_kind, "accuracy": accuracy, "nats_by_row": by_row}


def _accuracy(model: LlamaForCausalLM, world: World, task: str, count: int) -> float:
    right = 0
    asked = sorted(items(task, count), key=lambda item: len(item["context"]))
    for start in range(0, count, 25):
        batch = asked[start : start + 25]
        contexts = [[world.bos, *world.lexicon.phrase(item["context"])] for item in batch]
        longest = max(len(context) for context in contexts)
        tokens = torch.tensor([context + [0] * (longest - len(context)) for context in contexts], device=model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits.float().cpu()
        for row, (item, context) in enumerate(zip(batch, contexts, strict=True)):
            choices = [world.lexicon.ids[choice] for choice in item["choices"]]
            right += int(logits[row, len(context) - 1, choices].argmax()) == item["gold"]
    return right / count


def short(figures: dict[str, Any]) -> str:
    """An evaluation on one line."""
    parts = {"nats": figures["nats"], **figures["nats_by_kind"], **figures["accuracy"]}.items()
    return " ".join(f"{name} {value:.3f}" for name, value in parts)


def save(model: LlamaForCausalLM, world: World, folder: Path, report: dict[str, Any]) -> None:
    """The checkpoint with its tokenizer, and `training.json` beside it."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 1], pad_token_id=0)
    model.save_pretrained(folder)
    build_tokenizer(world.vocabulary).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Train one checkpoint and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=float, default=TOKENS, help="in all")
    parser.add_argument("--out", type=Path, help="folder; the shipped checkpoint's own if not given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="a tenth faster from 1m on; needs a C++ compiler")
    options = parser.parse_args()
    if options.out is None and (options.seed, int(options.tokens)) != (0, TOKENS):
        parser.error("a shipped checkpoint is of seed 0 and of the usual tokens; give --out FOLDER for another run")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    started = time.monotonic()
    trainer = Trainer(SIZES[options.size], options.seed, int(options.tokens), device, options.compile)
    trainer.run()
    model = trainer.model.to(torch.bfloat16)  # what is reported is what ships
    report = {
        "size": options.size,
        "seed": options.seed,
        "tokens": trainer.tokens,
        "repeated_tokens": trainer.repeated_tokens,
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        **evaluate(model, trainer.world, 256, 1000),
    }
    shipped = Path(__file__).parent / "checkpoints" / f"ref-{options.size}"
    save(model.cpu(), trainer.world, options.out or shipped, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    if sys.platform == "linux" and not KEEP_MEMORY.keys() <= os.environ.keys():
        # glibc reads these when a process starts, so this one starts again with them
        again = [sys.executable, "-m", "effbench.reference.train", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | KEEP_MEMORY)
    main()
