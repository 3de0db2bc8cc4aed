"""Sparse use and inspection: held against formulas and planted models worked by hand; nothing of the model changes."""

import copy
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import model_of, untrained, wide
from test_nested import ROWS
from test_shrink import inputs_of, run, value_of
from tiny_runs import corpus, tiny
from torch import Tensor
from transformers import PreTrainedModel

import tokenformer
from tokenformer import cli, inspect_checkpoint, runs, sparse
from tokenformer.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.curve import write_curve
from tokenformer.data import ByteTokenizer, eval_windows, load_tokenizer, prepare
from tokenformer.growth import OPERATORS, grow, load_of
from tokenformer.growth.operators import steps_of
from tokenformer.inspection import MIX_EXPERTS, Origin, numbers_of, origins, promoted, row_loads, window_starts
from tokenformer.models import build_config, build_model
from tokenformer.models.axes import size_of
from tokenformer.rows import RowTable, row_fields, row_tables
from tokenformer.sparse import group_all, group_rows, masked_to, spherical_k_means

DOCS = Path(__file__).resolve().parent.parent / "docs"
START_OF_6 = Origin("start", 0, 6)
IDS = torch.randint(1, 61, (3, 13), generator=torch.Generator().manual_seed(5))
EVERY_THETA = ["llama", "gpt2", "tokenformer", "tokenformer rms", "tokenformer gelu first", "tokenformer softmax"]
EVERY_THETA += ["tokenformer silu"]


def all_rows(model: PreTrainedModel) -> dict[str, int]:
    return {field: size_of(model.config, field) for field in row_fields(model.config)}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    with wide():
        return model(input_ids=IDS, use_cache=False).logits


def memory_at(model: PreTrainedModel, ending: str) -> RowTable:
    return next(memory for memory in row_tables(model) if memory.place.endswith(ending))


def spoken(model: PreTrainedModel, place: str, **amounts: Any) -> tuple[Tensor, Any]:
    """What a memory says of the tokens (N, C) inside `sparse`, and what that counted."""
    said: list[Tensor] = []
    with torch.no_grad(), wide(), sparse(model, **amounts) as used:
        hook = model.get_submodule(place).register_forward_hook(lambda m, x, y: said.append(y.flatten(0, 1)))
        model(input_ids=IDS, use_cache=False)
        hook.remove()
    return said[0], used


