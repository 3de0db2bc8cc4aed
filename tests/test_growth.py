"""Growth by parameter tokens: exact where it says so, alive, with the optimizer's state carried over."""

import copy

import pytest
import torch

from tokenformer.growth import OPERATORS, grow, largest_logit_change, live_share
from tokenformer.growth.operators import steps_of
from tokenformer.growth.tensors import TensorMaps
from tokenformer.models import build_config, build_model
from tokenformer.optim import AdamW, parameter_groups
from tokenformer.pattention import THETAS, WITHOUT_NORM

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"qkv_tokens": 12, "proj_tokens": 7, "ffn_tokens": 30}
OPTIONS = {
    "published": {},
    "modern": {"norm": "rmsnorm", "initialization": "unit", "num_key_value_heads": 2},
    "gated": {"feed_forward": "gated"},
    "linear": {"attention_projections": "linear"},
    "gelu first": {"theta": "gelu_l2_norm"},
    "softmax": {"theta": "softmax"},
    "relu2": {"theta": "relu2"},
    "silu": {"theta": "silu", "ffn_scale": 1.3},
    "gelu gated": {"theta": "gelu", "feed_forward": "gated"},
    "untied": {"tie_word_embeddings": False},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}
TARGETS = {
    "zero_keys": [{"ffn": 50, "qkv": 13, "proj": 8}, {"ffn": 51}, {"ffn": 127, "qkv": 63, "proj": 9}],
    "zero_values": [{"ffn": 50, "qkv": 13, "proj": 8}, {"ffn": 51}, {"ffn": 127, "qkv": 63, "proj": 9}],
    "rotated_keys": [{"ffn": 60, "qkv": 24, "proj": 15}, {"ffn": 92}, {"ffn": 127, "qkv": 63, "proj": 40}],
    "tile": [{"ffn": 60, "qkv": 36, "proj": 7}, {"ffn": 120}, {"ffn": 240, "qkv": 72, "proj": 14}],
}


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 19), generator=torch.Generator().manual_seed(0))


def trained(ids, dtype=torch.float64, optimizer_class=AdamW, **fields):
    """A model and its optimizer after three steps, so that weights, scores and moments are nobody's initial values."""
    tokens = {"ffn_tokens": 30} if fields.get("attention_projections") == "linear" else TOKENS
    model = build_model(build_config("tokenformer", fields=SIZES | tokens | fields), seed=0).to(dtype)
    optimizer = optimizer_class(parameter_groups(model, 0.1), lr=1e-2)
    for _ in range(3):
        step(model, optimizer, ids)
    return model, optimizer


def step(model, optimizer, ids):
    optimizer.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def fitting(option, targets):
    return {k: v for k, v in targets.items() if option != "linear" or k == "ffn"}


def fits(option, operator):
    """Whether the operator grows a model of that theta: not by zero keys where zero is no neutral or a dead score, by
    zero values only where no norm runs over the scores, by a rotation only if none but their own does."""
    theta = OPTIONS[option].get("theta", "l2_norm_gelu")
    refused = {"zero_keys": ("softmax", "relu2"), "rotated_keys": ("softmax", "gelu_l2_norm")}
    return theta in WITHOUT_NORM if operator == "zero_values" else theta not in refused.get(operator, ())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operator", TARGETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_three_growths_in_a_row_preserve_logits(option, operator, dtype, ids):
    if not fits(option, operator):
        pytest.skip("refused, see test_operators_refuse_a_theta_that_they_would_change_or_leave_dead")
    first, optimizer = trained(ids, dtype, **OPTIONS[option])
    model = first
    for targets in TARGETS[operator]:
        growth = grow(model, operator, fitting(option, targets), optimizer=optimizer)
        assert growth.promise == "exact"
        assert largest_logit_change(model, growth.model, ids) <= TOLERANCE[dtype]
        model, optimizer = growth.model, growth.optimizer
    assert model.config.ffn_tokens == TARGETS[operator][-1]["ffn"]
    assert largest_logit_change(first, model, ids) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("option", ["published", "modern", "gated", "linear", "gelu first"])
