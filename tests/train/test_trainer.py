"""What the trainer does with TRL's options: ours, passed through and said so, stock TRL and said so, or refused."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, DataCollatorForLanguageModeling, LlamaForCausalLM, TrainingArguments

import truetune
from pairs import line, llama, losses
from truetune.train.batches import document_capacity, documents_each
from truetune.train.errors import TrainError
from truetune.train.stock import why_stock_trl

# -- options of TRL's that keep their meaning: tests/compat compares them all with TRL


def test_the_leak_of_wrapped_packing_is_said(make):
    trainer = make({"packing": True, "packing_strategy": "wrapped"})
    assert "see each other" in line(trainer, "batches").why


def test_a_model_named_by_its_directory_is_loaded_in_fp32(make, tokenizer, tmp_path):
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make(model=str(tmp_path / "model"), processing_class=None)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.report.fused_losses == 2


def test_args_may_be_none(tokenizer, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = truetune.SFTTrainer(llama(tokenizer), train_dataset=data, processing_class=tokenizer)
    assert isinstance(trainer.args, trl.SFTConfig)


@pytest.mark.parametrize("kind", ["trl", "transformers"])
def test_args_may_be_trls_or_transformers(kind, tokenizer, data, tmp_path):
    common = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": [], "bf16": False}
    args = (trl.SFTConfig if kind == "trl" else TrainingArguments)(**common)
    trainer = truetune.SFTTrainer(llama(tokenizer), args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert isinstance(trainer.args, trl.SFTConfig)
    assert trainer.report.fused_losses == 1


def test_a_users_collator_is_wrapped_when_a_loader_is_built_and_stays_the_users(make, tokenizer):
    trainer = make()
    seen = []
    inner = trainer.data_collator

    def counted(features):
        batch = inner(features)
        seen.append(batch["attention_mask"].shape)
        return batch

    trainer.data_collator = counted
    batch = next(iter(trainer.get_train_dataloader()))
    assert type(batch) is dict and "cu_seq_lens_q" in batch and "attention_mask" not in batch
    assert trainer.data_collator is counted
    assert len(seen[0]) == 2


def test_left_padded_batches_give_the_losses_of_right_padded_ones(make, tokenizer, data):
    """A left-padding collator of Transformers' own; the token behind the padding is no target on either side."""
    pairs = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:64] for row in data]
    prepared = Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in pairs])
    results = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side

        def collate(features, side=side):
            width = max(len(feature["input_ids"]) for feature in features)

            def pad(values, fill):
                missing = [fill] * (width - len(values))
                return missing + list(values) if side == "left" else list(values) + missing

            return {
                "input_ids": torch.tensor([pad(f["input_ids"], 0) for f in features]),
                "attention_mask": torch.tensor([pad([1] * len(f["input_ids"]), 0) for f in features]),
                "labels": torch.tensor([pad(f["labels"], -100) for f in features]),
            }

        trainer = make(train_dataset=prepared, data_collator=collate)
        trainer.train()
        assert trainer.report.packed_batches == 2
        results[side] = losses(trainer)
    assert results["left"] == pytest.approx(results["right"], rel=1e-5)


# -- passed through padded, and said so


def test_prompt_learning_stays_padded(make):
    ours, theirs = make(both=True, peft=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    for trainer in (ours, theirs):
        trainer.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert "virtual tokens" in line(ours, "batches").why
    assert ours.report.packed_batches == 0 and ours.report.padded_batches == 2


def test_neftune_keeps_the_padded_lengths_that_scale_its_noise(make):
    ours, theirs = make({"neftune_noise_alpha": 5.0}, both=True)
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert "NEFTune" in line(ours, "batches").why


def test_metrics_from_logits_get_them_in_the_shape_of_their_batches(make, data):
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"top": float(np.mean(prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]))}

    ours, theirs = make(both=True, compute_metrics=metrics, eval_dataset=data.select(range(4)))
    results = [trainer.evaluate() for trainer in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0][0]) == 3
    for name in ("eval_loss", "eval_top", "eval_entropy"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)


def test_predictions_have_the_shape_of_the_users_batches(make, data):
    ours, theirs = make(both=True)
    prepared = ours._prepare_dataset(data.select(range(4)), ours.processing_class, ours.args, False, None, "test")
    a, b = (trainer.predict(prepared) for trainer in (ours, theirs))
    np.testing.assert_allclose(a.predictions, b.predictions, atol=2e-5)


def test_a_loss_function_of_the_users_gets_padded_logits(make):
    def loss_function(outputs, labels, num_items_in_batch=None):
        assert outputs.logits.shape[:2] == labels.shape and labels.shape[0] == 2
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    ours, theirs = make(both=True, compute_loss_func=loss_function)
    for trainer in (ours, theirs):
        trainer.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert "compute_loss_func" in line(ours, "batches").why and "compute_loss_func" in line(ours, "loss").why