def scores_by_hand(model: PreTrainedModel, place: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of inputs x (N, C): first scores (N, n), weights (N, n), and what is added whatever the rows say (C)."""
    table = {name.removeprefix(f"{place}."): p for name, p in model.named_parameters() if name.startswith(f"{place}.")}
    if "gate_proj.weight" in table:
        gate = x @ table["gate_proj.weight"].T + table.get("gate_proj.bias", 0)
        weights = gate / (1 + torch.exp(-gate)) * (x @ table["up_proj.weight"].T + table.get("up_proj.bias", 0))
        return gate, weights, table.get("down_proj.bias", torch.zeros(()))
    if "c_fc.weight" in table:
        s = x @ table["c_fc.weight"] + table["c_fc.bias"]
        return s, F.gelu(s, approximate="tanh"), table["c_proj.bias"]
    s, scale, theta = x @ table["key"].T, model.get_submodule(place).scale, model.config.theta
    if theta == "softmax":
        weights = scale * torch.exp(s) / torch.exp(s).sum(1, keepdim=True)
    elif theta == "silu":
        weights = scale * s / (1 + torch.exp(-scale * s))
    else:
        t = s * (1 + torch.erf(s / math.sqrt(2))) / 2 if theta == "gelu_l2_norm" else s
        z = t * scale / torch.sqrt((t**2).sum(1, keepdim=True) + 1e-6 * scale**2)
        weights = z if theta == "gelu_l2_norm" else z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return s, weights * (x @ table["up"].T if "up" in table else 1), torch.zeros(())


# --- sparse use ---


@pytest.mark.parametrize("name", ROWS)
def test_where_all_rows_act_the_output_is_the_whole_model_bit_for_bit(name: str) -> None:
    model = model_of(name)
    before, rows = logits_of(model), all_rows(model)
    fewer = {field: n - 1 for field, n in rows.items()}
    for amounts, share in (({"k": rows}, 1.0), ({"groups": fewer, "top": fewer}, 1.0), ({"k": fewer}, 0.9)):
        with sparse(model, **amounts) as used:
            inside = logits_of(model)
        assert torch.equal(inside, before) == (share == 1)  # the control: one row less is another output
        assert (used.rows_share == used.flops_share == 1) if share == 1 else 0.8 < used.rows_share < 1
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("name", EVERY_THETA)
def test_the_strongest_rows_are_the_formula_worked_by_hand(name: str, k: int) -> None:
    model = model_of(name)
    memory = memory_at(model, "mlp")
    x, value = inputs_of(model, memory.place, torch.cat([IDS, IDS[:, :1]], 1)), value_of(model, memory.place).detach()
    said, _ = spoken(model, memory.place, k={memory.field: k})
    _, weights, bias = scores_by_hand(model, memory.place, x)
    by_hand, by_weight = [], []
    for w in weights.detach():
        strengths = sorted(range(len(w)), key=lambda i: -abs(float(w[i])) * float(value[i].norm()))
        heaviest = sorted(range(len(w)), key=lambda i: -abs(float(w[i])))
        by_hand.append(bias + sum(w[i] * value[i] for i in strengths[:k]))
        by_weight.append(bias + sum(w[i] * value[i] for i in heaviest[:k]))
    assert torch.allclose(said, torch.stack(by_hand), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(said, torch.stack(by_weight), rtol=1e-3)  # the control: values count too


@pytest.mark.parametrize("name", EVERY_THETA)
def test_the_best_groups_are_the_formula_worked_by_hand(name: str) -> None:
    model = model_of(name)
    memory = memory_at(model, "mlp")
    place, n, groups, top = memory.place, size_of(model.config, memory.field), 5, 2
    x, value = inputs_of(model, place, torch.cat([IDS, IDS[:, :1]], 1)), value_of(model, place).detach()
    said, used = spoken(model, place, groups={memory.field: groups}, top={memory.field: top})
    assigned = used.groups[place].tolist()
    first, weights, bias = scores_by_hand(model, place, x)
    acting, by_hand = [], []
    for s, w in zip(first.detach(), weights.detach(), strict=True):
        means = [sum(float(s[i]) for i in range(n) if assigned[i] == g) / assigned.count(g) for g in range(groups)]
        best = sorted(range(groups), key=lambda g: -means[g])[:top]
        acting.append([i for i in range(n) if assigned[i] in best])
        by_hand.append(bias + sum(w[i] * value[i] for i in acting[-1]))
    assert torch.allclose(said, torch.stack(by_hand), rtol=1e-9, atol=1e-12)
    with torch.no_grad(), wide():
        assert not torch.allclose(said, model.get_submodule(place)(x), rtol=1e-3)  # the control: all rows
    # What it takes: centroids, the rows of the groups, and for the norm the other scores or, of l2_norm_gelu, xᵀKᵀK x.
    width, keys = x.shape[1], 2 if name in ("llama", "tokenformer rms") else 1
    others = {"tokenformer": width, "tokenformer rms": width, "tokenformer gelu first": n, "tokenformer softmax": n}
    needed = sum(
        len(rows) * (keys + 1) * width + groups * width + min(n - len(rows), others.get(name, 0)) * width
        for rows in acting
    )
    layers = 2  # the other layer's memory is sparse too, and counted
    dense = layers * len(acting) * n * (keys + 1) * width
    assert used.dense_flops == dense and used.dense == layers * len(acting) * n
    assert used.chosen[place].sum() == top * len(acting)
    with torch.no_grad(), wide(), sparse(model, groups={memory.field: groups}, top={memory.field: top}) as one:
        stop = model.get_submodule(place).register_forward_hook(_stop)
        with pytest.raises(StopIteration):
            model(input_ids=IDS, use_cache=False)
        stop.remove()
    assert (one.needed_flops, one.rows) == (needed, sum(map(len, acting)))


def _stop(*_: Any) -> None:
    raise StopIteration


def test_what_the_strongest_rows_take_is_all_keys_and_their_values() -> None:
    model = model_of("llama")  # 44 rows of gate, up and value
    _, used = spoken(model, memory_at(model, "mlp").place, k=11)
    assert used.rows_share == 0.25 and used.flops_share == pytest.approx((2 + 0.25) / 3)


def test_the_model_is_as_it_was_after_use_and_after_a_mistake() -> None:
    model = model_of("tokenformer")
    before = logits_of(model)
    with pytest.raises(KeyError), sparse(model, k=1):
        assert not torch.equal(logits_of(model), before)
        raise KeyError
    assert torch.equal(logits_of(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_generation_is_sparse_token_by_token() -> None:
    model = copy.deepcopy(model_of("tokenformer", torch.float32))
    with sparse(model, k={"ffn": 3}):
        written = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        ids = IDS[:1]
        for _ in range(6):  # each token from the whole text so far, no cache
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        dense = ids[:, :-6]
    assert torch.equal(written, ids)
    assert not torch.equal(written, model.generate(dense, max_new_tokens=6, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize(
    ("name", "amounts", "message"),
    [
        ("llama", {"k": 45}, "k: 45 is more than intermediate_size = 44"),
        ("llama", {"k": 0}, "k: 0 is not allowed; it must be a whole number from 1 to intermediate_size = 44"),
        ("llama", {"k": 0.5}, "k: 0.5 is not allowed"),
        ("tokenformer", {"k": 8}, "k: 8 is more than proj_tokens = 7; it may be given for each field"),
        ("tokenformer", {"k": {"ffn": 31}}, "k: 31 is more than ffn_tokens = 30"),
        ("tokenformer", {"k": {"fnn": 3}}, "k: fnn is no number of rows; tokenformer has qkv_tokens, proj_tokens, ffn"),
        ("tokenformer", {"k": {"hidden_size": 3}}, "k: hidden_size is no number of rows"),
        ("tokenformer", {"k": {"ffn": 3, "ffn_tokens": 3}}, "k: ffn_tokens is given twice"),
        ("tokenformer", {"k": {}}, "k: no memory is named"),
        ("llama", {}, "give either k, or groups and top"),
        ("llama", {"k": 3, "groups": 4, "top": 1}, "give either k, or groups and top"),
        ("llama", {"groups": 4}, "give either k, or groups and top"),
        ("llama", {"groups": 4, "top": 5}, "top: 5 is more than groups = 4"),
        ("llama", {"groups": 4, "top": 0}, "top: 0 is not allowed; it must be a whole number from 1 to groups = 4"),
        ("llama", {"groups": 45, "top": 1}, "groups: 45 is more than intermediate_size = 44"),
        ("tokenformer", {"groups": {"ffn": 4}, "top": {"qkv": 2}}, "top: is for qkv_tokens, and groups for ffn_tokens"),
        ("llama", {"groups": 4, "top": 1, "grouping": "age"}, "grouping: 'age' is not known; allowed: keys, order"),
        ("mixtral", {"k": 3}, "mixtral has no rows that could be left out one by one"),
    ],
)
def test_an_amount_that_makes_no_sense_is_refused_in_one_line(name: str, amounts: dict, message: str) -> None:
    with pytest.raises(ValueError) as told, sparse(model_of(name), **amounts):
        raise AssertionError
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_model_with_an_added_memory_is_refused() -> None:
    model = copy.deepcopy(model_of("llama"))
    memory = tokenformer.add_parameter_tokens(model, tokens=3)
    with pytest.raises(ValueError, match="is in no table of axes"), sparse(model, k=3):
        pass
    memory.remove()
    with sparse(model, k=3):  # the control
        pass


def test_no_hook_is_left_where_the_groups_of_a_memory_are_missing() -> None:
    model = model_of("llama")
    counts, groups = {"intermediate_size": 2}, group_all(model, {"intermediate_size": 4})
    with masked_to(model, counts, groups):
        assert any(module._forward_pre_hooks for module in model.modules())
    groups.popitem()
    with pytest.raises(KeyError), masked_to(model, counts, groups):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_amid_a_growth_is_refused() -> None:
    grown = grow(model_of("llama"), "masked", {"intermediate_size": 60}, options={"ramp_steps": 5}).model
    with pytest.raises(ValueError, match="carries masked"), sparse(grown, k=3):
        pass


# --- groups ---


def test_planted_clusters_of_keys_are_found_whatever_their_lengths() -> None:
    draw = torch.Generator().manual_seed(0)
    planted = torch.arange(60) % 4
    keys = F.one_hot(planted, 16).float() + 0.1 * torch.randn(60, 16, generator=draw)
    keys = keys * torch.rand(60, 1, generator=draw).add(0.05) * 10
    for seed in range(5):
        found = spherical_k_means(keys, 4, seed)
        assert len({(int(a), int(b)) for a, b in zip(planted, found, strict=True)}) == 4
        assert torch.equal(found, spherical_k_means(keys, 4, seed))
    mixed = spherical_k_means(torch.randn(60, 16, generator=draw), 4, 0)
    assert len({(int(a), int(b)) for a, b in zip(planted, mixed, strict=True)}) > 4  # the control


@pytest.mark.parametrize("count", [1, 2, 29, 30])
def test_no_group_is_empty_even_where_keys_are_alike_or_zero(count: int) -> None:
    keys = torch.cat([torch.zeros(10, 8), torch.ones(10, 8), torch.randn(10, 8)])
    assert spherical_k_means(keys, count, 0).unique().tolist() == list(range(count))
    model = model_of("tokenformer")
    blocks = group_rows(model, memory_at(model, "mlp"), count, "order")
    sizes = torch.bincount(blocks)
    assert len(sizes) == count and torch.equal(blocks, blocks.sort().values) and sizes.max() - sizes.min() <= 1


# --- the load in numbers ---


def test_load_numbers_are_those_worked_by_hand() -> None:
    even, half, none = load_of(torch.full((200,), 3)), load_of(torch.tensor([5, 5, 0, 0])), load_of(torch.zeros(7))
    assert even == pytest.approx({"entropy": 1, "effective": 200, "winner": 1, "top_share": 0.01, "dead": 0})
    assert half == pytest.approx({"entropy": 0.5, "effective": 2, "winner": 2, "top_share": 0.5, "dead": 2})
    assert none == {"entropy": 0, "effective": 0, "winner": 0, "top_share": 0, "dead": 7}
    assert load_of(torch.tensor([4])) == pytest.approx(
        {"entropy": 0, "effective": 1, "winner": 1, "top_share": 1, "dead": 0}
    )
    uneven = load_of(torch.tensor([1, 2, 1]))  # shares 1/4, 1/2, 1/4: 1.5 bits
    assert uneven["entropy"] == pytest.approx(1.5 * math.log(2) / math.log(3)) and uneven["winner"] == 1.5
    assert uneven["effective"] == pytest.approx(2**1.5)


@pytest.mark.parametrize("name", EVERY_THETA)
def test_row_loads_are_those_counted_by_hand(name: str) -> None:
    model = model_of(name)
    memory = memory_at(model, "mlp")
    parts, k, value = [IDS[:2], IDS[2:], IDS[:1, :5]], 4, value_of(model, memory.place).detach()
    with wide():
        found = row_loads(model, parts, {memory.field: k}, contexts=2)[memory.place]
        tenth = row_loads(model, parts)[memory.place]
    weights = torch.cat(
        [scores_by_hand(model, memory.place, inputs_of(model, memory.place, part))[1].detach() for part in parts]
    )
    loud = weights.abs() * value.norm(dim=1)
    order = loud.argsort(dim=1, descending=True)
    counts = torch.tensor([int((order[:, :k] == row).sum()) for row in range(loud.shape[1])])
    assert torch.equal(found.counts, counts) and found.tokens == 2 * 12 + 12 + 4
    assert torch.allclose(found.strength, loud.mean(0)) and torch.allclose(found.loudest, loud.amax(0))
    assert tenth.k == round(loud.shape[1] / 10)
    ids, starts = window_starts(parts)
    assert ids.tolist() == [*IDS[0, :12], *IDS[1, :12], *IDS[2, :12], *IDS[0, :4]]
    assert starts.unique().tolist() == [0, 12, 24, 36]
    for row in range(0, loud.shape[1], 5):
        best = loud[:, row].argsort(descending=True)[:2]
        assert torch.allclose(loud[found.places[row], row], loud[best, row])  # equal tokens may be as loud
        assert torch.allclose(found.weights[row].double(), weights[found.places[row], row], rtol=1e-5)


# --- a planted model ---


@pytest.fixture(scope="module")
def planted() -> PreTrainedModel:
    """Eight tokens, one layer in which only the feed-forward speaks: row i fires on token i alone, with weight 8, and
    promotes token i + 1; row 4 promotes token 0; rows 5 and 6 have zero keys, row 7 a zero value."""
    sizes = {"hidden_size": 8, "vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_tokens": 8}
    extra = {"theta": "relu2", "norm": "rmsnorm", "tie_word_embeddings": False, "qkv_tokens": 2, "proj_tokens": 2}
    config = build_config("tokenformer", fields=sizes | extra | {"rope_parameters": {"partial_rotary_factor": 0.5}})
    model = build_model(config, seed=0).double().eval()
    mlp: Any = model.model.layers[0].mlp
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.value.zero_()
        for table in (model.model.embed_tokens.weight, model.lm_head.weight, mlp.key):
            table.copy_(torch.eye(8))
        mlp.key[5:7] = 0
        mlp.value.copy_(torch.eye(8).roll(1, 1))
        mlp.value[4], mlp.value[7] = torch.eye(8)[0], 0
    return model


PLANTED = torch.tensor([[1, 2, 1, 3, 1, 2, 7, 6, 0], [4, 4, 1, 0, 5, 2, 3, 1, 0]])


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ({"fnn": 1}, "k: fnn is no number of rows; tokenformer has qkv_tokens, proj_tokens, ffn_tokens"),
        ({"ffn": 9}, "k: 9 is more than ffn_tokens = 8"),
        (0, "k: 0 is not allowed"),
    ],
)
def test_loads_are_asked_for_as_sparse_use_is(planted: PreTrainedModel, k: Any, message: str) -> None:
    for amount in (1, {"ffn": 1}, {"ffn_tokens": 1}):
        assert row_loads(planted, [PLANTED], amount)["model.layers.0.mlp"].k == 1
    assert row_loads(planted, [PLANTED], {"ffn": 2})["model.layers.0.mlp"].k == 2
    with pytest.raises(ValueError, match=message):
        row_loads(planted, [PLANTED], k)


def test_a_row_whose_value_is_zero_is_told_by_what_its_key_fires_on(planted: PreTrainedModel) -> None:
    text = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 7, 0], [4, 4, 1, 0, 5, 7, 3, 1, 0]])
    load = row_loads(planted, [text], contexts=3)["model.layers.0.mlp"]
    ids, _ = window_starts([text])
    assert load.loudest[7] == 0 and load.loudest[6] == 0
    assert ids[load.places[7]].tolist()[:2] == [7, 7] and load.weights[7][2] == 0
    assert load.weights[7][:2].tolist() == pytest.approx([8, 8], rel=1e-4) and not load.weights[6].any()


def test_a_planted_model_is_read_as_it_was_planted(planted: PreTrainedModel) -> None:
    load = row_loads(planted, [PLANTED], {"ffn_tokens": 1, "proj_tokens": 1}, contexts=3)["model.layers.0.mlp"]
    counts = [1, 5, 3, 2, 2, 0, 0, 0]  # of the tokens 0 to 7, the last of each window aside
    assert load.counts.tolist() == counts and load.tokens == 16
    assert load.ranking.tolist() == [1, 2, 3, 4, 0, 5, 6, 7]
    numbers, old = numbers_of(load), numbers_of(load, slice(0, 3))
    assert numbers["dead"] == numbers["silent"] == 3 and numbers["winner"] == pytest.approx(5 / 13 * 8)
    entropy = -sum(c / 13 * math.log(c / 13) for c in counts if c)
    assert numbers["entropy"] == pytest.approx(entropy / math.log(8)) and numbers["load"] == 1
    assert numbers["effective"] == pytest.approx(math.exp(entropy)) and numbers["top_share"] == pytest.approx(5 / 13)
    assert old["load"] == pytest.approx(9 / 13) and old["rows"] == 3 and old["winner"] == pytest.approx(5 / 9 * 3)
    ids, _ = window_starts([PLANTED])
    for row in range(1, 5):
        fires = load.weights[row] > 0
        assert set(ids[load.places[row][fires]].tolist()) == {row} and fires.sum() == min(3, counts[row])
        assert torch.allclose(load.weights[row][fires], torch.tensor(8.0).double(), rtol=1e-4)  # sqrt(8) squared
    memory = memory_at(planted, "mlp")
    logits = promoted(planted, memory, torch.arange(8))
    assert logits[:5].argmax(1).tolist() == [1, 2, 3, 4, 0] and not logits[7].any()
    assert torch.allclose(logits[0], math.sqrt(8) * torch.eye(8, dtype=torch.float64)[1])
    with torch.no_grad(), sparse(planted, k={"ffn": 1}):  # one row says all there is to say
        kept = planted(PLANTED).logits
    assert torch.allclose(kept, planted(PLANTED).logits, atol=1e-12)
    with torch.no_grad(), sparse(planted, groups={"ffn": 8}, top={"ffn": 1}, grouping="order"):  # each row a group
        assert torch.allclose(planted(PLANTED).logits, kept, atol=1e-12)
    with torch.no_grad(), sparse(planted, groups={"ffn": 2}, top={"ffn": 1}, grouping="order"):
        blocks = planted(PLANTED[:, :1]).logits
    assert torch.allclose(blocks, planted(PLANTED[:, :1]).logits, atol=1e-12)  # tokens 1 and 4: each block one of them


@pytest.mark.parametrize("name", EVERY_THETA)
def test_what_a_value_promotes_is_its_share_in_the_logits(name: str) -> None:
    """A residual stream of nothing but the value, through the model's own last norm and head, less what biases add."""
    model = model_of(name)
    norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
    for ending in ("mlp", "o_proj"):
        for memory in [memory for memory in row_tables(model) if memory.place.endswith(ending)]:
            value = model.get_parameter(memory.value).detach()
            value = value.T if "down_proj" in memory.value else value
            with torch.no_grad(), wide():
                bias = getattr(norm, "bias", None)
                wanted = model.lm_head(norm(1e6 * value) - (0 if bias is None else bias))
            found = promoted(model, memory, torch.arange(len(value)))
            assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-9)
            assert bias is None or not torch.allclose(found, model.lm_head(norm(1e6 * value)), rtol=1e-3)


