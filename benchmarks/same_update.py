"""Whether two versions of the program make the same updates, bit for bit, and how fast each is.

    python benchmarks/same_update.py BEFORE AFTER --data-dir DIR [--repeats 7]

BEFORE and AFTER are program files. Each trains with the same flags, and the SHA-256 over the final
parameters must agree; exit status 1 if one differs. With --repeats, both run the defaults on MNIST
in turns: the ratio AFTER / BEFORE of the whole run, median and range.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import spread

GROUPS = "--num-generations 4 --baseline group --scale-rewards group"
CASES = (
    "--dataset mnist",
    f"--dataset mnist --num-epochs 2 {GROUPS}",
    "--dataset digits --num-epochs 3 --baseline critic --entropy-coef 0.01",
    "--dataset digits --num-epochs 3 --baseline ema --lr-schedule constant --num-minibatches 4",
    "--dataset digits --num-epochs 3 --beta 0.05 --kl-estimator k3 --ref-sync-epochs 1",
    f"--dataset digits --num-epochs 3 --num-seeds 3 --dynamic-sampling {GROUPS}",
)


def run(program, flags, data_dir):
    """The digest that a run ends with, and the seconds of its process."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, str(program), *shlex.split(flags), f"--output-dir={run_dir}"]
        began = time.perf_counter()
        subprocess.run([*command, f"--data-dir={data_dir}"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        return json.loads(Path(run_dir, "summary.json").read_text())["params_sha256"], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, nargs=2, metavar="PROGRAM")
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--repeats", type=int, default=0)
    options = parser.parse_args()
    different = 0
    for flags in CASES:
        before, after = (run(program, flags, options.data_dir)[0] for program in options.programs)
        different += before != after
        verdict = "the same" if before == after else f"DIFFERENT: {before[:8]} {after[:8]}"
        print(f"{flags}: {verdict}", flush=True)
    ratios = []
    for _ in range(options.repeats):
        before, after = (run(each, CASES[0], options.data_dir)[1] for each in options.programs)
        ratios.append(after / before)
    if ratios:
        print("whole run, after / before:", spread(ratios))
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