def test_the_published_way_moves_the_logits(option, ids):
    """The control of exactness: the release's growth, and zero keys under a scale made anew from the row count."""
    model, _ = trained(ids, **OPTIONS[option])
    growth = grow(model, "published", {"ffn": 60})
    assert growth.promise == "approximate" and largest_logit_change(model, growth.model, ids) > 1e-3
    zero = grow(model, "zero_keys", {"ffn": 60}).model
    for layer in zero.model.layers:
        layer.mlp.scale *= 2**0.5
    assert largest_logit_change(model, zero, ids) > 1e-3


@pytest.mark.parametrize("operator", TARGETS)
@pytest.mark.parametrize("option", ["published", "gated", "gelu first", "relu2", "silu", "gelu gated"])
def test_new_rows_are_alive_at_once_and_wholly_after_a_step(option, operator, ids):
    if not fits(option, operator) or (option == "relu2" and operator in ("tile", "rotated_keys")):
        pytest.skip("refused; or made of rows that no position here wakes")
    model, optimizer = trained(ids, **OPTIONS[option])
    growth = grow(model, operator, TARGETS[operator][0], optimizer=optimizer)
    at_once = live_share(growth, ids)
    assert max(at_once.values()) == 1.0
    step(growth.model, growth.optimizer, ids)
    assert set(live_share(growth, ids).values()) == {1.0}


@pytest.mark.parametrize(
    ("fields", "to", "operator"),
    [
        ({"theta": "silu"}, {"ffn": 31}, "zero_values"),
        ({"theta": "relu2", "norm": "rmsnorm"}, {"ffn": 31, "hidden_size": 40}, "zero_values+zero"),
        ({}, {"ffn": 60}, "rotated_keys"),
        ({}, {"ffn": 59}, "zero_keys"),  # too few for a rotation
        ({}, {"ffn": 60, "qkv": 13}, "zero_keys"),
        ({}, {"ffn": 60, "qkv": 12}, "rotated_keys"),  # as many as there are
        ({"theta": "gelu_l2_norm"}, {"ffn": 60}, "zero_keys"),
        ({"theta": "softmax"}, {"ffn": 60}, "tile"),
        ({"norm": "rmsnorm"}, {"hidden_size": 40, "num_hidden_layers": 3}, "zero"),
    ],
)
def test_an_operator_that_is_not_named_is_the_best_of_the_exact_ones(ids, fields, to, operator):
    model, _ = trained(ids, **fields)
    growth = grow(model, to=to)
    assert growth.event["operator"] == operator
    if "hidden_size" not in to:
        assert largest_logit_change(model, growth.model, ids) < 1e-10


