"""Learning receipt: after the first optimizer steps, what was to be trained has moved, and nothing else has.

The largest gradient of each trained tensor is remembered, and whether its element moved in the step: an embedding of
which a few rows were seen is judged by those. Of frozen tensors a few elements are kept.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from truetune.proof.errors import ProofError
from truetune.proof.result import Check

logger = logging.getLogger(__name__)
STEPS = 3  # with a learning rate; LoRA's A has a gradient from the second on
BEHIND_ZEROS = ("lora_A", "lora_embedding_A", "vera_lambda_d", "hada_w1_", "hada_w2_a", "lokr_w2")
KEPT = 64  # elements of a frozen tensor
SAMPLED = 4096  # elements of a trained tensor in half precision
MOST_ROUNDED_AWAY = 0.5


def _breaks_alone(event: Callable[..., Any]) -> Callable[..., Any]:
    """A receipt that breaks proves nothing, says so, and stops nothing."""

    @functools.wraps(event)
    def guarded(self, *args, **kwargs):
        try:
            return event(self, *args, **kwargs)
        except ProofError:
            raise
        except Exception as error:
            self.finished = True
            logger.warning("The learning receipt broke, which proves nothing: report it (%s: %s).",
                           type(error).__name__, error)  # fmt: skip

    return guarded


class LearningReceipt(TrainerCallback):
    """Calls `done` with its checks after `STEPS` steps that had a learning rate, or at the end of a shorter run."""

    def __init__(self, model: nn.Module, done: Callable[[list[Check]], None]) -> None:
        self.model, self.done = model, done
        self.finished = False

    @_breaks_alone
    def on_train_begin(self, args, state, control, **kwargs):
        self.steps, self.finished = 0, False
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        others = [(name, p) for name, p in self.model.named_parameters() if not p.requires_grad and not p.is_meta]
        self.frozen = {name: (parameter, _few(parameter)) for name, parameter in others}
        self.had_gradient: set[str] = set()
        self.moved: set[str] = set()
        self.not_finite: set[str] = set()
        self.may_round_away: set[str] = set()
        self.rounded_away = self.sampled = 0

    @_breaks_alone
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.before: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.rates: dict[str, float | Tensor | None] = {}
        # A rate of None is one that the optimizer finds by itself.
        groups = [] if optimizer is None else optimizer.param_groups
        self.learning = any(group["lr"] is None or group["lr"] > 0 for group in groups)
        if self.finished or not self.learning:
            return
        gradients = {name: p.grad.detach().flatten() for name, p in self.trained.items() if p.grad is not None}
        largest = {name: gradient.abs().max(0) for name, gradient in gradients.items() if gradient.numel()}
        if not largest:
            return
        values = torch.stack([value.float() for value, _ in largest.values()])
        finite, positive = values.isfinite().tolist(), (values > 0).tolist()
        if args.fp16 and not all(finite):  # its scaler tries a scale that overflows, and skips the step
            self.learning = False
            return
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        for (name, (_, index)), is_finite, is_positive in zip(largest.items(), finite, positive, strict=True):
            if not is_finite:
                self.not_finite.add(name)
            elif is_positive:
                self.had_gradient.add(name)
                value = self.trained[name].detach().flatten()
                self.before[name] = index, value[index].clone(), _sample(value).clone()
                self.rates[name] = rates.get(id(self.trained[name]))

    @_breaks_alone
    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.finished or not self.learning:
            return
        moved, lost = {}, {}
        for name, (index, value, sample) in self.before.items():
            now, gradient = self.trained[name].detach().flatten(), self.trained[name].grad
            moved[name] = now[index] != value
            rate = self.rates[name]
            if rate is not None and gradient is not None:
                # Adam moves by the rate at first, SGD by its product with the gradient: a warm-up's first rates are
                # less than half a place of a norm's 1.0, even in fp32.
                update = rate * gradient.detach().flatten()[index].abs().clamp(max=1.0)
                lost[name] = update <= torch.finfo(now.dtype).eps * value.abs()
            if now.element_size() == 2 and gradient is not None:
                touched, changed = _sample(gradient.detach().flatten()) != 0, _sample(now) != sample
                moved[name] |= changed.any()
                self.sampled += int(touched.sum())
                self.rounded_away += int((touched & ~changed).sum())
        if moved:
            flags = torch.stack(list(moved.values())).tolist()
            self.moved |= {name for name, flag in zip(moved, flags, strict=True) if flag}
        if lost:
            flags = torch.stack(list(lost.values())).tolist()
            self.may_round_away |= {name for name, flag in zip(lost, flags, strict=True) if flag}
        self.steps += 1
        if self.steps == STEPS:
            self._finish()

    @_breaks_alone
    def on_train_end(self, args, state, control, **kwargs):
        if self.finished:
            return
        if self.steps:
            self._finish()
            return
        self.finished = True
        self.done([
            Check("trained tensors", "no step had a learning rate above zero", "all have a finite gradient and move",
                  "warn", mend="nothing was learned: raise the learning rate, or train longer than its warm-up")
        ])  # fmt: skip

    def _finish(self) -> None:
        self.finished = True
        self.done(self.checks())
        self.frozen.clear()

    def checks(self) -> list[Check]:
        checks = [self._trained(), self._frozen()]
        return [*checks, self._rounded_away()] if self.sampled else checks

    def _rounded_away(self) -> Check:
        """A weight in half precision stays where the update is less than half a place of it: a norm's 1.0 nearly always
        in bf16."""
        share = self.rounded_away / self.sampled
        stuck = sorted((self.had_gradient - self.moved) & self._in_half())
        high = share > MOST_ROUNDED_AWAY
        return Check(
            "rounded away",
            f"{share:.1%} of sampled updates of half-precision weights; {len(stuck):,} tensors did not move",
            f"at most {MOST_ROUNDED_AWAY:.0%}",
            "warn" if high else "pass",
            mend="small updates are lost in bf16: train fp32 weights, or set stochastic_rounding" if high else "",
            details={"share": share, "stuck": stuck[:50]},
        )

    def _in_half(self) -> set[str]:
        return {name for name, parameter in self.trained.items() if parameter.element_size() == 2}

    def _trained(self) -> Check:
        without = [name for name in self.trained if name not in self.had_gradient | self.not_finite]
        if self.steps < 2:  # in the first step LoRA's B is zero, and so is every gradient of A; LoHa, VeRA alike
            without = [name for name in without if not any(part in name for part in BEHIND_ZEROS)]
        # Tokens that were added may stand in later rows.
        without = [name for name in without if "trainable_tokens_delta" not in name]
        unmoved = self.had_gradient - self.moved - self._in_half() - self.may_round_away
        bad = {
            "a gradient that is not finite": sorted(self.not_finite),
            "no gradient": without,
            "a gradient that did not move them": sorted(unmoved),
        }
        found = "".join(f"; {len(names):,} with {what} ({names[0]}, ...)" for what, names in bad.items() if names)
        return Check(
            "trained tensors",
            f"{len(self.moved):,} of {len(self.trained):,} moved in {self.steps} steps{found}",
            "all have a finite gradient and move",
            "fail" if found else "pass",
            mend="what is to be trained is not: freeze it, or look why the loss does not reach it" if found else "",
            allow="untrained_tensors" if found else "",
            details={what: names[:50] for what, names in bad.items()},
        )

    def _frozen(self) -> Check:
        changed = [name for name, (parameter, few) in self.frozen.items() if not torch.equal(_few(parameter), few)]
        return Check(
            "frozen tensors",
            f"{len(self.frozen) - len(changed):,} of {len(self.frozen):,} unchanged"
            + (f"; changed: {', '.join(changed[:3])}" if changed else ""),
            "all unchanged",
            "fail" if changed else "pass",
            mend="a callback or the optimizer changes what is frozen: let it be trained, or leave it alone"
            if changed
            else "",
            allow="changed_frozen" if changed else "",
            details={"changed": changed[:50]},
        )


def _sample(flat: Tensor) -> Tensor:
    return flat[:: max(1, flat.numel() // SAMPLED)]


def _few(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    few = flat[:: max(1, flat.numel() // KEPT)].clone()
    return few.view(torch.uint8) if few.element_size() == 1 else few  # FP8 has no comparison
