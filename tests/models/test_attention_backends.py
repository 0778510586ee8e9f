"""Every backend attends within documents, within the rounding of plain attention, and the best that can is chosen."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from truetune.models import attention_backends
from truetune.models.attention_backends import BACKENDS, Documents, Needs, Scores, available_backends, choose_backend
from truetune.models.errors import ModelError

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def skip_unless_usable(backend, needs, device, dtype):
    if reason := backend.why_not_on(device) or backend.why_not_for(needs, dtype) or backend.why_not_installed():
        pytest.skip(reason)


def test_the_choice_says_why_each_better_backend_was_passed_over():
    backend, reasons = choose_backend(Needs(head_dim=64), torch.device("cpu"), torch.float32)
    assert backend is BACKENDS[-1]
    assert [reason.split(":")[0] for reason in reasons] == [better.name for better in BACKENDS[:-1]]


def test_no_backend_for_a_dtype_is_an_error():
    with pytest.raises(ModelError, match="does not take int8"):
        choose_backend(Needs(head_dim=64), torch.device("cpu"), torch.int8)


@pytest.mark.parametrize(
    ("needs", "dtype", "able"),
    [
        (Needs(64), torch.bfloat16, {"FlashAttention-4", "FlashAttention-3", "FlashAttention-2", "torch varlen"}),
        (Needs(256), torch.bfloat16, {"FlashAttention-3", "FlashAttention-2", "torch varlen"}),
        (Needs(256, softcap=True), torch.bfloat16, {"FlashAttention-3", "FlashAttention-2"}),
        (Needs(64, dropout=True), torch.bfloat16, {"FlashAttention-2", "torch varlen"}),
        (Needs(64, sinks=True), torch.bfloat16, set()),
        (Needs(84), torch.bfloat16, set()),
        (Needs(64), torch.float32, set()),
    ],
)
def test_flash_attention_is_taken_for_what_it_can_do(needs, dtype, able):
    general = {"FlexAttention"} if not needs.dropout else set()
    takes = {backend.name for backend in BACKENDS if backend.why_not_for(needs, dtype) is None}
    assert takes == able | general | {"SDPA per document"}


def test_doctor_lists_every_backend():
    statuses = available_backends("cpu")
    assert [status.name for status in statuses] == [backend.name for backend in BACKENDS]
    assert statuses[-1].why_not is None
    assert all(status.why_not for status in statuses[:-1])


@pytest.mark.parametrize("window", [None, 1, 70, 128, 300])
@pytest.mark.parametrize("lengths", [(1000,), (128, 256, 128), (1, 127, 3, 400, 129, 5, 200), (37,)])
def test_the_block_mask_sees_within_documents_and_skips_other_blocks(lengths, window):
    num_tokens = sum(lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def sees(batch, head, q, k):
        near = q >= k if window is None else (q >= k) & (q - k < window)
        return near & (document_T[q] == document_T[k])

    cu_seq_lens = torch.tensor([0, *lengths]).cumsum(0)
    block_mask = Documents(cu_seq_lens, max(lengths)).block_mask(num_tokens, window)
    size = (1, 1, num_tokens, num_tokens)
    assert torch.equal(create_mask(block_mask.mask_mod, *size, "cpu"), create_mask(sees, *size, "cpu"))
    expected = create_block_mask(sees, *size, device="cpu")
    assert torch.equal(block_mask.to_dense(), expected.to_dense())
    full, full_expected = ((m.full_kv_num_blocks, m.full_kv_indices) for m in (block_mask, expected))
    assert torch.equal(full[0], full_expected[0])
    for count, row, row_expected in zip(full[0].flatten(), full[1][0, 0], full_expected[1][0, 0], strict=True):
        assert torch.equal(row[:count], row_expected[:count])


def reference_attention(q, k, v, lengths, scores, dtype):
    """Each document alone in plain PyTorch at `dtype`, and its gradients."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    outputs = []
    for q_LHD, k_LGD, v_LGE in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        mask = attention_backends.causal_mask(len(q_LHD), scores.window, q.device)
        rows = (x.transpose(0, 1)[None] for x in (q_LHD, k_LGD, v_LGE))
        outputs.append(attention_backends.attention_reference(*rows, mask, scores)[0].transpose(0, 1))
    return torch.cat(outputs), (q, k, v)


