"""Every column of every table: its name, unit, which way is better, whether it is exact, and what it says.

An exact column is the same each time the same code measures the same thing; a noisy one is a timing or a peak and is
compared with an interval. Columns of the form `name/part` (a task, a kind of token) follow the column `name`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCALES: dict[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "J": ((1, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
}
"""Units that are written with a prefix, largest first."""


@dataclass(frozen=True)
class Column:
    """One column. `better` is "lower", "higher" or "" where neither is better in itself."""

    name: str
    unit: str
    better: str
    exact: bool
    digits: int
    meaning: str
    derived: bool = False
    title: str = ""

    def scale(self, value: float) -> tuple[float, str]:
        """The factor and the name of the unit in which a value of this size is easily read."""
        scales = SCALES.get(self.unit, ((1, self.unit),))
        return next((entry for entry in scales if abs(value) >= entry[0]), scales[-1])

    def text(self, value: float | None) -> str:
        """The value with its unit, as in a sentence; a dash for none."""
        if value is None:
            return "–"
        factor, unit = self.scale(value)
        number = significant(value / factor) if self.unit in SCALES else decimal(value, self.digits)
        return f"{number}{'' if unit == 'x' else ' '}{unit}".rstrip()


def _ends(name: str, unit: str, exact: bool, digits: int, over: str) -> tuple[Column, Column]:
    """The ends of a column's interval, from resampling `over` what."""
    return (
        Column(f"{name}_low", unit, "", exact, digits, f"lower end of its 95 % interval, over {over}", derived=True),
        Column(f"{name}_high", unit, "", exact, digits, "upper end of its 95 % interval", derived=True),
    )


def _claim(name: str, unit: str, exact: bool, digits: int, seen: str) -> tuple[Column, Column]:
    """What may be claimed of a column's difference from dense, and from what size on one would have been `seen`."""
    return (
        Column(
            f"{name}_p",
            "",
            "",
            exact,
            4,
            "chance of it if nothing differed, Holm-corrected over rows",
            derived=True,
            title="p",
        ),
        Column(
            f"{name}_detectable",
            unit,
            "",
            exact,
            digits,
            f"the smallest that {seen} show four times in five",
            derived=True,
            title="seen from",
        ),
    )