def test_rows_of_queries_keys_and_values_promote_no_tokens() -> None:
    model = model_of("tokenformer")
    for memory in row_tables(model):
        if memory.place.endswith(("q_proj", "k_proj", "v_proj")):
            with pytest.raises(ValueError, match="go into attention, not to the head"):
                promoted(model, memory, torch.arange(2))


# --- old rows and added rows ---


def test_origins_are_read_off_what_growth_and_cuts_wrote() -> None:
    model, lineage = model_of("tokenformer"), []
    for size in (40, 64):
        growth = grow(model, "zero_keys", {"ffn": size})
        model, lineage = growth.model, [*lineage, growth.event]
    start, first = Origin("start", 0, 30), Origin("zero_keys (1)", 30, 40)
    assert origins(lineage, "ffn_tokens", 64) == [start, first, Origin("zero_keys (2)", 40, 64)]
    assert origins(lineage, "qkv_tokens", 12) == [Origin("start", 0, 12)]
    assert origins(lineage, "ffn_tokens", 65) == [Origin("start", 0, 65)]  # files from elsewhere
    assert origins([], "ffn_tokens", 64) == [Origin("start", 0, 64)]
    cut = {"operator": "shrink", "from": {"ffn_tokens": 64}, "to": {"ffn_tokens": 35}}
    by_order = [*lineage, cut | {"options": {"keep": 0.5, "by": "order"}}]
    assert origins(by_order, "ffn_tokens", 35) == [start, Origin("zero_keys (1)", 30, 35)]
    by_use = [*lineage, cut | {"options": {"keep": 0.5, "by": "use"}}]
    again = {"operator": "tile", "from": {"ffn_tokens": 35}, "to": {"ffn_tokens": 70}}
    assert origins([*by_use, again], "ffn_tokens", 70) == [Origin("start", 0, 35), Origin("tile (4)", 35, 70)]
    other = {"operator": "shrink", "from": {"ffn_tokens": 64, "qkv_tokens": 12}, "options": {"keep": 0.97, "by": "use"}}
    all_kept = other | {"to": {"ffn_tokens": 64, "qkv_tokens": 11}}
    assert origins([*lineage, all_kept], "ffn_tokens", 64) == [start, first, Origin("zero_keys (2)", 40, 64)]


