from typing import NamedTuple

import torch


class Normed(NamedTuple):
    y: torch.Tensor
    rstd_T: torch.Tensor
    sum_TH: object = None
    y8: object = None
    scale_T: object = None


def rms_norm_forward(
    x_TH, weight_H, eps, *, offset=0.0, residual_TH=None, added_TH=None, out_dtype=None, quantize=False
):
    w = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    xf = x_TH.to(w)
    rstd = torch.rsqrt(xf.pow(2).mean(-1) + eps)
    y = xf * rstd[:, None] * (offset + weight_H.to(w))
    if residual_TH is not None:
        y = residual_TH.to(w) + y
        return Normed(y.to(residual_TH.dtype), rstd)
    return Normed(y.to(out_dtype or x_TH.dtype), rstd)


def rms_norm_backward(dy, x_TH, weight_H, rstd_T, *, offset=0.0, dresidual_TH=None, needs_weight=False, out=None):
    w = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    dy = sum(d.to(w) for d in dy) if isinstance(dy, tuple) else dy.to(w)
    xhat = x_TH.to(w) * rstd_T[:, None]
    g = dy * (offset + weight_H.to(w))
    dx = rstd_T[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if dresidual_TH is not None:
        dx = dx + dresidual_TH.to(w)
    return dx.to(x_TH.dtype), ((dy * xhat).sum(0) if needs_weight else None)
