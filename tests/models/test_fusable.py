"""What is fused and what is left as it is: adapters of every kind, hooks, caches, copies, layers that are not known."""

import copy
import functools
import importlib
import pickle
import types

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, RandLoraConfig, RoadConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from models.small_models import (
    MODELS,
    SIZES,
    errors,
    loss_and_gradients,
    make,
    packed_batch,
    padded_batch,
    with_lora,
)
from truetune.models.attention import ATTENTION_NAME, use_varlen_attention
from truetune.models.families import FAMILIES
from truetune.models.fuse import fuse, unfuse
from truetune.models.load import keep_4bit_layout
from truetune.models.plan import fused_layers, set_activations


def assert_fused_equals_unfused(model, inputs, fused_layers_expected=SIZES["num_hidden_layers"]):
    """Whatever the layers are just now: the same logits and gradients fused and not."""
    unfuse(model)
    plain = loss_and_gradients(model, inputs)
    report = fuse(model)
    assert sum(report.fused.values()) == fused_layers_expected
    assert errors(loss_and_gradients(model, inputs), plain).max() < 2e-5
    return report


def test_the_state_of_the_adapter_is_read_at_every_call():
    model = with_lora(make("qwen3"))
    inputs = packed_batch()
    fuse(model)

    def logits():
        with torch.no_grad():
            return model(**inputs).logits

    adapted = logits()
    with model.disable_adapter():
        base = logits()
    assert (adapted - base).abs().max() > 1e-2
    model.merge_adapter()
    assert torch.allclose(logits(), adapted, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(), adapted, atol=1e-4)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.0)
    assert torch.allclose(logits(), base, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "left to PEFT"),
        ({"lora_bias": True}, "bias"),
        ({"use_rslora": True}, None),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, None),
        ({"target_modules": ["q_proj", "down_proj"]}, None),
        ({"modules_to_save": ["input_layernorm"], "target_modules": ["q_proj"]}, "input_layernorm"),
        ({"modules_to_save": ["k_proj"], "target_modules": ["q_proj"]}, "ModulesToSaveWrapper"),
    ],
    ids=str,
)
def test_every_kind_of_adapter_is_fused_or_left_to_peft(changes, reason):
    model = with_lora(make("llama"), **changes)
    inputs = packed_batch()
    report = assert_fused_equals_unfused(model, inputs)
    assert any(reason in why for why in report.left) if reason else not report.left


def test_lora_dropout_is_another_in_every_step_and_the_same_however_it_is_recomputed():
    model = with_lora(make("qwen3"), lora_dropout=0.3)
    inputs = packed_batch()
    model.eval()  # nothing drops out
    assert not assert_fused_equals_unfused(model, inputs).left
    without = model(**inputs).logits
    model.train()
    runs = []
    for choice in ("keep", "recompute", "checkpoint"):
        set_activations(fused_layers(model), [choice] * SIZES["num_hidden_layers"])
        torch.manual_seed(0)
        runs.append(loss_and_gradients(model, inputs))
    for loss, gradients in runs[1:]:
        assert torch.equal(runs[0][0], loss)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in runs[0][1].items())
    draws = torch.stack([model(**inputs).logits.detach() for _ in range(60)])
    assert not torch.equal(draws[0], draws[1])
    unfuse(model)
    plain = torch.stack([model(**inputs).logits.detach() for _ in range(60)])
    scale = (plain.mean(0) - without).norm() + plain.std(0).norm() / 60**0.5
    assert (draws.mean(0) - plain.mean(0)).norm() < 3 * scale
    assert draws.std(0).norm().item() == pytest.approx(plain.std(0).norm().item(), rel=0.1)


def test_several_adapters_are_left_to_peft_and_one_of_them_is_not():
    model = with_lora(make("llama"))
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("second")
    inputs = packed_batch()
    assert not assert_fused_equals_unfused(model, inputs).left
    model.base_model.set_adapter(["default", "second"])
    assert any("several adapters" in why for why in assert_fused_equals_unfused(model, inputs).left)


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
        RoadConfig(target_modules=["q_proj", "down_proj"], init_weights=False),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_other_adapters_on_4bit_weights_are_no_plain_4bit_weights(adapter, tmp_path):
    """PEFT has a `Linear4bit` for each kind of adapter, and each gives the packed weight below it as its own."""
    make("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    keep_4bit_layout(model)
    use_varlen_attention(model)
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in packed_batch().items()}
    adapted = get_peft_model(model, adapter)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)  # as RandLora draws them, a final norm in fp64 moves the class's gradients by 2e-4
    report = assert_fused_equals_unfused(adapted, batch)
    assert bool(report.left) == (type(adapter) is not LoraConfig)


