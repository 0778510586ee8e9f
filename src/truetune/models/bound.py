"""Methods that are bound to one instance, in the place of its class's."""

import types
from collections.abc import Callable
from typing import Any


def bind(instance: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts `function` in the place of the class's method `name`; copies of the instance have their own.

    pickle keeps a bound method as its instance and its function's name, and looks that up when it loads: under the name
    of what it replaces it finds the class's, so that a model saved whole loads as its class has it.
    """
    function.__name__ = name
    vars(instance)[name] = types.MethodType(function, instance)


def is_bound(instance: Any, name: str, function: Callable[..., Any]) -> bool:
    return getattr(vars(instance).get(name), "__func__", None) is function


def is_replaced(instance: Any, name: str) -> bool:
    """Whether the instance has something else there than its class."""
    return name in vars(instance) and not is_bound(instance, name, getattr(type(instance), name))
