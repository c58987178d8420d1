"""Looking at a checkpoint: whether its files are whole, and whether its weights are those that its config asks for."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.errors import ModelError, is_out_of_memory

SAVED = "effbench.json"
"""The file that marks a folder as a saved system (see `effbench.store`)."""
INDEX = "model.safetensors.index.json"
"""The file that says which tensor is in which shard."""
PACKAGES = {
    "aqlm": ("aqlm",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "torchao": ("torchao",),
}
"""What transformers needs to load weights that are quantized already, by the method that a config names."""


@dataclass(frozen=True)
class Trust:
    """What a user allows a model's folder to do; nothing, unless asked."""

    pickle: bool = False
    remote_code: bool = False


CAREFUL = Trust()
"""Nothing is allowed."""


def check_folder(folder: Path, trust: Trust = CAREFUL) -> None:
    """Look at the files of a checkpoint or a saved system; neither torch nor transformers is imported.

    Raises `ModelError` for a folder without config or weights, for pickled weights, and for files that are cut short,
    corrupt or missing.
    """
    if (folder / SAVED).is_file():
        weights = sorted(folder.glob("**/*.safetensors"))
    else:
        if not (folder / "config.json").is_file():
            made = "save_pretrained or `effbench apply` wrote"
            raise ModelError(f"{folder} has no config.json; give a folder that {made}")
        _check_packages(folder, _read_json(folder / "config.json"))
        weights = sorted(folder.glob("*.safetensors"))
    pickled = [path for ending in ("bin", "pt", "pth", "pkl", "ckpt") for path in sorted(folder.glob(f"*.{ending}"))]
    if not weights and not pickled:
        raise ModelError(f"{folder} has no weights; expected *.safetensors beside config.json")
    if not weights and not trust.pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run any code when loaded; convert "
            "them to safetensors, or pass --allow-pickle if you trust them"
        )
    names = {path.name: _check_safetensors(path) for path in weights}
    if (folder / INDEX).is_file():
        _check_shards(folder, names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not the JSON object that it should be; fetch it again")
    return found


def quantized_by(folder: Path) -> str:
    """The method by which the weights in a folder were quantized before, in transformers' words; empty if by none."""
    return _method(_read_json(folder / "config.json")) if (folder / "config.json").is_file() else ""


def _method(config: dict[str, Any]) -> str:
    quantized = config.get("quantization_config")
    return str(quantized.get("quant_method", "")) if isinstance(quantized, dict) else ""


def _check_packages(folder: Path, config: dict[str, Any]) -> None:
    """Raises `ModelError` where weights are quantized by a method whose package is not installed."""
    method = _method(config)
    for package in PACKAGES.get(method, ()):
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            name = package.replace("_", "-").replace(".", "-")
            raise ModelError(
                f"{folder} was quantized by {method}, which needs the package {name} to be loaded; install it, or give "
                "the checkpoint that it was made from"
            )


def _check_shards(folder: Path, names: dict[str, set[str]]) -> None:
    """All shards and tensors that the index names must be there."""
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ModelError(f"{folder / INDEX} has no weight_map; fetch it again")
    for tensor, shard in index.items():
        if shard not in names:
            raise ModelError(f"{folder / INDEX} names the shard {shard}, which is not there; fetch it again")
        if tensor not in names[shard]:
            raise ModelError(f"{folder / shard} lacks {tensor}, which the index says it has; fetch both again")


def _check_safetensors(path: Path) -> set[str]:
    """The names of a file's tensors. Its header must be readable and the file as long as it says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError
            header = json.loads(file.read(length))
        names = header.keys() - {"__metadata__"}
        expected = 8 + length + max((header[name]["data_offsets"][1] for name in names), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is not a safetensors file or its header is corrupt; fetch it again") from None
    if size != expected:
        raise ModelError(f"{path} is cut short: {size:,} bytes instead of {expected:,}; fetch it again")
    return names


def examine(name: str, trust: Trust = CAREFUL) -> None:
    """Hold a checkpoint's tensors, by names and shapes, against its config, and its tokenizer against both.

    Nothing is read but headers: the model is built without memory. Weights that are quantized already are left to
    whatever loads them. Raises `ModelError` for what does not belong together; `name` is a folder or a hub id.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with one_sentence(name), _silence():
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust.remote_code)
        if getattr(config, "quantization_config", None):
            return
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            device_map="meta",
            use_safetensors=None if trust.pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust.remote_code,
        )
        complain(name, report)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust.remote_code)
    check_vocabulary(name, model, tokenizer)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps transformers' bars and reports, which would stand around our sentence, from being printed."""
    from transformers.utils import logging

    bars, words = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(words)
        if bars:
            logging.enable_progress_bar()


def complain(name: str, report: dict[str, Any]) -> None:
    """Raises `ModelError` for what transformers says was missing, in another shape or too much, in this order."""
    lacking = sorted(map(str, report["missing_keys"]))
    if lacking:
        raise ModelError(f"{name} lacks {_first(lacking)}, which its config asks for; random numbers would stand there")
    other = sorted(report["mismatched_keys"], key=str)
    if other:
        tensor, found, asked = (*other[0], "?", "?")[:3] if isinstance(other[0], tuple) else (other[0], "?", "?")
        raise ModelError(
            f"{name} has {tensor} in the shape {_shape(found)}, and its config asks for {_shape(asked)}; config and "
            "weights are not of one model"
        )
    extra = sorted(map(str, report["unexpected_keys"]))
    if extra:
        raise ModelError(
            f"{name} holds {_first(extra)}, for which its config has no place; config and weights are not of one model"
        )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape))


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Raises `ModelError` where the tokenizer knows tokens for which the model has no row. Rows may be more."""
    rows = model.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= rows:
        raise ModelError(
            f"{name} has a tokenizer of {last + 1:,} tokens and embeddings for {rows:,}; they are not of one model"
        )


class one_sentence:
    """Turns whatever transformers raises within into a `ModelError` of one sentence; running out of memory stays."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if not isinstance(error, OSError | ValueError | ImportError | KeyError | RuntimeError | TypeError):
            return
        text = str(error).strip().splitlines() or [type(error).__name__]
        if is_out_of_memory(error):
            return
        advice = "pass --trust-remote-code if you trust it" if "trust_remote_code" in str(error) else "check its files"
        raise ModelError(f"{self.name} cannot be loaded: {text[0].rstrip('.')}; {advice}") from None
