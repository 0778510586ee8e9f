"""TRL's `SFTTrainer` with our attention, head, batches and parameter groups.

What is different from TRL happens at its public joints: the attention interface, a forward bound to the model instance,
a wrapper round the data collator when a data loader is built, `compute_loss` and `create_optimizer`. Labels,
truncation, packs and order are the installed TRL's.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import trl
from peft import PeftModel
from rich.console import Console
from transformers.trainer_utils import has_length

from truetune.data.collate import remember_labels, renew_loss_rows, why_padded
from truetune.models.adapters import adapters_in_fp32, base_model, cast_adapters_to_activations
from truetune.models.attention import ATTENTION_NAME, attention_calls, use_varlen_attention, why_not_packable
from truetune.models.fp8 import check_adapter_on_fp8
from truetune.models.fuse import fuse, unfuse
from truetune.models.head import bind_fused_loss
from truetune.models.load import keep_4bit_layout
from truetune.proof.result import Proof
from truetune.proof.supervision import Documents
from truetune.train.activations import Activations, plan_activations
from truetune.train.batches import (
    batch_of_longest_rows,
    batch_of_rows,
    document_capacity,
    documents_each,
    documents_of_rows,
    evaluation_documents,
    has_trl_collator,
    loads_without_effects,
    planned_steps,
    row_lengths,
    unpadding,
)
from truetune.train.checkpoints import forget_files, last_checkpoint, list_files, load_other_names, refuse_cut_short
from truetune.train.config import own_setting
from truetune.train.errors import TrainError
from truetune.train.graphs import layer_graphs, report_graphs
from truetune.train.loop import QuietTrainer
from truetune.train.metrics import DeviceMetrics
from truetune.train.optim import set_learning_rates, stochastic_adamw
from truetune.train.proving import Proving
from truetune.train.rehearsal import rehearse_unplanned
from truetune.train.report import TrainReport, by_reason
from truetune.train.stock import why_not_unpad, why_stock_trl
from truetune.train.trials import check_checkpoint, check_evaluation_batch, check_largest_batch

logger = logging.getLogger(__name__)
FIRST_ROWS = 8
AUDITED_ROWS = 1000  # by the quick preflight
_ROWS_KEPT = "it holds no token, or its loader keeps rows (predictions, evaluation streams, loaders of your own)"
_RATES = ("embedding_learning_rate", "loraplus_lr_ratio")


class SFTTrainer(QuietTrainer):
    """`trl.SFTTrainer` with the same arguments, losses, metrics and files, and a `report` of what is in effect.

    Raises `TrainError` where something set explicitly cannot be had.
    """

    trials: ClassVar = {
        "largest batch": check_largest_batch,
        "evaluation step": check_evaluation_batch,
        "checkpoint": check_checkpoint,
    }  # by the full preflight
    model: Any

    @functools.wraps(trl.SFTTrainer.__init__)  # type: ignore[misc]
    def __init__(self, model, args=None, *positional, **keywords) -> None:
        self.report = TrainReport()
        self._device_metrics = {"train": DeviceMetrics(), "eval": DeviceMetrics()}
        self._ours = False  # until the end of this method: TRL's own code may run first
        self.activations: Activations | None = None  # where they are planned
        self.proving: Proving
        trained_before = _trained_tensors(model) if isinstance(model, PeftModel) else {}
        others = list(inspect.signature(trl.SFTTrainer.__init__).parameters)[3:]
        check_adapter_on_fp8(model, (dict(zip(others, positional, strict=False)) | keywords).get("peft_config"))
        super().__init__(model, args, *positional, **keywords)
        self.proving = Proving(self)
        if fp8 := getattr(base_model(self.model), "fp8_report", None):
            self.report.add("precision", "fp8", fp8.in_effect, "; ".join(fp8.reasons))
        self.report.stock = why_stock_trl(self)
        if self.report.stock:
            self.report.add("trainer", "truetune", "stock TRL", "; ".join(self.report.stock))
            self._refuse_own_settings()
            unfuse(self.model)  # by an earlier trainer
            return
        self._ours = True
        keep_4bit_layout(self.model)
        self._unpadding_off = why_not_unpad(self)
        self._set_attention()
        self._set_adapters(trained_before)
        self._fuse_layers()
        self.activations = plan_activations(self)
        bind_fused_loss(base_model(self.model))
        why = self._why_full_logits()
        in_effect = "stock TRL" if why else "fused linear cross-entropy"
        self.report.add("loss", self.args.loss_type, in_effect, why or "")
        self._report_batches()

    # -- setting up

    def _send_telemetry(self) -> None:
        """TRL's report to the Hub about the run, which is not sent."""

    def _refuse_own_settings(self) -> None:
        asked = [name for name in _RATES if own_setting(self.args, name) is not None]
        if asked and "stock_trl" not in own_setting(self.args, "allow"):
            raise TrainError(
                f"{' and '.join(asked)} cannot be had, because this run is stock TRL ({'; '.join(self.report.stock)}): "
                "remove one of them, or accept it with allow=['stock_trl']."
            )

    def _set_attention(self) -> None:
        base = base_model(self.model)
        init_kwargs = self.args.model_init_kwargs
        asked = init_kwargs.get("attn_implementation") if isinstance(init_kwargs, dict) else None
        had = base.config._attn_implementation
        if asked is not None:
            self.report.add("attention", asked, had, "named in model_init_kwargs")
            self._unpadding_off = self._unpadding_off or why_not_packable(base)
            return
        if reason := why_not_packable(base):
            self.report.add("attention", "variable-length", had, reason)
            self._unpadding_off = self._unpadding_off or reason
            packs = self.args.packing or self.args.padding_free
            if packs and "unpackable_model" not in own_setting(self.args, "allow"):
                raise TrainError(
                    f"packing and padding_free need documents kept apart, but {reason.rstrip('.')}: "
                    "set packing=False, or accept it with allow=['unpackable_model']."
                )
            return
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        attention = use_varlen_attention(base, autocast)
        replaced = [] if had == ATTENTION_NAME else [f"in place of {had}"]
        self.report.add(
            "attention", "variable-length", attention.in_effect, "; ".join(replaced + by_reason(attention.reasons))
        )

    def _set_adapters(self, trained_before: dict[str, torch.Tensor]) -> None:
        if not isinstance(self.model, PeftModel):
            return
        quantized = getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False)
        widened = adapters_in_fp32(self.model, trained_before) if quantized else 0
        adapters = cast_adapters_to_activations(self.model)
        left = f", {len(adapters.left)} left to PEFT" if adapters.left else ""
        why = f"{widened} tensors kept in fp32 that TRL casts to bf16" if widened else ""
        self.report.add(
            "adapter", "PEFT", f"{adapters.replaced} LoRA linears cast to the activation's dtype{left}", why
        )

    def _fuse_layers(self) -> None:
        unfuse(self.model)  # what another trainer left behind
        if not own_setting(self.args, "fuse"):
            self.report.add("layers", "as they are", "Transformers' and PEFT's")
            return
        fusion = fuse(self.model)
        self.report.add("layers", "fused", fusion.in_effect, "; ".join(fusion.reasons))

    def token_budget(self) -> int:
        """The most tokens of a micro-batch on one device."""
        return self._most_tokens(self.train_dataset, self._train_batch_size)

    def _most_tokens(self, dataset: Any, batch_size: int) -> int:
        lengths = row_lengths(dataset)
        longest = self.args.max_length or 1024 if lengths is None else int(lengths.max())
        return batch_size * longest

    def largest_batch(self, evaluation: bool = False) -> dict[str, Any] | None:
        """As the data loader would give it; None where the lengths of the data are not known before it is read."""
        return self.largest_batch_of(self.args.eval_batch_size if evaluation else self._train_batch_size, evaluation)

    def largest_batch_of(self, rows: int, evaluation: bool) -> dict[str, Any] | None:
        if not evaluation:
            return batch_of_longest_rows(self, self.train_dataset, rows)
        return batch_of_longest_rows(self, self.eval_dataset, rows, padded=self.evaluates_with_logits())

    def document_capacity(self) -> int | None:
        """What a micro-batch hardly exceeds; None where that is not known before the data is read."""
        counts = documents_each(self.train_dataset)
        return None if counts is None else document_capacity(counts, self._train_batch_size)

    def planned_steps(self) -> int | None:
        """Optimizer steps of the whole run; None where the data has no length."""
        return planned_steps(self.args, self._rows_an_epoch(), self._train_batch_size)

    def _rows_an_epoch(self) -> int | None:
        return len(self.train_dataset) if has_length(self.train_dataset) else None

    @property
    def packs(self) -> bool:
        """Whether micro-batches hold about as many tokens as there is room for."""
        return self.args.packing

    @property
    def unpads(self) -> bool:
        """Whether batches reach the model packed."""
        return self._unpadding_off is None

    def evaluates_with_logits(self) -> bool:
        return self.compute_metrics is not None and not self.args.prediction_loss_only

    def rehearse(self) -> None:
        """Tries the largest batch before the first step, and plans again by what it needed; see `rehearsal.py`.

        Nothing that training depends on changes. Raises `TrainError` where it does not fit.
        """
        if not self._ours:
            return
        line = next(line for line in self.report.lines if line.part == "activations")
        if self.activations is None:
            note = rehearse_unplanned(self)
        else:
            note = self.activations.rehearse()
            line.in_effect = self.activations.in_words
        if note and note not in line.why:
            line.why = "; ".join(filter(None, [line.why, note]))

    def _why_full_logits(self) -> str | None:
        if self.compute_loss_func is not None:
            return "compute_loss_func takes the full logits: stock TRL computes the loss"
        return None

    def _report_batches(self) -> None:
        args = self.args
        if args.packing:
            in_effect, why = f"packed by TRL, {args.packing_strategy}", ""
            if args.packing_strategy == "wrapped":
                why = "documents of one row see each other: wrapped packing keeps no boundaries"
        elif args.padding_free:
            in_effect, why = "padding-free", ""
        elif self._unpadding_off:
            in_effect, why = "padded", self._unpadding_off
        else:
            in_effect, why = "unpadded on their way in", ""
        asked = "packing" if args.packing else "padding_free" if args.padding_free else "padded"
        self.report.add("batches", asked, in_effect, why)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True and self.args.output_dir is not None:
            last = last_checkpoint(Path(self.args.output_dir))  # Transformers takes the last one, whole or not
            resume_from_checkpoint = True if last is None else str(last)
        elif isinstance(resume_from_checkpoint, str | Path):
            refuse_cut_short(Path(resume_from_checkpoint))
        if own_setting(self.args, "rehearse") and self.args.device.type == "cuda":
            self.rehearse()
        graphs = report_graphs(self)
        self._print(self.report.parts_table())
        self.proving.begin()
        with layer_graphs(self, graphs):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # the list of an earlier run's checkpoint would vouch for a part of this one
            forget_files(Path(self._get_output_dir(trial=trial)), self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._ours and not isinstance(self.model, PeftModel):
            load_other_names(self.model if model is None else model, Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result):
        """Transformers', but not of a tied weight, which a checkpoint holds once."""
        missing = set(load_result.missing_keys)
        named = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in named.items() if name not in missing}
        lost = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each rank has written its own
        if self.args.should_save:
            list_files(Path(output_dir))

    # -- proof

    def preflight(self) -> Proof:
        """Runs the checks that `train` begins with (see docs/proof.md) and returns what they saw.

        Nothing that training depends on changes. A failed check raises nothing here; `train` raises `ProofError`.
        """
        return self.proving.preflight()

    @property
    def proof(self) -> Proof:
        return self.proving.proof

    def first_batch(self) -> dict[str, Any] | None:
        """The data's first rows as the data loader would give them; None where they are not known before it is read,
        or a collator of the user's own would have to be called."""
        if not self._rows_can_be_labelled():
            return None
        assert isinstance(self.train_dataset, datasets.Dataset)
        return batch_of_rows(self, self.train_dataset, range(min(len(self.train_dataset), FIRST_ROWS)))

    def documents_to_audit(self, everything: bool) -> tuple[Documents, Documents | None, dict[str, Any] | None] | None:
        """(documents to train on, to evaluate on, what became of the rows); None as in `first_batch`."""
        if not self._rows_can_be_labelled():
            return None
        most = None if everything else AUDITED_ROWS
        return documents_of_rows(self, self.train_dataset, most), evaluation_documents(self, most), None

    def _rows_can_be_labelled(self) -> bool:
        known = isinstance(self.train_dataset, datasets.Dataset) and row_lengths(self.train_dataset) is not None
        return known and has_trl_collator(self)

    def _print(self, table) -> None:
        if self.is_world_process_zero():
            Console(stderr=True).print(table)

    # -- batches

    @contextmanager
    def _unpadding(self, wanted: bool) -> Iterator[None]:
        """The current collator wrapped while a data loader is built; the attribute stays the user's.

        Each rank reads its own rows: Accelerate's dispatch, its default for streams, would cut a batch's tensors into
        slices along their first dimension, which is no longer that of the rows.
        """
        collator, loaders = self.data_collator, self.accelerator.dataloader_config
        dispatch = loaders.dispatch_batches
        if wanted and self._ours and self._unpadding_off is None:
            self.data_collator, loaders.dispatch_batches = unpadding(collator), False
        try:
            yield
        finally:
            self.data_collator, loaders.dispatch_batches = collator, dispatch

    def get_train_dataloader(self):
        with self._unpadding(wanted=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        # Metrics computed from logits get them in the shape of the user's own batches. Of a stream, Transformers counts
        # the rows by the first dimension of its batches, and weighs the losses of batches by that.
        dataset: Any = self.eval_dataset
        if eval_dataset is not None:
            dataset = dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        counted_by_batch = not has_length(dataset) and not self.padding_free
        with self._unpadding(wanted=not self.evaluates_with_logits() and not counted_by_batch):
            return super().get_eval_dataloader(eval_dataset)

    def reads_ahead(self) -> bool:
        return self._ours and has_trl_collator(self) and loads_without_effects(self)

    # -- loss

    # Scripts change labels anywhere between here and `compute_loss`, and the rows of the loss must follow.
    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            remember_labels(batch)
        return batches, num_items

    def prediction_step(self, model, inputs, *args, **kwargs):
        remember_labels(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._ours or return_outputs or self.compute_loss_func is not None:
            inputs.pop("loss_rows", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        renew_loss_rows(inputs)
        self._count_batch(inputs)
        if mode == "train":
            self.proving.see(inputs)
        attention_before = attention_calls.copy()
        outputs = self.fused_outputs(model, inputs, num_items_in_batch)
        loss = outputs.loss
        # The count is over all ranks, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            # A mean over a micro-batch: averaged over the micro-batches of the step, where the loss is not.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._keep_metrics(mode, inputs, outputs)
        self.report.fused_losses += 1
        for backend, calls in (attention_calls - attention_before).items():
            self.report.attention_calls[backend] = self.report.attention_calls.get(backend, 0) + calls
        return loss

    def fused_outputs(self, model, inputs: dict[str, Any], num_items: Any):
        """The model's `FusedLossOutput` for a batch, with this run's kind of loss."""
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return model(
            **{**inputs, "use_cache": False},
            fused_loss=True,
            num_items=num_items,
            label_smoothing=self.args.label_smoothing_factor if self.args.loss_type == "nll" else 0.0,
            loss_type=self.args.loss_type,
        )

    def _keep_metrics(self, mode: str, inputs: dict[str, Any], outputs: Any) -> None:
        if "attention_mask" in inputs:
            num_tokens = inputs["attention_mask"].sum().float()
        else:
            num_tokens = outputs.stats.new_full((), inputs["input_ids"].numel())  # a tensor of a number would sync
        parts = [outputs.stats, num_tokens[None].to(outputs.stats.device)]
        if self.aux_loss_enabled:
            parts.append(outputs.aux_loss.detach()[None].to(outputs.stats) / self.accelerator.num_processes)
        sums = torch.cat(parts)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
        self._device_metrics[mode].add(sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Both, whichever is logged: an evaluation's log tells the tokens trained so far, those of no log yet included.
        for mode, sums in self._device_metrics.items():
            values = sums.pop()
            if mode == "train":
                self._total_train_tokens += int(sum(values.get("num_tokens", [])))
            metrics = self._metrics[mode]
            of_a_subclass = [name for name in metrics if name not in values]
            for name, of_micro_batches in values.items():
                metrics[name].extend(of_micro_batches)
            for name in of_a_subclass:  # behind TRL's, where it put them
                metrics[name] = metrics.pop(name)
            if "num_tokens" in metrics:  # TRL logs the means of all others
                metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _count_batch(self, inputs: dict[str, Any]) -> None:
        if "cu_seq_lens_q" in inputs:
            self.report.packed_batches += 1
            return
        self.report.padded_batches += 1
        reason = self._unpadding_off or why_padded(inputs) or _ROWS_KEPT
        if reason not in self.report.padded_because:
            logger.warning("A batch stays padded: %s.", reason.rstrip("."))
        self.report.padded_because[reason] = self.report.padded_because.get(reason, 0) + 1

    # -- optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if own_setting(args, "stochastic_rounding"):
            return stochastic_adamw(args, model)
        return super(SFTTrainer, SFTTrainer).get_optimizer_cls_and_kwargs(args, model)  # `trl.SFTTrainer` may be ours

    def create_optimizer(self, *args, **kwargs):
        given = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._ours:
            return optimizer
        rates = {name: own_setting(self.args, name) for name in _RATES}
        if given is not None and any(rate is not None for rate in rates.values()):
            raise TrainError(
                "embedding_learning_rate and loraplus_lr_ratio need the trainer to make the optimizer: "
                "give the optimizer's own parameter groups, or no optimizer."
            )
        self.report.groups = set_learning_rates(optimizer, self.model, **rates)
        self._print(self.report.groups_table())
        return optimizer

    # -- saving

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        # Beside the checkpoints, and with a model that is saved elsewhere.
        directory = self.args.output_dir if _internal_call or output_dir is None else output_dir
        if self.activations is not None and self.args.should_save and directory is not None:
            self.activations.save(directory)


def _trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
