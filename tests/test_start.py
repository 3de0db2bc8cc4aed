"""Where a run starts from: the text that ancestors saw is known again, and another tokenizer is refused."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tokenformer import start
from tokenformer.data import Batches, ByteTokenizer, HFTokenizer
from tokenformer.recipe import DataSection
from tokenformer.start import Start, first_token, require_same_tokenizer, stream_of, streams_with


def corpus_of(tokens: Any, sha256: str = "") -> Any:
    tokens = np.asarray(tokens, np.uint16)
    info = {"sha256": sha256 or hashlib.sha256(tokens.tobytes()).hexdigest()}
    return SimpleNamespace(train=tokens, info=info, tokenizer=ByteTokenizer())


def stream(sha256: str = "a", **changes: Any) -> dict[str, Any]:
    return stream_of(DataSection(**changes), corpus_of(range(1000), sha256))


def require_unseen(data: DataSection, ancestors: list[Any], mine: dict[str, Any], corpus: Any = None) -> None:
    start.require_unseen(data, ancestors, mine, corpus or corpus_of(range(1000)))


SEEN = {**stream(), "tokens": 512}


@pytest.mark.parametrize(
    ("sha256", "changes", "message"),
    [
        ("a", {}, "data.skip_tokens = 0: model.checkpoint has seen the first 512 tokens; set it to 512"),
        ("a", {"skip_tokens": 511}, "data.skip_tokens = 511"),
        ("a", {"skip_tokens": 512, "seed": 1}, "data.seed = 0, and here it is 1"),
        ("a", {"skip_tokens": 512, "sequence_length": 8}, "data.sequence_length = 256, and here it is 8"),
        ("a", {"skip_tokens": 512, "source": "moved.txt", "seed": 1}, "data.seed = 0, and here it is 1"),
        ("b", {"skip_tokens": 512}, "the text has changed, or is a streamed one of another length"),
        ("b", {"skip_tokens": 512, "valid_fraction": 0.01}, "data.valid_fraction = 0.02, and here it is 0.01"),
    ],
)
def test_text_that_was_seen_is_refused_unless_it_may_be_repeated(sha256: str, changes: Any, message: str) -> None:
    data = DataSection(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        require_unseen(data, [SEEN], stream(sha256, **changes))
    assert "\n" not in str(caught.value)
    data.repeat = True  # the control
    require_unseen(data, [SEEN], stream(sha256, **changes))


def test_text_past_what_was_seen_and_other_text_are_allowed() -> None:
    require_unseen(DataSection(skip_tokens=512), [SEEN], stream())
    require_unseen(DataSection(skip_tokens=512, source="moved.txt"), [SEEN], stream(source="moved.txt"))
    require_unseen(DataSection(source="other.txt"), [SEEN], stream("b", source="other.txt"))
    # Of local text, split and text_field say nothing.
    require_unseen(DataSection(skip_tokens=512, split="b"), [SEEN], stream(split="b"))


def test_a_stream_of_before_the_held_out_text_was_named_is_judged_as_ever() -> None:
    older = {key: value for key, value in SEEN.items() if key not in ("valid_source", "valid_tokens")}
    data = DataSection(skip_tokens=512, seed=1, valid_tokens=7)
    for seen in (SEEN, older):  # how much is evaluated says nothing of what was trained on
        with pytest.raises(ValueError, match="data.seed = 0, and here it is 1"):
            require_unseen(data, [seen], stream(seed=1, valid_tokens=7))
        require_unseen(DataSection(skip_tokens=512), [seen], stream())  # the control
    before = {**stream(valid_source="one.txt"), "tokens": 512}  # nor does which text of its own
    data = DataSection(skip_tokens=512, seed=1, valid_source="other.txt")
    with pytest.raises(ValueError, match="data.seed = 0, and here it is 1"):
        require_unseen(data, [before], stream(seed=1, valid_source="other.txt"))


def test_held_out_text_is_never_text_that_was_trained_on() -> None:
    data = DataSection(valid_fraction=0.05, repeat=True)
    with pytest.raises(ValueError, match="0.05 would hold out text that it was trained on"):
        require_unseen(data, [SEEN], stream("b", valid_fraction=0.05))
    require_unseen(DataSection(valid_fraction=0.01, repeat=True), [SEEN], stream("b", valid_fraction=0.01))


@pytest.mark.parametrize(
    ("tokens", "changes", "first", "message"),
    [
        (range(1500), {"skip_tokens": 1000}, 1000, None),
        (range(1500), {"skip_tokens": 1200, "seed": 1, "sequence_length": 8}, 1000, None),
        (range(1500), {"skip_tokens": 999}, 0, "data.skip_tokens = 1000 passes over it if it has only grown longer"),
        (range(1500), {"source": "moved.txt"}, 0, "data.skip_tokens = 1000 passes over it"),
        (range(900), {"skip_tokens": 512}, 0, "data.skip_tokens = 1000 passes over it"),
        ([1, *range(1, 1500)], {"skip_tokens": 1000}, 0, "the text has changed.* cannot be passed over"),
        (range(1, 1501), {"skip_tokens": 1000}, 0, "the text has changed.* cannot be passed over"),
        (range(1500), {"skip_tokens": 1000, "valid_fraction": 0.05}, 1000, "would hold out text that it was trained"),
    ],
)
def test_a_longer_stream_is_gone_on_with_past_all_of_the_shorter_one(
    tokens: Any, changes: Any, first: int, message: str | None
) -> None:
    """Tokens 0 to 999 are the ancestor's stream, of which it saw 512 in an order that the longer one does not have."""
    hub: Any = {"source": "hf:owner/name"}
    ancestor = {**stream_of(DataSection(**hub), corpus_of(range(1000))), "tokens": 512}
    data, corpus = DataSection(**hub | changes), corpus_of(tokens)
    assert first_token(data, [ancestor], corpus) == first
    mine = stream_of(data, corpus, first)
    if message is None:
        require_unseen(data, [ancestor], mine, corpus)
        batches = Batches(corpus.train, 8, 2, data.seed, skip_tokens=data.skip_tokens, first=first)
        assert torch.cat([batches[step] for step in range(len(batches))]).min() >= 1000
        assert 1400 < batches.unique_tokens(len(batches)) <= 1500
        assert batches.epochs(len(batches)) == pytest.approx(1, abs=0.02)
        # The control: without `first`, the windows past skip_tokens are of the order of the longer stream.
        other = Batches(corpus.train, 8, 2, data.seed, skip_tokens=data.skip_tokens)
        assert torch.cat([other[step] for step in range(len(other))]).min() < 1000
    else:
        with pytest.raises(ValueError, match=message):
            require_unseen(data, [ancestor], mine, corpus)