def as_feed_forward(model):
    """The same model with two ordinary matrices around a GELU, and no scale, in the place of every feed-forward."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        (tokens, width), narrow = layer.mlp.key.shape, layer.mlp.value.shape[1]
        matrices = torch.nn.Linear(width, tokens, bias=False), torch.nn.Linear(tokens, narrow, bias=False)
        for matrix, weight in zip(matrices, (layer.mlp.key, layer.mlp.value.T), strict=True):
            matrix.weight = torch.nn.Parameter(weight.detach().clone())
        layer.mlp = torch.nn.Sequential(matrices[0], torch.nn.GELU(), matrices[1])
    return plain


def test_without_a_norm_growing_parameter_tokens_is_growing_a_feed_forward(ids):
    def losses(theta):
        model, _ = trained(ids, attention_projections="linear", theta=theta)
        plain = as_feed_forward(model)
        grown = grow(model, "zero_values", {"ffn": 51}).model if theta == "gelu" else model
        for layer, new in zip(plain.model.layers, grown.model.layers, strict=True):
            first, _, second = layer.mlp  # new units with random inputs, which nothing reads: a feed-forward's "zero"
            added = new.mlp.key.shape[0] - first.weight.shape[0]
            first.weight = torch.nn.Parameter(torch.cat((first.weight, new.mlp.key[first.weight.shape[0] :])).detach())
            second.weight = torch.nn.Parameter(torch.nn.functional.pad(second.weight, (0, added)).detach())
        return [
            [step(each, optimizer, ids) for _ in range(4)]
            for each in (grown, plain)
            for optimizer in [AdamW(parameter_groups(each, 0.1), lr=1e-2)]
        ]

    tokens, feed_forward = losses("gelu")
    assert tokens == pytest.approx(feed_forward, abs=1e-10) and tokens[-1] < tokens[0]
    tokens, feed_forward = losses("l2_norm_gelu")  # the control: the norm over scores is what sets the two apart
    assert abs(tokens[0] - feed_forward[0]) > 1e-4


def test_where_no_exact_operator_fits_the_one_that_is_not_named_says_why(ids):
    model, _ = trained(ids, theta="softmax")
    with pytest.raises(ValueError, match="theta=softmax exactly.*tile can, by whole multiples"):
        grow(model, to={"ffn": 61})


def test_new_keys_are_a_rotation_of_the_old(ids):
    """By its formula, the sum of squared scores grows as the row count does, whatever x is; old rows keep their scores,
    the scale is the release's root of the row count, and no two keys are alike. The control: keys as large, but drawn
    at random, move the logits."""
    model, _ = trained(ids)
    grown = grow(model, "rotated_keys", {"ffn": 75, "qkv": 24}, seed=3).model
    for table, rows in ((grown.model.layers[1].mlp, 30), (grown.model.layers[1].self_attn.q_proj, 12)):
        key = table.key.detach()
        gram = key.T @ key
        torch.testing.assert_close(gram, key[:rows].T @ key[:rows] * (len(key) / rows), rtol=1e-12, atol=1e-12)
        assert table.scale == pytest.approx(len(key) ** 0.5) and not table.value[rows:].any()
        assert torch.cdist(key, key).fill_diagonal_(1).min() > 1e-2
    with torch.no_grad():
        for layer in grown.model.layers:
            new = layer.mlp.key[30:]
            new.copy_(torch.randn_like(new) * new.std())
    assert largest_logit_change(model, grown, ids) > 1e-3


def test_rows_with_zero_keys_and_zero_values_never_wake(ids):
    """The control of liveness: zero both, as some reimplementations do, and the rows are dead."""
    model, optimizer = trained(ids)
    growth = grow(model, "zero_keys", {"ffn": 60}, optimizer=optimizer)
    with torch.no_grad():
        for layer in growth.model.model.layers:
            layer.mlp.value[30:] = 0
    for _ in range(5):
        step(growth.model, growth.optimizer, ids)
    for layer in growth.model.model.layers:
        assert (layer.mlp.key[30:] == 0).all() and (layer.mlp.value[30:] == 0).all()
    assert max(live_share(growth, ids).values()) == 0.0


def test_tiled_copies_part_ways(ids):
    model, optimizer = trained(ids)
    growth = grow(model, "tile", {"ffn": 60}, optimizer=optimizer)
    table = growth.model.model.layers[0].mlp
    assert torch.equal(table.key[:30], table.key[30:])
    for _ in range(3):
        step(growth.model, growth.optimizer, ids)
    assert (table.key[:30] - table.key[30:]).abs().max() > 1e-3


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("operator", ["zero_keys", "tile"])
@pytest.mark.parametrize("option", ["published", "gated"])
def test_gradients_push_forward_as_the_moments_are_moved(option, operator, ids):
    """One batch through both models: the large one's gradients at old entries are c times the small one's."""
    model, _ = trained(ids, **OPTIONS[option])
    growth = grow(model, operator, TARGETS[operator][0])
    ((_, config, plan),) = steps_of(model.config, operator, TARGETS[operator][0])
    maps = TensorMaps(config, plan)
    small, large = gradients(model, ids), gradients(growth.model, ids)
    for name, old in small.items():
        if operator == "tile" and name.endswith(".key"):
            continue  # passes through the norm, which the copies share alike; the event says "leading term"
        pushed = maps.gradient(name, old)
        rows = slice(0, old.shape[0]) if operator == "zero_keys" else slice(None)
        torch.testing.assert_close(large[name][rows], pushed[rows], rtol=1e-8, atol=1e-12)


def test_moments_of_old_rows_are_kept_and_new_rows_start_at_their_own_birth(ids):
    model, optimizer = trained(ids)
    growth = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer)
    old, new = (m.model.layers[0].mlp.key for m in (model, growth.model))
    before, after = optimizer.state[old], growth.optimizer.state[new]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[moment][:30], before[moment]) and (after[moment][30:] == 0).all()
        assert before[moment].abs().max() > 0
    assert after["step"] == before["step"] == 3
    assert after["birth"].flatten().tolist() == [0.0] * 30 + [3.0] * 20
    again = grow(growth.model, "zero_keys", {"ffn": 52}, optimizer=growth.optimizer)
    state = again.optimizer.state[again.model.model.layers[0].mlp.key]
    assert state["birth"].flatten().tolist() == [0.0] * 30 + [3.0] * 22
    dropped = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer, moments="drop")
    assert not dropped.optimizer.state  # the control


def test_an_optimizer_with_one_count_per_tensor_gets_the_mean_second_moment(ids):
    model, optimizer = trained(ids, optimizer_class=torch.optim.AdamW)
    growth = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer)
    assert type(growth.optimizer) is torch.optim.AdamW
    second = growth.optimizer.state[growth.model.model.layers[0].mlp.key]["exp_avg_sq"]
    assert torch.allclose(second[30:], second[:30].mean()) and "birth" not in growth.optimizer.state
    step(growth.model, growth.optimizer, ids)


def state_of(optimizer_class, ids, operator, to, **settings):
    """States of the first feed-forward value table before and after growth, and the plan's factor for its moments."""
    model, _ = trained(ids)
    optimizer = optimizer_class(model.parameters(), lr=1e-2, **settings)
    for _ in range(3):
        step(model, optimizer, ids)
    growth = grow(model, operator, to, optimizer=optimizer)
    assert type(growth.optimizer) is optimizer_class
    old, new = (m.model.layers[0].mlp.key for m in (model, growth.model))
    step_before = {key: copy.deepcopy(value) for key, value in growth.optimizer.state[new].items()}
    step(growth.model, growth.optimizer, ids)
    ((_, _, plan),) = steps_of(model.config, operator, to)
    return optimizer.state[old], step_before, plan.maps["ffn_tokens"].read


