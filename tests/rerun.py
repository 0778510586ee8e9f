"""What stands for a CUDA graph where there is no GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch


class Rerun:
    """In place of `truetune.models.graphs.Recorder`: what a graph would replay is run again."""

    def aside(self):
        return nullcontext()

    def capture(self, *runs):
        for run in runs:
            run()
        return [SimpleNamespace(replay=torch.enable_grad()(run)) for run in runs]