def test_rows_of_a_lineage_with_a_gap_count_as_a_start_up_to_it() -> None:
    first, second = ({"operator": "tile", "from": {"f": a}, "to": {"f": b}} for a, b in ((8, 16), (24, 48)))
    assert origins([first, second], "f", 48) == [Origin("start", 0, 24), Origin("tile (2)", 24, 48)]
    assert origins([first], "f", 16) == [Origin("start", 0, 8), Origin("tile (1)", 8, 16)]  # the control


def test_rows_of_a_merged_memory_are_known_by_the_lineage(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("".join(f"note {i} has {i * i % 997}\n" for i in range(9000)))
    text, memory, merged = (str(tmp_path / name) for name in ("some.txt", "memory", "merged"))
    words = ("--text", text, "--out", memory, "--merge", merged)
    few = ("--tokens", "4", "train.steps=2", "train.warmup_steps=0", "data.batch_size=2", "data.valid_tokens=128")
    assert run("adapt", str(llama), *words, *few) == 0
    model, lineage = load_checkpoint(merged)
    found = origins(lineage, "intermediate_size", model.config.intermediate_size)
    assert found == [Origin("start", 0, 24), Origin("parameter_tokens (1)", 24, 28)]


def test_every_operator_appends_rows_so_that_old_ones_keep_their_place() -> None:
    seen = set()
    for name in ROWS:
        model = model_of(name)
        for operator in OPERATORS:
            for field, axis in row_fields(model.config).items():
                old = size_of(model.config, field)
                try:
                    plans = steps_of(model.config, operator, {field: 2 * old}, 0, untrained(operator))
                except ValueError:
                    continue
                for _, _, plan in plans:
                    assert plan.maps[axis].source[:old].tolist() == list(range(old)), (name, operator)
                    seen.add(operator)
    assert {"zero_keys", "zero_values", "tile", "published", "zero", "net2wider", "lemon", "hyperclone"} <= seen


def test_old_experts_keep_their_place_but_after_operators_that_mix_them() -> None:
    lineage = [{"from": {"num_local_experts": 3}, "to": {"num_local_experts": 6}}]
    seen = set()
    for name in ("mixtral", "mistral"):
        config = model_of(name).config
        old = size_of(config, "num_local_experts")
        for operator in OPERATORS:
            try:
                [(_, _, plan)] = steps_of(config, operator, {"num_local_experts": 4 * old}, 0, untrained(operator))
            except ValueError:
                continue
            appended = name == "mixtral" and plan.maps["experts"].source[:old].tolist() == list(range(old))
            told = origins([lineage[0] | {"operator": operator}], "num_local_experts", 6)
            assert told == ([Origin("start", 0, 3), Origin(f"{operator} (1)", 3, 6)] if appended else [START_OF_6])
            seen.add((operator, appended))
    assert {("duplicate_experts", True), ("scale_experts", False), ("upcycle", False)} <= seen
    assert {operator for operator, appended in seen if not appended} == set(MIX_EXPERTS)
    assert origins([lineage[0] | {"operator": "zero+scale_experts"}], "num_local_experts", 6) == [START_OF_6]


# --- text ---


def test_tokens_are_spelled_on_one_line_whatever_their_bytes(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "bytes")
    of_bytes, of_file = ByteTokenizer(), load_tokenizer(str(tmp_path / "bytes"))
    for each in (of_bytes, of_file):
        assert each.spell("né\n".encode()) == "né\\n" and each.spell("é".encode()[:1]) == "\\xc3"
        assert each.spell(b"\\x41\x1b[0m\x00 ") == "\\\\x41\\x1b[0m\\x00 "
        assert each.spell([65, 300]) == "A<300>"
        spelled = [each.spell([i]) for i in range(256)]
        assert len(set(spelled)) == 256 and all(text.isprintable() for text in spelled)
    assert [of_bytes.spell([i]) for i in range(256)] == [of_file.spell([i]) for i in range(256)]


def test_tokens_of_sentencepiece_and_special_ones_are_spelled(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"</s>": 0, "\u2581the": 1, "<0x0A>": 2, "\u00c3": 3}, []))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert [tokenizer.spell([i]) for i in range(5)] == ["</s>", " the", "\\n", "\u00c3", "<4>"]