def test_sgds_momentum_moves_as_the_gradient_does(ids):
    before, after, share = state_of(torch.optim.SGD, ids, "tile", {"ffn": 60}, momentum=0.9)
    tiled = before["momentum_buffer"].repeat(2, 1)
    assert torch.equal(after["momentum_buffer"], tiled * share[:, None])
    assert not torch.allclose(after["momentum_buffer"], tiled)  # the control: copies as they are would be too large


def test_the_largest_second_moment_moves_as_the_second_moment_does(ids):
    before, after, share = state_of(torch.optim.AdamW, ids, "tile", {"ffn": 60}, amsgrad=True)
    tiled = before["max_exp_avg_sq"].repeat(2, 1)
    assert torch.equal(after["max_exp_avg_sq"], tiled * (share**2)[:, None]) and not torch.equal(
        after["max_exp_avg_sq"], tiled * share[:, None]
    )
    _, after, _ = state_of(torch.optim.AdamW, ids, "zero_keys", {"ffn": 50}, amsgrad=True)
    assert torch.allclose(after["max_exp_avg_sq"][30:], after["max_exp_avg_sq"][:30].mean())


@pytest.mark.parametrize(
    ("optimizer_class", "message"),
    [
        (torch.optim.Adagrad, r"Adagrad keeps a state 'sum' of shape \(30, 32\)"),
        (torch.optim.Adafactor, r"Adafactor keeps a state 'row_var' of shape \(30, 1\)"),
    ],
)
def test_a_state_that_growth_does_not_know_is_refused(optimizer_class, message, ids):
    model, _ = trained(ids)
    optimizer = optimizer_class(model.parameters())
    step(model, optimizer, ids)
    with pytest.raises(ValueError, match=message):
        grow(model, "tile", {"ffn": 60}, optimizer=optimizer)
    dropped = grow(model, "tile", {"ffn": 60}, optimizer=optimizer, moments="drop")  # the control
    step(dropped.model, dropped.optimizer, ids)


