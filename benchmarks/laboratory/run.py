"""The CUDA path, what it compiles and runs, seen on a machine without a GPU: ``make gpu-dry``.

Each case is a process of its own, which believes in a GPU and has tensors without contents on it. Prints one table, and
exits with 1 where a count is higher than in the committed one. Needs torch's CUDA build and a C compiler.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from cases import CASES
from comparison import table, worse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "laboratory.json"
ARCHITECTURES = (80, 90, 100)
CASE_SECONDS, BUILD_SECONDS = 420, 900


def build_libraries(folder: Path) -> dict[str, str]:
    """Compile the two libraries that pretend; gives the environment in which a process finds them."""
    outputs = {"device_count.c": folder / "device_count.so", "libcuda.c": folder / "libcuda.so.1"}
    for source, output in outputs.items():
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", HERE / source, "-o", output]
        subprocess.run(command, check=True)
    count = str(outputs["device_count.c"])
    return {
        "LD_PRELOAD": count,
        "LABORATORY_DEVICE_COUNT": count,
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OMP_NUM_THREADS": "1",
    }


def look_at(case: str, project: Path, folder: Path, environment: dict[str, str], build: bool) -> dict:
    """Read what a case's process found; ``failed`` where it did not live to say it."""
    codes = folder / case.replace(" ", "_")
    codes.mkdir()
    # a home of its own for what Inductor writes: nothing is found there that was not made now
    environment = environment | {"TORCHINDUCTOR_CACHE_DIR": str(codes / "cache")}
    arguments = ["--project", project, "--case", case, "--codes", codes]
    found = started([HERE / "case.py", *arguments], environment, CASE_SECONDS)
    files = sorted(codes.glob("*ward_*.py"))
    if build and files:
        found["built"] = {}
        for architecture in ARCHITECTURES:
            seen = started([HERE / "kernels.py", architecture, *files], {}, BUILD_SECONDS)
            if "failed" in seen and "built" not in seen:
                seen = {"built": 0, "failed": {"all": seen["failed"]}}
            found["built"][str(architecture)] = seen
    return found


def started(command: list[object], environment: dict[str, str], seconds: int) -> dict:
    """The JSON object that a program of this folder prints last, or ``failed`` with its last words."""
    words = [sys.executable, *map(str, command)]
    try:
        done = subprocess.run(
            words,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds} s"}
    if os.environ.get("LABORATORY_VERBOSE"):
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"failed": f"exit status {done.returncode}: {last[:160]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Look at all cases; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="checkout whose code is looked at (this one)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what to compare with, or to write")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--build", action="store_true", help="build the Triton kernels with ptxas too (slow)")
    parser.add_argument("--write", action="store_true", help="write the results anew instead of comparing")
    args = parser.parse_args()
    before = json.loads(args.results.read_text()) if args.results.exists() else {"cases": {}}
    versions = {name: version(name) for name in ("torch", "triton")}
    cases = {}
    with tempfile.TemporaryDirectory() as name:
        environment = build_libraries(Path(name))
        for case in args.cases:
            cases[case] = look_at(case, args.project.resolve(), Path(name), environment, args.build)
            print(f"{case}: {cases[case].get('seconds', 'no')} s", file=sys.stderr, flush=True)
            if args.write:
                result = {"versions": versions, "cases": before["cases"] | cases}
                args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cases))
    if args.write:
        return 0
    if before.get("versions", versions) != versions:
        print(f"compared with what was found with {before['versions']}; this is {versions}")
    lines = worse(before["cases"], cases)
    print("\n".join(lines) if lines else f"nothing is worse than in {args.results.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
