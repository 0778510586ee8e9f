"""Planted faults: each is switched on alone, and the check that is named for it catches it."""

import dataclasses
import importlib
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from truetune import run
from truetune.data import turns
from truetune.models import attention, blocks
from truetune.models import head as bound_head
from truetune.models.attention_backends import Documents as Boundaries
from truetune.proof import storage
from truetune.proof.errors import ProofError
from truetune.proof.preflight import EXCERPT
from truetune.proof.supervision import Documents
from truetune.recipe import load_recipe
from truetune.train import proving
from truetune.train.errors import TrainError

GRANITE = {"logits_scaling": 2.0}
head = importlib.import_module("truetune.ops.linear_cross_entropy")  # the package's name is the function


def failed(trainer) -> set[str]:
    return {check.name for check in trainer.preflight().failures}


@pytest.fixture
def trainer(make):
    return make(preflight="full")


# -- labels: the trainer's documents are changed on their way to the audit ---------------------------------------------


def shifted(ids, labels, tokenizer):
    return ids, [np.concatenate([[-100], row[:-1]]) for row in labels]


def without_terminators(ids, labels, tokenizer):
    return ids, [np.where(row == tokenizer.eos_token_id, -100, row) for row in labels]


def all_masked(ids, labels, tokenizer):
    return ids, [np.full_like(row, -100) for row in labels]


