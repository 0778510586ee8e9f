"""Variable-length attention under the name "truetune" in Transformers' attention interface.

A padding-free batch is one row of documents. Its boundaries come with the batch (`cu_seq_lens_q`, `max_length_q`), go
through the model as keyword arguments, and arrive here. Every other batch (padding, a cache, several rows, masks of a
model's own) goes to Transformers' own sdpa, so that `generate` works in the same process.

B: rows, S: row length, T: tokens of a pack, N: documents, H: query heads, G: key/value heads, D, E: head sizes.
"""

import collections
import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import or_masks, sdpa_mask

from truetune.models.attention_backends import Documents, Needs, Scores, attend, attention_reference, choose_backend
from truetune.models.errors import ModelError


class _Name(str):
    """Of a class of this module, so that loading a model that was pickled with it imports what it names."""


# Transformers reads meaning into names with "flash", "sdpa", "flex_attention", "/" or "|".
ATTENTION_NAME = _Name("truetune")
_CHANGES_SCORES = ("position_bias", "indices", "block_indices")  # what models give the interface, and packs do not take
attention_calls: collections.Counter[str] = collections.Counter()  # packed calls of this process, by backend


class PackMask:
    """Stands for the mask of one causal row without padding and without a cache, which most often is never made.

    Transformers asks for masks before it asks for attention, and does not say whether the batch has boundaries. All
    layers of one forward pass share this object, so what is made for one of them is made once.
    """

    ndim = 4  # what `generate` with a static cache asks of a mask that it has prepared

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._dense: dict[torch.device, torch.Tensor | None] = {}
        self._documents: dict[torch.device, Documents | None] = {}
        self.window: int | None = arguments.get("local_size")

    def dense(self, device: torch.device) -> torch.Tensor | None:
        """What sdpa would have got: bool [1, 1, T, T], or None where its `is_causal` says it all."""
        if device not in self._dense:
            mask = sdpa_mask(**self.arguments)
            self._dense[device] = None if mask is None else mask.to(device)
        return self._dense[device]

    def contiguous(self) -> torch.Tensor | None:
        """What later releases of `generate` ask for: there are no packs, so it is the mask itself."""
        return self.dense(torch.device(self.arguments["device"]))

    def documents(
        self, cu_seq_lens: torch.Tensor | None, max_length: int | None, position_ids: torch.Tensor | None
    ) -> Documents | None:
        """The documents of this forward pass, or None: nothing says where they begin."""
        given = cu_seq_lens if cu_seq_lens is not None else position_ids
        if given is None or given.dim() > 2:
            return None
        if given.device not in self._documents:
            if cu_seq_lens is not None:
                self._documents[given.device] = Documents(cu_seq_lens, max_length)
            else:
                self._documents[given.device] = _documents_of_positions(given[0])
        return self._documents[given.device]


def _documents_of_positions(position_T: torch.Tensor) -> Documents | None:
    """A document begins where a position does not follow the one before; None: there is one. Syncs the host."""
    starts = (position_T.diff() != 1).nonzero().flatten() + 1
    if len(starts) == 0:
        return None
    return Documents(torch.cat([starts.new_tensor([0]), starts, starts.new_tensor([len(position_T)])]))


def _mask(**arguments) -> torch.Tensor | PackMask | None:
    """Our `AttentionMaskInterface` function, called once per forward pass and kind of layer."""
    if isinstance(arguments.get("attention_mask"), PackMask):
        return arguments["attention_mask"]
    first, sees = arguments.get("q_offset", 0), arguments.get("mask_function")
    one_causal_row = (
        arguments["batch_size"] == 1
        and arguments["q_length"] == arguments["kv_length"]
        and arguments.get("attention_mask") is None
        and isinstance(first, int)
        and first == 0
        and not arguments.get("allow_is_bidirectional_skip", False)
        and not arguments.get("use_vmap", False)  # a mask function of the model's own
        and getattr(sees, "__name__", None) != or_masks().__name__  # image tokens see those after them
    )
    return PackMask(arguments) if one_causal_row else sdpa_mask(**arguments)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PackMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Our `AttentionInterface` function: query [B, H, S, D], key [B, G, S, D], value [B, G, S, E] -> [B, S, H, E]."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    max_length = kwargs.get("max_length_q")
    if isinstance(attention_mask, PackMask):
        documents = attention_mask.documents(cu_seq_lens, max_length, kwargs.get("position_ids"))
        if documents is not None and attention_mask.window != sliding_window:
            raise ModelError(
                f"{type(module).__name__} masks with a window of {attention_mask.window} tokens but attends with "
                f"{sliding_window}, so its documents cannot be kept apart: train it with packing off."
            )
        mask = attention_mask.dense(query.device) if documents is None else None
    else:
        documents = None if cu_seq_lens is None else Documents(cu_seq_lens, max_length)
        mask = attention_mask
    if documents is not None:
        own = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
        if own or not is_causal or mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ModelError(
                f"{type(module).__name__} got cu_seq_lens with padding, a cache, several rows or a mask of its own: "
                "give one causal row of documents without attention_mask and past_key_values."
            )
        scores = Scores(scaling, sliding_window, softcap, s_aux, dropout)
        return _attend_within_documents(query, key, value, documents, scores), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if mask is None and is_causal and query.shape[2] > 1:
        # As sdpa's is_causal: aligned with the first key, because further keys are empty places of a static cache.
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    out = attention_reference(query, key, value, mask, Scores(scaling, None, softcap, s_aux, dropout))
    return out.transpose(1, 2).contiguous(), None


