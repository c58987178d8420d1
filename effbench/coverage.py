"""Every architecture by every technique: what works, what does not fit and why, on small random checkpoints.

`python -m effbench.coverage DIR` makes the checkpoints in a temporary folder, tries all pairs, and writes what came of
them to DIR: a file for each architecture, and a page.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from effbench import models, registry, store
from effbench.contract import UNTOUCHED, small, unchanged
from effbench.data import Data, WorldSource
from effbench.errors import PackageError, UnfitError
from effbench.jobs.applying import Before
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World
from effbench.technique import System
from effbench.toolbox.architectures import blocks

VOCABULARY: dict[str, Any] = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 320,
}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**LLAMA, "num_experts_per_tok": 2, "num_local_experts": 4}
GPT: dict[str, Any] = {**VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 320}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=128),
    "mixtral": lambda: transformers.MixtralConfig(**EXPERTS),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **{**EXPERTS, "num_experts_per_tok": 1}, intermediate_size_mlp=128, head_dim=16, moe_layers=[0, 1]
    ),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=32),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**EXPERTS, head_dim=16, sliding_window=64),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=16, query_pre_attn_scalar=16, sliding_window=128),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **LLAMA, head_dim=16, query_pre_attn_scalar=16, sliding_window=128
    ),
    "phi3": lambda: transformers.Phi3Config(**LLAMA),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gptj": lambda: transformers.GPTJConfig(**GPT, n_inner=128, rotary_dim=16),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(**{**SIZES, "intermediate_size": None}, word_embed_proj_dim=64, ffn_dim=128),
    "bloom": lambda: transformers.BloomConfig(**VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        **SIZES, multi_query=False, new_decoder_architecture=True, num_kv_heads=2, bias=False
    ),
    "stablelm": lambda: transformers.StableLmConfig(**LLAMA),
    "olmo2": lambda: transformers.Olmo2Config(**LLAMA),
    "smollm3": lambda: transformers.SmolLM3Config(**LLAMA, no_rope_layers=[1, 0]),
    "mamba": lambda: transformers.MambaConfig(**VOCABULARY, hidden_size=64, state_size=8, num_hidden_layers=2),
}
"""Small models of each architecture, by the name that its config gives it. The second block of `smollm3` has no
positions, half of the layers of `gemma2`, `gemma3_text` and `gpt_oss` look at a window only."""


def write(architecture: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a small random model with the synthetic world's tokenizer.

    Weights are as large as training makes them: at a usual start, what blocks add is too little to tell whether it is
    right, and a norm that is all ones can stand anywhere.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in blocks(model)[1].parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    build_tokenizer(World().vocabulary).save_pretrained(folder)
    return folder


LIMITS = {"steps": 2, "samples": 1, "batch_size": 2, "length": 32, "blocks": 2, "window": 16}
"""Standard options that are made small; a window so small that generating goes beyond it."""
TOKENS = 48
"""Tokens of text on which systems are compared."""


@dataclass(frozen=True)
class Cell:
    """What came of a technique on an architecture.

    `reason` says why nothing did; `problem` is a fault. `share` is that of the weights in the blocks that were
    changed, `None` where they are not meant to be.
    """

    architecture: str
    technique: str
    reason: str = ""
    problem: str = ""
    share: float | None = None


class Lab:
    """A checkpoint on which techniques are tried, and what has to be known of it dense."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.folder = architecture, write(architecture, folder)
        self._dense = self._load()
        self._source = WorldSource(self._dense.tokenizer)
        self._ids = torch.from_numpy(self._source.evaluation(TOKENS, 1).ids[0])[None]
        self._before = Before(self._dense)
        self._expected = self._logits(self._dense)

    def _load(self, name: str = "") -> System:
        return models.load(name or str(self.folder))

    @torch.inference_mode()
    def _logits(self, system: System) -> torch.Tensor:
        found: torch.Tensor = system.model(input_ids=self._ids, use_cache=False).logits
        return found

    def try_out(self, name: str) -> Cell:
        """Apply the technique called `name`, with small options, and look at what is left."""
        technique = small(registry.get(name)(), LIMITS)
        system = self._load()
        torch.manual_seed(0)
        try:
            reason = technique.unfit(system)
            if reason is None:
                data = Data(self._source, system.context, self._load)
                system = technique.apply(system, data)
        except (UnfitError, PackageError) as unfit:
            reason = str(unfit)
        except Exception as error:
            return Cell(self.architecture, name, problem=f"{type(error).__name__}: {error}")
        if reason is not None:
            return Cell(self.architecture, name, reason=reason)
        system.model.eval()
        share = None if registry.entries()[name].family in UNTOUCHED else self._before.share(system)
        try:
            return Cell(self.architecture, name, problem=self._problem(system), share=share)
        except Exception as error:
            return Cell(self.architecture, name, problem=f"{type(error).__name__}: {error}")

    def _problem(self, system: System) -> str:
        """What is wrong with an applied system; empty if nothing is."""
        found = self._logits(system)
        if not bool(found.isfinite().all()):
            return "some logits are not finite"
        if unchanged(self._dense, system) and torch.equal(found, self._expected):
            return "nothing is another than before"
        with tempfile.TemporaryDirectory() as folder:
            store.save(system, Path(folder) / "system", "coverage")
            loaded = store.load(Path(folder) / "system")
        if not torch.allclose(self._logits(loaded), found, rtol=0.05, atol=0.05):
            return "saved and loaded it gives other logits"
        made = system.generate(system, self._ids[:, :24], 2).ids.shape[1]
        return "" if made == 26 else f"it generates {made - 24} tokens in place of 2"


