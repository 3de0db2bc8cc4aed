"""Text -> documents -> tokens -> batches: what is kept, what is held out, what is refused, what repeats."""

import gzip
import hashlib
import json
import lzma
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenformer import data
from tokenformer.data import Batches, ByteTokenizer, HFTokenizer, eval_windows, prepare


def section(source: Any, **changes: Any) -> SimpleNamespace:
    fields = {
        "source": str(source), "tokenizer": "bytes", "text_field": "text", "split": "train",
        "document_separator": "", "sequence_length": 16, "batch_size": 4, "valid_fraction": 0.2,
        "valid_tokens": 10**6, "repeat": False, "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def texts(count: int) -> list[str]:
    return [
        f"Document {number}: größer, 語 and 🙂 {hashlib.md5(bytes(number)).hexdigest()}"
        for number in range(count)
    ]


def write_folder(root: Path, documents: list[str]) -> Path:
    for number, text in enumerate(documents):
        root.mkdir(exist_ok=True)
        (root / f"{number:04}.txt").write_bytes(text.encode())
    return root


def split_of(corpus: data.Corpus) -> tuple[list[str], list[str]]:
    """The documents of a corpus in bytes, read back from its tokens."""
    train, valid = (
        bytes(tokens.astype(np.uint8)).split(b"\0")[:-1] for tokens in (corpus.train, corpus.valid)
    )
    return [text.decode() for text in train], [text.decode() for text in valid]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(50), trainer)
    tokenizer.enable_truncation(8)  # a setting stored in its file, which must not cut documents short
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(str(folder))
    return folder


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
    assert (
        corpus.info["skipped_files"] == 2 and corpus.info["blank_dropped"] == 1 and corpus.info["files"] == 43
    )


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
            monkeypatch.setattr(data, "BLOCK", block)
            found.append(list(data.Source(section(path), 0).documents()))
        assert found[0] == found[1] and "".join(found[0]) == text
        assert all(shortest <= len(chunk) <= longest for chunk in found[0][:-1]) and len(found[0]) > 5


def test_document_separator_cuts_also_across_blocks_and_must_occur(tmp_path, cache, monkeypatch):
    path = tmp_path / "lone.txt"
    path.write_text("\n--\n--\n".join(texts(40)))
    for block in (7, 2**20):
        monkeypatch.setattr(data, "BLOCK", block)
        monkeypatch.setattr(data, "LONGEST_CHUNK", 5)
        assert list(data.Source(section(path, document_separator="\n--\n--\n"), 0).documents()) == texts(40)
    only_one = section(path, document_separator=texts(20)[-1])
    monkeypatch.setattr(data, "BLOCK", 7)
    assert len(list(data.Source(only_one, 0).documents())) == 2
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


