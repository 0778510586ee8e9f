"""Attention within documents: the kernels, what each of them can do, and which one is taken.

T: tokens of a pack, N: documents, H: query heads, G: key/value heads, D: head size of queries and keys, E: of values.
"""

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from truetune.cache import cache_directory
from truetune.models.errors import ModelError

HALF = (torch.float16, torch.bfloat16)
FLEX_BLOCK = 128


class Documents:
    """Where the documents of a pack begin, and what kernels derive from that once for all layers.

    `cu_seq_lens`: int32 [N + 1], from 0 to T. `max_length`: the longest document; None is found here, with a host sync.
    """

    def __init__(self, cu_seq_lens: torch.Tensor, max_length: int | None = None) -> None:
        self.cu_seq_lens = cu_seq_lens.to(torch.int32)
        self._max_length = max_length
        self._lengths: list[int] | None = None
        self._block_masks: dict[int | None, object] = {}

    @property
    def max_length(self) -> int:
        if self._max_length is None:
            self._max_length = max(self.lengths)
        return self._max_length

    @property
    def lengths(self) -> list[int]:
        if self._lengths is None:
            self._lengths = self.cu_seq_lens.diff().tolist()
        return self._lengths

    def block_mask(self, num_tokens: int, window: int | None):
        if window not in self._block_masks:
            self._block_masks[window] = _block_mask(self.cu_seq_lens, num_tokens, window)
        return self._block_masks[window]


@dataclass(frozen=True)
class Scores:
    """How queries meet keys: softmax(softcap * tanh(scaling * q k / softcap)) over a causal window of `window` tokens.

    `sinks`: one logit a head, [H], that takes part in the softmax and has no value. `dropout`: of the probabilities.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What a layer asks of a backend."""

    head_dim: int
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False


# -- the backends ------------------------------------------------------------------------------------------------------


