"""A small model of each family with batches for it, and how far apart two runs are."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from truetune.models.attention import use_varlen_attention

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 199, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPU_SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "head_dim": 128}
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
