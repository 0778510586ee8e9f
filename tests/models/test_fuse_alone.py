"""`fuse(model)` in a loop of one's own: the cache that Transformers makes by default, and models that are not known."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import truetune
from models.small_models import MODELS, SIZES, errors, loss_and_gradients, make, packed_batch, padded_batch, with_lora
from truetune.models import fuse as module
from truetune.models.plan import fused_layers, set_activations
from truetune.models.shapes import why_not_planned


@pytest.fixture
def fused_calls(monkeypatch):
    calls, run_layer = [], module.run_layer

    def counted(layer, *args):
        calls.append(layer)
        return run_layer(layer, *args)

    monkeypatch.setattr(module, "run_layer", counted)
    module._warn_of_cache.cache_clear()
    return calls


def test_the_functions_of_a_loop_of_ones_own_are_public():
    assert truetune.fuse is module.fuse and truetune.unfuse is module.unfuse


def test_a_loop_that_says_nothing_of_caches_trains_fused_layers(fused_calls):
    model = make("llama")
    truetune.fuse(model)
    input_ids = padded_batch()["input_ids"]
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert len(fused_calls) == SIZES["num_hidden_layers"]


@pytest.mark.parametrize("batch", [packed_batch, padded_batch])
@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_cache_is_filled_as_transformers_fills_it(model_type, trained, batch, fused_calls):
    """Its keys and values are part of the loss here, so that their gradients count too."""
    model = make(model_type)
    if trained == "lora":
        model = with_lora(model)
    inputs = {"use_cache": True} | {name: x for name, x in batch().items() if torch.is_tensor(x) and "cu_" not in name}

    def run():
        model.zero_grad()
        output = model(**inputs)
        entries = [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]
        sum(x.square().sum() for x in (output.logits, *entries)).backward()
        everything = torch.cat([x.flatten() for x in (output.logits, *entries)]).detach()
        return everything, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = run()
    truetune.fuse(model)
    assert errors(run(), plain).max() < 2e-5
    assert fused_calls


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_gradients_of_a_caches_entries_are_not_written_over(model_type, fused_calls):
    model = make(model_type)
    attention = model.model.layers[0].self_attn
    input_ids = padded_batch()["input_ids"][:1]

    def run():
        model.zero_grad()
        entries = model(input_ids=input_ids).past_key_values.layers[0]
        loss = (entries.keys + entries.values).square().sum()  # one tensor is the gradient of both
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in attention.named_parameters() if n[:6] in ("k_proj", "v_proj")}
        return loss.detach(), gradients

    plain = run()
    truetune.fuse(model)
    assert errors(run(), plain).max() < 2e-5
    assert fused_calls


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "smollm3"])
def test_a_filled_cache_is_read_as_transformers_reads_it(model_type, fused_calls):
    model = make(model_type)
    input_ids = padded_batch()["input_ids"]

    def run():
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:, :5], past_key_values=cache)
        return loss_and_gradients(model, {"input_ids": input_ids[:, 5:], "past_key_values": cache})

    plain = run()
    truetune.fuse(model)
    assert errors(run(), plain).max() < 2e-5
    assert fused_calls


def test_prefix_tuning_trains_fused_layers(fused_calls):
    model = get_peft_model(make("llama"), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    inputs = padded_batch()
    plain = loss_and_gradients(model, inputs)
    truetune.fuse(model)
    assert errors(loss_and_gradients(model, inputs), plain).max() < 2e-5
    assert len(fused_calls) == SIZES["num_hidden_layers"]


def test_a_cache_without_gradients_is_left_to_transformers(fused_calls):
    model = make("llama")
    truetune.fuse(model)
    with torch.no_grad():
        model(input_ids=padded_batch()["input_ids"])
    assert not fused_calls


def test_a_checkpointed_layer_does_not_fill_a_cache_twice_and_says_what_to_do(fused_calls, caplog):
    model = make("llama")
    truetune.fuse(model)
    set_activations(fused_layers(model), ["checkpoint"] * SIZES["num_hidden_layers"])
    input_ids = padded_batch()["input_ids"]
    for _ in range(2):
        output = model(input_ids=input_ids)
        output.logits.sum().backward()
        assert output.past_key_values.get_seq_length() == input_ids.shape[1]
    assert not fused_calls
    assert [record.message for record in caplog.records if record.name == module.__name__] == [
        "LlamaDecoderLayer is not fused in calls with a cache, which checkpointing would fill twice: unless it is "
        "needed, pass use_cache=False or set model.config.use_cache = False."
    ]


@pytest.mark.parametrize(
    ("model_type", "changes", "name"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "GPT2LMHeadModel"),
        ("gpt_neox", SIZES, "GPTNeoXForCausalLM"),
        ("lfm2", SIZES, "Lfm2ForCausalLM"),
    ],
)
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_model_without_known_layers_is_named(model_type, changes, name, trained):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))
    if trained == "lora":
        model = with_lora(model)
    report = truetune.fuse(model)
    assert report.in_effect == "none"
    assert report.reasons == [
        f"{name} is not an architecture that is fused: at most its attention, head and LoRA are ours"
    ]
    assert why_not_planned(model) == f"{name} is not an architecture that is fused"
