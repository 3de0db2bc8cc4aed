"""Every operator on every architecture, the tests made from the declarations in OPERATORS and from the tables of axes.

What an operator may refuse, and why, is written down here by hand (REFUSALS); whatever is not, it has to grow. Every
comparison is in float64, on a batch whose second text is padded on its left.
"""

import copy
import re
from functools import cache

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
    untrained,
    wide,
)

from tokenformer.growth import OPERATORS, duplicated_share, grow, live_share
from tokenformer.growth.operators import steps_of
from tokenformer.growth.tensors import TensorMaps
from tokenformer.models import build_model
from tokenformer.models.axes import axis_sizes, parameter_dims, size_of, table_of
from tokenformer.optim import AdamW

EXACT = 1e-10
AT_ONCE = [name for name, each in OPERATORS.items() if not each.carried]  # test_carried.py has the others
BIASED = ("llama", "llama tied")
OTHER_NORMS = ("tokenformer softmax", "tokenformer gelu first")  # than one over the scores themselves

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
        "zero_keys zero_values rotated_keys tile published",
        lambda name, axis, whole: name == "tokenformer linear" and axis != "ffn_tokens",
        "projections are linear",
    ),
    ("zero_keys", lambda name, axis, whole: name == "tokenformer softmax", r"exp\(0\) = 1 takes weight"),
    ("zero_values", lambda name, axis, whole: name != "tokenformer silu", "enter the norm of the old"),
    ("rotated_keys", lambda name, axis, whole: name in OTHER_NORMS, "a rotation keeps the sum of squared"),
    ("rotated_keys", lambda name, axis, whole: not whole, "is too small; rotated_keys makes"),
    ("tile", lambda name, axis, whole: not whole, "is not a multiple of the model's"),
    (
        "ligo",
        lambda name, axis, whole: name == "tokenformer linear" and axis in ("qkv_tokens", "proj_tokens"),
        "projections are linear",
    ),
    ("ligo", lambda name, axis, whole: axis.endswith("_tokens") and not whole, "is not a multiple of the model's"),
    (
        "upcycle virtual_groups virtual_groups_published",
        lambda name, axis, whole: name in BIASED,
        "a Mixtral has no biases",
    ),
    ("scale_experts", lambda name, axis, whole: not whole, "experts with more copies would count more"),
]


def why_refused(operator, name, field, size):
    """The sentence that a refusal has to hold; None where the operator has to grow."""
    config = model_of(name).config
    axis = table_of(config).grows.get(field, "layers")
    whole = size % size_of(config, field) == 0
    asked = [(refuses, text) for operators, refuses, text in REFUSALS if operator in operators.split()]
    return next((text for refuses, text in asked if refuses(name, axis, whole)), None)


def start(operator, name):
    """The model that an operator starts from: of one layer for the jump, which takes no deeper one."""
    return model_of(name, layers=1) if operator == "jump" else model_of(name)


@cache
def generated_before(model):
    """By one of the tiny models, which nobody alters: with a cache, two tokens."""
    return generated(model, cached=True, tokens=2)


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
@pytest.mark.parametrize("operator", AT_ONCE)
def test_each_size_is_grown_as_promised_or_refused_with_its_reason(operator, name):
    model, declared = start(operator, name), OPERATORS[operator]
    fields = declared.fields(table_of(model.config))
    if not fields:
        other = fields_of(name)[0]
        with pytest.raises(ValueError, match=f"to.{other}: {operator} does not grow it in {model.config.model_type}"):
            grow(model, operator, {other: 2 * size_of(model.config, other)})
    before, gradients = logits_of(model), None
    for field, size in [(each, size) for each in fields for size in sizes_of(name, each)]:
        reason = why_refused(operator, name, field, size)
        if reason:
            with pytest.raises(ValueError, match=reason) as error:
                grow(model, operator, {field: size}, options=untrained(operator))
            assert_others_can(one_line(error), model, field, size)
            continue
        growth = grow(model, operator, {field: size}, options=untrained(operator))
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


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_without_a_source_starts_as_in_a_model_made_anew(name):
    """By mean and spread: GPT-2's and Mamba-2's last projections are smaller the more layers there are."""
    grown = grow(model_of(name, layers=1), "jump", {"num_hidden_layers": 4}).model
    anew, compared = build_model(grown.config, seed=1), 0
    for (key, p), (_, other) in zip(grown.named_parameters(), anew.named_parameters(), strict=True):
        if ".3." in key and p.numel() > 99:
            compared += 1
            assert p.std().item() == pytest.approx(other.std().item(), rel=0.25), key
            assert (p.mean() - other.mean()).abs() <= 0.3 * other.std() + 1e-6, key
    assert compared


def change_after(model, grown):
    return (logits_of(grown) - logits_of(model)).abs().max().item()


