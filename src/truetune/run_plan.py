"""`truetune plan`: what a recipe's step needs and how fast it may be, from config.json alone."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from truetune.host import host_bytes
from truetune.models.errors import ModelError
from truetune.models.load import check_model
from truetune.models.memory import StepMemory
from truetune.models.plan import (
    GIB,
    MARGIN,
    POLICIES,
    ActivationPlan,
    Room,
    advice,
    choose,
    layer_seconds,
    load_plan,
)
from truetune.models.rates import (
    UNKNOWN_GPU,
    estimated_rates,
    head_seconds,
    known_flops,
    known_host_rate,
    measured_flops,
)
from truetune.models.shapes import why_not_planned
from truetune.recipe import Recipe
from truetune.run_model import (
    check_adapter,
    hub_arguments,
    model_path,
    model_precision,
    with_adapter,
    without_weights,
)
from truetune.train.activations import asked_policy, step_memory
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError

CONTEXT = int(0.6 * GIB)  # CUDA's own, where a GPU is only named by its memory
OTHER_HOST = 128 * GIB  # the memory of another machine than this one


@dataclass(frozen=True)
class RecipePlan:
    """The plan of a recipe's step on one device. `tokens_per_second` is an estimate at `flops` FLOP/s of `device`."""

    plan: ActivationPlan
    fits: bool
    mend: str | None
    margin: int
    evaluation_peak: int | None
    tokens_per_second: float
    flops: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "fits": self.fits,
            "mend": self.mend,
            "policy": plan.policy,
            "choices": list(plan.choices),
            "tokens": plan.tokens,
            "predicted_peak": plan.predicted_peak,
            "margin": self.margin,
            "device_bytes": plan.device_bytes,
            "terms": plan.terms,
            "evaluation_peak": self.evaluation_peak,
            "tokens_per_second": round(self.tokens_per_second),
            "estimated_at": {"device": self.device, "tflops": round(self.flops / 1e12)},
        }


def plan_recipe(recipe: Recipe, args: SFTConfig, memory_gib: float | None = None) -> RecipePlan:
    """Plans `recipe` for a GPU of `memory_gib` (None: the one here). Reads neither weights nor data.

    Raises `ModelError` and `TrainError` where the recipe or the model cannot be planned.
    """
    check_adapter(recipe)
    precision = model_precision(recipe)
    config = check_model(
        model_path(recipe), precision="bf16" if precision == "fp8" else precision, **hub_arguments(recipe)
    )
    return plan_model(with_adapter(without_weights(config, recipe), recipe), recipe, args, memory_gib)


def plan_model(model: Any, recipe: Recipe, args: SFTConfig, memory_gib: float | None = None) -> RecipePlan:
    """As `plan_recipe`, with the recipe's model, which needs no weights, and its adapter.

    Raises `ModelError` and `TrainError` where the recipe or the model cannot be planned.
    """
    if args.gradient_checkpointing_kwargs or args.activation_offloading or not args.fuse:
        raise TrainError(
            "this recipe leaves the memory of activations to Transformers, which is not planned: remove "
            "gradient_checkpointing_kwargs, activation_offloading and fuse: false."
        )
    asked = asked_policy(args)
    precision = model_precision(recipe)
    if reason := why_not_planned(model):
        raise ModelError(f"{recipe.model} cannot be planned, because {reason}: train it, and see what the report says.")
    room, device, flops = _device(memory_gib)
    compute = torch.float16 if args.fp16 or precision == "fp16" else torch.bfloat16
    if recipe.training.get("bf16") is False and precision == "fp32":
        compute = torch.float32
    processes = max(1, torch.cuda.device_count())
    rows, length = args.per_device_train_batch_size, recipe.max_length
    memory = step_memory(model, args, rows * length, compute, precision=precision, processes=processes)
    here = host_bytes() if memory_gib is None else OTHER_HOST
    rates = estimated_rates(
        memory.model, rows * length, length, flops,
        fp8=precision == "fp8", host_rate=known_host_rate(device), host_bytes=here,
    )  # fmt: skip

    policy = asked if args.gradient_checkpointing else "keep"
    if policy in POLICIES:
        plan = ActivationPlan(policy, choose(policy, memory, room, rates))
    else:
        plan = load_plan(policy, len(memory.model.layers))
    plan.tokens, plan.predicted_peak = memory.tokens, memory.peak(plan.choices)
    plan.device_bytes, plan.terms = room.device, memory.terms(plan.choices)
    fits = room.fits(memory, plan.choices)
    mend = None if fits else advice(policy, memory, room, rates, rows, length)
    evaluation = _evaluation_peak(recipe, memory, args)
    if fits and evaluation is not None and evaluation > room.available:
        fits = False
        mend = f"lower per_device_eval_batch_size from {args.per_device_eval_batch_size}"
    seconds = layer_seconds(memory, plan.choices, rates) + head_seconds(memory.model, memory.tokens, flops)
    return RecipePlan(
        plan=plan,
        fits=fits,
        mend=mend,
        margin=room.needed(memory, plan.choices) - plan.predicted_peak,
        evaluation_peak=evaluation,
        tokens_per_second=memory.tokens / seconds,
        flops=flops,
        device=device,
    )


