"""Measures anew what benchmarks/results holds: any of it, or all.

    python benchmarks/run.py                                   lists what there is to measure
    python benchmarks/run.py NAME... --data-dir DIR [--anew]   measures that; all for all of it

DIR is as for grpo_mnist.py. Each measurement is a process of its own; after a failure the others go
on. An interrupted one goes on where it was, unless --anew is given. In the end, the pictures and
the tables are made of the results.
"""

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {  # by duration: command, minutes on two cores (about), question
    "one_update": ("one_update.py --write --data-dir DIR", 1, "What does an update compute?"),
    "accuracy": ("train.py accuracy --data-dir DIR --anew", 3, "What do the defaults reach?"),
    "grown": ("train.py grown --data-dir DIR --anew", 5, "What does each part of GRPO bring?"),
    "devices": ("devices.py --data-dir DIR", 6, "Do several devices give the same run?"),
    "growth": ("speed.py growth --data-dir DIR --anew", 12, "How does the time grow with size?"),
    "speed": ("speed.py speed --data-dir DIR --anew", 15, "How fast is it beside PyTorch?"),
    "published": ("train.py published --data-dir DIR --anew", 20, "Does a study repeat?"),
    "breaking": ("train.py breaking --data-dir DIR --anew", 25, "What do single flags break?"),
    "comparison": ("train.py comparison --data-dir DIR --anew", 40, "How do algorithms compare?"),
    "faults": ("faults.py --anew", 45, "Does a run survive kills and a failing disk?"),
    "mutation": ("mutation.py --data-dir DIR", 90, "Do the tests notice mistakes?"),
    "tuning": ("train.py tuning --data-dir DIR --anew", 300, "Which settings are the best?"),
}
AFTERWARDS = ("draw.py --data-dir DIR", "report.py")


def run(command, options):
    """The exit status of a script of this directory; DIR and --anew depend on the options."""
    words = [word for word in command.split() if word != "--anew" or options.anew]
    script, *flags = [str(options.data_dir) if word == "DIR" else word for word in words]
    program = [sys.executable, str(Path(__file__).with_name(script))]
    return subprocess.run([*program, *flags]).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve())
    parser.add_argument("--anew", action="store_true", help="keep nothing of what is there")
    options = parser.parse_args()
    if unknown := set(options.names) - {*BENCHMARKS, "all"}:
        parser.error(f"no such names: {', '.join(sorted(unknown))}")
    if not options.names:
        for name, (_, minutes, question) in BENCHMARKS.items():
            print(f"{name:10} {minutes:4} minutes  {question}")
        return
    if options.data_dir is None:
        parser.error("--data-dir is missing")
    names = [name for name in BENCHMARKS if {name, "all"} & set(options.names)]
    minutes = sum(BENCHMARKS[name][1] for name in names)
    print(f"Measuring {', '.join(names)}: about {minutes} minutes on two cores", flush=True)
    commands = [*(BENCHMARKS[name][0] for name in names), *AFTERWARDS]
    failed = [command for command in commands if run(command, options)]
    sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
