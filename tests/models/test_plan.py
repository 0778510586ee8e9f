"""The memory model is what blocks really save; the choice made from it fits, and is the fastest that does."""

import dataclasses

import pytest
import torch
from models.test_fuse import MODELS, SIZES, make, packed_batch, with_lora

from truetune.models.fuse import fuse
from truetune.models.memory import CHOICES, StepMemory, read_model, saved_tensors
from truetune.models.plan import fused_layers, set_activations

FAMILIES = [name for name in MODELS if name != "qwen3_moe"]


# The CPU's attention puts the documents' outputs together, and its windows and softcaps are masks and logits: without
# them it saves one output more than a GPU's kernels do.
WITHOUT_MASKS = {name: {"sliding_window": 64} for name in ("mistral", "gemma3_text")} | {
    "gemma2": {"sliding_window": 64, "attn_logit_softcapping": None}
}


def saved_bytes(model, batch) -> list[int]:
    """Bytes that autograd really saves in each layer's forward pass; parameters and shared rotary tables left out."""
    tables, running, seen = set(), [], []

    def pack(tensor):
        if running and not (tensor.is_leaf and tensor.requires_grad) and tensor.data_ptr() not in tables:
            seen[-1][tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
        return tensor

    def begin(layer, args, kwargs):
        tables.update(table.data_ptr() for table in kwargs["position_embeddings"])
        running.append(layer)
        seen.append({})

    layers = fused_layers(model)
    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(lambda *_: running.clear()) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
    for handle in handles:
        handle.remove()
    assert output.logits.requires_grad
    return [sum(sizes.values()) for sizes in seen]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_saves_the_bytes_that_the_model_says(model_type, trained, autocast, choice):
    model = make(model_type, **WITHOUT_MASKS.get(model_type, {}))
    if trained == "lora":
        model = with_lora(model)
    fuse(model)
    set_activations(fused_layers(model), [choice] * SIZES["num_hidden_layers"])
    shape = read_model(model, torch.bfloat16 if autocast else torch.float32)
    tokens = 40
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured = saved_bytes(model, packed_batch((17, 20, 3)))
    for layer, found in zip(shape.layers, measured, strict=True):
        saved = saved_tensors(layer, shape.compute, shape.residual, choice in ("recompute", "lean"))
        joined_output = shape.compute * layer.query
        assert found == tokens * (sum(tensor.bytes_a_token for tensor in saved) + joined_output)
