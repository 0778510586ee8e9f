"""A trainer's activation plan: chosen from sizes when the trainer is made, corrected by a rehearsal before training."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truetune.host import host_bytes
from truetune.models.adapters import base_model
from truetune.models.attention import is_ours
from truetune.models.errors import ModelError
from truetune.models.fuse import decoder_layers
from truetune.models.head import loss_in_slabs
from truetune.models.memory import StepMemory, optimizer_bytes, optimizer_step_bytes
from truetune.models.plan import (
    GIB,
    POLICIES,
    ActivationPlan,
    Rates,
    Room,
    advice,
    choose,
    fused_layers,
    layer_seconds,
    load_plan,
    set_activations,
)
from truetune.models.rates import UNKNOWN_GPU, estimated_rates, known_flops, known_host_rate
from truetune.models.shapes import FP32, read_model, why_not_planned
from truetune.train.batches import full_batch
from truetune.train.checkpointing import ask_as_before, stop_checkpointing
from truetune.train.config import own_setting
from truetune.train.errors import TrainError
from truetune.train.rehearsal import NOT_REHEARSED, Rehearsed, measured_host_rate, rehearse, rehearse_evaluation

logger = logging.getLogger(__name__)
PLAN_FILE = "activation_plan.json"
MOST_REHEARSALS = 5
ROUNDED_AT_A_TIME = 2**26  # elements that stochastic rounding has in fp32 at once
DOUBT = 1.2  # of predictions, for each plan that ran out of memory since the last that did not
WORTH_IT = 0.02  # a plan that is predicted to be this much faster is rehearsed in place of one that fits


def asked_policy(args: Any) -> str:
    """`activation_policy`: a policy or a saved plan's path. Raises `TrainError` for anything else, and where
    `gradient_checkpointing=False` contradicts it."""
    asked = str(own_setting(args, "activation_policy"))
    if asked not in POLICIES and not Path(asked).is_file():
        raise TrainError(
            f"activation_policy {asked!r} is unknown: use one of {', '.join(POLICIES)}, or a saved plan's path."
        )
    if not args.gradient_checkpointing and asked not in ("auto", "keep"):
        raise TrainError(
            f"gradient_checkpointing=False keeps every activation, and activation_policy={asked!r} does not: "
            "remove one of them."
        )
    return asked


def plan_activations(trainer: Any) -> "Activations | None":
    """`activation_policy` decides where every layer is fused whole and nothing asks for TRL's own mechanisms; elsewhere
    there is no plan. Adds a line to the trainer's report. Raises `TrainError` for a policy that cannot be had."""
    args, model = trainer.args, trainer.model
    ask_as_before(args)
    asked, checkpoints = asked_policy(args), args.gradient_checkpointing
    own = ["gradient_checkpointing_kwargs"] if checkpoints and args.gradient_checkpointing_kwargs else []
    own += ["activation_offloading"] if args.activation_offloading else []
    layers = fused_layers(model)
    whole = layers and len(layers) == len(decoder_layers(model))
    unplanned = why_not_planned(model) if whole else "not every layer is fused"
    set_activations(layers, ["keep"] * len(layers))  # in place of an earlier trainer's plan
    if own or (checkpoints and unplanned and asked != "keep"):
        why = f"TRL's own mechanism is asked for ({', '.join(own)})" if own else unplanned
        if asked != "auto" and "activation_policy" not in own_setting(args, "allow"):
            mend = f"remove it or {' and '.join(own)}" if own else "use 'auto' or 'keep'"
            raise TrainError(
                f"activation_policy={asked!r} cannot be had, because {why}: {mend}, or accept it with "
                "allow=['activation_policy']."
            )
        by = ["checkpointed by Transformers"] if checkpoints else []
        by += ["offloaded by TRL"] if args.activation_offloading else []
        trainer.report.add("activations", asked, ", ".join(by), why)
        return None
    stop_checkpointing(trainer)
    activations = None if unplanned else Activations(trainer, asked if checkpoints else "keep")
    why = (unplanned or "") if checkpoints else "gradient_checkpointing=False"
    trainer.report.add("activations", asked, activations.in_words if activations else "keep", why)
    return activations


