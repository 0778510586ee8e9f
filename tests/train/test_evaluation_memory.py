"""An evaluation's memory is predicted, and one that does not fit is refused before training, with what to change."""

import weakref
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models.small_models import with_lora
from truetune.models.memory import StepMemory, optimizer_bytes
from truetune.models.plan import Room
from truetune.models.shapes import read_model
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError
from truetune.train.rehearsal import forward_evaluating, rehearse_evaluation
from truetune.train.trainer import SFTTrainer

GIB = 2**30
LAYERS, VOCABULARY, LENGTH = 32, 128256, 40


@pytest.fixture(scope="module")
def llama_8b() -> StepMemory:
    """An adapter on an 8B model in bf16."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCABULARY,
    )  # fmt: skip
    with torch.device("meta"):
        model = with_lora(AutoModelForCausalLM.from_config(config).to(torch.bfloat16)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    shape = read_model(model, torch.bfloat16)
    return StepMemory(shape, tokens=16384, optimizer=optimizer_bytes("adamw_torch", shape.trained))


# -- what is predicted


@pytest.mark.parametrize("full_logits", [False, True])
def test_a_larger_evaluation_batch_needs_more(llama_8b, full_logits):
    peaks = [llama_8b.evaluation_peak(tokens, full_logits) for tokens in (1, 1000, 8192, 16384, 32768, 131072)]
    assert llama_8b.held < peaks[0]
    assert peaks == sorted(set(peaks))


def test_the_evaluation_batch_counts_and_not_that_of_training(llama_8b):
    for tokens in (1024, 65536):
        other = replace(llama_8b, tokens=tokens, full_logits=True)
        assert other.evaluation_peak(8192, False) == llama_8b.evaluation_peak(8192, False)


def test_logits_are_predicted_where_metrics_take_them(llama_8b):
    tokens = 8192
    logits, fused = (llama_8b.evaluation_peak(tokens, full_logits) for full_logits in (True, False))
    assert logits - llama_8b.held >= tokens * VOCABULARY * (2 + 2 * 4)  # bf16, and TRL's loss makes two in fp32
    assert fused - llama_8b.held < tokens * VOCABULARY * 2  # ours never holds those of a whole batch


def test_gate_and_up_are_there_though_nothing_is_saved(llama_8b):
    narrow = tuple(replace(layer, intermediate=layer.intermediate // 2) for layer in llama_8b.model.layers)
    half = replace(llama_8b, model=replace(llama_8b.model, layers=narrow))
    tokens, width = 65536, llama_8b.model.layers[0].intermediate
    difference = llama_8b.evaluation_peak(tokens, False) - half.evaluation_peak(tokens, False)
    assert difference == 3 * tokens * 2 * width // 2  # in bf16, and their product


def test_without_gradients_less_is_needed_than_in_a_training_step(llama_8b):
    for tokens in (1024, 16384, 65536):
        step = replace(llama_8b, tokens=tokens)
        assert step.evaluation_peak(tokens, False) < step.peak(("keep",) * LAYERS)


def test_what_is_held_beside_an_evaluation_is_counted_once(llama_8b):
    """Weights, optimizer state, gradients that outlive a micro-batch and DDP's copies of them."""
    model = llama_8b.model
    bare = replace(llama_8b, optimizer=0)
    passing = bare.evaluation_peak(8192, False) - model.weights
    full = replace(llama_8b, optimizer=3 * GIB, accumulates=True, buckets=True)
    assert full.evaluation_peak(8192, False) == passing + model.weights + 3 * GIB + 2 * model.gradients
    doubled = replace(full, correction=2.0)  # of what was measured, which is not held
    assert doubled.evaluation_peak(8192, False) - full.evaluation_peak(8192, False) == passing


class Live(TorchDispatchMode):
    """`most`: bytes that were alive at once of what was made while this mode was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(result):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes.keys() | given:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("rows", [4, 32])
def test_an_evaluation_with_logits_needs_what_is_predicted(make, rows):
    trainer = make(rows, size=rows, compute_metrics=lambda predictions: {})
    batch = trainer.largest_batch(evaluation=True)
    forward_evaluating(trainer, batch, full_logits=True)  # what is made once is there
    with Live() as live:
        forward_evaluating(trainer, batch, full_logits=True)
    memory = trainer.activations.memory
    predicted = memory.evaluation_peak(batch["input_ids"].numel(), full_logits=True) - memory.held
    assert live.most <= predicted < 2 * live.most


# -- where it does not fit


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer that evaluates `rows` rows of LENGTH tokens (or `lengths`), `size` at a time, where memory runs out
    behind the prediction for `fitting` rows."""

    def make(rows, size, fitting=None, length=LENGTH, lengths=None, compute_metrics=None, **fields):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "max_length": LENGTH,
                "per_device_eval_batch_size": size, "eval_strategy": "steps", "save_strategy": "no",
                "preflight": "off", "disable_tqdm": True,
            } | fields
        )  # fmt: skip
        lengths = lengths or [length] * rows
        documents = [{"input_ids": [3 + i] * n, "labels": [3 + i] * n} for i, n in enumerate(lengths)]
        trainer = SFTTrainer(
            LlamaForCausalLM(config), args, train_dataset=Dataset.from_list(documents[:1]),
            eval_dataset=Dataset.from_list(documents), processing_class=tokenizer, compute_metrics=compute_metrics,
        )  # fmt: skip
        if fitting is not None:
            memory = trainer.activations.memory
            available = memory.evaluation_peak(int(fitting * LENGTH), full_logits=False)
            trainer.activations.room = Room(available, available)

            def run_out(model, args, arguments) -> None:
                tokens, full_logits = arguments["input_ids"].numel(), "fused_loss" not in arguments
                if memory.evaluation_peak(tokens, full_logits) > available:
                    raise torch.cuda.OutOfMemoryError("no more memory")

            trainer.model.register_forward_pre_hook(run_out, with_kwargs=True)
        return trainer

    return make


