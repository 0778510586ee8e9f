"""Sound runs that no check may stop."""

import types

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, PromptTuningConfig, VeraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from truetune.proof import preflight
from truetune.proof.receipt import LearningReceipt
from truetune.proof.storage import check_disk, check_export


def test_a_warm_up_too_slow_for_fp32_is_no_failure(make):
    trainer = make(preflight="quick", lora=False, learning_rate=1e-5, warmup_steps=1000, lr_scheduler_type="linear")
    trainer.train()  # 1e-8 at the second step: a norm's 1.0 stays
    check = next(check for check in trainer.proof.checks if check.name == "trained tensors")
    assert check.verdict == "pass"
    assert not check.seen.startswith("20 of 20")


def receipt(fp16=False, lr=0.1, in_optimizer=True, first_gradient=1.0):
    """The checks after four steps of one weight, by SGD; a step whose gradient is not finite is skipped in fp16."""
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters() if in_optimizer else [torch.nn.Parameter(torch.ones(1))], lr=0.1)
    found = []
    watch, args = LearningReceipt(model, found.extend), types.SimpleNamespace(fp16=fp16)
    watch.on_train_begin(args, None, None)
    for gradient in (first_gradient, 1.0, 1.0, 1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.param_groups[0]["lr"] = lr
        watch.on_pre_optimizer_step(args, None, None, optimizer=optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        if torch.isfinite(model.weight.grad).all():
            optimizer.step()
        watch.on_optimizer_step(args, None, None)
    return {check.name: check.verdict for check in found}["trained tensors"]


def test_a_scale_of_fp16_that_overflows_is_no_failure():
    assert receipt(fp16=True, first_gradient=float("inf")) == "pass"
    assert receipt(fp16=False, first_gradient=float("inf")) == "fail"


def test_an_optimizer_that_finds_its_own_rate_is_followed():
    assert receipt(lr=None) == "pass"


def test_a_weight_that_no_optimizer_holds_is_still_a_failure():
    assert receipt(in_optimizer=False) == "fail"


@pytest.mark.parametrize(
    ("fields", "checkpoints"),
    [
        ({"save_strategy": "steps", "save_steps": 500, "max_steps": 60}, 1),
        ({"save_strategy": "steps", "save_steps": 10, "max_steps": 600}, 6),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, 2),
    ],
)
def test_disk_is_asked_for_the_checkpoints_that_the_run_writes(make, fields, checkpoints):
    assert f"for {checkpoints} checkpoints" in check_disk(make(**fields)).limit


def test_data_that_cannot_be_collated_warns(make, verdicts, monkeypatch):
    trainer = make(preflight="quick")

    def broken():
        raise RuntimeError("no batch")

    monkeypatch.setattr(trainer, "first_batch", broken)
    assert verdicts(trainer.preflight())["first documents"] == "warn"


@pytest.mark.parametrize(
    "adapter",
    [VeraConfig(target_modules=["q_proj", "o_proj"]), LoHaConfig(r=4, target_modules=["q_proj", "down_proj"])],
    ids=["vera", "loha"],
)
def test_one_step_of_an_adapter_that_begins_at_zero_is_no_failure(make, adapter):
    trainer = make(adapter=adapter, preflight="quick", max_steps=1)
    trainer.train()
    assert {check.verdict for check in trainer.proof.checks if check.name == "trained tensors"} == {"pass"}


def test_parity_is_not_asked_of_prompt_learning(make, verdicts):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert verdicts(make(adapter=adapter, packing=False).preflight())["reference parity"] == "skip"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_and_routers_that_files_hold_under_other_names_are_found(kind):
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert check_export(model).verdict == "pass"
    experts = next(p for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    saved = model.save_pretrained

    def changed(directory):
        with torch.no_grad():
            experts.view(-1)[5] += 1
        saved(directory)
        with torch.no_grad():
            experts.view(-1)[5] -= 1

    model.save_pretrained = changed
    assert check_export(model).verdict == "fail"


def test_trying_the_export_leaves_the_configuration_alone(make):
    trainer = make(lora=False, preflight="full")
    before = trainer.model.config.to_dict()
    trainer.preflight()
    assert trainer.model.config.to_dict() == before


def test_adalora_trains(make, verdicts):
    trainer = make(adapter=AdaLoraConfig(r=4, target_modules=["q_proj", "down_proj"], total_step=10))
    trainer.train()
    assert verdicts(trainer.proof)["trained tensors"] == "pass"


def test_a_receipt_that_breaks_says_so_and_stops_nothing(make, monkeypatch, caplog):
    trainer = make(preflight="quick")
    monkeypatch.setattr(LearningReceipt, "checks", lambda self: 1 / 0)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "receipt broke, which proves nothing" in caplog.text


def test_frozen_fp8_weights_are_compared():
    model = torch.nn.Linear(64, 64, bias=False)
    weight = model.weight.detach().to(torch.float8_e4m3fn)
    model.frozen = torch.nn.Parameter(weight, requires_grad=False)
    found = []
    watch, args = LearningReceipt(model, found.extend), types.SimpleNamespace(fp16=False)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    watch.on_train_begin(args, None, None)
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        watch.on_pre_optimizer_step(args, None, None, optimizer=optimizer)
        optimizer.step()
        watch.on_optimizer_step(args, None, None)
    assert {check.name: check.verdict for check in found} == {"trained tensors": "pass", "frozen tensors": "pass"}


def test_an_output_that_cannot_be_written_stops_no_run(make, tmp_path, caplog):
    trainer = make(preflight="quick")
    (tmp_path / "file").write_text("")
    trainer.args.output_dir = str(tmp_path / "file" / "out")
    trainer.train()
    assert "proof.json cannot be written" in caplog.text


def test_memory_that_runs_out_in_a_check_stops_no_run(make, monkeypatch):
    def runs_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(preflight, "check_parity", runs_out)
    trainer = make(preflight="quick")
    trainer.train()
    assert [check.seen for check in trainer.proof.checks if check.verdict == "skip"] == [
        "not run: out of device memory"
    ]
