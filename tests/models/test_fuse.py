"""Fused layers compute what Transformers' layers compute: losses and all gradients, for every row of `families.py`."""

import copy
import importlib
import types

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, RandLoraConfig, RoadConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from truetune.models.attention import use_varlen_attention
from truetune.models.families import FAMILIES
from truetune.models.fp8 import replace_linears_with_fp8
from truetune.models.fuse import fuse, unfuse
from truetune.models.head import bind_fused_loss
from truetune.models.load import keep_4bit_layout
from truetune.models.memory import CHOICES
from truetune.models.plan import fused_layers, set_activations
from truetune.ops import backend

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


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2", "phi3"])
def test_fp8_layers_compute_what_fp8_linears_compute(model_type, recompute):
    """Fused, activations are rounded to FP8 as they are made; unfused, by each linear from bf16: the same numbers."""
    model = make(model_type).to(torch.bfloat16)
    replace_linears_with_fp8(model)
    model = with_lora(model)
    inputs = packed_batch()
    plain = loss_and_gradients(model, inputs)
    report = fuse(model)
    assert not report.left
    set_activations(fused_layers(model), ["recompute" if recompute else "keep"] * SIZES["num_hidden_layers"])
    ours = loss_and_gradients(model, inputs)
    assert errors(ours, plain).mean() < 0.1


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
    report = assert_fused_equals_unfused(get_peft_model(model, adapter), batch)
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
    attention.forward = types.MethodType(type(attention).forward, attention)
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
