"""The fused head against PyTorch: its error may be at most 1.5 times that of the plain path of the same dtype."""

from importlib import import_module

import pytest
import torch

from truetune.ops import backend, linear_cross_entropy

head = import_module("truetune.ops.linear_cross_entropy")
reference = head.linear_cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "nll": {},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "smoothing": {"softcap": 8.0, "logit_scale": 2.0, "label_smoothing": 0.2},
    "dft": {"loss_type": "dft"},
}


def make(device, dtype, N=8, H=72, V=1003, *, keep=0.7, with_bias=True, seed=0):
    """hidden_NH, weight_VH, labels_N, bias_V on the device: the same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=rng)
    weight = torch.randn(V, H, generator=rng) * 3 / H**0.5
    bias = torch.randn(V, generator=rng)
    labels = torch.randint(0, V, (N,), generator=rng)
    labels[torch.rand(N, generator=rng) > keep] = -100
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves[0], leaves[1], labels.to(device), leaves[2] if with_bias else None


def run(function, hidden, weight, labels, bias, *, upstream=1.0, **options):
    """Loss, stats and gradients, detached."""
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss, stats = function(hidden, weight, labels, bias=bias, **options)
    return loss.detach(), stats, torch.autograd.grad(loss * upstream, leaves)


def in_fp64(tensors):
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x
        for x in tensors
    ]


def error(value, exact):
    """Relative to the norm of what is exact."""
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_1_5_times_that_of_plain_pytorch(device, dtype, options, trained, small_chunks):
    V = 1024 if options else 1003  # with and without padding
    size = {"N": 237, "V": V}
    if backend.FORCE_KERNELS:
        # The interpreter takes 0.03 s a row. On few rows errors are comparable only where the same logits are rounded:
        # the plain path rounds a half-precision bias and its logit together.
        size = {"N": 8, "V": V, "with_bias": dtype == torch.float32}
    if not trained:
        size["with_bias"] = False
    ours, plain, exact = [], [], []
    # A loss in fp32 is a few roundings away from exact: one draw would compare the luck of two sums.
    for seed in range(16 if dtype == torch.float32 else 2):
        inputs = make(device, dtype, **size, seed=seed)
        inputs[1].requires_grad_(trained)
        ours.append(run(linear_cross_entropy, *inputs, return_stats=True, **options))
        plain.append(run(reference, *inputs, **options))
        exact.append(run(reference, *in_fp64(inputs), **options))

    def rms_error(results, get):
        errors = [error(get(result), get(best)) for result, best in zip(results, exact, strict=True)]
        return torch.tensor(errors).square().mean().sqrt().item()

    def check(name, get, floor=3e-7):
        assert rms_error(ours, get) <= max(1.5 * rms_error(plain, get), floor), name

    def row_losses(result):
        nll_K = result[1].nll_K
        return nll_K * (-nll_K).exp() if options.get("loss_type") == "dft" else nll_K

    # Errors of the rows may cancel in the plain path's sum and not in ours: those of a row are the measure.
    check("loss", lambda result: result[0], floor=1.5 * rms_error(plain, row_losses))
    check("nll", lambda result: result[1].nll_K)
    check("entropy", lambda result: result[1].entropy_K)
    assert [grad.dtype for grad in ours[0][2]] == [dtype] * len(ours[0][2])
    for i in range(len(ours[0][2])):
        check(f"gradient {i}", lambda result, i=i: result[2][i])


def test_given_rows_of_any_leading_shape_are_the_rows_found_from_the_labels(device):
    hidden, weight, labels, bias = make(device, torch.float32)
    hidden, labels = hidden.detach().view(2, 4, -1).requires_grad_(), labels.view(2, 4)
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    found = run(linear_cross_entropy, hidden, weight, labels, bias, return_stats=True)
    given = run(linear_cross_entropy, hidden, weight, labels, bias, return_stats=True, rows=rows)
    other_index = run(
        linear_cross_entropy, hidden, weight, labels.where(labels != -100, 7), bias, return_stats=True, rows=rows
    )
    for other in (given, other_index):
        for a, b in zip((found[0], *found[1], *found[2]), (other[0], *other[1], *other[2]), strict=True):
            assert torch.equal(a, b)
    assert found[2][0].shape == hidden.shape
    exact = run(reference, *in_fp64((hidden, weight, labels, bias)))
    assert error(found[2][0], exact[2][0]) < 2e-6


def test_loss_is_divided_by_num_items_and_by_at_least_one(any_device):
    inputs = make(any_device, torch.float32)
    rows = int((inputs[2] != -100).sum())
    loss, stats, _ = run(linear_cross_entropy, *inputs, return_stats=True)
    total = stats.nll_K.sum()
    torch.testing.assert_close(loss, total / rows)
    for items in (50, torch.tensor(50), torch.tensor(50, device=any_device, dtype=torch.int32)):
        torch.testing.assert_close(linear_cross_entropy(*inputs[:3], bias=inputs[3], num_items=items), total / 50)
    for items in (0, torch.tensor(0, device=any_device)):
        torch.testing.assert_close(linear_cross_entropy(*inputs[:3], bias=inputs[3], num_items=items), total)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_fp16_gradients_survive_a_million_items_and_improbable_labels(device, loss_type):
    """1e-6, of the items or of a label's probability, would leave nearly all fp16 logit gradients zero for good."""
    hidden, weight, _, _ = make(device, torch.float16)
    log_probs_NV = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    labels = (log_probs_NV + 13).abs().argmin(-1)
    options = {"num_items": 1_000_000, "upstream": 2.0**20, "loss_type": loss_type}
    if loss_type == "dft":
        options["upstream"] *= 2.0**16  # a loss scale under which the gradients fit into fp16
    ours = run(linear_cross_entropy, hidden, weight, labels, None, return_stats=True, **options)
    exact = run(reference, *in_fp64((hidden, weight, labels, None)), **options)
    for ours_grad, exact_grad in zip(ours[2], exact[2], strict=True):
        assert error(ours_grad, exact_grad) < 4e-3


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all", "none"])
def test_frozen_and_trained_parts_get_the_gradients_they_ask_for(any_device, trained):
    hidden, weight, labels, bias = make(any_device, torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained in (name, "all"))
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    assert loss.requires_grad == (trained != "none")
    if trained == "none":
        return
    loss.backward()
    exact = in_fp64((hidden, weight, labels, bias))
    reference(*exact[:3], bias=exact[3])[0].backward()
    for leaf, exact_leaf in zip((hidden, weight, bias), (exact[0], exact[1], exact[3]), strict=True):
        assert (leaf.grad is None) == (exact_leaf.grad is None)
        if leaf.grad is not None:
            assert error(leaf.grad, exact_leaf.grad) < 2e-6