def advice(trainer) -> str | None:
    try:
        trainer.activations._rehearse_evaluation()
    except TrainError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("size", "fitting"), [(2, 1), (6, 4), (6, 5)])
def test_the_largest_evaluation_batch_that_fits_is_named_and_fits(make, size, fitting):
    text = advice(make(8, size, fitting))
    assert text == (
        f"The largest evaluation batch ({size * LENGTH} tokens) runs out of device memory: "
        f"lower per_device_eval_batch_size from {size} to {fitting}."
    )
    assert advice(make(8, fitting, fitting)) is None
    assert advice(make(8, fitting + 1, fitting)) is not None


def test_where_not_even_one_row_fits_the_advice_goes_on_until_it_works(make):
    assert advice(make(4, 4, 0.5)).endswith(f"evaluate on rows shorter than {LENGTH} tokens.")
    assert advice(make(4, 1, 0.5)).endswith(f"evaluate on rows shorter than {LENGTH} tokens.")
    assert advice(make(4, 1, 0.5, length=LENGTH // 2)) is None


@pytest.mark.parametrize(
    ("lengths", "size", "mend"),
    [
        ([LENGTH] * 2, 8, "lower per_device_eval_batch_size from 8 to 1"),  # two rows alone are there
        ([LENGTH, 30, 4, 4], 4, "lower per_device_eval_batch_size from 4 to 1"),
        ([LENGTH, 20, 4, 4], 4, "lower per_device_eval_batch_size from 4 to 2"),
        ([2 * LENGTH, 4, 4, 4], 4, f"evaluate on rows shorter than {2 * LENGTH} tokens"),
    ],
)
def test_the_advice_counts_the_rows_that_are_there(make, lengths, size, mend):
    assert advice(make(0, size, 1.5, lengths=lengths, max_length=4 * LENGTH)).endswith(f": {mend}.")


def test_a_batch_that_is_evaluated_with_logits_is_tried_as_it_comes(make):
    trainer = make(0, 3, lengths=[LENGTH, 20, 4], compute_metrics=lambda predictions: {})
    (given,) = trainer.get_eval_dataloader()
    tried = trainer.largest_batch(evaluation=True)
    assert tried["input_ids"].shape == given["input_ids"].shape == (3, LENGTH)


def test_an_evaluation_whose_logits_do_not_fit_fits_without_them(make):
    metrics = {"compute_metrics": lambda predictions: {}}
    assert ": set prediction_loss_only=True, or evaluate" in advice(make(2, 1, 1, **metrics))
    assert advice(make(2, 1, 1, **metrics, prediction_loss_only=True)) is None


def test_what_is_not_evaluated_is_not_tried(make):
    assert advice(make(4, 4, 1)) is not None
    assert advice(make(4, 4, 1, eval_strategy="no")) is None
    assert advice(make(4, 4, 1, eval_strategy="no", eval_on_start=True)) is not None


@pytest.mark.parametrize("fits", [True, False])
def test_an_evaluation_tried_leaves_no_trace(make, fits):
    trainer = make(4, 4, 4 if fits else 1)
    parameter = next(trainer.model.parameters())
    parameter.grad = gradient = torch.ones_like(parameter)
    trainer.model.train()
    state = torch.get_rng_state()
    assert rehearse_evaluation(trainer, trainer.largest_batch(evaluation=True), full_logits=False) is fits
    assert parameter.grad is gradient and torch.equal(gradient, torch.ones_like(parameter))
    assert all(module.training for module in trainer.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_that_really_runs_out_is_heard_and_given_back(make):
    trainer = make(8, 8, use_cpu=False)
    torch.cuda.empty_cache()
    before, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    filling = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")
    ids = torch.full((2**14, 320), 3)  # embeddings of 0.6 GiB, logits of 39 GiB
    fits = rehearse_evaluation(trainer, {"input_ids": ids, "labels": ids}, full_logits=True)
    del filling
    assert not fits
    assert torch.cuda.memory_allocated() <= before
