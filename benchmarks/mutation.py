"""How many small mistakes in the program the tests notice: mutants, by cosmic-ray's operators.

    pip install -r benchmarks/requirements.txt
    python benchmarks/mutation.py --data-dir DIR [--suite CHECKOUT --name before]

A mutant is the program with one operator, number, or condition changed. A sample by a fixed seed,
one mutant at most at a place, is run against the tests of CHECKOUT, by default this one, until a
test fails or they take longer than LIMIT. Tests that compare the text of the program with that of
the tutorial, or change a text in it, do not count. Writes results/mutation.json after each mutant,
and goes on where it was stopped. What it says there of survivors ("why") is written by hand.
"""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import tyro
from common import ROOT, results_to_continue, write_results
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

PROGRAM = "grpo_mnist.py"
PARTS = {  # the headings of the program before and after it, mutants
    "algorithm": ("# --- Policy", "# --- Config", 130),
    "checkpoints and data": ("# --- Data", "# --- Reports", 110),
}
LIMIT = 900  # seconds
# Operators that hardly do more than raise a TypeError, or that fail at dotted exceptions.
USELESS = ("Bit", "Shift", "Is", "Pow", "Decorator", "Exception")
NOT_COUNTED = "safeguard or snippets or messages or promises or links or report or clean"


def sample(source):
    """Yields the mutants of a fixed seed: where they are and what they change, and their source."""
    tree, by_place, chance = get_ast(source), {}, random.Random(0)
    for operator in map(get_operator, operator_names()):
        if operator.arguments() or any(word in operator.__name__ for word in USELESS):
            continue
        positions = (operator().mutation_positions(node) for node in ast_nodes(tree))
        for occurrence, (place, _) in enumerate(itertools.chain.from_iterable(positions)):
            by_place.setdefault(place, []).append((operator(), occurrence))
    for part, (*headings, size) in PARTS.items():
        first, last = (source[: source.index(heading)].count("\n") for heading in headings)
        places = sorted(place for place in by_place if first < place[0] <= last)
        chance.shuffle(places)
        for line, column in places:
            mutated = mutate_code(source, *chance.choice(by_place[line, column]))
            with contextlib.suppress(SyntaxError):
                compile(mutated, PROGRAM, "exec")
                before, after = (text.splitlines()[line - 1].strip() for text in (source, mutated))
                where = {"part": part, "line": line, "column": column}
                yield where | {"before": before, "after": after, "noticed_by": {}}, mutated
                size -= 1
            if size == 0:
                break


def try_out(mutated, suite, data_dir):
    """The test that notices a mutant, "time" if it takes too long, or None if it survives."""
    command = [sys.executable, "-m", "pytest", "-xq", "-n0", "--tb=no", f"-k not ({NOT_COUNTED})"]
    with tempfile.TemporaryDirectory() as directory:
        project, shared = Path(directory, "project"), Path(directory, "shared", "mnist")
        shutil.copytree(suite, project, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        shutil.copytree(data_dir / "downloads" / "manual", shared)  # A mutant may spoil it.
        (project / PROGRAM).write_text(mutated)
        private = os.environ | {"HOME": directory, "TMPDIR": directory}
        options = {"cwd": project, "env": private, "start_new_session": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **options)
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "time"
        finally:  # also for what the tests have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    noticed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    return None if process.returncode == 0 else noticed[1] if noticed else "import"


def main(data_dir: Path, suite: Path = ROOT, name: str = "after"):
    there = results_to_continue("mutation").get("mutants", ())
    kept = {(row["line"], row["column"]): row for row in there}
    rows, waiting = [], {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row, mutated in sample((ROOT / PROGRAM).read_text()):
            rows.append(kept.get((row["line"], row["column"]), row))
            if name not in rows[-1]["noticed_by"]:
                waiting[pool.submit(try_out, mutated, suite, data_dir)] = rows[-1]
        for job in as_completed(waiting):
            waiting[job]["noticed_by"][name] = job.result()
            print(waiting[job]["after"], "->", job.result(), flush=True)
            write_results("mutation", {"mutants": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
