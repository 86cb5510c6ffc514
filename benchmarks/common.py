"""What the benchmarks share: facts about the machine, results, statistics, and epochs in turns."""

import ast
import datetime
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import grpo_mnist  # noqa: E402


def describe_machine():
    """What a reader needs to know to compare figures with their own."""
    cpuinfo = Path("/proc/cpuinfo")  # where there is one
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    libraries = ("jax", "flax", "optax", "tfp-nightly", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": named[1] if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {x: version(x) for x in libraries},
        "program_sha256": program_sha256((ROOT / "grpo_mnist.py").read_text(encoding="utf-8")),
    }


def program_sha256(source_text):
    """A digest of a program that changes with its code, not with its comments or docstrings."""
    return hashlib.sha256(json.dumps(syntax(ast.parse(source_text))).encode()).hexdigest()


def syntax(node):
    """A syntax tree as lists, the same in every Python, without docstrings and what is empty."""
    if isinstance(node, list):
        return [syntax(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    if has_docstring and ast.get_docstring(node, clean=False) is not None:
        del node.body[0]
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return [type(node).__name__, *((name, syntax(value)) for name, value in fields)]


def write_results(name, results):
    """Writes results/NAME.json: facts about this measurement, then the figures, to six digits."""
    facts = describe_machine() | {"command": f"python benchmarks/run.py {name} --data-dir DIR"}
    figures = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    text = json.dumps(facts | figures | facts, indent=1)  # not the facts of what is continued
    text = re.sub(r"[\[{][^][{}]*[]}]", lambda inner: re.sub(r"\n *", " ", inner[0]), text) + "\n"
    grpo_mnist.write_file(RESULTS / f"{name}.json", text.encode())
    print(f"written: results/{name}.json", flush=True)


def read_results(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(name):
    """The rows of a result by their names."""
    return {row["name"]: row for row in read_results(name)["rows"]}


def results_to_continue(name, anew=False):
    """The results that are there, if they are of this program and this machine; else none."""
    if anew or not (RESULTS / f"{name}.json").exists():
        return {}
    there, facts = read_results(name), describe_machine()
    same = all(there.get(fact) == facts[fact] for fact in facts if fact != "date")
    return there if same else {}


def over_seeds(by_seed):
    """The mean over the seeds, with its 95% interval by Student's t."""
    figures = grpo_mnist.over_seeds({"accuracy": by_seed})
    return {"mean": figures["accuracy"], "interval_95": figures["interval_95"]["accuracy"]}


def camps(by_seed):
    """Whether the seeds fall into camps, more than 0.05 apart, so that a mean describes none."""
    return bool((np.diff(np.sort(by_seed)) > 0.05).any())


def widen(width):
    """Gives the networks that are made from now on hidden layers of another width."""

    def __init__(self, in_features, out_features, *, rngs):
        self.hidden_1 = nnx.Linear(in_features, width, rngs=rngs)
        self.hidden_2 = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, out_features, rngs=rngs)

    grpo_mnist.Network.__init__ = __init__


def state_and_step(dataset, config):
    """As the trainer's main loop makes them."""
    state = grpo_mnist.create_state(config)
    return state, grpo_mnist.compile_step(config, dataset, state)


def main_loop(dataset, config):
    """The trainer's main loop, without printing and files: yields what end_epoch takes."""
    state, step = state_and_step(dataset, config)
    for epoch in itertools.count(1):
        began, step_metrics = time.perf_counter(), []
        for images, labels in grpo_mnist.batches(config, dataset, epoch):
            state, metrics = step(state, images, labels)
            step_metrics.append(metrics)
            jax.block_until_ready(step_metrics[-4:-3])
        yield state, epoch, began, jax.block_until_ready(step_metrics)
        if config.ref_sync_epochs and epoch % config.ref_sync_epochs == 0:
            state = state._replace(reference=jax.tree.map(jnp.copy, state.networks.actor))


def train_in_memory(dataset, config):
    """The metrics of each epoch."""
    epochs = itertools.islice(main_loop(dataset, config), config.num_epochs)
    return [grpo_mnist.end_epoch(config, dataset, *epoch) for epoch in epochs]


def take_turns(turns, repeats):
    """What each turn gives, round by round; the first round is not counted."""
    given = {name: [] for name in turns}
    for number in range(repeats + 1):
        for name, turn in turns.items():
            given[name].append(turn())
            time.sleep(0.3)  # for threads that spin a while after their work
        print(f"round {number} of {repeats}", flush=True)
    return {name: of_rounds[1:] for name, of_rounds in given.items()}