def test_an_optimizers_own_arguments_are_kept_and_its_local_names_are_not_passed(ids):
    class Named(AdamW):
        def __init__(self, params, lr=0.1, weight_decay=0.0):
            betas = (0.5, 0.6)  # a local name that is one of the defaults too
            super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    model, optimizer = trained(ids, optimizer_class=Named)
    growth = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer)
    assert growth.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert growth.optimizer.param_groups[0]["lr"] == 1e-2 and growth.optimizer.defaults["lr"] == 1e-2


def test_a_plan_says_whether_it_adds_entries():
    config = build_config("tokenformer", fields=SIZES | TOKENS)
    tokens = ("zero_keys", "tile", "published")
    adds = {name: OPERATORS[name].plan(config, {"ffn_tokens": 60}).adds_entries for name in tokens}
    assert adds == {"zero_keys": True, "tile": False, "published": True}


def test_growth_of_a_model_read_in_bfloat16_is_exact_at_long_range(tmp_path):
    """Rotary frequencies stay in float32, as from_pretrained leaves them; rounded ones turn far positions elsewhere."""
    from transformers import AutoModelForCausalLM

    fields = SIZES | TOKENS | {"initialization": "unit", "max_position_embeddings": 1024}
    whole = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
    small = build_model(build_config("tokenformer", fields=fields | whole), seed=0)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.self_attn.q_proj.value *= 10  # so that attention depends on where a token stands
    small.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    long = torch.randint(1, 61, (1, 640), generator=torch.Generator().manual_seed(0))
    grown = grow(model, "zero_keys", {"ffn": 60}).model
    before, after = (dict(m.named_buffers()) for m in (model, grown))
    assert before.keys() == after.keys() and before["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert all(
        after[name].dtype == buffer.dtype and torch.equal(after[name], buffer) for name, buffer in before.items()
    )
    assert after["model.rotary_emb.inv_freq"] is not before["model.rotary_emb.inv_freq"]
    for m in (model, grown):  # the same weights in float32, so that only what growth did is left to see
        for p in m.parameters():
            assert p.dtype == torch.bfloat16
            p.data = p.data.float()
    assert largest_logit_change(model, grown, long) <= TOLERANCE[torch.float32]
    rounded = grown.model.rotary_emb
    rounded.inv_freq = rounded.inv_freq.bfloat16()
    assert largest_logit_change(model, grown, long) > 0.1  # the control


def test_training_goes_on_as_if_nothing_had_happened(ids):
    """Losses of the first step after growth equal those of the model that did not grow; dropped moments change them."""
    model, optimizer = trained(ids)
    growth = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer)
    dropped = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer, moments="drop")
    for made in (growth, dropped):  # hold the new rows where they are: the old ones must then move as before
        for layer in made.model.model.layers:
            layer.mlp.key.register_hook(lambda g: torch.cat([g[:30], torch.zeros_like(g[30:])]))
            layer.mlp.value.register_hook(lambda g: torch.cat([g[:30], torch.zeros_like(g[30:])]))
    losses = {}
    runs = [("small", model, optimizer)] + [
        (label, made.model, made.optimizer) for label, made in (("kept", growth), ("dropped", dropped))
    ]
    for label, m, o in runs:
        losses[label] = [step(m, o, ids) for _ in range(4)]
    assert losses["kept"] == pytest.approx(losses["small"], abs=1e-6)  # transformers takes a loss in float32
    assert losses["dropped"] != pytest.approx(losses["small"], abs=1e-4)


