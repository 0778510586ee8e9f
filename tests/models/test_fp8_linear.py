"""A model whose frozen linears are FP8 trains an adapter through PEFT, and nothing pretends that it is bf16."""

import copy
import weakref

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from truetune.models.errors import ModelError
from truetune.models.fp8 import Fp8Linear, check_adapter_on_fp8, replace_linears_with_fp8
from truetune.ops.fp8 import quantize_rows_reference
from truetune.train.config import SFTConfig
from truetune.train.trainer import SFTTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(dtype=torch.bfloat16, seed=0, **overrides):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, "attention_bias": True, **overrides})
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(DEVICE, dtype)


def token_ids():
    return torch.tensor([[5, 9, 11, 7, 23, 4, 8, 61, 2, 33]], device=DEVICE)


def train(model, steps, lr=0.02):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_linear_of_the_layers_is_replaced_and_keeps_its_place_and_bias():
    model = llama()
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = replace_linears_with_fp8(model.eval())
    assert report.replaced == 14
    assert report.left == {}
    assert report.in_effect == "14 linears in FP8"
    assert model.fp8_report is report
    for name, linear in before.items():
        module = model.get_submodule(name)
        if name == "lm_head":
            assert module is linear
            continue
        assert isinstance(module, Fp8Linear)
        assert not module.training
        assert (module.in_features, module.out_features) == (linear.in_features, linear.out_features)
        assert module.bias is linear.bias
        assert not any(p.requires_grad for n, p in module.named_parameters() if n != "bias")
        weight8, scale = quantize_rows_reference(linear.weight, powers_of_two=True)
        expected = (weight8.float() * scale[:, None]).bfloat16()
        assert torch.equal(module.dequantized(), expected)
    assert list(before["model.layers.0.mlp.up_proj"].parameters())  # what was replaced is untouched


def test_logits_are_those_of_the_bf16_model_up_to_fp8_rounding():
    model, exact = llama(), llama(torch.float32)
    with torch.no_grad():
        expected = exact(token_ids()).logits
        replace_linears_with_fp8(model)
        error = (model(token_ids()).logits.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 2**-4


def test_each_weight_is_freed_before_the_next_is_quantized(monkeypatch):
    model = llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    alive = []
    convert = Fp8Linear.from_linear.__func__

    def counting(cls, linear):
        alive.append(sum(ref() is not None for ref in weights))
        return convert(cls, linear)

    monkeypatch.setattr(Fp8Linear, "from_linear", classmethod(counting))
    replace_linears_with_fp8(model)
    assert alive == list(range(14, 0, -1))
    assert not any(ref() is not None for ref in weights)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_peft_makes_adapters_in_a_dtype_that_can_be_trained(target, autocast_adapter_dtype):
    model = llama()
    replace_linears_with_fp8(model)
    config = LoraConfig(r=4, target_modules=target)
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (14 if target == "all-linear" else 4)
    assert {p.dtype for p in trained.values()} == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    A = next(p for name, p in trained.items() if "lora_A" in name)
    assert len(A.unique()) > 100  # E4M3 has 254 finite numbers, and few of them near 0.1


def test_an_adapter_learns_is_saved_and_loads_again(tmp_path):
    model = llama()
    replace_linears_with_fp8(model)
    base = copy.deepcopy(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, 30)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter.view(torch.uint8), frozen[name].view(torch.uint8)), name
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
        with model.disable_adapter():
            assert not torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_training_follows_the_same_adapter_on_the_unquantized_model():
    curves = []
    for convert in (False, True):
        model = llama(torch.float32)
        if convert:
            replace_linears_with_fp8(model)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        curves.append(torch.tensor(train(model, 15, lr=0.01)))  # at 0.02 losses jump, and the curves are up to 6% apart
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert not torch.equal(*curves)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.01, atol=0)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_fp8_is_refused(safe):
    model = llama()
    replace_linears_with_fp8(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(AttributeError, match="nothing can be merged into it: load the model in bf16"):
        model.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA trains norms of weights"),
        ({"modules_to_save": ["up_proj"]}, r"modules_to_save trains model\.layers\.0\.mlp\.up_proj"),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save trains model\.layers\.0\.mlp"),
    ],
)
def test_what_an_adapter_wants_of_fp8_in_vain_is_refused(fields, message, tokenizer, tmp_path):
    model = llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], **fields)
    check_adapter_on_fp8(model, config)
    replace_linears_with_fp8(model)
    with pytest.raises(ModelError, match=message):
        SFTTrainer(
            model,
            SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list([{"text": "What was meant."}]),
            processing_class=tokenizer,
            peft_config=config,
        )


def test_what_is_no_linear_is_named_by_its_kind():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(4, 32, 64))

    class OwnLinear(nn.Linear):
        pass

    layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Sequential(OwnLinear(32, 32), Experts())}) for _ in range(3))
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(4, 4, 3), nn.Embedding(4, 32), layers).to(DEVICE)
    report = replace_linears_with_fp8(model)
    assert report.replaced == 1
    assert report.reasons == ["3 mlp: OwnLinear is no plain nn.Linear", "3 mlp: Experts is no nn.Linear"]


def test_casting_the_model_casts_no_part_of_the_fp8_weights():
    model = llama(torch.float32)
    replace_linears_with_fp8(model)
    layer = model.model.layers[0].mlp.up_proj
    attention = model.model.layers[0].self_attn.q_proj
    before = layer.dequantized()
    model.to(torch.bfloat16)
    assert layer.weight8_NK.dtype == layer.weight8_KN.dtype == torch.float8_e4m3fn
    assert layer.scale_1N.dtype == layer.scale_1K.dtype == torch.float32
    assert torch.equal(layer.dequantized(), before)
    assert attention.bias.dtype == torch.bfloat16
    assert model(token_ids()).logits.dtype == torch.bfloat16
    model.to("meta")
    assert layer.scale_1N.device.type == attention.bias.device.type == "meta"


def test_autocast_decides_the_dtype():
    model = llama(torch.float32)
    replace_linears_with_fp8(model)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert model.model.layers[0].mlp.up_proj(torch.randn(3, 64, device=DEVICE)).dtype == torch.bfloat16


def test_a_trained_bias_gets_its_gradient():
    layer = Fp8Linear.from_linear(nn.Linear(32, 48, device=DEVICE))
    y = layer(torch.randn(2, 3, 32, device=DEVICE))
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 1)))


def test_what_cannot_be_fp8_is_left_with_its_reason_or_refused():
    model = llama(intermediate_size=104)
    report = replace_linears_with_fp8(model, skip=("lm_head", "model.layers.1.self_attn.q_proj"))
    assert report.replaced == 7
    assert "multiples of 16, and this one is 64 x 104" in report.left["model.layers.0.mlp.down_proj"]
    assert type(model.model.layers[1].self_attn.q_proj) is nn.Linear
    assert "model.layers.1.self_attn.q_proj" not in report.left
    assert report.in_effect == "7 linears in FP8, 6 modules as they were"
    assert report.reasons == [
        f"{kinds}: FP8 weights need feature counts that are multiples of 16, and this one is {shape}"
        for kinds, shape in (("2 gate_proj, 2 up_proj", "104 x 64"), ("2 down_proj", "64 x 104"))
    ]
    with pytest.raises(ModelError, match="no linear of Sequential could be made FP8"):
        replace_linears_with_fp8(nn.Sequential(nn.Linear(16, 24)))
    with pytest.raises(ModelError, match="multiples of 16"):
        Fp8Linear.from_linear(nn.Linear(16, 24))
