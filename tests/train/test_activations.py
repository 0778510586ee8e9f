"""Activation policies in the trainer: no loss changes, nothing else checkpoints, a rehearsal leaves no trace."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback

from truetune.models.attention import attention_calls
from truetune.models.memory import CHOICES, RECOMPUTED
from truetune.models.plan import Rates, Room, fused_layers
from truetune.train import activations as activations_module
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError
from truetune.train.recipe_trainer import RecipeTrainer
from truetune.train.rehearsal import Rehearsed
from truetune.train.trainer import SFTTrainer

LAYERS = 4
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
DOCUMENTS = Dataset.from_list(
    [{"input_ids": [(7 * i + j) % 97 + 3 for j in range(n)], "labels": [(7 * i + j) % 97 + 3 for j in range(n)]}
     for i, n in enumerate([20, 31, 9, 44, 17, 28, 12, 40, 25, 33, 6, 38])]
)  # fmt: skip


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(trainer_class=RecipeTrainer, peft=None, train_dataset=DOCUMENTS, eval_dataset=None, model=None, **fields):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, attention_dropout=fields.pop("dropout", 0.0),
        )  # fmt: skip
        settings = {
            "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "bf16": False,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_length": 64,
            "learning_rate": 1e-2, "preflight": "off",  # whose own forward passes are not to be counted
        }  # fmt: skip
        pack = {"pack": fields.pop("pack")} if "pack" in fields else {}
        return trainer_class(
            model or LlamaForCausalLM(config), SFTConfig(**settings | fields), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=tokenizer, peft_config=peft, **pack,
        )  # fmt: skip

    return make


def logged(trainer) -> list[tuple]:
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def trajectory(trainer) -> list[tuple]:
    trainer.train()
    return logged(trainer)


def line(trainer):
    return next(line for line in trainer.report.lines if line.part == "activations")


# -- policies


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


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False, "every_n_layers": 2}])
def test_a_rehearsal_is_checkpointed_as_the_training_is(make, kwargs):
    """Without, it would need more memory than the training, and refuse what fits."""
    trainer = make(SFTTrainer, gradient_checkpointing_kwargs=kwargs, fuse=kwargs is not None)
    before = attention_calls.total()
    trainer.rehearse()
    assert attention_calls.total() - before == (2 * LAYERS if kwargs is None else LAYERS + LAYERS // 2)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


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


# -- the rehearsal


def states(trainer):
    model = trainer.model
    return copy.deepcopy(
        {
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state(),
            "parameters": dict(model.named_parameters()),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "modes": [module.training for module in model.modules()],
            "metrics": trainer._metrics,
            "device metrics": {mode: m.peek() for mode, m in trainer._device_metrics.items()},
            "counted": [trainer.report.fused_losses, trainer.report.packed_batches, trainer.report.attention_calls],
            "state": trainer.state.to_json_string() if hasattr(trainer.state, "to_json_string") else None,
        }
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("kind", ["recipe", "packed by TRL", "padded", "not fused", "unplanned"])
def test_a_rehearsal_leaves_no_trace(make, kind, tokenizer):
    def trainer():
        fields = {"dropout": 0.3}
        if kind == "not fused":
            torch.manual_seed(0)
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2))
            return make(SFTTrainer, model=model)
        if kind == "unplanned":
            return make(SFTTrainer, gradient_checkpointing_kwargs={"use_reentrant": False}, **fields)
        if kind == "recipe":
            return make(eval_dataset=DOCUMENTS, eval_strategy="steps", eval_steps=2, **fields)
        return make(SFTTrainer, packing=kind == "packed by TRL", loss_type="dft", **fields)

    def seed():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    rehearsed, plain = trainer(), trainer()
    seed()
    rehearsed.model.eval()
    before = states(rehearsed)
    rehearsed.rehearse()
    after = states(rehearsed)
    for name in before:
        assert same(before[name], after[name]), name
    with_rehearsal = trajectory(rehearsed)
    seed()
    assert trajectory(plain) == with_rehearsal
    parameters = zip(rehearsed.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({}, "lower per_device_train_batch_size from 2"),
        ({"per_device_train_batch_size": 1}, "train on shorter rows (max_length)"),
        ({"gradient_checkpointing": False}, "set gradient_checkpointing=True, or lower"),
    ],
)
def test_what_is_not_planned_and_runs_out_is_refused_with_a_mend(make, fields, mend, monkeypatch):
    trainer = make(SFTTrainer, fuse=False, **fields)
    assert trainer.rehearse() is None
    monkeypatch.setattr("truetune.train.rehearsal.rehearse", lambda *_: Rehearsed(None, 0))
    with pytest.raises(TrainError, match="runs out of device memory: ") as raised:
        trainer.rehearse()
    assert mend in str(raised.value)


def test_what_cannot_be_tried_is_said_once(make):
    trainer = make(SFTTrainer, fuse=False, optim="adafactor")
    trainer.largest_batch = lambda evaluation=False: {"pixels": torch.zeros(1)}
    for _ in range(2):
        trainer.rehearse()
    assert line(trainer).why == "not every layer is fused; not rehearsed: its batches have no input_ids or labels"


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


def test_gradients_from_before_stay(make):
    trainer = make()
    parameter = next(trainer.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    trainer.rehearse()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_the_largest_batch_is_rehearsed(make):
    trainer = make()
    fullest = sorted((sum(len(DOCUMENTS[i]["input_ids"]) for i in pack)
                      for pack in trainer._sampler(DOCUMENTS, trainer.args.seed)), reverse=True)  # fmt: skip
    assert trainer.largest_batch()["input_ids"].numel() == sum(fullest[:2])
    assert trainer.token_budget() == 2 * 64
    alone = make(SFTTrainer)
    assert alone.largest_batch()["input_ids"].numel() == 44 + 40
    assert alone.token_budget() == 2 * 44
    stream = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset())
    assert stream.largest_batch() is None
    stream.rehearse()  # with as much as its batches can hold
    assert stream.activations.plan.tokens == stream.token_budget() == 2 * 64
    assert not line(stream).why
    padded = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset(), neftune_noise_alpha=5.0)
    padded.rehearse()
    assert "not rehearsed" in line(padded).why
    unplanned = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset(), fuse=False)
    unplanned.rehearse()
    assert "not rehearsed" in line(unplanned).why


@pytest.mark.parametrize("fuse", [True, False])
def test_token_ids_without_an_embedding_do_not_reach_the_device(make, fuse, tokenizer):
    rows = DOCUMENTS.map(lambda row: {"input_ids": [len(tokenizer), *row["input_ids"][1:]]})
    with pytest.raises(TrainError, match="no embedding for"):
        make(SFTTrainer, train_dataset=rows, fuse=fuse).rehearse()


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


class Device:
    """A device of `available` bytes, for which predictions are wrong by the `factor` of choices: it answers rehearsals.

    The layers are taken to be as wide as an 8B model's, so that what they save is what counts.
    """

    def __init__(self, trainer, available, factor: float | Callable[[tuple[str, ...]], float]) -> None:
        self.activations, self.rehearsed = trainer.activations, []
        self.factor = factor if callable(factor) else lambda choices: factor
        memory = self.activations.memory
        layer = replace(memory.model.layers[0], hidden=4096, query=4096, key=1024, intermediate=14336, gradients=0)
        memory = replace(memory, model=replace(memory.model, layers=(layer,) * LAYERS), optimizer=0)
        memory = replace(memory, tokens=trainer.largest_batch()["input_ids"].numel())
        self.activations.memory = memory
        available = available({choice: memory.peak((choice,) * LAYERS) for choice in CHOICES})
        self.activations.room = Room(available, 0)
        self.activations.rates = Rates(1.0, 1.0, 0.5, 0.4, host_rate=1e9, host_bytes=10**15)

    def __call__(self, trainer, batch) -> Rehearsed:
        plan = self.activations.plan.choices
        self.rehearsed.append(plan)
        memory = replace(self.activations.memory.before_first_step(), correction=1.0)
        peak = memory.held + round(self.factor(plan) * (memory.peak(plan) - memory.held))
        fits = peak <= self.activations.room.available
        return Rehearsed(peak if fits else None, memory.held)


@pytest.fixture
def on_device(make, monkeypatch):
    def on_device(available, factor, policy="auto"):
        trainer = make(activation_policy=policy)
        device = Device(trainer, available, factor)
        monkeypatch.setattr(activations_module, "rehearse", device)
        return trainer, device

    return on_device


def test_a_plan_that_needs_more_than_predicted_becomes_leaner(on_device):
    trainer, device = on_device(lambda peak: peak["keep"] + 10_000, 1.3)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert set(device.rehearsed[0]) == {"keep"}
    assert device.rehearsed[-1] == trainer.activations.plan.choices != device.rehearsed[0]
    assert trainer.activations.plan.measured_peak <= device.activations.room.available
    assert line(trainer).in_effect == trainer.activations.plan.in_words
    assert [layer.activations.recompute for layer in trainer.activations.layers] == [
        choice in RECOMPUTED for choice in trainer.activations.plan.choices
    ]


def test_a_plan_that_needs_less_than_predicted_becomes_faster(on_device):
    trainer, device = on_device(lambda peak: (peak["keep"] + peak["recompute"]) // 2, 0.5)
    device.activations._apply(("recompute",) * LAYERS)
    trainer.rehearse()
    assert trainer.activations.plan.choices == ("keep",) * LAYERS
    assert trainer.activations.plan.correction == pytest.approx(0.5, rel=1e-3)


def test_choices_that_are_predicted_less_well_are_not_tried_again(on_device):
    """All of lean needs more than predicted, a mix runs out of memory, and the leanest alone has its margin."""

    def factor(choices):
        return {("lean",) * LAYERS: 1.3, ("checkpoint_host",) * LAYERS: 0.8}.get(choices, 2.0)

    # Enough for lean as it is measured, not for what the margin adds.
    trainer, device = on_device(lambda peak: round(1.31 * peak["lean"]), factor, policy="lean")
    device.activations._apply(("lean",) * LAYERS)
    trainer.rehearse()
    assert len(set(device.rehearsed)) == len(device.rehearsed) > 1
    assert trainer.activations.plan.choices == device.rehearsed[-1] == ("checkpoint_host",) * LAYERS
    assert trainer.activations.plan.correction == pytest.approx(0.8, rel=1e-3)  # its own, not the worst


def test_a_plan_without_its_margin_gives_way_to_a_leaner_one_that_was_not_predicted_to_have_it(on_device):
    lean = ("lean",) * LAYERS
    trainer, device = on_device(
        lambda peak: round(1.35 * peak["lean"]), lambda choices: 1.3 if choices == lean else 0.8, policy="lean"
    )
    activations = device.activations
    activations.room = replace(activations.room, device=6 * activations.room.available)
    activations._apply(lean)
    trainer.rehearse()
    assert device.rehearsed == [lean, activations.plan.choices]
    assert activations.room.fits(activations.memory, activations.plan.choices)


def test_a_plan_without_its_margin_is_kept_where_the_leaner_ones_run_out_of_memory(on_device):
    lean = ("lean",) * LAYERS
    trainer, device = on_device(
        lambda peak: round(1.31 * peak["lean"]), lambda choices: 1.3 if choices == lean else 2.5, policy="lean"
    )
    device.activations._apply(lean)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert trainer.activations.plan.choices == lean
    assert trainer.activations.plan.correction == pytest.approx(1.3, rel=1e-3)


def test_of_plans_without_their_margin_the_one_that_needs_least_is_taken(on_device):
    lean = ("lean",) * LAYERS

    def factor(choices):  # all others need more, as measured
        memory = replace(device.activations.memory.before_first_step(), correction=1.0)
        return 1.25 if choices == lean else 1.34 * memory.peak(lean) / memory.peak(choices)

    trainer, device = on_device(lambda peak: round(1.35 * peak["lean"]), factor, policy="lean")
    activations = device.activations
    activations.room = replace(activations.room, device=6 * activations.room.available)
    activations._apply(lean)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert activations.plan.choices == lean
    assert activations.plan.measured_peak is not None


def test_the_leanest_plan_is_tried_before_a_run_is_refused(on_device, monkeypatch):
    """All that the predictions lead to runs out of memory; a model of more layers has more such plans."""
    leanest: list[tuple[str, ...]] = []
    trainer, device = on_device(lambda peak: round(1.1 * peak["keep"]), lambda plan: 1.0 if plan in leanest else 9.0)
    leanest.append(trainer.activations._leanest)
    monkeypatch.setattr(activations_module, "MOST_REHEARSALS", 3)
    trainer.rehearse()
    assert len(set(device.rehearsed)) == 3
    assert [trainer.activations.plan.choices] == device.rehearsed[-1:] == leanest


def test_what_never_fits_is_one_sentence_with_numbers(on_device):
    trainer, device = on_device(lambda peak: round(0.75 * min(peak.values())), 1.0)
    with pytest.raises(TrainError, match="GiB are there: lower per_device_train_batch_size from 2 to 1"):
        trainer.rehearse()
    trainer, device = on_device(lambda peak: peak["keep"] - 1000, 1.0, policy="keep")
    with pytest.raises(TrainError, match="set activation_policy to auto"):
        trainer.rehearse()
    assert device.rehearsed == [("keep",) * LAYERS]


def test_a_cpu_is_not_rehearsed_on(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(activations_module, "rehearse", lambda *_: pytest.fail("rehearsed"))
    trainer.train()
