"""`python -m tests`: the whole suite in two processes, since studies mostly wait for workers while models and simulators compute.

Their output does not mix: that of the second is printed when both have ended.  Arguments go to both, such as `-k name`.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
NO_TESTS = 5
"""pytest's exit code where nothing was selected."""


def main() -> int:
    """Exit code 0 if both parts passed."""
    waiting, rest = ["tests/sweeps"], (path for path in HERE.iterdir() if path.name.startswith("test_") or any(path.glob("test_*.py")))
    computing = sorted({f"tests/{path.name}" for path in rest} - {*waiting}, reverse=True)
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
        second = subprocess.Popen([*command, "-p", "no:cacheprovider", *waiting], stdout=output, stderr=subprocess.STDOUT)
        try:
            codes = [subprocess.call([*command, *computing]), second.wait()]
        finally:
            second.terminate()
            second.wait()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    print(f"{time.monotonic() - began:.0f} s in all; {', '.join(computing)}: {codes[0]}; {', '.join(waiting)}: {codes[1]}")
    return 0 if all(code in (0, NO_TESTS) for code in codes) and any(code == 0 for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main())