def compute_dtype(args: Any, model: nn.Module) -> torch.dtype:
    """What linears compute in: autocast's dtype, or the model's own."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return model.dtype  # type: ignore[return-value]


def step_memory(
    model: Any, args: Any, tokens: int, compute: torch.dtype, *, precision: str | None = None, processes: int = 1,
    packed: bool = True,
) -> StepMemory:  # fmt: skip
    """The memory of `args`' step with this model, which may be on the meta device and not yet have its `precision`."""
    shape = read_model(model, compute, precision, packed=packed)
    optimizer, trained = str(getattr(args.optim, "value", args.optim)), shape.trained
    step = optimizer_step_bytes(optimizer, trained)
    if getattr(args, "stochastic_rounding", False):  # averages in fp32, and fp32 copies of some weights at a time
        trained = tuple((elements, FP32) for elements, _ in trained)
        step = 4 * FP32 * min(ROUNDED_AT_A_TIME, sum(elements for elements, _ in trained))
    return StepMemory(
        model=shape,
        tokens=tokens,
        optimizer=optimizer_bytes(optimizer, trained),
        accumulates=args.gradient_accumulation_steps > 1,
        buckets=processes > 1,
        optimizer_step=step,
        head_in_slabs=loss_in_slabs(base_model(model), compute, args.label_smoothing_factor),
    )


def _let_segments_grow(wanted: bool) -> None:
    """PyTorch's allocator then joins free memory that lies apart, of which there was a tenth of the device where a long
    document was trained (8B, 70,656 tokens, 16 GiB). What the environment says of the allocator stays. Not wanted for
    CUDA graphs, whose plan is `keep`."""
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