def test_all_ancestors_streams_are_kept() -> None:
    other = stream("b", source="other.txt")
    chain = streams_with(streams_with([SEEN], other, 64), stream(), 768)
    assert [(each["sha256"], each["tokens"]) for each in chain] == [("b", 64), ("a", 768)]
    with pytest.raises(ValueError, match="has seen the first 64 tokens"):  # X -> Y -> X
        require_unseen(DataSection(source="other.txt"), chain, other)
    with pytest.raises(ValueError, match="has seen the first 768 tokens"):
        require_unseen(DataSection(skip_tokens=512), chain, stream())


def test_another_tokenizer_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ByteTokenizer().save(tmp_path)
    mine = Start(str(tmp_path), {})
    require_same_tokenizer(mine, ByteTokenizer(), "bytes")  # the control
    require_same_tokenizer(mine, HFTokenizer(str(tmp_path)), str(tmp_path))
    (tmp_path / "none").mkdir()
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "words")
    other = HFTokenizer(str(tmp_path / "words"))
    with pytest.raises(ValueError, match=r"'words' is not that of model.checkpoint \(2 and 256 tokens"):
        require_same_tokenizer(mine, other, "words")
    require_same_tokenizer(Start(str(tmp_path / "none"), {}), other, "words")  # which has no tokenizer