def test_attention_that_is_replaced_after_fusing_is_called():
    model = make("llama")
    fuse(model)
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    inputs = padded_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption" in name:
                parameter.normal_(std=0.3)
    fused = loss_and_gradients(model, inputs)
    unfuse(model)
    assert errors(fused, loss_and_gradients(model, inputs)).max() < 2e-5


def summing_attention(module, query_BHSD, key_BGSD, value_BGSD, attention_mask, **_):
    """Its gradients of queries and keys are one row, expanded over the tokens: they cannot be written to."""
    heads = query_BHSD.shape[1] // key_BGSD.shape[1]
    key_B1HD = key_BGSD.sum(2)[:, None].repeat_interleave(heads, 2)
    value_BSHD = value_BGSD.repeat_interleave(heads, 1).transpose(1, 2)
    return value_BSHD * 0.1 + query_BHSD.sum(2)[:, None] * 0.1 + key_B1HD * 0.1, None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_another_attention_may_give_gradients_that_are_views(model_type, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "summing", summing_attention)
    model = make(model_type)
    model.set_attn_implementation("summing")
    inputs = {"input_ids": packed_batch()["input_ids"], "use_cache": False}
    plain = loss_and_gradients(model, inputs)
    fuse(model)
    assert errors(loss_and_gradients(model, inputs), plain).max() < 2e-5


def watch_gradients(monkeypatch, name: str, attention) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Under the attention's name one that keeps the gradients of queries and keys, and copies of them as they came."""
    seen = []

    def watched(module, query, key, *args, **kwargs):
        for x in (query, key):
            x.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
        return attention(module, query, key, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, watched)
    return seen


def test_what_hooks_keep_of_another_attention_stays_as_it_was(monkeypatch):
    model = make("llama")
    seen = watch_gradients(monkeypatch, "watched", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("watched")
    fuse(model)
    model(input_ids=packed_batch()["input_ids"], use_cache=False).logits.sum().backward()
    assert len(seen) == 2 * SIZES["num_hidden_layers"]
    assert all(torch.equal(gradient, before) for gradient, before in seen)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_gradients_of_our_attention_are_rotated_where_they_lie(model_type, monkeypatch):
    """One copy of them less while q, k and v go backward: 10 KiB a token of an 8B model."""
    model = make(model_type)
    use_varlen_attention(model)
    fuse(model)
    seen = watch_gradients(monkeypatch, ATTENTION_NAME, ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME])
    model(**packed_batch()).logits.sum().backward()
    assert len(seen) == 2 * SIZES["num_hidden_layers"]
    assert not any(torch.equal(gradient, before) for gradient, before in seen)


def test_attention_weights_that_are_asked_for_are_given():
    model = make("qwen3")
    model.set_attn_implementation("eager")
    inputs = padded_batch()
    plain = model(**inputs, output_attentions=True).attentions
    fuse(model)
    by_argument = model(**inputs, output_attentions=True).attentions
    model.config.output_attentions = True
    for fused in (by_argument, model(**inputs).attentions):
        assert len(fused) == len(plain) == SIZES["num_hidden_layers"]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, plain, strict=True))


def test_hooks_and_replaced_forwards_are_kept():
    model = make("llama")
    inputs = packed_batch()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append("hook"))
    attention = model.model.layers[0].self_attn
    attention.forward = types.MethodType(
        lambda self, *given, **named: type(self).forward(self, *given, **named), attention
    )
    report = assert_fused_equals_unfused(model, inputs)
    assert len(seen) == 2 and len(report.left) == 2
    adapted = with_lora(make("llama"))
    adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default").register_forward_hook(
        lambda *_: seen.append("adapter")
    )
    assert len(assert_fused_equals_unfused(adapted, inputs).left) == 1
    assert seen[2:] == ["adapter", "adapter"]
    # Hooks that Transformers leaves behind when hidden states were asked for are not the user's.
    model(**inputs, output_hidden_states=True)
    assert len(fuse(model).left) == 2


def test_a_copy_of_a_fused_model_computes_with_its_own_parameters():
    model = with_lora(make("qwen3"))
    fuse(model)
    inputs = packed_batch()
    copied = copy.deepcopy(model)
    before = model(**inputs).logits
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(**inputs).logits, before)
    assert not copied(**inputs).logits.any()


