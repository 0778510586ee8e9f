import torch

from truetune.ops.rms_norm import rms_norm_backward, rms_norm_forward


def _rot(x, cos, sin, inverse=False):
    R = cos.shape[-1]
    w = torch.float64 if x.dtype == torch.float64 else torch.float32
    xr, xp = x[..., :R].to(w), x[..., R:]
    c, s = cos[:, None].to(w), sin[:, None].to(w)
    a, b = xr.chunk(2, -1)
    ca, cb = c.chunk(2, -1)
    sa, sb = s.chunk(2, -1)
    if inverse:
        out = torch.cat([a * ca + b * sb, b * cb - a * sa], -1)
    else:
        out = torch.cat([a * ca - b * sa, b * cb + a * sb], -1)
    return torch.cat([out.to(x.dtype), xp], -1)


def _n(x, w, eps, offset):
    return rms_norm_forward(x.reshape(-1, x.shape[-1]), w, eps, offset=offset).y.view(x.shape)


def rope_forward(q, k, cos, sin, *, q_weight=None, k_weight=None, eps=0.0, offset=0.0, inplace=False):
    if q_weight is not None:
        q, k = _n(q, q_weight, eps, offset), _n(k, k_weight, eps, offset)
    return _rot(q, cos, sin), _rot(k, cos, sin)


def rope_backward(
    dq,
    dk,
    cos,
    sin,
    *,
    q=None,
    k=None,
    q_weight=None,
    k_weight=None,
    eps=0.0,
    offset=0.0,
    needs_weight=False,
    inplace=False,
):
    dq, dk = _rot(dq, cos, sin, True), _rot(dk, cos, sin, True)
    if q_weight is None:
        return dq, dk, None, None
    out = []
    for d, x, w in ((dq, q, q_weight), (dk, k, k_weight)):
        x2 = x.reshape(-1, x.shape[-1])
        rstd = rms_norm_forward(x2, w, eps, offset=offset).rstd_T
        dx, dw = rms_norm_backward(d.reshape(-1, x.shape[-1]), x2, w, rstd, offset=offset, needs_weight=needs_weight)
        out += [dx.view(x.shape), dw]
    return out[0], out[2], out[1], out[3]
