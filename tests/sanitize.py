"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, on a build made for it.

    python -m tests.sanitize            # builds in a temporary folder, takes a few minutes

Copies the sources, compiles the kernels with both sanitizers and runs every test of the kernels against that build.
Any finding ends the run with the sanitizer's report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = tuple(
    f"tests/unit/test_{name}.py"
    for name in (
        "kernels_matmul",
        "native_decoder",
        "native_draws",
        "native_filters",
        "native_heads",
        "native_threads",
        "draft_model",
        "heads",
    )
)
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-w")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build(folder: Path) -> None:
    """Compile the copied sources into the place where the package looks for its kernels."""
    sources = sorted((folder / "shared/kernels/cpu").glob("*.cpp"))

    def compile_one(source: Path) -> str:
        target = str(source.with_suffix(".o"))
        subprocess.run(["g++", *FLAGS, *SANITIZERS, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    out = folder / "shared/kernels" / f"_cpu{EXTENSION_SUFFIXES[0]}"
    subprocess.run(["g++", "-shared", "-pthread", *SANITIZERS, *objects, "-o", str(out)], check=True)


def run_tests(folder: Path, arguments: list[str]) -> int:
    """pytest's exit status; Python itself is not instrumented, so its allocations at exit are no leaks of ours."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1200", *TESTS, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slipstream-sanitize-") as name:
        folder = Path(name)
        for part in ("shared", "services", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        build(folder)
        return run_tests(folder, options.pytest)


if __name__ == "__main__":
    sys.exit(main())