def assert_others_can(text, model, field, size):
    """A refusal that names operators which can is right about them."""
    named = re.search(r"; ([\w, ]+) can$", text)
    can = named[1].split(", ") if named and "operator:" in text else []
    for other in can:
        assert change_by(model, other, field, size) <= EXACT, other


@cache
def change_by(model, operator, field, size):
    """By one of the tiny models, which nobody alters: many a refusal names the same operators."""
    return change_after(model, grow(model, operator, {field: size}).model)


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
        if plan.is_newborn(name):
            continue
        old = maps.read(source, small.__getitem__, exponent=-1)
        error = (large - maps.gradient(name, old)).masked_fill(maps.fresh(name, old.ndim), 0)
        worst = max(worst, error.abs().max().item() / (old.abs().max().item() + 1e-6 * whole))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_what_an_architecture_cannot_grow_is_refused_with_its_reason(name):
    model = model_of(name)
    for field, reason in table_of(model.config).refuses.items():
        for operator in ("zero", "lemon", "stack"):
            with pytest.raises(ValueError, match=re.escape(f"to.{field}: {reason}")) as error:
                grow(model, operator, {field: 1000})
            one_line(error)


@pytest.mark.parametrize(
    ("operator", "to", "message"),
    [
        ("llama_pro", 5, "to.num_hidden_layers: 2 layers do not fall into 3 groups; allowed: 3, 4"),
        ("gradual_stack", 5, "to.num_hidden_layers: 5 is more than twice 2"),
        ("midas", 5, "to.num_hidden_layers: 5 is more than twice 2"),
        ("jump", 4, "operator: jump starts from a model of 0 or 1 layers, and this one has 2"),
    ],
)
def test_depths_that_do_not_come_out_are_refused(operator, to, message):
    with pytest.raises(ValueError, match=message):
        grow(model_of("qwen3"), operator, {"num_hidden_layers": to})


