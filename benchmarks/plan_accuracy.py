"""How accurate the memory planner is.

    python benchmarks/plan_accuracy.py [formula] [states] [measured] [published] [peers] [--json FILE] [--only WORD]

formula    the formula's peak against the simulation's (the real classes on fake tensors); bounds: 5% in the mean,
           10% at worst
states     parameters, gradients and optimizer states of real ranks over gloo, in bytes; bound: 1%
measured   steps of another script, on a T4, simulated; bounds: 0.5% in the mean, 1% at worst
published  peaks that others measured on GPUs, and why some differ
peers      the same rows by other estimators

Exit status 1: a bound is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import accuracy_formula
import accuracy_measured
import accuracy_peers
import accuracy_published
import accuracy_states

SECTIONS = {
    "formula": accuracy_formula.run,
    "states": accuracy_states.run,
    "measured": accuracy_measured.run,
    "published": accuracy_published.run,
    "peers": accuracy_peers.run,
}
PACKAGES = ("distft", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with this word in their name")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": versions()}
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sections or SECTIONS:
            began = time.perf_counter()
            print(f"\n== {name}\n", flush=True)
            found[name] = SECTIONS[name](Path(folder), options.only)
            found[name]["seconds"] = round(time.perf_counter() - began)
            print(f"\n{found[name]['seconds']} s", flush=True)
            missed += [f"{name}: {bound}" for bound, ok in found[name].get("bounds", {}).items() if not ok]
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    for line in missed:
        print(f"MISSED {line}")
    sys.exit(bool(missed))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package == "distft":  # run from its source
                import distft

                found[package] = distft.__version__
    return found


if __name__ == "__main__":
    main()
