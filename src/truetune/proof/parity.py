"""Reference parity: the fused path against plain Transformers, both against the same model in a higher precision.

The reference runs each document in a row of its own, unfused, with PyTorch's own attention and full logits. How far it
is from the exact gradients is what rounding costs in the dtype of the run, measured on the user's model and text; our
own path may not be much further away. The exact gradients come of the same plain modules with every weight widened, one
layer at a time, so that an 8B model needs no second copy of itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from truetune.models.adapters import base_model
from truetune.models.attention import ATTENTION_NAME, set_text_attention, use_varlen_attention
from truetune.models.fuse import decoder_layers, fuse, unfuse
from truetune.models.plan import fused_layers
from truetune.proof.excerpt import IGNORE_INDEX, Document, num_supervised, packed
from truetune.proof.receipt import BEHIND_ZEROS
from truetune.proof.result import Check

TIMES_ROUNDING = 4  # the most that we may be further from the exact gradients than the plain path
TOGETHER = 256  # tokens that the reference takes at a time, so that its full logits stay small
B_SCALE = 0.02  # of LoRA's B, which begins at zero and would hide every gradient of A
QUANTIZED = ("Linear4bit", "Linear8bitLt", "Fp8Linear")


@dataclass(frozen=True)
class Gradients:
    loss: float
    of: dict[str, Tensor | None]


def check_parity(trainer: Any, documents: Sequence[Document]) -> Check:
    """Loss and every trained tensor's gradient on `documents`; leaves the model as it was."""
    name, limit = "reference parity", f"{TIMES_ROUNDING} times the plain path's own rounding"
    if trainer.compute_loss_func is not None:
        return Check(name, "not run: compute_loss_func makes its own loss", limit, "skip")
    if isinstance(trainer.model, PeftModel) and trainer.model.active_peft_config.is_prompt_learning:
        return Check(name, "not run: prompt learning has no fused path of ours", limit, "skip")
    if not documents:
        return Check(name, "not run: the first batch has no supervised text", limit, "skip")
    if not trainer.unpads:
        documents = documents[:1]  # which needs no boundaries
    model = trainer.model
    with no_zero_b(model), evaluating(model):
        ours = fused_gradients(trainer, documents)
        with unfused(trainer):
            plain = plain_gradients(trainer, documents)
            exact = exact_gradients(trainer, documents)
    return judge(ours, plain, exact, rounding_floor(trainer), name, limit, len(documents))


