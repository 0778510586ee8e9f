"""Fused layers compute what Transformers' layers compute: losses and all gradients, for every row of `families.py`."""

import copy

import pytest
import torch

from models.small_models import (
    GPU_SIZES,
    MODELS,
    SIZES,
    errors,
    loss_and_gradients,
    make,
    packed_batch,
    padded_batch,
    with_lora,
)
from truetune.models.attention import use_varlen_attention
from truetune.models.fp8 import Fp8Linear, replace_linears_with_fp8
from truetune.models.fuse import fuse, unfuse
from truetune.models.head import bind_fused_loss
from truetune.models.memory import CHOICES
from truetune.models.plan import fused_layers, set_activations
from truetune.ops import backend


@pytest.mark.parametrize("batch", [packed_batch, padded_batch])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", MODELS)
def test_fused_layers_compute_what_transformers_layers_compute(model_type, trained, batch):
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    inputs = batch()
    plain = loss_and_gradients(model, inputs)
    report = fuse(model)
    assert sum(report.fused.values()) == SIZES["num_hidden_layers"], report.left
    if model_type != "qwen3_moe":
        assert not report.left
    assert errors(loss_and_gradients(model, inputs), plain).max() < 2e-5  # what fp32 rounding makes of these sums
    assert unfuse(model) == SIZES["num_hidden_layers"]
    assert torch.equal(loss_and_gradients(model, inputs)[0], plain[0])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2"])
