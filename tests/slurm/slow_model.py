"""A model that takes its time, but in the run that others are compared with; copied by tests."""

import os
import time

import torch


class Slow(torch.nn.Module):
    """A linear model for the digits."""

    def __init__(self, classes=10):
        super().__init__()
        self.body = torch.nn.Flatten()
        self.classifier = torch.nn.Linear(64, classes)

    def forward(self, images):
        """Return logits, later than necessary in a training step under Slurm."""
        if self.training and "SLURM_JOB_ID" in os.environ:
            time.sleep(0.02)
        return self.classifier(self.body(images))
