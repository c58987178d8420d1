"""Distillation: a student that is smaller and learns, a teacher that stays as it was, a divergence that is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model, random_system
from counting import CountingSource, counting
from torch import Tensor

from effbench import store
from effbench.coverage import ARCHITECTURES
from effbench.data import Data, WorldSource
from effbench.errors import UnfitError
from effbench.measure.memory import stored_bytes
from effbench.registry import get
from effbench.technique import System
from effbench.toolbox.decoding import forward
from effbench.toolbox.training import Recipe, next_token_loss, train
from effbench.toolbox.walk import blocks

IDS = torch.randint(3, 1000, (2, 48), generator=torch.Generator().manual_seed(5))
TINY = {"steps": 3, "batch_size": 2, "length": 32}


def divergence(*arguments: Any) -> Tensor:
    module = __import__("sys").modules[get("distill").__module__]
    value: Tensor = module.divergence(*arguments)
    return value


def applied(system: System, lent: System | None = None, source: Any = None, **options: Any) -> System:
    technique = get("distill")(**{**TINY, **options})
    assert technique.unfit(system) is None

    def lend(name: str) -> System:
        assert lent is not None, f"no model was to be asked for, but {name} was"
        return lent

    return technique.apply(system, Data(source or WorldSource(system.tokenizer), 512, lend))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=IDS).logits
    return result


def smaller_system(**changes: Any) -> System:
    config = ARCHITECTURES["llama"]()
    config.update({"intermediate_size": 64, **changes})
    model = type(random_model("llama"))(config).to(torch.bfloat16).eval()
    return System.dense(model, random_system("llama").tokenizer)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_zero_only_for_logits_equal_up_to_a_constant(temperature: float) -> None:
    teacher = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))
    assert float(divergence(teacher + 3.5, teacher, temperature)) == pytest.approx(0, abs=1e-6)
    for seed in range(1, 6):
        student = teacher + 0.1 * torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(seed))
        assert float(divergence(student, teacher, temperature)) > 1e-4


def test_the_divergence_is_that_of_the_definition_teacher_first() -> None:
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (torch.softmax(values.double() / 2, -1) for values in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert float(divergence(student, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(divergence(student, teacher, 2.0) - divergence(teacher, student, 2.0))) > 1e-3


def test_its_gradient_keeps_its_size_at_high_temperatures() -> None:
    """For a large temperature it tends to (student - teacher) / vocabulary for centred logits: section 2."""
    student, teacher = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))
    student, teacher = (values - values.mean() for values in (student, teacher))
    student.requires_grad_()
    divergence(student, teacher, 1000.0).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 20, rtol=2e-2, atol=1e-4)


def test_its_gradient_is_that_of_finite_differences() -> None:
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    divergence(student, teacher, 3.0).backward()
    slope, step = student.grad, 1e-2
    for place in range(9):
        change = torch.zeros_like(teacher)
        change[1, place] = step
        with torch.no_grad():
            up, down = divergence(student + change, teacher, 3.0), divergence(student - change, teacher, 3.0)
        assert float(up - down) / (2 * step) == pytest.approx(float(slope[1, place]), abs=1e-4)


def test_a_vocabulary_padded_to_another_width_does_not_matter() -> None:
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(teacher, (0, 3), value=2.0)
    assert torch.equal(divergence(student, padded, 1.0), divergence(student, teacher, 1.0))


def test_every_architecture_gives_a_smaller_student_that_is_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    system = random_system(architecture)
    dense, block = stored_bytes(system), sum(p.nbytes for p in blocks(system.model)[1][0].parameters())
    system = applied(system)
    assert stored_bytes(system) == dense - block
    assert system.config.num_hidden_layers == 1 and not system.model.training
    assert len(system.new_cache().layers) == 1
    with torch.inference_mode():
        through_cache = forward(system.model, IDS, system.new_cache(), 0)
    torch.testing.assert_close(through_cache, logits(system.model))
    store.save(system, tmp_path / "system", "distill")
    again = store.load(tmp_path / "system")
    assert torch.equal(logits(again.model), logits(system.model)) and stored_bytes(again) == stored_bytes(system)


def test_blocks_are_chosen_evenly_and_copied_from_the_teacher() -> None:
    config = ARCHITECTURES["qwen3"]()
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    config.update({"num_hidden_layers": 5, "layer_types": kinds})
    torch.manual_seed(0)
    teacher = type(random_model("qwen3"))(config).to(torch.bfloat16).eval()
    for layers, places in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (0, [0, 2, 4])):
        student = applied(System.dense(teacher, random_system("qwen3").tokenizer), layers=layers, steps=0).model
        kept = [teacher.model.layers[place].state_dict() for place in places]
        for place, state in enumerate(kept):
            block = student.model.layers[place]
            assert block.self_attn.layer_idx == place
            assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
        assert student.config.layer_types == [config.layer_types[place] for place in places]
        assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert teacher.config.num_hidden_layers == 5 and len(teacher.model.layers) == 5


@pytest.mark.parametrize("student", ["", "little"])
def test_the_teacher_stays_as_it_was_bit_for_bit(student: str) -> None:
    system = random_system("llama")
    teacher = system.model
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    before, shown = logits(teacher), teacher.config.to_dict()
    result = applied(system, smaller_system(), student=student)
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())
    assert torch.equal(logits(teacher), before) and teacher.config.to_dict() == shown
    own, others = ({p.data_ptr() for p in model.parameters()} for model in (result.model, teacher))
    assert not own & others


def test_a_named_student_takes_the_models_place() -> None:
    lent = smaller_system(num_hidden_layers=1)
    system = applied(random_system("llama"), lent, student="little")
    assert system.model is lent.model and stored_bytes(system) == stored_bytes(lent)
    assert len(system.new_cache().layers) == 1


def test_a_trained_student_comes_nearer_to_its_teacher_than_one_that_is_only_cut() -> None:
    teacher = random_system("llama")
    train(teacher.model, counting(200), next_token_loss, Recipe(200, 5e-3))
    (text,) = counting(1, seed=9)
    distances = []
    for steps in (0, 40):
        options = {"steps": steps, "batch_size": 8, "length": 24, "lr": 3e-3, "alpha": 1.0}
        with_teacher = System.dense(teacher.model, teacher.tokenizer)
        student = applied(with_teacher, source=CountingSource(), **options).model
        with torch.no_grad():
            guess, wanted = (model(input_ids=text).logits for model in (student, teacher.model))
        distances.append(float(divergence(guess, wanted, 1.0)))
    assert distances[1] < 0.5 * distances[0]


def test_alpha_mixes_the_two_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(model: Any, batches: Any, loss: Any, recipe: Any) -> None:
        ids = next(iter(batches))
        with torch.no_grad():
            seen[recipe.lr] = float(loss(model(input_ids=ids).logits, ids)), ids, model

    monkeypatch.setattr(f"{get('distill').__module__}.train", spy)
    system = random_system("llama", torch.float32)
    for alpha in (0.0, 0.25, 1.0):  # the rate marks the case
        applied(System.dense(system.model, system.tokenizer), alpha=alpha, lr=1 + alpha, temperature=2.0)
    ids, student = seen[1.25][1:]
    with torch.no_grad():
        guess, wanted = (model(input_ids=ids).logits for model in (student, system.model))
    text, teacher = float(next_token_loss(guess, ids)), float(divergence(guess[:, :-1], wanted[:, :-1], 2.0))
    for alpha in (0.0, 0.25, 1.0):
        assert seen[1 + alpha][0] == pytest.approx((1 - alpha) * text + alpha * teacher, rel=1e-5)


def test_one_seed_gives_the_same_student_and_another_gives_another() -> None:
    first, again, other = (logits(applied(random_system("opt"), seed=seed).model) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_small_set_of_tokens_is_read_over_and_over_and_counted_once() -> None:
    system = random_system("llama")
    data = Data(WorldSource(system.tokenizer), 512, lambda name: pytest.fail(name))
    batches = list(data.batches(6, 2, 16, tokens=50))
    assert data.tokens == 48
    rows = {tuple(row.tolist()) for batch in batches for row in batch}
    assert len(rows) == 3 and all(batch.shape == (2, 16) for batch in batches)
    everything = [tuple(row.tolist()) for batch in batches for row in batch]
    assert all(len(set(everything[start : start + 3])) == 3 for start in range(0, 12, 3))
    assert not torch.equal(batches[0], next(iter(data.batches(1, 2, 16, tokens=50, seed=1))))


def test_students_that_make_no_sense_are_unfit_with_a_sentence() -> None:
    system = random_system("llama")
    assert "2 blocks is no smaller than the model, which has 2" in str(get("distill")(layers=2).unfit(system))
    stranger = smaller_system()
    stranger.tokenizer.add_tokens(["<another>"])
    with pytest.raises(UnfitError, match=r"little has another vocabulary \(9\d\d tokens, the model has 9\d\d\)"):
        applied(system, stranger, student="little")
    same_size = r"little is no smaller than the model \(410,304 bytes, the model has 410,304\)"
    with pytest.raises(UnfitError, match=same_size):
        applied(system, random_system("llama"), student="little")
    packed = get("rtn")().apply(random_system("llama"), Data(None, 512, lambda name: pytest.fail(name)))
    assert "put this technique before the one that packs" in str(get("distill")().unfit(packed))
    single = applied(random_system("llama"), steps=0)
    assert "has a single block" in str(get("distill")().unfit(single))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be between 0 and 1, got 1.5"),
        ({"temperature": 0.0}, "temperature .* got 0.0"),
        ({"student": "ref-70k", "layers": 2}, "layers must be 0 where a student is named, got 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("distill")(**options)
