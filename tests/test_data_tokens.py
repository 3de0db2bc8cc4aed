"""Documents -> tokens -> batches: what tokens stand for, what the cache keeps, what is dealt out and what repeats."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import section, split_of, texts, write_folder
from torch.utils.data import DataLoader

from tokenformer.data import Batches, ByteTokenizer, Corpus, HFTokenizer, eval_windows, prepare, text_windows


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


# ------------------------------------------------------------ tokenizers


def test_tokenizer_without_end_mark_is_refused(tmp_path, cache, bpe_folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(bpe_folder / "tokenizer.json")).save_pretrained(str(tmp_path / "no_eos"))
    with pytest.raises(ValueError, match=r"data\.tokenizer = .*no_eos' has no eos_token"):
        prepare(section(write_folder(tmp_path / "a", texts(20)), tokenizer=str(tmp_path / "no_eos")), 0, cache)


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
    assert [saved.convert_tokens_to_ids(saved.convert_ids_to_tokens(byte)) for byte in range(256)] == list(range(256))


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
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(str(tmp_path))
    ids, widths = HFTokenizer(str(tmp_path)).encode_with_bytes(" über  b 語 \n")
    assert ids.tolist() == [2, 3, 1] and widths.tolist() == [6, 3, 6]


def test_bpe_corpus_marks_documents_and_counts_the_same_bytes_as_the_byte_corpus(tmp_path, cache, bpe_folder):
    source = write_folder(tmp_path / "a", texts(60))
    plain, bpe = (
        prepare(section(source), 0, cache),
        prepare(section(source, tokenizer=str(bpe_folder)), 0, cache),
    )
    assert bpe.valid_bytes.sum() == plain.valid_bytes.sum() == plain.info["valid_bytes"] == bpe.info["valid_bytes"]
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
    with pytest.raises(ValueError, match=r"^cache folder .*file cannot be used \(.*TOKENFORMER_CACHE names another$"):
        prepare(section(source), 0, tmp_path / "file")
    if os.geteuid():  # root writes where it likes
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match=r"cache folder .*locked cannot be used \(Permission denied\)"):
            prepare(section(source), 0, tmp_path / "locked")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "append", full)  # stands where tokens are written
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
    inner: list[Corpus] = []

    def meanwhile(text: str) -> None:
        if text.startswith("reading") and not inner:
            inner.append(prepare(section(source), 0, cache))

    outer = prepare(section(source), 0, cache, meanwhile)
    assert np.array_equal(outer.train, inner[0].train) and outer.info == inner[0].info
    assert len(list(cache.iterdir())) == 1


def test_work_folders_of_killed_builds_are_removed_after_a_day(tmp_path, cache):
    def left(name: str, folder_hours: float, file_hours: float) -> str:
        (cache / name).mkdir(parents=True)
        (cache / name / "train.bin").write_text("half")
        for path, hours in ((cache / name / "train.bin", file_hours), (cache / name, folder_hours)):
            os.utime(path, (time.time() - hours * 3600,) * 2)
        return name

    left(f".{'a' * 20}-{'0' * 32}", 25, 25)
    kept = {
        left(f".{'a' * 20}-{'1' * 32}", 23, 23),
        left(f".{'a' * 20}-{'2' * 32}", 48, 1),  # a long build, still writing
        left("a" * 20, 48, 48),  # a complete cache
        left(".someone-elses", 48, 48),
    }
    prepare(section(write_folder(tmp_path / "a", texts(30))), 0, cache)
    found = {path.name for path in cache.iterdir()}
    assert kept < found and len(found) == len(kept) + 1  # and the corpus that was built
    # control: opening a cache that is complete removes nothing
    old = left(f".{'a' * 20}-{'0' * 32}", 25, 25)
    prepare(section(tmp_path / "a"), 0, cache)
    assert (cache / old).exists()


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
    message = r"16 steps ask for 1,024 training tokens; the corpus holds 1,000 \(15 steps\).*data\.repeat = true"
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
    with pytest.raises(ValueError, match=r"data\.sequence_length = 16 needs 17 training tokens; the corpus holds 16"):
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
def test_eval_windows_predict_every_held_out_token_once_with_its_bytes(tmp_path, cache, bpe_folder, tokenizer):
    name = str(bpe_folder) if tokenizer == "bpe" else "bytes"
    corpus = prepare(section(write_folder(tmp_path / "a", texts(60)), tokenizer=name), 0, cache)
    tokens, text_bytes = eval_windows(corpus, 16)
    count = len(corpus.valid) // 16 * 16
    assert tokens.shape == text_bytes.shape == (count // 16, 17) and tokens.dtype == text_bytes.dtype == torch.int64
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


def test_text_windows_hold_every_token_of_files_and_folders_once_with_its_bytes(tmp_path):
    documents = texts(6)
    folder = write_folder(tmp_path / "a", documents[:4])
    for name, text in zip(("one", "two"), documents[4:], strict=True):
        (tmp_path / name).write_text(f"\0{text}", encoding="utf-8")
    paths = [str(tmp_path / "two"), str(folder), str(tmp_path / "one")]
    stream = b"".join(text.encode() + b"\0" for text in [documents[5], *documents[:4], documents[4]])
    divisor = next(length for length in range(2, len(stream)) if len(stream) % length == 0)
    for length in (1, 7, divisor, len(stream) - 1, len(stream), len(stream) + 1, 10**6):
        parts = text_windows(paths, ByteTokenizer(), length)
        assert b"".join(bytes(tokens[:, 1:].flatten().tolist()) for tokens, _ in parts) == stream
        contexts = bytes(token for tokens, _ in parts for token in tokens[:, 0].tolist())
        assert contexts == (b"\0" + stream[:-1])[:: length]
        assert all(torch.equal(sizes[:, 1:], (tokens[:, 1:] != 0).long()) for tokens, sizes in parts)
        assert len(parts) == (1 if length > len(stream) or len(stream) % length == 0 else 2)
    # the control: held-out windows, which are all of one length, leave the rest out
    ids = np.frombuffer(stream, np.uint8)
    held_out = eval_windows(Corpus(ids[:0], ids, (ids != 0).astype(np.uint32), ByteTokenizer(), {}), len(ids) - 1)
    assert held_out[0][:, 1:].numel() == len(stream) - 1
    (tmp_path / "blank").write_text("\0")
    with pytest.raises(ValueError, match="blank: holds no text"):
        text_windows([str(tmp_path / "blank")], ByteTokenizer(), 7)


def test_a_file_that_text_windows_cannot_read_is_named_and_no_recipe_key_is_blamed(tmp_path):
    write_folder(tmp_path / "a", texts(2))
    assert text_windows([str(tmp_path / "a")], ByteTokenizer(), 7)
    (tmp_path / "a" / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.gz").write_bytes(b"not gzip")
    for path, message in (
        ("nowhere", "nowhere: no such file or folder"),
        ("a/binary", "binary: is not UTF-8 text"),
        ("a", "binary: is not UTF-8 text"),
        ("broken.gz", "broken.gz cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"^--text.*{message}") as caught:
            text_windows([str(tmp_path / path)], ByteTokenizer(), 7)
        assert "data." not in str(caught.value)