def _attend_within_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scores: Scores
) -> torch.Tensor:
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings make fp32 queries and keys of bf16 ones; sdpa casts them back, and so do we.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # No indexing and no slicing where a view does: their backward passes fill and copy whole tensors.
    q_THD, k_TGD, v_TGE = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out_THE, backend = attend(q_THD, k_TGD, v_TGE, documents, scores)
    attention_calls[backend.name] += 1
    return out_THE.unsqueeze(0)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a model's attention is `use_varlen_attention`'s; for packs, that is: padded batches go to sdpa."""
    return config.get_text_config()._attn_implementation == ATTENTION_NAME


@contextlib.contextmanager
def given_boundaries(config: PreTrainedConfig, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside, Transformers does not look for documents in the positions of a batch that has `cu_seq_lens_q`.

    It would make the host wait until the device has finished the step before, for a mask that our attention does not
    read. Does nothing for other batches and under other attention.
    """
    if not is_ours(config) or inputs.get("cu_seq_lens_q") is None:
        yield
        return
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


# -- one model ---------------------------------------------------------------------------------------------------------


@dataclass
class AttentionReport:
    """What `use_varlen_attention` did. `reasons`: for every better backend, why it was passed over."""

    asked: str
    backends: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    @property
    def in_effect(self) -> str:
        return " and ".join(self.backends)


def use_varlen_attention(model: PreTrainedModel, dtype: torch.dtype | None = None) -> AttentionReport:
    """Puts variable-length attention into this model instance (of a multimodal model: into its text tower).

    `dtype`: what attention will run in, if not the model's own (autocast). Saved configurations do not name it. Raises
    `ModelError` where `why_not_packable` has a reason, or where Transformers did not take it over.
    """
    if reason := why_not_packable(model):
        raise ModelError(f"variable-length attention cannot be used: {reason}")
    set_text_attention(model, ATTENTION_NAME)
    config = model.config.get_text_config()
    layers = _attention_layers(_text_tower(model))
    if any(layer.config._attn_implementation != ATTENTION_NAME for layer in layers):
        raise ModelError(f"{type(model).__name__} did not take over our attention: train it with packing off.")
    report = AttentionReport(asked="variable-length", windows=_windows(config))
    for needs in dict.fromkeys(_needs(layer) for layer in layers):  # Gemma 4's heads differ between layers
        backend, passed_over = choose_backend(needs, model.device, dtype or model.dtype)
        report.backends = list(dict.fromkeys([*report.backends, backend.name]))
        report.reasons = list(dict.fromkeys([*report.reasons, *passed_over]))
    return report


def capturable(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether packs' attention never asks the host, so that a CUDA graph can hold it. `dtype`: what it will run in."""
    layers = _attention_layers(_text_tower(model))
    ours = all(layer.config._attn_implementation == ATTENTION_NAME for layer in layers)
    return ours and all(choose_backend(_needs(layer), model.device, dtype)[0].capturable for layer in layers)


def expands_keys(layer: Any, dtype: torch.dtype) -> bool:
    """Of an attention module's backend, on this machine's GPU if it has one; the module may have no weights yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose_backend(_needs(layer), device, dtype)[0].expands_keys


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """One of Transformers' attention implementations for the text tower. Raises `ValueError` where it cannot be had."""
    config = model.config.get_text_config()
    if config is model.config:
        model.set_attn_implementation(name)
    else:
        names = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
        model.set_attn_implementation(dict.fromkeys(names, name))


def _text_tower(model: PreTrainedModel) -> PreTrainedModel | None:
    config = model.config.get_text_config()
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config), None)


def _attention_layers(tower: PreTrainedModel | None) -> list[Any]:
    """The modules that call the attention interface: those that say whether they are causal."""
    modules = (m for m in tower.modules() if not isinstance(m, PreTrainedModel)) if tower is not None else ()
    return [m for m in modules if hasattr(m, "is_causal") and hasattr(m, "config")]


def _windows(config: PreTrainedConfig) -> list[int]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return [window] if window is not None and "sliding_attention" in kinds else []


def _needs(layer: Any) -> Needs:
    head_dim = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    return Needs(
        head_dim=head_dim or layer.config.hidden_size // layer.config.num_attention_heads,
        softcap=getattr(layer.config, "attn_logit_softcapping", None) is not None,
        sinks=getattr(layer, "sinks", None) is not None,
        dropout=bool(getattr(layer.config, "attention_dropout", 0.0)),
    )


_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MIXES_TOKENS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


def why_not_packable(model: PreTrainedModel) -> str | None:
    """One sentence on why this model's documents could see each other when packed, or None: they cannot.

    Known to be safe are decoders whose layers all attend, fully or in a sliding window, through Transformers' attention
    interface, and mix tokens in no other way. What is not known is refused.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder, and only decoders are packed."
    config, tower = model.config.get_text_config(), _text_tower(model)
    others = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if others:
        return f"{name} has layers that are neither full nor sliding attention ({', '.join(sorted(others))})."
    if tower is None or not (tower.is_backend_compatible() and tower._can_set_attn_implementation()):
        return f"{name} does not call Transformers' attention interface, through which document boundaries come."
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"{name} attends within chunks that are counted from the row's first token."
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return f"{name} has three-dimensional positions."
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return f"{name} is configured to attend in both directions."
    mixers = {type(m).__name__ for m in tower.modules() if isinstance(m, _MIXES_TOKENS)}
    if mixers:
        return f"{name} has layers that mix neighbouring tokens ({', '.join(sorted(mixers))})."
    layers = _attention_layers(tower)
    if not layers:
        return f"{name} has no attention layers that are known to keep documents apart."
    if not all(layer.is_causal for layer in layers):
        return f"{name} has attention layers that are not causal."
    windows = _windows(config)
    if windows and not any("sliding_window=" in inspect.getsource(type(layer).forward) for layer in layers):
        return f"{name} keeps its window of {windows[0]} tokens to its masks, and packs have none."
    return None
