"""Leak probe: what one document says moves no other document's logits, and no token those before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.proof.excerpt import Document, packed
from truetune.proof.parity import evaluating, has_experts, in_half
from truetune.proof.result import Check


def check_leaks(trainer: Any, documents: Sequence[Document]) -> Check:
    """The logits of a pack, before and after its middle document is another one, and after its last token is."""
    name, limit = "leak probe", _limit(trainer)
    shown = f"{limit:.0e} of the logits' deviation"
    if not trainer.unpads:
        packs = trainer.args.packing or trainer.args.padding_free
        why = "documents of a row see each other" if packs else "each row of a batch holds one document"
        return Check(name, f"not run: {why}", shown, "warn" if packs else "skip")
    if len(documents) < 3:
        return Check(name, "not run: the first batch has too little text for three documents", shown, "skip")
    documents = documents[:3]
    first, middle, last = (document["input_ids"] for document in documents)
    other = (last[::-1] * (len(middle) // len(last) + 1))[: len(middle)]
    if other == middle:
        other = [*other[1:], other[0]]
    swapped = [documents[0], {**documents[1], "input_ids": other}, documents[2]]
    changed_end = {**documents[2], "input_ids": [*last[:-1], first[0] if first[0] != last[-1] else last[0]]}
    with evaluating(trainer.model), torch.no_grad():
        before = _logits(trainer, documents)
        after = _logits(trainer, swapped)
        later = _logits(trainer, [*documents[:2], changed_end])
    deviation = before.std().item()
    start, end = len(first), len(first) + len(middle)
    others = torch.cat([(after - before)[:start], (after - before)[end:]]).abs().max().item() / deviation
    own = (after - before)[start:end].abs().max().item() / deviation
    earlier = (later - before)[:-1].abs().max().item() / deviation
    if own <= limit:
        return Check(name, "the logits of a document do not follow its own tokens", shown, "fail",
                     mend="the model does not read its input: check the weights")  # fmt: skip
    leaks = [what for what, moved in (("other documents", others), ("earlier tokens", earlier)) if not moved <= limit]
    return Check(
        name,
        f"one document of a pack changed: others moved by {others:.1e}, itself by {own:.1e}; last token changed: "
        f"those before it moved by {earlier:.1e}",
        shown,
        "fail" if leaks else "pass",
        mend=f"{' and '.join(leaks)} see what they must not: set packing: false, or another attention" if leaks else "",
        allow="leaking_documents" if leaks else "",
        details={"others": others, "itself": own, "earlier_tokens": earlier, "limit": limit},
    )


def _logits(trainer: Any, documents: Sequence[Document]) -> Tensor:
    batch = packed(documents, trainer.args.device)
    batch.pop("labels")
    batch.pop("loss_rows")
    with trainer.accelerator.autocast():
        return trainer.model(**batch, use_cache=False).logits[0].float()


def _limit(trainer: Any) -> float:
    """Equal shapes round alike, but for experts, whose products have as many rows as tokens chose them."""
    if has_experts(trainer.model):
        return 5e-2 if in_half(trainer) else 1e-4
    return 4e-3 if in_half(trainer) else 1e-6
