"""What the fact sheet of TokenFormer asks of an implementation, held against the layer and the model.

The reference is not this code: invariances of the published formula, counts by hand, and the factor 1.527525 of the
authors' own growth step from 768 to 1792 parameter tokens. Legend: B rows, P parameter tokens, C widths.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenformer.growth import grow
from tokenformer.models import build_config, build_model
from tokenformer.models.tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.pattention import default_scale, pattention, pattention_reference

PATHS = {"reference": pattention_reference, "fast": pattention}
THETAS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]
each_path = pytest.mark.parametrize("path", PATHS)


def tables(tokens, width, rows=5, dtype=torch.float64):
    """x (B, C), key (P, C), value (P, C)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator, dtype=dtype) for n in (rows, tokens, tokens)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class _Arguments(TorchDispatchMode):
    """Copies of every tensor that any form of GELU is applied to, however the layer is written."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.gelu, torch.ops.aten.gelu_):
            self.seen.append(args[0].detach().clone())
        return function(*args, **(kwargs or {}))


@contextmanager
def gelu_arguments():
    with torch.no_grad(), _Arguments() as mode:
        yield mode.seen


@each_path
@pytest.mark.parametrize("theta", THETAS)
def test_theta_of_7a_is_theta_of_a_where_the_norm_comes_first(theta, path):
    x, key, value = tables(63, 16)
    scale = default_scale(theta, 63)
    y, scaled = (PATHS[path](factor * x, key, value, scale, theta, eps=0.0) for factor in (1, 7))
    if theta == "l2_norm_gelu":
        assert relative(scaled, y) < 1e-10
    else:
        assert relative(scaled, y) > 1e-2  # the control: the other two are not free of the scores' size
    if theta == "l2_norm_gelu":  # the control: only without an eps
        y, scaled = (PATHS[path](factor * x, key, value, scale, theta, eps=1.0) for factor in (1, 7))
        assert relative(scaled, y) > 1e-2


@each_path
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_gelus_argument_has_mean_square_one_over_the_parameter_tokens(tokens, path):
    x, key, value = tables(tokens, 16)
    for scale, expected in ((math.sqrt(tokens), 1.0), (2 * math.sqrt(tokens), 4.0)):  # the second is the control
        with gelu_arguments() as seen:
            PATHS[path](x, key, value, scale, "l2_norm_gelu", eps=0.0)
        assert [z.shape for z in seen] == [(5, tokens)]
        assert (seen[0].square().mean(-1) - expected).abs().max() < 1e-10


@each_path
def test_the_keys_gradient_is_orthogonal_to_the_keys(path):
    def cosine(theta, eps, table):
        x, *pair = tables(63, 16)
        key, value = (t.requires_grad_() for t in pair)
        PATHS[path](x, key, value, default_scale(theta, 63), theta, eps).square().sum().backward()
        t = {"key": key, "value": value}[table]
        return (t.detach() * t.grad).sum().abs().item() / (t.detach().norm() * t.grad.norm()).item()

    assert cosine("l2_norm_gelu", 0.0, "key") < 1e-10
    controls = [("l2_norm_gelu", 1.0, "key"), ("l2_norm_gelu", 0.0, "value"), ("gelu_l2_norm", 0.0, "key")]
    assert min(cosine(*control) for control in controls) > 1e-4


@pytest.mark.parametrize(
    ("qkv", "ffn", "millions"), [(576, 2304, 123.6), (2140, 8560, 354.2), (4850, 19400, 753.8), (8620, 34480, 1310)]
)
def test_the_published_series_of_sizes_has_its_parameter_counts(qkv, ffn, millions):
    """Non-embedding L (8 n_attn d + 2 n_ffn d); 12 L d² for 576 and 2304 tokens, a GPT block's count."""
    layers, d = 12, 768
    with torch.device("meta"):
        models = [
            TokenFormerForCausalLM(TokenFormerConfig.preset("150m", **sizes))
            for sizes in ({"qkv_tokens": qkv, "proj_tokens": qkv, "ffn_tokens": ffn}, {})
        ]
    blocks, usual = (sum(p.numel() for p in m.model.layers.parameters()) for m in models)
    assert blocks == layers * (8 * qkv * d + 2 * ffn * d) and usual == 16 * layers * d**2
    assert (blocks == 12 * layers * d**2) == ((qkv, ffn) == (0.75 * d, 3 * d))  # the larger sizes are the control
    assert sum(p.numel() for p in models[0].parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(("operator", "factor"), [("published", 1.527525), ("zero_keys", 1.0)])
def test_growing_768_to_1792_under_a_recomputed_scale_multiplies_gelus_arguments(operator, factor):
    """The authors' step, with the new keys at zero as the paper has it: old arguments grow by root(1792 / 768). Under
    the stored scale, the control, they stay."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_tokens": 768}
    model = build_model(build_config("tokenformer", fields=sizes | {"pattention_eps": 0.0}), seed=0).double()
    grown = grow(model, operator, {"ffn": 1792}).model
    with torch.no_grad():
        for layer in grown.model.layers:
            layer.mlp.key[768:] = 0
    x, arguments, outputs = torch.randn(5, 32, dtype=torch.float64), [], []
    for m in (model, grown):
        with gelu_arguments() as seen:
            outputs.append(m.model.layers[0].mlp(x))
        arguments.append(seen[0])
    torch.testing.assert_close(arguments[1][:, :768], factor * arguments[0], rtol=1e-6, atol=0)
    assert (arguments[1][:, 768:] == 0).all()
    moved = relative(outputs[1], outputs[0])
    assert moved < 1e-10 if operator == "zero_keys" else moved > 0.1


@each_path
@pytest.mark.parametrize("theta", THETAS)
def test_tiling_by_two_with_the_values_split_leaves_the_output_in_float32(theta, path):
    x, key, value = tables(63, 16, dtype=torch.float32)
    y = PATHS[path](x, key, value, default_scale(theta, 63), theta)
    tiled = key.repeat(2, 1), torch.cat([0.3 * value, 0.7 * value])
    assert relative(PATHS[path](x, *tiled, default_scale(theta, 126), theta), y) < 1e-6
    assert relative(PATHS[path](x, *tiled, default_scale(theta, 63), theta), y) > 1e-2  # the control: the old scale


def test_a_grown_checkpoint_keeps_its_scale_and_holds_the_old_rows_in_front(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_tokens": 30}
    model = build_model(build_config("tokenformer", fields=sizes), seed=0)
    grow(model, "zero_keys", {"ffn": 50}).model.save_pretrained(tmp_path)
    again = TokenFormerForCausalLM.from_pretrained(tmp_path)
    assert again.config.ffn_scale == again.model.layers[0].mlp.scale == math.sqrt(30)
    assert again.model.layers[0].mlp.key.shape == (50, 32)
    for (name, old), new in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(new[: len(old)], old), name
    control = grow(model, "published", {"ffn": 50}).model
    assert control.config.ffn_scale == math.sqrt(50)