# --- the verb ---


@pytest.fixture(scope="module")
def trained(shared: Path) -> Path:
    """A run that grew, whose held-out text is known."""
    tokenformer.train(tiny(shared, data={"valid_tokens": 1024}), shared / "inspected run", say=None)
    return shared / "inspected run"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = build_config("llama", fields=sizes | {"vocab_size": 300, "max_position_embeddings": 64})
    return save_checkpoint(tmp_path / "llama", build_model(config, seed=0).bfloat16(), ByteTokenizer())


def test_a_run_is_inspected_old_rows_and_added_ones_apart(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    out = tmp_path / "rows.json"
    words = ("--out", str(out), "--k", "ffn=4", "--groups", "ffn=6,qkv=3", "--top", "ffn=2,qkv=1", "--rows", "2")
    assert run("inspect", str(trained), *words) == 0
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    answer = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))
    model, _ = load_checkpoint(trained)
    windows = eval_windows(prepare(tiny(shared, data={"valid_tokens": 1024}).data, 0), 16)
    dense = tokenformer.evaluate(model, windows)["bits_per_byte"]
    assert answer["sparse"]["dense"]["bits_per_byte"] == pytest.approx(dense, rel=1e-6)
    assert answer["sparse"]["dense"]["bits_per_byte"] == pytest.approx(
        runs.read_json(trained / runs.RESULT)["bits_per_byte"], rel=1e-6
    )
    with sparse(model, k={"ffn": 4}):
        few = tokenformer.evaluate(model, windows)["bits_per_byte"]
    assert answer["sparse"]["k"][0]["bits_per_byte"] == pytest.approx(few, rel=1e-6)
    assert answer["sparse"]["k"][0]["lost_bits_per_byte"] == pytest.approx(few - dense, abs=1e-6)
    assert f"{few:.4f}" in said and f"{dense:.4f}" in said
    with sparse(model, groups={"ffn": 6, "qkv": 3}, top={"ffn": 2, "qkv": 1}) as used:
        grouped = tokenformer.evaluate(model, windows)["bits_per_byte"]
    point = answer["sparse"]["groups"][0]
    assert point["bits_per_byte"] == pytest.approx(grouped, rel=1e-6) and point["flops_share"] == used.flops_share
    [mlp] = [entry for entry in answer["memories"] if entry["memory"].endswith("mlp")]
    assert [(o["name"], o["rows"]) for o in mlp["origins"]] == [("start", 16), ("zero_keys (1)", 16)]
    assert sum(mlp["counts"]) == 4 * 1024 and sum(o["load"] for o in mlp["origins"]) == pytest.approx(1)
    assert mlp["origins"][1]["load"] == pytest.approx(sum(mlp["counts"][16:]) / sum(mlp["counts"]))
    [groups] = [entry for entry in answer["groups"] if entry["memory"].endswith("mlp")]
    assert sum(groups["counts"]) == 2 * 1024 and sum(groups["sizes"]) == 32 and groups["origins"][1]["rows"] == 16
    assert len(answer["groups"]) == 4 and len(answer["memories"]) == 5 and len(answer["rows"]) == 10
    best = [entry for entry in answer["rows"] if entry["memory"].endswith("mlp")][0]
    assert best["load"] == max(mlp["counts"]) == mlp["counts"][best["row"]]
    assert best["origin"] == ("start" if best["row"] < 16 else "zero_keys (1)")
    held_out = corpus(shared).read_text()
    assert any(context["left"] + context["token"] in held_out for context in best["fires_on"])
    assert all("promotes" not in entry for entry in answer["rows"] if entry["memory"].endswith("q_proj"))
    assert "zero_keys (1)" in said and "promotes" in said and ">>" in said and said.isascii()


