"""Activation policies in the trainer: no loss changes, nothing else checkpoints, and the report says who does."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from train.small_trainers import DOCUMENTS, LAYERS, LORA, line, logged, maker, trajectory
from truetune.models.attention import attention_calls
from truetune.models.plan import fused_layers
from truetune.train import activations as activations_module
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError
from truetune.train.recipe_trainer import RecipeTrainer
from truetune.train.trainer import SFTTrainer


@pytest.fixture
def make(tokenizer, tmp_path):
    return maker(tokenizer, tmp_path)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_no_policy_changes_a_loss(make, peft):
    plain = trajectory(make(peft=peft, gradient_checkpointing=False))
    assert len(plain) == 3
    assert plain[0][0] != plain[2][0]
    for policy in ("auto", "keep", "lean", "offload"):
        assert trajectory(make(peft=peft, activation_policy=policy)) == plain


def counted_calls(trainer) -> tuple[int, int]:
    """Attention's calls in a training: all of them, and those of the forward passes, as the report counted them."""
    before = attention_calls.total()
    trainer.train()
    forward_calls = sum(trainer.report.attention_calls.values())
    assert forward_calls == LAYERS * trainer.report.packed_batches > 0
    return attention_calls.total() - before, forward_calls


@pytest.mark.parametrize("policy", ["auto", "keep", "lean", "offload"])
@pytest.mark.parametrize("trainer_class", [RecipeTrainer, SFTTrainer])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_nothing_checkpoints_behind_the_policy(make, policy, trainer_class, peft):
    """A layer that Transformers checkpoints runs its forward pass, and so its attention, a second time."""
    trainer = make(trainer_class, peft=peft, activation_policy=policy)
    calls, forward_calls = counted_calls(trainer)
    assert calls == forward_calls


def test_what_cannot_be_fused_keeps_its_checkpointing(make, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2))
    trainer = make(model=model, pack=False, allow=["unpackable_model"])
    assert (line(trainer).in_effect, line(trainer).why) == ("checkpointed by Transformers", "not every layer is fused")
    assert trainer.args.gradient_checkpointing


def test_the_first_layer_has_no_gradient_for_frozen_embeddings(make):
    """TRL asks for one beside adapters, because checkpointing would break without it."""
    for kwargs, wanted in ({}, False), ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, True):
        trainer = make(peft=LORA, **kwargs)
        seen = []
        layer = trainer.model.get_base_model().model.layers[0]
        layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].requires_grad))
        trainer.train()
        assert set(seen) == {wanted}


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CHECKPOINTING = [
    ({"use_reentrant": False}, LAYERS),
    ({"use_reentrant": True}, LAYERS),
    ({"use_reentrant": False, "every_n_layers": 2}, LAYERS // 2),
]


@pytest.mark.parametrize(("kwargs", "checkpointed"), CHECKPOINTING, ids=["saved hooks", "reentrant", "every second"])
@pytest.mark.parametrize("trainer_class", [RecipeTrainer, SFTTrainer])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_what_asks_for_transformers_checkpointing_gets_it(make, kwargs, checkpointed, trainer_class, peft):
    """Fused layers are checkpointed as Transformers' are, by whichever way its version wraps them."""
    plain = make(trainer_class, peft=peft, fuse=False, gradient_checkpointing=False)
    trainer = make(trainer_class, peft=peft, gradient_checkpointing_kwargs=kwargs)
    assert (line(plain).in_effect, line(trainer).in_effect) == ("keep", "checkpointed by Transformers")
    assert len(fused_layers(trainer.model)) == LAYERS
    wanted, found = FirstGradients(), FirstGradients()
    plain.add_callback(wanted)
    trainer.add_callback(found)
    expected = trajectory(plain)
    calls, forward_calls = counted_calls(trainer)
    assert calls == forward_calls * (LAYERS + checkpointed) // LAYERS
    assert trainer.activations is None
    for step, expected_step in zip(logged(trainer), expected, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-5)
    assert found.gradients.keys() == wanted.gradients.keys() != set()
    largest = max(gradient.abs().max() for gradient in wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        assert (found.gradients[name] - gradient).abs().max() < 1e-6 * largest, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_policy": "none"}, "'none' is unknown: use one of auto, keep, lean, offload, or a saved plan"),
        ({"activation_policy": None}, "'None' is unknown"),
        ({"activation_policy": "lean", "gradient_checkpointing": False}, "gradient_checkpointing=False keeps every"),
        ({"activation_policy": "lean", "fuse": False}, "not every layer is fused"),
        (
            {"activation_policy": "keep", "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            r"TRL.s own mechanism is asked for \(gradient_checkpointing_kwargs\): remove it or",
        ),
    ],
)
def test_contradictions_are_errors(make, fields, message):
    with pytest.raises(TrainError, match=message) as raised:
        make(**fields)
    assert str(raised.value).count(". ") == 0


def test_a_saved_plan_is_saved_with_the_run_and_taken_again(make, tmp_path):
    trainer = make(activation_policy="lean", save_strategy="steps", save_steps=2)
    trainer.train()
    path = tmp_path / "out" / "activation_plan.json"
    saved = json.loads(path.read_text())
    assert saved["choices"] == ["lean"] * LAYERS
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps({**saved, "choices": ["lean", "recompute", "host", "keep"]}))
    again = make(activation_policy=mixed)
    assert [layer.activations.recompute for layer in again.activations.layers] == [True, True, False, False]
    assert line(again).in_effect == "keep 1 of 4 layers, 1 host, 1 recompute, 1 lean"
    assert trajectory(again) == trajectory(make())
    mixed.write_text(json.dumps({**saved, "choices": ["keep"]}))
    with pytest.raises(TrainError, match="is for 1 layers, not for 4"):
        make(activation_policy=str(mixed))


