"""What a run's proof is kept under, so that the next run of a sweep finds it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import truetune
from truetune.cache import cache_directory
from truetune.proof.proven import Proven
from truetune.recipe import Recipe

# Keys of `training` that none of the kept checks reads. Every other key counts, those of later versions too.
_DECIDE_NOTHING = frozenset(
    "learning_rate embedding_learning_rate loraplus_lr_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio num_train_epochs max_steps seed "
    "data_seed logging_steps logging_strategy logging_first_step save_steps save_strategy save_total_limit "
    "save_only_model eval_steps eval_strategy eval_delay eval_on_start load_best_model_at_end metric_for_best_model "
    "greater_is_better report_to run_name project trackio_space_id".split()
)
_HASHES = ("data", "eval_data", "chat_template", "weights", "adapter")  # the packs' order is the seed's


def proven_before(recipe: Recipe, record: Mapping[str, Any]) -> Proven | None:
    """Where the proof of this run may lie; `record` is run.json's. None where something that decides is not known:
    a stream's data, or what code that a model brings does."""
    unknown = record["hashes"]["data"] is None or recipe.training.get("trust_remote_code", False)
    if recipe.preflight != "full" or unknown:
        return None
    training = {name: value for name, value in record["recipe"]["training"].items() if name not in _DECIDE_NOTHING}
    facts = {
        "recipe": {**record["recipe"], "training": training, "output_dir": None},
        "hashes": {name: record["hashes"][name] for name in _HASHES},
        "counts": [record["data"], record["eval_data"]],
        "processes": record["processes"],
        "trainable": record["trainable"],
        "environment": record["environment"],
        "code": code_hash(),
    }
    return Proven(cache_directory() / "proofs", facts)


def code_hash() -> str:
    """Of this package's sources: while it is worked on, its version says nothing."""
    digest = hashlib.sha256()
    for path in sorted(Path(truetune.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
