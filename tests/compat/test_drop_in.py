"""The trainer in TRL's place: what it logs in evaluations, for resumed runs, adapters and experts is what TRL logs."""

import numpy as np
import pytest
import torch
import trl
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import truetune
from pairs import assert_same_metrics, llama, losses, train_alike

BATCHES = {
    "padded": {},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
}


def prepared(trainer, data):
    return trainer._prepare_dataset(data, trainer.processing_class, trainer.args, False, None, "eval")


# -- evaluation and prediction


@pytest.mark.parametrize("with_logits", [False, True])
def test_evaluations_between_two_logs_report_the_tokens_trained_so_far(make, data, with_logits):
    fields = {"max_steps": 6, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    keywords = {"eval_dataset": data.select(range(5))}
    if with_logits:  # TRL's own compute_loss evaluates
        keywords["compute_metrics"] = lambda prediction: {"rows": float(len(prediction.predictions))}
    ours, theirs = make({**fields, "gradient_accumulation_steps": 2}, both=True, **keywords)
    train_alike(ours, theirs)
    seen = [entry["eval_num_tokens"] for entry in ours.state.log_history if "eval_num_tokens" in entry]
    assert len(seen) == 6 and sorted(set(seen)) == seen


def test_several_evaluation_sets_are_logged_each_under_its_name(make, data):
    sets = {"short": data.select(range(5)), "other": data.select(range(5, 12))}
    fields = {"max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    ours, theirs = make(fields, both=True, eval_dataset=sets)
    train_alike(ours, theirs)
    assert_same_metrics(ours.evaluate(), theirs.evaluate())
    assert_same_metrics(ours.evaluate("other"), theirs.evaluate("other"))
    rows = data.select(range(12, 17))
    assert_same_metrics(ours.evaluate(prepared(ours, rows)), theirs.evaluate(prepared(theirs, rows)))


@pytest.mark.parametrize("batches", BATCHES)
def test_predictions_and_their_metrics_are_trls(make, data, batches):
    ours, theirs = make(BATCHES[batches], both=True)
    rows = prepared(theirs, data.select(range(5)))
    for loss_only in (False, True):
        for trainer in (ours, theirs):
            trainer.args.prediction_loss_only = loss_only
        a, b = ours.predict(rows), theirs.predict(rows)
        assert_same_metrics(a.metrics, b.metrics)
        if not loss_only:
            np.testing.assert_allclose(a.predictions, b.predictions, atol=2e-5)
            np.testing.assert_array_equal(a.label_ids, b.label_ids)
    assert_same_metrics(ours.evaluate(rows), theirs.evaluate(rows))


def test_streamed_evaluation_sets_and_packs_are_trls(make, data):
    fields = {"max_steps": 4, "packing": True, "eval_strategy": "steps", "eval_steps": 2}
    streams = {"train_dataset": data.to_iterable_dataset(), "eval_dataset": data.select(range(4)).to_iterable_dataset()}
    train_alike(*make(fields, both=True, **streams))


# -- losses


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("own_loss", [False, True], ids=["smoothed", "compute_loss_func"])
def test_other_losses_train_and_evaluate_as_in_trl(make, data, batches, own_loss):
    def mean_over_the_step(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    fields = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **BATCHES[batches]}
    keywords = {"eval_dataset": data.select(range(5))}
    if own_loss:
        keywords["compute_loss_func"] = mean_over_the_step
    else:
        fields["label_smoothing_factor"] = 0.2
    train_alike(*make(fields, both=True, **keywords))


def test_fp32_weights_under_bf16_autocast_lose_no_more_than_in_trl(make, tokenizer, data, tmp_path):
    """The checkpoint is named, so that TRL loads it in fp32; judged by an fp32 run's gradient norms."""
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def norms(trainer):
        trainer.train()
        return np.array([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])

    fields = {"max_steps": 16, "learning_rate": 1e-4}
    named = {"model": str(tmp_path / "model"), "processing_class": None}
    exact = norms(make(fields, **named))
    ours, theirs = make({**fields, "bf16": True}, both=True, **named)
    errors = [np.sqrt(np.mean((norms(trainer) - exact) ** 2)) for trainer in (ours, theirs)]
    assert 0 < errors[0] <= 1.5 * errors[1]
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}
    assert ours.report.fused_losses == ours.report.packed_batches == 16


@pytest.mark.parametrize("calls_ours", [True, False])
def test_a_subclass_with_its_own_loss_trains_as_under_trls(tokenizer, data, tmp_path, calls_ours):
    curves = []
    for library in (truetune, trl):

        class WithOwnLoss(library.SFTTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                if calls_ours:
                    return 0.5 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                labels = inputs.pop("labels")
                logits = model(**inputs).logits[:, :-1]
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

        args = library.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, max_length=96, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = WithOwnLoss(llama(tokenizer), args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        curves.append(losses(trainer))
    assert len(curves[0]) == 2 and curves[0] == pytest.approx(curves[1], rel=1e-5)


# -- checkpoints


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path, peft):
    fields = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
    }
    torch.manual_seed(0)
    whole = make(fields, peft=peft)
    whole.train()
    torch.manual_seed(1)  # another adapter to begin with, which the checkpoint's must replace
    resumed = make(fields, peft=peft)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed) == losses(whole) and resumed.report.fused_losses == 6
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_trls_is_gone_on_from(make, tmp_path):
    fields = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    ours, theirs = make({**fields, "learning_rate": 1e-3}, both=True)
    theirs.train()
    ours.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_the_best_checkpoint_is_found_and_loaded_as_in_trl(make, data, tmp_path):
    fields = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 2e-3,
    }
    ours, theirs = make(fields, both=True, eval_dataset=data.select(range(5)))
    train_alike(ours, theirs)
    assert ours.state.best_global_step == theirs.state.best_global_step
    assert_same_metrics(ours.evaluate(), theirs.evaluate())
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-6)


