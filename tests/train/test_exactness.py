"""A step's loss and gradients are those of its documents, however it is cut into packs and micro-batches."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from truetune.data.collate import collate_documents
from truetune.train.config import SFTConfig
from truetune.train.recipe_trainer import RecipeTrainer

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "mistral": MistralConfig(**SIZE, sliding_window=8),
    "gemma2": Gemma2Config(**SIZE, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
}
# Every cut holds the same eight documents.
CUTS = {
    "one pack": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "another order": [[7, 3, 5, 1, 0, 2, 6, 4]],
    "four micro-batches": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "uneven": [[0], [1, 2, 3, 4, 5, 6], [7]],
    "one document each": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "a rank without data": [[0, 1, 2, 3, 4, 5, 6, 7], []],
}


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 17, 9, 30, 2, 21, 12, 5):
        ids = torch.randint(3, 200, (length,), generator=generator)
        supervised = torch.rand(length, generator=generator) < 0.6
        supervised[0], supervised[-1] = False, True
        made.append({"input_ids": ids.tolist(), "labels": torch.where(supervised, ids, -100).tolist()})
    return made


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_step_does_not_depend_on_how_it_is_cut(family, adapter, documents, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CONFIGS[family]
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    args = SFTConfig(
        str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_length=128, gradient_checkpointing=False
    )
    trainer = RecipeTrainer(model, args, train_dataset=Dataset.from_list(documents), processing_class=tokenizer)
    num_items = torch.tensor(sum(label != -100 for document in documents for label in document["labels"]))

    results = {}
    for name, cut in CUTS.items():
        trainer.model.zero_grad()
        loss = 0.0
        for micro_batch in cut:
            batch = collate_documents([documents[index] for index in micro_batch])
            part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
            part.backward()
            loss += float(part)
        gradients = [p.grad.flatten().double() for p in trainer.model.parameters() if p.requires_grad]
        results[name] = loss, torch.cat(gradients)

    loss, gradient = results["one document each"]
    assert gradient.norm() > 0
    for other_loss, other_gradient in results.values():
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() / gradient.norm() < 1e-5


def test_the_evaluation_loss_is_the_mean_over_tokens(documents, tokenizer, tmp_path):
    """Not over batches: batches of one document and of many give the same."""
    torch.manual_seed(0)
    config = CONFIGS["llama"]
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    data = Dataset.from_list(documents)
    losses = {}
    for pack, batch_size in [(False, 1), (False, 3), (True, 1)]:
        args = SFTConfig(
            str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to=[],
            max_length=40,
            per_device_eval_batch_size=batch_size,
            disable_tqdm=True,
        )
        trainer = RecipeTrainer(
            model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, pack=pack
        )
        losses[pack, batch_size] = trainer.evaluate()["eval_loss"]
    assert max(losses.values()) - min(losses.values()) < 1e-5 * max(losses.values())


def test_every_epoch_sees_every_document_once_in_another_order(documents, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["llama"]
    config.vocab_size = len(tokenizer)
    args = SFTConfig(
        str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to=[],
        max_length=40,
        num_train_epochs=3,
        per_device_train_batch_size=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = RecipeTrainer(
        AutoModelForCausalLM.from_config(config), args, train_dataset=Dataset.from_list(documents),
        processing_class=tokenizer,
    )  # fmt: skip
    seen: list[list[int]] = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *rest, **keywords):
        seen.append(inputs["input_ids"][0].tolist())
        return compute_loss(model, inputs, *rest, **keywords)

    trainer.compute_loss = watch
    trainer.train()
    steps = len(seen) // 3
    assert len(seen) == 3 * steps
    epochs = [seen[epoch * steps : (epoch + 1) * steps] for epoch in range(3)]
    wanted = sorted(token for document in documents for token in document["input_ids"])
    for epoch in epochs:
        assert sorted(token for batch in epoch for token in batch) == wanted
    assert epochs[0] != epochs[1] != epochs[2]
