"""What training does to its process is undone behind each test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)  # train() sets it, and hypothesis refuses to draw floats in such a process
