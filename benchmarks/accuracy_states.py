"""plan_accuracy.py, section `states`: bytes of parameters, gradients and optimizer states in real ranks.

`distft render` writes what a launch would; torchrun then starts the ranks through count_states.py, which lets distft
train as usual and counts before the second optimizer step, when all gradients and states exist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny import write_tiny

# %. Without masters ZeRO-1 and 2 have the whole gradient of the tensor in which a rank's part begins or ends.
BOUND, OF_CUT_TENSORS = 1.0, 5.0
HERE = Path(__file__).parent
KINDS = ("parameters", "gradients", "optimizer")
WIDTHS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp": 2, "hsdp": 4}
# A rank takes half a GiB of host memory: at most four at a time.
TUNINGS = {
    "full": ({"mixed_precision": "bf16"}, None, None),
    "bf16": ({"mixed_precision": "bf16", "master_weights": "none"}, None, None),
    "lora": ({"mixed_precision": "bf16"}, {"r": 64}, None),
    "qlora": ({"mixed_precision": "bf16"}, {"r": 64}, "nf4"),
}


def run(folder: Path, only: str) -> dict[str, Any]:
    recipe = yaml.safe_load(write_tiny(folder, max_steps=2).read_text())
    rows = []
    print(f"{'':26}" + "".join(f"{kind + ' MB':>24}{'':8}" for kind in KINDS))
    for tuning, (training, lora, quantization) in TUNINGS.items():
        for strategy, ranks in WIDTHS.items():
            if only not in f"{tuning} {strategy}":
                continue
            if quantization and strategy == "hsdp":
                continue  # as under fsdp, with more ranks
            wanted = recipe | {"lora": lora, "parallelism": {"strategy": strategy}}
            if strategy == "hsdp":
                wanted["parallelism"]["hsdp_shard_size"] = 2
            wanted["training"] = recipe["training"] | training | {"micro_batch_size": 1}
            wanted["model"] = recipe["model"] | {"quantization": quantization}
            row = {"row": f"{tuning} {strategy} x {ranks}", **compare(folder, wanted, ranks)}
            rows.append(row)
            cells, note = "".join(_cell(row, kind) for kind in KINDS), row.get("why") or _dtypes(row["dtypes"])
            print(f"{row['row']:26}{cells}  {note}", flush=True)
    worst = _worst(rows)
    refused = [row for row in rows if "why" in row]
    print(f"\nworst {worst:.3f}%, {len(rows) - len(refused)} launches, {len(refused)} refused")
    cut = [row for row in rows if row["row"].startswith(("bf16 zero1", "bf16 zero2"))]
    others = [row for row in rows if row not in cut]
    bounds = {
        f"worst < {BOUND}%": _worst(others) < BOUND,
        f"worst of bf16 < {OF_CUT_TENSORS}%": _worst(cut) < OF_CUT_TENSORS,
    }
    return {"worst_percent": worst, "bounds": bounds, "table": rows}


def _worst(rows: list[dict[str, Any]]) -> float:
    return max((abs(row[kind]["error_percent"]) for row in rows if "why" not in row for kind in KINDS), default=0)


def _dtypes(found: dict[str, str]) -> str:
    return ", ".join(f"{what} {dtype}" for what, dtype in sorted(found.items()))


def _cell(row: dict[str, Any], kind: str) -> str:
    if kind not in row:
        return ""
    found = row[kind]
    text = f"{found['predicted'] / 1e6:.3f} / {found['real'] / 1e6:.3f}"
    return f"{text:>24}{found['error_percent']:+7.3f}%"


def compare(folder: Path, wanted: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Kind → predicted, real, and error in percent; `why` where distft refuses the combination."""
    from distft.commands.launch import prepare_data
    from distft.config.loading import load_recipe
    from distft.models.shapes import read_model_shape
    from distft.planner.memory import Estimator
    from distft.planner.setting import Setting

    (folder / "recipe.yaml").write_text(yaml.safe_dump(wanted))
    run_dir = folder / f"run-{len(list(folder.glob('run-*')))}"
    environment = os.environ | {"DISTFT_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), _python_path()]))}
    render = ["render", "recipe.yaml", "--gpus-per-node", str(ranks), "--output", str(run_dir)]
    done = _run(["-m", "distft", *render], folder, environment)
    if done.returncode:
        return {"why": f"refused: {done.stderr.strip().splitlines()[-1]}"}
    os.environ["DISTFT_CACHE"] = environment["DISTFT_CACHE"]
    prepare_data(load_recipe(folder / "recipe.yaml"))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m", "count_states"]
    done = _run([*torchrun, str(run_dir)], folder, environment)
    logs = "\n".join(path.read_text()[-2000:] for path in run_dir.glob("logs/*.log"))
    assert done.returncode == 0, done.stderr + logs
    counted = [json.loads(path.read_text()) for path in sorted(run_dir.glob("states-*.json"))]
    assert len(counted) == ranks, logs
    plan = json.loads((run_dir / "plan.json").read_text())
    recipe = load_recipe(folder / "recipe.yaml")
    setting = Setting(
        strategy=plan["strategy"],
        shard_size=plan["shard_size"],
        world_size=ranks,
        nproc_per_node=ranks,
        micro_batch_size=plan["batch"]["micro_batch_size"],
        device_type="cpu",
    )
    predicted = Estimator(recipe, read_model_shape(recipe)).memory(setting)
    found: dict[str, Any] = {"ran": counted[0]["ran"], "dtypes": counted[0]["dtypes"]}
    for kind in KINDS:
        # Ranks differ by a row of a matrix, or by padding.
        real, estimate = max(rank[kind] for rank in counted), getattr(predicted, kind)
        found[kind] = {"predicted": estimate, "real": real, "error_percent": round(100 * (estimate / real - 1), 3)}
    return found


def _python_path() -> str:
    import distft

    return os.pathsep.join([str(Path(distft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
