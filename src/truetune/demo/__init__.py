"""The built-in model and data, `builtin:demo`: made from a seed, offline, on a CPU, once."""

from truetune.demo.build import BUILTIN, resolve_data, resolve_model

__all__ = ["BUILTIN", "resolve_data", "resolve_model"]
