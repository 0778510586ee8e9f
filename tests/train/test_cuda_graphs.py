"""CUDA graphs in the trainer: the same losses, and a report of where there are none."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from rerun import Rerun
from truetune.models import graphs as model_graphs
from truetune.models.plan import Room, fused_layers
from truetune.train import graphs
from truetune.train import trainer as trainer_module
from truetune.train.config import SFTConfig
from truetune.train.graphs import report_graphs, why_no_graphs
from truetune.train.recipe_trainer import RecipeTrainer

LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
DOCUMENTS = Dataset.from_list(  # packs of 64 and 62 tokens
    [
        {"input_ids": (ids := [(7 * i + j) % 97 + 3 for j in range(n)]), "labels": ids}
        for i, n in enumerate([40, 22] * 12)
    ]
)
CUDA = torch.cuda.is_available()


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(peft=LORA, model_settings=None, **fields):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, **model_settings or {},
        )  # fmt: skip
        settings = {
            "output_dir": str(tmp_path / "out"), "max_steps": 6, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "logging_steps": 1, "bf16": CUDA, "use_cpu": not CUDA, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, "max_length": 64, "learning_rate": 1e-2,
        }  # fmt: skip
        return RecipeTrainer(
            LlamaForCausalLM(config), SFTConfig(**settings | fields), train_dataset=DOCUMENTS, eval_dataset=None,
            processing_class=tokenizer, peft_config=peft,
        )  # fmt: skip

    return make


@pytest.fixture
def made(monkeypatch):
    """Graphs on a CPU too; those that were made."""
    made = []

    class Kept(model_graphs.LayerGraphs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(graphs, "LayerGraphs", Kept)
    if not CUDA:
        monkeypatch.setattr(graphs, "Recorder", lambda device: Rerun())

        def report(trainer) -> bool:
            trainer.report.add("CUDA graphs", "on", "")
            return trainer.args.cuda_graphs

        monkeypatch.setattr(trainer_module, "report_graphs", report)
    return made


def logged(trainer) -> list[dict]:
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_losses_are_the_same_with_graphs(make, made, peft):
    plain = logged(make(peft, cuda_graphs=False))
    assert not made
    trainer = make(peft)
    ours = logged(trainer)
    assert made[0].why_off is None
    assert made[0].replays == 2 * 6 - 1
    assert made[0].captures == 1
    assert made[0].documents == 4
    tolerance = 3e-2 if CUDA else 1e-5
    assert ours == [pytest.approx(entry, rel=tolerance) for entry in plain]
    receipt = [check.verdict for check in trainer.proof.checks if check.name in ("trained tensors", "frozen tensors")]
    assert receipt == ["pass"] * 2
    assert trainer.report.lines[-1].why == "11 packs ran in them"
    assert not any("graphs" in vars(layer) for layer in fused_layers(trainer.model))  # given back


def test_packs_of_every_epoch_hold_as_many_documents(make):
    trainer = make()
    lengths = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    documents = Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n} for n in lengths])
    epochs = [list(trainer._sampler(documents, seed)) for seed in range(3)]
    assert epochs[0] != epochs[1]
    counts = [sorted(len(pack) for pack in packs) for packs in epochs]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(("fields", "why"), [
    ({"cuda_graphs": False}, "cuda_graphs=False"),
    ({"activation_policy": "lean"}, "not all activations"),
    ({"neftune_noise_alpha": 5}, "padded"),
    ({}, "no room" if CUDA else "asks the host"),
])  # fmt: skip
def test_where_there_are_none_the_reason_is_given(make, fields, why):
    trainer = make(**fields)
    trainer.activations.room = Room(1, 2**36)
    assert why in why_no_graphs(trainer)


def test_report_speaks_of_them_on_a_gpu_alone(make):
    trainer = make()
    for _ in range(2):
        assert report_graphs(trainer) == CUDA
    assert [line.part for line in trainer.report.lines].count("CUDA graphs") == int(CUDA)
