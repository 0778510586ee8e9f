"""Layers as CUDA graphs: on a CPU with a recorder that runs again what it was given, on a GPU with graphs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rerun import Rerun
from truetune.models.attention import use_varlen_attention
from truetune.models.fp8 import replace_linears_with_fp8
from truetune.models.fuse import fuse, unfuse
from truetune.models.graphs import LayerGraphs, Recorder
from truetune.models.plan import fused_layers, set_activations

TOKENS, LONGEST, SHORTEST = 64, 40, 50
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 199,
}  # fmt: skip
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}


@pytest.fixture(autouse=True)
def host_bound(monkeypatch):
    """What is measured does not decide; a test sets it."""
    monkeypatch.setattr("truetune.models.graphs.HOST_BOUND", float("inf"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make(request):
    """A fused model with graphs, and its twin without."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def make(model_type="qwen3", *, lora=True, sizes=SIZES, fp8=False):
        torch.manual_seed(0)
        dtype = torch.float32 if request.param == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, pad_token_id=0))
        if fp8:
            replace_linears_with_fp8(model)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model = model.to(request.param, dtype).train()
        base = model.get_base_model() if lora else model
        use_varlen_attention(base)
        twin = copy.deepcopy(model)
        for one in (model, twin):
            fuse(one)
            set_activations(fused_layers(one), ["keep"] * sizes["num_hidden_layers"])
        recorder = Rerun() if request.param == "cpu" else Recorder(torch.device("cuda"))
        graphs = LayerGraphs(fused_layers(model)[:-1], TOKENS, LONGEST, SHORTEST, recorder)
        return model, twin, graphs

    return make


