"""When the compiled kernels are used, and that nothing else needs them: these tests run without a compiler too."""

import math
import os
import subprocess
import sys

import pytest

from research.model.attention import expansion_pays
from research.presets import preset


@pytest.mark.parametrize("how", [{"MOELAB_KERNELS": "off"}, {"CC": "/no/such/compiler"}, {"PATH": "/nowhere"}])
def test_without_a_compiler_the_plain_forms_run(how, tmp_path):
    code = "from research.model.kernels import native; import torch; print(native.library() is None, native.usable(torch.ones(2)))"
    environment = {**os.environ, "MOELAB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **how}
    environment |= {} if "CC" in how else {"CC": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    assert ("plain PyTorch" in done.stderr) == ("MOELAB_KERNELS" not in how)


@pytest.mark.parametrize(("given", "threads"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_the_commands_take_one_thread_unless_told_otherwise(given, threads):
    code = "import research.__main__ as door; door.app = lambda: print(__import__('torch').get_num_threads()); door.main()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split() == [threads]


def test_the_switch_between_the_forms_lies_where_the_multiplications_say():
    """m S (2 C + R) H of the absorbed form against S (N + V) C H + m S (N + R + V) H of the expanded one."""
    for name in ("deepseek-v2", "deepseek-v2-lite"):
        a = preset(name).attention
        assert 170 < expansion_pays(a) < 171
    for name in ("deepseek-v2-micro", "deepseek-v2-mini", "deepseek-v2-small"):
        assert expansion_pays(preset(name).attention) == math.inf
    a = preset("deepseek-v2-nano").attention

    def multiplications(m, absorbed):
        c, n, r, v = a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim
        return m * (2 * c + r) if absorbed else (n + v) * c + m * (n + r + v)

    switch = expansion_pays(a)
    assert multiplications(math.floor(switch) - 1, True) < multiplications(math.floor(switch) - 1, False)
    assert multiplications(math.ceil(switch) + 1, True) > multiplications(math.ceil(switch) + 1, False)
