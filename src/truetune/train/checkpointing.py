"""Transformers' own checkpointing: turned off where a plan takes its place, on where training is tried beforehand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from truetune.models.adapters import base_model

_FLAGS = ("gradient_checkpointing", "activation_checkpointing")  # 5.17 and 5.23 read different names
_TURNED_OFF = "_truetune_turned_off"  # the attribute of arguments that asked for it
_GRADIENT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")  # Transformers' own of `enable_input_require_grads`


def stop_checkpointing(trainer: Any) -> None:
    """So that no layer is checkpointed behind the policy's back."""
    vars(trainer.args)[_TURNED_OFF] = bool(trainer.args.gradient_checkpointing)
    _set_flags(trainer.args, False)
    for module in trainer.model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    # Checkpointing beside frozen embeddings needs them; without it they are a layer's gradient for nobody.
    base_model(trainer.model).disable_input_require_grads()


def ask_as_before(args: Any) -> None:
    """Arguments that another trainer had before this one say again what they said then."""
    if vars(args).pop(_TURNED_OFF, False):
        _set_flags(args, True)


def _set_flags(args: Any, wanted: bool) -> None:
    for name in _FLAGS:
        if hasattr(args, name):
            setattr(args, name, wanted)


@contextmanager
def checkpointed_as_in_training(trainer: Any) -> Iterator[None]:
    """Transformers checkpoints only once training has begun; what is tried before would need more memory."""
    model, args = trainer.model, trainer.args
    if not args.gradient_checkpointing or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    which = {"every_n_layers": kwargs.pop("every_n_layers", 1), "offload": kwargs.pop("offload", False)}
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    attributes = vars(base_model(model))
    before = {key: attributes[key] for key in _GRADIENT_HOOKS if key in attributes}
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": kwargs or None}, **which)
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
        # Transformers forgets the hooks that it had made before, and leaves those that it has made now.
        for hook in attributes.get(_GRADIENT_HOOKS[0], []):
            if hook not in before.get(_GRADIENT_HOOKS[0], []):
                hook.remove()
        for key in _GRADIENT_HOOKS:
            attributes.pop(key, None)
        attributes.update(before)
