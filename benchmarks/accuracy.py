"""What the settings in the README reach: whole runs of the program on MNIST, five seeds each.

    python benchmarks/accuracy.py --data-dir DIR

DIR is as for grpo_mnist.py. Writes results/accuracy.json.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, spread, write_results

SEEDS = range(5)
COMMANDS = {
    "defaults": "python grpo_mnist.py",
    "the exercise's original values": (
        "python grpo_mnist.py --learning-rate 1e-4 --lr-schedule constant --num-iterations 1"
    ),
}


def run(command, seed, data_dir):
    """One run of the program: its metrics by epoch and its summary."""
    with tempfile.TemporaryDirectory() as directory:
        output_dir = Path(directory) / "run"
        flags = [*shlex.split(command)[2:], f"--seed={seed}", f"--output-dir={output_dir}"]
        flags += ["--dataset=mnist", f"--data-dir={data_dir}"]
        program = [sys.executable, str(ROOT / "grpo_mnist.py")]
        began = time.perf_counter()
        subprocess.run([*program, *flags], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began  # imports and compilation included
        history = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
        summary = json.loads((output_dir / "summary.json").read_text())
    return {
        "seed": seed,
        "accuracy": [metrics["accuracy"] for metrics in history],
        "test_accuracy": [metrics["test_accuracy"] for metrics in history],
        "epoch_seconds": statistics.median(metrics["seconds"] for metrics in history),
        "seconds": seconds,
        "params_sha256": summary["params_sha256"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args().data_dir.resolve()
    rows = []
    for name, command in COMMANDS.items():
        runs = [run(command, seed, data_dir) for seed in SEEDS]
        row = {
            "name": name,
            "command": command,
            "first_accuracy": spread([run["accuracy"][0] for run in runs]),
            "accuracy": spread([run["accuracy"][-1] for run in runs]),
            "test_accuracy": spread([run["test_accuracy"][-1] for run in runs]),
            "mean_accuracy": statistics.mean(run["accuracy"][-1] for run in runs),
            "mean_test_accuracy": statistics.mean(run["test_accuracy"][-1] for run in runs),
            "epoch_seconds": spread([run["epoch_seconds"] for run in runs]),
            "seconds": spread([run["seconds"] for run in runs]),
            "runs": runs,
        }
        rows.append(row)
        print(
            f"{name}: accuracy {row['mean_accuracy']:.4f}"
            f" ({row['accuracy']['min']:.4f} to {row['accuracy']['max']:.4f}),"
            f" test {row['mean_test_accuracy']:.4f}, {row['seconds']['median']:.1f} s",
            flush=True,
        )
    write_results("accuracy", {"rows": rows})


if __name__ == "__main__":
    main()
