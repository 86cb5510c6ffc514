"""Whether two versions of the program make the same updates, bit for bit, and how fast each is.

    python benchmarks/same_update.py BEFORE AFTER --data-dir DIR [--repeats 7]

BEFORE and AFTER are two program files. Each trains with the same flags, and the SHA-256 over the
final parameters, all seeds in it, must agree. Prints a line for each case; exit status 1 if one
differs. With --repeats, both run the defaults on MNIST in turns: the ratios AFTER / BEFORE of the
whole run, from start to end of the process, and of the run's median epoch.
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

DEFAULTS = "--dataset mnist"
CASES = {
    "defaults on MNIST": DEFAULTS,
    "defaults on the digits": "--dataset digits",
    "GRPO": "--dataset mnist --num-epochs 2 --num-generations 8 --baseline group"
    " --scale-rewards group",
    "PPO with critic": "--dataset digits --num-epochs 3 --baseline critic",
    "k3, reference refresh, minibatches": "--dataset digits --num-epochs 3 --num-generations 2"
    " --beta 0.05 --kl-estimator k3 --ref-sync-epochs 1 --num-minibatches 4",
    "3 seeds, dynamic sampling": "--dataset digits --num-epochs 3 --num-seeds 3"
    " --num-generations 4 --baseline group --scale-rewards group --dynamic-sampling",
    "RLOO, entropy bonus": "--dataset digits --num-epochs 3 --num-generations 4 --baseline loo"
    " --scale-rewards none --entropy-coef 0.01",
    "moving average": "--dataset digits --num-epochs 3 --baseline ema --lr-schedule constant",
}


def run(program, flags, data_dir):
    """The digest that a run ends with, its seconds, and those of its median epoch."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, str(program), *shlex.split(flags)]
        command += [f"--data-dir={data_dir}", f"--output-dir={run_dir}"]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        digest = json.loads((run_dir / "summary.json").read_text())["params_sha256"]
        epochs = [json.loads(line)["seconds"] for line in (run_dir / "metrics.jsonl").open()]
        return digest, seconds, statistics.median(epochs)


def compare_times(programs, data_dir, repeats):
    """Prints the medians and ranges of the ratios; a first pair is not counted."""
    ratios = {"whole run": [], "epoch": []}
    for _ in range(repeats + 1):
        before, after = (run(program, DEFAULTS, data_dir)[1:] for program in programs)
        for name, one, other in zip(ratios, after, before, strict=True):
            ratios[name].append(one / other)
    for name, (_, *counted) in ratios.items():
        spread = f"{min(counted):.3f} to {max(counted):.3f}, n = {repeats}"
        print(f"{name}: after / before {statistics.median(counted):.3f} ({spread})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, nargs=2, metavar="PROGRAM")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=0)
    options = parser.parse_args()
    data_dir, all_equal = options.data_dir.resolve(), True
    for name, flags in CASES.items():
        before, after = (run(program, flags, data_dir)[0] for program in options.programs)
        all_equal = all_equal and before == after
        verdict = "the same" if before == after else "DIFFERENT"
        print(f"{name}: {verdict}: {before[:16]} {after[:16]}", flush=True)
    if options.repeats:
        compare_times(options.programs, data_dir, options.repeats)
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
