"""A frozen head in bf16 without its logits: against fp64, and against the two passes over logits."""

import math
from importlib import import_module

import pytest
import torch

from truetune.ops import backend, frozen_head, linear_cross_entropy
from truetune.ops.cross_entropy import Loss, Rows

head = import_module("truetune.ops.linear_cross_entropy")
PLAIN = Loss(1.0, None, 0.0, False)


@pytest.fixture(autouse=True)
def only_where_there_are_kernels(request):
    if "device" in request.fixturenames and not backend.kernels_on(torch.device(request.getfixturevalue("device"))):
        pytest.skip("has no plain path: the op's is that of every head")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")


def make(device, C=16, H=72, V=1003, spread=1.0, seed=0):
    """hidden_CH, weight_VH and labels_C, half of them the largest logit's."""
    rng = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(C, H, generator=rng) * spread).bfloat16()
    weight = (torch.randn(V, H, generator=rng) * H**-0.5).bfloat16()
    labels = torch.randint(0, V, (C,), generator=rng)
    labels[: C // 2] = (hidden[: C // 2].double() @ weight.double().t()).argmax(1)
    return hidden.to(device), weight.to(device), labels.to(device)


def run(hidden, weight, labels, loss=PLAIN, weights=None, divisor=None):
    empty = [torch.full((len(hidden),), math.nan, device=hidden.device) for _ in range(3)]
    rows = Rows(labels, weights, *empty, torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device))
    d_hidden = torch.full_like(hidden, math.nan)
    frozen_head.frozen_head_chunk(hidden, weight, rows, loss, divisor, d_hidden)
    return d_hidden, rows


def exact(hidden, weight, labels, loss=PLAIN, weights=None):
    """In fp64: d_hidden, nll and entropy; and d_hidden as plain PyTorch would make it of gradients in bf16."""
    log_probs = (hidden.double() @ weight.double().t() * loss.logit_scale).log_softmax(-1)
    nll = -log_probs.gather(1, labels[:, None]).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    d_logits = log_probs.exp() - torch.nn.functional.one_hot(labels, len(weight))
    d_logits *= ((-nll).exp() if loss.dft else torch.ones_like(nll))[:, None]
    d_logits *= 1.0 if weights is None else weights.double()[:, None]
    plain = (d_logits.bfloat16().double() @ weight.double()).bfloat16()
    return d_logits @ weight.double(), nll, entropy, plain


def error(value, best):
    return ((value.double() - best).norm() / best.norm()).item()


@pytest.fixture(params=[256, 512, 4096], ids=lambda columns: f"slabs of {columns}")
def slabs(request, monkeypatch):
    monkeypatch.setattr(frozen_head, "slab_columns", lambda *_: request.param)


