"""Measures anew what benchmarks/results holds: any of it, or all.

    python benchmarks/run.py                                   lists what there is to measure
    python benchmarks/run.py NAME... --data-dir DIR [--anew]   measures that; all for all of it

DIR is as for grpo_mnist.py. Each measurement is a process of its own; after a failure the others go
on. An interrupted one goes on where it was, unless --anew is given. In the end, the pictures and
the tables are made of the results.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

BENCHMARKS = {  # by duration: command, minutes on two cores (about), question
    "one_update": ("one_update.py --write", 1, "What does an update compute?"),
    "accuracy": ("train.py accuracy --data-dir DIR --anew", 3, "What do the defaults reach?"),
    "devices": ("devices.py --data-dir DIR", 6, "Do several devices give the same run?"),
    "grown": ("train.py grown --data-dir DIR --anew", 8, "What does each part of GRPO bring?"),
    "growth": ("speed.py growth --data-dir DIR --anew", 12, "How does the time grow with size?"),
    "speed": ("speed.py speed --data-dir DIR --anew", 15, "How fast is it beside PyTorch?"),
    "published": ("train.py published --data-dir DIR --anew", 20, "Does a study repeat?"),
    "breaking": ("train.py breaking --data-dir DIR --anew", 30, "What do single flags break?"),
    "comparison": ("train.py comparison --data-dir DIR --anew", 40, "How do algorithms compare?"),
    "faults": ("faults.py --anew", 45, "Does a run survive kills and a failing disk?"),
    "mutation": ("mutation.py --data-dir DIR", 90, "Do the tests notice mistakes?"),
    "tuning": ("train.py tuning --data-dir DIR --anew", 400, "Which settings are the best?"),
}
AFTERWARDS = ("draw.py", "report.py")


def main(
    names: tyro.conf.Positional[tuple[Literal[*BENCHMARKS, "all"], ...]] = (),
    data_dir: str = "~/tensorflow_datasets",
    anew: bool = False,
):
    if not names:
        for name, (_, minutes, question) in BENCHMARKS.items():
            print(f"{name:10} {minutes:4} minutes  {question}")
        return
    chosen = [BENCHMARKS[name] for name in BENCHMARKS if {name, "all"} & {*names}]
    print(f"About {sum(minutes for _, minutes, _ in chosen)} minutes on two cores", flush=True)
    failed = []
    for command in (*(command for command, *_ in chosen), *AFTERWARDS):
        given = {"DIR": [os.path.expanduser(data_dir)], "--anew": ["--anew"] * anew}
        script, *flags = (part for word in command.split() for part in given.get(word, [word]))
        if subprocess.run([sys.executable, Path(__file__).with_name(script), *flags]).returncode:
            failed.append(command)
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
