"""Runs that would teach nothing, or something else, and of which every number looks right."""

import json
import types

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DataCollatorForLanguageModeling,
)

from truetune import run
from truetune.data import limits
from truetune.proof.embeddings import check_tied_head
from truetune.proof.errors import ProofError
from truetune.proof.generation_prompt import generation_prompt
from truetune.proof.preflight import audit_batches
from truetune.proof.supervision import Limits
from truetune.recipe import load_recipe


def said(trainer, name):
    """What the checks of a name warn of or fail for."""
    return "; ".join(c.mend for c in trainer.preflight().checks if c.name == name and c.verdict in ("warn", "fail"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": 0.0}, "the learning rate is 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "there is no step"),
        ({"warmup_steps": 1000, "lr_scheduler_type": "linear"}, "0.001 is never reached"),
        ({"warmup_steps": 1, "max_steps": 1}, "0.001 is never reached"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 40, "lr_end": 0}, "max_steps": 50},
         "nearly 0 in "),
        ({"max_grad_norm": 1e-8}, "a norm of 1e-08 are lost beside adam_epsilon"),
        ({"adam_epsilon": 1.0}, "lost beside adam_epsilon 1"),
        ({"weight_decay": 4000.0}, "weight decay alone leaves"),
    ],
    ids=["rate", "steps", "warm-up", "one step", "power", "clipping", "epsilon", "decay"],
)  # fmt: skip
def test_a_schedule_that_moves_nothing_is_named(make, fields, words):
    assert words in said(make(preflight="quick", **fields), "schedule")


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"warmup_steps": 0.1, "max_steps": 100}, {"lr_scheduler_type": "cosine", "max_steps": 5000},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "evaluate": True}, {"max_steps": 1},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_steps": 50},
        {"weight_decay": 0.1, "max_steps": 10_000}, {"optim": "adafactor", "max_grad_norm": 1e-8},
        {"max_steps": -1, "num_train_epochs": 0.1},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 10, "max_steps": 100_000},
    ],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_trains_is_not(make, fields):
    assert not said(make(preflight="quick", **fields), "schedule")


def test_a_run_that_had_no_rate_says_that_nothing_was_learned(make):
    trainer = make(preflight="quick", learning_rate=0.0)
    trainer.train()
    (check,) = [check for check in trainer.proof.checks if check.name == "trained tensors"]
    assert (check.verdict, check.seen) == ("warn", "no step had a learning rate above zero")


@pytest.mark.parametrize("fields", [{"packing": True}, {"packing": False, "gradient_accumulation_steps": 4}], ids=str)
def test_the_steps_that_are_planned_are_those_that_are_made(make, fields):
    trainer = make(preflight="off", max_steps=-1, num_train_epochs=1.5, **fields)
    planned = trainer.planned_steps()
    trainer.train()
    assert trainer.state.global_step == planned


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(gsm8k_rows):
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in gsm8k_rows[:24]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: {"completion": ""}, "answers say nothing"),
        (lambda row: {"completion": " \n"}, "answers say nothing"),
        (lambda row: {"completion": row["prompt"]}, "answers repeat their prompts"),
        (lambda row: {"completion": "I cannot help with that."}, "nearly all answers are the same"),
        (lambda row: {"prompt": "Question\n"}, "one prompt stands before most answers"),
    ],
    ids=["empty", "white space", "copies", "one answer", "one prompt"],
)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_answers_that_teach_nothing_are_named(make, pairs, change, words, packing):
    trainer = make(preflight="quick", packing=packing, rows=[{**row, **change(row)} for row in pairs])
    assert words in said(trainer, "answers")


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"It is {number} o'clock in the morning."} for number in range(30)],
        [{"prompt": f"Is {number} odd?", "completion": " yes" if number % 2 else " no"} for number in range(30)],
        [{"prompt": f"The capital of country {number} is Town {number}. What is it?", "completion": f" Town {number}"}
         for number in range(30)],
        [{"prompt": "Hello", "completion": " Good day to you"}] * 4,
    ],
    ids=["text", "classes", "extracts", "few"],
)  # fmt: skip
def test_short_and_extracted_answers_are_not(make, rows):
    assert not said(make(preflight="quick", rows=rows), "answers")


MASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'ROLE' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chats(gsm8k_rows):
    return [
        {"messages": [{"role": role, "content": row[part]} for row in pair for role, part in
                      (("user", "question"), ("assistant", "answer"))]}
        for pair in zip(gsm8k_rows[:8], gsm8k_rows[8:16], strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_mask_that_is_off_by_one_turn_is_named(make, tokenizer, chats, role, packing):
    tokenizer.chat_template = MASKED.replace("ROLE", role)
    trainer = make(preflight="quick", rows=chats, assistant_only_loss=True, packing=packing, max_length=512)
    assert ("other turns than the assistant's" in said(trainer, "turn starts")) == (role == "user")


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_turns_of_a_chat_are_the_assistants(make, tokenizer, chats, assistant_only_loss):
    tokenizer.chat_template = MASKED.replace("ROLE", "assistant")
    trainer = make(preflight="quick", rows=chats, assistant_only_loss=assistant_only_loss)
    assert not said(trainer, "turn starts")
    begun = [{"prompt": [*chat["messages"][:1], {"role": "assistant", "content": "I"}],
              "completion": [{"role": "assistant", "content": " say four"}]} for chat in chats]  # fmt: skip
    assert not said(make(preflight="quick", rows=begun), "turn starts")


@pytest.mark.parametrize("begins", ["assistant", "user"])
def test_chats_that_begin_with_the_same_greeting_are_sound(make, tokenizer, chats, begins):
    tokenizer.chat_template = MASKED.replace("ROLE", "assistant")
    hello, greeting = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help?"}
    begun = [hello, greeting] if begins == "user" else [greeting]
    rows = [{"messages": begun + chat["messages"][i : i + 2]} for chat in chats for i in (0, 2)]
    trainer = make(preflight="quick", rows=rows, assistant_only_loss=True, max_length=512)
    assert len(rows) >= 16 and not said(trainer, "answers")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
    ids=["none", "refuses", "never ends"],
)
def test_a_template_that_cannot_be_asked_has_no_generation_prompt(tokenizer, monkeypatch, template):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    tokenizer.chat_template = template
    assert generation_prompt(tokenizer) == []


def test_what_the_chat_template_leaves_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Is {n} odd?"},
                      {"role": "assistant", "content": "yes" if n % 2 else "no"}]}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model": "builtin:demo", "data": tmp_path / "chats.jsonl", "max_length": 128, "output_dir": tmp_path / "o"}
    found = {}
    for template in ("template.jinja", None):
        more = [] if template is None else [f"chat_template={tmp_path / template}"]
        recipe = load_recipe(None, [*(f"{key}={value}" for key, value in words.items()), *more])
        checks = run.check(recipe, Console(quiet=True)).checks
        found[template] = next(check for check in checks if check.name == "chat template")
    assert found[None].verdict == "pass"
    assert found["template.jinja"].verdict == "warn"
    assert found["template.jinja"].seen == "40 rows whose system messages the chat template leaves out"


