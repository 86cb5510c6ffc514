"""How many small mistakes in the program the tests notice: mutants, by cosmic-ray's operators.

    pip install -r benchmarks/requirements.txt
    python benchmarks/mutation.py --data-dir DIR [--suite CHECKOUT --name before]

A mutant is the program with one operator, number, or condition changed. A sample by a fixed seed,
one mutant at most at a place, is run against the tests of CHECKOUT, by default this one, until a
test fails or they take longer than LIMIT. Tests that compare the text of the program with that of
the tutorial, or change a text in it, do not count. Writes results/mutation.json after each mutant,
and goes on where it was stopped. What it says there of survivors ("why") is written by hand.
"""

import argparse
import ast
import contextlib
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

from common import ROOT, results_to_continue, write_results
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

PROGRAM = "grpo_mnist.py"
SIZES = {"algorithm": 130, "checkpoints and data": 110}  # mutants
STARTS = {"Policy": "algorithm", "Config": None, "Data": "checkpoints and data", "Reports": None}
LIMIT = 900  # seconds
# Operators that hardly do more than raise a TypeError, or that fail at dotted exceptions.
USELESS = ("Bit", "Shift", "Is", "Pow", "Decorator", "Exception")
NOT_COUNTED = "safeguard or snippets or messages or promises or links or report or clean"


def parts_by_line(source):
    """To which of SIZES a line belongs, or None, by the headings of the file."""
    part, parts = None, {}
    for number, line in enumerate(source.splitlines(), start=1):
        if line.startswith("# --- "):
            part = STARTS.get(line.split()[2].rstrip(":"), part)
        parts[number] = part
    return parts


def annotations(source):
    """The places, as (line, column), of annotations, which no run looks at."""
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if annotation := getattr(node, name, None):
                columns = range(annotation.col_offset, annotation.end_col_offset)
                yield from ((annotation.lineno, column) for column in columns)


def sample(source):
    """Yields the mutants of a fixed seed: where they are and what they change, and their source."""
    tree, parts, skipped = get_ast(source), parts_by_line(source), set(annotations(source))
    by_place = {}
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or any(word in name for word in USELESS):
            continue
        nodes = ast_nodes(tree)
        places = (start for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, place in enumerate(places):
            if parts[place[0]] and place not in skipped:
                by_place.setdefault(place, []).append((name, occurrence))
    chance = random.Random(0)
    for part, size in SIZES.items():
        places = sorted(place for place in by_place if parts[place[0]] == part)
        chance.shuffle(places)
        for line, column in places:
            name, occurrence = chance.choice(by_place[line, column])
            mutated = mutate_code(source, get_operator(name)(), occurrence)
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
    with tempfile.TemporaryDirectory() as directory:
        project, shared = Path(directory, "project"), Path(directory, "shared", "mnist")
        shutil.copytree(suite, project, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        shutil.copytree(data_dir / "downloads" / "manual", shared)  # A mutant may spoil it.
        (project / PROGRAM).write_text(mutated)
        command = [sys.executable, "-m", "pytest", "-xq", "-n0", "--tb=no"]
        command += ["-k", f"not ({NOT_COUNTED})"]
        process = subprocess.Popen(
            command,
            cwd=project,
            env=os.environ | {"HOME": directory, "TMPDIR": directory},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return None
    noticed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    return noticed[1] if noticed else "import"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--suite", type=Path, default=ROOT)
    parser.add_argument("--name", default="after")
    options = parser.parse_args()
    there = results_to_continue("mutation").get("mutants", ())
    kept = {(row["line"], row["column"]): row for row in there}
    rows, waiting = [], {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for row, mutated in sample((ROOT / PROGRAM).read_text()):
            rows.append(kept.get((row["line"], row["column"]), row))
            if options.name not in rows[-1]["noticed_by"]:
                job = pool.submit(try_out, mutated, options.suite.resolve(), options.data_dir)
                waiting[job] = rows[-1]
        for job in as_completed(waiting):
            waiting[job]["noticed_by"][options.name] = job.result()
            print(waiting[job]["after"], "->", job.result(), flush=True)
            write_results("mutation", {"mutants": rows})


if __name__ == "__main__":
    main()
