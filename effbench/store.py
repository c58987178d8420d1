"""A system on disk: safetensors for what is stored, JSON for the structure. Loading runs no pickle and no code
from the folder.

    effbench.json          pipeline, cache and decoding policies, the parts' names
    tokenizer files        as transformers writes them
    model/                 config.json, structure.json, model.safetensors
    parts/<name>/          the same for each part

A model that its config says all about is an ordinary checkpoint: transformers loads the folder `model/` by itself.

`structure.json` names the modules in which the model differs from what its config builds, by class and options, and
the whole numbers that other modules know otherwise.
Classes are looked up by name, and only in effbench and in registered techniques.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from effbench.errors import ModelError
from effbench.models import SAVED
from effbench.registry import entries
from effbench.technique import CachePolicy, DecodingPolicy, System
from effbench.toolbox.stored import StoredModule
from effbench.toolbox.walk import replace_module

FORMAT = 1
WEIGHTS = "model.safetensors"
NO_CODE = {"trust_remote_code": False}
"""Without it transformers would ask on a terminal whether to run what the folder brings."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's words for dtypes."""


def save(system: System, folder: Path, pipeline: str) -> None:
    """Write `system` to `folder`, all or nothing: it is built beside and renamed when complete.

    Raises `ModelError` for a system with modules or policies that cannot be written down.
    """
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _save_model(system.model, beside / "model")
    for name, part in system.parts.items():
        _save_model(part, beside / "parts" / name)
    system.tokenizer.save_pretrained(beside)
    content = {
        "format": FORMAT,
        "pipeline": pipeline,
        "new_cache": _describe(system.new_cache),
        "generate": _describe(system.generate),
        "parts": sorted(system.parts),
    }
    (beside / SAVED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)


def load(folder: Path, device: Any = "cpu") -> System:
    """The system that `save` wrote.

    Raises `ModelError` for another format or for classes that are not effbench's.
    """
    try:
        content = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ModelError(f"{folder} is in format {content['format']}; this effbench reads format {FORMAT}")
        model = _load_model(folder / "model", device)
        cache = _rebuild(content["new_cache"], CachePolicy, config=model.config)
        generate = _rebuild(content["generate"], DecodingPolicy)
        parts = {name: _load_model(folder / "parts" / name, device) for name in content["parts"]}
    except (OSError, KeyError, ValueError) as reason:
        raise ModelError(f"{folder} is not a whole saved system ({reason}); save it again") from reason
    return System(model, AutoTokenizer.from_pretrained(folder, **NO_CODE), cache, generate, parts)


def pipeline_of(folder: Path) -> str:
    """The pipeline by which a saved system was made."""
    return str(json.loads((folder / SAVED).read_text(encoding="utf-8"))["pipeline"])


def _save_model(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True)
    shell: Any = model
    shell.config.save_pretrained(folder)
    first: dict[int, str] = {}
    shared, unique = {}, {}
    for name, tensor in _tensors(model):
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            unique[name] = tensor.detach().contiguous()
    structure = {**_structure(model), "shared": shared}
    (folder / "structure.json").write_text(json.dumps(structure, indent=1) + "\n", encoding="utf-8")
    save_file(unique, folder / WEIGHTS, metadata={"format": "pt"})


def _structure(model: nn.Module) -> dict[str, Any]:
    """What the config alone does not say: the model's dtype and the modules of another class or shape.

    A changed module comes before the changed modules within it, which differ from what its own options build.
    """
    with torch.device("meta"):
        plain = dict(AutoModelForCausalLM.from_config(model.config, **NO_CODE).named_modules())
    changed: dict[str, Any] = {}
    for name, module in model.named_modules():
        twin = plain.get(name)
        if twin is None or _made_as(module) != _made_as(twin):
            options = _options(name, module)
            changed[name] = {"class": _class_name(type(module)), "options": options}
            with torch.device("meta"):
                rebuilt = dict(type(module)(**options).named_modules(prefix=name))
            plain = {other: kept for other, kept in plain.items() if not other.startswith(name + ".")} | rebuilt
    numbers = {
        name: differing
        for name, module in model.named_modules()
        if name not in changed and name in plain and (differing := _numbers(module, plain[name]))
    }
    return {"dtype": str(model.dtype).removeprefix("torch."), "modules": changed, "numbers": numbers}


