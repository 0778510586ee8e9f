"""A checkpoint loads at the precision asked for, or says in one sentence why it cannot."""

import json
import shutil

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from truetune.models.attention import ATTENTION_NAME
from truetune.models.errors import ModelError
from truetune.models.fp8 import Fp8Linear
from truetune.models.load import DTYPES, check_model, keep_4bit_layout, load_model, load_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama_config(**overrides):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **overrides})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(path)
    return path


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint for a test to break."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def edit_config(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def packed_batch():
    ids = torch.tensor([[5, 9, 11, 7, 23, 4, 8]], device=DEVICE)
    cu_seq_lens = torch.tensor([0, 4, 7], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=DEVICE)
    lengths = {"max_length_q": 4, "max_length_k": 4, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    return {"input_ids": ids, "position_ids": positions, "use_cache": False, **lengths}


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", DTYPES)
def test_weights_have_the_precision_asked_for(checkpoint, precision):
    model = load_model(checkpoint, precision)
    saved = load_file(checkpoint / "model.safetensors")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[precision]}
    assert torch.equal(weight.cpu(), saved["model.layers.0.mlp.up_proj.weight"].to(DTYPES[precision]))
    assert model.device.type == DEVICE
    assert model.config._attn_implementation == ATTENTION_NAME


