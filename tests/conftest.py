"""Settings for the whole run: one thread (the tensors are tiny) and repeatable Hypothesis."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from resnet20.data import Data

torch.set_num_threads(1)

settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# In continuous integration a failure must mean the change, not the draw.
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
# For a search by hand: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", parent=settings.get_profile("local"), max_examples=5000)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def digits() -> Data:
    """A few images for runs of the example."""
    from resnet20 import data  # which only tests of the example need

    everything = data.load(None, limit=48)
    few = everything.held_out.part(0, 40)
    return data.Data(everything.name, everything.train, few, "test", False)
