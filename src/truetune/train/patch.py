"""`patch_trl()`: our trainer under TRL's names, for scripts that can't change."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

from truetune.train.errors import TrainError

_NAMES = ("SFTTrainer", "SFTConfig")
_stock: dict[str, type] = {}


def patch_trl() -> None:
    """Puts truetune's `SFTTrainer` and `SFTConfig` under TRL's names: `trl`, `trl.trainer`, `trl.trainer.sft_trainer`.

    Call it before the script imports them. Raises `TrainError` if `__main__` already holds TRL's own.
    """
    from truetune.train.config import SFTConfig
    from truetune.train.trainer import SFTTrainer

    if _stock:
        return
    modules = _modules()
    stock = {name: getattr(modules[-1], name) for name in _NAMES}
    main = vars(sys.modules["__main__"])
    if early := [name for name in _NAMES if any(value is stock[name] for value in main.values())]:
        raise TrainError(f"{' and '.join(early)} were imported from trl before patch_trl(): call patch_trl() first.")
    _stock.update(stock)
    for module in modules:
        module.SFTTrainer, module.SFTConfig = SFTTrainer, SFTConfig  # type: ignore[attr-defined]


def unpatch_trl() -> None:
    """Puts TRL's own classes back. Names that a script has imported meanwhile stay what they were."""
    for module in _modules() if _stock else []:
        for name in _NAMES:
            setattr(module, name, _stock[name])
    _stock.clear()


def run_script(argv: list[str]) -> None:
    """Runs `SCRIPT.py [ARGS]` or `-m MODULE [ARGS]` as `python` would, with TRL patched."""
    if not argv or argv == ["-m"]:
        raise TrainError("Nothing to run: give a script's path, or -m and a module's name.")
    is_module = argv[0] == "-m"
    target, arguments = (argv[1], argv[2:]) if is_module else (argv[0], argv[1:])
    if not is_module and not Path(target).is_file():
        raise TrainError(f"There is no script {target}: give its path, or -m and a module's name.")
    patch_trl()
    saved_argv, saved_path = sys.argv, sys.path[:]
    sys.argv = [target, *arguments]
    sys.path.insert(0, "" if is_module else str(Path(target).resolve().parent))
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path
        unpatch_trl()


def _modules() -> list[ModuleType]:
    import trl
    import trl.trainer
    import trl.trainer.sft_config
    import trl.trainer.sft_trainer

    return [trl, trl.trainer, trl.trainer.sft_config, trl.trainer.sft_trainer]