def test_the_old_model_and_optimizer_are_left_alone(ids):
    model, optimizer = trained(ids)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    growth = grow(model, "zero_keys", {"ffn": 50}, optimizer=optimizer)
    assert torch.equal(torch.rand(1), expected)
    step(growth.model, growth.optimizer, ids)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values(), strict=True))
    assert str(state) == str(optimizer.state_dict()) and model.config.ffn_tokens == 30


def test_growth_is_a_function_of_its_seed(ids):
    model, _ = trained(ids)
    a, b, c = (grow(model, "zero_keys", {"ffn": 50}, seed=s).model.model.layers[0].mlp.value for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_grown_model_is_an_ordinary_model(ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = trained(ids, torch.float32)
    growth = grow(model, "tile", {"ffn": 60, "qkv": 24})
    growth.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.ffn_scale == pytest.approx(60**0.5) and largest_logit_change(model, again, ids) < 1e-5
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **settings), model.generate(ids, **settings))
    assert growth.event["from"] == {"ffn_tokens": 30, "qkv_tokens": 12}


@pytest.mark.parametrize(
    ("operator", "theta", "message"),
    [
        ("zero_keys", "softmax", "zero_keys cannot grow theta=softmax exactly"),
        ("zero_keys", "relu2", "zero_keys would add dead rows to theta=relu2"),
        *(("zero_values", theta, f"zero_values cannot grow theta={theta} exactly") for theta in THETAS[:3]),
        *(("rotated_keys", theta, f"rotated_keys cannot grow theta={theta} exactly") for theta in THETAS[1:3]),
    ],
)
def test_operators_refuse_a_theta_that_they_would_change_or_leave_dead(operator, theta, message, ids):
    model, _ = trained(ids, theta=theta)
    with pytest.raises(ValueError, match=message):
        grow(model, operator, {"ffn": 60})


@pytest.mark.parametrize(("theta", "alive"), [("relu2", False), ("gelu", True), ("silu", True)])
def test_a_zero_key_of_a_squared_relu_never_wakes(theta, alive, ids):
    """Why zero_keys refuses it: by force, the row's gradients are zero for ever; a GELU's are not."""
    model, _ = trained(ids, theta=theta)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.key[20:] = 0
    for _ in range(3):
        step(model, optimizer, ids)
    assert all(bool(layer.mlp.key[20:].any()) == alive for layer in model.model.layers)


@pytest.mark.parametrize(
    ("operator", "to", "message"),
    [
        ("nothing", {"ffn": 60}, "operator: 'nothing' is not known; allowed: zero_keys, zero_values, rotated_keys"),
        ("zero_keys", {}, "to: no target size given"),
        ("zero_keys", {"ffn": 29}, "to.ffn: 29 is smaller than the model's 30"),
        ("zero_keys", {"ffn": 30}, "is the size that the model already has"),
        ("zero_keys", {"ffn": 40, "ffn_tokens": 50}, "ffn_tokens is given twice, as 40 and as 50"),
        ("zero_keys", {"tokens": 60}, "to.tokens: tokenformer has no such axis; nearest valid name: qkv_tokens"),
        ("zero_keys", {"hidden_size": 64}, "to.hidden_size: zero_keys does not grow it in tokenformer; zero"),
        ("rotated_keys", {"ffn": 59}, "to.ffn_tokens: 59 is too small; rotated_keys makes 30 rows 60 or more"),
        ("tile", {"ffn": 50}, "to.ffn_tokens: 50 is not a multiple of the model's 30; for tile, nearest: 30 or 60"),
    ],
)
def test_bad_targets_are_refused_in_one_line(operator, to, message):
    model = build_model(build_config("tokenformer", fields=SIZES | TOKENS), seed=0)
    with pytest.raises(ValueError, match=message):
        grow(model, operator, to)