def test_unknown_tensors_keep_a_batch_padded(make, tokenizer):
    class WithTypes(DataCollatorForLanguageModeling):
        def __call__(self, features, return_tensors=None):
            ids = [f["input_ids"] for f in features]
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
            return batch

    trainer = make(data_collator=WithTypes(tokenizer, mlm=False))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "token_type_ids" in batch and "cu_seq_lens_q" not in batch
    trainer._count_batch(batch)
    assert list(trainer.report.padded_because) == ["the batch also holds token_type_ids"]


# -- stock TRL, and said so


STOCK = {
    "torch_compile": lambda trainer: setattr(trainer.args, "torch_compile", True),
    "DeepSpeed": lambda trainer: setattr(trainer, "is_deepspeed_enabled", True),
    "FSDP": lambda trainer: setattr(trainer, "is_fsdp_enabled", True),
    "use_liger_kernel": lambda trainer: setattr(trainer.args, "use_liger_kernel", True),
    "use_kernels": lambda trainer: setattr(trainer.model, "_use_kernels", True),
    "cp_size": lambda trainer: parallel(trainer, cp_size=2),
    "sp_size": lambda trainer: parallel(trainer, sp_size=2),
    "tp_size": lambda trainer: parallel(trainer, tp_size=2),
}


def parallel(trainer, **sizes):
    trainer.accelerator.state.parallelism_config = types.SimpleNamespace(
        **{"cp_size": 1, "sp_size": 1, "tp_size": 1, **sizes}
    )


@pytest.mark.parametrize("name", STOCK)
def test_what_changes_models_or_ranks_runs_stock_trl(name, make):
    """Read off a real trainer: none of these can start on a machine without the package or the devices."""
    _, stock = make(both=True)
    assert why_stock_trl(stock) == []
    try:
        STOCK[name](stock)
        reasons = why_stock_trl(stock)
    finally:
        stock.accelerator.state.parallelism_config = None
    assert len(reasons) == 1 and name in reasons[0]


def test_a_stock_run_is_trls_and_says_why(make):
    trainer = make({"torch_compile": True})
    assert trainer.report.stock == ["torch_compile"]
    assert line(trainer, "trainer").in_effect == "stock TRL"
    assert trainer.model.config._attn_implementation == "sdpa"
    assert "fused_loss" not in trainer.model.forward.__code__.co_varnames
    assert "cu_seq_lens_q" not in next(iter(trainer.get_train_dataloader()))


def test_our_settings_in_a_stock_run_are_refused_by_name(make):
    fields = {"torch_compile": True, "embedding_learning_rate": 1e-5}
    with pytest.raises(TrainError, match=r"embedding_learning_rate.*torch_compile.*allow=\['stock_trl'\]"):
        make(fields)
    assert make({**fields, "allow": ["stock_trl"]}).report.stock


# -- explicit wishes


def test_an_attention_named_by_the_user_is_kept(make, tokenizer, tmp_path):
    llama(tokenizer).save_pretrained(tmp_path / "model")
    trainer = make({"model_init_kwargs": {"attn_implementation": "eager"}}, model=str(tmp_path / "model"))
    assert trainer.model.config._attn_implementation == "eager"
    assert "model_init_kwargs" in line(trainer, "attention").why


def test_packing_a_model_that_cannot_keep_documents_apart_is_refused(make, tokenizer):
    from transformers import BloomConfig, BloomForCausalLM

    def bloom(tokenizer):
        return BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2))

    with pytest.raises(TrainError, match=r"packing.*allow=\['unpackable_model'\]"):
        make({"packing": True}, model=bloom)
    padded = make(model=bloom)
    padded.train()
    assert padded.report.padded_batches == 2


def test_an_embedding_rate_needs_trained_embeddings(make):
    trainer = make({"embedding_learning_rate": 1e-5}, peft=LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainError, match="no embedding is trained"):
        trainer.train()