def print_whether_it_fits(
    model: Any, recipe: Recipe, args: SFTConfig, console: Console, memory_gib: float | None = None
) -> None:
    """One line before weights are downloaded; `model` as `plan_model` takes it.

    The rehearsal decides; what cannot be planned is only tried.
    """
    try:
        found = plan_model(model, recipe, args, memory_gib)
    except (ModelError, TrainError):
        return
    if found.fits:
        console.print(f"Memory: {found.plan.in_words}", highlight=False, soft_wrap=True)
    else:
        console.print(
            f"[yellow]Warning: this may run out of device memory ({found.plan.in_words}): {found.mend}.", soft_wrap=True
        )


def _device(memory_gib: float | None) -> tuple[Room, str, float]:
    """What there is to fit into, the GPU's name and its FLOP/s: measured here, known, or taken to be an H100's."""
    here = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if here else UNKNOWN_GPU
    flops = known_flops(name) or (measured_flops(torch.device("cuda")) if here else None)
    assert flops is not None
    if memory_gib is not None:
        total = round(memory_gib * GIB)
        return Room(total - CONTEXT, total), name, flops
    if not here:
        raise TrainError("there is no GPU here: say for which memory to plan, --memory 80 for one of 80 GiB.")
    free, total = torch.cuda.mem_get_info()
    return Room(free + torch.cuda.memory_reserved(), total), name, flops


def _evaluation_peak(recipe: Recipe, memory: StepMemory, args: Any) -> int | None:
    if recipe.eval_data is None:
        return None
    return memory.evaluation_peak(args.per_device_eval_batch_size * recipe.max_length, full_logits=False)


def print_recipe_plan(found: RecipePlan, console: Console) -> None:
    """The choice, where the memory goes, whether it fits, and the estimated speed."""
    plan = found.plan
    assert plan.predicted_peak is not None and plan.device_bytes is not None
    console.print(
        f"{plan.tokens:,} tokens a micro-batch; activation policy {plan.policy}: {plan.in_words}", soft_wrap=True
    )
    table = Table(title="Where the memory goes", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in plan.terms.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("peak", f"{plan.predicted_peak / GIB:.2f}", style="bold")
    table.add_row(f"margin ({MARGIN:.0%} of the device, and fragmentation)", f"{found.margin / GIB:.2f}")
    console.print(table)
    if len(set(plan.choices)) > 1:
        console.print(f"Layers, first to last: {plan.runs}.", soft_wrap=True)
    if found.evaluation_peak is not None:
        console.print(f"Evaluation: peak {found.evaluation_peak / GIB:.1f} GiB.")
    console.print(
        f"About {found.tokens_per_second:,.0f} tokens/s a GPU: an estimate from FLOPs, with {found.flops / 1e12:.0f} "
        f"TFLOP/s of {found.device}.",
        soft_wrap=True,
    )
    verdict = "[bold green]It fits." if found.fits else f"[bold red]It does not fit:[/] {found.mend}."
    console.print(verdict, soft_wrap=True)
