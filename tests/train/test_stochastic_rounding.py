"""Stochastic rounding: right on average, the same in a resumed run; and the small updates that it saves."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from truetune import SFTConfig, SFTTrainer
from truetune.train.errors import TrainError
from truetune.train.stochastic_rounding import StochasticAdamW, stochastic_round


def test_rounding_is_right_on_average_and_to_a_neighbour():
    x = torch.tensor([1.0 + 2**-9, -3.0 - 2**-8 / 3, 1e-30, 0.0]).repeat(20000, 1)
    rounded = stochastic_round(x, torch.Generator().manual_seed(0)).float()
    step = x.abs() * 2**-7
    assert ((rounded - x).abs() <= step).all()
    assert ((rounded.double().mean(0) - x[0].double()).abs() <= 4 * step[0] / 20000**0.5).all()
    exact = torch.tensor([1.0, -2.5, float("inf")])
    assert torch.equal(stochastic_round(exact).float(), exact)


def train(optimizer_class, dtype, steps=300, **options):
    """Pushes weights of about 1 by 1e-5 a step: 0.003 in all, less than the last digit of bf16."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.linspace(0.9, 1.1, 4096).to(dtype))
    before = weight.detach().float().clone()
    optimizer = optimizer_class([weight], lr=1e-5, weight_decay=0.0, **options)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return (before - weight.detach().float()).mean().item()


def test_small_updates_arrive_where_rounding_to_the_nearest_loses_them():
    in_fp32 = train(torch.optim.AdamW, torch.float32)
    assert train(torch.optim.AdamW, torch.bfloat16) == 0.0
    assert train(StochasticAdamW, torch.bfloat16) == pytest.approx(in_fp32, rel=0.05)


def test_it_is_adamw_in_fp32():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(17, 5)), torch.nn.Parameter(torch.randn(9))]
    copies = copy.deepcopy(weights)
    ours = StochasticAdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.3}], lr=1e-2)
    theirs = torch.optim.AdamW([{"params": copies[:1]}, {"params": copies[1:], "weight_decay": 0.3}], lr=1e-2)
    for _ in range(20):
        for weight, other in zip(weights, copies, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, other in zip(weights, copies, strict=True):
        assert torch.allclose(weight, other, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_on_to_the_bit():
    def run(steps, weight, optimizer):
        for step in steps:
            weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()

    def new():
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 64).bfloat16())
        return weight, StochasticAdamW([weight], lr=1e-3, seed=7)

    whole = new()
    run(range(10), *whole)
    first = new()
    run(range(5), *first)
    resumed = new()
    resumed[0].data.copy_(first[0].data)
    resumed[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert resumed[1].state[resumed[0]]["exp_avg"].dtype == torch.float32
    torch.manual_seed(123)  # the draws are no one else's
    run(range(5, 10), *resumed)
    assert torch.equal(whole[0], resumed[0])


def full_trainer(tmp_path, tokenizer, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(dtype)
    args = SFTConfig(
        str(tmp_path), max_steps=3, learning_rate=1e-6, lr_scheduler_type="constant", bf16=False, use_cpu=True,
        report_to=[], save_strategy="no", **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": "She sold 48 clips in April, and half as many in May."}] * 24)
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def test_full_fine_tuning_in_bf16_keeps_its_small_updates(tmp_path, tokenizer):
    moved = {}
    for rounding in (False, True):
        trainer = full_trainer(tmp_path, tokenizer, stochastic_rounding=rounding)
        layers = trainer.model.model.layers.state_dict()
        before = {name: tensor.clone() for name, tensor in layers.items() if tensor.dim() > 1}
        trainer.train()
        moved[rounding] = sum((layers[name] != tensor).sum().item() for name, tensor in before.items())
    assert moved[True] > 3 * moved[False]


def test_what_cannot_be_rounded_is_an_error(tmp_path, tokenizer):
    for options, cause in (({"dtype": torch.float32}, "nothing to round"), ({"optim": "sgd"}, "not sgd")):
        trainer = full_trainer(tmp_path, tokenizer, stochastic_rounding=True, **options)
        with pytest.raises(TrainError, match=cause):
            trainer.create_optimizer()


def test_what_is_not_finite_stays_what_it_is():
    """0x7fffffff is the NaN that GPUs make."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int64).to(torch.int32)
    for _ in range(20):
        nan, quiet, negative, *infinite = stochastic_round(bits.view(torch.float32)).tolist()
        assert nan != nan and quiet != quiet and negative != negative
        assert infinite == [float("inf"), float("-inf")]
