"""From a name to a system: an embedded reference model, a local folder, a saved system, or a hub id."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import reference
from effbench.errors import ModelError
from effbench.registry import suggest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from effbench.technique import System

SAVED = "effbench.json"
"""The file that marks a folder as a saved system (see `effbench.store`)."""

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


@dataclass(frozen=True)
class Trust:
    """What a user allows a model's folder to do; nothing, unless asked."""

    pickle: bool = False
    remote_code: bool = False


CAREFUL = Trust()
"""Nothing is allowed."""


def is_reference(name: str) -> bool:
    """Whether `name` is an embedded model, with or without a variant such as `@outliers`."""
    return name.partition("@")[0] in reference.NAMES


def speaks_reference(name: str) -> bool:
    """Whether a model's words are those of the embedded family; also of one that was compressed and saved."""
    path = Path(name).expanduser() / "tokenizer.json"
    if is_reference(name) or not path.is_file():
        return is_reference(name)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(words, dict) and reference.speaks_reference(words)


def check(name: str, trust: Trust = CAREFUL) -> None:
    """Look at a model without loading it; neither torch nor transformers is imported for a local one.

    Raises `ModelError` for what cannot be loaded: an unknown name, a folder without config or weights, pickled
    weights, weights cut short.
    """
    base, _, variant = name.partition("@")
    if base in reference.NAMES:
        if variant not in ("", "outliers"):
            raise ModelError(f"no variant {variant!r} of {base}; there is {base}@outliers")
        return
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, trust)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or folder.exists():
        hint = suggest(name, list(reference.NAMES))
        known = ", ".join(reference.NAMES)
        raise ModelError(
            f"no model {name!r}{hint}; give an embedded model ({known}), a folder with a transformers checkpoint, "
            "or a hub id of the form owner/name"
        )
    else:
        _check_hub(name)


def _check_folder(folder: Path, trust: Trust) -> None:
    if (folder / SAVED).is_file():
        weights = sorted(folder.glob("**/*.safetensors"))
    else:
        if not (folder / "config.json").is_file():
            made = "save_pretrained or `effbench apply` wrote"
            raise ModelError(f"{folder} has no config.json; give a folder that {made}")
        weights = sorted(folder.glob("*.safetensors"))
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if not weights and not pickled:
        raise ModelError(f"{folder} has no weights; expected *.safetensors beside config.json")
    if not weights and not trust.pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run any code when loaded; convert "
            "them to safetensors, or pass --allow-pickle if you trust them"
        )
    for path in weights:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """The header must be readable and the file as long as it says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError):
        raise ModelError(f"{path} is not a safetensors file or its header is corrupt; fetch it again") from None
    if size != expected:
        raise ModelError(f"{path} is cut short: {size:,} bytes instead of {expected:,}; fetch it again")


def _check_hub(name: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(name, timeout=5)
    except Exception as reason:
        raise ModelError(
            f"{name} is neither a folder here nor in the local cache, and the hub does not give it "
            f"({type(reason).__name__}); check the name and the network, or give a local folder"
        ) from None


def load(
    name: str,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    trust: Trust = CAREFUL,
) -> System:
    """The system called `name`; a checkpoint comes dense in `dtype`, a saved system in the dtype it was saved in.

    Raises `ModelError` as `check` does, and for float16 on a CPU.
    """
    import torch

    check(name, trust)
    name_of_dtype = str(dtype).removeprefix("torch.")
    check_dtype(name_of_dtype, torch.device(device).type)
    kind: torch.dtype = getattr(torch, DTYPES[name_of_dtype])
    base, _, variant = name.partition("@")
    if base in reference.NAMES:
        system = _load_checkpoint(str(reference.folder(base)), kind, device, Trust())
        if variant == "outliers":
            from effbench.reference.outliers import inject

            inject(system.model)
        return system
    if (Path(name).expanduser() / SAVED).is_file():
        from effbench import store

        return store.load(Path(name).expanduser(), device)
    return _load_checkpoint(name, kind, device, trust)


def context(name: str, trust: Trust = CAREFUL) -> int | None:
    """The tokens that a model was made for, without loading it; `None` where its config does not say."""
    from transformers import AutoConfig

    base = name.partition("@")[0]
    path = str(reference.folder(base)) if base in reference.NAMES else str(Path(name).expanduser())
    if (Path(path) / SAVED).is_file():
        path = str(Path(path) / "model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust.remote_code)
    except (OSError, ValueError, KeyError):
        return None
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def weights_bytes(name: str) -> int:
    """Bytes of a local model's weights on disk; 0 where they are not on this machine."""
    base = name.partition("@")[0]
    folder = reference.folder(base) if base in reference.NAMES else Path(name).expanduser()
    return sum(path.stat().st_size for path in folder.glob("**/*.safetensors")) if folder.is_dir() else 0


def check_dtype(dtype: str, device: str) -> None:
    """Raises `ModelError` for a word that is no dtype, and for float16 on a CPU."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    if DTYPES[dtype] == "float16" and device == "cpu":
        raise ModelError(
            "float16 on a CPU is up to 14 times slower than bfloat16, since CPUs lack its arithmetic, so any row "
            "would mislead; use --dtype bfloat16 or float32"
        )


def load_tokenizer(path: str, trust: Trust = CAREFUL) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id, without its model."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust.remote_code)
    return tokenizer


def _load_checkpoint(name: str, dtype: torch.dtype, device: Any, trust: Trust) -> System:
    import torch
    from transformers import AutoModelForCausalLM

    from effbench.technique import System

    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    options = {"trust_remote_code": trust.remote_code}
    try:
        safe = None if trust.pickle else True
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=safe, output_loading_info=True, **options
        )
        tokenizer = load_tokenizer(path, trust)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as reason:
        text = str(reason).strip().splitlines() or [type(reason).__name__]
        advice = "pass --trust-remote-code if you trust it" if "trust_remote_code" in str(reason) else "check its files"
        raise ModelError(f"{name} cannot be loaded: {text[0].rstrip('.')}; {advice}") from None
    lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
    if lacking:
        raise ModelError(f"{name} lacks {lacking[0]}, or has it in another shape; random numbers would stand for it")
    if Path(path).is_dir() and torch.device(device).type == "cpu":
        _own(model, Path(path))
    return System.dense(model.to(device).eval(), tokenizer)


def _own(model: Any, folder: Path) -> None:
    """Read into memory of its own what transformers has only mapped, a tensor at a time.

    Mapped pages stay resident, as long as any tensor of the file lives, beside all that is made of the others.
    """
    from effbench.store import read_tensors

    parameters = dict(model.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_tensors(path):
            mapped = parameters.get(name)
            if mapped is None or (mapped.dtype, mapped.shape) != (tensor.dtype, tensor.shape):
                continue  # it was converted, and is not mapped any more
            ends = [(t.flatten()[0], t.flatten()[-1]) for t in (mapped.detach(), tensor)]
            if ends[0] == ends[1]:
                mapped.data = tensor
