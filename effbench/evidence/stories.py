"""Text for a model of stories: what it tells itself, so that all of the little real text there is can be evaluated.

Calibrating on a model's own samples is Williams et al. 2024 (arXiv:2410.17170).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effbench import models

STORIES, LENGTH = 384, 300
"""How many are told, and how many tokens each has at most."""


def tell(model: str, path: Path, seed: int = 0) -> None:
    """Write stories that `model` samples at temperature 1, one JSON object a line, unless they are there already."""
    if path.is_file():
        return
    import torch

    loaded = models.load(model, "float32")
    teller: Any = loaded.model
    torch.manual_seed(seed)
    start, end = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id
    ids = torch.full((STORIES, 1), start)
    with torch.inference_mode():
        told = teller.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=LENGTH,
            pad_token_id=end,
        )
    texts = [loaded.tokenizer.decode(row[1:], skip_special_tokens=True) for row in told]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