def with_two_bos(ids, labels, tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    two = [tokenizer.bos_token_id] * 2
    return [np.concatenate([two, row]) for row in ids], [np.concatenate([[-100] * 2, row]) for row in labels]


def with_prompts(ids, labels, tokenizer):
    return ids, [np.concatenate([[-100], row[1:]]) for row in ids]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (shifted, "labels"), (without_terminators, "turn ends"), (all_masked, "supervised tokens"),
        (with_two_bos, "first tokens"), (with_prompts, "prompts"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_faults_of_labels(make, tokenizer, monkeypatch, fault, check):
    trainer = make(preflight="full", preflight_limits={"whole_documents": 0.5}, packing=False)
    documents, _, _ = trainer.documents_to_audit(everything=True)
    assert check not in failed(trainer)
    parts = [(documents.tokens(d), documents.labels_N[documents.ends[d] : documents.ends[d + 1]])
             for d in range(len(documents))]  # fmt: skip
    changed = Documents(*fault([ids for ids, _ in parts], [labels for _, labels in parts], tokenizer))
    monkeypatch.setattr(trainer, "documents_to_audit", lambda everything: (changed, None, None))
    assert check in failed(trainer)


def test_the_tokenizer_of_a_model_with_more_tokens(trainer):
    trainer.model.get_base_model().resize_token_embeddings(300)
    assert "token ids" in failed(trainer)
    with pytest.raises(TrainError, match="token ids that the model has no embedding for: the tokenizer knows more"):
        trainer.rehearse()


# -- attention and batches ---------------------------------------------------------------------------------------------


def test_document_boundaries_dropped(trainer, monkeypatch):
    attend = attention.attend

    def one_document(q, k, v, documents, scores):
        ends = torch.tensor([0, len(q)], dtype=torch.int32)
        return attend(q, k, v, Boundaries(ends, len(q)), scores)

    assert not failed(trainer)
    monkeypatch.setattr(attention, "attend", one_document)
    assert {"leak probe", "reference parity"} <= failed(trainer)


def test_a_backend_that_looks_ahead(trainer, monkeypatch):
    def ahead(q, k, v, documents, scores):
        ends = documents.cu_seq_lens.tolist()
        parts = [torch.nn.functional.scaled_dot_product_attention(
                     *(x[a:b].transpose(0, 1) for x in (q, k, v)), scale=scores.scaling, enable_gqa=True
                 ).transpose(0, 1) for a, b in itertools.pairwise(ends)]  # fmt: skip
        needs = attention.Needs(16, False, False, False)
        return torch.cat(parts), attention.choose_backend(needs, q.device, q.dtype)[0]

    monkeypatch.setattr(attention, "attend", ahead)
    assert "leak probe" in failed(trainer)


def test_a_window_off_by_one(make, monkeypatch):
    trainer = make("mistral", sizes={"sliding_window": 16}, preflight="full")
    assert not failed(trainer)
    attend = attention.attend

    def wider(q, k, v, documents, scores):
        return attend(q, k, v, documents, dataclasses.replace(scores, window=scores.window + 1))

    monkeypatch.setattr(attention, "attend", wider)
    assert failed(trainer) == {"reference parity"}


def test_positions_that_do_not_restart(trainer, monkeypatch):
    fused_outputs = trainer.fused_outputs

    def going_on(model, inputs, num_items):
        positions = torch.arange(inputs["position_ids"].shape[1])[None].flip(1)
        return fused_outputs(model, {**inputs, "position_ids": positions}, num_items)

    monkeypatch.setattr(trainer, "fused_outputs", going_on)
    assert failed(trainer) == {"reference parity"}


# -- loss --------------------------------------------------------------------------------------------------------------


def test_a_mean_of_means(trainer, monkeypatch):
    fused_outputs = trainer.fused_outputs
    monkeypatch.setattr(trainer, "fused_outputs", lambda model, inputs, num_items: fused_outputs(model, inputs, 100))
    assert failed(trainer) == {"reference parity"}


def test_the_scale_of_logits_folded_in_twice(make, monkeypatch):
    trainer = make("granite", sizes=GRANITE, preflight="full")
    assert not failed(trainer)
    loss = bound_head.linear_cross_entropy
    monkeypatch.setattr(
        bound_head, "linear_cross_entropy",
        lambda *args, logit_scale, **keywords: loss(*args, logit_scale=logit_scale**2, **keywords),
    )  # fmt: skip
    assert failed(trainer) == {"reference parity"}


@pytest.mark.parametrize("fields", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=lambda f: next(iter(f)))
def test_a_loss_that_is_not_the_one_asked_for(make, monkeypatch, fields):
    trainer = make(preflight="full", **fields)
    assert not failed(trainer)
    fused_outputs = trainer.fused_outputs

    def plain_nll(model, inputs, num_items):
        arguments = {"fused_loss": True, "num_items": num_items, "use_cache": False}
        return model(**{**inputs, **arguments})

    monkeypatch.setattr(trainer, "fused_outputs", plain_nll)
    assert fused_outputs is not plain_nll and failed(trainer) == {"reference parity"}


def test_the_gradients_of_all_chunks_but_the_last_are_lost(make, monkeypatch):
    trainer = make(lora=False, preflight="full")
    monkeypatch.setattr(head, "_chunk_rows", lambda *_: 128)
    assert not failed(trainer)
    loss = head.cross_entropy_chunk_torch

    def only_first(logits, bias, rows, how, write_grad):
        loss(logits, bias, rows, how, write_grad)
        if write_grad and len(rows.targets) < 128:
            logits.zero_()

    monkeypatch.setattr(head, "cross_entropy_chunk_torch", only_first)
    assert failed(trainer) == {"reference parity"}


# -- fused layers ------------------------------------------------------------------------------------------------------


def test_one_pair_of_lora_detached(trainer, monkeypatch):
    backward = blocks.linears_backward_parameters

    def without_v(dys, x, xa, dxa, linears):
        gradients = backward(dys, x, xa, dxa, linears)
        if len(linears) == 3:
            gradients[10] = gradients[11] = None
        return gradients

    monkeypatch.setattr(blocks, "linears_backward_parameters", without_v)
    assert failed(trainer) == {"reference parity"}
    monkeypatch.setattr(trainer.proving, "preflight", lambda: proving.Proof())
    with pytest.raises(ProofError, match=r"trained tensors failed: 14 of 16 moved in 3 steps; 2 with no gradient"):
        trainer.train()


def test_the_scaling_of_lora_folded_in_twice(make, monkeypatch):
    trainer = make(preflight="full")
    forward = blocks.linears_forward

    def twice(x, linears, **keywords):
        linears = [dataclasses.replace(linear, scaling=linear.scaling * 2) for linear in linears]
        return forward(x, linears, **keywords)

    monkeypatch.setattr(blocks, "linears_forward", twice)
    assert failed(trainer) == {"reference parity"}


@pytest.mark.parametrize("fault", ["eps", "offset"])
def test_another_norm(trainer, monkeypatch, fault):
    forward = blocks.rms_norm_forward

    def wrong(x, weight, eps, *, offset, **keywords):
        eps, offset = (1e-1, offset) if fault == "eps" else (eps, offset + 1)
        return forward(x, weight, eps, offset=offset, **keywords)

    monkeypatch.setattr(blocks, "rms_norm_forward", wrong)
    assert failed(trainer) == {"reference parity"}


def test_the_last_layer_loses_a_row(trainer, monkeypatch):
    fused_outputs = trainer.fused_outputs
    monkeypatch.setattr(
        trainer, "fused_outputs",
        lambda model, inputs, num_items: fused_outputs(
            model, {**inputs, "loss_rows": inputs["loss_rows"][:-1]}, num_items),
    )  # fmt: skip
    assert failed(trainer) == {"reference parity"}


# -- steps and files ---------------------------------------------------------------------------------------------------


def test_a_trained_tensor_that_the_optimizer_does_not_have(make, monkeypatch):
    trainer = make(lora=False, preflight="quick")
    create = trainer.create_optimizer

    def without_one(*args, **keywords):
        optimizer = create(*args, **keywords)
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    monkeypatch.setattr(trainer, "create_optimizer", without_one)
    with pytest.raises(ProofError, match="1 with a gradient that did not move them"):
        trainer.train()


def test_a_callback_that_changes_what_is_frozen(make):
    class Thaw(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            next(p for p in model.parameters() if not p.requires_grad).data.add_(1e-3)

    with pytest.raises(ProofError, match="frozen tensors failed"):
        make(preflight="quick", callbacks=[Thaw()]).train()


def test_the_embeddings_learning_rate_lost(make, monkeypatch):
    from truetune.train import trainer as module

    keep = module.set_learning_rates

    def forgotten(optimizer, model, **rates):
        return keep(optimizer, model)

    make(lora=False, preflight="quick", embedding_learning_rate=1e-5).train()
    monkeypatch.setattr(module, "set_learning_rates", forgotten)
    with pytest.raises(ProofError, match="learning rates failed"):
        make(lora=False, preflight="quick", embedding_learning_rate=1e-5).train()


def test_an_export_that_loses_a_tensor(trainer, monkeypatch):
    load = storage.load_file
    monkeypatch.setattr(storage, "load_file", lambda file: dict(list(load(file).items())[1:]))
    assert failed(trainer) == {"export"}


def checked(tmp_path, rows, **keys):
    """The checks of `truetune check` on the built-in model."""
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": "builtin:demo", "data": tmp_path / "asked.jsonl", "max_length": 512, **keys}
    proof = run.check(load_recipe(None, [f"{key}={value}" for key, value in recipe.items()]), Console(quiet=True))
    return {check.name: check for check in proof.checks}


@pytest.mark.parametrize("supervise", ["responses", "all"])
def test_questions_that_are_supervised_like_answers(tmp_path, gsm8k_rows, monkeypatch, supervise):
    segments = turns._segments
    if supervise != "all":
        monkeypatch.setattr(turns, "_segments", lambda of: [part._replace(supervised=True) for part in segments(of)])
    rows = [{"user": row["question"], "assistant": row["answer"]} for row in gsm8k_rows[:12]]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    roles = checked(tmp_path, rows, supervise=supervise)["roles"]
    assert roles.details["user" if supervise == "all" else "prompt"]["share"] > 0.9
    assert (roles.verdict, roles.allow) == (("pass", "") if supervise == "all" else ("fail", "supervised_roles"))


def test_a_source_of_which_nothing_is_trained(tmp_path, gsm8k_rows):
    (tmp_path / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "Nobody answers."}]}\n')
    rows = [{"user": row["question"], "assistant": row["answer"]} for row in gsm8k_rows[:12]]
    data = f"[{{path: {tmp_path}/asked.jsonl}}, {{path: {tmp_path}/silent.jsonl}}]"
    sources = checked(tmp_path, rows, data=data)["sources"]
    assert sources.verdict == "warn" and f"nothing of {tmp_path}/silent.jsonl is trained" in sources.mend
    assert sources.details[f"{tmp_path}/asked.jsonl"]["rows"] == 12


def test_a_checkpoint_without_a_tensor(make, monkeypatch):
    trainer = make(preflight="full", save_strategy="steps")
    save = type(trainer.model).save_pretrained

    def loses_one(model, path, *args, **kwargs):
        save(model, path, *args, **kwargs)
        file = Path(path) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, file)

    monkeypatch.setattr(type(trainer.model), "save_pretrained", loses_one)
    assert failed(trainer) == {"checkpoint", "export"}


