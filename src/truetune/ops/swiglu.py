import torch
import torch.nn.functional as F


def _act(x, a):
    return F.silu(x) if a == "silu" else F.gelu(x, approximate="tanh" if a == "gelu_tanh" else "none")


def glu_forward(gate, up, activation, *, quantize=False):
    w = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (_act(gate.to(w), activation) * up.to(w)).to(gate.dtype), None, None


def glu_backward(dact, gate, up, activation, *, inplace=True, recompute=True, quantize=False, act_out=None):
    w = torch.float64 if gate.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        g, u = gate.detach().to(w).requires_grad_(), up.detach().to(w).requires_grad_()
        act = _act(g, activation) * u
        dg, du = torch.autograd.grad(act, (g, u), dact.to(w))
    act = act.detach().to(gate.dtype)
    gate.copy_(dg)
    up.copy_(du)
    if act_out is not None:
        act = act_out.copy_(act)
    return gate, up, act
