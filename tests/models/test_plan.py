"""The memory model is what blocks really save; the choice made from it fits, and is the fastest that does."""

import json
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from models.small_models import MODELS, SIZES, make, packed_batch, with_lora
from truetune.models import attention
from truetune.models.attention_backends import BACKENDS
from truetune.models.errors import ModelError
from truetune.models.fuse import fuse
from truetune.models.memory import (
    CHECKPOINTED,
    CHOICES,
    ON_HOST,
    StepMemory,
    layer_bytes,
    optimizer_bytes,
    possible,
    saved_tensors,
)
from truetune.models.offload import HostMemory, _Saved, on_device, pinned_buffers
from truetune.models.plan import (
    ActivationPlan,
    Rates,
    Room,
    advice,
    choose,
    fused_layers,
    layer_seconds,
    load_plan,
    set_activations,
)
from truetune.models.rates import estimated_rates
from truetune.models.shapes import quantized_bytes, read_model, why_not_planned

GIB = 2**30
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
        saved = saved_tensors(layer, shape.compute, shape.residual, choice)
        joined_output = 0 if choice in CHECKPOINTED else shape.compute * layer.query
        assert found == tokens * (sum(tensor.bytes_a_token for tensor in saved) + joined_output)


# -- what is held


def test_a_model_without_weights_weighs_what_the_loaded_one_does():
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            planned = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, tie_word_embeddings=True)).to(dtype)
        loaded = make("qwen3", tie_word_embeddings=True).to(dtype)
        shape = read_model(planned, torch.bfloat16)
        weights = sum(p.numel() * p.element_size() for p in loaded.parameters())
        buffers = sum(b.numel() * b.element_size() for b in loaded.buffers())
        assert shape.weights == pytest.approx(weights + buffers, rel=1e-3)  # the rotary table stays fp32
        assert shape.tied
        assert shape.gradients == weights


def test_nf4_is_predicted_to_the_byte(tmp_path):
    from truetune.models.load import load_model

    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = with_lora(load_model(tmp_path, "nf4"))
    with torch.device("meta"):
        planned = with_lora(AutoModelForCausalLM.from_config(config).to(loaded.dtype))
    real, predicted = read_model(loaded, torch.float32), read_model(planned, torch.float32, "nf4")
    assert predicted.weights == pytest.approx(real.weights, rel=1e-3)
    assert predicted.layers[0].made == real.layers[0].made != (0, 0)
    assert predicted.layers == tuple(replace(layer, gradients=predicted.layers[0].gradients) for layer in real.layers)
    assert 8 * quantized_bytes(4096, 14336, "nf4") / (4096 * 14336) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad"])
def test_optimizer_state_is_what_the_optimizer_allocates(name):
    parameters = [torch.nn.Parameter(torch.randn(300, 40)), torch.nn.Parameter(torch.randn(70).bfloat16())]
    classes = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    optimizer = classes.get(name, torch.optim.AdamW)(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s) and s.dim()]
    real = sum(s.numel() * s.element_size() for s in states)
    assert optimizer_bytes(name, [(p.numel(), p.element_size()) for p in parameters]) == real


def test_8_bit_and_paged_states_are_counted_as_bitsandbytes_keeps_them():
    big, small = (1 << 20, 4), (4000, 4)
    assert optimizer_bytes("adamw_8bit", [big]) == 2 * (2**20 + 4 * 2**12)
    assert optimizer_bytes("adamw_8bit", [small]) == 2 * 4 * 4000
    assert optimizer_bytes("paged_adamw_8bit", [big, small]) == 0


def test_attention_that_expands_keys_needs_more_in_its_backward_pass(llama_8b, monkeypatch):
    """FlashAttention-4 sums the gradients of 8 heads of keys and values in fp32, others make those of 32."""
    layer, tokens = llama_8b.model.layers[0], llama_8b.tokens
    expands, sums = (
        layer_bytes(replace(layer, expands_keys=it_does), "lean", tokens, 2, 2).attention_backward
        for it_does in (True, False)
    )
    assert expands - sums == 8192 * tokens
    for backend in BACKENDS:
        monkeypatch.setattr(attention, "choose_backend", lambda *_, it=backend: (it, ()))
        (layer, *_) = read_model(make("llama"), torch.bfloat16).layers
        assert layer.expands_keys is backend.expands_keys
        assert read_model(make("llama"), torch.bfloat16, packed=False).layers[0].expands_keys