def test_a_llama_from_elsewhere_is_inspected_on_a_text_one_layer_of_it(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("of thïs and\tthat\n" * 60)
    assert run("inspect", str(llama), "--text", str(tmp_path / "some.txt"), "--layer", "1", "--rows", "30") == 0
    said = capsys.readouterr().out
    answer = json.loads((tmp_path / "llama.inspect.json").read_text())
    assert (tmp_path / "llama.inspect.png").exists()
    shown = os.path.relpath(tmp_path / "llama.inspect")
    assert said.endswith(f"\nnumbers: {shown}.json\npicture: {shown}.png\n")
    assert [entry["layer"] for entry in answer["memories"]] == [1] and len(answer["rows"]) == 24
    assert answer["tokens"] == 60 * 18 + 1 and answer["memories"][0]["origins"] == []
    lines = [line for line in said.splitlines() if str(tmp_path.name) not in line]  # paths are as long as they are
    assert "\\n" in said and "\\xc3" in said and max(map(len, lines)) <= 80


def test_of_a_mixture_the_load_of_its_experts_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    few = {"num_key_value_heads": 2, "vocab_size": 256, "num_local_experts": 4}
    config = build_config("mixtral", fields=sizes | few)
    growth = grow(build_model(config, seed=0), "duplicate_experts", {"num_local_experts": 8})
    save_checkpoint(tmp_path / "moe", growth.model, ByteTokenizer(), lineage=[growth.event])
    (tmp_path / "some.txt").write_text("of this and that " * 60)
    assert run("inspect", str(tmp_path / "moe"), "--text", str(tmp_path / "some.txt")) == 0
    said = capsys.readouterr().out
    experts = json.loads((tmp_path / "moe.inspect.json").read_text())["experts"]
    assert [entry["rows"] for entry in experts] == [8, 8] and "duplicate_experts (1)" in said
    assert all(sum(entry["counts"]) == entry["k"] * (60 * 17 + 1) for entry in experts)
    assert all(entry["winner"] == max(entry["counts"]) / sum(entry["counts"]) * 8 for entry in experts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "llama names no text that its run held out, so say what to score: --text PATH or --source embedded"),
        (("--text", "none.txt"), "--text none.txt: no such file or folder"),
        (("--text", "some.txt", "--k", "25"), "k: 25 is more than intermediate_size = 24"),
        (("--text", "some.txt", "--k", "0"), "k: 0 is not allowed"),
        (("--text", "some.txt", "--k", "few"), "--k few: write a whole number, or FIELD=NUMBER,..., such as ffn=64"),
        (("--text", "some.txt", "--k", "ffn=0"), "--k ffn=0: write FIELD=SIZE with a whole number from 1"),
        (("--text", "some.txt", "--groups", "4"), "--groups, --top: go together"),
        (("--text", "some.txt", "--top", "4"), "--groups, --top: go together"),
        (("--text", "some.txt", "--groups", "4", "--top", "5"), "top: 5 is more than groups = 4"),
        (("--text", "some.txt", "--layer", "2"), "--layer 2: the model has the layers 0 to 1"),
        (("--text", "some.txt", "--rows", "-1"), "--rows -1: must be 0 or more"),
        (("--text", "some.txt", "--sequence-length", "65"), "--sequence-length 65: is more than the model's"),
        (("--text", "some.txt", "--out", "."), "--out .: is a folder"),
        (("--text", "some.txt", "--out", "some.txt"), "--out some.txt: the numbers are JSON, so name a file that ends"),
        (("--text", "some.txt", "--out", "a.png"), "--out a.png: the numbers are JSON"),
        (("--text", "some.txt", "--out", "taken.json"), "--out taken.png: is a folder"),
        (("--text", "some.txt", "--out", "none/a.json"), "--out none/a.json: there is no folder none"),
        (("--text", "empty.txt"), "--text empty.txt: holds no text"),
        (("--text", "some.txt", "--k", "fnn=3"), "k: fnn is no number of rows; llama has intermediate_size"),
        (("--text", "some.txt", "--device", "tpu"), "--device = 'tpu'"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    words: tuple[str, ...],
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("of this and that " * 60)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "taken.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run("inspect", "llama", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenformer: ") and captured.err.count("\n") == 1 and message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere", "nowhere: no such checkpoint"),
        ("some.txt", "some.txt is a file; a checkpoint is a folder"),
        ("mamba2", "mamba2 has no rows that could be left out one by one; these have: tokenformer, llama"),
        ("few words", "few words: its tokenizer makes the token 116 of the text, and the model's vocab_size is 61"),
    ],
)
def test_a_checkpoint_that_cannot_be_inspected_gets_one_line(
    checkpoint: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("of this and that " * 60)
    for name, model in (("mamba2", "mamba2"), ("few words", "llama")):  # of 61 tokens each, and the tokenizer has 256
        save_checkpoint(tmp_path / name, model_of(model, torch.float32), ByteTokenizer())
    (tmp_path / "of its words.txt").write_bytes(bytes(range(1, 61)).replace(b"\r", b""))
    before = sorted(tmp_path.rglob("*"))
    assert run("inspect", checkpoint, "--text", "some.txt") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"tokenformer: {message}") and captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert run("inspect", "few words", "--text", "of its words.txt", "--rows", "0") == 0  # the control