def test_a_fused_model_that_was_pickled_whole_loads_as_its_class_has_it():
    model = with_lora(make("qwen3"))
    fuse(model)
    inputs = packed_batch()
    fused = model(**inputs).logits
    loaded = pickle.loads(pickle.dumps(model))
    assert unfuse(copy.deepcopy(loaded)) == 0
    loaded(**inputs).logits.sum().backward()
    loaded.zero_grad()
    plain = loaded.train()(**inputs).logits
    unfuse(model)
    assert torch.equal(plain, model(**inputs).logits)
    report = fuse(loaded)
    assert report.in_effect == fuse(model).in_effect and not report.left
    assert torch.equal(loaded(**inputs).logits, fused)


def test_every_module_has_the_mode_that_was_asked_for_and_none_is_asked_twice(monkeypatch):
    model = with_lora(make("qwen3"))
    fuse(model)
    copied, embedding = copy.deepcopy(model), model.get_input_embeddings()
    asked = []
    monkeypatch.setattr(type(embedding), "train", lambda self, mode=True: asked.append(mode))
    model.eval()
    copied.train()
    assert asked == [False] and not any(m.training for m in model.modules() if m is not embedding)
    embedding.training = False
    for _ in range(2):
        model.eval()
    assert asked == [False]
    monkeypatch.undo()
    model.train()
    fused_layers(model)[1].mlp.down_proj.eval()
    assert model.train() is model and all(module.training for module in model.modules())
    unfuse(model)
    assert "train" not in vars(model) and "train" in vars(copied)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_found_in_pytorchs_order_each_once(tied):
    model = with_lora(make("qwen3", tie_word_embeddings=tied))
    expected = list(model.parameters())
    fuse(model)
    assert all(a is b for a, b in zip(model.parameters(), expected, strict=True))
    assert list(model.parameters(recurse=False)) == []
    for parameter in expected:
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad(set_to_none=False)
    assert not any(parameter.grad.any() for parameter in expected)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in expected)
    unfuse(model)
    assert not {"parameters", "zero_grad"} & set(vars(model))


@pytest.mark.parametrize("name", ["parameters", "named_parameters"])
def test_a_class_that_has_its_own_parameters_keeps_them(name):
    def without_embedding(self, *args, **kwargs):
        found = getattr(torch.nn.Module, name)(self, *args, **kwargs)
        frozen = self.get_input_embeddings().weight
        return (one for one in found if (one if name == "parameters" else one[1]) is not frozen)

    model = make("qwen3")
    model.__class__ = type("Own", (type(model),), {name: without_embedding})
    expected = list(model.parameters())
    frozen = model.get_input_embeddings().weight
    frozen.grad = torch.ones_like(frozen)
    fuse(model)
    assert all(a is b for a, b in zip(model.parameters(), expected, strict=True))
    model.zero_grad()
    assert frozen.grad is not None


@pytest.mark.parametrize("name", ["train", "zero_grad", "parameters"])
def test_what_somebody_else_bound_to_a_model_stays(name):
    model = make("qwen3")
    own = functools.partial(getattr(model, name))
    setattr(model, name, own)
    fuse(model)
    unfuse(model)
    assert vars(model)[name] is own


def test_generation_with_a_cache_is_the_same_fused_and_not():
    model = make("qwen3").eval()
    prompt = torch.randint(3, 199, (2, 7))
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **settings)
    fuse(model)
    assert torch.equal(model.generate(prompt, **settings), plain)


def test_the_text_tower_of_a_vision_model_is_fused():
    config = AutoConfig.for_model(
        "gemma3",
        text_config=SIZES | MODELS["gemma3_text"],
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).float()
    inputs = {"input_ids": torch.randint(3, 199, (1, 12)), "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
        report = fuse(model)
        assert sum(report.fused.values()) == SIZES["num_hidden_layers"] and not report.left
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)


def test_what_is_not_known_is_left_as_it_is_and_named():
    config = AutoConfig.for_model("cohere", **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    report = fuse(model)
    assert not report.fused and report.reasons == ["3 times CohereDecoderLayer is not an architecture that is fused"]

    class PatchedMLP(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("llama")
    model.model.layers[0].mlp.__class__ = PatchedMLP
    report = assert_fused_equals_unfused(model, packed_batch())
    assert report.reasons == ["MLP of LlamaDecoderLayer: it is a PatchedMLP"]


def test_a_second_backward_pass_is_refused():
    model = make("llama")
    fuse(model)
    loss = model(**packed_batch()).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        loss.backward()


def test_every_family_names_classes_that_transformers_has():
    for path, family in FAMILIES.items():
        module = importlib.import_module(path.rpartition(".")[0])
        for part in ("DecoderLayer", "Attention", "RMSNorm", "MLP"):
            assert hasattr(module, family.class_path(part).rpartition(".")[2])
