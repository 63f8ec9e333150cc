"""Compiles the kernels (`*.c` beside this file) once per machine and loads it; says when it may be used.

The library needs a C compiler (`$CC`, cc, gcc or clang) and the BLAS routine that torch carries.  Where one of them
is missing, or MOELAB_KERNELS=off, `library()` is None and the model runs in plain PyTorch, to other roundings.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from research.folders import cache_directory

SOURCES = [Path(__file__).with_name(name) for name in ("products.c", "kernels.c", "attention.c", "decoding.c")]
HEADER = Path(__file__).with_name("kernels.h")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-shared", "-fPIC")
SIGNATURES = {
    "set_sgemm": "p",
    "repeat_product": "cciiipipipii",
    "few_rows_product": "pppiii",
    "rms_norm": "pipfppii",
    "rms_norm_backward": "pppippppii",
    "swiglu": "pppi",
    "swiglu_backward": "pppppi",
    "exponentials": "piipp",
    "choose_experts": "ppiiiiipp",
    "sort_by_expert": "ppppii",
    "experts_forward": "pppppppppiiiii",
    "experts_backward": "pppppppppppppiiiii",
    "attention_forward": "ppppppppp",
    "attention_backward": "ppppppppppppppp",
    "latent_decode": "ppipiipiipppppfiiiiiiiii",
    "decode_blocks": "pipp",
}
"""Arguments: p(ointer), i(nt64), f(loat), c(har)."""
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "c": ctypes.c_char}
log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None; why not is logged once."""
    if os.environ.get("MOELAB_KERNELS", "on") == "off":
        return None
    compiler = os.environ.get("CC") or next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        log.warning("no C compiler found: the model runs in plain PyTorch, more slowly")
        return None
    try:
        return _load(_compiled(compiler))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("the kernels cannot be used (%s): the model runs in plain PyTorch, more slowly", error)
        return None


def loaded() -> ctypes.CDLL:
    """The kernels where `usable` has said yes."""
    found = library()
    assert found is not None
    return found


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors may go to the kernels: float32 on a CPU, one thread, no autocast and no tracing."""
    # The cheap questions first: this is asked thousands of times a second.
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
            return False
    return torch.get_num_threads() == 1 and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and library() is not None


def _compiled(compiler: str) -> Path:
    """The shared object for this source, compiler and processor, made if it is not there; safe when several processes ask at once."""
    macros = subprocess.run(  # what -march=native means here: a cache may be shared by machines that differ
        [compiler, "-march=native", "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, check=True, timeout=60
    ).stdout
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, HEADER)) + macros + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = cache_directory() / "kernels"
    target = folder / f"{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "kernels.so"
            subprocess.run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"], capture_output=True, check=True, timeout=300)
            made.rename(target)
    return target


def blas() -> Any:
    """torch's own matrix product, column-major as in Fortran.  AttributeError or OSError where there is none."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).sgemm_


def _load(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        getattr(kernels, name).argtypes = [TYPES[letter] for letter in arguments]
        getattr(kernels, name).restype = ctypes.c_int64 if name == "sort_by_expert" else None
    kernels.set_sgemm(ctypes.cast(blas(), ctypes.c_void_p))
    return kernels