def test_tied_head_adds_both_gradients_of_the_embedding(any_device, small_chunks):
    _, weight, labels, _ = make(any_device, torch.float32, V=130)
    weight = weight.detach().requires_grad_()
    ids = torch.arange(len(labels), device=any_device)

    def gradient(function, weight):
        loss = function(weight[ids].sin(), weight, labels)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return torch.autograd.grad(loss, weight)[0]

    exact = gradient(reference, weight.detach().double().requires_grad_())
    assert error(gradient(linear_cross_entropy, weight), exact) < 2e-6


def test_no_grad_gives_the_same_loss_and_makes_no_gradients(device):
    inputs = make(device, torch.bfloat16)
    loss, stats = linear_cross_entropy(*inputs[:3], bias=inputs[3], return_stats=True)
    with torch.no_grad():
        loss_only, stats_only = linear_cross_entropy(*inputs[:3], bias=inputs[3], return_stats=True)
    assert torch.equal(loss, loss_only)
    assert all(torch.equal(a, b) for a, b in zip(stats, stats_only, strict=True))
    assert loss.requires_grad
    assert not loss_only.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_kept_row_is_a_differentiable_zero(device, dtype):
    hidden, weight, labels, bias = make(device, dtype, keep=0.0)
    loss, stats = linear_cross_entropy(hidden, weight, labels, bias=bias, return_stats=True)
    assert loss.item() == 0.0
    assert [len(x) for x in stats] == [0, 0, 0]
    loss.backward()
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_those_of_the_inputs(any_device, small_chunks):
    inputs = make(any_device, torch.float32)

    def under_autocast(function, **options):
        with torch.autocast(any_device, dtype=torch.bfloat16):
            loss, _ = function(*inputs[:3], bias=inputs[3], **options)
        return torch.autograd.grad(loss, [inputs[0], inputs[1], inputs[3]])

    exact = run(reference, *in_fp64(inputs))[2]
    plain = under_autocast(reference)
    for ours_grad, plain_grad, exact_grad in zip(
        under_autocast(linear_cross_entropy, return_stats=True), plain, exact, strict=True
    ):
        assert ours_grad.dtype == torch.float32
        assert 1e-5 < error(ours_grad, exact_grad) <= 1.5 * error(plain_grad, exact_grad)
    weight_grad = under_autocast(linear_cross_entropy, return_stats=True)[1]
    assert not torch.equal(weight_grad, weight_grad.bfloat16().float()), "the head's gradient went through bf16"


