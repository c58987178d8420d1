"""Turning what flows through a model by Hadamard transforms, which changes none of its outputs.

The residual stream is turned behind the embeddings and back at the last norm, and every matrix between them is turned
to read and write it so; norms between them give their weights to the matrices that read them, since a turned vector
has no channels of its own to scale. What no norm feeds (the inputs of the matrices that write) is turned right
before its matrix. Embeddings and head stay as they are, so that they may go on sharing their weights.
Source: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), section 4, where the turns at both ends are folded into
embeddings and head, which then cannot be shared any more.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.errors import UnfitError
from effbench.toolbox.architectures import is_norm
from effbench.toolbox.hadamard import random_signs, turn
from effbench.toolbox.stored import StoredModule
from effbench.toolbox.walk import as_linear, blocks, captured_inputs, matrix_names, replace_module

PROBE = 16
"""Tokens read to find out what feeds what, and whether the outputs are still the same."""
SAME = 16
"""How far logits may move, relative to their size, in units of the dtype's precision, and at least by 0.001: four times
what rounding the turned weights of 32 blocks to bfloat16 was seen to do. A wrong turn moves them by their size."""


class TurnedLinear(StoredModule):
    """A linear layer `inner` (out, in) over inputs that are turned, rounded, or both, just before it.

    turned: whether they are turned.
    activation_bits: 16 for none, or the bits to which each row is rounded, symmetrically about zero.
    clip: the share of its largest number that a row's range reaches to.

    Rounded inputs are multiplied in the dtype that they came in: there is no kernel for 4 bits by 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        turned: bool = True,
        activation_bits: int = 16,
        clip: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            turned=turned,
            activation_bits=activation_bits,
            clip=clip,
            bias=bias,
        )
        self.in_features, self.out_features, self.turned = in_features, out_features, turned
        self.activation_bits, self.clip = activation_bits, clip
        self.inner: nn.Module = nn.Linear(in_features, out_features, bias=bias)

    @classmethod
    def around(cls, inner: Any, *, turned: bool = True, activation_bits: int = 16, clip: float = 1.0) -> Self:
        """The layer over `inner`, which reads inputs as they are after turning and rounding."""
        with torch.device("meta"):
            bias = getattr(inner, "bias", None) is not None
            module = cls(inner.in_features, inner.out_features, turned, activation_bits, clip, bias)
        module.inner = inner
        return module

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The layer that computes what `linear` does, from turned inputs and turned weights."""
        return cls.around(_rewritten(linear, turn(linear.weight.detach().float())))

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            x = turn(x)
        if self.activation_bits < 16:
            x = rounded_rows(x, self.activation_bits, self.clip)
        product: Tensor = self.inner(x)
        return product

    @property
    def simulated(self) -> str | None:
        bits = self.activation_bits
        return f"inputs are rounded to {bits} bits and multiplied in the model's dtype" if bits < 16 else None


class TurnedEmbedding(StoredModule):
    """An embedding table whose rows come out with random signs, turned. A sign takes 8 bits a channel."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.inner = nn.Embedding(num_embeddings, embedding_dim)
        self.signs: Tensor = nn.Buffer(torch.empty(embedding_dim, dtype=torch.int8))

    @classmethod
    def of(cls, inner: nn.Embedding, signs: Tensor) -> Self:
        """The embedding over the very same table."""
        with torch.device("meta"):
            module = cls(inner.num_embeddings, inner.embedding_dim)
        module.inner, module.signs = inner, signs.clone()
        return module

    @property
    def weight(self) -> Tensor:
        """The table, which a head may share."""
        return self.inner.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.inner(ids)
        return turn(rows * self.signs)


