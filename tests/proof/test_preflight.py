"""What a sound run shows, and that looking at it changes nothing."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from peft import LoraConfig
from rich.console import Console

from truetune.models.plan import fused_layers
from truetune.proof import parity
from truetune.proof.errors import ProofError
from truetune.proof.excerpt import documents_of, excerpt
from truetune.proof.result import Check, Proof
from truetune.train import trials

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 24},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "phi3": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},  # no fused layers
}


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sound_run_passes_every_check(make, verdicts, model_type, lora, precision):
    if model_type in ("gpt2", "phi3") and lora:
        pytest.skip("its linears have other names")
    trainer = make(
        model_type, lora=lora, sizes=FAMILIES[model_type], bf16=precision != "fp32", preflight="full",
        save_strategy="steps", evaluate=True,
    )  # fmt: skip
    proof = trainer.preflight()
    found = verdicts(proof)
    assert found.pop("first tokens") in ("pass", "warn")
    assert found.pop("duplicates") in ("pass", "warn")
    assert set(found.values()) == {"pass"}, [check for check in proof.checks if check.verdict != "pass"]
    assert {"leak probe", "reference parity", "turn ends", "export", "disk", "weights"} <= set(found)
    assert {"largest batch", "evaluation step", "checkpoint"} <= set(found)


def bits(trainer):
    """All that a training begins with, as bytes."""
    model = trainer.model
    tensors = {**model.state_dict(), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}
    return {
        "tensors": {name: None if t is None else t.clone() for name, t in tensors.items()},
        "places": [p.data_ptr() for p in model.parameters()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "files": set(Path(trainer.args.output_dir).rglob("*")),
        "settings": repr(trainer.args) + repr(trainer.state) + repr(model.config) + repr(trainer.report),
        "made": (trainer.optimizer, trainer.lr_scheduler, set(vars(trainer))),
        "modes": [module.training for module in model.modules()],
        "activations": [(id(found), found) for layer in fused_layers(model) if (found := vars(layer)["activations"])],
    }


def assert_same_bits(one, other):
    one, other = dict(one), dict(other)
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert (tensor is None) == (others[name] is None)
        assert tensor is None or (tensor.dtype == others[name].dtype and torch.equal(tensor, others[name])), name
    assert one == other


@pytest.mark.parametrize("level", ["full", "quick"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_preflight_leaves_no_trace(make, level, lora):
    trainer = make(preflight=level, lora=lora, save_strategy="steps", evaluate=True)
    for parameter in trainer.model.parameters():  # as after a training that was stopped
        parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
    before = bits(trainer)
    proof = trainer.preflight()
    assert_same_bits(bits(trainer), before)
    assert trainer.model.training
    assert {check.verdict for check in proof.checks if check.name == "checkpoint"} == (
        {"pass"} if level == "full" else set()
    )


def test_a_checkpoint_that_breaks_off_leaves_no_trace(make, verdicts, monkeypatch):
    trainer = make(preflight="full", save_strategy="steps")

    def breaks(checkpoint):
        raise RuntimeError("no way back")

    before = bits(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trl.SFTTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: breaks(checkpoint))
        assert verdicts(trainer.preflight())["checkpoint"] == "warn"
    assert_same_bits(bits(trainer), before)


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ({"optim": "adamw_8bit"}, "weights and optimizer"),
        ({"optim": "adafactor"}, "weights and optimizer"),
        ({"optim": "sgd", "lr_scheduler_type": "cosine"}, "weights and optimizer"),
        ({"stochastic_rounding": True, "lora": False, "dtype": torch.bfloat16, "bf16": True}, "weights and optimizer"),
        ({"save_only_model": True}, "weights"),
        ({"adapter": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])}, "weights and optimizer"),
        ({"adapter": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])}, "weights and optim"),
        ({"adapter": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])}, "weights and optimizer"),
        ({"embedding_learning_rate": 1e-4, "lora": False}, "weights and optimizer"),
        ({"loraplus_lr_ratio": 4.0}, "weights and optimizer"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_checkpoints_of_all_kinds_are_rehearsed(make, fields, held):
    dtype = {key: fields[key] for key in fields if key == "dtype"}
    trainer = make(preflight="full", save_strategy="steps", **{k: v for k, v in fields.items() if k != "dtype"})
    trainer.model.to(**dtype)
    before = bits(trainer)
    found = {check.name: check for check in trainer.preflight().checks}["checkpoint"]
    assert found.verdict == "pass" and found.seen.startswith(held), found
    assert_same_bits(bits(trainer), before)


def test_an_optimizer_that_cannot_be_had_is_said_before_the_first_step(make):
    trainer = make(preflight="full", save_strategy="steps", embedding_learning_rate=1e-4)
    with pytest.raises(
        ProofError, match=r"the optimizer cannot be made, .*; embedding_learning_rate is set, but no emb"
    ):
        trainer.train()


def test_what_a_cpu_takes_minutes_for_is_not_tried(make, verdicts, monkeypatch):
    monkeypatch.setattr(trials, "MOST_CPU_FLOPS", 1e6)
    found = verdicts(make(preflight="full").preflight())
    assert (found["largest batch"], found["checkpoint"]) == ("skip", "skip")  # and save_strategy is no


def test_losses_are_the_same_to_the_bit_with_and_without(make):
    logs = []
    for level in ("off", "quick", "full"):
        trainer = make(preflight=level, lora=True, save_strategy="steps", save_steps=2, evaluate=True)
        trainer.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert len(logs[0]) == 4
    assert logs[0] == logs[1] == logs[2]


def test_the_user_collator_and_callbacks_are_not_called(make):
    trainer = make(preflight="full")
    calls = []

    def collate(features):
        calls.append(features)
        raise AssertionError

    trainer.data_collator = collate
    proof = trainer.preflight()
    assert not calls
    assert {check.verdict for check in proof.checks if check.name == "reference parity"} == {"skip"}


def test_the_proof_lies_beside_the_result_with_the_receipt(make):
    trainer = make(preflight="quick")
    trainer.train()
    proof = json.loads((Path(trainer.args.output_dir) / "proof.json").read_text())
    assert set(proof["durations"]) >= {"weights", "leak probe", "reference parity"}
    assert 0 < sum(proof["durations"].values()) <= proof["seconds"] + 0.1
    found = {check["name"]: check for check in proof["checks"]}
    assert proof["passed"]
    assert found["trained tensors"]["verdict"] == found["frozen tensors"]["verdict"] == "pass"
    assert found["trained tensors"]["seen"] == "16 of 16 moved in 3 steps"


def test_off_checks_nothing(make):
    trainer = make(preflight="off")
    trainer.train()
    assert not trainer.proof.checks
    assert not (Path(trainer.args.output_dir) / "proof.json").exists()


def test_an_unknown_level_and_limit_are_refused(make):
    with pytest.raises(ProofError, match="use one of full, quick, off"):
        make(preflight="fast")
    with pytest.raises(ProofError, match="preflight_limits has no speed: use supervised, lost"):
        make(preflight_limits={"speed": 1.0})


def test_a_failure_stops_the_run_and_is_accepted_by_its_name(make, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": str(n)}]}
            for n in range(30)]  # fmt: skip
    tokenizer.eos_token = "<|endoftext|>"  # and turns end with <|im_end|>
    with pytest.raises(ProofError, match=r"turn ends failed: 0\.0% .*allow: \[turn_ends\]"):
        make(rows=rows, preflight="full").train()
    trainer = make(rows=rows, preflight="full", allow=["turn_ends"])
    trainer.train()
    assert {check.verdict for check in trainer.proof.checks if check.name == "turn ends"} == {"warn"}


def test_tokens_that_look_like_markup_are_shown_as_they_are():
    table = Proof([Check("turn ends", "others with '[/INST]'", "[bold]", "pass")]).table()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    assert "'[/INST]'" in (shown := console.export_text()) and "[bold]" in shown


def test_the_reference_takes_short_documents_together_with_the_same_result(make, monkeypatch):
    """Of several lengths: the shorter rows' padding must count for nothing."""
    trainer = make(preflight="off", max_steps=1)
    documents = excerpt(documents_of(trainer.first_batch()), 200, 4)
    documents[1] = {name: ids[:-7] for name, ids in documents[1].items()}
    results = []
    for together in (parity.TOGETHER, 1):
        monkeypatch.setattr(parity, "TOGETHER", together)
        with parity.evaluating(trainer.model), parity.unfused(trainer):
            results.append(parity.exact_gradients(trainer, documents))
    assert len(documents) >= 4
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-9)
    for name, gradient in results[0].of.items():
        torch.testing.assert_close(gradient, results[1].of[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("older", [False, True], ids=["as tf32=True sets it", "allow_tf32"])
def test_tf32_is_off_for_the_exact_gradients_alone(make, verdicts, older):
    """CUDA's setting can be made without a GPU; the two ways to make it do not mix."""
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, set()
    try:
        if older:
            settings.allow_tf32 = True
        else:
            settings.fp32_precision = "tf32"
        trainer = make(preflight="quick")
        handle = trainer.model.register_forward_hook(lambda *_: seen.add(settings.fp32_precision))
        assert verdicts(trainer.preflight())["reference parity"] == "pass"
        handle.remove()
        assert settings.fp32_precision == "tf32"
        assert seen == {"tf32", "ieee"}
        if older:
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        if older:
            settings.allow_tf32 = False
        settings.fp32_precision = before
