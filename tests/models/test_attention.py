"""Packed documents see themselves alone; every other batch is what stock Transformers makes of it."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from truetune.models import attention, attention_backends
from truetune.models.attention import ATTENTION_NAME, attention_calls, use_varlen_attention, why_not_packable
from truetune.models.errors import ModelError

VOCAB = 64
WINDOW = 5  # shorter than the documents
LENGTHS = (9, 3, 17, 1, 6)
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": WINDOW},
    "granite": {},
    "olmo2": {},
    "smollm3": {},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS}
    | {"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 8}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
EAGER_REFERENCE = {"gemma2", "gpt_oss"}  # stock sdpa knows neither softcaps nor sinks
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def tiny_model(model_type, device="cpu", **overrides):
    """A model of the real class with weights large enough for every token to matter to every later one."""
    known = {} if model_type == "gpt2" else SMALL
    config = AutoConfig.for_model(
        model_type, **{**known, "vocab_size": VOCAB, **CONFIGS.get(model_type, {}), **overrides}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device)


def random_documents(lengths=LENGTHS, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).to(device) for length in lengths]


def pack(documents):
    lengths = [len(document) for document in documents]
    cu_seq_lens = torch.tensor([0, *lengths], device=documents[0].device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length, device=documents[0].device) for length in lengths])
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def stock(model, name):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager" if name in EAGER_REFERENCE else "sdpa")
    return model


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# -- packed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_give_logits_and_gradients_of_each_document_alone(name, device):
    model = tiny_model(name, device)
    reference = stock(model, name)
    documents = random_documents(device=device)
    assert why_not_packable(model) is None
    report = use_varlen_attention(model)
    assert report.windows == ([WINDOW] if "sliding_window" in CONFIGS[name] else [])

    alone = torch.cat([reference(document[None], use_cache=False).logits[0] for document in documents])
    before = attention_calls.copy()
    packed = model(**pack(documents), use_cache=False).logits[0]
    assert attention_calls - before == {report.in_effect: model.config.num_hidden_layers}
    assert relative_error(packed, alone) < 1e-5

    weights = torch.randn_like(alone)
    (alone * weights).sum().backward()
    (packed * weights).sum().backward()
    for (parameter_name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is not None and expected.grad.abs().max() > 1e-4:  # beneath that, both are rounding
            assert relative_error(parameter.grad, expected.grad) < 1e-4, parameter_name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_logits_of_a_packed_document_do_not_move_when_its_neighbours_change(name, dtype, device):
    model = tiny_model(name, device).to(dtype)
    use_varlen_attention(model)
    documents, others = random_documents(device=device, seed=0), random_documents(device=device, seed=1)
    others[2] = documents[2]
    start, stop = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    with torch.no_grad():
        logits, logits_of_others = (model(**pack(d), use_cache=False).logits[0] for d in (documents, others))
    assert (logits[start:stop] - logits_of_others[start:stop]).abs().max().item() == 0.0
    assert (logits[:start] - logits_of_others[:start]).abs().max().item() > 0.01


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_positions_that_restart_are_boundaries_where_none_are_given(name, use_cache):
    model = tiny_model(name)
    use_varlen_attention(model)
    batch = pack(random_documents())
    with torch.no_grad():
        given = model(**batch, use_cache=False).logits
        found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=use_cache).logits
    assert (given - found).abs().max().item() == 0.0


def test_boundaries_come_from_cu_seq_lens_before_positions():
    model = tiny_model("llama")
    reference = stock(model, "llama")
    use_varlen_attention(model)
    documents = random_documents((7, 5))
    positions = torch.arange(12)  # as an unpadded row keeps the columns it had
    with torch.no_grad():
        packed = model(**{**pack(documents), "position_ids": positions[None]}, use_cache=False).logits[0]
        alone = [
            reference(document[None], position_ids=position[None], use_cache=False).logits[0]
            for document, position in zip(documents, positions.split([7, 5]), strict=True)
        ]
    assert relative_error(packed, torch.cat(alone)) < 1e-5


def test_no_mask_is_made_for_a_pack(monkeypatch):
    def refuse(**arguments):
        raise AssertionError("a dense mask")

    models = [tiny_model(name) for name in ("llama", "mistral", "gemma3_text")]
    for model in models:
        use_varlen_attention(model)
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    for model in models:
        model(**pack(random_documents()), use_cache=False)


def test_gradient_checkpointing_recomputes_the_same_attention():
    model = tiny_model("mistral").train()
    use_varlen_attention(model)
    batch = pack(random_documents())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_decides_the_dtype_of_attention(device, monkeypatch):
    model = tiny_model("qwen3", device)  # its norms and rotary embedding give fp32 queries beside bf16 values
    reference = stock(model, "qwen3")
    use_varlen_attention(model)
    documents = random_documents(device=device)
    dtypes = set()

    def attend(q_THD, k_TGD, v_TGE, *rest):
        dtypes.update((q_THD.dtype, k_TGD.dtype, v_TGE.dtype))
        return attention_backends.attend(q_THD, k_TGD, v_TGE, *rest)

    monkeypatch.setattr(attention, "attend", attend)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        packed = model(**pack(documents), use_cache=False).logits[0]
        alone = torch.cat([reference(document[None], use_cache=False).logits[0] for document in documents])
    with torch.no_grad():
        exact = torch.cat([reference(document[None], use_cache=False).logits[0] for document in documents])
    assert dtypes == {torch.bfloat16}
    assert relative_error(packed, exact) <= 1.5 * relative_error(alone, exact)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_dropout_acts_in_training_alone(name):
    model = tiny_model(name, attention_dropout=0.5)
    use_varlen_attention(model)
    batch = pack(random_documents())

    def twice():
        return [model(**batch, use_cache=False).logits for _ in range(2)]

    with torch.no_grad():
        assert torch.equal(*twice())
        model.train()
        assert not torch.equal(*twice())


# -- every other batch -------------------------------------------------------------------------------------------------


def padded(documents, side):
    width = max(len(document) for document in documents)
    ids, mask = (
        torch.zeros(len(documents), width, dtype=torch.int64),
        torch.zeros(len(documents), width, dtype=torch.int64),
    )
    for row, document in enumerate(documents):
        columns = slice(width - len(document), None) if side == "left" else slice(None, len(document))
        ids[row, columns], mask[row, columns] = document, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("cache", [None, "static", False])
@pytest.mark.parametrize("rows", ["one", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "gemma3_text"])
def test_generate_gives_the_tokens_and_logits_of_stock_attention(name, rows, cache):
    model = tiny_model(name)
    reference = stock(model, name)
    use_varlen_attention(model)
    documents = random_documents((9, 14, 3))
    batch = {"input_ids": documents[0][None]} if rows == "one" else padded(documents, "left")
    caching = {"use_cache": False} if cache is False else {"cache_implementation": cache, "disable_compile": True}
    how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **caching}
    ours, theirs = (m.generate(**batch, eos_token_id=None, **how) for m in (model, reference))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert relative_error(torch.stack(ours.logits), torch.stack(theirs.logits)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_padded_rows_give_the_logits_of_stock_attention(name):
    model = tiny_model(name)
    reference = stock(model, name)
    use_varlen_attention(model)
    batch = padded(random_documents(), "right")
    with torch.no_grad():
        ours, theirs = (m(**batch, use_cache=False).logits for m in (model, reference))
    tokens = batch["attention_mask"].bool()
    assert relative_error(ours[tokens], theirs[tokens]) < 1e-5


def test_boundaries_beside_padding_or_several_rows_are_refused():
    model = tiny_model("llama")
    use_varlen_attention(model)
    batch = pack(random_documents())
    mask = torch.ones_like(batch["input_ids"])
    assert model(**batch, attention_mask=mask, use_cache=False).logits.shape[1] == sum(LENGTHS)
    mask[0, -1] = 0
    with pytest.raises(ModelError, match="cu_seq_lens with padding"):
        model(**batch, attention_mask=mask, use_cache=False)
    rows = {key: batch[key].repeat(2, 1) for key in ("input_ids", "position_ids")}
    with pytest.raises(ModelError, match="cu_seq_lens with padding"):
        model(**{**batch, **rows}, use_cache=False)


# -- one model ---------------------------------------------------------------------------------------------------------


def refused_models():
    return {
        "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 4}, "attention interface"),
        "falcon": ({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}, "interface"),
        "gptj": ({"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, "attention interface"),
        "mpt": ({"d_model": 32, "n_layers": 1, "n_heads": 4}, "attention interface"),
        "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "attention interface"),
        "mamba": ({"hidden_size": 32, "num_hidden_layers": 1}, "linear_attention"),
        "qwen3_next": ({**SMALL, "num_hidden_layers": 4, "num_experts": 4, **EXPERTS}, "linear_attention"),
        "lfm2": ({**SMALL, "layer_types": ["conv", "full_attention"]}, "conv"),
        "llama4_text": ({**SMALL, "num_local_experts": 2, "intermediate_size_mlp": 16}, "chunked_attention"),
        "bert": ({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "not causal"),
        "gemma3_text": ({**SMALL, "use_bidirectional_attention": True}, "both directions"),
        "phimoe": ({**SMALL, "sliding_window": WINDOW, "num_local_experts": 2}, "window of 5 tokens"),
    }


@pytest.mark.parametrize("name", refused_models())
def test_a_model_that_cannot_keep_documents_apart_is_refused(name):
    settings, cause = refused_models()[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{"vocab_size": VOCAB, **settings}))
    reason = why_not_packable(model)
    assert cause in reason
    assert type(model).__name__ in reason
    assert reason.endswith(".")
    with pytest.raises(ModelError, match="variable-length attention cannot be used"):
        use_varlen_attention(model)
    assert model.config._attn_implementation != ATTENTION_NAME


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert "encoder-decoder" in why_not_packable(transformers.T5ForConditionalGeneration(config))


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
}


def test_three_dimensional_positions_are_refused():
    config = transformers.Qwen2VLConfig(
        text_config={
            **SMALL,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    )
    assert "three-dimensional" in why_not_packable(transformers.Qwen2VLForConditionalGeneration(config))


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_the_text_tower_of_a_vision_model_packs_and_its_image_tokens_do_not(kind):
    config = transformers.Gemma3Config(
        text_config={**SMALL, "sliding_window": WINDOW, "layer_types": [kind] * 2},
        vision_config={**VISION, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    reference = stock(model, "gemma3")
    vision_had = model.config.vision_config._attn_implementation
    use_varlen_attention(model)
    assert model.config.text_config._attn_implementation == ATTENTION_NAME
    assert model.config.vision_config._attn_implementation == vision_had
    documents = random_documents()
    with torch.no_grad():
        packed = model(**pack(documents), use_cache=False).logits[0]
        alone = torch.cat([reference(document[None], use_cache=False).logits[0] for document in documents])
        assert relative_error(packed, alone) < 1e-5
        image_tokens = torch.zeros_like(pack(documents)["input_ids"])
        image_tokens[0, 12:16] = 1
        with pytest.raises(ModelError, match="cu_seq_lens with"):
            model(**pack(documents), token_type_ids=image_tokens, use_cache=False)


def test_saved_models_load_where_our_attention_is_unknown(tmp_path, monkeypatch):
    model = tiny_model("mistral")
    use_varlen_attention(model)
    model.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, ATTENTION_NAME)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert torch.isfinite(again(random_documents()[0][None]).logits).all()


def test_models_are_copied_and_pickled_with_their_attention():
    model = tiny_model("llama")
    use_varlen_attention(model)
    batch = pack(random_documents())
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.config._attn_implementation == ATTENTION_NAME
            assert torch.equal(again(**batch, use_cache=False).logits, expected)