def _numbers(module: nn.Module, twin: nn.Module) -> dict[str, int]:
    """Whole numbers that a module knows otherwise than its twin, such as the count of its heads."""
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) is int and type(getattr(twin, key, None)) is int and value != getattr(twin, key)
    }


def _made_as(module: nn.Module) -> tuple[Any, ...]:
    """Class, options and shapes: two modules for which they are equal differ only in their tensors' values."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in own]
    return type(module), module.options if isinstance(module, StoredModule) else None, shapes


def _options(name: str, module: nn.Module) -> dict[str, Any]:
    if isinstance(module, StoredModule):
        return module.options
    if type(module) is nn.Linear:
        bias = module.bias is not None
        return {"in_features": module.in_features, "out_features": module.out_features, "bias": bias}
    raise ModelError(f"{name} is a {type(module).__name__}, which cannot be written down; derive it from StoredModule")


def _load_model(folder: Path, device: Any) -> nn.Module:
    structure = json.loads((folder / "structure.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, **NO_CODE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, structure["dtype"]), **NO_CODE)
        for name, module in structure["modules"].items():
            replace_module(model, name, _class(module["class"], nn.Module)(**module["options"]))
    for name, numbers in structure.get("numbers", {}).items():
        module = model.get_submodule(name)
        for key, value in numbers.items():
            if type(value) is not int or type(getattr(module, key, None)) is not int:
                raise ModelError(f"{folder} gives {name}.{key}, which is no whole number; save the system again")
            setattr(module, key, value)
    for name, tensor in read_tensors(folder / WEIGHTS):
        _assign(model, name, tensor.to(device))
    by_name = dict(_tensors(model))
    for name, first in structure["shared"].items():
        _assign(model, name, by_name[first])
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if left:
        raise ModelError(f"{folder / WEIGHTS} lacks {left[0]}, which its structure names; save the system again")
    return model.eval()


def read_tensors(path: Path, most_bytes: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file, each read into memory of its own; only those of at most so many bytes.

    The format's own loader maps the file, where a tensor starts at any byte; kernels that load whole vectors crash on
    that. Mapped pages would also stay in the process's peak beside every copy made of them.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if most_bytes is not None and end - start > most_bytes:
                continue
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            file.seek(8 + length + start)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != end - start:
                raise ModelError(f"{path} is cut short; save the system again")
            yield name, tensor


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers, shared ones under each of their names, unsaved buffers too."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        parent._parameters[leaf] = tensor
    elif leaf in parent._buffers:
        parent._buffers[leaf] = tensor
    else:
        raise ModelError(f"a saved tensor is called {name}, which its structure does not name; save the system again")


def _describe(policy: Any) -> dict[str, Any]:
    if not isinstance(policy, CachePolicy | DecodingPolicy):
        raise ModelError(
            f"a {type(policy).__name__} cannot be saved; derive cache policies from CachePolicy and decoding "
            "policies from DecodingPolicy"
        )
    return {"class": _class_name(type(policy)), "options": policy.options}


def _rebuild(content: dict[str, Any], kind: type, **more: Any) -> Any:
    return _class(content["class"], kind)(**content["options"], **more)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, kind: type) -> Any:
    """The class called `module:name`, if its module is ours and it is a `kind`.

    Raises `ModelError` for any other: a folder must not be able to name arbitrary code.
    """
    module, _, qualified = name.partition(":")
    allowed = module in ("effbench.technique", "torch.nn.modules.linear") or module.startswith("effbench.toolbox.")
    if not allowed and module not in {entry.module for entry in entries().values()}:
        raise ModelError(f"{name} is not part of effbench or of a registered technique; it is not loaded")
    found = getattr(import_module(module), qualified, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ModelError(f"{name} is not a {kind.__name__}; it is not loaded")
    return found
