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
        """Return logits; in a training step later than necessary, if the environment asks."""
        if self.training:
            time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
        return self.classifier(self.body(images))
