"""`tokenformer grow`: a checkpoint grown on the disk, measured, written whole or not at all."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenformer import checkpoint
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.cli import main
from tokenformer.data import ByteTokenizer
from tokenformer.growth import largest_logit_change
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, parameter_groups

FIELDS = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_tokens": 30}


@pytest.fixture
def small(tmp_path):
    model = build_model(build_config("tokenformer", fields=FIELDS), seed=0)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-2)
    ids = torch.randint(256, (2, 9))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return save_checkpoint(tmp_path / "small", model, ByteTokenizer(), optimizer, lineage=[{"operator": "earlier"}])


def test_weights_moments_tokenizer_and_lineage_are_written(small, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45,qkv=20", "--to", "proj=17"]) == 0
    said = capsys.readouterr().out
    assert "ffn_tokens 30 -> 45" in said and "promise: exact" in said and "logits moved by at most" in said
    (old, _), (new, lineage) = load_checkpoint(small), load_checkpoint(tmp_path / "grown")
    assert largest_logit_change(old, new, torch.randint(256, (2, 9))) < 1e-5
    assert [event["operator"] for event in lineage] == ["earlier", "zero_keys"]
    assert lineage[-1]["to"] == {"ffn_tokens": 45, "qkv_tokens": 20, "proj_tokens": 17}
    assert lineage[-1]["live_at_once"]["key"] == 1.0
    moments = [load_file(folder / checkpoint.OPTIMIZER) for folder in (small, tmp_path / "grown")]
    name = "exp_avg.model.layers.0.mlp.key"
    assert torch.equal(moments[1][name][:30], moments[0][name]) and (moments[1][name][30:] == 0).all()
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before


def spoil_weights(folder):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    tensors["model.layers.0.mlp.key"][3, 3] = float("nan")
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})


def cut_short(folder):
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shape(folder):
    config = json.loads((folder / "config.json").read_text()) | {"ffn_tokens": 31}
    (folder / "config.json").write_text(json.dumps(config))


def cut_moments(folder):
    path = folder / checkpoint.OPTIMIZER
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, ["--to", "ffn=29"], "to.ffn: 29 is smaller than the model's 30"),
        (None, ["--to", "ffn=50", "--operator", "tile"], "50 is not a multiple of the model's 30"),
        (None, ["--to", "fn=50"], "to.fn: tokenformer has no such axis"),
        (None, ["--to", "ffn=a"], "write AXIS=SIZE"),
        (None, ["--to", "ffn=999999999999"], "not enough memory"),
        (spoil_weights, ["--to", "ffn=45"], "model.layers.0.mlp.key holds NaN"),
        (cut_short, ["--to", "ffn=45"], "truncated or not a safetensors file"),
        (wrong_shape, ["--to", "ffn=45"], "has shape"),
        (cut_moments, ["--to", "ffn=45"], "optimizer.safetensors: truncated"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(spoil, arguments, message, small, tmp_path, capsys):
    if spoil:
        spoil(small)
    assert main(["grow", str(small), str(tmp_path / "grown"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush_to_disk", full)
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45"]) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_place_inside_the_source_is_refused(small, tmp_path, capsys):
    assert main(["grow", str(small), str(small / "grown"), "--to", "ffn=45"]) == 2
    assert "lies inside" in capsys.readouterr().err and not (small / "grown").exists()
    assert main(["grow", str(small), str(tmp_path / "small-grown"), "--to", "ffn=45"]) == 0  # the control


def test_an_existing_place_is_refused(small, tmp_path, capsys):
    (tmp_path / "grown").mkdir()
    assert main(["grow", str(small), str(tmp_path / "grown"), "--to", "ffn=45"]) == 2
    assert "already exists" in capsys.readouterr().err and not list((tmp_path / "grown").iterdir())
