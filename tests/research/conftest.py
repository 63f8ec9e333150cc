"""What training does to its process is undone behind each test."""

import pytest
import torch
from small_runs import write_text


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)  # train() sets it, and hypothesis refuses to draw floats in such a process


@pytest.fixture(autouse=True)
def one_thread():
    """As `make test` has it: with more the kernels stand aside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text for `small_runs.config`, and a cache and one thread of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield write_text(tmp_path_factory.mktemp("text"))
