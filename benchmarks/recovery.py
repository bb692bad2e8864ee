"""Seconds from a fault to the next training step, on a four-node SLURM cluster on this machine (as root).

    python benchmarks/recovery.py [--json]

The faults happen one after the other to two runs of tests/slurm/test_recovery.py, which assert that they end as the
undisturbed run does. SLURM holds a requeued job back for two minutes, from which the tests let it off: the figures are
without them. Where the job goes on by itself, they are the longest pause between two steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent.parent / "tests" / "slurm" / "test_recovery.py"


def measure() -> dict[str, float]:
    """Seconds by fault."""
    return _measure("ranks") | _measure("nodes")  # one after the other: they would share the machine


def _measure(what: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(TESTS), "-k", f"survives and {what}"]
        command += ["-ojunit_family=xunit1", f"--junitxml={report}"]
        done = subprocess.run(command, stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        return {entry.get("name"): float(entry.get("value")) for entry in ElementTree.parse(report).iter("property")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seconds = measure()
    if args.json:
        print(json.dumps(seconds, indent=1))
        return
    for name, value in seconds.items():
        print(f"{name:<60} {value:>6.1f} s")


if __name__ == "__main__":
    main()