def test_layers_that_depend_on_their_number_cannot_be_moved():
    """By force, the control, the function does change: a layer that moves up divides its scores by more."""
    config = copy.deepcopy(model_of("gpt2").config)
    config.scale_attn_by_inverse_layer_idx = True
    model = type(model_of("gpt2"))(config).double().eval()
    model.load_state_dict(model_of("gpt2").state_dict())
    to = {"num_hidden_layers": 4}
    for operator, options in (("identity_blocks", {}), ("llama_pro", {}), ("masked", {"ramp_steps": 2})):
        with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx makes a layer depend on its number"):
            grow(model, operator, to, options=options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenformer.growth.operators.why_not_exact", lambda config, plan: [])
            assert change_after(model, grow(model, operator, to, options=options).model) > 1e-4
        if "where" in OPERATORS[operator].options:  # where none has to move
            assert change_after(model, grow(model, operator, to, options=options | {"where": "end"}).model) <= EXACT


def test_gradients_do_not_push_forward_by_other_factors():
    """The control: LEMON's unequal shares under a norm, which the event calls a leading term."""
    model, to = model_of("qwen3"), {"hidden_size": 96}
    growth = grow(model, "lemon", to)
    assert growth.event["moment_factors"] == "leading term"
    assert pushforward_error(model, growth, "lemon", to, gradients_of(model)) > 1e-4


# Operators that refuse all of a model, though not of every one of its architecture; zero_values where a norm runs.
NOTHING = [("zero_keys", "tokenformer softmax"), *(("rotated_keys", name) for name in OTHER_NORMS)]
NOTHING += [("zero_values", name) for name in MODELS if name.startswith("tokenformer") and name != "tokenformer silu"]
NOTHING += [(each, name) for each in OPERATORS if "mixture" in OPERATORS[each].axes for name in BIASED]
GROWING = [
    (operator, name)
    for operator in AT_ONCE
    for name, (architecture, _) in MODELS.items()
    if architecture in OPERATORS[operator].architectures and (operator, name) not in NOTHING
]


@pytest.mark.parametrize(("operator", "never"), [(o.name, each) for o in OPERATORS.values() for each in o.never])
def test_an_operator_is_not_listed_where_it_always_refuses(operator, never):
    declared, names = OPERATORS[operator], [name for name, (architecture, _) in MODELS.items() if architecture == never]
    assert never not in declared.architectures and names
    for name in names:
        config, options = model_of(name).config, {"ramp_steps": 3} if operator == "masked" else {}
        for field in declared.fields(table_of(config)):
            for to in ({field: 2 * size_of(config, field)}, everything(operator, name)):
                with pytest.raises(ValueError, match=never):
                    steps_of(config, operator, to, options=options)


@pytest.mark.parametrize(("operator", "name"), [pair for pair in GROWING if OPERATORS[pair[0]].exact])
def test_everything_at_once_is_grown_exactly_with_a_cache_and_with_gradients_pushed_forward(operator, name):
    to, model = everything(operator, name), start(operator, name)
    growth = grow(model, operator, to)
    assert change_after(model, growth.model) <= EXACT
    (old, logits), (new, others) = generated_before(model), generated(growth.model, cached=True, tokens=2)
    assert torch.equal(old, new) and (logits - others).abs().max() <= EXACT
    if growth.event["moment_factors"] == "exact":
        assert pushforward_error(model, growth, operator, to, gradients_of(model)) <= 1e-8


@pytest.mark.parametrize(("operator", "name"), GROWING)
def test_every_kind_of_new_entry_is_alive_within_two_steps(operator, name):
    """Three where new layers are closed on top of what else is new."""
    to, model = everything(operator, name), start(operator, name)
    growth = grow(model, operator, to, optimizer=AdamW(model.parameters(), lr=1e-3), options=untrained(operator))
    ids, _ = batch()
    train(growth.model, growth.optimizer, 3 if "num_hidden_layers" in to else 2)
    # A key's bias adds the same to all scores of a query where positions do not turn it: its gradient is rounding, and
    # a single entry of thousands may come out as zero.
    shares = {kind: round(share, 3) for kind, share in live_share(growth, ids).items()}
    assert shares and set(shares.values()) == {1.0}, {kind: share for kind, share in shares.items() if share < 1}


MISTAKES = [
    ("qwen3", "zero", {"intermediate_size": 61.0}, {}, "to.intermediate_size: 61.0 is no size; allowed: a whole"),
    ("qwen3", "zero", {"num_attention_heads": 7}, {}, "to: qwen3 does not allow these sizes: .*7 is not a multiple"),
    ("gpt2", "fpi", {"n_embd": 100}, {}, "to.n_embd: 100 does not fit, since gpt2 needs n_embd / head_dim"),
    ("mamba2", "zero", {"num_heads": 10}, {}, "to.num_heads: 10 does not fit, since mamba2 needs "),
    ("mamba2", "lemon", {"num_heads": 16}, {}, "to.num_heads: lemon does not grow it in mamba2; zero can"),
    ("mamba2", "staged", {"hidden_size": 64}, {}, "mamba2's heads it cannot"),
    ("ngpt", "staged", {"hidden_size": 96, "intermediate_size": 88}, {}, "ngpt's heads it cannot"),
    ("qwen3", "net2wider", {"hidden_size": 96}, {"noise": float("nan")}, "noise: nan is no finite number"),
    ("qwen3", "relora+zero", {"rank": 4, "hidden_size": 96}, {}, "operator: relora grows factors, and nothing beside"),
    (
        "mixtral",
        "phase_in_experts+zero",
        {"num_local_experts": 6, "hidden_size": 96},
        {"ramp_steps": 2},
        "phase_in_experts comes last",
    ),
]


@pytest.mark.parametrize(("name", "operator", "to", "options", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line_that_is_true(name, operator, to, options, message):
    with pytest.raises(ValueError, match=message) as error:
        grow(model_of(name), operator, to, options=options)
    one_line(error)


def test_layers_that_are_named_and_do_not_change_stay():
    model = model_of("llama")
    grown = grow(model, "zero+llama_pro", {"hidden_size": 108, "num_hidden_layers": 2}).model
    assert grown.config.num_hidden_layers == 2 and change_after(model, grown) <= EXACT


# --- padding, caches, other floats ---

PAIRS = [
    ("zero", "llama", {"hidden_size": 108, "num_attention_heads": 12}),
    ("lemon", "gpt2", {"n_embd": 72}),
    ("hyperclone", "mixtral", {"hidden_size": 96, "intermediate_size": 88}),
    ("zero", "mamba2", {"state_size": 9, "num_heads": 12}),
    ("zero_keys", "tokenformer rms", {"qkv_tokens": 13, "ffn_tokens": 41}),
    ("llama_pro", "qwen3", {"num_hidden_layers": 4}),
    ("net2wider", "ngpt", {"hidden_size": 96}),
]
PAIR_IDS = [f"{operator} {name}" for operator, name, _ in PAIRS]


def generated(model, cached, tokens=8):
    """So many tokens after the padded batch, greedily, and their logits (tokens, 2, vocabulary)."""
    ids, mask = batch()
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "use_cache": cached}
    with wide():
        made = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize(("operator", "name", "to"), PAIRS, ids=PAIR_IDS)
def test_a_grown_model_generates_the_same_with_a_cache_and_without(operator, name, to):
    model = model_of(name)
    expected, logits = generated(model, cached=False)
    grown = grow(model, operator, to).model
    for cached in (True, False):
        tokens, new = generated(grown, cached)
        assert torch.equal(tokens, expected) and (new - logits).abs().max() <= EXACT


def test_generation_from_a_changed_model_is_told_apart():
    """The control, and that the padding counts."""
    model, (ids, mask) = model_of("qwen3"), batch()
    logits = generated(model, cached=True)[1]
    assert (generated(grow(model, "stack", {"num_hidden_layers": 4}).model, cached=True)[1] - logits).abs().max() > 1e-3
    with torch.no_grad():
        unmasked = model(ids, use_cache=False).logits[mask.bool()]
    assert (unmasked - logits_of(model)).abs().max() > 1e-3


# Relative to the largest logit. bfloat16 rounds to 8 bits after every product, and others in the wider model.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize(("operator", "name", "to"), PAIRS, ids=PAIR_IDS)
def test_in_shorter_floats_the_logits_move_by_rounding_alone(operator, name, to, dtype, bound):
    model, (ids, mask) = model_of(name, dtype), batch()
    grown = grow(model, operator, to).model
    assert grown.dtype == dtype
    with torch.no_grad():
        old, new = (m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].double() for m in (model, grown))
    assert (old - new).abs().max() <= bound * old.abs().max()


# --- symmetry ---

SYMMETRIC = [operator for operator in OPERATORS if OPERATORS[operator].symmetric]
SYMMETRIC_MODELS = ("llama", "gpt2", "mixtral", "tokenformer rms")


def swapped(maps, name, p):
    """The parameter with every copy of a slot in the place of the next copy, along all its dimensions at once."""
    for i, dim in enumerate(maps.dims(name, p.ndim)):
        order, places = torch.arange(p.shape[i]), {}
        for slot, source in enumerate(dim.source.tolist()):
            places.setdefault(source, []).append(slot)
        for source, slots in places.items():
            if source >= 0:
                order[slots] = torch.tensor(slots[1:] + slots[:1])
        p = p.index_select(i, order)
    return p


def parted_after_training(operator, name, to, **options):
    """How far what begins as equal copies is apart after 20 steps of AdamW without dropout, over the spread of the
    parameter; the optimizer has taken two steps on the small model before."""
    small = copy.deepcopy(model_of(name))
    optimizer = AdamW(small.parameters(), lr=3e-3)
    train(small, optimizer, 2)
    growth = grow(small, operator, to, optimizer=optimizer, options=options)
    ((_, config, plan),) = steps_of(small.config, operator, to, options=options)
    maps, equal = TensorMaps(config, plan), {}
    for name, p in growth.model.named_parameters():
        other = swapped(maps, name, p.detach())
        where = (p == other) & maps.fresh(name, p.ndim, copies=True)
        if bool(where.any()):
            equal[name] = where
    train(growth.model, growth.optimizer, 20)
    assert equal
    return max(
        ((p - swapped(maps, name, p))[equal[name]].abs().max() / p.std()).item()
        for name, p in growth.model.named_parameters()
        if name in equal
    )


@pytest.mark.parametrize(
    ("operator", "name"), [pair for pair in GROWING if pair[0] in SYMMETRIC and pair[1] in SYMMETRIC_MODELS]
)
def test_copies_of_a_symmetric_operator_stay_equal(operator, name):
    assert parted_after_training(operator, name, everything(operator, name)) < 1e-6


@pytest.mark.parametrize("operator", [each for each in SYMMETRIC if "noise" in OPERATORS[each].options])
def test_noise_parts_the_copies_of_a_symmetric_operator(operator):
    name = "mixtral" if operator == "scale_experts" else "qwen3"
    assert parted_after_training(operator, name, everything(operator, name), noise=0.1) > 1e-2


@pytest.mark.parametrize("operator", ["net2wider", "hyperclone"])
def test_under_noise_gradients_push_forward_to_the_leading_term_and_the_event_says_so(operator):
    model, to = model_of("qwen3"), {"intermediate_size": 88}
    small = gradients_of(model)
    for noise, said in ((0.0, "exact"), (0.1, "leading term")):
        growth = grow(model, operator, to, options={"noise": noise})
        assert growth.event["moment_factors"] == said
        assert (pushforward_error(model, growth, operator, to, small) <= 1e-8) == (said == "exact")


@pytest.mark.parametrize(
    ("operator", "to"),
    [
        ("lemon", {"hidden_size": 96, "intermediate_size": 88, "num_key_value_heads": 4}),
        ("aki", {"hidden_size": 96, "intermediate_size": 88}),
        ("sparkling", {"hidden_size": 96}),
        ("tile", {"ffn_tokens": 60}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_copies_of_other_operators_part_by_themselves(operator, to):
    name = "tokenformer rms" if operator == "tile" else "qwen3"
    assert not OPERATORS[operator].symmetric
    assert parted_after_training(operator, name, to) > 1e-2


# --- moments ---


def grown_states(optimizer_class, name, operator, to, only=lambda p: True, **settings):
    """A model after three steps, its growth, and the optimizers' states by the parameter's name, before and after."""
    small = copy.deepcopy(model_of(name))
    optimizer = optimizer_class([p for p in small.parameters() if only(p)], lr=1e-3, **settings)
    train(small, optimizer, 3)
    growth = grow(small, operator, to, optimizer=optimizer)
    states = [
        {name: o.state[p] for name, p in m.named_parameters() if p in o.state}
        for m, o in ((small, optimizer), (growth.model, growth.optimizer))
    ]
    return states, growth


HIDDEN = (48 / 72) ** 0.5  # how much smaller the root mean square gets by zeros up to half as wide again
# By hand: (operator, model, growth, parameter, how its gradient moves: repeated along dimensions, times a factor)
MOVED = [
    ("hyperclone", "qwen3", {"intermediate_size": 88}, "mlp.gate_proj.weight", (2, 1), 1 / 2),
    ("hyperclone", "qwen3", {"intermediate_size": 88}, "mlp.down_proj.weight", (1, 2), 1),
    ("hyperclone", "qwen3", {"hidden_size": 96}, "mlp.gate_proj.weight", (1, 2), 1),
    ("hyperclone", "qwen3", {"hidden_size": 96}, "mlp.down_proj.weight", (2, 1), 1 / 2),
    ("staged", "tokenformer rms", {"hidden_size": 96, "num_key_value_heads": 4}, "input_layernorm.weight", (2,), 1 / 2),
    ("zero", "qwen3", {"hidden_size": 72}, "input_layernorm.weight", None, 1 / HIDDEN),
    ("zero", "qwen3", {"hidden_size": 72}, "mlp.gate_proj.weight", None, 1),
    ("zero", "tokenformer", {"head_dim": 12}, "self_attn.q_proj.value", None, (8 / 12) ** 0.5),
]


@pytest.mark.parametrize(("operator", "name", "to", "end", "repeats", "factor"), MOVED)
def test_adams_moments_move_by_the_factors_worked_out_by_hand(operator, name, to, end, repeats, factor):
    (before, after), growth = grown_states(AdamW, name, operator, to)
    key = f"model.layers.1.{end}"
    old, new = before[key], after[key]
    assert old["exp_avg"].abs().max() > 0 and float(new["step"]) == float(old["step"]) == 3
    for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        if repeats:
            assert torch.allclose(new[moment], old[moment].repeat(*repeats) * factor**power, rtol=1e-12)
        else:  # old entries keep their order among the new, which have no moments
            fresh = growth.new[key].expand_as(new[moment])
            assert torch.allclose(new[moment][~fresh], old[moment].flatten() * factor**power, rtol=1e-12)
            assert bool((new[moment][fresh] == 0).all())
            assert torch.equal(new["birth"].expand_as(new[moment]) == 3, fresh)
    if repeats:
        assert "birth" not in new


def test_muons_momentum_moves_as_the_gradient_does():
    matrices = {"only": lambda p: p.ndim == 2, "adjust_lr_fn": "match_rms_adamw"}
    (before, after), growth = grown_states(
        torch.optim.Muon, "qwen3", "hyperclone", {"intermediate_size": 88}, **matrices
    )
    old, new = (states["model.layers.0.mlp.up_proj.weight"]["momentum_buffer"] for states in (before, after))
    assert torch.equal(new, old.repeat(2, 1) / 2) and not torch.equal(new, old.repeat(2, 1))
    (before, after), growth = grown_states(torch.optim.Muon, "qwen3", "zero", {"intermediate_size": 61}, **matrices)
    old, new = (states["model.layers.0.mlp.down_proj.weight"]["momentum_buffer"] for states in (before, after))
    assert torch.equal(new[:, :44], old) and bool((new[:, 44:] == 0).all())
    train(growth.model, growth.optimizer, 1)


def largest_steps(optimizer, p, steps=30):
    """Largest step over the learning rate, for a gradient of one."""
    taken = []
    for _ in range(steps):
        before, p.grad = p.detach().clone(), torch.ones_like(p)
        optimizer.step()
        taken.append((p - before).abs().max().item() / optimizer.param_groups[0]["lr"])
    return max(taken)


def test_a_carried_over_step_count_would_overshoot_by_six_times():
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
    state = {"step": torch.tensor(5000.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    peaks = {}
    for optimizer_class, more in ((torch.optim.AdamW, {}), (AdamW, {"birth": torch.tensor([5000.0])})):
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = optimizer_class([p], **settings)
        optimizer.state[p] = {key: value.clone() for key, value in (state | more).items()}
        peaks[optimizer_class] = largest_steps(optimizer, p)
    assert peaks[torch.optim.AdamW] == pytest.approx(6.57, abs=0.05)  # the control
    assert peaks[AdamW] == pytest.approx(1.0, abs=1e-3)


# --- growth after growth, and back ---

# What each operator grows when it comes second or first; sizes are worked out from those of the moment.
IN_A_ROW = {
    "qwen3": {
        "zero": lambda c: {"hidden_size": c.hidden_size * 3 // 2, "num_attention_heads": c.num_attention_heads * 2},
        "net2wider": lambda c: {"num_key_value_heads": 2 * c.num_key_value_heads},
        "fpi": lambda c: {"intermediate_size": c.intermediate_size + 17},
        "lemon": lambda c: {"hidden_size": c.hidden_size * 3 // 2, "num_hidden_layers": c.num_hidden_layers + 1},
        "hyperclone": lambda c: {"hidden_size": 2 * c.hidden_size},
        "identity_blocks": lambda c: {"num_hidden_layers": c.num_hidden_layers + 1},
        "llama_pro": lambda c: {"num_hidden_layers": 2 * c.num_hidden_layers},
    },
    "tokenformer": {
        "zero_keys": lambda c: {"ffn_tokens": c.ffn_tokens + 11, "qkv_tokens": c.qkv_tokens + 1},
        "tile": lambda c: {"ffn_tokens": 2 * c.ffn_tokens, "proj_tokens": 3 * c.proj_tokens},
        "zero": lambda c: {"num_key_value_heads": 2 * c.num_key_value_heads, "head_dim": c.head_dim + 4},
        "lemon": lambda c: {"hidden_size": c.hidden_size * 3 // 2},
    },
    "gpt2": {
        "lemon": lambda c: {"n_embd": c.n_embd + 24},
        "hyperclone": lambda c: {"n_inner": 2 * size_of(c, "n_inner")},
        "identity_blocks": lambda c: {"num_hidden_layers": c.num_hidden_layers + 1},
    },
    "mixtral": {
        "zero": lambda c: {"hidden_size": c.hidden_size * 3 // 2},
        "scale_experts": lambda c: {"num_local_experts": 2 * c.num_local_experts},
        "fpi": lambda c: {"intermediate_size": c.intermediate_size + 17},
    },
    "mamba2 tied": {
        "zero": lambda c: {"num_heads": 2 * c.num_heads, "state_size": c.state_size + 3},
        "lemon": lambda c: {"hidden_size": 2 * c.hidden_size},
        "llama_pro": lambda c: {"num_hidden_layers": 2 * c.num_hidden_layers},
    },
    "ngpt": {
        "zero": lambda c: {"intermediate_size": c.intermediate_size + 17},
        "net2wider": lambda c: {"hidden_size": c.hidden_size * 3 // 2},
        "llama_pro": lambda c: {"num_hidden_layers": 2 * c.num_hidden_layers},
    },
}
ROWS = [(name, one, two) for name, each in IN_A_ROW.items() for one in each for two in each]


@pytest.mark.parametrize(("name", "one", "two"), ROWS, ids=[" ".join(row) for row in ROWS])
def test_growth_after_growth_is_exact_in_any_order(name, one, two):
    model, optimizer = model_of(name), None
    for operator in (one, two):
        growth = grow(model, operator, IN_A_ROW[name][operator](model.config), optimizer=optimizer)
        assert (logits_of(growth.model) - logits_of(model)).abs().max() <= EXACT
        model, optimizer = growth.model, growth.optimizer or AdamW(growth.model.parameters(), lr=1e-3)
        before = logits_of(model)
        train(model, optimizer, 1)
        assert (logits_of(model) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("operator", "name", "to"),
    [
        ("lemon+llama_pro", "llama tied", {"hidden_size": 108, "num_hidden_layers": 4}),
        ("zero+zero_keys", "tokenformer", {"num_key_value_heads": 4, "ffn_tokens": 41}),
        ("hyperclone+identity_blocks", "gpt2", {"n_embd": 96, "num_hidden_layers": 3}),
    ],
)
def test_mixtures_are_exact_and_give_each_field_to_the_operator_that_grows_it(operator, name, to):
    model = model_of(name)
    growth = grow(model, operator, to)
    assert {field: size_of(growth.model.config, field) for field in to} == to
    assert growth.promise == "exact" and (logits_of(growth.model) - logits_of(model)).abs().max() <= EXACT
    taken = [(each.name, config, plan) for each, config, plan in steps_of(model.config, operator, to)]
    assert [each for each, _, _ in taken] == operator.split("+")
    assert [bool(plan.maps) for _, _, plan in taken] == [True, "tokens" in str(to)]  # layers are no axis


def test_in_a_mixture_a_field_goes_to_the_operator_that_grows_the_fewest_whatever_the_order():
    """llama_pro closes a copy of every group's last layer; LEMON, which grows layers too, is given none."""
    for operator in ("lemon+llama_pro", "llama_pro+lemon"):
        steps = steps_of(model_of("qwen3").config, operator, {"hidden_size": 72, "num_hidden_layers": 4})
        assert {each.name: plan.layers is not None for each, _, plan in steps} == {"lemon": False, "llama_pro": True}
    with pytest.raises(ValueError, match="operator: lemon has nothing to grow"):
        grow(model_of("qwen3"), "lemon+llama_pro", {"num_hidden_layers": 4})


def kept_slots(axis, old, new):
    """Where an axis' old slots lie after growth by zeros: in front."""
    return torch.arange(new) < old


def cut_back(model, config, layers=None):
    """The old checkpoint cut out of a grown model, old slots by the table of axes; `layers`: which new ones are old."""
    before, after = axis_sizes(config), axis_sizes(model.config)
    old_layers = layers if layers is not None else list(range(config.num_hidden_layers))
    prefix, cut = table_of(config).layers, {}
    for name, p in model.named_parameters():
        number = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if number and int(number[1]) not in old_layers:
            continue
        p = p.detach()
        for i, dim in enumerate(parameter_dims(config, name)):
            masks = []
            for part in dim:
                mask = torch.ones(1, dtype=torch.bool)
                for axis, _ in part:
                    mask = (mask[:, None] & kept_slots(axis, before[axis], after[axis])).flatten()
                masks.append(mask)
            p = p.index_select(i, torch.cat(masks).nonzero().flatten())
        old_name = re.sub(r"\.\d+\.", f".{old_layers.index(int(number[1]))}.", name) if number else name
        cut[old_name] = p
    return cut


@pytest.mark.parametrize(
    ("operator", "name", "to", "layers"),
    [
        ("zero", "llama", {"intermediate_size": 61}, None),
        ("zero", "qwen2", {"num_attention_heads": 8}, None),
        ("zero", "qwen3", {"num_key_value_heads": 3}, None),
        ("zero", "mixtral", {"intermediate_size": 61, "num_attention_heads": 8}, None),
        ("zero", "gpt2", {"n_inner": 209}, None),
        ("zero", "mamba2", {"state_size": 9}, None),
        ("zero", "tokenformer", {"head_dim": 32}, None),
        ("zero", "tokenformer", {"num_key_value_heads": 3}, None),
        ("zero_keys", "tokenformer rms", {"qkv_tokens": 13, "proj_tokens": 9, "ffn_tokens": 41}, None),
        ("zero", "llama tied", {"num_hidden_layers": 4}, [0, 2]),
        ("identity_blocks", "gpt2", {"num_hidden_layers": 3}, [0, 1]),
        ("llama_pro", "mamba2", {"num_hidden_layers": 4}, [0, 2]),
    ],
)
def test_growing_and_cutting_back_returns_the_old_checkpoint_bit_for_bit(operator, name, to, layers):
    model = model_of(name)
    grown = grow(model, operator, to).model
    cut = cut_back(grown, model.config, layers)
    if "head_dim" in to:  # four times as wide: queries are twice as large, which halving takes back exactly
        cut = {name: p / 2 if name.endswith("q_proj.value") else p for name, p in cut.items()}
    old = dict(model.named_parameters())
    assert cut.keys() == old.keys() and all(torch.equal(cut[name], p) for name, p in old.items())


def test_cutting_back_what_was_copied_does_not_return_the_old_checkpoint():
    model = model_of("qwen3")
    cut = cut_back(grow(model, "lemon", {"intermediate_size": 88}).model, model.config)
    assert not all(torch.equal(cut[name], p) for name, p in model.named_parameters())


# --- published errors: each of them must fail ---


def test_a_scale_made_anew_from_the_row_count_changes_the_function():
    model = model_of("tokenformer")
    grown = grow(model, "zero_keys", {"ffn_tokens": 60}).model
    assert change_after(model, grown) <= EXACT
    for layer in grown.model.layers:
        layer.mlp.scale = 60**0.5
    assert change_after(model, grown) > 1e-2


def test_a_norms_gain_has_to_be_rescaled():
    model = model_of("llama")
    grown = grow(model, "zero", {"hidden_size": 108}).model
    with torch.no_grad():
        for name, p in grown.named_parameters():
            if "norm" in name:
                p.mul_((108 / 72) ** 0.5)
    assert change_after(model, grown) > 0.1


def test_a_norms_epsilon_has_to_be_rescaled_too():
    """It shows where activations are small; here their mean square is about the epsilon."""
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-2)
    grown = grow(model, "zero", {"hidden_size": 108}).model
    assert change_after(model, grown) <= EXACT
    assert grown.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps * 72 / 108, rel=1e-12)
    for module in grown.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps
    assert change_after(model, grown) > 1e-4


def test_zeros_under_a_layer_norm_change_the_function(monkeypatch):
    model = model_of("gpt2")
    monkeypatch.setattr("tokenformer.growth.operators.why_not_exact", lambda config, plan: [])  # by force
    assert change_after(model, grow(model, "zero", {"n_embd": 96}).model) > 0.1


def test_new_entries_with_both_sides_zero_never_wake():
    model = model_of("llama")
    growth = grow(model, "zero", {"intermediate_size": 61}, optimizer=AdamW(model.parameters(), lr=1e-2))
    new = [growth.model.get_parameter(name) for name in growth.new]
    with torch.no_grad():
        for name, mask in growth.new.items():
            growth.model.get_parameter(name).masked_fill_(mask, 0)
    train(growth.model, growth.optimizer, 5)
    for (name, mask), p in zip(growth.new.items(), new, strict=True):
        assert bool((p[mask.expand_as(p)] == 0).all()), name
    assert max(live_share(growth, batch()[0]).values()) == 0.0


def test_query_heads_at_the_end_instead_of_inside_their_group_change_the_function():
    """Six heads on two key-value heads become eight: 0 1 2 + 3 4 5 +, not 0 1 2 3 4 5 + +."""
    model = model_of("qwen2")
    grown = grow(model, "zero", {"num_attention_heads": 8}).model
    assert change_after(model, grown) <= EXACT
    order, width = [0, 1, 2, 4, 5, 6, 3, 7], 8
    slots = torch.tensor([head * width + i for head in order for i in range(width)])
    with torch.no_grad():
        for layer in grown.model.layers:
            attention = layer.self_attn
            for p in (attention.q_proj.weight, attention.q_proj.bias):
                p.copy_(p[slots])
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, slots])
    assert change_after(model, grown) > 1e-2


def test_wider_heads_under_rotary_positions_change_the_function():
    """Zeros beside every head's entries and queries larger by root(2), as without positions; then the angles differ."""
    model = model_of("qwen2")
    with pytest.raises(ValueError, match="to.head_dim: rotary positions turn the whole of a head"):
        grow(model, "zero", {"head_dim": 16})
    config = copy.deepcopy(model.config)
    config.head_dim = 16
    wider = type(model)(config).double().eval()
    with torch.no_grad():
        for (name, p), old in zip(wider.named_parameters(), model.parameters(), strict=True):
            if re.search(r"\.[qkv]_proj", name):  # (heads, 8, ...) -> (heads, 16, ...)
                heads = old.reshape(-1, 8, *old.shape[1:])
                old = torch.cat([heads, torch.zeros_like(heads)], 1).reshape(p.shape)
                old = old * 2**0.5 if "q_proj" in name else old
            elif "o_proj" in name:
                heads = old.reshape(len(old), -1, 8)
                old = torch.cat([heads, torch.zeros_like(heads)], 2).reshape(p.shape)
            p.copy_(old)
    assert change_after(model, wider) > 1e-3


def test_wider_heads_keep_the_share_that_positions_turn_at_any_size():
    """2/49 * 49 is cut off to 1 in floats; a share must stand for the same two dimensions."""
    model = model_of("tokenformer")
    for size in (49, 12):
        grown = grow(model, "zero", {"head_dim": size}).model
        assert int(size * grown.config.rope_parameters["partial_rotary_factor"]) == 2
        assert change_after(model, grown) <= EXACT


@pytest.mark.skipif(
    not any("experts" in operator.axes for operator in OPERATORS.values()), reason="no operator grows experts"
)
def test_duplicated_experts_under_a_fixed_top_k_change_the_function():
    model = model_of("mixtral")
    config = copy.deepcopy(model.config)
    config.num_local_experts = 8
    doubled = type(model)(config).double().eval()
    with torch.no_grad():
        for p, old in zip(doubled.parameters(), model.parameters(), strict=True):
            p.copy_(old if p.shape == old.shape else torch.cat([old, old]))
    assert change_after(model, doubled) > 1e-2
    for layer in doubled.model.layers:
        layer.mlp.gate.top_k = 4
    assert change_after(model, doubled) <= EXACT  # with the number chosen doubled too it is the same


def test_live_share_looks_at_no_rows_of_tokens_that_are_not_in_the_batch():
    model = model_of("qwen3")
    growth = grow(model, "hyperclone", {"hidden_size": 96})
    few = torch.randint(1, 9, (2, 5), generator=torch.Generator().manual_seed(0))
    assert live_share(growth, few)["embed_tokens"] == 1.0
    with torch.no_grad():  # the control: a row that is looked up and does not matter
        growth.model.model.layers[0].self_attn.v_proj.weight.zero_()
        growth.model.lm_head.weight.zero_()
    assert live_share(growth, few)["embed_tokens"] == 0.0


def test_duplicated_share_counts_copies():
    model = model_of("qwen3")
    growth = grow(model, "hyperclone", {"intermediate_size": 88})
    masks = {name: mask for name, mask in growth.copies.items() if "up_proj" in name}
    assert duplicated_share(growth.model, masks) == 1.0
    train(growth.model, AdamW(growth.model.parameters(), lr=1e-3), 1)
    different = grow(model, "lemon", {"intermediate_size": 88})
    masks = {name: mask for name, mask in different.copies.items() if "down_proj" in name}
    assert duplicated_share(different.model, masks) == 0.0
