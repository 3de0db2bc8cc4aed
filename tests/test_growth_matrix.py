"""Every operator on every architecture, the tests made from the declarations in OPERATORS and from the tables of axes.

What an operator may refuse, and why, is written down here by hand (REFUSALS); whatever is not, it has to grow. Every
comparison is in float64, on a batch whose second text is padded on its left.
"""

import copy
import re

import pytest
import torch
from architectures import (
    MODELS,
    batch,
    fields_of,
    gradients_of,
    layer_norm,
    logits_of,
    model_of,
    sizes_of,
    train,
    wide,
)

from tokenformer.growth import OPERATORS, duplicated_share, grow, live_share
from tokenformer.growth.operators import steps_of
from tokenformer.growth.tensors import TensorMaps
from tokenformer.models.axes import axis_sizes, size_of, table_of
from tokenformer.optim import AdamW

EXACT = 1e-10

# (operators, whether they must refuse a size of a field in a model, what they must say). A size is known by whether it
# is a whole multiple; axis is the one that the field stands for.
REFUSALS = [
    ("zero", lambda name, axis, whole: axis == "hidden" and layer_norm(name), "LayerNorm takes mean and variance"),
    ("zero", lambda name, axis, whole: axis == "hidden" and name == "ngpt", "unit vectors"),
    ("lemon", lambda name, axis, whole: axis == "hidden" and name == "ngpt" and not whole, "unit vectors"),
    (
        "net2wider fpi",
        lambda name, axis, whole: axis == "hidden" and name != "ngpt" and not whole,
        "counted more often than others by the norm",
    ),
    ("hyperclone", lambda name, axis, whole: not whole, "hyperclone tiles whole copies"),
    ("staged", lambda name, axis, whole: True, "doubles every width at once"),
    ("stack", lambda name, axis, whole: not whole, "stack repeats the whole"),
    ("solar", lambda name, axis, whole: not whole, "solar makes an even number of layers"),
    (
        "zero_keys tile published",
        lambda name, axis, whole: name == "tokenformer linear" and axis != "ffn_tokens",
        "projections are linear",
    ),
    ("zero_keys", lambda name, axis, whole: name == "tokenformer softmax", r"exp\(0\) = 1 takes weight"),
    ("tile", lambda name, axis, whole: not whole, "is not a multiple of the model's"),
]


def why_refused(operator, name, field, size):
    """The sentence that a refusal has to hold; None where the operator has to grow."""
    config = model_of(name).config
    axis = table_of(config).grows.get(field, "layers")
    whole = size % size_of(config, field) == 0
    said = [text for operators, refuses, text in REFUSALS if operator in operators.split() and refuses(name, axis, whole)]
    return said[0] if said else None


def start(operator, name):
    """The model that an operator starts from: of one layer for the jump, which takes no deeper one."""
    return model_of(name, layers=1) if operator == "jump" else model_of(name)


def everything(operator, name):
    """All that the operator grows in the model at once, in whole multiples."""
    model = start(operator, name)
    fields = [f for f in OPERATORS[operator].fields(table_of(model.config)) if f in fields_of(name)]
    if operator == "staged":
        heads = [f for f in fields if f == "num_attention_heads" and "num_key_value_heads" in fields]
        return {f: 2 * size_of(model.config, f) for f in fields if f not in heads}
    to = {f: sizes_of(name, f)[0] for f in fields if not why_refused(operator, name, f, sizes_of(name, f)[0])}
    if {"num_attention_heads", "num_key_value_heads"} <= set(to):
        to["num_attention_heads"] *= 2
    return to


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_size_is_grown_as_promised_or_refused_with_its_reason(operator, name):
    model, declared = start(operator, name), OPERATORS[operator]
    fields = declared.fields(table_of(model.config))
    if not fields:
        field = next(f for f in fields_of(name) if f not in fields)
        with pytest.raises(ValueError, match=f"to.{field}: {operator} does not grow it in {model.config.model_type}"):
            grow(model, operator, {field: 2 * size_of(model.config, field)})
    before, gradients = logits_of(model), None
    for field, size in [(field, size) for field in fields for size in sizes_of(name, field)]:
        reason = why_refused(operator, name, field, size)
        if reason:
            with pytest.raises(ValueError, match=reason) as error:
                grow(model, operator, {field: size})
            assert_others_can(one_line(error), model, before, field, size)
            continue
        growth = grow(model, operator, {field: size})
        assert growth.promise == ("exact" if declared.exact else "approximate")
        change = (logits_of(growth.model) - before).abs().max().item()
        if declared.exact:
            assert change <= EXACT, (field, size)
        else:  # the note says why the function changes, and it does, if there is one
            assert (change > 1e-6) == bool(growth.event["note"]) and (change <= EXACT or change > 1e-6), (field, size)
        if declared.exact and growth.event["moment_factors"] == "exact":
            gradients = gradients or gradients_of(model)
            error = pushforward_error(model, growth, operator, {field: size}, gradients)
            assert error <= 1e-8, (field, size, error)


def assert_others_can(text, model, before, field, size):
    """A refusal that names operators which can is right about them; one that says that none can, too."""
    named = re.search(r"; ([\w, ]+) can$", text)
    can = named[1].split(", ") if named and "operator:" in text else []
    for other in can:
        change = (logits_of(grow(model, other, {field: size}).model) - before).abs().max().item()
        assert change <= EXACT, other


def pushforward_error(model, growth, operator, to, small):
    """Largest difference of the grown model's gradients from the old ones moved as the moments are, relative to the
    tensor's largest; new entries and new layers, which have no moments, are left out."""
    ((_, config, plan),) = steps_of(model.config, operator, to)
    maps, worst = TensorMaps(config, plan), 0.0
    whole = max(g.abs().max().item() for g in small.values())
    for name, large in gradients_of(growth.model).items():
        source, layer = maps.source_of(name)
        if source is None or (layer is not None and layer.closed):
            continue
        old = small[source]
        error = (large - maps.gradient(name, old)).masked_fill(maps.fresh(name, old.ndim), 0)
        worst = max(worst, error.abs().max().item() / (old.abs().max().item() + 1e-6 * whole))
    return worst


def test_gradients_do_not_push_forward_by_other_factors():
    """The control: LEMON's unequal shares under a norm, which the event calls a leading term."""
    model, to = model_of("qwen3"), {"hidden_size": 96}
    growth = grow(model, "lemon", to)
    assert growth.event["moment_factors"] == "leading term"
    assert pushforward_error(model, growth, "lemon", to, gradients_of(model)) > 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kind_of_new_entry_is_alive_within_two_steps(operator, name):
    """Three where new layers are closed on top of what else is new."""
    to = everything(operator, name)
    if not to or (operator == "staged" and name in ("mamba2", "ngpt")):
        pytest.skip("nothing that it grows")
    model = start(operator, name)
    growth = grow(model, operator, to, optimizer=AdamW(model.parameters(), lr=1e-3))
    ids, _ = batch()
    train(growth.model, growth.optimizer, 3 if "num_hidden_layers" in to else 2)
    shares = live_share(growth, ids)
    if name == "gpt2":  # a key's bias adds the same to all scores of a query: its gradient is rounding, or zero
        shares["c_attn"] = round(shares.get("c_attn", 1.0), 3)
    assert shares and set(shares.values()) == {1.0}, {k: v for k, v in shares.items() if v < 1}