class Activations:
    """The plan of one trainer whose every layer is fused: what it was chosen from, and what came of it."""

    def __init__(self, trainer: Any, policy: str) -> None:
        self.trainer = trainer
        self.policy = policy
        self.layers = fused_layers(trainer.model)
        self.device = next(self.layers[0].parameters()).device
        self.on_gpu = self.device.type == "cuda"
        compute = compute_dtype(trainer.args, trainer.model)
        processes = trainer.accelerator.num_processes
        packed = trainer.unpads and is_ours(base_model(trainer.model).config)
        memory = step_memory(
            trainer.model, trainer.args, trainer.token_budget(), compute, processes=processes, packed=packed
        )
        self.memory = replace(memory, full_logits=trainer.compute_loss_func is not None)
        self.room = self._room()
        self.rates = self._estimated_rates()
        self._corrections: dict[tuple[str, ...], float] = {}  # what was measured over what was predicted
        self._peaks: dict[tuple[str, ...], int] = {}
        self._failed: set[tuple[str, ...]] = set()
        self._doubt = 1.0
        if policy in POLICIES:
            # On a CPU there is nothing to gain: all memory is the host's, and recomputing costs what it costs.
            chosen = choose(policy, self.memory, self.room, self.rates) if self.room else self._without_gpu(policy)
            self.plan = ActivationPlan(policy, chosen)
        else:
            try:
                self.plan = load_plan(policy, len(self.layers))
            except ModelError as error:
                raise TrainError(str(error)) from error
        self._apply(self.plan.choices)

    @property
    def in_words(self) -> str:
        return self.plan.in_words

    def save(self, directory: str | Path) -> None:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.plan.save(path / PLAN_FILE)

    # -- before the first step

    def rehearse(self) -> str:
        """Runs the largest batch under the plan, and changes the plan until it fits, or is the fastest that does; says
        why where that is not tried.

        Raises `TrainError` where nothing fits, with what to lower to what.
        """
        batch, args = self.trainer.largest_batch(), self.trainer.args
        if batch is None and self.trainer.unpads and args.max_length is not None:
            batch = full_batch(self.trainer._train_batch_size, args.max_length)
        if batch is None:
            return NOT_REHEARSED
        tokens = batch["input_ids"].numel()
        self.memory = replace(self.memory, tokens=tokens)
        self._corrections, self._peaks, self._failed, self._doubt = {}, {}, set(), 1.0
        fitting: list[tuple[str, ...]] = []
        for left in reversed(range(MOST_REHEARSALS)):
            choices = self.plan.choices
            found = self._agreed(rehearse(self.trainer, batch))
            if self.room is None:
                break
            if found.peak is None:
                self._failed.add(choices)
                self._doubt *= DOUBT
                self.memory = self._memory_under(choices)
            else:
                self._learn(found, choices)
            fits = found.peak is not None and self.memory.peak(choices) <= self.room.available
            if fits:
                fitting.append(choices)
            following = choose(self.policy, self._untried, self.room, self.rates) if self._may_change else choices
            if fits and (following in self._failed or not self._worth_it(following, choices)):
                break
            last_chance = left == 1 and not fitting  # of the rehearsals one is left
            if following == choices or following in self._failed or last_chance:
                following = self._leanest if self._may_change else choices
            if following == choices or following in self._failed:
                break
            self._apply(following)
        if self.room is not None:
            if not fitting:
                raise TrainError(self._does_not_fit())
            self._settle(fitting)
        self._rehearse_evaluation()
        return ""

    @property
    def _may_change(self) -> bool:
        return self.policy in ("auto", "lean", "offload")

    def _settle(self, fitting: list[tuple[str, ...]]) -> None:
        """On the fastest of the plans that have their margin; where none has, on the one that needs least."""
        assert self.room is not None
        room, under = self.room, self._memory_under
        roomy = [choices for choices in fitting if room.fits(under(choices), choices)]
        if roomy:
            best = min(roomy, key=lambda choices: layer_seconds(under(choices), choices, self.rates))
        else:
            best = min(fitting, key=lambda choices: room.needed(under(choices), choices))
        if best != self.plan.choices:
            self._apply(best)

    def _worth_it(self, following: tuple[str, ...], choices: tuple[str, ...]) -> bool:
        if following == choices:
            return False
        assert self.room is not None
        then = self._memory_under(following)
        if not self.room.fits(self.memory, choices):  # it ran, but nearer to the edge than the margin allows
            return self.room.needed(then, following) < self.room.needed(self.memory, choices)
        now = layer_seconds(self.memory, choices, self.rates)
        return layer_seconds(then, following, self.rates) < now * (1 - WORTH_IT)

    @property
    def _leanest(self) -> tuple[str, ...]:
        assert self.room is not None
        return choose(self.policy, self._untried, replace(self.room, available=0), self.rates)

    @property
    def _untried(self) -> StepMemory:
        """Corrected by the worst that was measured, because choices are predicted more and less well: with the last
        one's correction, two that take turns would each look better than the other."""
        return replace(self.memory, correction=max(self._corrections.values(), default=1.0) * self._doubt)

    def _memory_under(self, choices: tuple[str, ...]) -> StepMemory:
        """Corrected by what was measured of these choices, where they were tried."""
        measured = self._corrections.get(choices)
        return self._untried if measured is None else replace(self.memory, correction=measured)

    def _learn(self, found: Rehearsed, choices: tuple[str, ...]) -> None:
        """Corrects the predictions by what was measured."""
        assert found.peak is not None
        bare = replace(self.memory.before_first_step(), correction=1.0)
        predicted = bare.peak(choices) - bare.held
        self._corrections[choices] = (found.peak - found.before) / max(1, predicted)
        self._peaks[choices] = self.plan.measured_peak = found.peak
        self._doubt = 1.0
        self.memory = self._memory_under(choices)
        if found.layer_seconds:
            scale = found.layer_seconds / self.rates.forward
            self.rates = replace(
                self.rates,
                forward=found.layer_seconds,
                backward=self.rates.backward * scale,
                recompute=self.rates.recompute * scale,
                attention=self.rates.attention * scale,
            )
        self._describe()

    def _rehearse_evaluation(self) -> None:
        trainer, args = self.trainer, self.trainer.args
        never = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no" and not args.eval_on_start
        batch = None if trainer.eval_dataset is None or never else trainer.largest_batch(evaluation=True)
        if batch is None:
            return
        fits = rehearse_evaluation(trainer, batch, trainer.evaluates_with_logits())
        if self.room is not None and self._anywhere(not fits):
            tokens = batch["input_ids"].numel()
            mend = self._smaller_evaluation(tokens)
            raise TrainError(f"The largest evaluation batch ({tokens:,} tokens) runs out of device memory: {mend}.")

    def _smaller_evaluation(self, tokens: int) -> str:
        """The mend where `tokens` ran out: how many rows are predicted to fit."""
        assert self.room is not None
        trainer, args, memory = self.trainer, self.trainer.args, self.memory
        full_logits, size = trainer.evaluates_with_logits(), args.per_device_eval_batch_size
        if memory.evaluation_peak(tokens, full_logits) <= self.room.available:
            memory = replace(memory, correction=memory.correction * DOUBT)
        for smaller in range(size - 1, 0, -1):
            batch = trainer.largest_batch_of(smaller * args.eval_batch_size // size, evaluation=True)
            if memory.evaluation_peak(batch["input_ids"].numel(), full_logits) <= self.room.available:
                return f"lower per_device_eval_batch_size from {size} to {smaller}"
        longest = trainer.largest_batch_of(1, evaluation=True)["input_ids"].numel()
        shorter = "lower max_length" if trainer.packs else f"evaluate on rows shorter than {longest:,} tokens"
        return f"set prediction_loss_only=True, or {shorter}" if full_logits else shorter

    # -- what the choice is made from

    def _room(self) -> Room | None:
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        total = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        ours, used = torch.cuda.memory_reserved(self.device), torch.cuda.memory_allocated(self.device)
        available = self._over_ranks(min(free + ours, total), torch.distributed.ReduceOp.MIN)
        total = self._over_ranks(total, torch.distributed.ReduceOp.MIN)
        # Whatever else lies on the device is counted with the weights.
        weights = self._over_ranks(used, torch.distributed.ReduceOp.MAX)
        self.memory = replace(self.memory, model=replace(self.memory.model, weights=weights))
        return Room(available, total)

    def _estimated_rates(self) -> Rates:
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else UNKNOWN_GPU
        flops = known_flops(name) or known_flops(UNKNOWN_GPU)
        assert flops is not None
        length = self.trainer.args.max_length or self.memory.tokens
        pinned, host_rate = 0, known_host_rate(name)
        flops = self._over_ranks(round(flops), torch.distributed.ReduceOp.MIN)
        if self.on_gpu:  # of machines with the same GPU, one may copy ten times as fast as another
            pinned = self._over_ranks(host_bytes(), torch.distributed.ReduceOp.MIN)
            host_rate = self._over_ranks(round(measured_host_rate(self.device)), torch.distributed.ReduceOp.MIN)
        return estimated_rates(
            self.memory.model, self.memory.tokens, length, flops, host_rate=host_rate, host_bytes=pinned
        )

    def _without_gpu(self, policy: str) -> tuple[str, ...]:
        return (policy if policy in ("keep", "lean", "offload") else "keep",) * len(self.layers)

    def _agreed(self, found: Rehearsed) -> Rehearsed:
        """The worst of all ranks, so that all choose alike."""
        maximum = torch.distributed.ReduceOp.MAX
        failed = self._anywhere(found.peak is None)
        peak = self._over_ranks((found.peak or 0) - found.before, maximum)
        before = self._over_ranks(found.before, maximum)
        nanoseconds = self._over_ranks(round((found.layer_seconds or 0.0) * 1e9), maximum)
        return Rehearsed(None if failed else before + peak, before, nanoseconds / 1e9 or None)

    def _anywhere(self, here: bool) -> bool:
        return bool(self._over_ranks(int(here), torch.distributed.ReduceOp.MAX))

    def _over_ranks(self, value: int, operation: Any) -> int:
        if self.trainer.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.trainer.accelerator.device)
        torch.distributed.all_reduce(tensor, operation)
        return int(tensor)

    # -- putting it in, and saying so

    def _apply(self, choices: tuple[str, ...]) -> None:
        if self.on_gpu:
            _let_segments_grow(set(choices) != {"keep"})
        set_activations(self.layers, choices)
        self.memory = self._memory_under(choices)
        self.plan = ActivationPlan(self.plan.policy, choices, measured_peak=self._peaks.get(choices))
        self._describe()

    def _describe(self) -> None:
        plan = self.plan
        plan.tokens, plan.correction = self.memory.tokens, self.memory.correction
        if self.room is not None:
            plan.predicted_peak = self.memory.peak(plan.choices)
            plan.device_bytes = self.room.device
            plan.terms = self.memory.terms(plan.choices)

    def _does_not_fit(self) -> str:
        assert self.room is not None
        args = self.trainer.args
        batch_size = args.per_device_train_batch_size
        length = self.memory.tokens // batch_size
        mend = advice(self.policy, self.memory, self.room, self.rates, batch_size, length)
        needed = self.memory.peak(self.plan.choices) / GIB
        return (
            f"The largest batch ({self.memory.tokens:,} tokens) needs about {needed:.1f} GiB of device memory, and "
            f"{self.room.available / GIB:.1f} GiB are there: {mend}."
        )