def batch(model, lengths, seed=0):
    """A pack of documents of random tokens."""
    ids = torch.randint(3, 199, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    tensors = {"input_ids": ids, "labels": ids, "position_ids": positions, "cu_seq_lens_q": bounds}
    tensors = {name: x.to(model.device) for name, x in tensors.items()}
    longest = max(lengths)
    tensors["cu_seq_lens_k"] = tensors["cu_seq_lens_q"]
    return tensors | {"max_length_q": longest, "max_length_k": longest, "use_cache": False}


def step(model, inputs, backward=True):
    """The loss, the hidden states before the last layer, and all gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    if backward:
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(ours, exact, tolerance=TOLERANCE):
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).float().norm() <= tolerance[a.device.type] * b.float().norm() + 1e-7


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma2", "granite"])
def test_losses_and_gradients_are_those_of_plain_layers(make, model_type, lora):
    model, twin, graphs = make(model_type, lora=lora)
    packs = [[20, 40], [30, 30, 2], [40, 24], [1, 1, 1, 37, 24], [33, 31], [40, 20], [20, 20]]
    for seed, lengths in enumerate(packs):
        assert_alike(step(model, batch(model, lengths, seed)), step(twin, batch(twin, lengths, seed)))
    assert graphs.why_off is None
    assert graphs.replays == 5  # not the first, from which it learns, and not the last, which is short


@pytest.mark.parametrize("layers", [2, 3])  # one in the graphs, or two, which are their first part alone
def test_few_layers_are_captured_too(make, layers):
    model, twin, graphs = make(sizes=SIZES | {"num_hidden_layers": layers})
    for seed in range(4):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 3
    assert not graphs._captured._masks


def test_fp8_layers_are_captured_too(make):
    model, twin, graphs = make("llama", fp8=True)
    tolerance = TOLERANCE | {"cuda": 0.1}  # a last bit of bf16 may be one of FP8
    for seed in range(4):
        ours, exact = (step(one, batch(one, [40, 24], seed)) for one in (model, twin))
        assert_alike(ours, exact, tolerance)
    assert graphs.replays == 3


def test_gradients_of_micro_batches_add_up(make):
    model, twin, graphs = make()
    for one in (model, twin):
        for seed in range(5):
            one(**batch(one, [40, 24], seed)).loss.backward()
    assert graphs.replays == 4
    assert_alike(*([p.grad for p in one.parameters() if p.requires_grad] for one in (model, twin)))


def test_changes_between_calls_are_seen(make):
    model, twin, graphs = make()

    def both(seed, captures):
        before = graphs.replays
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
        assert graphs.replays == before + 1
        assert graphs.captures == captures

    def scale(factor):
        for one in (model, twin):
            for module in one.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling["default"] *= factor

    step(model, batch(model, [40, 24]))
    both(1, captures=1)
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch(model, [40, 24])).loss, twin(**batch(twin, [40, 24])).loss)
    both(2, captures=1)
    for one in (model, twin):  # in place, as an optimizer does
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(1.01)
    both(3, captures=1)
    scale(3)
    both(4, captures=2)
    weight = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    for one in (model, twin):
        one.get_parameter(weight).requires_grad_(False)
    both(5, captures=3)
    for one in (model, twin):
        one.get_parameter(weight).data = one.get_parameter(weight).data * 2
    both(6, captures=4)
    for number in range(5):
        scale(0.5)
        step(model, batch(model, [40, 24], number)), step(twin, batch(twin, [40, 24], number))
    assert "again and again" in graphs.why_off


@pytest.mark.parametrize("of_mlp", [True, False])
def test_hooks_end_it(make, of_mlp):
    model, twin, graphs = make()
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    layer, seen = fused_layers(model)[1], []
    (layer.mlp if of_mlp else layer).register_forward_hook(lambda module, args, output: seen.append(output))
    assert_alike(step(model, batch(model, [40, 24], 2)), step(twin, batch(twin, [40, 24], 2)))
    assert seen
    assert graphs.replays == 1
    assert "hooks" in graphs.why_off


def test_a_parameters_hook_runs_once(make):
    model, twin, graphs = make()
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            if "layers.1" in name and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * 3)
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert "hooks" in graphs.why_off


def test_a_new_parameter_in_the_same_memory_gets_its_gradient(make):
    model, twin, graphs = make(lora=False)
    for seed in range(3):
        for one in (model, twin):
            down = fused_layers(one)[1].mlp.down_proj
            down.weight = torch.nn.Parameter(down.weight.data)
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.captures == 2


def test_layers_that_are_frozen_pass_gradients_on(make):
    model, twin, graphs = make(lora=False)
    for one in (model, twin):
        for layer in fused_layers(one):
            layer.requires_grad_(False)
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 2


@pytest.mark.parametrize("left", [[0, 2, 3], [0, 2, 1, 3], [0, 1, 3]])
def test_layers_that_are_left_out_or_swapped_are_refused(make, left):
    model, _, _ = make(lora=False)
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    model.model.layers = torch.nn.ModuleList([model.model.layers[number] for number in left])
    model.config.num_hidden_layers = len(left)
    with pytest.raises(RuntimeError, match="set cuda_graphs to False"):
        for seed in range(2):  # where the last one is left out, the next pass tells
            step(model, batch(model, [40, 24], seed))


def test_gradients_that_are_all_zero_can_be_compared(make):
    model, twin, graphs = make()
    for one in (model, twin):
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter).requires_grad_(False)
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 2


def test_a_second_forward_pass_before_the_backward_pass_runs_as_it_is(make):
    model, twin, graphs = make()
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    losses = []
    for one in (model, twin):
        one.zero_grad()
        first, second = (one(**batch(one, [40, 24], seed)).loss for seed in (2, 3))
        (first + 2 * second).backward()
        losses.append([first, second, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert_alike(*losses)
    assert graphs.replays == 2

    model(**batch(model, [40, 24], 4))  # dropped without a backward pass
    assert graphs.replays == 3
    loss = model(**batch(model, [40, 24], 5)).loss
    assert graphs.replays == 4
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        loss.backward()


def test_evaluation_and_other_batches_run_as_they_are(make):
    model, twin, graphs = make()
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    assert graphs.replays == 1
    for lengths in ([30], [24, 25], [41, 20], [1] * 30 + [40, 24]):
        assert_alike(step(model, batch(model, lengths)), step(twin, batch(twin, lengths)))
    assert graphs.replays == 1
    with torch.no_grad():
        assert torch.equal(model(**batch(model, [40, 24])).loss, twin(**batch(twin, [40, 24])).loss)
    padded = {"input_ids": torch.ones(2, 32, dtype=torch.long, device=model.device)}
    padded["labels"] = padded["input_ids"]
    assert_alike(step(model, padded), step(twin, padded))
    assert graphs.replays == 1
    step(model, batch(model, [40, 24]))
    assert graphs.replays == 2


def test_where_the_host_is_what_they_wait_for_short_packs_are_filled_up_too(make, monkeypatch):
    monkeypatch.setattr("truetune.models.graphs.HOST_BOUND", 0)
    model, twin, graphs = make()
    for seed, lengths in enumerate([[40, 24], [40, 24], [9], [12, 8], [24, 25], [41]]):
        assert_alike(step(model, batch(model, lengths, seed)), step(twin, batch(twin, lengths, seed)))
    assert graphs.replays == 4  # not the first, and none whose document is longer than those that were promised


@pytest.mark.parametrize("short", [4, 128])
@pytest.mark.parametrize("lengths", [[32, 32], [40, 20], [12], [1] * 3 + [40], [1] * 60])
def test_documents_of_zeros_are_as_short_as_there_is_room_for(make, monkeypatch, short, lengths):
    monkeypatch.setattr("truetune.models.graphs.SHORT_DOCUMENT", short)
    model, _, graphs = make()
    graphs.documents = 60
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    captured, given = graphs._captured, batch(model, lengths)
    hidden, angles = (torch.zeros(1, sum(lengths), width, device=model.device) for width in (64, 16))
    captured.fill(hidden, given | {"position_embeddings": (angles, angles)})
    filled = captured.cu_seq_lens.diff().tolist()
    assert filled[: len(lengths)] == lengths
    zeros, slots = filled[len(lengths) :], len(filled) - len(lengths)
    left = TOKENS - sum(lengths)
    assert sum(zeros) == left
    assert max(zeros) <= min(LONGEST, max(short, -(-left // slots)))


@pytest.mark.parametrize(("promised", "room"), [(None, 2 + 16), (1, 2 + 16), (2, 2), (60, 60)])
def test_as_many_documents_fit_as_were_promised(make, promised, room):
    model, _, graphs = make()
    graphs.documents = promised
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    of_zeros = 2
    assert len(graphs._captured.cu_seq_lens) - 1 == room + of_zeros


def test_packs_of_many_documents_are_captured_again(make, monkeypatch):
    monkeypatch.setattr("truetune.models.graphs.SPARE_DOCUMENTS", 0)
    model, twin, graphs = make()
    for seed, lengths in enumerate([[40, 24], [40, 24], [1] * 20 + [40], [1] * 24 + [40], [40, 24], [1] * 60]):
        assert_alike(step(model, batch(model, lengths, seed)), step(twin, batch(twin, lengths, seed)))
    assert graphs.why_off is None
    assert graphs.replays == 5
    assert graphs.captures == 3
    assert len(graphs._captured.cu_seq_lens) - 1 == 2 * 60 + 2  # and two of zeros


def test_a_hidden_state_that_is_changed_between_layers_is_refused(make):
    model, _, _ = make()
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    changed = fused_layers(model)[2]
    plain = type(changed).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(changed), "__call__", lambda self, x, *a, **k: plain(self, x + (self is changed), *a, **k))
        with pytest.raises(RuntimeError, match="set cuda_graphs to False"):
            model(**batch(model, [40, 24], 2))
    step(model, batch(model, [40, 24], 3))


def test_copies_and_unfused_models_have_none(make):
    model, twin, graphs = make()
    for seed in range(2):
        step(model, batch(model, [40, 24], seed))
    twin = copy.deepcopy(model)
    assert_alike(step(twin, batch(twin, [40, 24])), step(model, batch(model, [40, 24])))
    assert graphs.replays == 2
    graphs.release()
    assert_alike(step(model, batch(model, [40, 24])), step(twin, batch(twin, [40, 24])))
    LayerGraphs(fused_layers(model)[:-1], TOKENS, LONGEST, SHORTEST, Rerun())
    unfuse(model)
    assert all("graphs" not in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(("model_type", "sizes", "why"), [
    ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}, "several kinds"),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "Qwen3MoeSparseMoeBlock"),
])  # fmt: skip
def test_what_cannot_be_captured_says_so(make, model_type, sizes, why):
    model, twin, graphs = make(model_type, lora=False, sizes=SIZES | sizes)
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 0
    assert why in graphs.why_off


def test_a_replay_that_differs_is_not_used(make):
    model, twin, graphs = make()
    capture, graphs.recorder.capture = (
        graphs.recorder.capture,
        lambda *runs: [SimpleNamespace(replay=int) for _ in runs],
    )
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 0
    assert "results differ" in graphs.why_off

    model, twin, graphs = make()

    def forgetful(*runs):
        (*forward_graphs, backward_graph), captured = capture(*runs), runs[-1].__self__

        def replay():
            backward_graph.replay()
            captured.gradients[0].zero_()

        return *forward_graphs, SimpleNamespace(replay=replay)

    graphs.recorder.capture = forgetful
    for seed in range(3):
        assert_alike(step(model, batch(model, [40, 24], seed)), step(twin, batch(twin, [40, 24], seed)))
    assert graphs.replays == 0
    assert "gradients differ" in graphs.why_off