def _flash_attention_4(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    result = flash_attn_varlen_func(
        q_THD,
        k_TGD,
        v_TGE,
        cu_seqlens_q=documents.cu_seq_lens,
        cu_seqlens_k=documents.cu_seq_lens,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        softmax_scale=scores.scaling,
        causal=True,
        window_size=(None, None) if scores.window is None else (scores.window - 1, 0),
        softcap=scores.softcap or 0.0,
    )
    return result[0] if isinstance(result, tuple) else result


def _flash_attention_3(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    result = flash_attn_varlen_func(
        q_THD,
        k_TGD,
        v_TGE,
        cu_seqlens_q=documents.cu_seq_lens,
        cu_seqlens_k=documents.cu_seq_lens,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        softmax_scale=scores.scaling,
        causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
        softcap=scores.softcap or 0.0,
    )
    return result[0] if isinstance(result, tuple) else result  # releases differ


def _flash_attention_2(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THD,
        k_TGD,
        v_TGE,
        documents.cu_seq_lens,
        documents.cu_seq_lens,
        documents.max_length,
        documents.max_length,
        dropout_p=scores.dropout,
        softmax_scale=scores.scaling,
        causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
        softcap=scores.softcap or 0.0,
    )


def _torch_varlen(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    # The operation behind torch.nn.attention.varlen, whose Python wrapping costs 1.2 ms a layer and step: a sixth of a
    # 0.6B model's step on an H200.
    return torch.ops.aten._flash_attention_forward(
        q_THD,
        k_TGD,
        v_TGE,
        documents.cu_seq_lens,
        documents.cu_seq_lens,
        documents.max_length,
        documents.max_length,
        scores.dropout,
        True,
        False,
        scale=scores.scaling,
        window_size_left=None if scores.window is None else scores.window - 1,
        window_size_right=None if scores.window is None else 0,
    )[0]


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _softcap_score_mod(softcap: float) -> Callable:
    return lambda score, batch, head, q_index, k_index: softcap * torch.tanh(score / softcap)


def _flex_attention(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGE))
    out, aux = _compiled_flex_attention()(
        q,
        k,
        v,
        score_mod=None if scores.softcap is None else _softcap_score_mod(scores.softcap),
        block_mask=documents.block_mask(len(q_THD), scores.window),
        scale=scores.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if scores.sinks is not None:
        # softmax with one more logit s: its probability is e^s / (e^lse + e^s), and what is left goes to the keys.
        sinks_H1 = scores.sinks.to(aux.lse.dtype)[:, None]
        out = (out * torch.sigmoid(aux.lse - sinks_H1)[..., None]).to(out.dtype)
    return out[0].transpose(0, 1)


def _block_mask(cu_seq_lens: torch.Tensor, num_tokens: int, window: int | None):
    """FlexAttention's block mask, made from block indexes alone: no T x T mask, no compilation, no host sync."""
    from torch.nn.attention.flex_attention import BlockMask

    position_T = torch.arange(num_tokens, dtype=torch.int32, device=cu_seq_lens.device)
    document_T = torch.searchsorted(cu_seq_lens[1:].contiguous(), position_T, right=True)
    first_key_T = cu_seq_lens[document_T]  # the first key that each query sees: it never goes back along the pack
    if window is not None:
        first_key_T = torch.maximum(first_key_T, position_T - (window - 1))

    def sees(batch, head, q_index, k_index):
        return (k_index <= q_index) & (k_index >= first_key_T[q_index])

    start_B = position_T[::FLEX_BLOCK]
    end_B = (start_B + FLEX_BLOCK - 1).clamp(max=num_tokens - 1)
    not_later_BB = start_B[None, :] <= start_B[:, None]
    some_BB = not_later_BB & (end_B[None, :] >= first_key_T[start_B][:, None])
    full_BB = (start_B[None, :] < start_B[:, None]) & (start_B[None, :] >= first_key_T[end_B][:, None])
    full_BB &= (start_B + FLEX_BLOCK <= num_tokens)[:, None]  # a last block that is cut short needs the mask
    return BlockMask.from_kv_blocks(
        *_counts_and_indexes(some_BB & ~full_BB),
        *_counts_and_indexes(full_BB),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
        compute_q_blocks=True,
    )


def _counts_and_indexes(blocks_BB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries takes, and which, put first: int32 [1, 1, B], [1, 1, B, B]."""
    indexes_BB = blocks_BB.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks_BB.sum(1, dtype=torch.int32)[None, None], indexes_BB.to(torch.int32)[None, None]


def _per_document_sdpa(q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
    """One call a document. `split`, because the backward of a slice fills a gradient of the whole pack."""
    lengths = documents.lengths
    outputs = []
    for q_LHD, k_LGD, v_LGE in zip(q_THD.split(lengths), k_TGD.split(lengths), v_TGE.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_LGD, v_LGE))
        length = q.shape[2]
        windowed = scores.window is not None and scores.window < length
        if scores.softcap is not None or scores.sinks is not None:
            out = attention_reference(q, k, v, causal_mask(length, scores.window, q.device), scores)
        else:
            mask_LL = causal_mask(length, scores.window, q.device) if windowed else None
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask_LL,
                dropout_p=scores.dropout,
                is_causal=mask_LL is None,
                scale=scores.scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [L, L], True where a query sees a key: no later one, and at most the last `window` ones."""
    mask_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask_LL if window is None else mask_LL.triu(1 - window)


def attention_reference(q_BHSD, k_BGSD, v_BGSE, mask: torch.Tensor | None, scores: Scores) -> torch.Tensor:
    """Attention in plain PyTorch, with the softmax in fp32: [B, H, S, E].

    `mask`: bool (True is seen) or additive, broadcastable to [B, H, S, keys], or None. Softcap and sinks are here
    because `scaled_dot_product_attention` has neither; a window comes with the mask.
    """
    group = q_BHSD.shape[1] // k_BGSD.shape[1]
    k_BHSD, v_BHSE = k_BGSD.repeat_interleave(group, 1), v_BGSE.repeat_interleave(group, 1)
    logits_BHSS = (q_BHSD @ k_BHSD.transpose(-1, -2)) * scores.scaling
    if scores.softcap is not None:
        logits_BHSS = scores.softcap * torch.tanh(logits_BHSS / scores.softcap)
    if mask is not None and mask.dtype == torch.bool:
        logits_BHSS = logits_BHSS.masked_fill(~mask, torch.finfo(logits_BHSS.dtype).min)
    elif mask is not None:
        logits_BHSS = logits_BHSS + mask
    if scores.sinks is not None:
        sinks_BHS1 = scores.sinks.to(logits_BHSS.dtype).view(1, -1, 1, 1).expand(*logits_BHSS.shape[:-1], 1)
        logits_BHSS = torch.cat([logits_BHSS, sinks_BHS1], -1)
    probabilities_BHSS = logits_BHSS.softmax(-1, dtype=torch.float32).to(v_BHSE.dtype)
    if scores.sinks is not None:
        probabilities_BHSS = probabilities_BHSS[..., :-1]
    return F.dropout(probabilities_BHSS, scores.dropout) @ v_BHSE


# -- which one ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A kernel and what it can do. `majors`: the CUDA compute capabilities it runs on; none: any device. `capturable`:
    it reads the documents on the device alone, as a CUDA graph must. `expands_keys`: its backward pass makes gradients
    of keys and values for every query head before it adds them up, or nobody has looked."""

    name: str
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, Scores], torch.Tensor]
    package: str
    module: str
    function: str
    majors: Sequence[int] = ()
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: range | None = None
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    equal_head_dims: bool = True
    capturable: bool = False
    expands_keys: bool = True

    def attend(self, q_THD, k_TGD, v_TGE, documents: Documents, scores: Scores) -> torch.Tensor:
        """Causal attention within documents: [T, H, E]."""
        head_dim, head_dim_v = q_THD.shape[-1], v_TGE.shape[-1]
        if self.equal_head_dims and head_dim_v < head_dim:  # as in multi-head latent attention
            v_TGE = F.pad(v_TGE, (0, head_dim - head_dim_v))
            return self.kernel(q_THD, k_TGD, v_TGE, documents, scores)[..., :head_dim_v]
        return self.kernel(q_THD, k_TGD, v_TGE, documents, scores)

    def why_not_installed(self) -> str | None:
        return _why_not_importable(self.module, self.function)

    def why_not_on(self, device: torch.device) -> str | None:
        if not self.majors:
            return None
        if device.type != "cuda":
            return f"it needs a CUDA device, and this is {device.type}"
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or major not in self.majors:
            return f"it has no kernels for {torch.cuda.get_device_name(device)} (sm{major}{minor})"
        return None

    def why_not_for(self, needs: Needs, dtype: torch.dtype) -> str | None:
        if dtype not in self.dtypes:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
        widths = self.head_dims
        if widths is not None and needs.head_dim not in widths:
            return f"its heads are {widths[0]} to {widths[-1]} wide in steps of {widths.step}, not {needs.head_dim}"
        lacks = [name for name in ("softcap", "sinks", "dropout") if getattr(needs, name) and not getattr(self, name)]
        return f"it has no {' and no '.join(lacks)}" if lacks else None


@functools.cache
def _why_not_importable(module: str, function: str) -> str | None:
    if module == "flash_attn.cute":
        _let_it_keep_what_it_compiles()
    try:
        found = hasattr(importlib.import_module(module), function)
    except ModuleNotFoundError:
        return "it is not installed"
    except Exception as error:  # an optional package that is broken in whatever way must not stop a run
        return f"it cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None if found else "it is not installed"


def _let_it_keep_what_it_compiles() -> None:
    """FlashAttention-4, which takes seven seconds for an 8B model's shapes.

    Asked to, it makes the directory when it is imported: where that fails, so would the import.
    """
    try:
        directory = Path(
            os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR") or cache_directory() / "flash-attention-4"
        )
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the user has no home
        return
    if os.access(directory, os.W_OK):
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(directory)


FLOATS = (*HALF, torch.float32)
BACKENDS = (  # best first
    Backend(
        "FlashAttention-4",
        _flash_attention_4,
        "flash-attn-4",
        "flash_attn.cute",
        "flash_attn_varlen_func",
        majors=(9, 10),
        head_dims=range(64, 129, 32),
        capturable=True,
        expands_keys=False,
    ),
    Backend(
        "FlashAttention-3",
        _flash_attention_3,
        "flash-attn-3",
        "flash_attn_interface",
        "flash_attn_varlen_func",
        majors=(9,),
        head_dims=range(8, 257, 8),
        softcap=True,
        capturable=True,
    ),
    Backend(
        "FlashAttention-2",
        _flash_attention_2,
        "flash-attn",
        "flash_attn",
        "flash_attn_varlen_func",
        majors=range(8, 13),
        head_dims=range(8, 257, 8),
        softcap=True,
        dropout=True,
        capturable=True,
    ),
    Backend(
        "torch varlen",
        _torch_varlen,
        "torch",
        "torch.nn.attention.varlen",
        "varlen_attn",
        majors=range(8, 13),
        head_dims=range(8, 257, 8),
        dropout=True,
        capturable=True,
    ),
    Backend(
        "FlexAttention",
        _flex_attention,
        "torch",
        "torch.nn.attention.flex_attention",
        "flex_attention",
        majors=range(7, 13),
        dtypes=FLOATS,
        head_dims=range(16, 257),
        softcap=True,
        sinks=True,
    ),
    Backend(
        "SDPA per document",
        _per_document_sdpa,
        "torch",
        "torch.nn.functional",
        "scaled_dot_product_attention",
        dtypes=(*FLOATS, torch.float64),
        softcap=True,
        sinks=True,
        dropout=True,
        equal_head_dims=False,
    ),
)


@functools.cache
def choose_backend(needs: Needs, device: torch.device, dtype: torch.dtype) -> tuple[Backend, tuple[str, ...]]:
    """The best backend for these needs, and for each better one a sentence that says why not.

    Raises `ModelError` where none takes `dtype`.
    """
    passed_over: list[str] = []
    for backend in BACKENDS:
        # Importing comes last: FlashAttention-4 brings a compiler with it.
        reason = backend.why_not_on(device) or backend.why_not_for(needs, dtype) or backend.why_not_installed()
        if reason is None:
            return backend, tuple(passed_over)
        passed_over.append(f"{backend.name}: {reason}")
    raise ModelError(f"no attention backend takes this model: {'; '.join(passed_over)}.")


def attend(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGE: torch.Tensor, documents: Documents, scores: Scores
) -> tuple[torch.Tensor, Backend]:
    """Causal attention within documents by the best backend: [T, H, E], and the backend."""
    needs = Needs(
        head_dim=max(q_THD.shape[-1], v_TGE.shape[-1]),
        softcap=scores.softcap is not None,
        sinks=scores.sinks is not None,
        dropout=scores.dropout > 0,
    )
    backend, _ = choose_backend(needs, q_THD.device, q_THD.dtype)
    return backend.attend(q_THD, k_TGD, v_TGE, documents, scores), backend


@dataclass(frozen=True)
class BackendStatus:
    """One line of `truetune doctor`. `why_not`: None where it can be used on this device."""

    name: str
    version: str | None
    why_not: str | None


def available_backends(device: torch.device | str | None = None) -> list[BackendStatus]:
    """Every backend, best first, with its version and why it cannot be used on `device` (default: the GPU, if any)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    statuses = []
    for backend in BACKENDS:
        try:
            version = importlib.metadata.version(backend.package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        statuses.append(BackendStatus(backend.name, version, backend.why_not_on(device) or backend.why_not_installed()))
    return statuses
