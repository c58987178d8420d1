"""Checkpoints: whatever is wrong with one is a sentence before anything is measured; whatever is right is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import random_model, random_system
from safetensors.torch import load_file, save_file

from effbench import cli, models, store
from effbench.jobs.applying import Before
from effbench.measure.memory import stored_bytes
from effbench.toolbox.bitsandbytes import FourBitLinear
from effbench.toolbox.llm_int8 import LLMInt8Linear

GONE = "model.layers.1.mlp.down_proj.weight"
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    return written(tmp_path / "model")


def written(folder: Path, **options: Any) -> Path:
    system = random_system("llama")
    system.model.save_pretrained(folder, **options)  # type: ignore[operator]
    system.tokenizer.save_pretrained(folder)
    return folder


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return work


def more_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{place}" for place in range(200)])
    tokenizer.save_pretrained(folder)


def without_a_shard(folder: Path) -> None:
    written(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def index_of_another(folder: Path) -> None:
    index = {"weight_map": {"model.layers.9.mlp.up_proj.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def quantized(method: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))

    return work


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor is missing": (changed(lambda tensors: tensors.__delitem__(GONE)), f"lacks {GONE}, which"),
    "tensors are too many": (
        changed(lambda tensors: tensors.update(a=torch.zeros(1), b=torch.zeros(1))),
        "holds a and 1 more, for which its config has no place",
    ),
    "a shape is another": (
        changed(lambda tensors: tensors.update({GONE: torch.zeros(64, 96)})),
        f"has {GONE} in the shape 64x96, and its config asks for 64x128",
    ),
    "a shard is missing": (without_a_shard, "names the shard model-00002-of-00003.safetensors, which is not there"),
    "the index names what no shard has": (index_of_another, "lacks model.layers.9.mlp.up_proj.weight, which the index"),
    "the tokenizer knows more tokens": (more_tokens, "a tokenizer of 1,103 tokens and embeddings for 1,024"),
    "the config is no JSON": (lambda folder: (folder / "config.json").write_text("{") and None, "is not the JSON"),
    "weights are pickled": (only_pickled, "has only pickled weights (pytorch_model.bin)"),
    "it was quantized by gptq": (quantized("gptq"), "was quantized by gptq, which needs the package"),
    "it was quantized by awq": (quantized("awq"), "was quantized by awq, which needs the package gptqmodel"),
    "it was quantized by compressed-tensors": (
        quantized("compressed-tensors"),
        "was quantized by compressed-tensors, which needs the package compressed-tensors",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, said = WRONG[what]
    spoil(folder)
    capsys.readouterr()
    words = ["run", str(folder), "--techniques", "rtn", "--device", "cpu", "--out", str(folder.parent / "out")]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("effbench: ") and err.count("\n") == 1 and said in err
    assert not (folder.parent / "out").exists()


def test_a_file_in_the_place_of_a_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(folder / "model.safetensors")]) == 2
    assert "model.safetensors is a file; give the folder" in capsys.readouterr().err


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_shards_of_any_dtype_load_in_the_one_asked_for(tmp_path: Path, stored: torch.dtype, asked: str) -> None:
    model = random_model("llama", stored)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    random_system("llama").tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    models.examine(str(tmp_path / "model"))
    loaded = models.load(str(tmp_path / "model"), asked).model
    dtype = getattr(torch, asked)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, FourBitLinear),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FourBitLinear),
        ({"load_in_8bit": True}, LLMInt8Linear),
    ],
)
def test_a_checkpoint_of_bitsandbytes_is_a_base_row_over_its_own_codes(
    folder: Path, options: dict[str, Any], kind: type, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    options = {**options, "bnb_4bit_compute_dtype": torch.bfloat16}
    given = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.BitsAndBytesConfig(**options)
    )
    given.save_pretrained(tmp_path / "packed")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "packed")
    with torch.inference_mode():
        expected = given(input_ids=IDS).logits
        system = models.load(str(tmp_path / "packed"))
        found = system.model(input_ids=IDS).logits
    assert sum(type(module) is kind for module in system.model.modules()) == 14
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert Before(system).share(system) is None
    store.save(system, tmp_path / "saved", "dense")
    loaded = store.load(tmp_path / "saved")
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS).logits, found)
    assert stored_bytes(loaded) == stored_bytes(system) < 0.9 * stored_bytes(random_system("llama"))