def judge(
    ours: Gradients, plain: Gradients, exact: Gradients, floor: float, name: str, limit: str, documents: int
) -> Check:
    """`floor`: an error that rounding alone can always make."""
    errors = {key: (_error(ours.of[key], exact.of[key]), _error(plain.of[key], exact.of[key])) for key in exact.of}
    typical = sorted(of_plain for _, of_plain in errors.values())[len(errors) // 2]
    ratios = {
        key: of_ours / max(of_plain, typical, floor / TIMES_ROUNDING) for key, (of_ours, of_plain) in errors.items()
    }
    worst = max(ratios, key=lambda key: ratios[key])
    loss_error, plain_loss = abs(ours.loss - exact.loss), abs(plain.loss - exact.loss)
    loss_limit = max(TIMES_ROUNDING * plain_loss, floor * abs(exact.loss))
    cosine = min((_cosine(ours.of[key], exact.of[key]) for key in exact.of), default=1.0)
    passed = ratios[worst] <= TIMES_ROUNDING and loss_error <= loss_limit  # a NaN passes neither
    seen = (
        f"loss {ours.loss:.6g}, off by {loss_error:.1e} (plain {plain_loss:.1e}); {len(errors)} gradients, the worst "
        f"{ratios[worst]:.2f} times the plain path's error, cosine {cosine:.6f}"
    )
    dead = [key for key, exact_gradient in exact.of.items() if _is_dead(key, exact_gradient)]
    part = f"the gradient of {worst}" if ratios[worst] > TIMES_ROUNDING else "the loss"
    return Check(
        name, seen + (f"; {len(dead)} are zero" if dead else ""), limit,
        "fail" if not passed else "warn" if dead else "pass",
        mend=f"{part} is not that of plain Transformers: set fuse: false and report the model" if not passed
        else f"no gradient reaches {dead[0]} and {len(dead) - 1} more: freeze what is not to be trained, or look "
        "why the loss does not reach it (lora_alpha: 0?)" if dead else "",
        details={
            "documents": documents, "worst": worst, "rounding_floor": floor, "loss": ours.loss,
            "plain_loss": plain.loss, "exact_loss": exact.loss, "zero": dead[:50],
            "errors": {key: {"ours": a, "plain": b} for key, (a, b) in errors.items()},
        },
    )  # fmt: skip


def _error(value: Tensor | None, exact: Tensor | None) -> float:
    """Relative to the norm of what is exact; a gradient that should be there and is not is wholly wrong."""
    if exact is None or value is None:
        return 0.0 if exact is None and value is None else 1.0
    norm = exact.norm().item()
    difference = (value.to(exact.dtype) - exact).norm().item()
    return difference / norm if norm else float(difference > 0)


def _is_dead(name: str, exact: Tensor | None) -> bool:
    """Nothing of the text reaches it. Tokens and experts of other documents are none, nor what begins behind zeros."""
    behind = [part for part in BEHIND_ZEROS if not part.startswith("lora_")]  # whose B is not zero meanwhile
    waits = any(part in name for part in (*behind, "trainable_tokens_delta", "expert"))
    return not waits and (exact is None or not exact.any())


def _cosine(value: Tensor | None, exact: Tensor | None) -> float:
    if exact is None or value is None or not exact.norm():
        return 1.0
    return torch.nn.functional.cosine_similarity(value.to(exact.dtype).flatten(), exact.flatten(), dim=0).item()


def in_half(trainer: Any) -> bool:
    args = trainer.args
    return args.bf16 or args.fp16 or trainer.model.dtype in (torch.bfloat16, torch.float16)


def rounding_floor(trainer: Any) -> float:
    return 2 * torch.finfo(torch.bfloat16).eps if in_half(trainer) else 64 * torch.finfo(torch.float32).eps


def has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


# -- three ways to the same gradients ----------------------------------------------------------------------------------


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fused_gradients(trainer: Any, documents: Sequence[Document]) -> Gradients:
    parameters = trained(trainer.model)
    batch = packed(documents, trainer.args.device)
    with trainer.accelerator.autocast():
        loss = trainer.fused_outputs(trainer.model, batch, num_supervised(documents)).loss
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return Gradients(loss.item(), dict(zip(parameters, found, strict=True)))


def plain_gradients(trainer: Any, documents: Sequence[Document]) -> Gradients:
    with trainer.accelerator.autocast():
        return _apart(trainer, documents, trainer.model)


def exact_gradients(trainer: Any, documents: Sequence[Document]) -> Gradients:
    """In fp32 for a run in half precision, with quantized weights, or with experts (whose products have no fp64);
    otherwise in fp64. fp32 has no TF32 here."""
    model = trainer.model
    no_fp64 = has_experts(model) or any(type(module).__name__ in QUANTIZED for module in model.modules())
    dtype = torch.float32 if no_fp64 or in_half(trainer) else torch.float64
    with ieee_products(), torch.autocast(trainer.args.device.type, enabled=False), widened(model, dtype) as wide:
        return _apart(trainer, documents, wide)


@contextmanager
def ieee_products() -> Iterator[None]:
    """Products of fp32 matrices without TF32. By the settings that `tf32=True` makes: PyTorch's older functions raise
    once those were used."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _apart(trainer: Any, documents: Sequence[Document], forward: Any) -> Gradients:
    """Each document a row of its own, a few short ones at a time: launches are what a large model spends here."""
    parameters = trained(trainer.model)
    num_items, total = num_supervised(documents), 0.0
    sums: dict[str, Tensor | None] = dict.fromkeys(parameters)
    for batch in _batches(documents):
        width = max(len(document["input_ids"]) for document in batch)  # nothing sees the padding, which comes last
        padded = [
            (ids + ids[-1:] * (width - len(ids)), labels + [IGNORE_INDEX] * (width - len(ids)))
            for ids, labels in ((document["input_ids"], document["labels"]) for document in batch)
        ]
        ids, labels = (torch.tensor(rows, device=trainer.args.device) for rows in zip(*padded, strict=True))
        logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = reference_loss(logits.flatten(0, 1), labels[:, 1:].flatten(), trainer.args) / num_items
        total += loss.item()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            before = sums[name]
            if gradient is not None:
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                sums[name] = wide if before is None else before + wide
    return Gradients(total, sums)


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        width = max(len(each["input_ids"]) for each in [*batch, document])
        if batch and width * (len(batch) + 1) > TOGETHER:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def reference_loss(logits_TV: Tensor, labels_T: Tensor, args: Any) -> Tensor:
    """Summed over the supervised tokens, in fp32 or wider. dft: Wu et al., arXiv:2508.05629."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if args.loss_type == "dft":
        nll_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="none")
        return (nll_T * (-nll_T).detach().exp()).sum()
    smoothing = args.label_smoothing_factor
    return torch.nn.functional.cross_entropy(
        logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )


# -- the model, for a while --------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which no two ways draw alike."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def no_zero_b(model: nn.Module) -> Iterator[None]:
    """LoRA's B matrices that are all zero are small random numbers inside."""
    zero = [
        parameter
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for parameter in [*module.lora_B.parameters(), *module.lora_embedding_B.values()]
        if parameter.requires_grad and not parameter.any()
    ]
    try:
        with torch.no_grad():
            for parameter in zero:
                parameter.normal_(std=B_SCALE)
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


@contextmanager
def unfused(trainer: Any) -> Iterator[None]:
    """Transformers' own layers and PyTorch's attention inside, what was there afterwards."""
    model = trainer.model
    base = base_model(model)
    layers = fused_layers(model)
    activations = [vars(layer).get("activations") for layer in layers]
    ours = base.config.get_text_config()._attn_implementation == ATTENTION_NAME
    if layers:
        unfuse(model)
    if ours:
        try:
            # Gemma 2 says in Transformers 5.17 that it supports sdpa, which leaves out its softcap.
            capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
            set_text_attention(base, "eager" if capped else "sdpa")
        except ValueError:  # sinks
            set_text_attention(base, "eager")
    try:
        yield
    finally:
        if ours:
            use_varlen_attention(base)
        if layers:
            fuse(model)
            for layer, had in zip(layers, activations, strict=True):
                if had is not None:  # not a plan made anew, whose host memory would be pinned a second time
                    vars(layer)["activations"] = had


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[Any]:
    """`model` with floating weights of `dtype`; a layer's are widened while it runs, and again for its backward pass.
    Gradients arrive at the model's own parameters."""
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_runs_in(layer, dtype))
        for module in model.modules():
            if hasattr(module, "compute_dtype"):  # of bitsandbytes: what a 4-bit weight is made into
                stack.callback(setattr, module, "compute_dtype", module.compute_dtype)
                module.compute_dtype = dtype  # type: ignore[assignment]
        stack.enter_context(_weights_in(dtype, [module for module in model.modules() if id(module) not in inside]))
        yield model


@contextmanager
def _runs_in(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    had = vars(layer).get("forward")
    forward = layer.forward

    def run(*args, **kwargs):
        with _weights_in(dtype, list(layer.modules())):
            return forward(*args, **kwargs)

    vars(layer)["forward"] = partial(checkpoint, run, use_reentrant=False)
    try:
        yield
    finally:
        if had is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = had


@contextmanager
def _weights_in(dtype: torch.dtype, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Floating parameters and buffers cast inside, shared ones once. (`functional_call` leaves PEFT's token adapters,
    which hold each other, with what they were lent.)"""
    slots = [
        (store, name, tensor)
        for module in modules
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None and tensor.is_floating_point() and tensor.element_size() > 1
    ]
    wide: dict[int, Tensor] = {}
    try:
        for store, name, tensor in slots:
            if id(tensor) not in wide:
                wide[id(tensor)] = tensor.to(dtype)
            store[name] = wide[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, tensor in slots:
            store[name] = tensor  # type: ignore[assignment]
