"""The door to text."""

import json
from pathlib import Path

import numpy as np
import pytest

from effbench.data import Data, FileSource, Windows, WorldSource, read_documents
from effbench.errors import TextError, UnfitError
from effbench.reference.tokenizer import build_tokenizer
from effbench.reference.world import World

TOKENIZER = build_tokenizer(World().vocabulary)


def words(count: int, start: int = 20) -> str:
    vocabulary = World().vocabulary
    return " ".join(vocabulary[start + i % 500] for i in range(count))


def test_evaluation_and_training_text_of_one_file_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(400))
    source = FileSource(path, TOKENIZER)
    evaluated = np.concatenate(source.evaluation(50, None).ids)
    assert len(evaluated) == 300
    trained = source.training(20, 40, 0)
    assert not set(trained.flatten().tolist()) & set(evaluated.tolist())


def test_each_document_of_a_jsonl_file_starts_with_the_start_token_and_is_scored_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": words(30 + i)}) for i in range(8)))
    windows = FileSource(path, TOKENIZER).evaluation(512, None)
    assert [len(ids) for ids in windows.ids] == [33, 34, 35, 36, 37, 38]
    assert all(ids[0] == TOKENIZER.bos_token_id for ids in windows.ids)


def test_a_line_of_jsonl_ends_at_its_newline_only(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\u0085four\u2029five"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    assert read_documents(tmp_path / "a.jsonl") == texts


def test_scored_bytes_are_those_of_the_text_behind_the_first_token(tmp_path: Path) -> None:
    path, calibration = tmp_path / "text.txt", tmp_path / "more.txt"
    path.write_text(words(10))
    calibration.write_text(words(50))
    windows = FileSource(path, TOKENIZER, calibration).evaluation(512, None)
    assert windows.bytes_scored == len(words(9, 21).encode())


def test_text_with_words_outside_a_closed_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(50) + " quintessence " + words(50))
    with pytest.raises(TextError, match="'quintessence'"):
        FileSource(path, TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", "\n\n", "is empty"),
        ("other.csv", "a,b", "must be a .txt file"),
        ("plain.jsonl", "not json", "in each line"),
        ("other.jsonl", '{"words": 1}', "in each line"),
    ],
)
def test_a_file_that_is_no_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        read_documents(tmp_path / name)


def test_tokens_handed_out_are_counted_and_the_same_seed_gives_the_same_ones() -> None:
    def open_door(seed: int) -> Data:
        return Data(WorldSource(TOKENIZER), 128, lambda name: pytest.fail("no model was asked for"), seed)

    data = open_door(0)
    ids = data.calibration(samples=4, length=64)
    assert ids.shape == (4, 64) and data.tokens == 256
    batches = list(data.batches(3, 2, 32))
    assert [tuple(batch.shape) for batch in batches] == [(2, 32)] * 3 and data.tokens == 256 + 192
    assert not np.array_equal(batches[0], batches[1])
    assert np.array_equal(ids, open_door(0).calibration(samples=4, length=64))
    assert not np.array_equal(ids, open_door(1).calibration(samples=4, length=64))


def test_techniques_never_see_the_held_out_stream() -> None:
    source = WorldSource(TOKENIZER)
    held_out = {tuple(ids.tolist()) for ids in source.evaluation(128, None).ids}
    trained = {tuple(ids.tolist()) for ids in source.training(256, 128, 0)}
    assert not held_out & trained


def test_without_text_a_technique_that_needs_some_is_unfit() -> None:
    with pytest.raises(UnfitError, match="--text"):
        Data(None, 128, lambda name: pytest.fail("no model was asked for")).calibration()


def test_windows_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    plain = Windows([np.arange(5), np.arange(3)], 17)
    tagged = WorldSource(TOKENIZER).evaluation(64, 3)
    for windows in (plain, tagged):
        windows.save(tmp_path / "windows.npz")
        loaded = Windows.load(tmp_path / "windows.npz")
        assert loaded.digest == windows.digest and loaded.bytes_scored == windows.bytes_scored
        assert [len(ids) for ids in loaded.ids] == [len(ids) for ids in windows.ids]
        assert loaded.kind_names == windows.kind_names
        assert np.array_equal(np.concatenate(loaded.kinds or [[]]), np.concatenate(windows.kinds or [[]]))


def test_an_unknown_token_that_also_ends_texts_does_not_refuse_them(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(World().vocabulary)
    tokenizer.unk_token = tokenizer.eos_token
    path = tmp_path / "text.txt"
    path.write_text(words(30) + f" {tokenizer.eos_token} " + words(30))
    assert FileSource(path, tokenizer).evaluation(64, None).ids
