"""How far the settings let the weights move: steps, learning rates, clipping and weight decay, from numbers alone."""

import math
from typing import Any

import torch
import transformers
from transformers import get_scheduler

from truetune.proof.result import Check

SAMPLED_STEPS = 1000
NOTHING = 1e-3  # of the learning rate that is asked for
LOW_PEAK = 0.5  # of it
MOST_STILL = 0.5  # of the steps
LEAST_OF_ADAM = 0.1  # of its usual update
LEAST_LEFT = 0.05  # of a weight, by decay alone


def check_schedule(trainer: Any) -> Check:
    """It warns, and stops nothing: a rate of 0 or a single step of a warm-up may be tried on purpose."""
    args, steps = trainer.args, trainer.planned_steps()
    rates = _rates(trainer, steps) if steps else None
    asked = args.learning_rate
    faults = []
    if steps == 0:
        faults.append("there is no step: raise num_train_epochs or set max_steps")
    if asked == 0 and trainer.optimizer is None:
        faults.append("the learning rate is 0, which teaches nothing: raise it")
    if rates and asked:
        faults += _faults_of_rates(rates, asked, steps)
    if trainer.optimizer is None and "adam" in str(getattr(args.optim, "value", args.optim)):
        faults += _faults_of_adam(trainer, rates, steps)
    shown = "an unknown number of" if steps is None else f"{steps:,}"
    rate = f"up to {max(rates):.3g}, {sum(rates) / len(rates):.3g} on average" if rates else "not known before"
    return Check(
        "schedule", f"{shown} steps; learning rate {rate}", "steps that move the weights",
        "warn" if faults else "pass",
        mend="; ".join(faults),
        details={"steps": steps, "asked": asked, "sampled_rates": rates and rates[:: max(1, len(rates) // 50)]},
    )  # fmt: skip


def _rates(trainer: Any, steps: int) -> list[float] | None:
    """Of steps at equal distances; None where somebody else makes them, or they depend on losses."""
    args = trainer.args
    own = type(trainer).create_scheduler is not transformers.Trainer.create_scheduler
    if own or trainer.optimizer is not None or trainer.lr_scheduler is not None:
        return None
    warmup = args.get_warmup_steps(steps)
    scheduler: Any = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not hasattr(scheduler, "lr_lambdas"):
        return None
    # With the end of a warm-up, from which some schedules fall fast.
    places = sorted({*range(0, steps, max(1, steps // SAMPLED_STEPS)), min(warmup, steps - 1)})
    return [args.learning_rate * float(scheduler.lr_lambdas[0](step)) for step in places]


def _faults_of_rates(rates: list[float], asked: float, steps: int) -> list[str]:
    peak, still = max(rates), sum(rate < NOTHING * asked for rate in rates) / len(rates)
    if peak < LOW_PEAK * asked:
        return [f"the learning rate of {asked:.3g} is never reached: shorten the warm-up, or train more than {steps:,} "
                "steps"]  # fmt: skip
    if still > MOST_STILL:
        return [f"the learning rate is nearly 0 in {still:.0%} of the steps: change lr_scheduler_type or its arguments"]
    return []


def _faults_of_adam(trainer: Any, rates: list[float] | None, steps: int | None) -> list[str]:
    """An update is the rate times g / (g + epsilon), where g is a gradient's usual size: at most what clipping leaves
    of it. Decay takes the rate times `weight_decay` of a weight at each step."""
    args = trainer.args
    size = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    faults = []
    if args.max_grad_norm and size:
        usual = args.max_grad_norm / math.sqrt(size)
        if usual < LEAST_OF_ADAM * (usual + args.adam_epsilon):
            faults.append(
                f"gradients clipped to a norm of {args.max_grad_norm:.3g} are lost beside adam_epsilon "
                f"{args.adam_epsilon:.3g}: raise max_grad_norm or lower adam_epsilon"
            )
    left = math.exp(-args.weight_decay * steps * sum(rates) / len(rates)) if rates and steps else 1.0
    if left < LEAST_LEFT:
        faults.append(f"weight decay alone leaves {left:.1%} of a weight: lower weight_decay")
    return faults
