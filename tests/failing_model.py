"""Models that fail on purpose; tests copy this file beside their experiment."""

import atexit
import os
import signal
import sys
from pathlib import Path

import torch


class Failing(torch.nn.Module):
    """A linear model that misbehaves on one rank from some forward pass of training on."""

    def __init__(self, fault, rank, after=3, classes=10):
        super().__init__()
        self.body = torch.nn.Flatten()
        self.classifier = torch.nn.Linear(64, classes)
        self.fault, self.after = fault, after
        # Of Open MPI's mpirun, or of MPICH's.
        here = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK", "0")
        self.here = int(here) == rank
        self.calls = 0
        if self.here and fault == "build":
            raise ValueError("this model cannot be built on purpose")
        if self.here and fault == "end":
            atexit.register(os.kill, os.getpid(), signal.SIGKILL)

    def forward(self, images):
        """Return logits, or fail."""
        logits = self.classifier(self.body(images))
        self.calls += self.training
        if self.training and self.here and self.calls > self.after:
            Path("fault").touch()
            if self.fault == "raise":
                raise ValueError("this model fails on purpose")
            if self.fault == "sys.exit":
                sys.exit(0)
            if self.fault == "os._exit":
                os._exit(0)
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "stop":
                self.fault = "none"  # should somebody let it go on
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.fault == "nan":
                return logits * float("nan")
        return logits
