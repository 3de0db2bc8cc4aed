"""Pattention against its published formulas, and its fast path against the plain one."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tokenformer import pattention as module
from tokenformer.pattention import (
    THETAS,
    WITHOUT_NORM,
    Pattention,
    default_scale,
    pattention,
    pattention_reference,
    side_by_side,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SHAPES = [((1,), 1, 7, 1), ((7,), 16, 63, 5), ((3, 1, 5), 7, 1, 7), ((2, 150), 16, 63, 8), ((0,), 4, 8, 4)]


def published(x, key, value, theta):
    """The paper's formulas as its release computes them: the scale from the row count, no epsilon; and without norm."""
    n = key.shape[0]
    s = x @ key.T
    if theta == "l2_norm_gelu":
        weights = F.gelu(s / s.norm(p=2, dim=-1, keepdim=True) * math.sqrt(n))
    elif theta in WITHOUT_NORM:
        functions = {"gelu": F.gelu, "silu": lambda s: s / (1 + torch.exp(-s)), "relu2": lambda s: s.clamp(min=0) ** 2}
        weights = functions[theta](s)
    elif theta == "gelu_l2_norm":
        a = F.gelu(s)
        weights = a / a.norm(p=2, dim=-1, keepdim=True) * math.sqrt(n)
    else:
        e = torch.exp(s)
        weights = e / e.norm(p=1, dim=-1, keepdim=True) * n
    return weights @ value


def tensors(lead, width, tokens, out, gated=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*lead, width), (tokens, width), (tokens, out)] + ([(tokens, width)] if gated else [])
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return made if gated else [*made, None]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("theta", THETAS)
def test_reference_equals_the_published_formula(theta):
    x, key, value, _ = tensors((5,), 16, 63, 7)
    ours = pattention_reference(x, key, value, default_scale(theta, 63), theta, eps=0.0)
    assert relative(ours, published(x, key, value, theta)) < 1e-12
    other = pattention_reference(x, key, value, 1.1 * default_scale(theta, 63), theta, eps=0.0)
    assert relative(other, published(x, key, value, theta)) > 1e-3  # the control: another scale is another function


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("gated", [False, True])
def test_fast_path_equals_reference_in_values_and_gradients(theta, gated, dtype, monkeypatch):
    for (lead, width, tokens, out), entries in itertools.product(SHAPES, (1, 2**19)):
        monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)
        monkeypatch.setattr(module, "CHUNK_ROWS", 128)
        x, key, value, up = tensors(lead, width, tokens, out, gated, dtype)
        inputs = [t for t in (x, key, value, up) if t is not None]
        scale = 1.3 * default_scale(theta, tokens)
        fast = pattention(x, key, value, scale, theta, up=up)
        slow = pattention_reference(x, key, value, scale, theta, up=up)
        assert fast.shape == slow.shape == (*lead, out)
        torch.testing.assert_close(fast, slow, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        dy = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got, wanted = torch.autograd.grad(fast, inputs, dy), torch.autograd.grad(slow, inputs, dy)
        size = max(1.0, *(w.abs().max().item() for w in wanted if w.numel()))
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("scales", [(5.0, 5.0, 5.0), (5.0, 6.0, 5.0)])  # of one form, and not
def test_layers_side_by_side_equal_the_reference_of_each(scales, theta, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 128)
    torch.manual_seed(0)
    for entries in (1, 2**19):
        monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)
        x = tensors((2, 150), 16, 63, 8, dtype=dtype)[0]
        forms = zip((8, 8, 4), scales, strict=True)
        layers = [Pattention(16, out, 63, theta=theta, scale=scale, key_std=0.3) for out, scale in forms]
        inputs = [x, *(p for layer in layers for p in layer.to(dtype).parameters())]
        fast = side_by_side(layers, x)
        slow = [pattention_reference(x, layer.key, layer.value, layer.scale, theta) for layer in layers]
        shared = {y.grad_fn.next_functions[0][0] for y in fast}
        assert len(shared) == (1 if len(set(scales)) == 1 else 3)
        dys = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for y in fast]
        got, wanted = torch.autograd.grad(fast, inputs, dys), torch.autograd.grad(slow, inputs, dys)
        for a, b in zip((*fast, *got), (*slow, *wanted), strict=True):
            size = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


def test_a_hooked_layer_is_called_for_itself():
    torch.manual_seed(0)
    layers, seen = [Pattention(16, 8, 7) for _ in range(3)], []
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    plain = side_by_side(layers, x)
    layers[1].register_forward_hook(lambda layer, inputs, y: seen.append(y) or 2 * y)
    hooked = side_by_side(layers, x)
    assert len(seen) == 1
    torch.testing.assert_close(hooked[1], 2 * plain[1])
    torch.testing.assert_close(hooked[0], plain[0])


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("gated", [False, True])
def test_without_gradients_the_values_are_the_same_to_the_bit(theta, gated):
    x, key, value, up = tensors((40,), 16, 63, 8, gated, torch.float32)
    kept = pattention(x, key, value, 5.0, theta, up=up)
    with torch.no_grad():
        assert torch.equal(pattention(x, key, value, 5.0, theta, up=up), kept)


