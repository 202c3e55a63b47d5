import pytest
import torch
from hypothesis import settings

settings.register_profile("ironmoe", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ironmoe")
torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