# -- adapters


def test_each_of_several_adapters_is_the_one_that_is_set(make, tokenizer):
    """Two are there before the trainer, of which the second trains; a third comes after it."""

    def with_two(tokenizer):
        torch.manual_seed(0)
        first = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        second = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = get_peft_model(llama(tokenizer), first)
        model.add_adapter("second", second)
        model.set_adapter("second")
        return model

    ours, theirs = make({"learning_rate": 1e-3}, both=True, model=with_two)
    first = {name: p.clone() for name, p in ours.model.named_parameters() if ".default." in name}
    train_alike(ours, theirs)
    assert all(torch.equal(p, first[name]) for name, p in ours.model.named_parameters() if name in first)
    ids = torch.arange(3, 40)[None]
    for name in ("default", "second"):
        for trainer in (ours, theirs):
            trainer.model.set_adapter(name)
        torch.testing.assert_close(ours.model(input_ids=ids).logits, theirs.model(input_ids=ids).logits)
    for trainer in (ours, theirs):
        torch.manual_seed(3)
        trainer.model.add_adapter("third", LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
        trainer.model.set_adapter("third")
        trainer.optimizer = trainer.lr_scheduler = None
    train_alike(ours, theirs)
    assert ours.report.fused_losses == 4


PEFT = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "lora_bias": LoraConfig(r=4, lora_bias=True, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", PEFT)
def test_other_adapters_train_as_in_trl(make, data, kind):
    # Prefix tuning under checkpointing fails in TRL as well.
    fields = {"max_steps": 4, "learning_rate": 1e-2, "gradient_checkpointing": kind != "prefix"}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    ours, theirs = make({**fields, **evaluation}, both=True, peft=PEFT[kind], eval_dataset=data.select(range(5)))
    train_alike(ours, theirs)
    assert ours.report.fused_losses > 0


# -- mixtures of experts


EXPERTS = {"qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig), "mixtral": (MixtralForCausalLM, MixtralConfig)}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_balances_its_load_as_in_trl(make, data, family, batches):
    model_class, config_class = EXPERTS[family]

    def mixture(tokenizer):
        torch.manual_seed(0)
        config = config_class(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            **({"num_experts": 4, "moe_intermediate_size": 32} if family == "qwen3" else {"num_local_experts": 4}),
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return model_class(config)

    fields = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, **BATCHES[batches]}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3}
    ours, theirs = make({**fields, **evaluation}, both=True, model=mixture, eval_dataset=data.select(range(5)))
    train_alike(ours, theirs)
    assert sum("aux_loss" in entry for entry in ours.state.log_history) == 6
    assert ours.report.padded_batches == 0
    plain = make({**fields, "router_aux_loss_coef": 0.0}, model=mixture)
    plain.train()
    assert losses(plain)[0] < losses(ours)[0] - 0.5  # the auxiliary loss is about 2
