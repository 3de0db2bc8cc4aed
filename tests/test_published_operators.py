"""Approximate operators against what their papers say, worked out by hand on a few tensors."""

import pytest
import torch
from architectures import batch, model_of, wide

from tokenformer.growth import grow
from tokenformer.models import build_config, build_model


def test_aki_makes_new_units_as_the_layer_above_does_and_reads_them_as_fpi_does():
    """bert2BERT, section 3.3: W of layer l gets new outputs from layer l + 1, its inputs are split as in FPI."""
    model = model_of("qwen3")
    grown = grow(model, "aki", {"intermediate_size": 88, "hidden_size": 96}).model
    low, high = (model.model.layers[i].mlp for i in (0, 1))
    mlp = grown.model.layers[0].mlp
    for kind in ("gate_proj", "down_proj"):
        own, above = (getattr(each, kind).weight.repeat(2, 2) / 2 for each in (low, high))
        rows = len(own) // 2
        expected = torch.cat([own[:rows], above[rows:]])
        assert torch.allclose(getattr(mlp, kind).weight, expected, rtol=1e-12, atol=0)
        assert not torch.allclose(own, expected, rtol=1e-2, atol=0)  # which FPI would be
    top, last = grown.model.layers[1].mlp.up_proj.weight, high.up_proj.weight
    assert torch.allclose(top, last.repeat(2, 2) / 2, rtol=1e-12, atol=0)  # no layer above


def root_mean_squares(model):
    """Of what goes into and out of every matrix of the first layer but the scores, on the batch."""
    found, handles = {}, []
    for name, module in model.model.layers[0].named_modules():
        if name.endswith("_proj"):

            def note(module, inputs, output, name=name):
                found[f"{name} in"] = inputs[0].square().mean().sqrt().item()
                found[f"{name} out"] = output.square().mean().sqrt().item()

            handles.append(module.register_forward_hook(note))
    with torch.no_grad(), wide():
        model(batch()[0], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("source", ["copy", "random"])
@pytest.mark.parametrize("to", [{"hidden_size": 1024}, {"intermediate_size": 1024}], ids=str)
def test_sparkling_keeps_the_root_mean_square_of_activations(source, to):
    """Whatever the new channels hold; zeros, which keep the function instead, are told apart by it."""
    heads = {"num_attention_heads": 4, "head_dim": 64}
    sizes = {"vocab_size": 61, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1} | heads
    model = build_model(build_config("llama", fields=sizes), seed=0).double()
    before = root_mean_squares(model)
    after = root_mean_squares(grow(model, "sparkling", to, options={"source": source}).model)
    assert after == pytest.approx(before, rel=0.1)
    if "hidden_size" in to:
        assert root_mean_squares(grow(model, "zero", to).model) != pytest.approx(before, rel=0.1)


def test_shrink_pad_perturb_adds_noise_that_wider_sums_have_less_of():
    """As muP has it: the spread of what a matrix adds to a sum of n terms is that of a new matrix, 1 / root(n)."""
    model = build_model(build_config("llama", fields={"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 1}), 0)
    grown = grow(model, "shrink_pad_perturb", {"hidden_size": 256}, options={"shrink": 1.0}).model
    for name, share in (("self_attn.k_proj", 0.5), ("self_attn.o_proj", 1.0)):
        old, new = (each.model.layers[0].get_submodule(name).weight for each in (model, grown))
        noise = new.clone()
        noise[: old.shape[0], : old.shape[1]] -= old
        assert noise.std().item() == pytest.approx(0.5 * share * old.std().item(), rel=0.05)
    old, new = model.model.embed_tokens.weight, grown.model.embed_tokens.weight
    assert new[:, 64:].std().item() == pytest.approx(0.5 * old.std().item(), rel=0.05)
