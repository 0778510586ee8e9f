"""Gated activations against PyTorch: the error may be at most 1.5 times that of the plain path of the same dtype."""

import pytest
import torch
import transformers
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from truetune.ops.fp8 import FP8, quantize_rows_reference
from truetune.ops.swiglu import GluGrads, glu, glu_backward, glu_forward, glu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh", "gelu"]
SHAPES = [(3, 2500), (7, 133), (2, 1)]  # several tiles, of a program each and of one program's loop; one; a column


def make(device, dtype, num_tokens, width, seed=0):
    """gate, up and the gradient of their product."""
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(num_tokens, width, generator=rng) * 2).to(device, dtype) for _ in range(3)]


def run(function, gate, up, dact, activation):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    act = function(gate, up, activation)
    return act.detach(), *torch.autograd.grad(act, (gate, up), dact)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_1_5_times_that_of_plain_pytorch(device, dtype, activation, shape, empty_is_nan):
    gate, up, dact = make(device, dtype, *shape)
    ours = run(glu, gate, up, dact, activation)
    plain = run(glu_reference, gate, up, dact, activation)
    exact = run(glu_reference, gate.double(), up.double(), dact.double(), activation)
    floor = {torch.float32: 3e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]  # one rounding of the result
    for name, *values in zip(("act", "dgate", "dup"), ours, plain, exact, strict=True):
        assert values[0].dtype == dtype
        assert error(values[0], values[2]) <= max(1.5 * error(values[1], values[2]), floor), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_element_is_rounded_once(device, activation):
    """Half a unit in the last place of bf16, and not the sum of three roundings."""
    gate, up, dact = make(device, torch.bfloat16, 4, 300)
    exact = run(glu_reference, gate.double(), up.double(), dact.double(), activation)
    for value, true in zip(run(glu, gate, up, dact, activation), exact, strict=True):
        assert ((value.double() - true).abs() <= 2**-8 * true.abs() + 2e-6).all()  # PyTorch's 1 + tanh cancels


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_neither_overflow_nor_become_nan(device, activation):
    gate = torch.tensor([[-6e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 6e4]], device=device)
    up = dact = torch.ones_like(gate)
    exact = run(glu_reference, gate.double(), up.double(), dact.double(), activation)
    for value, true in zip(run(glu, gate, up, dact, activation), exact, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_buffer_become_their_gradients_and_dact_becomes_act(device, activation):
    width = 1100
    buffer = torch.full((5, 2 * width + 8), 7.0, device=device, dtype=torch.bfloat16)
    gate, up, dact = make(device, torch.bfloat16, 5, width)
    buffer[:, :width], buffer[:, width : 2 * width] = gate, up
    halves = buffer[:, :width], buffer[:, width : 2 * width]
    act, act8, scale = glu_forward(*halves, activation)
    assert act8 is None and scale is None
    assert torch.equal(act, glu(gate, up, activation))

    apart = glu_backward(dact, gate, up, activation, inplace=False)
    assert torch.equal(apart.act_TI, act)
    assert torch.equal(halves[0], gate) and torch.equal(halves[1], up)
    grads = glu_backward(dact, *halves, activation, act_out=dact)
    assert grads.dgate_TI is halves[0] and grads.dup_TI is halves[1] and grads.act_TI is dact
    assert torch.equal(halves[0], apart.dgate_TI) and torch.equal(halves[1], apart.dup_TI)
    assert torch.equal(dact, act)
    assert (buffer[:, 2 * width :] == 7.0).all()


def test_act_is_made_again_only_when_asked_for(device):
    gate, up, dact = make(device, torch.bfloat16, 3, 100)
    with_act = glu_backward(dact, gate, up, "silu", inplace=False)
    without = glu_backward(dact, gate, up, "silu", inplace=False, recompute=False)
    assert without == GluGrads(without.dgate_TI, without.dup_TI)
    assert torch.equal(with_act.dgate_TI, without.dgate_TI) and torch.equal(with_act.dup_TI, without.dup_TI)


def assert_quantized(x8, scale, x):
    expected8, expected_scale = quantize_rows_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x8.contiguous().view(torch.uint8), expected8.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [2500, 48])
def test_fp8_results_are_the_rows_of_the_results_quantized(device, dtype, width, empty_is_nan):
    gate, up, dact = make(device, dtype, 4, width)
    act, act8, scale = glu_forward(gate, up, "silu", quantize=True)
    assert torch.equal(act, glu(gate, up, "silu"))
    assert_quantized(act8, scale, act)

    plain = glu_backward(dact, gate, up, "silu", inplace=False)
    apart = glu_backward(dact, gate, up, "silu", inplace=False, quantize=True)
    both8 = torch.empty((4, 2 * width), dtype=FP8, device=device)
    together = glu_backward(dact, gate.clone(), up.clone(), "silu", quantize=True, grads8_out=both8)
    for grads in (apart, together):
        assert torch.equal(grads.dgate_TI, plain.dgate_TI) and torch.equal(grads.dup_TI, plain.dup_TI)
        assert torch.equal(grads.act_TI, plain.act_TI)
    assert apart.dgate8_TI.is_contiguous() and apart.dup8_TI.is_contiguous()
    assert_quantized(apart.dgate8_TI, apart.dgate_scale_T, plain.dgate_TI)
    assert_quantized(apart.dup8_TI, apart.dup_scale_T, plain.dup_TI)

    assert together.dgate_scale_T is together.dup_scale_T
    assert torch.equal(both8.view(torch.uint8)[:, :width], together.dgate8_TI.view(torch.uint8))
    assert torch.equal(both8.view(torch.uint8)[:, width:], together.dup8_TI.view(torch.uint8))
    assert_quantized(both8, together.dup_scale_T, torch.cat((plain.dgate_TI, plain.dup_TI), -1))


def test_no_tokens_are_no_error(device):
    gate, up, dact = make(device, torch.bfloat16, 0, 64)
    act, act8, scale = glu_forward(gate, up, "silu", quantize=True)
    assert act.shape == act8.shape == (0, 64) and scale.shape == (0,)
    grads = glu_backward(dact, gate, up, "silu", quantize=True)
    assert grads.dgate_TI.shape == grads.dup8_TI.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mlp_class", "config_class", "activation"),
    [(LlamaMLP, transformers.LlamaConfig, "silu"), (Gemma2MLP, transformers.Gemma2Config, "gelu_tanh")],
)
def test_it_is_the_activation_of_transformers_own_mlp(device, dtype, mlp_class, config_class, activation):
    torch.manual_seed(0)
    mlp = mlp_class(config_class(hidden_size=48, intermediate_size=144, num_attention_heads=4)).to(device, dtype)
    exact_mlp = mlp_class(mlp.config).to(device, torch.float64)
    exact_mlp.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 5, 48, device=device).mul(8).to(dtype)
    upstream = torch.randn_like(x)

    def gradients(module, forward):
        parameters = list(module.parameters())
        leaf = x.to(parameters[0].dtype).requires_grad_()
        y = forward(leaf)
        return y.detach(), *torch.autograd.grad(y, [leaf, *parameters], upstream.to(y.dtype))

    ours = gradients(mlp, lambda x: mlp.down_proj(glu(mlp.gate_proj(x), mlp.up_proj(x), activation)))
    for value, plain, exact in zip(ours, gradients(mlp, mlp), gradients(exact_mlp, exact_mlp), strict=True):
        assert error(value, exact) <= max(1.5 * error(plain, exact), 3e-7)
