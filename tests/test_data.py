"""Text -> documents: what is kept, what is held out, what is refused. test_data_tokens.py goes on from there."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_corpora import section, split_of, texts, write_folder

from tokenformer.data import prepare, sources
from tokenformer.recipe import recipe_from_dict


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ------------------------------------------------------------ duplicates, train and held out


def test_duplicates_are_dropped_and_no_document_is_in_train_and_valid(tmp_path, cache):
    unique = texts(60)
    corpus = prepare(section(write_folder(tmp_path / "a", unique * 2 + [f" {unique[0]}\n"])), 0, cache)
    train, valid = split_of(corpus)
    assert sorted(train + valid) == sorted(unique) and train and valid
    assert not set(train) & set(valid)
    assert corpus.info["duplicates_dropped"] == 61 and corpus.info["documents"] == 60
    assert corpus.info["bytes"] == sum(len(text.encode()) for text in unique)
    # control: the same check finds the overlap that a split by position would have left
    planted = unique * 2
    assert set(planted[:100]) & set(planted[100:])


def test_split_is_independent_of_order_seed_and_other_documents(tmp_path, cache):
    documents = texts(80)
    _, valid = split_of(prepare(section(write_folder(tmp_path / "a", documents)), 0, cache))
    _, reversed_ = split_of(prepare(section(write_folder(tmp_path / "b", documents[::-1]), seed=7), 0, cache))
    _, more = split_of(prepare(section(write_folder(tmp_path / "c", documents + texts(160)[80:])), 0, cache))
    assert set(valid) == set(reversed_) and valid != reversed_
    assert set(valid) == set(more) & set(documents) and len(more) > len(valid)
    # control: a larger fraction moves documents over, and those held out before stay so
    _, larger = split_of(prepare(section(tmp_path / "a", valid_fraction=0.5), 0, cache))
    assert set(valid) < set(larger)


def test_held_out_fraction_is_the_one_asked_for(tmp_path, cache):
    path = tmp_path / "lines.txt"
    path.write_text("\f".join(f"text {number}" for number in range(5000)))
    info = prepare(section(path, valid_fraction=0.1), 0, cache).info
    assert info["documents"] == 5000 and 400 < info["valid_documents"] < 600  # 500 +- 4.7 standard deviations


def test_valid_tokens_bounds_what_is_held_and_the_rest_is_not_trained_on(tmp_path, cache):
    source = write_folder(tmp_path / "a", texts(80))
    everything, bounded = (
        prepare(section(source), 0, cache),
        prepare(section(source, valid_tokens=100), 0, cache),
    )
    assert len(bounded.valid) == len(bounded.valid_bytes) == 100
    assert np.array_equal(bounded.valid, everything.valid[:100])
    assert np.array_equal(bounded.train, everything.train)
    unused = everything.valid_bytes.sum() - bounded.valid_bytes.sum()
    assert bounded.info["valid_bytes_unused"] == unused > 0 == everything.info["valid_bytes_unused"]


# ------------------------------------------------------------ sources


def test_embedded_corpus_is_the_standard_library_without_tests(cache):
    heard: list[str] = []
    corpus = prepare(section("embedded", valid_fraction=0.02), 0, cache, heard.append)
    info = corpus.info
    assert "Python source" in info["description"] and 5e6 < info["bytes"] < 30e6 and heard
    names = info["file_names"]
    assert {"pydoc_data/topics.py", "argparse.py"} <= set(names) and names == sorted(names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "tkinter", "lib2to3", "ensurepip"}
    assert info["sha256"] == hashlib.sha256(corpus.train.tobytes()).hexdigest()
    assert json.loads(json.dumps(info)) == info


def test_folder_reads_plain_gz_and_xz_below_it_and_counts_what_is_not_text(tmp_path, cache):
    documents = texts(40)
    root = write_folder(tmp_path / "a", documents[:20])
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "no.txt").write_text("hidden")
    for number, text in enumerate(documents[20:]):
        opener, end = ((gzip.open, "gz"), (lzma.open, "xz"))[number % 2]
        with opener(root / "deep" / "er" / f"{number}.txt.{end}", "wt", encoding="utf-8") as file:
            file.write(text)
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (root / "zeros.bin").write_bytes(b"ascii\0but binary")
    (root / "blank.txt").write_text(" \n\n")
    corpus = prepare(section(root), 0, cache)
    train, valid = split_of(corpus)
    assert sorted(train + valid) == sorted(documents)
    assert corpus.info["skipped_files"] == 2 and corpus.info["blank_dropped"] == 1 and corpus.info["files"] == 43


@pytest.mark.parametrize("mark", ["\f", "\0", "\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n"])
def test_lone_file_is_cut_at_its_marks(tmp_path, cache, mark):
    path = tmp_path / "lone.txt"
    documents = [f"{text}\n\nnot a mark: <|endoftext|> in a line" for text in texts(40)]
    path.write_bytes(mark.join(documents).encode())
    train, valid = split_of(prepare(section(path), 0, cache))
    assert sorted(text.strip() for text in train + valid) == sorted(documents)


def test_lone_file_without_marks_is_cut_into_chunks_that_join_to_it(tmp_path, monkeypatch):
    paragraphs = "".join(f"{'word ' * (number % 90)}\n{number}\r\n\r\n" for number in range(1500))
    lines = "".join(f"{number} {'x' * 70}\n" for number in range(1500))
    for text, shortest, longest in (
        (paragraphs, 4096, 5000),
        (lines, 16000, 16384),
        ("é" * 100_000, 16384, 16384),
    ):
        path = tmp_path / "lone.txt.gz"
        path.write_bytes(gzip.compress(text.encode()))
        found = []
        for block in (1000, 2**20):  # where a block ends has no influence
            monkeypatch.setattr(sources, "BLOCK", block)
            found.append(list(sources.Source(section(path), 0).documents()))
        assert found[0] == found[1] and "".join(found[0]) == text
        assert all(shortest <= len(chunk) <= longest for chunk in found[0][:-1]) and len(found[0]) > 5


def test_document_separator_cuts_also_across_blocks_and_must_occur(tmp_path, cache, monkeypatch):
    path = tmp_path / "lone.txt"
    path.write_text("\n--\n--\n".join(texts(40)))
    for block in (7, 2**20):
        monkeypatch.setattr(sources, "BLOCK", block)
        monkeypatch.setattr(sources, "LONGEST_CHUNK", 5)
        assert list(sources.Source(section(path, document_separator="\n--\n--\n"), 0).documents()) == texts(40)
    only_one = section(path, document_separator=texts(20)[-1])
    monkeypatch.setattr(sources, "BLOCK", 7)
    assert len(list(sources.Source(only_one, 0).documents())) == 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"data\.document_separator = '###' does not occur"):
        prepare(section(path, document_separator="###"), 0, cache)
    with pytest.raises(ValueError, match=r"data\.document_separator = '#' has no effect"):
        prepare(section("embedded", document_separator="#"), 0, cache)
    assert not cache.exists() or not list(cache.iterdir())


def test_nul_characters_are_removed_and_counted(tmp_path, cache):
    path = tmp_path / "lone.txt"
    path.write_text("#".join(f"{number}a\0b" for number in range(30)))
    corpus = prepare(section(path, document_separator="#"), 0, cache)
    train, valid = split_of(corpus)
    assert sorted(train + valid) == sorted(f"{number}ab" for number in range(30))
    assert corpus.info["nul_characters_removed"] == 30


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hf_rows_are_streamed_and_give_the_split_of_the_same_texts_in_files(tmp_path, cache):
    pytest.importorskip("datasets")
    documents = texts(60)
    rows = [{"id": number, "body": text} for number, text in enumerate([*documents, documents[0]])]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"id": 99, "body": None}])
    corpus = prepare(section(f"hf:json:{path}", text_field="body"), 10**6, cache)
    files = prepare(section(write_folder(tmp_path / "a", documents)), 0, cache)
    assert np.array_equal(corpus.train, files.train) and np.array_equal(corpus.valid, files.valid)
    assert corpus.info["duplicates_dropped"] == 1 and corpus.info["blank_dropped"] == 1
    with pytest.raises(ValueError, match=r"data\.text_field = 'text' is none of its fields: id, body"):
        prepare(section(f"hf:json:{path}"), 10, cache)
    with pytest.raises(ValueError, match=r"data\.text_field = 'id' holds int"):
        prepare(section(f"hf:json:{path}", text_field="id"), 10, cache)
    with pytest.raises(ValueError, match=r"data\.split = 'test' cannot be read"):
        prepare(section(f"hf:json:{path}", text_field="body", split="test"), 10, cache)


def test_hf_stream_is_read_only_as_far_as_needed_and_holds_out_the_same_text(tmp_path, cache):
    pytest.importorskip("datasets")
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{number} " * 200} for number in range(3000)])
    little, more = (
        prepare(section(f"hf:json:{path}", valid_fraction=0.05, valid_tokens=5000), tokens, cache)
        for tokens in (1000, 600_000)
    )
    assert 1000 < len(little.train) < 300_000 < 600_000 < len(more.train) < 900_000
    assert np.array_equal(little.valid, more.valid) and len(little.valid) == 5000
    assert np.array_equal(little.train, more.train[: len(little.train)])
    assert little.info["documents"] < more.info["documents"] < 3000


def test_a_length_of_a_stream_is_refused_where_nothing_is_streamed(cache, tmp_path):
    folder = write_folder(tmp_path / "texts", texts(40))
    with pytest.raises(ValueError, match=r"data.stream_tokens = 5 has no effect with data.source = '.*texts'"):
        prepare(section(folder, stream_tokens=5), 100, cache)
    assert len(prepare(section(folder), 100, cache).train) > 100  # the control


def test_hub_names_become_dataset_and_config(monkeypatch):
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.append((path, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("hf:tiny", "hf:owner/tiny", "hf:owner/tiny/10BT"):
        assert list(sources.Source(section(name), 0).documents()) == ["a"]
    same = {"split": "train", "streaming": True}
    assert asked == [("tiny", same), ("owner/tiny", same), ("owner/tiny", same | {"name": "10BT"})]


def test_hf_stream_is_not_read_on_when_there_is_enough(cache, monkeypatch):
    taken: list[int] = []

    def load_dataset(path: str, **options: Any) -> Any:
        for number in range(10_000):
            taken.append(number)
            yield {"text": f"{number} " * 200}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    info = prepare(section("hf:tiny", valid_tokens=5000), 1000, cache).info
    assert info["documents"] < len(taken) < 1000
    # control: a source that ends before it has given enough is taken whole, and Batches says so
    info = prepare(section("hf:tiny", valid_tokens=5000), 10**9, cache).info
    assert len(taken) > 10_000 and info["train_tokens"] < 10**9


def test_missing_datasets_package_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data\.source = 'hf:tiny' needs datasets: pip install 'tokenformer\[hf\]'"):
        prepare(section("hf:tiny"), 10, cache)


# ------------------------------------------------------------ refusals


def test_unusable_sources_are_refused_in_one_line_that_names_the_key(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("only one document")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-300])
    (tmp_path / "broken.xz").write_bytes(b"no archive")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a").write_bytes(b"\xff\xfe")
    good = write_folder(tmp_path / "good", texts(20))
    cases = [
        (section(tmp_path / "nowhere"), 'nowhere\' does not exist; allowed: "embedded"'),
        (section(tmp_path / "empty"), "holds no text (0 files"),
        (section(tmp_path / "binary"), "holds no text (1 files, 1 of them not text)"),
        (section(tmp_path / "empty.txt"), "holds no text"),
        (
            section(tmp_path / "one.txt", valid_fraction=0.01),
            "none of its 1 documents falls to the valid side",
        ),
        (
            section(tmp_path / "one.txt", valid_fraction=0.999),
            "none of its 1 documents falls to the train side",
        ),
        (section(tmp_path / "latin.txt"), "is not UTF-8 text (unexpected end of data at byte 3); allowed: plain"),
        (section(tmp_path / "broken.gz"), "broken.gz cannot be read"),
        (section(tmp_path / "broken.xz"), "broken.xz cannot be read"),
        (section("hf:json:nowhere.jsonl"), "nowhere.jsonl is not a file"),
        (section(good, tokenizer=str(tmp_path / "empty")), 'cannot be loaded; allowed: "bytes"'),
        (
            section(good, tokenizer="nosuch.json"),
            "'nosuch.json' cannot be loaded; allowed: \"bytes\", the name of a tokenizer on the hub, or a folder that "
            "holds one (no such folder)",
        ),
        (
            section(good, tokenizer="owner/name"),
            "'owner/name' cannot be loaded; allowed: \"bytes\", the name of a tokenizer on the hub, or a folder that "
            "holds one (owner/name: no such file or folder here, and not to be had from the hub (",
        ),
        (section(good, valid_fraction=1.5), "data.valid_fraction = 1.5: between 0 and 1 is allowed"),
        (section(good, valid_tokens=0), "data.valid_tokens = 0: 1 or more is allowed"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError) as caught:
            prepare(wrong, 10, cache)
        text = str(caught.value)
        assert message in text and "\n" not in text and "data." in text, text
        key = "tokenizer" if "cannot be loaded" in message else "source" if "data." not in message else "valid"
        assert f"data.{key}" in text
    assert not cache.exists() or not list(cache.iterdir())  # nothing half written
    assert prepare(section(good), 10, cache).info["documents"] == 20  # control


@pytest.mark.parametrize("before", [b"", "\u00e9".encode() * 3, b"a" * 6, b"a" + "\u00e9".encode() * 5, b"a" * 7])
@pytest.mark.parametrize(("wrong", "why"), [(b"\xe9a", "invalid continuation byte"), (b"\xff", "invalid start byte")])
def test_where_text_ceases_to_be_utf_8_is_said_of_what_is_unpacked(tmp_path, cache, monkeypatch, before, wrong, why):
    monkeypatch.setattr(sources, "BLOCK", 7)  # so that the place lies in the first block, across two, in the second
    for name, pack in (("a.txt", bytes), ("a.gz", gzip.compress), ("a.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(before + wrong + b" goes on"))
        with pytest.raises(ValueError) as caught:
            prepare(section(tmp_path / name), 10, cache)
        assert f"is not UTF-8 text ({why} at byte {len(before)}); allowed" in str(caught.value)
    with pytest.raises(UnicodeDecodeError) as python:  # the reference: all of it at once
        (before + wrong + b" goes on").decode()
    assert python.value.start == len(before)


@pytest.mark.parametrize(("name", "pack"), [("a.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_an_archive_that_is_no_text_and_damaged_further_on_is_refused_in_one_line(tmp_path, cache, name, pack):
    whole = pack(b"\xff" + np.random.default_rng(0).bytes(200_000).hex().encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="^[^\n]*(is not UTF-8 text|cannot be read)[^\n]*$"):
        prepare(section(tmp_path / name), 10, cache)


def test_held_out_text_may_be_a_source_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\f".join(f"trained {i} " * 20 for i in range(40)) + "\f" + "shared " * 20)
    (tmp_path / "held.txt").write_text("held out " * 50 + "\f" + "shared " * 20)
    recipe = {"data": {"source": str(tmp_path / "train.txt"), "valid_source": str(tmp_path / "held.txt")}}
    section = recipe_from_dict({"name": "r", "train": {"steps": 1}, **recipe}, "the test").data
    corpus = prepare(section, 0, tmp_path / "cache")
    held_out, train = bytes(corpus.valid.astype("uint8")), bytes(corpus.train.astype("uint8"))
    assert held_out == b"held out " * 50 + b"\0" + b"shared " * 20 + b"\0"
    assert train.count(b"\0") == 40 and b"shared" not in train  # what is held out is not trained on
    alone = prepare(dataclasses.replace(section, valid_source=None, valid_fraction=0.5), 0, tmp_path / "cache")
    assert len(alone.train) < len(corpus.train) and b"held out" not in bytes(alone.valid.astype("uint8"))
    for name, message in (("hf:x", "must be a text file"), ("none.txt", "source = 'none.txt' does not exist in ")):
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(section, valid_source=name), 0, tmp_path / "cache")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("empty", r"data.valid_source = .* holds no text"), ("train", "no document that .* has not")):
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(section, valid_source=str(tmp_path / f"{name}.txt")), 0, tmp_path / "cache")