def test_a_model_on_the_hub_is_inspected_and_its_numbers_lie_here(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(llama))
    (tmp_path / "some.txt").write_text("of this and that " * 60)
    assert run("inspect", "org/tiny", "--text", "some.txt", "--rows", "1") == 0
    assert run("inspect", "llama", "--text", "some.txt", "--rows", "1", "--out", "local.json") == 0
    found, local = (json.loads(Path(name).read_text()) for name in ("tiny.inspect.json", "local.json"))
    assert {**found, "checkpoint": ""} == {**local, "checkpoint": ""} and Path("tiny.inspect.png").exists()


@pytest.mark.parametrize(("fails", "suffix"), [("the numbers", "json"), ("the picture", "png")])
def test_numbers_and_picture_are_written_both_or_neither_and_a_full_disk_names_the_file(
    fails: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    file, line = tmp_path / "a.json", {"rows": [(1.0, 2.0, "100 %"), (0.5, 2.1, "50 %")]}
    with monkeypatch.context() as patch:
        patch.setattr({"the numbers": "json.dump", "the picture": "pathlib.Path.write_bytes"}[fails], full)
        with pytest.raises(OSError, match="No space left") as caught:
            write_curve(file, {"a": 1}, line, "share", "title")
    assert cli.one_line(caught.value) == f"{tmp_path}/a.{suffix}: No space left on device"
    assert not list(tmp_path.iterdir())
    write_curve(file, {"a": 1}, line, "share", "title")  # the control
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_at_most_so_many_tokens_are_looked_at_in_whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_checkpoint, "TOKENS", 20)
    parts = [(torch.ones(n, length + 1), torch.ones(n, length + 1)) for n, length in ((3, 6), (1, 2))]
    for given, windows in ((parts, [3, 1]), ([(parts[0][0].repeat(2, 1),) * 2, parts[1]], [3]), ([parts[1]], [1])):
        assert [len(tokens) for tokens, _ in inspect_checkpoint.first_tokens(given)] == windows
    assert [len(tokens) for tokens, _ in inspect_checkpoint.first_tokens([(torch.ones(2, 99),) * 2])] == [1]


