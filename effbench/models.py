"""From a name to a system: an embedded reference model, a local folder, a saved system, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import checkpoint, reference
from effbench.checkpoint import CAREFUL, SAVED, Trust
from effbench.errors import ModelError
from effbench.registry import suggest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from effbench.technique import System

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


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
        checkpoint.check_folder(folder, trust)
    elif folder.exists():
        raise ModelError(f"{name} is a file; give the folder that it is in, with config.json beside the weights")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        hint = suggest(name, list(reference.NAMES))
        known = ", ".join(reference.NAMES)
        raise ModelError(
            f"no model {name!r}{hint}; give an embedded model ({known}), a folder with a transformers checkpoint, "
            "or a hub id of the form owner/name"
        )
    else:
        _check_hub(name)


def examine(name: str, trust: Trust = CAREFUL) -> None:
    """Hold a checkpoint's weights and tokenizer against its config; transformers is imported, nothing is loaded.

    Raises `ModelError` for tensors that are missing, too many or of another shape, and for another vocabulary.
    """
    folder = Path(name).expanduser()
    if name.partition("@")[0] not in reference.NAMES and not (folder / SAVED).is_file():
        checkpoint.examine(str(folder) if folder.is_dir() else name, trust)


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


def saved_dtype(name: str) -> str | None:
    """The dtype in which a saved system comes, whatever is asked for; `None` for any other model."""
    folder = Path(name).expanduser()
    try:
        found: dict[str, Any] = json.loads((folder / "model" / "structure.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # `check` says what is wrong with it
    return str(found.get("dtype")) if (folder / SAVED).is_file() else None


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
    """Bytes of a model's weights on disk, safetensors or else pickled; 0 where they are not on this machine."""
    base = name.partition("@")[0]
    folder = reference.folder(base) if base in reference.NAMES else Path(name).expanduser()
    if not folder.is_dir() and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    found = ([path.stat().st_size for path in folder.glob(f"**/*{end}")] for end in (".safetensors", ".bin"))
    return sum(next(filter(None, found), []))


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
    if checkpoint.quantized_by(Path(path)) == "bitsandbytes":
        from effbench.toolbox.bitsandbytes import library

        library()  # it is to be imported in our way, before transformers does
    with checkpoint.one_sentence(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=None if trust.pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust.remote_code,
            **_placement(path, device),
        )
        checkpoint.complain(name, report)
        tokenizer = load_tokenizer(path, trust)
    checkpoint.check_vocabulary(name, model, tokenizer)
    if getattr(model, "hf_quantizer", None) is not None:
        from effbench.toolbox.adopted import adopt

        adopt(model)
    elif Path(path).is_dir() and torch.device(device).type == "cpu":
        from effbench.mapped import keep_on_disk

        keep_on_disk(model, Path(path))
    elif not hasattr(model, "hf_device_map"):
        model = model.to(device)
    return System.dense(model.eval(), tokenizer)


def is_spread(name: str, device: Any) -> bool:
    """Whether a model's weights do not fit into what is free of the GPU, so that it lies on all GPUs and in memory."""
    import torch

    device = torch.device(device)
    return device.type == "cuda" and weights_bytes(name) > 0.9 * torch.cuda.mem_get_info(device)[0]


def _placement(path: str, device: Any) -> dict[str, Any]:
    """Where transformers puts a model, by accelerate's device map."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return {}
    return {"device_map": "auto" if is_spread(path, device) else {"": device}}


__all__ = [
    "CAREFUL",
    "DTYPES",
    "SAVED",
    "Trust",
    "check",
    "check_dtype",
    "examine",
    "is_reference",
    "is_spread",
    "load",
    "load_tokenizer",
    "speaks_reference",
    "weights_bytes",
]
