"""Zeros in weight matrices: which weights go, and layers that store only those that stay.

Bits stored for each weight of an m x n matrix with a share s of zeros and values of b bits (closed form, no biases):

    bitmask   b (1 - s) + 1                            one bit for each weight says whether it stays
    2:4       b / 2 + 1                                two values in each run of four inputs, two bits for each place
    csr       (b + 16) (1 - s) + 32 (m + 1) / (m n)    places in int16, in int32 where there are more than 32767 inputs

A mask needs no object of its own: it is where a matrix is exactly zero. So it survives saving, and whatever comes
after a pruner can ask the weight. `drop_zeros` is how a quantizer keeps the zeros of a 2:4 matrix.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn

from effbench.toolbox.checks import one_of, within
from effbench.toolbox.grid import decode
from effbench.toolbox.kernels import two_four
from effbench.toolbox.kernels.codes import pack, packed_bytes, unpack
from effbench.toolbox.packed import PackedLinear
from effbench.toolbox.stored import StoredModule

PATTERNS = ("unstructured", "2:4", "4:8")
STORES = ("dense", "bitmask", "2:4", "csr")
CSR_SHARE, CSR_ROWS = 0.08, 20
"""Torch's CSR product beats filling in the zeros up to that share of kept values with any number of rows, and beyond
it while share * rows stays below the other figure (2048 x 2048, one thread with AVX-512)."""


def check_options(sparsity: float, pattern: str, compare: str, store: str) -> None:
    """Raises `ValueError` for options that a pruner cannot have, or not together."""
    within("sparsity", sparsity, 0, 1, open_ends=True)
    one_of("pattern", pattern, PATTERNS)
    one_of("compare", compare, ("matrix", "row"))
    one_of("store", store, STORES)
    if pattern != "unstructured" and sparsity != 0.5:
        raise ValueError(f"sparsity is 0.5 with pattern={pattern}, leave it out; got {sparsity:g}")
    if store == "2:4" != pattern:
        raise ValueError(f"store=2:4 needs pattern=2:4, got {pattern}; store=bitmask takes every pattern")


def numbers(pattern: str) -> tuple[int, int]:
    """How many zeros there are in a run, and how long it is: (2, 4) of "2:4"."""
    zeros, _, run = pattern.partition(":")
    return int(zeros), int(run)


def misfit(linear: nn.Linear, pattern: str) -> str | None:
    """Why a pattern cannot be had in `linear`; `None` if it can."""
    if pattern != "unstructured" and linear.in_features % numbers(pattern)[1]:
        return f"its {linear.in_features} inputs do not divide into runs of {numbers(pattern)[1]}"
    return None


def lowest(score: Tensor, sparsity: float, pattern: str = "unstructured", compare: str = "matrix") -> Tensor:
    """Where the lowest of `score` (out, in) are, as bools (out, in). Of equal scores the first ones count as lower.

    With a pattern, so many in each run of each row; else the int(sparsity * in) lowest of each row, or, compared over
    the whole matrix, one more than int(sparsity * out * in), as in SparseGPT's and Wanda's released code, which also
    takes the one at the threshold.
    """
    if pattern != "unstructured":
        count, run = numbers(pattern)
        groups = score.unflatten(1, (-1, run))
    elif compare == "row":
        count, groups = int(score.shape[1] * sparsity), score
    else:
        count, groups = int(score.numel() * sparsity) + 1, score.flatten()
    places = groups.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).view_as(score)


def pruned(linear: nn.Linear, gone: Tensor, store: str) -> nn.Module:
    """`linear` with zeros where `gone` (out, in) says, in the format `store`."""
    linear.weight.data = linear.weight.data.masked_fill(gone, 0)
    return linear if store == "dense" else SparseLinear.pack(linear, store)


def fits_two_four(weight: Tensor) -> bool:
    """Whether each run of four inputs of `weight` (out, in) has two zeros or more."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all())


def _keep(weight: Tensor, store: str) -> Tensor:
    """Which weights are stored, as bools (out, in): all that are not zero; with 2:4 exactly two of each run."""
    kept = weight != 0
    if store != "2:4":
        return kept
    if not fits_two_four(weight):
        raise ValueError("2:4 holds two weights in each run of four inputs, and some run has more; prune it to 2:4")
    runs = kept.unflatten(1, (-1, 4))
    places = (~runs).byte().argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(runs).scatter_(-1, places, True).flatten(1)


