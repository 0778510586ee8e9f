"""What Transformers' training loop asks of a trainer in every step, answered without a wait for the device."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import trl
from accelerate.data_loader import DataLoaderShard


class QuietTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` whose losses are filtered, and its operations counted, while the device works on.

    `logging_nan_inf_filter` has Transformers ask whether a micro-batch's loss is finite before it launches the
    optimizer: a GPU idled for 23 ms of an 8B model's 650, in every step. And the next step's batches are made once the
    last backward pass of a step is launched, behind which the 5 ms that they take the host are hidden.
    """

    args: trl.SFTConfig  # Transformers declares them wider than they are
    _filter_put_aside = False  # from the end of `training_step` until Transformers' own filter has been passed
    _parameters_counted: int | None = None
    _ahead: "_Ahead | None" = None

    def reads_ahead(self) -> bool:
        """Whether nobody can tell when a batch is made: reading and collating it has no effects, and cannot fail in a
        way of the user's own."""
        return False

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._ahead is None or self._ahead.batches is not epoch_iterator:
            self._ahead = _Ahead(epoch_iterator)
        batches, num_items = super().get_batch_samples(self._ahead, num_batches, device)
        self._ahead.untrained = len(batches)
        return batches, num_items

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._read_ahead()
        return self._filtered(loss)

    def _read_ahead(self) -> None:
        """The next step's batches, once the last of this one is launched."""
        ahead = self._ahead
        if ahead is None:
            return
        ahead.untrained -= 1
        last = self.state.global_step + 1 >= self.state.max_steps
        if ahead.untrained == 0 and not last and ahead.is_loaders_own and self.reads_ahead():
            loader = self.accelerator.gradient_state.active_dataloader
            copy_behind_work(loader)
            ahead.read(self.args.gradient_accumulation_steps, loader)

    def _filtered(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, or what Transformers' filter would add in its place: the mean of those since the last log."""
        so_far, logged = (getattr(self, name, None) for name in ("_tr_loss", "_globalstep_last_logged"))
        if not self.args.logging_nan_inf_filter or so_far is None or logged is None:
            return loss
        # Who looks at losses may look for what is not finite, and who counts operations would not take the filter back.
        if self._is_overridden("training_step") or self._is_overridden("floating_point_ops"):
            return loss
        self.args.logging_nan_inf_filter, self._filter_put_aside = False, True
        return torch.where(loss.isfinite(), loss, so_far.to(loss.device) / (1 + self.state.global_step - logged))

    def _is_overridden(self, name: str) -> bool:
        return name in vars(self) or getattr(type(self), name) is not getattr(QuietTrainer, name)

    def take_back_filter(self) -> None:
        if self._filter_put_aside:
            self.args.logging_nan_inf_filter, self._filter_put_aside = True, False

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.take_back_filter()
            self._ahead = None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Called right after the filter. Transformers' counts the parameters of every module in every step: 8 ms for an
        adapter on 32 layers."""
        self.take_back_filter()
        if "input_ids" not in inputs:
            return super().floating_point_ops(inputs)
        if self._parameters_counted is None:
            self._parameters_counted = super().floating_point_ops(inputs) // max(1, inputs["input_ids"].numel())
        return self._parameters_counted * inputs["input_ids"].numel()


def copy_behind_work(loader: DataLoaderShard) -> None:
    """Batches from pinned memory, which PyTorch keeps until they are copied. Accelerate's default is to wait until the
    device has done all that it was given, and a resumed epoch's loader has forgotten Accelerate's own setting."""
    if loader.pin_memory and loader.device is not None and loader.device.type == "cuda":
        loader._non_blocking = True


class _Ahead:
    """An epoch's batches, of which some are read before they are asked for. What went wrong shows when they are."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.untrained = 0  # of those that were given last
        self._read: deque[Any] = deque()
        self._error: Exception | None = None

    @property
    def is_loaders_own(self) -> bool:
        """Not what somebody makes of it in `get_batch_samples`, anew in every step, and what was read with it lost."""
        return getattr(self.batches, "gi_code", None) is DataLoaderShard.__iter__.__code__

    def read(self, count: int, loader: DataLoaderShard) -> None:
        """Up to `count` batches, none past the epoch's last, with which the loader takes its leave."""
        try:
            while len(self._read) < count and not loader.end_of_dataloader:
                self._read.append(next(self.batches))
        except StopIteration:
            pass
        except Exception as error:
            self._error = error

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> Any:
        if self._read:
            return self._read.popleft()
        if self._error is not None:
            raise self._error
        return next(self.batches)
