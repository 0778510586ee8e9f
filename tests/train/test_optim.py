"""Parameter groups: found by identity, decay kept, each tensor once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from truetune.train.errors import TrainError
from truetune.train.optim import embedding_parameters, lora_b_parameters, set_learning_rates


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def lora(tied: bool, **config):
    return get_peft_model(llama(tied), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **config))


def adamw(model):
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )


MODELS = {
    "full, untied": (lambda: llama(tied=False), 2),
    "full, tied": (lambda: llama(tied=True), 1),
    "modules_to_save, untied": (lambda: lora(False, modules_to_save=["embed_tokens", "lm_head"]), 2),
    "head alone saved": (lambda: lora(False, modules_to_save=["lm_head"]), 1),
    "token rows, tied": (lambda: lora(True, trainable_token_indices=[1, 2]), 1),
    "token rows, untied": (lambda: lora(False, trainable_token_indices={"embed_tokens": [1], "lm_head": [1]}), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_trained_embeddings_get_their_own_learning_rate(name):
    make, count = MODELS[name]
    model = make()
    optimizer = adamw(model)
    before = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    table = set_learning_rates(optimizer, model, embedding_learning_rate=5e-5)

    embeddings = {id(p) for p in embedding_parameters(model)}
    assert len(embeddings) == count
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(before)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (5e-5 if id(parameter) in embeddings else 1e-3)
            assert group["weight_decay"] == before[id(parameter)]
    line = next(line for line in table if line.name == "embeddings")
    assert (line.tensors, line.learning_rate) == (count, 5e-5)
    assert sum(line.tensors for line in table) == len(before)


def test_the_embedding_rate_reaches_the_weights():
    """With a rate of zero the embeddings stay, and everything else moves."""
    model = llama(tied=False)
    optimizer = adamw(model)
    set_learning_rates(optimizer, model, embedding_learning_rate=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    scheduler.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
    assert still == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_embedding_rate_without_trained_embeddings_is_an_error():
    model = lora(tied=False)
    with pytest.raises(TrainError, match="no embedding is trained"):
        set_learning_rates(adamw(model), model, embedding_learning_rate=1e-5)


def test_lora_on_the_embedding_is_not_a_trained_embedding():
    model = get_peft_model(llama(False), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    assert embedding_parameters(model) == []
    assert any(
        p is model.get_base_model().model.embed_tokens.lora_embedding_B["default"] for p in lora_b_parameters(model)
    )


def test_loraplus_multiplies_the_rate_of_b_matrices():
    model = lora(tied=False)
    optimizer = adamw(model)
    table = set_learning_rates(optimizer, model, loraplus_lr_ratio=16.0)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(1.6e-2 if "lora_B" in names[id(parameter)] else 1e-3)
    assert {line.name: line.tensors for line in table} == {"others": 4, "lora_B": 4}


def test_loraplus_without_lora_is_an_error():
    model = llama(tied=False)
    with pytest.raises(TrainError, match="loraplus_lr_ratio"):
        set_learning_rates(adamw(model), model, loraplus_lr_ratio=2.0)


def test_without_special_rates_the_optimizer_is_left_alone():
    model = llama(tied=True)
    optimizer = adamw(model)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    set_learning_rates(optimizer, model)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
