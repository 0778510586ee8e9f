"""truetune: supervised fine-tuning that is true, fast and plain.

The public names are imported when they are first used, so that `truetune --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from truetune.importing import uncollected

__version__ = "0.1.0"

_PUBLIC = {
    "SFTConfig": "truetune.train.config",
    "SFTTrainer": "truetune.train.trainer",
    "patch_trl": "truetune.train.patch",
    "unpatch_trl": "truetune.train.patch",
    "load_model": "truetune.models.load",
    "fuse": "truetune.models.fuse",
    "unfuse": "truetune.models.fuse",
    "linear_cross_entropy": "truetune.ops.linear_cross_entropy",
    "linear_log_probs": "truetune.ops.linear_log_probs",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from truetune.models.fuse import fuse as fuse
    from truetune.models.fuse import unfuse as unfuse
    from truetune.models.load import load_model as load_model
    from truetune.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from truetune.ops.linear_log_probs import linear_log_probs as linear_log_probs
    from truetune.train.config import SFTConfig as SFTConfig
    from truetune.train.patch import patch_trl as patch_trl
    from truetune.train.patch import unpatch_trl as unpatch_trl
    from truetune.train.trainer import SFTTrainer as SFTTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        with uncollected():
            return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'truetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
