"""Fused layers compute what Transformers' layers compute: losses and all gradients, for every row of `families.py`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from truetune.models.attention import use_varlen_attention
from truetune.models.fp8 import replace_linears_with_fp8
from truetune.models.fuse import fuse, unfuse
from truetune.models.head import bind_fused_loss
from truetune.models.plan import fused_layers, set_activations

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 199, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
}


def make(model_type: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | MODELS[model_type] | changes)
    config._attn_implementation = "eager" if model_type == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for _name, parameter in model.named_parameters():  # norms and biases of ones and zeros would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    use_varlen_attention(model)
    return model


def packed_batch(lengths=(9, 1, 20, 5), vocab=199):
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    input_ids = torch.randint(3, vocab, (1, sum(lengths)))
    return {
        "input_ids": input_ids, "position_ids": position_ids, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
        "max_length_q": max(lengths), "max_length_k": max(lengths), "use_cache": False,
    }  # fmt: skip


def padded_batch(vocab=199):
    input_ids = torch.randint(3, vocab, (2, 12))
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}


def with_lora(model, **changes):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    logits = model(**batch).logits
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)
    loss = (logits * weight).sum()
    loss.backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(run, exact):
    """The relative errors of the logits and of every trained tensor's gradient."""
    assert run[1].keys() == exact[1].keys()
    pairs = [(run[0], exact[0]), *((run[1][name], exact[1][name]) for name in exact[1])]
    return torch.stack([(value.double() - true.double()).norm() / true.double().norm() for value, true in pairs])


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


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2"])
def test_fp8_layers_compute_what_fp8_linears_compute(model_type, recompute):
    """Fused, activations are rounded to FP8 as they are made; unfused, by each linear from bf16: the same numbers."""
    model = make(model_type).to(torch.bfloat16)
    replace_linears_with_fp8(model)
    model = with_lora(model)
    inputs = packed_batch()
    plain = loss_and_gradients(model, inputs)
    report = fuse(model)
    assert not report.left
    set_activations(fused_layers(model), "lean" if recompute else "keep")
    ours = loss_and_gradients(model, inputs)
    assert errors(ours, plain).mean() < 0.1


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_no_policy_changes_a_bit(model_type, trained):
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    fuse(model)
    inputs = packed_batch()
    runs = []
    for policy in ("keep", "lean", "offload"):
        set_activations(fused_layers(model), policy)
        runs.append(loss_and_gradients(model, inputs))
    for other in runs[1:]:
        assert torch.equal(other[0], runs[0][0])
        assert all(torch.equal(other[1][name], gradient) for name, gradient in runs[0][1].items())