def error_norm(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def case(heads, groups, head_dim, head_dim_v, window=None, softcap=None, sinks=False):
    return heads, groups, head_dim, head_dim_v, window, softcap, sinks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "head_dim_v", "window", "softcap", "sinks"),
    [
        case(4, 4, 64, 64),
        case(8, 2, 128, 128, window=33),
        case(4, 2, 80, 80),
        case(4, 1, 256, 256, window=33, softcap=5.0),
        case(4, 2, 64, 64, window=33, sinks=True),
        case(4, 4, 96, 64),
    ],
)
def test_every_backend_is_within_rounding_of_plain_attention(
    backend, dtype, device, heads, groups, head_dim, head_dim_v, window, softcap, sinks
):
    device = torch.device(device)
    needs = Needs(head_dim, softcap=softcap is not None, sinks=sinks)
    skip_unless_usable(backend, needs, device, dtype)
    torch.manual_seed(0)
    lengths = [200, 1, 37, 128, 150]
    q, k, v = (
        torch.randn(sum(lengths), n, width, device=device).to(dtype)
        for n, width in ((heads, head_dim), (groups, head_dim), (groups, head_dim_v))
    )
    upstream = torch.randn(sum(lengths), heads, head_dim_v, device=device).to(dtype)
    scores = Scores(head_dim**-0.5, window, softcap, torch.randn(heads, device=device) if sinks else None)
    cu_seq_lens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = backend.attend(*inputs, Documents(cu_seq_lens, max(lengths)), scores)
    assert ours.shape == upstream.shape
    ours.backward(upstream)
    plain, plain_inputs = reference_attention(q, k, v, lengths, scores, dtype)
    plain.backward(upstream)
    exact, exact_inputs = reference_attention(q, k, v, lengths, scores, torch.float64)
    exact.backward(upstream.double())
    floor = 1e-6  # fp32: both are at the rounding of single operations
    assert error_norm(ours, exact) <= 1.5 * error_norm(plain, exact) + floor
    for mine, theirs, truth in zip(inputs, plain_inputs, exact_inputs, strict=True):
        assert error_norm(mine.grad, truth.grad) <= 1.5 * error_norm(theirs.grad, truth.grad) + floor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("window", [None, 33])
def test_no_backend_moves_a_document_when_its_neighbours_change(backend, window, device):
    device = torch.device(device)
    needs = Needs(64)
    if (
        reason := backend.why_not_on(device)
        or backend.why_not_for(needs, torch.bfloat16)
        or backend.why_not_installed()
    ):
        pytest.skip(reason)
    torch.manual_seed(0)
    lengths, kept = [200, 1, 137, 128, 50], slice(201, 338)
    cu_seq_lens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    first, second = torch.randn(2, 3, sum(lengths), 4, 64, device=device).to(torch.bfloat16)
    second[:, kept] = first[:, kept]
    scores = Scores(0.125, window)
    with torch.no_grad():
        outs = [backend.attend(*qkv, Documents(cu_seq_lens, max(lengths)), scores) for qkv in (first, second)]
    assert torch.equal(outs[0][kept], outs[1][kept])
    assert not torch.equal(outs[0][:200], outs[1][:200])


FLASH_ATTENTION_4 = """
import os
from pathlib import Path

if os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == "1":
    Path(os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
flash_attn_varlen_func = None
"""


@pytest.mark.parametrize("home", ["writable", "a file", "none"])
def test_flash_attention_4_is_had_where_nothing_can_be_kept(tmp_path, monkeypatch, home):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text(FLASH_ATTENTION_4)
    (tmp_path / "a file").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path / home)})
    if home == "none":
        del os.environ["XDG_CACHE_HOME"]
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    find = attention_backends._why_not_importable.__wrapped__
    assert find("flash_attn.cute", "flash_attn_varlen_func") is None
    assert ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" in os.environ) == (home == "writable")
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name)
