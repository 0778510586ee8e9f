"""What a sound run shows, and that looking at it changes nothing."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from truetune.proof.errors import ProofError
from truetune.proof.result import Check, Proof

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
    trainer = make(model_type, lora=lora, sizes=FAMILIES[model_type], bf16=precision != "fp32", preflight="full")
    proof = trainer.preflight()
    found = verdicts(proof)
    assert found.pop("first tokens") in ("pass", "warn")
    assert found.pop("duplicates") in ("pass", "warn")
    assert set(found.values()) == {"pass"}, [check for check in proof.checks if check.verdict != "pass"]
    assert {"leak probe", "reference parity", "turn ends", "export", "disk", "weights"} <= set(found)


@pytest.mark.parametrize("level", ["full", "quick"])
def test_a_preflight_leaves_no_trace(make, level):
    trainer = make(preflight=level)
    state = copy.deepcopy(trainer.model.state_dict())
    random = torch.get_rng_state()
    files = set(Path(trainer.args.output_dir).rglob("*"))
    trainer.preflight()
    assert torch.equal(random, torch.get_rng_state())
    assert set(Path(trainer.args.output_dir).rglob("*")) == files
    now = trainer.model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.training


def test_losses_are_the_same_to_the_bit_with_and_without(make):
    logs = []
    for level in ("off", "quick", "full"):
        trainer = make(preflight=level, lora=True)
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