class TurnedBackNorm(StoredModule):
    """A root-mean-square norm over a turned stream, which it turns back before its weight."""

    def __init__(self, width: int, eps: float, dtype: str = "float32") -> None:
        super().__init__(width=width, eps=eps, dtype=dtype)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=getattr(torch, dtype)), requires_grad=False)
        self.signs: Tensor = nn.Buffer(torch.empty(width, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (turn(wide, back=True) * self.signs).to(x.dtype) * self.weight


def rounded_rows(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Each row of `x` (..., in) rounded to 2^bits levels about zero, reaching to `clip` times its largest number.

    Gradients pass as if nothing had been rounded.
    """
    most = 2 ** (bits - 1) - 1
    wide = x.detach().float()
    scales = (wide.abs().amax(-1, keepdim=True) * (clip / most)).clamp(min=1e-10)
    found = ((wide / scales).round().clamp(-most - 1, most) * scales).to(x.dtype)
    return x + (found - x).detach() if torch.is_grad_enabled() and x.requires_grad else found


@torch.no_grad()
def rotate(model: Any, seed: int) -> bool:
    """Turn the residual stream and the inputs that no norm feeds, or else all inputs, each before its own matrix.

    The stream is turned where its ends are a plain embedding and a root-mean-square norm, all norms that feed
    matrices are such, and nothing else in the blocks is as wide. Returns whether it was.
    Raises `UnfitError` where the model then gives other logits: something else reads or writes the stream.
    """
    ids = torch.arange(3, 3 + PROBE, device=next(model.parameters()).device)[None] % model.config.vocab_size
    before = model(input_ids=ids, use_cache=False).logits.float()
    _, layers = blocks(model)
    plan = _plan(model, layers, ids)
    if plan is None:
        for block in layers:
            for name in matrix_names(block):
                replace_module(block, name, TurnedLinear.of(as_linear(block.get_submodule(name))))
    else:
        embedding, last, fed = plan
        table = model.get_submodule(embedding)
        assert isinstance(table, nn.Embedding)
        signs = random_signs(table.embedding_dim, seed).to(table.weight.device)
        replace_module(model, embedding, TurnedEmbedding.of(table, signs))
        _turn_back(model, last, signs)
        for block, norms in zip(layers, fed, strict=True):
            _rotate_block(block, norms, signs)
    after = model(input_ids=ids, use_cache=False).logits.float()
    tolerated = max(1e-3, SAME * torch.finfo(model.dtype).eps)
    if not (after - before).norm() <= tolerated * before.norm():
        raise UnfitError("something beside norms and plain matrices reads or writes its residual stream; put it first")
    return plan is not None


Plan = tuple[str, str, list[dict[str, list[str]]]]
"""The embedding, the last norm, and for each block its norms with the matrices that each feeds."""


def _plan(model: Any, layers: nn.ModuleList, ids: Tensor) -> Plan | None:
    """Where the stream begins and ends and who reads it; `None` where it cannot be turned."""
    table, inside = model.get_input_embeddings(), set(layers.modules())
    embedding = next(name for name, module in model.named_modules() if module is table)
    ends = [n for n, m in model.named_modules() if m not in inside and is_norm(m) and m is not table]
    if type(table) is not nn.Embedding or len(ends) != 1 or rms_parts(model.get_submodule(ends[0])) is None:
        return None
    norms = [name for name, module in layers.named_modules() if is_norm(module)]
    given: dict[int, str] = {}
    handles = [_note(layers, name, given) for name in norms]
    with captured_inputs(layers, matrix_names(layers)) as seen:
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    fed: list[dict[str, list[str]]] = [{} for _ in layers]
    for name, tensors in seen.items():
        if tensors[0].data_ptr() in given:
            index, _, norm = given[tensors[0].data_ptr()].partition(".")
            fed[int(index)].setdefault(norm, []).append(name.partition(".")[2])
    found = [rms_parts(block.get_submodule(norm)) for block, norms in zip(layers, fed, strict=True) for norm in norms]
    if not all(fed) or any(norm is None for norm in found):
        return None
    width = table.embedding_dim
    if any(_others(block, norms, width) for block, norms in zip(layers, fed, strict=True)):
        return None
    return embedding, ends[0], fed


def _others(block: nn.Module, norms: dict[str, list[str]], width: int) -> bool:
    """Whether a block has weights that may read or write the stream and are neither matrices nor the `norms` given.

    Such are routers, and norms of what a sublayer gives. Norms of other widths are those of heads.
    """
    known = {*matrix_names(block), *norms}
    return any(
        name.rpartition(".")[0] not in known and width in parameter.shape
        for name, parameter in block.named_parameters()
    )


def _note(layers: nn.Module, name: str, given: dict[int, str]) -> Any:
    kept: list[Tensor] = []

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output)  # alive, so that nothing else comes to lie there
        given[output.data_ptr()] = name

    return layers.get_submodule(name).register_forward_hook(hook)


def rms_parts(norm: nn.Module) -> tuple[Tensor, float, float] | None:
    """What a root-mean-square norm multiplies by (width,), its eps, and what its weight is less than that by.

    `None` for any other norm: what it does is looked at, not its name.
    """
    weight: Any = norm.weight
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None or getattr(norm, "bias", None) is not None:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device) + 0.5
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    found = norm(x.to(weight.dtype)).float()
    for offset in (0.0, 1.0):
        factors = weight.detach().float() + offset
        if (found - expected * factors).norm() <= 0.02 * found.norm():
            return factors, float(eps), offset
    return None


def _turn_back(model: nn.Module, name: str, signs: Tensor) -> None:
    norm = model.get_submodule(name)
    found = rms_parts(norm)
    assert found is not None
    factors, eps, _ = found
    dtype = norm.get_parameter("weight").dtype
    new = TurnedBackNorm(len(factors), eps, str(dtype).removeprefix("torch."))
    new.weight.data, new.signs = factors.to(dtype), signs.clone()
    replace_module(model, name, new)


def _rotate_block(block: nn.Module, norms: dict[str, list[str]], signs: Tensor) -> None:
    """Turn the matrices of a block to read and write the turned stream; its norms' weights become 1."""
    reading = [name for readers in norms.values() for name in readers]
    for norm, readers in norms.items():
        module = block.get_submodule(norm)
        found = rms_parts(module)
        assert found is not None
        factors, _, offset = found
        for name in readers:
            linear = as_linear(block.get_submodule(name))
            weight = turn(linear.weight.detach().float() * (factors * signs))
            replace_module(block, name, _rewritten(linear, weight))
        module.get_parameter("weight").data.fill_(1 - offset)
    for name in matrix_names(block):
        if name in reading:
            continue
        linear = as_linear(block.get_submodule(name))
        weight, bias = turn(linear.weight.detach().float()), None
        if linear.out_features == len(signs):
            weight = turn((weight * signs[:, None]).T).T
            bias = None if linear.bias is None else turn(linear.bias.detach().float() * signs)
        replace_module(block, name, TurnedLinear.around(_rewritten(linear, weight, bias)))


def _rewritten(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with another `weight` (out, in) and perhaps another bias, in the dtype of `linear`."""
    dtype, bias = linear.weight.dtype, linear.bias if bias is None else bias
    new = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return new
