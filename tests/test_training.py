"""The training loop: it learns, repeats itself, and leaves nothing behind."""

import gc
import sys

import pytest
import torch
from conftest import random_model
from counting import counting
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.reference import train as reference_train
from effbench.toolbox.training import Recipe, next_token_loss, train


def test_a_run_that_does_not_ship_needs_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in (["--seed", "1"], ["--tokens", "16e6"]):
        monkeypatch.setattr(sys, "argv", ["train", "70k", *other])
        with pytest.raises(SystemExit):
            reference_train.main()
        assert "give --out FOLDER" in capsys.readouterr().err


def test_the_loss_falls(architecture: str) -> None:
    losses = train(random_model(architecture), counting(25), next_token_loss, Recipe(25, 3e-3))
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_what_it_minimizes_is_the_cross_entropy_that_transformers_computes() -> None:
    model, ids = random_model("llama", torch.float32), counting(1)[0]
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(next_token_loss(output.logits, ids), output.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_batches_give_the_same_weights(dtype: torch.dtype) -> None:
    models = [random_model("gpt2", dtype) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed)  # dropout would differ
        train(model, counting(4, seed), next_token_loss, Recipe(4, 1e-3))
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_small_steps_add_up_though_bfloat16_could_not_hold_one() -> None:
    """A weight of 1 in bfloat16 moves by 1/128 or not at all; 40 steps of about 1/2000 have to show."""
    model = random_model("llama")
    before = model.model.norm.weight.detach().clone()
    train(model, counting(40), next_token_loss, Recipe(40, 5e-4, warm_up=0))
    assert float((model.model.norm.weight.detach() - before).abs().max()) >= 1 / 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_left_behind(architecture: str, dtype: torch.dtype) -> None:
    model = random_model(architecture, dtype)
    frozen = next(model.parameters()).requires_grad_(False)
    kept = frozen.clone()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attention = model.config._attn_implementation
    alive = {id(item) for item in gc.get_objects()}
    train(model, counting(2), next_token_loss, Recipe(2, 1e-3), parameters=list(model.parameters())[1:])
    gc.collect()
    left = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and id(item) not in alive]
    assert sum(item.nbytes for item in left if type(item) is not nn.Parameter) < 1024
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert torch.equal(frozen, kept)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not model.training and model.config._attn_implementation == attention


def test_tied_embeddings_stay_tied() -> None:
    model = random_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    train(model, counting(2), next_token_loss, Recipe(2, 1e-3))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_rate_rises_then_falls_to_nothing() -> None:
    recipe = Recipe(steps=20, lr=1.0, warm_up=0.2)
    rates = [recipe.rate(step) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[20] == 0.0


def test_progress_is_told_of_each_step() -> None:
    seen: list[tuple[int, float]] = []
    losses = train(
        random_model("llama"), counting(3), next_token_loss, Recipe(3, 1e-3), progress=lambda *step: seen.append(step)
    )
    assert seen == list(enumerate(losses))


def test_a_loss_that_is_not_finite_is_unfit_and_the_model_keeps_its_dtype() -> None:
    model = random_model("llama")
    with pytest.raises(UnfitError, match="the loss is nan at step 2; lower lr"):
        train(model, counting(5), _breaks_at_the_second_step(), Recipe(5, 1e-3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def _breaks_at_the_second_step() -> "nn.Module":
    class Breaks(nn.Module):
        calls = 0

        def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
            self.calls += 1
            return next_token_loss(logits, ids) * (1.0 if self.calls == 1 else torch.nan)

    return Breaks()


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many as steps, 5, got 2"):
        train(random_model("llama"), counting(2), next_token_loss, Recipe(5, 1e-3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr must be strictly .* got -1"), ({"warm_up": 2.0}, "warm_up .* got 2"), ({"clip": 0.0}, "clip")],
)
def test_recipes_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**{"steps": 1, "lr": 1.0, **options})  # type: ignore[arg-type]