def test_a_plan_goes_with_a_model_that_is_saved_elsewhere(make, tmp_path):
    make().save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "activation_plan.json").is_file()
    assert not (tmp_path / "out" / "activation_plan.json").exists()


def test_layers_with_parts_that_peft_runs_are_not_planned(make):
    """What autograd saves of DoRA no choice of ours takes away, but a checkpoint."""
    dora = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    trainer = make(peft=dora)
    assert (trainer.activations, line(trainer).in_effect) == (None, "checkpointed by Transformers")
    assert "the attention of LlamaDecoderLayer is not ours" in line(trainer).why
    checkpointed = trajectory(trainer)
    kept = make(peft=dora, activation_policy="keep")
    assert (kept.activations, line(kept).in_effect) == (None, "keep")
    for step, expected in zip(trajectory(kept), checkpointed, strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TrainError, match="activation_policy='lean' cannot be had, because the attention of"):
        make(peft=dora, activation_policy="lean")


@pytest.mark.parametrize("checkpoints", [True, False])
def test_trls_offloading_is_said_to_be_in_effect(make, checkpoints, monkeypatch):
    offloaded = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: offloaded.append(x) or x, lambda x: x)
    # TRL's own asks for a GPU.
    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: hooks)
    with pytest.raises(TrainError, match=r"asked for \(.*activation_offloading"):
        make(activation_offloading=True, gradient_checkpointing=checkpoints, activation_policy="keep")
    trainer = make(activation_offloading=True, gradient_checkpointing=checkpoints)
    in_effect = "checkpointed by Transformers, offloaded by TRL" if checkpoints else "offloaded by TRL"
    assert (line(trainer).in_effect, trainer.activations) == (in_effect, None)
    trainer.rehearse()
    assert len(offloaded) > 10


def test_stochastic_rounding_has_fp32_averages_of_bf16_weights(make):
    trainer = make()
    model, args = trainer.model.to(torch.bfloat16), trainer.args
    memory = activations_module.step_memory(model, args, 128, torch.bfloat16)
    vars(args)["stochastic_rounding"] = True
    rounded = activations_module.step_memory(model, args, 128, torch.bfloat16)
    assert rounded.optimizer == 2 * memory.optimizer == 8 * sum(p.numel() for p in model.parameters())


def test_a_second_trainer_of_a_model_does_not_inherit_the_plan_of_the_first(make, tokenizer, tmp_path):
    model = make(SFTTrainer, activation_policy="lean").model
    assert all(layer.activations.recompute for layer in fused_layers(model))

    def second(**fields):
        args = SFTConfig(str(tmp_path / "second"), bf16=False, use_cpu=True, report_to=[], **fields)
        return SFTTrainer(model, args, train_dataset=DOCUMENTS, processing_class=tokenizer)

    checkpointed = second(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert line(checkpointed).in_effect == "checkpointed by Transformers"
    assert len(fused_layers(model)) == LAYERS
    assert not any(layer.activations.recompute for layer in fused_layers(model))
    assert second(torch_compile=True).report.stock
    assert not fused_layers(model)


def test_arguments_of_a_planned_trainer_ask_the_next_one_for_the_same(make):
    args = make(SFTTrainer).args
    for policy in ("auto", "lean"):
        args.activation_policy = policy
        trainer = SFTTrainer(make().model, args, train_dataset=DOCUMENTS, processing_class=make().processing_class)
        assert (line(trainer).why, trainer.activations.policy) == ("", policy)
    args.fuse = False
    args.activation_policy = "auto"
    plain = SFTTrainer(make().model, args, train_dataset=DOCUMENTS, processing_class=make().processing_class)
    assert line(plain).in_effect == "checkpointed by Transformers" and plain.args.gradient_checkpointing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the device's allocator is asked")
def test_memory_that_lies_apart_is_joined_where_it_is_short(make):
    def grows() -> bool:
        torch.cuda.empty_cache()
        wide = torch.empty(2**26, device="cuda")
        segments = torch.cuda.memory_snapshot()
        return next(s["is_expandable"] for s in segments if 0 <= wide.data_ptr() - s["address"] < s["total_size"])

    for policy in ("keep", "lean", "keep"):
        make(activation_policy=policy, use_cpu=False)
        assert grows() == (policy == "lean")