@pytest.mark.parametrize(("model_type", "copies"), [("llama", 1), ("qwen3", 1), ("phi3", 2), ("olmo2", 2)])
def test_gradients_of_q_k_and_v_are_counted_as_often_as_they_are_there(model_type, copies):
    """Rotated where they lie in packs; joined where one projection made all three, or through norms of whole rows."""
    tokens = 10**6
    for packed in (True, False):
        shape = replace(read_model(make(model_type), torch.float32, packed=packed).layers[0], query=0, ranks=(0,) * 4)
        of_keys = [
            layer_bytes(replace(shape, key=key), "keep", tokens, 4, 4).attention_backward // (8 * tokens)
            for key in (0, 1)
        ]
        assert of_keys[1] - of_keys[0] == copies + (not packed)


# -- the choice


@pytest.fixture(scope="module")
def llama_8b() -> StepMemory:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = with_lora(AutoModelForCausalLM.from_config(config).to(torch.bfloat16))
        model = model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    shape = read_model(model, torch.bfloat16)
    return StepMemory(shape, tokens=16384, optimizer=optimizer_bytes("adamw_torch", shape.trained))


RATES = Rates(forward=13e-3, backward=20e-3, recompute=5e-3, attention=4e-3, host_rate=50e9, host_bytes=10**12)
SLOW_HOST = replace(RATES, host_rate=5e9)
NO_HOST = replace(RATES, host_bytes=0)
ROOMS = [Room(round(gib * GIB), 80 * GIB) for gib in (18, 22, 24, 26, 30, 35, 40, 50, 60, 70, 79, 140)]


@pytest.mark.parametrize("policy", ["auto", "offload"])
@pytest.mark.parametrize("rates", [RATES, SLOW_HOST, NO_HOST], ids=["host", "slow host", "no host"])
def test_the_choice_fits_and_more_memory_is_never_slower(llama_8b, rates, policy):
    seconds = []
    for room in ROOMS:
        choices = choose(policy, llama_8b, room, rates)
        if not room.fits(llama_8b, choices):
            others = [choose(policy, llama_8b, larger, rates) for larger in ROOMS]
            assert all(room.needed(llama_8b, choices) <= room.needed(llama_8b, other) for other in others)
            assert not seconds  # what fits once fits with more
            continue
        seconds.append(layer_seconds(llama_8b, choices, rates))
    assert len(seconds) >= 3
    assert seconds == sorted(seconds, reverse=True)
    assert choose(policy, llama_8b, ROOMS[-1], rates) == ("keep",) * 32