def _pack_places(kept: Tensor, store: str) -> Tensor:
    """`kept` (out, in) as bytes: a bit for each weight, or with 2:4 two bits for each of those that stay."""
    if store == "bitmask":
        return pack(kept.byte(), 1)
    return pack((kept.flatten().nonzero().flatten() % 4).byte(), 2)


def _fill_in(values: Tensor, places: Tensor, store: str, shape: tuple[int, int]) -> Tensor:
    """A matrix of that shape with `values` (kept,) where `places` says, and zeros elsewhere."""
    count = shape[0] * shape[1]
    if store == "2:4":
        runs = values.new_zeros(count // 4, 4)
        return runs.scatter_(1, unpack(places, count // 2, 2).long().view(-1, 2), values.view(-1, 2)).view(shape)
    kept = unpack(places, count, 1)  # twice as fast as a scatter by mask: each weight looks its value up, 0 is a zero
    return nn.functional.pad(values, (1, 0)).index_select(0, kept.cumsum(0, dtype=torch.int32).mul_(kept)).view(shape)


def _places_bytes(store: str, count: int) -> int:
    return packed_bytes(count, 1) if store == "bitmask" else packed_bytes(count // 2, 2)


@cache
def _csr_is_known() -> bool:
    """Has torch say, once and to nobody, that its CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1))
    return True


class SparseLinear(StoredModule):
    """A linear layer that stores the weights that are not zero, and where they are.

    store: "bitmask", "2:4" or "csr".
    kept: how many weights are stored.
    bias, dtype: whether there is a bias, and the type of it and of the weights.
    layout: of "2:4": "plain", or that of a kernel of GPUs (see `effbench.toolbox.kernels.two_four`).

    On a CPU, "csr" goes through torch's sparse product where it is the faster way; on a GPU that has sparse tensor
    cores, what was packed there as "2:4" goes through them. All else fills in the zeros for a product and drops them
    after it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        store: str,
        kept: int,
        bias: bool = False,
        dtype: str = "float32",
        layout: str = "plain",
    ) -> None:
        one_of("store", store, STORES[1:])
        one_of("layout", layout, two_four.LAYOUTS)
        options = {"store": store, "kept": kept, "bias": bias, "dtype": dtype, "layout": layout}
        super().__init__(in_features=in_features, out_features=out_features, **options)
        self.in_features, self.out_features, self.store, self.kept = in_features, out_features, store, kept
        self.layout, self._shape = layout, (out_features, in_features)
        joined = layout == "cusparselt"  # the places are counted as values
        self.values: Tensor = nn.Buffer(torch.empty(kept * (8 + joined) // 8, dtype=getattr(torch, dtype)))
        if store == "csr":
            index = torch.int16 if in_features <= 32767 else torch.int32
            self.columns: Tensor = nn.Buffer(torch.empty(kept, dtype=index))
            self.starts: Tensor = nn.Buffer(torch.empty(out_features + 1, dtype=torch.int32))
        else:
            size = 0 if joined else _places_bytes(store, in_features * out_features)
            self.places: Tensor = nn.Buffer(torch.empty(size, dtype=torch.uint8))
        self.bias: Tensor | None = nn.Buffer(torch.empty(out_features, dtype=getattr(torch, dtype))) if bias else None

    @classmethod
    def pack(cls, linear: nn.Linear, store: str) -> Self:
        """The layer that stores `linear` without its zeros.

        Raises `ValueError` for "2:4" where a run of four inputs has more than two other weights.
        """
        weight = linear.weight.detach()
        kept = _keep(weight, store)
        dtype, bias = str(weight.dtype).removeprefix("torch."), linear.bias is not None
        layout = two_four.layout(weight) if store == "2:4" else "plain"
        module = cls(linear.in_features, linear.out_features, store, int(kept.sum()), bias, dtype, layout)
        module.values = weight[kept]
        if layout != "plain":
            module.values, module.places = two_four.pack(weight, layout)
        elif store == "csr":
            module.columns = kept.nonzero()[:, 1].to(module.columns.dtype)
            module.starts = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        else:
            module.places = _pack_places(kept, store)
        if bias:
            module.bias = linear.bias.detach().to(weight.dtype, copy=True)
        return module

    def dense(self) -> Tensor:
        """The weight matrix (out, in) with its zeros, made anew by each call."""
        if self.layout != "plain":
            return two_four.filled_in(self.values, self.places, self._shape, self.layout)
        if self.store != "csr":
            return _fill_in(self.values, self.places, self.store, self._shape)
        weight: Tensor = self.values.new_zeros(self._shape)
        weight[torch.repeat_interleave(self.starts.diff()), self.columns.long()] = self.values
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.layout != "plain" and two_four.takes(x, self.values):
            return nn.functional.linear(
                x, two_four.matrix(self.values, self.places, self._shape, self.layout), self.bias
            )
        return self.sparse_product(x) if self._multiplies_sparse(x) else self.filled_in_product(x)

    def filled_in_product(self, x: Tensor) -> Tensor:
        """The product with zeros that are filled in for it."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense().to(x.dtype), bias)

    def sparse_product(self, x: Tensor) -> Tensor:
        """The product by torch's CSR kernel, on a CPU, of a layer that is stored as "csr"."""
        # the product is there for int32 and float32 only: widened for a call, a few values cost little
        matrix = torch.sparse_csr_tensor(
            self.starts, self.columns.int(), self.values.float(), self._shape, check_invariants=not _csr_is_known()
        )
        product = (matrix @ x.reshape(-1, self.in_features).float().T).T.to(x.dtype)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias.to(x.dtype)

    def _multiplies_sparse(self, x: Tensor) -> bool:
        """Whether torch has a sparse product for this, and it is the faster way."""
        trained = torch.is_grad_enabled() and x.requires_grad
        able = self.store == "csr" and x.device.type == "cpu" and torch.backends.mkl.is_available() and not trained
        share, rows = self.kept / (self.in_features * self.out_features), x.numel() // self.in_features
        faster = rows > 0 and (share <= CSR_SHARE or share * rows <= CSR_ROWS)
        return able and faster


class SparsePackedLinear(PackedLinear):
    """A linear layer over the packed codes of those weights that are not zero; all options but two are PackedLinear's.

    store: "bitmask" or "2:4".
    kept: how many codes are stored.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int, store: str, kept: int, **options: object
    ) -> None:
        one_of("store", store, STORES[1:3])
        super().__init__(in_features, out_features, bits, **options)  # type: ignore[arg-type]
        if self.tile:
            raise ValueError(f"tile must be 0 where zeros are left out, got {self.tile}")
        self.options |= {"store": store, "kept": kept}
        self.store, self.kept = store, kept
        self.codes = torch.empty(packed_bytes(kept, bits), dtype=torch.uint8)
        size = _places_bytes(store, in_features * out_features)
        self.places: Tensor = nn.Buffer(torch.empty(size, dtype=torch.uint8))

    @classmethod
    def of(cls, packed: PackedLinear, kept: Tensor, store: str) -> Self:
        """The layer that stores the codes of `packed` where `kept` (out, in) says so; all others become zero."""
        codes = unpack(packed.codes, kept.numel(), packed.bits)[kept.flatten()]
        module = cls(**packed.options, store=store, kept=codes.numel())
        module.codes, module.places = pack(codes, packed.bits), _pack_places(kept, store)
        for name, tensor in packed.named_buffers():
            if name != "codes":
                setattr(module, name, tensor)
        return module

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix (out, in) that the codes stand for, with its zeros, made anew by each call."""
        shape = self.out_features, self.in_features
        codes = unpack(self.codes, self.kept, self.bits)
        scales, zeros, _ = self._grids()
        if self.store == "2:4" and self.in_features // self.groups % 4 == 0:  # as many codes in each group
            values = decode(codes.view(*scales.shape, -1), scales, zeros).to(dtype).flatten()
            return _fill_in(values, self.places, self.store, shape)
        weight = decode(_fill_in(codes, self.places, self.store, shape).view(*scales.shape, -1), scales, zeros)
        kept = _fill_in(torch.ones_like(codes), self.places, self.store, shape)
        return weight.flatten(1).mul_(kept).to(dtype)

    @property
    def unpacked(self) -> str | None:
        return None if self.simulated else "codes are unpacked for each product: no kernel leaves zeros out"

    def _kernel_product(self, x: Tensor) -> Tensor | None:
        return None


def drop_zeros(packed: PackedLinear, weight: Tensor) -> PackedLinear:
    """`packed` without the codes of the zeros of `weight` (out, in), if it is a 2:4 matrix and bytes are saved.

    For a quantizer that is given a pruned matrix: two codes in each run of four are stored, with two bits for each
    place, and the zeros stay exactly zero. Tiles are for a kernel that knows no zeros and are left as they are.
    """
    if packed.tile or packed.bits <= 2 or not fits_two_four(weight):
        return packed
    return SparsePackedLinear.of(packed, _keep(weight, "2:4"), "2:4")
