"""`python -m tests`: the whole suite in three processes, since studies mostly wait for workers while models and simulators compute.

Their output does not mix: that of the second and third is printed when all have ended.  Arguments go to each, such as `-k name`.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
NO_TESTS = 5
"""pytest's exit code where nothing was selected."""
ON_RAY = ("expert_parallel", "jobs", "nothing_lost", "nothing_lost_on_ray", "several_nodes")
"""Of tests/sweeps: those that start, kill and stop Rays."""


def parts() -> list[list[str]]:
    """Paths of each process; every test file is in one of them."""
    rooms = [path for path in HERE.iterdir() if path.name.startswith("test_") or any(path.glob("test_*.py"))]
    sweeps = sorted(f"tests/sweeps/{path.name}" for path in HERE.glob("sweeps/test_*.py"))
    on_ray = [path for path in sweeps if path.removeprefix("tests/sweeps/test_").removesuffix(".py") in ON_RAY]
    light = sorted((f"tests/{path.name}" for path in rooms if path.name not in ("research", "sims", "sweeps")), reverse=True)
    return [["tests/sims", "tests/research"], [*light, *(path for path in sweeps if path not in on_ray)], on_ray]


def main() -> int:
    """Exit code 0 if all parts passed."""
    began, (first, *others) = time.monotonic(), parts()
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    running = []
    try:
        for paths in others:
            output = tempfile.TemporaryFile()  # noqa: SIM115  (it is written to as long as the process runs)
            process = subprocess.Popen([*command, "-p", "no:cacheprovider", *paths], stdout=output, stderr=subprocess.STDOUT)
            running.append((paths, process, output))
        codes = [subprocess.call([*command, *first])]
        for _, process, output in running:
            codes.append(process.wait())
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.buffer.flush()
    finally:
        for _, process, _ in running:
            process.terminate()
            process.wait()
    print(f"{time.monotonic() - began:.0f} s in all; exit codes {codes}")
    return 0 if all(code in (0, NO_TESTS) for code in codes) and any(code == 0 for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main())
