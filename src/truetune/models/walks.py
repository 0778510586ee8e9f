"""What Transformers asks of a model in every step, and PyTorch answers by a slow walk through all of its modules.

The device waits meanwhile. With LoRA an 8B model has 2,665 modules: on a GPU's host `train` took 6 ms a step, the
search for gradients to clip 8 and `zero_grad` 5. These give the same answers, bound to the instance, in a fraction.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from truetune.models.bound import bind, is_bound, is_replaced

_PARAMETERS = ("parameters", "named_parameters", "named_modules")  # what `parameters` asks


def bind_walks(model: nn.Module) -> None:
    """Binds them where class and instance have PyTorch's own, and those that they would ask."""
    if _is_of(model, "train", nn.Module, PreTrainedModel):
        bind(model, "train", _train)
    if all(_is_of(model, name, nn.Module) for name in _PARAMETERS):
        if _is_of(model, "zero_grad", nn.Module):
            bind(model, "zero_grad", _zero_grad)
        bind(model, "parameters", _parameters)


def _is_of(model: nn.Module, name: str, *classes: type[nn.Module]) -> bool:
    return not is_replaced(model, name) and any(getattr(type(model), name) is getattr(of, name) for of in classes)


def unbind_walks(model: nn.Module) -> None:
    for name, walk in (("train", _train), ("zero_grad", _zero_grad), ("parameters", _parameters)):
        if is_bound(model, name, walk):
            del vars(model)[name]


def _modules(model: nn.Module) -> list[nn.Module]:
    """In PyTorch's order; one that stands in several places comes several times."""
    found: list[nn.Module] = []
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None:
            found.append(module)
            if module._modules:
                left += list(module._modules.values())[::-1]
    return found


def _train(self, mode: bool = True) -> nn.Module:
    """The model's own, unless there is nothing to change."""
    for module in _modules(self):
        if module.training is not mode:
            return type(self).train(self, mode)
    return self


def _parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
    if not recurse:
        return type(self).parameters(self, recurse=False)
    found: dict[nn.Parameter, None] = {}  # each once, and in order
    for module in _modules(self):
        for parameter in module._parameters.values():
            if parameter is not None:
                found[parameter] = None
    return iter(found)


def _zero_grad(self, set_to_none: bool = True) -> None:
    if not set_to_none:
        type(self).zero_grad(self, set_to_none=False)
        return
    for parameter in _parameters(self):
        if parameter.grad is not None:
            parameter.grad = None