def test_stats_are_detached_and_know_nothing_of_smoothing_or_dft(device):
    inputs = make(device, torch.float32)
    exact = reference(*in_fp64(inputs)[:3], bias=in_fp64(inputs)[3])[1]
    for options in ({"label_smoothing": 0.3}, {"loss_type": "dft"}):
        _, stats = linear_cross_entropy(*inputs[:3], bias=inputs[3], return_stats=True, **options)
        assert [x.dtype for x in stats] == [torch.float32, torch.float32, torch.bool]
        assert not any(x.requires_grad for x in stats)
        assert error(stats.nll_K, exact.nll_K) < 2e-6
        assert error(stats.entropy_K, exact.entropy_K) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [5, 1003, 1024])
def test_top1_is_the_first_of_equal_maxima(device, dtype, V):
    """Ties are common in bf16; the winner is found wherever it stands in the row."""
    positions = torch.tensor(sorted({0, 1, V // 3, V // 2, V - 2, V - 1}))
    logits = torch.randn(len(positions), V, generator=torch.Generator().manual_seed(0)).clamp(max=2)
    logits[torch.arange(len(positions)), positions] = 3.0
    logits[:, V - 1] = 3.0  # a tie with the last entry, which loses it
    hidden = torch.eye(len(positions), device=device, dtype=dtype)
    weight = logits.T.to(device, dtype).contiguous()
    stats = linear_cross_entropy(hidden, weight, positions.to(device), return_stats=True)[1]
    assert stats.is_top1_K.all()
    stats = linear_cross_entropy(hidden, weight, torch.full_like(positions, V - 1).to(device), return_stats=True)[1]
    assert stats.is_top1_K.tolist() == [position == V - 1 for position in positions.tolist()]


def test_masked_vocabulary_has_no_probability_no_gradient_and_a_finite_entropy(device):
    hidden, weight, labels, bias = make(device, torch.float32)
    labels[:] = labels.clamp(max=499)
    with torch.no_grad():
        bias[500:] = -torch.inf
    loss, stats, grads = run(linear_cross_entropy, hidden, weight, labels, bias, return_stats=True)
    inputs = in_fp64((hidden, weight, labels, bias))
    exact = run(reference, inputs[0], inputs[1][:500], labels, inputs[3][:500])
    assert error(loss, exact[0]) < 2e-6
    assert error(stats.entropy_K, exact[1].entropy_K) < 2e-6
    assert error(grads[0], exact[2][0]) < 2e-6
    assert not grads[1][500:].any()


def test_every_output_is_written_whatever_the_buffers_held(device, small_chunks):
    inputs = make(device, torch.bfloat16)

    def everything():
        loss, stats, grads = run(linear_cross_entropy, *inputs, return_stats=True, softcap=5.0)
        return loss, *stats, *grads

    clean = everything()
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are filled with NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


def test_gemms_meet_no_infinity_behind_a_row(device, monkeypatch, small_chunks):
    """oneDNN's bf16 GEMM on AMX reads up to 31 elements past a row's end and multiplies them by 0."""
    memory, through_head = [], head._through_head

    def look(d_logits, *others):
        memory.append(d_logits.as_strided((len(d_logits), d_logits.stride(0)), (d_logits.stride(0), 1)).clone())
        through_head(d_logits, *others)

    monkeypatch.setattr(head, "_through_head", look)
    hidden, weight, labels, _ = make(device, torch.bfloat16, V=1003)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert [rows.shape[1] for rows in memory] == [1024] * len(memory)
    assert len(memory) > 1
    assert all(rows.isfinite().all() for rows in memory)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("label", [-1, 1003, -100])
def test_label_outside_the_vocabulary_does_not_pass_unseen(device, label):
    hidden, weight, labels, _ = make(device, torch.float32, keep=1.0)
    labels[3] = label
    rows = torch.arange(len(labels), device=device)
    try:
        loss = linear_cross_entropy(hidden, weight, labels, rows=rows)
    except (IndexError, RuntimeError):
        return
    assert loss.isnan()


def test_second_backward_is_right_or_raises(any_device):
    hidden, weight, labels, _ = make(any_device, torch.float32, with_bias=False)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the fp32 gradient of the head was scaled in place

    hidden, weight, labels, _ = make(any_device, torch.bfloat16, with_bias=False)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivative_raises(any_device):
    hidden, weight, labels, _ = make(any_device, torch.float32, with_bias=False)
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_gradients_are_exact_in_fp64():
    inputs = make("cpu", torch.float64, N=6, H=5, V=11)
    for options in OPTIONS.values():
        ours = run(linear_cross_entropy, *inputs, return_stats=True, **options)
        exact = run(reference, *inputs, **options)
        torch.testing.assert_close((ours[0], *ours[1], *ours[2]), (exact[0], *exact[1], *exact[2]))
    hidden, weight, labels, bias = inputs
    torch.autograd.gradcheck(
        lambda hidden, bias: linear_cross_entropy(hidden, weight.detach(), labels, bias=bias, softcap=5.0),
        (hidden, bias),
    )


@pytest.mark.parametrize("trained", [True, False])
def test_op_is_registered_as_torch_library_wants_it(any_device, trained):
    # bf16, because opcheck hands out the head's gradient, which an fp32 head scales in place in the backward pass
    hidden, weight, labels, bias = make(any_device, torch.bfloat16, V=70)
    weight.requires_grad_(trained)
    rows = (labels != -100).nonzero().squeeze(1)
    items = torch.tensor(20.0, device=any_device)
    settings = (torch.bfloat16, 1.0, None, 0.0, False, True, True, trained, True)
    torch.library.opcheck(head.linear_cross_entropy_op, (hidden, weight, bias, labels, rows, None, items, *settings))


def test_compiles_without_a_graph_break(any_device):
    hidden, weight, labels, bias = make(any_device, torch.float32)
    rows = (labels != -100).nonzero().squeeze(1)
    items = torch.tensor(20, device=any_device)

    def step(hidden, weight, bias):
        return linear_cross_entropy(hidden * 2, weight, labels, bias=bias, rows=rows, num_items=items)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(hidden, weight, bias), (hidden, weight, bias)) for f in (step, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "mse"}, "choose 'nll' or 'dft'"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "no label smoothing"),
        ({"num_items": torch.ones(2)}, "0-d"),
        ({"rows": torch.ones(3)}, "int64"),
        ({"logit_scale": 0.0}, "positive"),
        ({"bias": torch.ones(4)}, "bias has shape"),
        ({"labels": torch.ones(4)}, r"\[V, H\]"),
        ({"weight": torch.ones(1003, 72).bfloat16()}, "autocast"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    hidden, weight, labels, _ = make("cpu", torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, **changes}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (16384, 128256), (4915, 151936), (5000, 262144), (10**6, 262144)])