def matrix(architectures: Iterable[str] = ARCHITECTURES, techniques: Iterable[str] = ()) -> Iterator[Cell]:
    """All techniques, or those named, on all architectures, or those named."""
    techniques = tuple(techniques) or registry.names()
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab(architecture, Path(folder))
            yield from (lab.try_out(technique) for technique in techniques)


def diagonal() -> dict[str, list[str]]:
    """Techniques for each architecture, so that each technique comes once; where there are more of these, again."""
    architectures, techniques = list(ARCHITECTURES), registry.names()
    count = max(len(architectures), len(techniques))
    found: dict[str, list[str]] = {architecture: [] for architecture in architectures}
    for place in range(count):
        found[architectures[place % len(architectures)]].append(techniques[place % len(techniques)])
    return found


def page(cells: Iterable[Cell]) -> str:
    """The matrix as Markdown: what was changed of each architecture by each technique, and reasons below."""
    by_pair = {(cell.architecture, cell.technique): cell for cell in cells}
    architectures = list(dict.fromkeys(architecture for architecture, _ in by_pair))
    techniques = list(dict.fromkeys(technique for _, technique in by_pair))
    reasons: dict[str, list[str]] = {}
    lines = ["| | " + " | ".join(architectures) + " |", "|---|" + ":---:|" * len(architectures)]
    for technique in techniques:
        row = []
        for architecture in architectures:
            cell = by_pair.get((architecture, technique))
            said = cell.problem or cell.reason if cell else ""
            if said:
                reasons.setdefault(f"`{technique}`: {_escaped(said)}", []).append(architecture)
            row.append(_mark(cell, list(reasons)))
        lines.append(f"| `{technique}` | " + " | ".join(row) + " |")
    notes = [f"{place}. {reason} ({', '.join(where)})" for place, (reason, where) in enumerate(reasons.items(), 1)]
    return "\n".join([HEAD, *lines, "", *notes, ""])


def _mark(cell: Cell | None, reasons: list[str]) -> str:
    """What a cell says: the share in percent, a tick, or the number of the note that says why not."""
    if cell is None:
        return ""
    if cell.problem or cell.reason:
        number = reasons.index(f"`{cell.technique}`: {_escaped(cell.problem or cell.reason)}") + 1
        return f"**fails** ({number})" if cell.problem else f"({number})"
    return "ok" if cell.share is None else f"{100 * cell.share:.3g}"


def _escaped(text: str) -> str:
    for sign in "\\|*<_~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


HEAD = """# Architectures and techniques

Every technique on a small random checkpoint of every architecture, written to disk, loaded, changed, saved and loaded
again. A number is the share, in percent, of the weights in the blocks that were changed; `ok` marks techniques that
leave weights alone; a number in brackets is the note below that says why the technique does not fit. Shares below 100
are of weights that are kept: routers of experts, convolutions, experts that no calibration token was sent to, blocks
that pruning left whole. `python -m effbench.coverage results/architectures` writes this page where all packages that
techniques use are installed, and a test holds it; names of architectures after the folder try only these anew.
"""


def read(folder: Path) -> list[Cell]:
    """The cells that lie in a folder, in the order of `ARCHITECTURES`."""
    paths = [folder / f"{architecture}.json" for architecture in ARCHITECTURES]
    return [Cell(**values) for path in paths if path.is_file() for values in json.loads(path.read_text("utf-8"))]


def main(folder: Path, architectures: Sequence[str]) -> None:
    """Try all techniques on the architectures, or on all, and write their cells and the page of all that lie there."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    for architecture in architectures or ARCHITECTURES:
        cells = list(matrix([architecture]))
        for cell in cells:
            print(f"{cell.architecture:12} {cell.technique:13} {cell.problem or cell.reason or 'ok'}", flush=True)
        lines = [json.dumps(asdict(cell)) for cell in cells]
        (folder / f"{architecture}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
        (folder / "README.md").write_text(page(read(folder)), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