@pytest.mark.parametrize("entries", [1, 2**19])
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_is_as_close_to_float64_as_the_plain_formula(theta, gated, entries, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ENTRIES", entries)  # 1: sixteen pieces
    monkeypatch.setattr(module, "CHUNK_ROWS", 128)
    exact = [None if t is None else t.double() for t in tensors((2048,), 16, 63, 8, gated, torch.bfloat16)]
    leaves = [None if t is None else t.detach().bfloat16().requires_grad_() for t in exact]
    exact = [None if t is None else t.detach().requires_grad_() for t in exact]
    scale = default_scale(theta, 63)

    def run(function, inputs):
        x, key, value, up = inputs
        y = function(x, key, value, scale, theta, up=up)
        return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], torch.ones_like(y))]

    truth, fast, slow = run(pattention_reference, exact), run(pattention, leaves), run(pattention_reference, leaves)
    for t, f, s in zip(truth, fast, slow, strict=True):
        assert relative(f, t) < max(2 * relative(s, t), 0.006)
    assert relative(fast[0] * 1.05, truth[0]) > max(2 * relative(slow[0], truth[0]), 0.006)


@pytest.mark.parametrize("theta", THETAS)
def test_gradients_pass_gradcheck(theta):
    inputs = tensors((3,), 4, 5, 2, gated=True)
    assert torch.autograd.gradcheck(lambda x, k, v, u: pattention(x, k, v, 1.7, theta, up=u), inputs)


def test_only_asked_for_gradients_are_made():
    x, key, value, up = tensors((4,), 6, 9, 3, gated=True)
    wanted = torch.autograd.grad(pattention_reference(x, key, value, 3.0, up=up).sum(), [x, key, value, up])
    for asked in itertools.product([False, True], repeat=4):
        if any(asked):
            inputs = [t.detach().requires_grad_(on) for t, on in zip((x, key, value, up), asked, strict=True)]
            pattention(*inputs[:3], 3.0, up=inputs[3]).sum().backward()
            for t, on, gradient in zip(inputs, asked, wanted, strict=True):
                assert (t.grad is not None) == on
                if on:
                    torch.testing.assert_close(t.grad, gradient)


def test_no_uninitialised_memory_is_read():
    torch.use_deterministic_algorithms(True)  # fills every new buffer with NaN
    try:
        assert torch.isnan(torch.empty(3)).all()
        for gated in (False, True):
            x, key, value, up = tensors((300,), 16, 63, 8, gated)
            pattention(x, key, value, 2.0, up=up).sum().backward()
            assert all(torch.isfinite(t.grad).all() for t in (x, key, value))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm"])
def test_an_all_zero_row_gives_zero_and_finite_gradients(theta):
    x, key, value, _ = tensors((3,), 4, 6, 2)
    x = torch.zeros_like(x).requires_grad_()
    y = pattention(x, key, value, math.sqrt(6), theta)
    y.sum().backward()
    assert (y == 0).all() and torch.isfinite(x.grad).all() and torch.isfinite(key.grad).all()
    assert torch.isnan(published(x, key, value, theta)).all()  # the control: the published form has no epsilon


def saved_bytes(function, parameters):
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if not any(storage.data_ptr() == p.untyped_storage().data_ptr() for p in parameters):
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("theta", THETAS)
def test_less_is_saved_for_backward_than_by_the_plain_formulation(theta):
    x, key, value, _ = tensors((64,), 16, 63, 8, dtype=torch.float32)
    fast = saved_bytes(lambda: pattention(x, key, value, 7.0, theta), [x, key, value])
    plain = saved_bytes(lambda: published(x, key, value, theta), [x, key, value])
    assert fast <= 0.6 * plain
    assert fast == 64 * (63 + 1) * 4  # one number for each score and one for each row


def test_the_scale_is_stored_not_derived():
    layer = Pattention(4, 4, tokens=9, scale=2.5)
    again = Pattention(4, 4, tokens=9)
    assert again.scale == 3.0  # the control: without the stored number the scale is another
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4)
    assert again.scale == 2.5 and torch.equal(again(x), layer(x))
    assert layer.bfloat16().scale == 2.5


def test_autocast_works_in_the_lower_precision():
    layer, x = Pattention(8, 8, 16, gated=True), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.key.grad.dtype == torch.float32
    assert relative(y, layer(x)) < 0.05


def test_compiles_without_graph_breaks():
    layer = Pattention(8, 8, 16)
    x = torch.randn(5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": "relu", "scale": 1.0}, "theta: 'relu' is not known; allowed: l2_norm_gelu, gelu_l2_norm, softmax"),
        ({"tokens": 0}, "tokens: 0 is too small"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pattention(**({"in_features": 4, "out_features": 4, "tokens": 4} | arguments))
