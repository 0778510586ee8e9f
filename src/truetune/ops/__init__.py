"""Fused operations, one file each; every one runs in plain PyTorch where there is no Triton device."""

from truetune.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from truetune.ops.linear_log_probs import linear_log_probs as linear_log_probs