@pytest.fixture
def whole(gsm8k_rows):
    return [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in gsm8k_rows[24:28]]


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "one"])
@pytest.mark.parametrize("change", [str, str.upper, lambda text: f" {text} \n"], ids=["same", "case", "white space"])
def test_an_evaluation_set_that_is_trained_is_named(make, whole, change, as_dict):
    rows = [{name: change(text) for name, text in row.items()} for row in whole]
    trainer = make(preflight="full", rows=rows, evaluate="dict" if as_dict else True, max_length=1024)
    assert "evaluation loss measures memory" in said(trainer, "evaluation set")
    trainer = make(preflight="full", evaluate="dict" if as_dict else True, max_length=1024)
    assert not said(trainer, "evaluation set")


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("trained", ["lora", "rows", "whole", "full"])
def test_new_tokens_whose_rows_are_frozen_are_named(make, tokenizer, gsm8k_rows, tmp_path, trained, mean_resizing):
    rows = [{"prompt": row["question"] + "\n", "completion": f"<calc>{row['answer']}"} for row in gsm8k_rows[:24]]
    path = tmp_path / "model"
    make(preflight="off", lora=False).model.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer.add_tokens(["<calc>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=mean_resizing)
    if mean_resizing:
        model.config.name_or_path = ""  # rows tell by themselves where they began
    new = [len(tokenizer) - 1]
    more = {"rows": {"trainable_token_indices": {"embed_tokens": new, "lm_head": new}},
            "whole": {"modules_to_save": ["embed_tokens", "lm_head"]}}.get(trained, {})  # fmt: skip
    adapter = None if trained == "full" else LoraConfig(r=4, target_modules=["q_proj"], **more)
    words = said(make(model, preflight="quick", lora=False, adapter=adapter, rows=rows), "token rows")
    assert ("cannot learn those tokens" in words) == (trained == "lora")


def test_an_adapter_that_is_trained_and_not_active_is_named(make):
    model = make(preflight="off").model
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    both = [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]
    model.set_adapter("other")
    trainer = make(model, preflight="quick", lora=False)
    assert not said(trainer, "adapter targets")
    for name, parameter in both:
        parameter.requires_grad = ".default." in name
    with pytest.raises(ProofError, match="the adapter default is trained and not active"):
        trainer.train()
    model.set_adapter("default")
    assert not said(trainer, "adapter targets")
    model.base_model.disable_adapter_layers()
    for _, parameter in both:
        parameter.requires_grad = True
    assert "the adapter default and other is trained and not active" in said(trainer, "adapter targets")


def test_an_adapter_that_no_gradient_reaches_is_named_before_the_first_step(make):
    adapter = LoraConfig(r=4, lora_alpha=0, target_modules=["q_proj", "down_proj"])
    words = said(make(preflight="quick", adapter=adapter), "reference parity")
    assert words.startswith("no gradient reaches base_model.model.model.layers.0.self_attn.q_proj.lora_A")


def test_a_tied_head_that_would_not_be_saved_is_named(make):
    trainer = make(preflight="quick", lora=False, sizes={"tie_word_embeddings": True})
    assert not said(trainer, "tied head")
    trainer.model.config.tie_word_embeddings = False
    assert "would be random when it is loaded" in said(trainer, "tied head")
    trainer.model.lm_head.weight = torch.nn.Parameter(trainer.model.lm_head.weight.detach().clone())
    assert not said(trainer, "tied head")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["mistral3", "idefics3", "qwen2_vl", "gemma3"])
def test_a_vision_model_says_itself_whether_its_head_is_tied(model_type, tied):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, tie_word_embeddings=tied))
    assert check_tied_head(model) is None
    if tied:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        assert check_tied_head(model).verdict == "fail"


def test_an_adapter_on_an_embedding_that_is_tied_is_named(make):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    assert "merging it changes the other" in said(
        make(preflight="quick", adapter=adapter, sizes={"tie_word_embeddings": True}), "tied head"
    )
    assert not said(make(preflight="quick", adapter=adapter), "tied head")


# -- what is not known before the first steps --------------------------------------------------------------------------


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_terminators_that_a_collator_masks_are_named_after_the_first_steps(make, tokenizer, pairs, sound, level):
    if not sound:
        tokenizer.pad_token = tokenizer.eos_token  # and that collator takes each for padding
    rows = [{"text": row["prompt"] + row["completion"]} for row in pairs]
    trainer = make(preflight=level, rows=rows, packing=False)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer.data_collator = lambda features: collator([{"input_ids": row["input_ids"]} for row in features])
    if not sound and level == "full":
        with pytest.raises(ProofError, match=r"turn ends failed: 0\.0% .* \(of the first steps\)"):
            trainer.train()
        return
    trainer.train()
    found = [check for check in trainer.proof.checks if check.name == "turn ends"]
    assert [check.verdict for check in found] == ["pass" if sound else "warn"]


def test_a_stream_is_audited_after_the_first_steps(make, pairs):
    rows = [{**row, "completion": ""} for row in pairs]
    trainer = make(preflight="quick", rows=rows)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    trainer.train()
    (check,) = [check for check in trainer.proof.checks if check.name == "answers"]
    assert check.verdict == "warn" and check.seen.endswith("(of the first steps)")


def test_the_audit_of_the_first_steps_takes_what_collators_and_processors_give(make, tokenizer):
    trainer = make(preflight="quick")
    batch = trainer.first_batch()
    trainer.processing_class = types.SimpleNamespace(tokenizer=tokenizer)
    checks = audit_batches(trainer, [batch], "quick", Limits())
    assert {"labels", "turn ends", "token rows"} <= {check.name for check in checks}
    del batch["labels"]
    (check,) = audit_batches(trainer, [batch], "quick", Limits())
    assert check.verdict == "warn" and check.seen.startswith("not run: KeyError")