def test_chunks_of_logits_stay_small_and_feed_the_gemm(kernels, rows, vocab):
    chunk = head._chunk_rows(rows, vocab * 2, kernels)
    assert 128 <= chunk <= 4096
    assert chunk % 128 == 0
    assert chunk * vocab * 2 <= (1.17 * 2**30 if kernels else max(2**26, 128 * vocab * 2))
    assert not kernels or chunk >= min(rows, 1600)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_hidden_states_gradient_is_rounded_once_whatever_it_is_divided_by(device, dtype, trained, small_chunks):
    if torch.device(device).type == "cpu" and (trained or dtype == torch.float16 or not backend.FORCE_KERNELS):
        pytest.skip("on a CPU only a frozen head's kernels have a product that is not rounded")
    hidden, weight, labels, _ = make(device, dtype, N=11, H=256, V=64, keep=1.0, with_bias=False)
    hidden = (hidden.detach() / 64).requires_grad_()  # all probabilities alike: what is rounded is the product
    inputs = (hidden, weight.requires_grad_(trained), labels, None)
    exact = 11 * run(reference, *in_fp64(inputs))[2][0]

    def error_of_divided(items):
        gradient = run(linear_cross_entropy, *inputs, return_stats=True, num_items=items)[2][0]
        return error(items * gradient.double(), exact)

    assert error_of_divided(11) < 1.1 * error_of_divided(1)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_hidden_states_gradient_is_kept_in_what_the_plan_counts(any_device, hidden_dtype, autocast):
    hidden, weight, labels, _ = make(any_device, hidden_dtype)
    with torch.autocast(torch.device(any_device).type, dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels)
    kept = [x for x in loss.grad_fn.saved_tensors if x.ndim == 2 and x.shape[1] == hidden.shape[-1]]
    assert head.kept_dtype(hidden_dtype) in {x.dtype for x in kept}
    assert len(kept) == 2 or not weight.requires_grad