def test_kernels_get_rows_whose_elements_are_neighbours(model_type, monkeypatch):
    """Kernels look at a tensor's rows alone; these embeddings and gradients have other layouts."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = with_lora(make(model_type, num_key_value_heads=4)).to(device)
    model.get_base_model().set_attn_implementation("eager")  # whose gradient of the keys is a transposed product
    embeddings = torch.randn(1, 64, 9, device=device).transpose(1, 2)

    def run():
        model.zero_grad()
        hidden = model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True).hidden_states[2]
        hidden.sum().backward()  # an expanded gradient
        return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    fuse(model)
    monkeypatch.setattr(backend, "FORCE_KERNELS", True)
    assert errors(run(), plain).max() < 2e-5


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "fp32 under autocast"])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "qwen3_moe"])
def test_the_error_is_at_most_1_5_times_that_of_the_plain_layers(model_type, trained, autocast):
    """Experts are left out: near a tie of the router, rounding picks another expert."""
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    if not autocast:
        model.to(torch.bfloat16)
    ratios = []
    for seed in range(5):  # gradients of small models are ill-conditioned: one draw says little
        torch.manual_seed(seed)
        inputs = packed_batch()
        unfuse(model)
        exact = loss_and_gradients(copy.deepcopy(model).float(), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = loss_and_gradients(model, inputs)
            fuse(model)
            ours = loss_and_gradients(model, inputs)
        assert ours[0].dtype == plain[0].dtype
        ratios.append(errors(ours, exact).square().mean() / errors(plain, exact).square().mean())
    assert torch.stack(ratios).log().mean().exp().sqrt() <= 1.5


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", [name for name in MODELS if name != "qwen3_moe"])
def test_the_last_layer_gives_only_the_rows_that_the_loss_needs(model_type, trained):
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    base = model.get_base_model() if trained == "lora" else model
    bind_fused_loss(base)
    inputs = packed_batch()
    labels = inputs["input_ids"].clone()
    labels[:, :6] = labels[:, 20:30] = -100
    labels[inputs["position_ids"] == 0] = -100
    rows = (labels[0, 1:] != -100).nonzero().flatten()
    fuse(model)
    shapes = []
    base.base_model.norm.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))

    def run(**arguments):
        model.zero_grad()
        output = model(**inputs, labels=labels, fused_loss=True, num_items=7, **arguments)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output.loss.detach(), gradients

    everywhere, only_rows = run(), run(loss_rows=rows)
    assert shapes == [labels.shape, (1, len(rows))]
    assert errors(only_rows, everywhere).max() < 2e-5


def test_a_second_derivative_is_refused():
    model = with_lora(make("llama"))
    fuse(model)
    logits = model(**packed_batch()).logits
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logits.sum(), [p for p in model.parameters() if p.requires_grad], create_graph=True)


def test_nearly_all_rows_are_not_taken_out():
    model = make("llama")
    bind_fused_loss(model)
    fuse(model)
    input_ids = torch.arange(1, 33)[None]
    shapes = []
    model.model.norm.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    for rows in (31, 30):  # of 32
        model(input_ids=input_ids, labels=input_ids, loss_rows=torch.arange(rows), num_items=rows, fused_loss=True)
    assert shapes == [32, 30]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2", "phi3"])
def test_fp8_layers_err_as_much_as_fp8_linears(model_type, recompute):
    """Fused, activations are rounded to FP8 as they are made; unfused, by each linear from bf16. A last place of bf16
    can move an E4M3 number by a sixteenth, so both are held against the same weights in fp32, and are no further from
    each other than from these. Much nearer to them than unfused would mean that something is not rounded."""
    model = make(model_type).to(torch.bfloat16)
    replace_linears_with_fp8(model)
    model, exact = with_lora(model), with_lora(make(model_type))
    values = {name: value.float() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            values[f"{name}.weight"] = module.fp8_weight.dequantize(torch.float32)
    assert not exact.load_state_dict(values, strict=False).missing_keys
    inputs = packed_batch()
    exact = loss_and_gradients(exact, inputs)
    plain = loss_and_gradients(model, inputs)
    report = fuse(model)
    assert not report.left
    set_activations(fused_layers(model), ["recompute" if recompute else "keep"] * SIZES["num_hidden_layers"])
    ours = loss_and_gradients(model, inputs)
    rounding = errors(plain, exact).mean()
    assert 1 / 1.25 < errors(ours, exact).mean() / rounding < 1.25
    assert errors(ours, plain).mean() < 1.2 * rounding


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_no_choice_changes_a_bit(model_type, trained):
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    fuse(model)
    inputs = packed_batch()
    runs = []
    for choice in CHOICES:
        set_activations(fused_layers(model), [choice] * SIZES["num_hidden_layers"])
        runs.append(loss_and_gradients(model, inputs))
    for other in runs[1:]:
        assert torch.equal(other[0], runs[0][0])
        assert all(torch.equal(other[1][name], gradient) for name, gradient in runs[0][1].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    def step(self, model, batch, labels, rows):
        model.zero_grad()
        arguments = {"labels": labels, "loss_rows": rows, "num_items": len(rows), "fused_loss": True}
        loss = model(**batch, **arguments).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def batch(self):
        batch = packed_batch((700, 33, 1200, 115))
        batch = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = batch["input_ids"].clone()
        labels[batch["position_ids"] == 0] = -100
        return batch, labels, (labels[0, 1:] != -100).nonzero().flatten()

    def model(self, model_type="qwen3", precision="bf16"):
        model = make(model_type, **GPU_SIZES).to("cuda", torch.bfloat16)
        if precision == "fp8":
            replace_linears_with_fp8(model)
        model = with_lora(model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        use_varlen_attention(model.get_base_model())
        bind_fused_loss(model.get_base_model())
        return model.train()

    @pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "recompute"])
    def test_no_choice_changes_more_than_rounding(self, choice):
        model = self.model()
        fuse(model)
        set_activations(fused_layers(model), ["keep"] * SIZES["num_hidden_layers"])
        batch = self.batch()
        kept = self.step(model, *batch)
        set_activations(fused_layers(model), [choice] * SIZES["num_hidden_layers"])
        for _ in range(2):  # the second step takes the first one's buffers
            again = self.step(model, *batch)
            assert errors(again, kept).max() < 0.02

    @pytest.mark.parametrize("precision", ["bf16", "fp8"])
    def test_the_host_never_waits_inside_a_step(self, precision):
        model = self.model(precision=precision)
        fuse(model)
        set_activations(fused_layers(model), ["keep"] * SIZES["num_hidden_layers"])
        batch = self.batch()
        self.step(model, *batch)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(model, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3", "olmo2"])
    def test_kernels_compute_what_plain_layers_compute(self, model_type):
        model = self.model(model_type)
        batch = self.batch()
        exact = self.step(copy.deepcopy(model).float(), *batch)
        plain = self.step(model, *batch)
        fuse(model)
        ours = self.step(model, *batch)
        ratio = errors(ours, exact).square().mean() / errors(plain, exact).square().mean()
        assert ratio.sqrt() <= 1.5