COLUMNS: tuple[Column, ...] = (
    Column("perplexity", "", "lower", True, 3, "exp of the mean nats per token of the held-out text", title="ppl"),
    Column("nll_per_token", "nats", "lower", True, 4, "mean negative log-likelihood of a token", title="nats"),
    Column(
        "nll_difference",
        "nats",
        "lower",
        True,
        4,
        "nats per token above dense, paired over the same windows",
        derived=True,
        title="Δnats",
    ),
    Column(
        "nll_difference_stderr", "nats", "", True, 4, "standard error of the paired difference", derived=True, title="±"
    ),
    Column(
        "word_perplexity",
        "",
        "lower",
        True,
        3,
        "the same nats over the words of the text, as the protocol counts; a task's, as lm-eval counts them",
        title="word ppl",
    ),
    Column("byte_perplexity", "", "lower", True, 4, "the same nats over the UTF-8 bytes of the text"),
    *_ends("nll_difference", "nats", True, 4, "documents"),
    *_claim("nll_difference", "nats", True, 4, "these windows"),
    Column(
        "quality_rank",
        "",
        "lower",
        True,
        0,
        "one more than the rows that have significantly fewer nats",
        derived=True,
        title="rank",
    ),
    Column("bits_per_byte", "bits", "lower", True, 4, "bits needed for a byte of text; comparable across tokenizers"),
    Column("accuracy", "", "higher", True, 3, "mean accuracy over the tasks", title="acc"),
    Column("accuracy_stderr", "", "", True, 3, "standard error of the mean accuracy", derived=True, title="±"),
    Column("accuracy_chance", "", "", True, 3, "mean accuracy of guessing", title="chance"),
    Column(
        "accuracy_difference",
        "",
        "higher",
        True,
        3,
        "accuracy above dense, paired over the same items",
        derived=True,
        title="Δacc",
    ),
    Column("accuracy_difference_stderr", "", "", True, 3, "standard error of the paired difference", derived=True),
    *_ends("accuracy_difference", "", True, 3, "items"),
    *_claim("accuracy_difference", "", True, 3, "these items"),
    Column("flips_to_wrong", "", "lower", True, 0, "answers right in dense and wrong here", derived=True, title="→✗"),
    Column("flips_to_right", "", "", True, 0, "answers wrong in dense and right here", derived=True, title="→✓"),
    Column(
        "accuracy_norm",
        "",
        "higher",
        True,
        3,
        "mean accuracy if a choice's log-likelihood is divided by its characters, over the tasks that publish it",
        title="acc norm",
    ),
    Column("kl_to_dense", "nats", "lower", True, 4, "mean KL(dense || this) per token", title="KL"),
    Column("top1_agreement", "", "higher", True, 3, "share of tokens with the same best next token as dense"),
    *_ends("kl_to_dense", "nats", True, 4, "documents"),
    Column("kl_to_dense_median", "nats", "lower", True, 4, "median over tokens", derived=True, title="KL median"),
    *_ends("kl_to_dense_median", "nats", True, 4, "documents"),
    Column(
        "kl_to_dense_p99", "nats", "lower", True, 3, "exceeded by one token in a hundred", derived=True, title="KL 99 %"
    ),
    *_ends("kl_to_dense_p99", "nats", True, 3, "documents"),
    *_ends("top1_agreement", "", True, 3, "documents"),
    Column("prefill_seconds", "s", "lower", False, 4, "from the prompt to the first new token", title="prefill"),
    Column("prefill_speedup", "x", "higher", False, 2, "dense prefill time / this, interleaved rounds", derived=True),
    *_ends("prefill_speedup", "x", False, 2, "rounds"),
    *_claim("prefill_speedup", "x", False, 2, "these rounds"),
    Column("decode_seconds_per_token", "s", "lower", False, 5, "time of one further token", title="decode/token"),
    Column(
        "decode_speedup",
        "x",
        "higher",
        False,
        2,
        "dense decode time / this, interleaved rounds",
        derived=True,
        title="decode x",
    ),
    *_ends("decode_speedup", "x", False, 2, "rounds"),
    *_claim("decode_speedup", "x", False, 2, "these rounds"),
    Column(
        "speed_rank",
        "",
        "lower",
        False,
        0,
        "one more than the rows that decode significantly faster",
        derived=True,
        title="speed rank",
    ),
    Column(
        "prefill_roofline_share",
        "",
        "higher",
        False,
        3,
        "shortest time for a prompt by the machine's measured limits / measured time",
        derived=True,
        title="prefill/roof",
    ),
    Column(
        "decode_roofline_share",
        "",
        "higher",
        False,
        3,
        "shortest time for a token by the machine's measured limits / measured time",
        derived=True,
        title="decode/roof",
    ),
    Column(
        "decode_bytes_per_token",
        "bytes",
        "lower",
        True,
        2,
        "bytes of weights and cache to be read for one token of each sequence",
    ),
    Column(
        "decode_operations_per_token",
        "",
        "lower",
        True,
        0,
        "multiplications and additions for one token of each sequence",
    ),
    Column(
        "idealized_seconds",
        "s",
        "lower",
        False,
        3,
        "the timed request without noise: best prefill, and the best slope for its new tokens",
        title="ideal",
    ),
    Column(
        "tokens_per_pass", "", "higher", True, 2, "new tokens for each pass over the target model", title="tokens/pass"
    ),
    Column("acceptance_rate", "", "higher", True, 3, "share of drafted tokens that were accepted"),
    Column("peak_bytes", "bytes", "lower", False, 1, "peak resident memory of the process that runs it", title="peak"),
    Column("peak_growth_bytes", "bytes", "lower", False, 1, "that peak above the empty process", title="peak+"),
    Column("peak_device_bytes", "bytes", "lower", False, 1, "peak of the GPU allocator", title="GPU peak"),
    Column("peak_device_reserved_bytes", "bytes", "lower", False, 1, "peak that the GPU allocator has reserved"),
    Column("device_process_bytes", "bytes", "lower", False, 1, "GPU memory of the whole process, context and all"),
    Column("stored_bytes", "bytes", "lower", True, 2, "unique storages of all parameters and buffers", title="stored"),
    Column("parts_bytes", "bytes", "", True, 2, "those of the parts beside the model, such as a draft"),
    Column("held_bytes", "bytes", "lower", True, 2, "stored bytes and the cache of the timed request, batch 1"),
    Column("saved_bytes", "bytes", "lower", True, 2, "files of the saved system, tokenizer and structure too"),
    Column("bits_per_weight", "bits", "lower", True, 2, "stored bits per weight of changed matrices", title="bits/w"),
    Column("promised_bits_per_weight", "bits", "", True, 2, "what the options promise of them", title="promised"),
    Column("bits_per_weight_model", "bits", "lower", True, 2, "all stored bits per parameter of the dense model"),
    Column("compressed_share", "", "", True, 3, "share of the matrix parameters that were changed", title="share"),
    Column("cache_bytes_per_token", "bytes", "lower", True, 0, "bytes of the filled cache per token", title="KV/token"),
    Column("cache_bytes", "bytes", "lower", True, 2, "bytes of the cache filled by the timed request, batch 1"),
    Column(
        "joules_per_token",
        "J",
        "lower",
        False,
        4,
        "energy of a new token and its share of a prompt, above what the device takes when idle",
        title="J/token",
    ),
    Column("joules_per_token_with_idle", "J", "lower", False, 4, "the same, nothing taken off"),
    Column("prefill_joules_per_token", "J", "lower", False, 4, "energy of a token of a prompt, above idle"),
    Column("decode_joules_per_token", "J", "lower", False, 4, "energy of a further new token, above idle"),
    Column("joules_per_correct", "J", "lower", False, 4, "energy of the tasks, above idle, for each correct answer"),
    Column("idle_watts", "W", "", False, 1, "power of the idle device, the mean of before and after"),
    Column("overlap", "", "lower", True, 4, "share of the evaluated tokens that applying has read, in runs of 48"),
    Column("nominal_bits", "bits", "", True, 1, "bits in the options", title="bits asked"),
    Column("nominal_sparsity", "", "", True, 2, "share of weights that the options leave out", title="sparsity asked"),
    Column("nominal_keep", "", "", True, 2, "kept share of a matrix in the options", title="keep asked"),
    Column("nominal_rank", "", "", True, 0, "rank in the options", title="rank asked"),
    Column("nominal_cache_bits", "bits", "", True, 1, "bits of the cache in the options", title="KV bits asked"),
    Column(
        "nominal_cache_tokens", "tokens", "", True, 0, "tokens of the cache in the options", title="KV tokens asked"
    ),
    Column("cost_seconds", "s", "lower", False, 1, "time of applying the pipeline", title="apply"),
    Column("cost_peak_bytes", "bytes", "lower", False, 1, "peak resident memory while applying"),
    Column("cost_peak_device_bytes", "bytes", "lower", False, 1, "peak of the GPU allocator while applying"),
    Column("cost_tokens", "tokens", "lower", True, 0, "tokens of text that applying has read"),
    Column("cost_joules", "J", "lower", False, 1, "energy of applying, by a hardware counter"),
)

BY_NAME: dict[str, Column] = {column.name: column for column in COLUMNS}


def column(name: str) -> Column | None:
    """The column `name`; for `accuracy/piqa` the column `accuracy`. `None` for an unknown one."""
    return BY_NAME.get(name.partition("/")[0])


def decimal(value: float, digits: int) -> str:
    """With so many decimals; by its magnitude where it is far too large for a table."""
    if digits == 0:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:.2g}"


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, all of those before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
