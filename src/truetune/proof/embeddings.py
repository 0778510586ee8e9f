"""Rows of input embedding and head that nobody trains, and heads that are tied to the embedding or not.

V: rows of the embedding, H: hidden size.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from truetune.models.adapters import base_model
from truetune.proof.result import Check
from truetune.proof.supervision import Documents

SAMPLED_ROWS = 4096
NEAR = 0.1  # of the usual distance from the mean row: new rows begin there, or at zero
SHOWN_TOKENS = 5


def check_token_rows(model: Any, tokenizer: Any, documents: Documents) -> Check:
    """Added and special tokens of the data whose rows are frozen, and new or as rows begin.

    The input embedding is asked for all of them, the head for those that are supervised.
    """
    base = base_model(model)
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    modules = {"input embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    seen = {"input embedding": set(documents.ids_N.tolist()),
            "head": set(documents.ids_N[documents.supervised_N].tolist())}  # fmt: skip
    known = _rows_of_checkpoint(base.config)
    bad: dict[str, list[int]] = {}
    for name, module in modules.items():
        weight_VH = None if module is None else _frozen(module)
        if weight_VH is None:
            continue
        asked = sorted((special & seen[name]) - _trained_rows(module))
        asked = [token for token in asked if token < len(weight_VH)]
        if untrained := [t for t in asked if t >= known] + _as_they_begin(weight_VH, [t for t in asked if t < known]):
            bad[name] = untrained
    tokens = sorted({token for found in bad.values() for token in found})
    words = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in tokens[:SHOWN_TOKENS])
    return Check(
        "token rows",
        f"{len(tokens):,} added or special tokens of the data have frozen rows that nobody has trained"
        + (f" ({' and '.join(bad)}): {words}" if bad else ""),
        "0", "warn" if bad else "pass",
        mend="the model cannot learn those tokens: train their rows with trainable_token_indices (or embedding and "
        "head with modules_to_save), or use tokens that it knows" if bad else "",
        details=bad,
    )  # fmt: skip


def check_tied_head(model: Any) -> Check | None:
    """Whether the head that is saved is the head that is trained; None where nothing is amiss."""
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = [isinstance(module, BaseTunerLayer) for module in (embedding, head)]
    one, other = (
        getattr(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, "weight", None)
        for module in (embedding, head)
    )
    if one is None or one is not other:
        return None
    if adapted[0] != adapted[1]:
        return Check(
            "tied head", "an adapter on one of embedding and head, which share their weight", "on none, or on both",
            "warn", mend="merging it changes the other too, which is another model: keep it as an adapter, or train "
            "rows with trainable_token_indices",
        )  # fmt: skip
    if model is base and not _says_tied(base):
        return Check(
            "tied head", "embedding and head share their weight, and the configuration says that they do not",
            "the same in both", "fail", mend="the head is not saved, and would be random when it is loaded: set "
            "config.tie_word_embeddings to True, or give the head a weight of its own", allow="tied_head",
        )  # fmt: skip
    return None


def _says_tied(base: nn.Module) -> bool:
    """Transformers asks the configuration of the part that holds the head: a vision model's own, not its text's."""
    parts = [part for part in base.modules() if isinstance(part, PreTrainedModel) and part._tied_weights_keys]
    return any(getattr(part.config, "tie_word_embeddings", False) for part in parts)


def _frozen(module: nn.Module) -> Tensor | None:
    """Its weight [V, H], if it is frozen but for single rows."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    weights = [p for p in module.parameters() if not p.requires_grad and p.dim() == 2 and p.is_floating_point()]
    whole = any("trainable_tokens_delta" not in name for name in trained)
    return None if whole or not weights or weights[0].is_meta or not weights[0].numel() else weights[0].detach()


def _trained_rows(module: nn.Module) -> set[int]:
    """Those of `trainable_token_indices`, which the head of a tied model shares."""
    return {
        int(token)
        for part in module.modules()
        for rows in (getattr(part, "token_indices", None) or {}).values()
        for token in rows
    }


def _as_they_begin(weight_VH: Tensor, tokens: list[int]) -> list[int]:
    """Those near zero or the mean of all: where Transformers, and whoever adds tokens with care, has them begin."""
    if not tokens:
        return []
    sample_SH = weight_VH[:: max(1, len(weight_VH) // SAMPLED_ROWS)].float()
    mean_H = sample_SH.mean(0)
    usual = (sample_SH - mean_H).norm(dim=1).median()
    rows_NH = weight_VH[torch.tensor(tokens, device=weight_VH.device)].float()
    near_N = torch.minimum((rows_NH - mean_H).norm(dim=1), rows_NH.norm(dim=1)) < NEAR * usual
    return [token for token, near in zip(tokens, near_N.tolist(), strict=True) if near]


def _rows_of_checkpoint(config: Any) -> float:
    """How many tokens the model had where it comes from, as far as that is on this machine."""
    if not config.name_or_path:
        return float("inf")
    try:
        found = AutoConfig.from_pretrained(config.name_or_path, local_files_only=True, trust_remote_code=False)
        return found.get_text_config().vocab_size
    except Exception:  # gone, or of another kind
        return float("inf")