def test_an_optimizer_of_the_users_and_a_rate_of_ours_is_an_error(make, tokenizer):
    model = llama(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make({"embedding_learning_rate": 1e-5}, model=model, optimizers=(optimizer, None))
    with pytest.raises(TrainError, match="optimizer"):
        trainer.train()


def test_groups_are_reported_with_rates_and_decay(make):
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trainer = make({"embedding_learning_rate": 1e-5, "loraplus_lr_ratio": 4.0, "weight_decay": 0.1}, peft=saved)
    trainer.train()
    table = {group.name: group for group in trainer.report.groups}
    assert table["embeddings"].learning_rate == 1e-5 and table["embeddings"].tensors == 2
    assert table["lora_B"].learning_rate == pytest.approx(8e-5)
    assert {group.weight_decay for group in trainer.report.groups} == {0.1}


def test_generation_works_after_training(make, tokenizer):
    trainer = make(peft=LoraConfig(r=2, target_modules="all-linear"))
    trainer.train()
    trainer.model.eval()
    inputs = tokenizer(["How many", "Natalia sold clips to"], return_tensors="pt", padding=True, padding_side="left")
    ours = trainer.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    base = trainer.model.get_base_model()
    base.set_attn_implementation("sdpa")
    assert torch.equal(ours, trainer.model.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_adapters_of_a_bf16_model_stay_fp32_and_activations_stay_bf16(tokenizer):
    from truetune.models.adapters import cast_adapters_to_activations

    model = get_peft_model(llama(tokenizer).to(torch.bfloat16), LoraConfig(r=2, target_modules="all-linear"))
    report = cast_adapters_to_activations(model)
    assert report.replaced == 14 and not report.left
    seen = set()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_dropout["default"].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    model(input_ids=torch.arange(5)[None])
    assert seen == {torch.bfloat16}
    assert layer.lora_A["default"].weight.dtype == torch.float32


def test_qlora_trains_on_after_an_evaluation_on_every_cpu(make, tokenizer, data, tmp_path, monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights, and most adapters would get no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    llama(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    curves = []
    for fields in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)
        torch.manual_seed(0)
        peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        trainer = make({"max_steps": 4, **fields}, model=model, peft=peft, eval_dataset=data.select(range(2)))
        trainer.train()
        curves.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 4 and curves[0] == curves[1]


def test_a_second_trainer_on_the_same_model_trains_and_generates(make, tokenizer):
    first = make(peft=LoraConfig(r=2, target_modules="all-linear"))
    first.train()
    second = make(model=first.model)
    second.train()
    assert second.report.fused_losses == 2
    assert line(second, "adapter").in_effect == line(first, "adapter").in_effect
    assert second.model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, len(tokenizer))


def test_a_model_that_was_saved_whole_loads_and_is_trained_again(make, tmp_path):
    """A method bound in the place of the class's would be saved, and not found when the file is loaded."""
    first = make(peft=LoraConfig(r=2, target_modules="all-linear"))
    first.train()
    torch.save(first.model, tmp_path / "model.pt")
    program = f"import torch; torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)(torch.arange(5)[None])"
    subprocess.run([sys.executable, "-c", program], check=True)  # where nothing of ours was imported
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    inputs = {"input_ids": torch.arange(5)[None]}
    torch.testing.assert_close(loaded(**inputs).logits, first.model(**inputs).logits)
    second = make(model=loaded)
    second.train()
    assert second.report.fused_losses == 2
    for name in ("adapter", "layers"):
        assert line(second, name).in_effect == line(first, name).in_effect


@pytest.mark.parametrize("tied", [False, True])
def test_trained_token_rows_reach_the_head(make, tokenizer, tied):
    rows = [5, 6, 7] if tied else {"embed_tokens": [5, 6, 7], "lm_head": [5, 6, 7]}
    model = llama(tokenizer, tie_word_embeddings=tied)
    trainer = make(model=model, peft=LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows))
    head = trainer.model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    assert torch.equal(head.weight[5:8], torch.full_like(head.weight[5:8], 0.5))
    trainer.train()
    assert trainer.report.fused_losses == 2


@pytest.mark.parametrize(
    "fields",
    [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"padding_free": True, "max_length": None}],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_document_capacity_of_a_batch_are_known_before_it_is_read(make, fields, batch_size):
    trainer = make({"max_length": 256, "per_device_train_batch_size": batch_size} | fields)
    documents = [len(batch["cu_seq_lens_q"]) - 1 for batch in trainer.get_train_dataloader()]
    most = trainer.document_capacity()
    assert max(documents) <= most
    if batch_size == 1 or "packing" not in fields:
        assert max(documents) == most


def test_rows_of_which_nothing_is_known_have_no_count():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "seq_lengths": [2, 1]})  # a column of the user's own
    assert documents_each(rows).tolist() == [1, 1]
    packed = Dataset.from_dict({"input_ids": [[1, 2], [3]], "seq_lengths": [[1, 1], [1]]})
    assert documents_each(packed).tolist() == [2, 1]
    assert documents_each({"a": packed}) is None
    assert documents_each(packed.to_iterable_dataset()) is None


def test_batches_of_many_rows_hardly_exceed_what_is_expected():
    generator = np.random.default_rng(0)
    counts = np.minimum(generator.geometric(0.12, 400), 60)
    batches = [counts[generator.permutation(400)[:4]].sum() for _ in range(5000)]
    expected = document_capacity(counts, 4)
    assert 1 <= sum(batch > expected for batch in batches) <= 100
    assert expected < 0.6 * np.sort(counts)[-4:].sum()
    assert document_capacity(counts, 1) == counts.max()