@pytest.mark.parametrize(
    ("size", "loss"),
    [
        ({}, PLAIN),
        ({"C": 132, "H": 64, "V": 768}, PLAIN),
        ({"spread": 3.0}, PLAIN._replace(dft=True)),
        ({"spread": 3.0}, PLAIN._replace(logit_scale=2.5)),
        ({"spread": 17.0}, PLAIN),
    ],
    ids=["plain", "several tiles of rows", "dft", "scaled", "several references"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_that_of_one_rounding(device, size, loss, weighted, slabs, empty_is_nan):
    hidden, weight, labels = make(device, **size)
    weights = torch.rand(len(hidden), device=device) - 0.5 if weighted else None
    if size.get("spread") == 17.0:
        z = hidden.double() @ weight.double().t()
        above = (z.amax(1) - z.gather(1, labels[:, None]).squeeze(1)) / math.log(2)
        assert above.min() < 80 < above.max(), "no row has a second reference"
    d_hidden, rows = run(hidden, weight, labels, loss, weights)
    best, nll, entropy, plain = exact(hidden, weight, labels, loss, weights)
    assert error(d_hidden, best) < 1.1 * error(plain, best)
    assert error(rows.nll, nll) < 2e-6
    assert error(rows.loss, nll * (-nll).exp() if loss.dft else nll) < 2e-6
    assert (rows.entropy - entropy).abs().max() < 2e-5
    largest = hidden.double() @ weight.double().t()
    assert torch.equal(rows.is_top1, largest.argmax(1) == labels)


def test_a_certain_label_has_next_to_no_gradient_and_no_negative_loss(device, slabs):
    hidden, weight, labels = make(device, spread=60.0)
    d_hidden, rows = run(hidden[:8], weight, labels[:8])  # those whose label is the largest
    _, nll, *_ = exact(hidden[:8], weight, labels[:8])
    certain = nll < 1e-6
    assert certain.any()
    assert rows.nll[certain].min() >= 0.0 and rows.nll[certain].max() < 1e-5
    assert d_hidden[certain].norm(dim=1).max() < 1e-5


@pytest.mark.parametrize("V", [300, 1003])
def test_top1_is_the_first_of_equal_maxima(device, V, slabs):
    """Ties within a tile, between tiles and between slabs, with entries before and after."""
    positions = torch.tensor(sorted({0, 1, 100, 255, 256, V // 2, V - 2, V - 1}))
    logits = torch.randn(len(positions), V, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    logits[torch.arange(len(positions)), positions] = 3.0
    logits[:, V - 1] = 3.0
    hidden = torch.eye(len(positions)).bfloat16().to(device)
    weight = logits.t().bfloat16().contiguous().to(device)
    assert run(hidden, weight, positions.to(device))[1].is_top1.all()
    last = run(hidden, weight, torch.full_like(positions, V - 1).to(device))[1].is_top1
    assert last.tolist() == [position == V - 1 for position in positions.tolist()]
    second = run(hidden, weight, (positions + 1).clamp(max=V - 1).to(device))[1].is_top1
    assert second.tolist() == [position == V - 1 for position in positions.tolist()]
    nothing = run(hidden, torch.zeros_like(weight), torch.arange(len(positions), device=device))[1]
    assert nothing.is_top1.tolist() == [True] + [False] * (len(positions) - 1)
    torch.testing.assert_close(nothing.nll, torch.full_like(nothing.nll, math.log(V)))


@pytest.mark.parametrize("label", [-100, -1, 1003])
def test_label_outside_the_vocabulary_does_not_pass_unseen(device, label, slabs):
    hidden, weight, labels = make(device)
    labels[3] = label
    rows = run(hidden, weight, labels)[1]
    assert rows.loss.isnan().tolist() == [i == 3 for i in range(len(labels))]


def test_nan_in_the_weights_of_another_token_does_not_pass_unseen(device, slabs):
    hidden, weight, labels = make(device, C=4)
    weight[(labels[0] + 1) % len(weight)] = math.nan
    assert run(hidden, weight, labels)[1].loss.isnan().all()


def test_dft_of_an_improbable_label_keeps_its_gradient(device):
    """The label 2^-77 as probable as the rest: its weight and its share of the sum are each as small."""
    hidden, weight, labels = make(device, C=8, spread=17.0)
    z = hidden.double() @ weight.double().t()
    bits = (z.amax(1, keepdim=True) - z) / math.log(2)
    labels = (bits - 77).abs().argmin(1)
    assert (bits.gather(1, labels[:, None]).squeeze(1) - 77).abs().min() < 1.5
    loss = PLAIN._replace(dft=True)
    for ours, best in zip(run(hidden, weight, labels, loss)[0], exact(hidden, weight, labels, loss)[0], strict=True):
        assert error(ours, best) < 0.01


def test_without_statistics_loss_and_gradient_are_the_same(device, slabs):
    hidden, weight, labels = make(device)
    d_hidden, rows = run(hidden, weight, labels)
    nothing = torch.empty(0, device=device)
    bare = rows._replace(
        loss=torch.empty_like(rows.loss), nll=torch.empty_like(rows.nll), entropy=nothing, is_top1=nothing.bool()
    )
    d_bare = torch.empty_like(hidden)
    frozen_head.frozen_head_chunk(hidden, weight, bare, PLAIN, None, d_bare)
    assert torch.equal(d_hidden, d_bare) and torch.equal(rows.nll, bare.nll) and torch.equal(rows.loss, bare.loss)


def test_the_gradient_is_divided_and_no_row_is(device, slabs):
    hidden, weight, labels = make(device)
    plain, rows = run(hidden, weight, labels)
    divided, divided_rows = run(hidden, weight, labels, divisor=torch.tensor(8.0, device=device))
    assert torch.equal(divided * 8, plain) and torch.equal(divided_rows.loss, rows.loss)


@pytest.fixture
def chunks(monkeypatch):
    """The rows of every chunk that went without logits."""
    seen, chunk = [], frozen_head.frozen_head_chunk
    monkeypatch.setattr(frozen_head, "frozen_head_chunk", lambda h, *rest: seen.append(len(h)) or chunk(h, *rest))
    return seen


def test_a_frozen_head_goes_without_logits(device, small_chunks, chunks):
    hidden, weight, labels = make(device)
    labels[5] = -100
    loss, stats = linear_cross_entropy(hidden.requires_grad_(), weight, labels, return_stats=True)
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    assert chunks == [4, 4, 4, 3]
    kept = labels != -100
    best, nll, *_ = exact(hidden.detach()[kept], weight, labels[kept])
    assert error(d_hidden[kept], best / kept.sum()) < 0.003 and not d_hidden[~kept].any()
    assert error(stats.nll_K, nll) < 2e-6 and error(loss.detach(), nll.mean()) < 2e-6


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"weight": torch.Tensor.requires_grad_}, {}),
        ({"hidden": torch.Tensor.detach}, {}),
        ({"hidden": lambda x: x.detach().half().requires_grad_(), "weight": torch.Tensor.half}, {}),
        ({"weight": lambda x: x.t().contiguous().t()}, {}),
        ({}, {"bias": torch.zeros(1003, dtype=torch.bfloat16)}),
        ({}, {"softcap": 5.0}),
        ({}, {"label_smoothing": 0.1}),
    ],
    ids=["trained", "no gradient", "fp16", "transposed", "bias", "softcap", "smoothing"],
)
def test_others_go_through_their_logits(device, chunks, changes, options):
    hidden, weight, labels = make(device, C=4)
    tensors = {"hidden": hidden.requires_grad_(), "weight": weight}
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    linear_cross_entropy(tensors["hidden"], tensors["weight"], labels, **options)
    assert chunks == []


def test_slabs_are_even_whole_tiles_and_small():
    for vocabulary in (1, 32000, 128256, 151936, 262144):
        columns = frozen_head.slab_columns(vocabulary)
        assert columns % 256 == 0 and columns <= 2**16
        assert -(-vocabulary // columns) == -(-vocabulary // 2**16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("H", "V"), [(4096, 128256), (1024, 151936)])
def test_peak_of_extra_memory_is_the_predicted_one(H, V):
    hidden = torch.randn(16384, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, H, device="cuda") * H**-0.5).bfloat16()
    labels = torch.randint(0, V, (16384,), device="cuda")
    rows = torch.arange(16384, device="cuda")
    linear_cross_entropy(hidden[:128], weight, labels[:128]).backward()  # cuBLAS takes its workspace
    hidden.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, rows=rows, return_stats=True)[0].backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = 2 * hidden.numel()
    predicted = gradient + head.chunk_bytes(16384, H, V, 2, in_slabs=True)
    assert 0.97 < peak / predicted < 1.03
    assert peak < 0.9 * 2**30