def test_hub_names_become_dataset_and_config(monkeypatch):
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.append((path, options))
        return [{"text": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("hf:tiny", "hf:owner/tiny", "hf:owner/tiny/10BT"):
        assert list(data.Source(section(name), 0).documents()) == ["a"]
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
    with pytest.raises(
        ValueError, match=r"data\.source = 'hf:tiny' needs datasets: pip install 'tokenformer\[hf\]'"
    ):
        prepare(section("hf:tiny"), 10, cache)


# ------------------------------------------------------------ refusals


def test_unusable_sources_are_refused_in_one_line_that_names_the_key(tmp_path, cache, bpe_folder):
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
        (section(tmp_path / "latin.txt"), "is not UTF-8 text"),
        (section(tmp_path / "broken.gz"), "broken.gz cannot be read"),
        (section(tmp_path / "broken.xz"), "broken.xz cannot be read"),
        (section("hf:json:nowhere.jsonl"), "nowhere.jsonl is not a file"),
        (section(good, tokenizer=str(tmp_path / "empty")), 'cannot be loaded; allowed: "bytes"'),
        (section(good, valid_fraction=1.5), "data.valid_fraction = 1.5: between 0 and 1 is allowed"),
        (section(good, valid_tokens=0), "data.valid_tokens = 0: 1 or more is allowed"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError) as caught:
            prepare(wrong, 10, cache)
        text = str(caught.value)
        assert message in text and "\n" not in text and "data." in text, text
        key = (
            "tokenizer" if "cannot be loaded" in message else "source" if "data." not in message else "valid"
        )
        assert f"data.{key}" in text
    assert not cache.exists() or not list(cache.iterdir())  # nothing half written
    assert prepare(section(good), 10, cache).info["documents"] == 20  # control


def test_tokenizer_without_end_mark_is_refused(tmp_path, cache, bpe_folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json")).save_pretrained(
        str(tmp_path / "no_eos")
    )
    with pytest.raises(ValueError, match=r"data\.tokenizer = .*no_eos' has no eos_token"):
        prepare(
            section(write_folder(tmp_path / "a", texts(20)), tokenizer=str(tmp_path / "no_eos")), 0, cache
        )


# ------------------------------------------------------------ tokenizers


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_byte_tokenizer_round_trips(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text.replace("\0", "")) + [0]) == text.replace("\0", "")


def test_saved_byte_tokenizer_is_the_same_tokenizer_for_transformers(tmp_path):
    from transformers import AutoTokenizer

    ByteTokenizer().save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    everything = "".join(map(chr, range(0x250))) + "Āā Ġ 語 🙂 <|endoftext|> \t\n  two  spaces \r\n"
    assert saved(everything)["input_ids"] == list(everything.encode())
    assert saved.decode(saved(everything)["input_ids"]) == everything
    assert len(saved) == saved.vocab_size == 256 and saved.eos_token_id == 0
    assert saved.decode([*b"end", 0], skip_special_tokens=True) == "end"
    assert [saved.convert_tokens_to_ids(saved.convert_ids_to_tokens(byte)) for byte in range(256)] == list(
        range(256)
    )


def test_bytes_of_tokens_sum_to_the_utf8_length_of_the_document(bpe_folder):
    tokenizer = HFTokenizer(str(bpe_folder))
    for text in [*texts(5), "語語🙂🙂é", "a", "<eos> is text here", "  leading\n\n", "\u0301e\u0301 🏳️‍🌈"]:
        ids, widths = tokenizer.encode_with_bytes(text)
        assert int(widths.sum()) == len(text.encode()) and len(ids) == len(widths) > 0
        assert tokenizer.eos_token_id not in ids and tokenizer.encode(text) == list(ids)
        assert tokenizer.decode(ids) == text  # and the stored truncation cut nothing
    ids, widths = tokenizer.encode_with_bytes("aé🙂")  # one character of several tokens counts once
    assert len(ids) > 3 and sorted(widths[widths > 0]) == [1, 2, 4]
    # control: counting characters, or re-encoding what tokens decode to, gives another sum
    _, spans = (
        (encoding := tokenizer.backend().encode("aé🙂", add_special_tokens=False)).ids,
        encoding.offsets,
    )
    assert sum(end - start for start, end in spans) != len("aé🙂".encode())


def test_bytes_count_what_a_tokenizer_passes_over(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "über": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        str(tmp_path)
    )
    ids, widths = HFTokenizer(str(tmp_path)).encode_with_bytes(" über  b 語 \n")
    assert ids.tolist() == [2, 3, 1] and widths.tolist() == [6, 3, 6]


def test_bpe_corpus_marks_documents_and_counts_the_same_bytes_as_the_byte_corpus(tmp_path, cache, bpe_folder):
    source = write_folder(tmp_path / "a", texts(60))
    plain, bpe = (
        prepare(section(source), 0, cache),
        prepare(section(source, tokenizer=str(bpe_folder)), 0, cache),
    )
    assert (
        bpe.valid_bytes.sum()
        == plain.valid_bytes.sum()
        == plain.info["valid_bytes"]
        == bpe.info["valid_bytes"]
    )
    assert (bpe.train == bpe.tokenizer.eos_token_id).sum() == bpe.info["train_documents"]
    assert len(bpe.train) < len(plain.train)
    train, _ = split_of(plain)
    assert bpe.tokenizer.decode(bpe.train) == "".join(train)
    assert (bpe.valid_bytes[bpe.valid == bpe.tokenizer.eos_token_id] == 0).all()
    assert bpe.info["text_hash"] == plain.info["text_hash"] and bpe.info["sha256"] != plain.info["sha256"]


# ------------------------------------------------------------ cache


def built(heard: list[str]) -> bool:
    return any(text.startswith("reading") for text in heard)


def test_cache_is_used_again_and_rebuilt_when_its_source_changes(tmp_path, cache):
    source = write_folder(tmp_path / "a", texts(30))
    first, again, changed = [], [], []
    prepare(section(source), 0, cache, first.append)
    prepare(section(source, seed=5, batch_size=9), 0, cache, again.append)
    assert built(first) and not again
    (source / "0000.txt").write_text("something else entirely")
    train, valid = split_of(prepare(section(source), 0, cache, changed.append))
    assert built(changed) and "something else entirely" in train + valid


@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "valid_bytes.bin", "info.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_cache_is_noticed_and_rebuilt(tmp_path, cache, name, damage):
    source = write_folder(tmp_path / "a", texts(30))
    whole = prepare(section(source), 0, cache)
    expected, info = whole.train.copy(), whole.info
    (path,) = cache.glob(f"*/{name}")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        wrong = content[:-2] if damage == "truncated" else content[:40] + b"\x07" + content[41:]
        path.write_bytes(wrong)
    heard: list[str] = []
    corpus = prepare(section(source), 0, cache, heard.append)
    assert "damaged" in heard[0] and built(heard)
    assert np.array_equal(corpus.train, expected) and corpus.info == info and path.read_bytes() == content
    assert [each.name for each in cache.iterdir()] == [path.parent.name]


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFORMER_CACHE", str(tmp_path / "elsewhere"))
    prepare(section(write_folder(tmp_path / "a", texts(30))), 0)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_unusable_cache_folder_is_named_in_one_line(tmp_path, cache, monkeypatch):
    source = write_folder(tmp_path / "a", texts(30))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ValueError, match=r"^cache folder .*file cannot be used \(.*TOKENFORMER_CACHE names another$"
    ):
        prepare(section(source), 0, tmp_path / "file")
    if os.geteuid():  # root writes where it likes
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match=r"cache folder .*locked cannot be used \(Permission denied\)"):
            prepare(section(source), 0, tmp_path / "locked")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(data.np, "append", full)  # stands where tokens are written
        with pytest.raises(ValueError, match=r"cannot be used \(No space left on device\)"):
            prepare(section(source), 0, cache)
    assert not list(cache.iterdir())  # nothing half written
    prepare(section(source), 0, cache)
    monkeypatch.setattr(Path, "mkdir", full)  # a complete cache needs no writing
    prepare(section(source), 0, cache)


