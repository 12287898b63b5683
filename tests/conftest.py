"""Settings for the whole run: one thread (the tensors are tiny) and repeatable Hypothesis."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# In continuous integration a failure must mean the change, not the draw.
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
# For a search by hand: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", parent=settings.get_profile("local"), max_examples=5000)
settings.load_profile("ci" if os.environ.get("CI") else "local")