def test_what_is_asked_of_some_memories_is_measured_at_the_shares_of_these_alone(
    trained: Path, tmp_path: Path, shared: Path
) -> None:
    words = ("--k", "ffn=6", "--groups", "ffn=8,qkv=4", "--top", "ffn=2,qkv=1", "--rows", "0")
    assert run("inspect", str(trained), *words, "--out", str(tmp_path / "rows.json")) == 0
    measured = json.loads((tmp_path / "rows.json").read_text())["sparse"]
    shares = [(point["k"]["ffn_tokens"], point["share"], point["rows_share"]) for point in measured["k"]]
    halves = [(n, n / 32, n / 32) for n in (16, 8, 4, 2, 1)]
    assert shares == [(6, None, 6 / 32), *halves] and all(list(point["k"]) == ["ffn_tokens"] for point in measured["k"])
    found = [(point["top"]["ffn_tokens"], point["top"]["qkv_tokens"], point["share"]) for point in measured["groups"]]
    assert found == [(2, 1, 0.25), (4, 2, 0.5), (1, 1, 0.125)]  # what was asked is a share itself
    lines = inspect_checkpoint.lines_of(measured, ["qkv_tokens", "proj_tokens", "ffn_tokens"])
    rows, groups = "the strongest rows of ffn_tokens", "the best groups of ffn_tokens, qkv_tokens"
    assert list(lines) == [rows, groups, f"{rows}, as asked"] and len(lines[f"{rows}, as asked"]) == 1
    assert [x for x, _, _ in lines[rows]] == [1, *(n / 32 for n in (16, 8, 4, 2, 1))]
    assert [x for x, _, _ in lines[groups]] == sorted([x for x, _, _ in lines[groups]], reverse=True)
    assert list(inspect_checkpoint.lines_of(measured, ["ffn_tokens"]))[0] == "the strongest rows"


def test_what_is_said_of_a_row_fits_and_no_escape_is_cut_in_two() -> None:
    text = "ab\\xc3\\n\\u2028\\\\c"
    ends = {inspect_checkpoint.end_of(text, room) for room in range(30)}
    cuts = (0, 1, 2, 6, 8, 14, 16, 17)  # where one sign ends and the next begins
    assert ends == {text[cut:] for cut in cuts}
    assert all(len(inspect_checkpoint.end_of(text, room)) <= room for room in range(30))
    assert inspect_checkpoint.end_of("abc", -3) == ""
    fit = inspect_checkpoint.as_many_as_fit
    assert fit(["one", "two", "three"], 8) == "one  two" and fit(["one", "two"], 7) == fit(["one", "two"], 1) == "one"


# --- the page ---


def test_the_commands_and_the_python_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "inspect.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    tokenformer (.*?)(?:\s+#.*)?$", page, re.M)
    assert len(commands) >= 3
    (tmp_path / "prose.txt").write_text(corpus(shared).read_text()[:5_000])
    small = (
        f"data.source={corpus(shared)} data.valid_fraction=0.1 data.valid_tokens=512 data.sequence_length=16 "
        "data.batch_size=2 model.hidden_size=16 model.num_hidden_layers=2 model.num_attention_heads=2 train.threads=1 "
        "model.qkv_tokens=32 model.proj_tokens=32 model.ffn_tokens=64 train.warmup_steps=1 train.steps=6"
    )
    for command in commands:
        words = shlex.split(f"{command} {small}" if command.startswith("train") else command)
        assert run(*words) == 0, (command, capsys.readouterr().err)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["used"].rows_share < 1 and len(names["loads"]) == 10


def test_sparse_is_a_public_name_that_stays_a_function() -> None:
    import tokenformer.sparse

    assert callable(tokenformer.sparse) and "sparse" in tokenformer.__all__