def test_interrupted_build_leaves_nothing(tmp_path, cache):
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(section(write_folder(tmp_path / "a", texts(30))), 0, cache, interrupt)
    assert not list(cache.iterdir())


def test_processes_that_build_at_once_end_with_one_good_cache(tmp_path, cache):
    source = write_folder(tmp_path / "a", texts(30))
    inner: list[data.Corpus] = []

    def meanwhile(text: str) -> None:
        if text.startswith("reading") and not inner:
            inner.append(prepare(section(source), 0, cache))

    outer = prepare(section(source), 0, cache, meanwhile)
    assert np.array_equal(outer.train, inner[0].train) and outer.info == inner[0].info
    assert len(list(cache.iterdir())) == 1


# ------------------------------------------------------------ batches


def tokens_file(folder: Path, count: int) -> np.memmap:
    np.arange(count, dtype=np.uint32).tofile(folder / "tokens.bin")
    return np.memmap(folder / "tokens.bin", np.uint32, "r")


def test_batches_are_the_same_with_any_number_of_workers_and_after_any_resumption(tmp_path):
    batches = Batches(tokens_file(tmp_path, 1000), 16, 4, seed=3, repeat=True)
    expected = [batches[step] for step in range(40)]  # more than two epochs
    assert expected[0].shape == (4, 17) and expected[0].dtype == torch.int64
    for workers in (0, 2):
        loader = DataLoader(batches, batch_size=None, sampler=range(11, 40), num_workers=workers)
        for step, batch in enumerate(loader, start=11):
            assert torch.equal(batch, expected[step])
    fresh = Batches(np.arange(1000), 16, 4, seed=3, repeat=True)
    assert all(torch.equal(fresh[step], expected[step]) for step in (39, 0, 17))
    # control: another seed deals in another order, and an epoch in another order than the one before
    assert not torch.equal(Batches(np.arange(1000), 16, 4, seed=4)[0], expected[0])
    assert not np.array_equal(batches.order(0), batches.order(1))


def test_order_of_batches_is_pinned():
    starts = Batches(np.arange(1000), 16, 8, seed=0)[0][:, 0] // 16
    assert starts.tolist() == [37, 10, 58, 2, 25, 22, 52, 18]