def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu(checkpoint):
    assert load_model(checkpoint).dtype == (torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def test_nf4_is_double_quantized_and_leaves_head_and_embedding(checkpoint):
    model = load_model(checkpoint, "nf4")
    compute = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 14
    for linear in linears:
        assert isinstance(linear, Linear4bit)
        assert linear.compute_dtype == compute
        assert linear.weight.quant_state.quant_type == "nf4"
        assert linear.weight.quant_state.nested
    assert not isinstance(model.lm_head, Linear4bit)
    assert model.dtype == compute
    assert model.config._attn_implementation == ATTENTION_NAME


def test_an_adapter_learns_on_nf4_weights(checkpoint):
    model = get_peft_model(load_model(checkpoint, "nf4"), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = packed_batch()
    losses = []
    for _ in range(20):
        logits = model(**batch).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def repacking_cpu(monkeypatch):
    """What bitsandbytes does on a CPU with AVX512-BF16, on any CPU."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def test_an_evaluation_leaves_nf4_weights_trainable_on_every_cpu(checkpoint, repacking_cpu):
    model = get_peft_model(load_model(checkpoint, "nf4"), LoraConfig(r=4, target_modules="all-linear"))
    batch = packed_batch()

    def gradients():
        model.train()
        model(**batch).logits.square().sum().backward()
        made = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        return made

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(**batch)
    for a, b in zip(before, gradients(), strict=True):
        assert torch.equal(a, b)


def test_weights_already_repacked_for_inference_are_refused(checkpoint, repacking_cpu):
    model = load_model(checkpoint, "nf4")
    keep_4bit_layout(model)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj were repacked .*: load the model anew"):
        keep_4bit_layout(model)


def test_a_quantized_checkpoint_loads_as_it_is(checkpoint, tmp_path):
    model = load_model(checkpoint, "nf4")
    model.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        expected = model(**packed_batch()).logits
        for precision in ("auto", "nf4"):
            again = load_model(tmp_path, precision)
            assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
            assert torch.equal(again(**packed_batch()).logits, expected)
    for precision in ("bf16", "fp32"):
        with pytest.raises(ModelError, match=f"already quantized to 4 bits, and cannot be had as {precision}"):
            check_model(tmp_path, precision=precision)


def test_an_unknown_precision_is_an_error(checkpoint):
    with pytest.raises(ModelError, match="use one of auto, bf16"):
        load_model(checkpoint, "int3")


def test_fp8_replaces_the_linears_of_the_layers(checkpoint, caplog):
    model = load_model(checkpoint, "fp8")
    assert not caplog.records
    assert type(model.model.layers[0].mlp.up_proj) is Fp8Linear
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.isfinite(model(**packed_batch()).logits).all()


def test_what_fp8_leaves_as_it_was_is_said_and_kept(tmp_path, caplog):
    transformers.LlamaForCausalLM(llama_config(intermediate_size=104)).save_pretrained(tmp_path / "odd")
    model = get_peft_model(load_model(tmp_path / "odd", "fp8"), LoraConfig(r=4, target_modules="all-linear"))
    multiples = "FP8 weights need feature counts that are multiples of 16, and this one is"
    assert caplog.messages == [
        "precision fp8 has 8 linears in FP8, 6 modules as they were "
        f"(2 gate_proj, 2 up_proj: {multiples} 104 x 64; 2 down_proj: {multiples} 64 x 104)."
    ]
    assert model.fp8_report.in_effect == "8 linears in FP8, 6 modules as they were"


def test_experts_that_fp8_leaves_as_they_were_are_named(tmp_path, caplog):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(**{**llama_config().to_dict(), **sizes, "model_type": "qwen3_moe"})
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    model = load_model(tmp_path / "moe", "fp8")
    assert "8 linears in FP8, 2 modules as they were (2 experts: Qwen3MoeExperts is no nn.Linear)." in caplog.text
    assert model.fp8_report.replaced == 8


def test_what_precision_decides_cannot_be_given_beside_it(checkpoint):
    for argument in ("dtype", "torch_dtype"):
        with pytest.raises(ModelError, match=f"{argument} cannot be given"):
            load_model(checkpoint, "bf16", **{argument: torch.float32})
    with pytest.raises(ModelError, match="quantization_config cannot be given"):
        load_model(checkpoint, "nf4", quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True))


# -- attention ---------------------------------------------------------------------------------------------------------


def test_an_attention_named_by_the_caller_stays(checkpoint):
    assert load_model(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"


def test_a_model_that_cannot_be_packed_keeps_its_own_attention_and_says_so(tmp_path, caplog):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config._attn_implementation != ATTENTION_NAME
    assert "BloomForCausalLM does not call Transformers' attention interface" in caplog.text


def test_a_tied_head_is_not_missing(tmp_path):
    transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(message, call, *args, **kwargs):
    with pytest.raises(ModelError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(caught.value).rstrip().endswith(".")


@pytest.mark.parametrize("call", [load_model, check_model])
def test_a_wrong_path_or_name_is_one_sentence(call, checkpoint, tmp_path):
    refused("does not exist: give a directory, or a Hub name", call, tmp_path / "nothing")
    refused("does not exist", call, "../nothing")
    refused("has no config.json: give a directory written by save_pretrained", call, tmp_path)
    refused("is a file: give the directory", call, checkpoint / "config.json")
    refused("neither a directory nor in the Hub's cache, and the Hub cannot be reached", call, "nobody/no-such-model")
    refused("neither a directory nor on the Hub", call, "no such name")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("is an adapter: give its base model", call, tmp_path)


@pytest.mark.parametrize("call", [load_model, check_model])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "nonesuch"}', "model type that Transformers .* does not know: update Transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', "allow it with trust_remote_code=True"),
        ('{"model_type": "t5"}', "is a t5 model, which is no causal language model"),
        (
            '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
            "saved as LlamaForSequenceClassification, which is no causal language model with its head",
        ),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}', "quantized by gptq"),
    ],
)
def test_a_wrong_configuration_is_refused_before_any_weight_is_read(call, config, message, broken):
    (broken / "model.safetensors").write_bytes(b"nothing that could be read")
    (broken / "config.json").write_text(config)
    refused(message, call, broken)


def test_nobody_is_asked_on_the_terminal_to_trust_a_checkpoint(broken, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    (broken / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}')
    refused("allow it with trust_remote_code=True", check_model, broken)


def test_weights_that_are_missing_are_an_error(broken):
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, weights, {"format": "pt"})
    refused("lacks 3 of the model's tensors, model.layers.1.mlp.down_proj.weight first", load_model, broken)
    save_file({**tensors, "lm_head.weight": torch.zeros(3, 64)}, weights, {"format": "pt"})
    refused("the weights of .* cannot be used", load_model, broken)
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("the weights of .* cannot be used", load_model, broken)
    weights.write_bytes(b"nothing that could be read")
    refused("the weights of .* cannot be used", load_model, broken)
    weights.unlink()
    refused("has no weights", load_model, broken)
    assert check_model(broken).model_type == "llama"


def test_pickled_weights_are_read_only_when_asked_for(broken):
    tensors = load_file(broken / "model.safetensors")
    torch.save(tensors, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    refused("only pickled weights, which can run code", load_model, broken)
    model = load_model(broken, "fp32", use_safetensors=False)
    assert torch.equal(model.lm_head.weight.cpu(), tensors["lm_head.weight"])


def test_a_tokenizer_is_loaded_or_refused_in_one_sentence(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("How many apples?") == tokenizer.encode("How many apples?")
    assert again.chat_template == tokenizer.chat_template
    (tmp_path / "tokenizer.json").write_text("{")
    refused("the tokenizer of .* cannot be used", load_tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    refused("has no tokenizer_config.json", load_tokenizer, tmp_path)
    refused("the Hub cannot be reached", load_tokenizer, "nobody/no-such-model")