@pytest.mark.parametrize("operator", ["stack", "gradual_stack", "midas", "solar", "llama_pro"])
def test_layers_are_not_copied_where_there_is_none(operator):
    model = build_model(build_config("tokenformer", fields=SIZES | TOKENS | {"num_hidden_layers": 0}), seed=0)
    with pytest.raises(ValueError, match="to.num_hidden_layers: "):
        grow(model, operator, {"num_hidden_layers": 2})
    grow(model, "jump", {"num_hidden_layers": 2})  # the control: new ones need none


def test_linear_projections_have_no_tokens_to_grow():
    fields = SIZES | {"attention_projections": "linear"}
    model = build_model(build_config("tokenformer", fields=fields), seed=0)
    with pytest.raises(ValueError, match="attention projections are linear"):
        grow(model, "zero_keys", {"qkv": 60})


def test_a_parameter_that_no_table_names_is_an_error(ids):
    model, _ = trained(ids)
    model.model.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="'model.extra' is in no table of axes"):
        grow(model, "zero_keys", {"ffn": 60})


def test_several_optimizers_that_share_a_model_grow_together(ids):
    """Muon for the matrices of the layers, AdamW for the rest: each its own; momentum moves as a gradient does."""
    model, _ = trained(ids, torch.float32)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    both = [torch.optim.Muon(matrices, lr=1e-2), AdamW(others, lr=1e-2)]
    for _ in range(2):
        for optimizer in both:
            optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        for optimizer in both:
            optimizer.step()
    growth = grow(model, "tile+identity_blocks", {"ffn": 60, "num_hidden_layers": 3}, optimizer=both)
    muon, adam = growth.optimizer
    held = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in growth.model.parameters()} and len(held) == len(set(held))
    old, new = model.model.layers[1].mlp.value, growth.model.model.layers[1].mlp.value
    assert torch.equal(muon.state[new]["momentum_buffer"], both[0].state[old]["momentum_buffer"].repeat(2, 1))
    key = muon.state[growth.model.model.layers[1].mlp.key]["momentum_buffer"]
    assert not torch.equal(key[:30], key[30:])  # the control: keys' copies get unequal shares


def test_an_optimizer_that_knows_names_knows_those_of_the_grown_model(ids):
    model, _ = trained(ids)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    growth = grow(model, "llama_pro", {"num_hidden_layers": 4}, optimizer=optimizer)
    names = [name for name, _ in growth.model.named_parameters()]
    assert growth.optimizer.state_dict()["param_groups"][0]["param_names"] == names
    assert optimizer.param_groups[0]["param_names"] != names


def test_each_parameter_keeps_the_dtype_that_it_has(ids):
    model, _ = trained(ids, torch.bfloat16)
    model.model.norm.float()
    grown = grow(model, "fpi", {"hidden_size": 64}).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    old = {name: p.dtype for name, p in model.named_parameters()}
    assert {name: p.dtype for name, p in grown.named_parameters()} == old


def test_llama_pro_with_freeze_trains_the_new_layers_alone(ids):
    model, optimizer = trained(ids)
    growth = grow(model, "llama_pro", {"num_hidden_layers": 4}, optimizer=optimizer, options={"freeze": True})
    weights = {name: p.detach().clone() for name, p in growth.model.named_parameters()}
    for _ in range(3):
        step(growth.model, growth.optimizer, ids)
    moved = {name for name, p in growth.model.named_parameters() if not torch.equal(p, weights[name])}
    new = {name for name in weights if name.startswith(("model.layers.1.", "model.layers.3."))}
    assert moved == new == set(growth.event["trained_parameters"])
    free = grow(model, "llama_pro", {"num_hidden_layers": 4}, optimizer=optimizer)  # the control
    step(free.model, free.optimizer, ids)
    assert "trained_parameters" not in free.event and all(p.requires_grad for p in free.model.parameters())