def test_the_choice_is_the_fastest_of_all_mixes_of_a_small_model(llama_8b):
    from itertools import product

    memory = replace(llama_8b, model=replace(llama_8b.model, layers=llama_8b.model.layers[:4]))
    kinds = tuple(choice for choice in CHOICES if choice != "offload")
    all_mixes = list(product(kinds, repeat=4))
    for rates in (RATES, SLOW_HOST, NO_HOST):
        allowed = [mix for mix in all_mixes if rates.host_bytes or not ON_HOST & set(mix)]
        for available in range(memory.peak(("lean",) * 4), memory.peak(("keep",) * 4) + GIB, GIB // 2):
            room = Room(available, 0)
            fitting = [layer_seconds(memory, mix, rates) for mix in allowed if room.fits(memory, mix)]
            if fitting:
                chosen = layer_seconds(memory, choose("auto", memory, room, rates), rates)
                assert chosen <= min(fitting) * 1.06  # three kinds in one mix are not looked at


def test_the_last_layers_keep_theirs(llama_8b):
    choices = choose("auto", llama_8b, Room(45 * GIB, 80 * GIB), NO_HOST)
    kept = choices.count("keep")
    assert 0 < kept < 32
    assert choices == ("recompute",) * (32 - kept) + ("keep",) * kept


def test_the_host_is_used_while_its_copies_hide(llama_8b):
    room = Room(60 * GIB, 80 * GIB)
    assert set(choose("auto", llama_8b, room, RATES)) == {"keep", "host"}
    assert "recompute" in choose("auto", llama_8b, room, SLOW_HOST)
    few = replace(RATES, host_bytes=10 * 2**20)  # nothing to pin
    assert set(choose("auto", llama_8b, room, few)) == {"keep", "recompute"}


@pytest.mark.parametrize("policy", ["lean", "offload", "auto"])
def test_the_host_is_not_filled(llama_8b, policy):
    room = ROOMS[7 if policy == "offload" else 3]
    for gib, pins in ((24, True), (10, True), (1, False)):
        choices = choose(policy, llama_8b, room, replace(RATES, host_bytes=gib * GIB))
        pinned = sum(layer.pinned for layer in llama_8b.of_layers(choices))
        assert pinned <= 0.8 * gib * GIB
        assert policy != "auto" or bool(pinned) == pins
    assert choose("lean", llama_8b, room, replace(RATES, host_bytes=24 * GIB)) == ("lean",) * 32
    small = choose("lean", llama_8b, room, replace(RATES, host_bytes=1 * GIB))
    assert small == ("checkpoint_host",) * 6 + ("checkpoint",) * 26  # 128 MiB each
    assert choose("lean", llama_8b, room, replace(RATES, host_bytes=1)) == ("checkpoint",) * 32


def test_fixed_policies_and_terms(llama_8b):
    room = ROOMS[3]
    assert choose("keep", llama_8b, room, RATES) == ("keep",) * 32
    assert choose("lean", llama_8b, room, RATES) == ("lean",) * 32
    assert choose("lean", llama_8b, room, SLOW_HOST) == ("checkpoint_host",) * 32
    assert choose("lean", llama_8b, room, NO_HOST) == ("checkpoint",) * 32
    mixed = ("lean",) * 10 + ("host",) * 12 + ("checkpoint",) * 10
    for choices in (("keep",) * 32, ("lean",) * 32, ("checkpoint_host",) * 32, mixed):
        terms = llama_8b.terms(choices)
        assert sum(terms.values()) == llama_8b.peak(choices)
        assert min(terms.values()) > 0
    peak = {choice: llama_8b.peak((choice,) * 32) for choice in CHOICES}
    assert peak["checkpoint_host"] < peak["lean"] < peak["host"] < peak["keep"]
    assert peak["checkpoint_host"] < peak["checkpoint"] < peak["recompute"] < peak["keep"]


def test_a_correction_scales_what_is_not_held(llama_8b):
    twice = replace(llama_8b, correction=2.0)
    keep = ("keep",) * 32
    assert twice.held == llama_8b.held
    assert twice.peak(keep) - twice.held == pytest.approx(2 * (llama_8b.peak(keep) - llama_8b.held), abs=2)


def test_the_advice_works(llama_8b):
    """What is named fits, and one more does not."""
    leanest = ("checkpoint_host",) * 32
    room = Room(round(16.5 * GIB), 0)
    assert not room.fits(llama_8b, leanest)
    text = advice("auto", llama_8b, room, RATES, 4, 4096)
    assert text.startswith("lower per_device_train_batch_size from 4 to ")
    rows = int(text.rsplit(" ", 1)[1])
    assert room.fits(replace(llama_8b, tokens=rows * 4096), leanest)
    assert not room.fits(replace(llama_8b, tokens=(rows + 1) * 4096), leanest)
    text = advice("auto", llama_8b, room, RATES, 1, 16384)
    length = int(text.rsplit(" ", 1)[1])
    assert text == f"lower max_length from 16384 to {length}"
    assert room.fits(replace(llama_8b, tokens=length), leanest)
    assert not room.fits(replace(llama_8b, tokens=length + 256), leanest)
    assert advice("keep", llama_8b, ROOMS[5], RATES, 4, 4096) == "set activation_policy to auto"
    assert advice("runs/a/activation_plan.json", llama_8b, ROOMS[5], RATES, 4, 4096) == "set activation_policy to auto"
    assert "qlora" in advice("auto", llama_8b, Room(10 * GIB, 0), RATES, 4, 4096)


@pytest.mark.parametrize("policy", ["auto", "lean"])
def test_the_advice_does_not_fill_the_host(llama_8b, policy):
    room, few = Room(round(16.5 * GIB), 0), replace(RATES, host_bytes=GIB)
    for memory in (llama_8b, replace(llama_8b, tokens=65536)):
        text = advice(policy, memory, room, few, 1, memory.tokens)
        smaller = replace(memory, tokens=int(text.rsplit(" ", 1)[1]))
        assert room.fits(smaller, choose(policy, smaller, room, few))


# -- what the host's layers have on the device ------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["hhhh", "hhkk", "kkhh", "hkhk", "khkhk", "kkkk", "hkkkhk"])
def test_what_is_on_the_device_on_its_way_is_counted(mix, monkeypatch):
    """`HostMemory` itself is asked, with the CPU in the device's place."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: MagicMock())
    host = HostMemory(torch.device("cpu"))
    sizes = [(100 + i) * (kind == "h") for i, kind in enumerate(mix)]

    def there() -> int:
        saved = [saved for layer in host._layers.values() for saved in layer.saved.values()]
        return sum(one.device_data.numel() for one in saved if one.device_data is not None)

    forward, backward, packed = [], [], {}
    for i, size in enumerate(sizes):
        with host.saving(i) if size else nullcontext():
            if size:
                data = torch.zeros(size, dtype=torch.uint8)
                host._layers[i].saved[0, size] = _Saved(data, size, [data.clone()], MagicMock())
                packed[i] = host._layers[i], i, (0, size), torch.uint8, data.shape
            forward.append(there())
    head = there()
    for i in reversed(range(len(mix))):
        if i in packed:
            host._unpack(packed[i])
        backward.append(there())
    counted = on_device(sizes)
    assert (counted.forward, counted.head, counted.after) == (forward, head, there())
    assert counted.backward == backward[::-1]


def test_a_final_norm_that_is_not_fused_has_copies_in_fp32(llama_8b):
    """Measured at the peak of 523,264 tokens: 140 KiB a token, with the 44 that the last layer had saved."""
    plain = replace(llama_8b, model=replace(llama_8b.model, norm_fused=False))
    assert plain.head()["norm backward"] / plain.tokens == 96 * 1024
    assert llama_8b.head()["norm backward"] / plain.tokens == 24 * 1024  # its input, dy and dx in bf16


@pytest.mark.parametrize("num_bytes", [2**23, 2**23 + 1, 2**26, 2**26 + 1, 5 * 2**26, 600_000 * 8192])
def test_pinned_buffers_waste_no_more_than_one_of_them_or_half(num_bytes):
    buffers = pinned_buffers(num_bytes)
    assert num_bytes <= sum(buffers) < num_bytes + min(num_bytes, 2**26)
    assert all(size.bit_count() == 1 for size in buffers)  # as PyTorch's allocator makes them anyway


def test_layers_that_keep_theirs_behind_those_on_the_host_have_their_bytes_beside_them(llama_8b):
    mix = ("lean",) * 16 + ("keep",) * 16
    size = llama_8b.of_layers(mix)[15].host
    saved = sum(layer.device for layer in llama_8b.of_layers(mix))
    head = llama_8b.held + saved + size + max(llama_8b.head().values())
    assert size and llama_8b.moments(mix)["head"] == head


@pytest.mark.parametrize("correction", [0.8, 1.2])
def test_terms_sum_to_the_peak_wherever_it_is(llama_8b, correction):
    full = replace(llama_8b.model, gradients=llama_8b.model.weights)
    for memory in (llama_8b, replace(llama_8b, model=full, tokens=256), replace(llama_8b, model=full, tokens=65536)):
        for choice in ("keep", "lean", "offload"):
            corrected = replace(memory, correction=correction)
            terms = corrected.terms((choice,) * 32)
            assert sum(terms.values()) == corrected.peak((choice,) * 32)
            assert min(terms.values()) >= 0


# -- saved plans


def test_a_plan_is_read_back(tmp_path):
    plan = ActivationPlan("auto", ("lean",) * 12 + ("keep",) * 20, 16384, round(61.2 * GIB), None, 139 * GIB)
    assert plan.in_words == "keep 20 of 32 layers, 12 lean; predicted peak 61.2 GiB of 139"
    assert plan.runs == "12 lean, 20 keep"
    plan.save(tmp_path / "plan.json")
    assert load_plan(str(tmp_path / "plan.json"), 32).choices == plan.choices
    with pytest.raises(ModelError, match="is for 32 layers, not for 28: use auto"):
        load_plan(str(tmp_path / "plan.json"), 28)
    (tmp_path / "plan.json").write_text(json.dumps({"choices": ["keep", "sometimes"]}))
    with pytest.raises(ModelError, match="'sometimes': a layer's choices are keep, host"):
        load_plan(str(tmp_path / "plan.json"), 2)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        load_plan(str(tmp_path / "plan.json"), 2)


def test_what_is_not_known_is_not_planned():
    assert why_not_planned(make("llama")) is None
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    assert why_not_planned(model) == "GPT2LMHeadModel is not an architecture that is fused"


def test_experts_are_planned_by_an_estimate():
    model = with_lora(make("qwen3_moe"), target_modules=["q_proj", "v_proj"])
    shape = read_model(model, torch.float32)
    assert [layer.intermediate > 0 for layer in shape.layers] == [False, True, False]
    assert shape.layers[0].other_mlp > 0


@pytest.fixture(scope="module")
def moe_30b() -> StepMemory:
    config = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False)
    model = with_lora(model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return StepMemory(read_model(model, torch.bfloat16), tokens=16384, optimizer=0)


@pytest.mark.parametrize("rates", [RATES, SLOW_HOST], ids=["host", "slow host"])
def test_lean_is_the_least_device_memory_with_experts_too(moe_30b, rates):
    choices = choose("lean", moe_30b, Room(130 * GIB, 140 * GIB), rates)
    assert choices == ("checkpoint_host",) * 48
    assert moe_30b.peak(choices) == min(moe_30b.peak((choice,) * 48) for choice in CHOICES)


def test_a_dense_layer_among_experts_has_all_choices():
    shapes = read_model(with_lora(make("qwen3_moe"), target_modules=["q_proj", "v_proj"]), torch.float32).layers
    assert possible(shapes, ["lean"] * 3) == ("checkpoint_host", "lean", "checkpoint_host")
    assert possible(shapes, ["recompute"] * 3) == ("keep", "recompute", "keep")
    assert possible(shapes, ["offload"] * 3) == ("offload",) * 3


def test_making_experts_again_takes_the_time_of_their_forward_pass(moe_30b):
    rates = estimated_rates(moe_30b.model, 16384, 4096, 600e12, host_rate=50e9)
    assert rates.recompute + rates.attention == pytest.approx(rates.forward)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_left_to_peft_is_not_planned(fields, device):
    with torch.device(device):
        model = with_lora(make("llama"), **fields)
    assert why_not_planned(model).startswith("the attention of LlamaDecoderLayer is not ours (")
    assert why_not_planned(with_lora(make("llama"))) is None
    assert why_not_planned(with_lora(make("qwen3_moe"))) is None  # whose experts are counted


@pytest.mark.parametrize("saved", ["mlp", "input_layernorm"])
def test_parts_that_peft_copies_are_not_planned(saved):
    assert "of LlamaDecoderLayer is not ours" in why_not_planned(with_lora(make("llama"), modules_to_save=[saved]))


def test_several_adapters_are_not_planned():
    model = with_lora(make("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert "several" in why_not_planned(model)