@pytest.mark.parametrize("rows", [1, 4915, 8191, 8192, 16351])
def test_a_frozen_head_takes_full_chunks_and_what_is_left(rows):
    chunk = head._chunk_rows(rows, 128256 * 2, True, in_slabs=True)
    assert chunk == 4096 or (rows <= chunk < 4096 and chunk % 128 == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    def test_host_never_waits_for_the_device_when_the_rows_are_given(self):
        hidden, weight, labels, bias = make("cuda", torch.bfloat16, N=300)
        rows = (labels != -100).nonzero().squeeze(1)
        items = torch.tensor(20, device="cuda")
        options = {"bias": bias, "rows": rows, "num_items": items, "return_stats": True}
        linear_cross_entropy(hidden, weight, labels, **options)[0].backward()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_cross_entropy(hidden, weight, labels, **options)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize(
        ("H", "V", "trained", "gib"),
        [(4096, 128256, False, 1.2), (4096, 128256, True, 3.2), (1024, 151936, False, 1.2), (1024, 151936, True, 3.2)],
    )
    def test_peak_of_extra_memory(self, H, V, trained, gib):
        hidden = torch.randn(16384, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(V, H, device="cuda") * H**-0.5).bfloat16().requires_grad_(trained)
        labels = torch.randint(0, V, (16384,), device="cuda")
        rows = torch.arange(16384, device="cuda")
        linear_cross_entropy(hidden[:128], weight, labels[:128]).backward()  # cuBLAS takes its workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, labels, rows=rows, return_stats=True)[0].backward()
        assert (torch.cuda.max_memory_allocated() - before) / 2**30 <= gib

    @pytest.mark.parametrize("trained", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("N", "H", "V"), [(4500, 64, 151937), (3000, 64, 262144)])
    def test_error_at_real_vocabularies(self, dtype, N, H, V, trained):
        inputs = make("cuda", dtype, N=N, H=H, V=V, with_bias=False)
        inputs[1].requires_grad_(trained)
        ours = run(linear_cross_entropy, *inputs, return_stats=True)
        plain = run(reference, *inputs)
        exact = run(reference, *in_fp64(inputs))
        assert error(ours[1].nll_K, exact[1].nll_K) <= max(1.5 * error(plain[1].nll_K, exact[1].nll_K), 3e-7)
        assert error(ours[1].entropy_K, exact[1].entropy_K) <= max(
            1.5 * error(plain[1].entropy_K, exact[1].entropy_K), 3e-7
        )
        for i in range(1 + trained):
            assert error(ours[2][i], exact[2][i]) <= max(1.5 * error(plain[2][i], exact[2][i]), 1e-6)
