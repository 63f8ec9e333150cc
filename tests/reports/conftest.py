"""Stores with planted truth (see `planted`), and one report that several tests read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import planted

from reports.build import build


@pytest.fixture(scope="session")
def write_store():
    """write_store(root, effects={variant: bits per byte}, noise=..., seeds=..., states={(variant, seed): state}, ...)."""
    return planted.write_store


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A complete study with a better, a worse and an unshown variant, five seeds, and its report."""
    root = planted.write_store(
        tmp_path_factory.mktemp("whole") / "study", {"kv_lora_rank=16": 0.2, "device_limit=2": -0.1}, seeds=range(5), records=60
    )
    return build(root)
