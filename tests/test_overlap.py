"""What was read and is evaluated is found and named; what only sounds alike is not."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from effbench.data import WorldSource
from effbench.measure.derived import rows
from effbench.measure.overlap import RUN, Overlap
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World
from effbench.results import Record


def random_windows(count: int, tokens: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 1000, (count, tokens)))


def test_tokens_that_were_read_are_counted_once_wherever_they_stand() -> None:
    windows = random_windows(4, 300, 0)
    found = Overlap(windows)
    found.meet(np.stack(random_windows(8, 200, 1)))
    assert found.share == 0
    read = random_windows(2, 200, 2)
    read[0][20:80] = windows[1][100:160]
    read[1][0:RUN] = windows[1][110 : 110 + RUN]  # within the first one
    read[1][100 : 100 + RUN - 1] = windows[2][: RUN - 1]  # one token too short
    found.meet(np.stack(read))
    found.meet(np.stack(read))
    assert found.tokens_read == [0, 60, 0, 0] and found.share == pytest.approx(60 / 1200)


def test_the_same_text_is_all_of_it_and_short_windows_are_left_alone() -> None:
    windows = [*random_windows(3, 100, 3), np.arange(RUN - 1)]
    found = Overlap(windows)
    for window in windows:
        found.meet(window[None])
    assert found.tokens_read == [100, 100, 100, 0]


def longest_common_run(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens of the longest run that stands in both, by growing hashes; slow and plain."""
    length, ours, theirs = 0, one.astype(np.uint64), other.astype(np.uint64)
    hashes = [ours * np.uint64(1), theirs * np.uint64(1)]
    while np.isin(*hashes).any():
        length += 1
        with np.errstate(over="ignore"):
            hashes = [
                old[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[length:]
                for old, ids in zip(hashes, (ours, theirs), strict=True)
            ]
    return length


def test_the_embedded_world_does_not_repeat_itself_for_half_of_a_run_and_one_part_in_a_hundred_is_found() -> None:
    source = WorldSource(build_tokenizer(World().vocabulary))
    windows, read = source.evaluation(512, None), source.training(128, 512, 0)
    assert longest_common_run(np.concatenate(windows.ids), read.ravel()) < RUN / 2
    clean = Overlap(windows.ids)
    clean.meet(read)
    assert clean.share == 0
    leaked = Overlap(windows.ids)
    mixed = read.copy()
    mixed.ravel()[:655] = np.concatenate(windows.ids)[5000:5655]  # 1 % of what is read
    leaked.meet(mixed)
    assert sum(leaked.tokens_read) >= 655 - 2 * RUN


def test_a_row_says_how_much_it_has_read_of_what_it_is_evaluated_on() -> None:
    row = Record("s", "m", "gptq", 0, {}, "ok", values={"overlap": 0.0123}, samples={"overlap": [3, 256]})
    said = rows([row])[0].warnings["overlap"]
    assert "1.2 % of the evaluated tokens, in 3 of 256 windows" in said
    row.values["overlap"] = 0.0
    assert not rows([row])[0].warnings


def test_calibrating_on_the_evaluated_text_is_named_in_the_row(tmp_path: Path) -> None:
    from effbench.jobs.applying import apply
    from effbench.suite import Suite

    source = WorldSource(build_tokenizer(World().vocabulary))
    text, other = source.evaluation(512, 16).ids, source.training(64, 512, 0)
    words = World().vocabulary

    def write(name: str, documents: list[np.ndarray]) -> str:
        path = tmp_path / name
        lines = (json.dumps({"text": " ".join(words[token] for token in ids if token > 3)}) for ids in documents)
        path.write_text("\n".join(lines))
        return str(path)

    evaluated = write("evaluated.jsonl", text)
    part = [*other[:50], text[3]]
    shares = {}
    for name, calibration in (("all", text), ("part", part)):
        given = write(f"{name}.jsonl", calibration)
        settings = Suite("s", "ref-70k", text=evaluated, calibration=given, device="cpu", threads=1)
        for pipeline in ("dense", "wanda"):
            folder = tmp_path / name / "systems" / pipeline
            apply(str(tmp_path / name), asdict(settings), pipeline, str(folder))
        record = json.loads(next((tmp_path / name / "records").glob("wanda*")).read_text())
        shares[name] = record["values"]["overlap"]
    assert shares["all"] > 0.9 and 0.01 < shares["part"] < 0.1