def test_an_optimizer_whose_averages_are_saved_in_bf16(make, monkeypatch):
    trainer = make(preflight="full", save_strategy="steps")
    state_dict = torch.optim.AdamW.state_dict

    def rounded(optimizer):
        found = state_dict(optimizer)
        states = found["state"].items()
        return {**found, "state": {key: {**of, "exp_avg": of["exp_avg"].bfloat16().float()} for key, of in states}}

    save = trl.SFTTrainer._save_optimizer_and_scheduler

    def saves_rounded(self, directory):
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "state_dict", rounded)
            save(self, directory)

    monkeypatch.setattr(trl.SFTTrainer, "_save_optimizer_and_scheduler", saves_rounded)
    assert failed(trainer) == {"checkpoint"}


def test_an_adapter_that_is_not_loaded_back(make, monkeypatch):
    trainer = make(preflight="full", save_strategy="steps")
    monkeypatch.setattr(trl.SFTTrainer, "_load_from_checkpoint", lambda self, checkpoint, model=None: None)
    assert failed(trainer) == {"checkpoint"}


def test_a_loss_of_the_largest_batch_that_is_not_finite(make, monkeypatch):
    """A sum over many tokens overflows: the excerpts that parity takes do not see it."""
    trainer = make(preflight="full", evaluate=True)
    outputs = trainer.fused_outputs

    def overflows(model, inputs, num_items):
        found = outputs(model, inputs, num_items)
        if inputs["input_ids"].numel() > EXCERPT["full"]:
            found.loss = found.loss * float("inf")
        return found

    monkeypatch.setattr(trainer, "fused_outputs", overflows)
    monkeypatch.setattr(trainer, "_train_batch_size", 8)
    assert failed(trainer) == {"largest batch"}


def test_a_target_that_no_module_has(make, monkeypatch):
    trainer = make(preflight="full")
    trainer.model.active_peft_config.target_modules |= {"query"}
    assert failed(trainer) == {"adapter targets"}


def test_a_gradient_that_is_not_finite(trainer, monkeypatch):
    monkeypatch.setattr(trainer.proving, "preflight", lambda: proving.Proof())
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    layer.lora_A["default"].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ProofError, match="gradient norm of step 1 is not finite"):
        trainer.train()
