"""What Transformers asks of a model in every step, and PyTorch answers by a slow walk through all of its modules.

The device waits meanwhile. With LoRA an 8B model has 2,665 modules: on a GPU's host `train` took 6 ms a step, the
search for gradients to clip 8 and `zero_grad` 5. These give the same answers, bound to the instance, in a fraction:
`train` in 0.4 ms of 6 with a 0.6B model's 2,389, if it is asked again at once; within a step they are in no cache.
"""

import operator
from collections.abc import Iterator
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from truetune.models.bound import bind, is_bound, is_replaced

_FOUND = "_truetune_modules"
_MODULES, _TRAINING = operator.attrgetter("_modules"), operator.attrgetter("training")
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
    vars(model).pop(_FOUND, None)


class _Found:
    """A model's modules in PyTorch's order, one in several places several times; and by what to tell, in less time than
    a walk takes, whether they are still the same. Modules that are taken away live until the next walk."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        left: list[nn.Module | None] = [model]
        while left:
            module = left.pop()
            if module is not None:
                self.modules.append(module)
                if module._modules:
                    left += list(module._modules.values())[::-1]
        self._dicts = list(map(_MODULES, self.modules))
        self._lengths = list(map(len, self._dicts))
        self._views = [children.values() for children in self._dicts if children]  # which see what is replaced
        self._children = list(chain.from_iterable(self._views))

    def is_current(self) -> bool:
        return (
            all(map(operator.is_, map(_MODULES, self.modules), self._dicts))
            and list(map(len, self._dicts)) == self._lengths
            and all(map(operator.is_, chain.from_iterable(self._views), self._children))
        )

    def __reduce__(self):
        return type(None), ()  # a copied or saved model looks anew


def _modules(model: nn.Module) -> list[nn.Module]:
    found = vars(model).get(_FOUND)
    if found is None or not found.is_current():
        found = vars(model)[_FOUND] = _Found(model)
    return found.modules


def _train(self, mode: bool = True) -> nn.Module:
    """The model's own, unless there is nothing to change."""
    flags = map(_TRAINING, _modules(self))
    if all(flags) if mode else not any(flags):
        return self
    return type(self).train(self, mode)


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
