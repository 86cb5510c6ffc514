"""Whether two versions of the program make the same updates, bit for bit.

    python benchmarks/same_update.py BEFORE AFTER --data-dir DIR

BEFORE and AFTER are program files. Each trains with the same flags, and the SHA-256 over the final
parameters must agree; exit status 1 if one differs.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

GROUPS = "--num-generations 4 --baseline group --scale-rewards group"
CASES = (
    "--dataset mnist",
    f"--dataset mnist --num-epochs 2 {GROUPS}",
    "--dataset digits --num-epochs 3 --baseline critic --entropy-coef 0.01",
    "--dataset digits --num-epochs 3 --baseline ema --lr-schedule constant --num-minibatches 4",
    "--dataset digits --num-epochs 3 --beta 0.05 --kl-estimator k3 --ref-sync-epochs 1",
    f"--dataset digits --num-epochs 3 --num-seeds 3 --dynamic-sampling {GROUPS}",
)


def params_sha256(program, flags, data_dir):
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, program, *shlex.split(flags), f"--output-dir={run_dir}"]
        subprocess.check_output([*command, f"--data-dir={data_dir}"])
        return json.loads(Path(run_dir, "summary.json").read_text())["params_sha256"]


def main(before: tyro.conf.Positional[Path], after: tyro.conf.Positional[Path], data_dir: Path):
    different = 0
    for flags in CASES:
        digests = [params_sha256(program, flags, data_dir)[:8] for program in (before, after)]
        print(f"{flags}: {' and '.join(sorted(set(digests)))}", flush=True)
        different += len(set(digests)) > 1
    sys.exit(different > 0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
