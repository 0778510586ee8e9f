"""Whole decoder layers through the real kernels, in Triton's interpreter: families that `test_fuse.py` runs plain."""

import os

import pytest
import torch

from models.small_models import SIZES, errors, make, packed_batch, with_lora
from truetune.models.fuse import fuse
from truetune.models.head import bind_fused_loss
from truetune.models.plan import fused_layers, set_activations
from truetune.ops import backend

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="the GPU runs the kernels")


# `checkpoint` runs a layer's attention and its MLP a second time, as kernels too; the interpreter takes 0.1 s a token.
@pytest.mark.parametrize(
    ("model_type", "choice"),
    [
        ("granite", "keep"),
        ("smollm3", "checkpoint"),
        ("mistral", "keep"),
        ("qwen2", "recompute"),
        ("qwen3_moe", "checkpoint"),
    ],
)
def test_kernels_compute_what_transformers_layers_compute(model_type, choice, monkeypatch):
    model = with_lora(make(model_type))
    bind_fused_loss(model.get_base_model())
    torch.manual_seed(3)
    inputs = packed_batch((9, 1, 7, 5))
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    labels[inputs["position_ids"] == 0] = -100
    rows = (labels[0, 1:] != -100).nonzero().flatten()

    def run(**arguments):
        model.zero_grad()
        loss = model(**inputs, labels=labels, fused_loss=True, num_items=len(rows), **arguments).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    report = fuse(model)
    assert sum(report.fused.values()) == SIZES["num_hidden_layers"], report.left
    set_activations(fused_layers(model), [choice] * SIZES["num_hidden_layers"])
    monkeypatch.setattr(backend, "FORCE_KERNELS", True)
    assert errors(run(loss_rows=rows), plain).max() < 2e-5
