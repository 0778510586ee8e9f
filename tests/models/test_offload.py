"""Activations on the host, on a GPU: none are mixed up where forward and backward passes do not alternate."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from truetune.models import offload
from truetune.models.attention import use_varlen_attention
from truetune.models.fuse import fuse
from truetune.models.offload import SMALLEST
from truetune.models.plan import fused_layers, set_activations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no host to go to without a GPU")
LAYERS, LENGTH = 4, 4096  # saved tensors of 8 MiB and more


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=LAYERS, **sizes)).cuda().bfloat16()
    use_varlen_attention(model)
    fuse(model)
    return model


def loss(model, seed: int, length: int = LENGTH) -> torch.Tensor:
    input_ids = torch.randint(3, 512, (1, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def gradients(model, seed: int) -> list[torch.Tensor]:
    model.zero_grad()
    loss(model, seed).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_step_after_passes_that_never_came_to_an_end_is_right(model):
    set_activations(fused_layers(model), ["keep"] * LAYERS)
    kept = gradients(model, 1)
    set_activations(fused_layers(model), ["offload"] * LAYERS)
    loss(model, 2)  # no backward pass
    broken = fused_layers(model)[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model, 3)
    broken.remove()
    for ours, exact in zip(gradients(model, 1), kept, strict=True):
        assert (ours.double() - exact.double()).norm() <= 1e-2 * exact.double().norm()  # atomic sums in attention


def test_what_lies_in_several_buffers_comes_back_whole(model, monkeypatch):
    set_activations(fused_layers(model), ["keep"] * LAYERS)
    kept = gradients(model, 1)
    monkeypatch.setattr(offload, "LARGEST_BUFFER", 3 * 2**20)  # 8 MiB are two whole ones and a part
    set_activations(fused_layers(model), ["offload"] * LAYERS)
    for seed in (2, 1):  # the second pass finds what the first one left in the buffers
        ours = gradients(model, seed)
    host = fused_layers(model)[0].activations.host
    assert {buffer.numel() for buffers in host._free.values() for buffer in buffers} == {3 * 2**20}
    for one, exact in zip(ours, kept, strict=True):
        assert (one.double() - exact.double()).norm() <= 1e-2 * exact.double().norm()  # atomic sums in attention


@pytest.mark.parametrize("choice", ["offload", "lean", "checkpoint_host"])
def test_batches_of_other_lengths_pin_no_more_memory(model, choice):
    set_activations(fused_layers(model), [choice] * LAYERS)
    loss(model, 0, 2 * LENGTH).backward()
    host = fused_layers(model)[0].activations.host

    def pinned() -> int:
        loss(model, 1).backward()  # the first layer's buffers are free again once a forward pass begins
        free = sum(buffer.numel() for buffers in host._free.values() for buffer in buffers)
        saved = [saved for layer in host._layers.values() for saved in layer.saved.values()]
        held = sum(buffer.numel() for one in saved for buffer in one.buffers)
        return free + held

    before = pinned()
    assert before > 0
    for step in range(1, 6):
        loss(model, step, 2 * LENGTH - 40 * step).backward()
        assert pinned() == before


def test_two_forward_passes_before_a_backward_pass_are_refused(model):
    set_activations(fused_layers(model), ["offload"] * LAYERS)
    both = loss(model, 1) + loss(model, 2)
    with pytest.raises(RuntimeError, match="run each backward pass before the next forward pass"):
        both.backward()


def test_rotary_tables_which_all_layers_share_stay(model):
    set_activations(fused_layers(model), ["lean"] * LAYERS)
    length = 2 * SMALLEST // 256  # of tables of 2 * 128 bytes a token
    kept = loss(model, 1, length)
    host = fused_layers(model)[0].activations.host
    sizes = {num_bytes for layer in host._layers.values() for _, num_bytes in layer.saved}
    assert sizes == {2 * 1024 * length}
    kept.backward()
