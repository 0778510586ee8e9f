"""The final norm as one kernel: nearer to fp64 than Transformers' own, in the same dtype, wherever it stands."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from models.small_models import MODELS, make, packed_batch
from truetune.models.final_norm import final_norm_forward
from truetune.models.fuse import fuse, unfuse
from truetune.models.shapes import read_model


def is_fused(norm):
    return norm.forward.__func__ is final_norm_forward


def output_and_gradients(norm, x, dy):
    x = x.clone().requires_grad_()
    norm.weight.grad = None
    y = norm(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, norm.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", MODELS)
def test_it_is_no_further_from_fp64_than_transformers_own(model_type, dtype):
    model = make(model_type).to(dtype)
    norm = model.model.norm
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 130, norm.weight.numel(), generator=generator).to(dtype) for _ in range(2))
    offset = 1.0 if model_type.startswith("gemma") else 0.0
    exact_x, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    exact_y = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + eps) * (offset + weight)
    exact_y.backward(dy.double())
    exact = exact_y.detach(), exact_x.grad, weight.grad

    plain = output_and_gradients(norm, x, dy)
    fuse(model)
    assert is_fused(norm)
    ours = output_and_gradients(norm, x, dy)
    for value, its, right in zip(ours, plain, exact, strict=True):
        assert value.dtype == its.dtype == dtype
        error, plain_error = ((v.double() - right).norm() / right.norm() for v in (value, its))
        assert error <= 1.05 * plain_error


def test_it_saves_its_input_and_a_number_a_token():
    """Transformers' own saves the input in fp32."""
    model = make("llama").to(torch.bfloat16)
    fuse(model)
    x = torch.randn(1, 50, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def remember(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model.model.norm(x)
    assert sorted(saved.values()) == sorted([2 * x.numel(), 4 * 50, 2 * model.config.hidden_size])


def test_it_comes_and_goes_with_the_layers_and_copies_have_their_own():
    model = make("llama")
    fuse(model)
    twin = copy.deepcopy(model)
    assert twin.model.norm.forward.__self__ is twin.model.norm
    unfuse(model)
    assert "forward" not in vars(model.model.norm) and is_fused(twin.model.norm)


def test_a_norm_that_peft_trains_is_fused_inside_its_wrapper():
    model = make("llama")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"], task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    fuse(model)
    wrapper = model.base_model.model.model.norm
    assert is_fused(wrapper.modules_to_save["default"])
    model(**packed_batch()).logits.sum().backward()
    assert wrapper.modules_to_save["default"].weight.grad.abs().sum() > 0
    unfuse(model)
    assert not any("forward" in vars(module) for module in wrapper.modules())


def test_what_it_does_not_know_it_leaves():
    model = make("llama")
    model.model.norm = nn.LayerNorm(model.config.hidden_size)
    assert fuse(model).reasons == ["final norm: it is a LayerNorm"]
    shape = read_model(model, torch.float32)
    assert not shape.norm_fused and shape.norm_trained
    model = make("llama")
    assert read_model(model, torch.float32).norm_fused and fuse(model).in_effect.endswith(" and the final norm")
    model = make("llama")
    model.model.norm.forward = lambda hidden_states: hidden_states
    assert fuse(model).reasons == ["final norm: its forward was replaced before"]
    assert not read_model(model, torch.float32).norm_fused
    assert fuse(make("llama").model.layers).reasons == ["final norm: there is none"]


def test_a_norm_whose_class_changes_later_is_its_own():
    model, inputs = make("llama"), packed_batch()
    fuse(model)
    expected = model(**inputs).logits
    parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_weight_and_stream_may_differ_in_dtype(model_type):
    """PEFT's trained copy of a norm is in fp32 on 4-bit weights."""
    model = make(model_type).to(torch.bfloat16)
    norm = model.model.norm.float()
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(7, norm.weight.numel(), generator=generator).bfloat16() for _ in range(2))
    plain = output_and_gradients(norm, x, dy)
    fuse(model)
    for ours, its in zip(output_and_gradients(norm, x, dy), plain, strict=True):
        assert ours.dtype == its.dtype
        torch.testing.assert_close(ours, its, rtol=2**-6, atol=2**-6)
