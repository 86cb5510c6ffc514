"""Whether two versions of the program make the same updates, bit for bit.

    python benchmarks/same_update.py BEFORE AFTER --data-dir DIR

BEFORE and AFTER are two program files. Each trains with the same flags, and the SHA-256 over the
final parameters, all seeds in it, must agree. Prints a line for each case; exit status 1 if one
differs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {
    "defaults on MNIST": "--dataset mnist",
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


def params_sha256(program, flags, data_dir):
    """The digest that a run of a program ends with."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, str(program), *shlex.split(flags)]
        command += [f"--data-dir={data_dir}", f"--output-dir={run_dir}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((run_dir / "summary.json").read_text())["params_sha256"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    all_equal = True
    for name, flags in CASES.items():
        before, after = (
            params_sha256(program, flags, options.data_dir.resolve())
            for program in (options.before, options.after)
        )
        all_equal = all_equal and before == after
        verdict = "the same" if before == after else "DIFFERENT"
        print(f"{name}: {verdict}: {before[:16]} {after[:16]}", flush=True)
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