def test_an_epoch_deals_out_every_window_once(tmp_path):
    batches = Batches(tokens_file(tmp_path, 16 * 60 + 5), 16, 7, seed=1, repeat=True)
    dealt = torch.cat([batches[step] for step in range(18)])[:, 0] // 16
    assert sorted(dealt[:60].tolist()) == sorted(dealt[60:120].tolist()) == list(range(60))
    assert all(torch.equal(row, torch.arange(17) + row[0]) for row in batches[3])
    assert len(batches) == 8


def test_seeing_a_token_twice_is_an_error_unless_asked_for(tmp_path):
    tokens = tokens_file(tmp_path, 1000)  # 62 windows, 15 batches
    once, again = Batches(tokens, 16, 4, seed=0), Batches(tokens, 16, 4, seed=0, repeat=True)
    seen = torch.cat([once[step][:, 1:].flatten() for step in range(15)])
    assert len(once) == 15 and len(seen) == len(set(seen.tolist())) == once.unique_tokens(15)
    message = (
        r"16 steps ask for 1,024 training tokens; the corpus holds 1,000 \(15 steps\).*data\.repeat = true"
    )
    for attempt in (lambda: once[15], lambda: once.require(16)):
        with pytest.raises(ValueError, match=message):
            attempt()
    once.require(15)
    again.require(10**6)
    assert torch.equal(again[14], once[14]) and again[15].shape == (4, 17)  # control
    assert once.epochs(15) == 60 / 62 and again.epochs(31) == 2.0
    seen = torch.cat([again[step][:, 1:].flatten() for step in range(31)])
    assert len(set(seen.tolist())) == again.unique_tokens(31) == 62 * 16 < len(seen)


def test_batches_refuse_a_corpus_shorter_than_a_window_and_a_bad_seed():
    with pytest.raises(
        ValueError, match=r"data\.sequence_length = 16 needs 17 training tokens; the corpus holds 16"
    ):
        Batches(np.arange(16), 16, 1, seed=0)
    assert len(Batches(np.arange(17), 16, 1, seed=0)) == 1
    with pytest.raises(ValueError, match=r"data\.seed = -1"):
        Batches(np.arange(100), 16, 1, seed=-1)


def test_a_worker_is_sent_the_name_of_the_token_file_not_the_tokens(tmp_path):
    tokens = tokens_file(tmp_path, 100_000)
    batches = Batches(tokens, 16, 4, seed=0)
    sent = pickle.dumps(batches)
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent)[5], batches[5])
    part = Batches(tokens[:50_000], 16, 4, seed=0)  # control: a part of a file is sent whole
    assert len(pickle.dumps(part)) > 100_000 and torch.equal(pickle.loads(pickle.dumps(part))[5], part[5])


# ------------------------------------------------------------ held-out windows


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_eval_windows_predict_every_held_out_token_once_with_its_bytes(
    tmp_path, cache, bpe_folder, tokenizer
):
    name = str(bpe_folder) if tokenizer == "bpe" else "bytes"
    corpus = prepare(section(write_folder(tmp_path / "a", texts(60)), tokenizer=name), 0, cache)
    tokens, text_bytes = eval_windows(corpus, 16)
    count = len(corpus.valid) // 16 * 16
    assert (
        tokens.shape == text_bytes.shape == (count // 16, 17)
        and tokens.dtype == text_bytes.dtype == torch.int64
    )
    assert tokens[:, 1:].flatten().tolist() == corpus.valid[:count].tolist()
    assert text_bytes[:, 1:].sum() == corpus.valid_bytes[:count].sum()
    assert tokens[0, 0] == corpus.tokenizer.eos_token_id and torch.equal(tokens[1:, 0], tokens[:-1, -1])
    text = corpus.tokenizer.decode(corpus.valid)
    assert corpus.valid_bytes.sum() == len(text.encode())


def test_eval_windows_refuse_a_window_longer_than_what_is_held_out(tmp_path, cache):
    corpus = prepare(section(write_folder(tmp_path / "a", texts(60)), valid_tokens=50), 0, cache)
    with pytest.raises(ValueError, match=r"data\.sequence_length = 51 is more than the 50 held-out tokens"):
        eval_windows(corpus, 51)
    assert eval_windows(corpus, 50)[0].shape == (1, 51)
