"""What the benchmarks share: facts about the machine, results, statistics, and workers."""

import ast
import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from scipy.stats import linregress  # noqa: E402

import grpo_mnist  # noqa: E402


def describe_device():
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def describe_machine():
    """What a reader needs to know to compare figures with their own."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    libraries = ("jax", "flax", "optax", "tfp-nightly", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
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
    text = lay_out(facts | figures | facts) + "\n"  # not the facts of what is continued
    grpo_mnist.write_file(RESULTS / f"{name}.json", text.encode())
    print(f"written: results/{name}.json", flush=True)


def lay_out(value, indent=""):
    """JSON that has whatever is short enough in one line."""
    line, inner = json.dumps(value), indent + " "
    if not isinstance(value, dict | list) or (indent and len(line) <= 300):
        return line
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {lay_out(each, inner)}" for name, each in value.items()]
    else:
        parts = [lay_out(each, inner) for each in value]
    return line[0] + ",".join(f"\n{inner}{part}" for part in parts) + f"\n{indent}{line[-1]}"


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


def spread(values):
    """The median with its range, and how many there were; what is a spread already stays one."""
    if isinstance(values, dict):
        return values
    middle = statistics.median(values)
    return {"median": middle, "min": min(values), "max": max(values), "n": len(values)}


def median(values):
    return spread(values)["median"]


def over_seeds(by_seed):
    """The mean over the seeds, with its 95% interval by Student's t."""
    figures = grpo_mnist.over_seeds({"accuracy": by_seed})
    return {"mean": figures["accuracy"], "interval_95": figures["interval_95"]["accuracy"]}


def paired_difference(one, other):
    """The mean of one minus the other, seed by seed, with its 95% interval."""
    return over_seeds(np.subtract(one, other))


def fit_slope(sizes, times):
    """The p of time ~ size ** p, by least squares on the logarithms, with its standard error."""
    fit = linregress(np.log(sizes), np.log(times))
    return {"slope": float(fit.slope), "standard_error": float(fit.stderr)}


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


def run_epoch(step, state, batches):
    """The main loop's inner loop: the new state, and the metrics of each step."""
    step_metrics = []
    for images, labels in batches:
        state, metrics = step(state, images, labels)
        step_metrics.append(metrics)
        jax.block_until_ready(step_metrics[-4:-3])
    return state, step_metrics


def train_in_memory(dataset, config):
    """The metrics of each epoch, by the main loop's own functions, without printing and files."""
    state, step = state_and_step(dataset, config)
    history = []
    for epoch in range(1, config.num_epochs + 1):
        began = time.perf_counter()
        state, metrics = run_epoch(step, state, grpo_mnist.batches(config, dataset, epoch))
        history.append(grpo_mnist.end_epoch(config, dataset, state, epoch, began, metrics))
        if config.ref_sync_epochs and epoch % config.ref_sync_epochs == 0:
            state = state._replace(reference=jax.tree.map(jnp.copy, state.networks.actor))
    return history


def prepare_ours(dataset, config):
    """The trainer's own main loop, with nothing but the reporting left out: runs an epoch."""
    state, step = state_and_step(dataset, config)

    def run_one(epoch):
        nonlocal state
        stream = grpo_mnist.batches(config, dataset, epoch)
        state, step_metrics = run_epoch(step, state, stream)
        return float(np.mean([each["accuracy"] for each in jax.device_get(step_metrics)]))

    return run_one


def work(run_epoch):
    """The life of a worker: an epoch for every line that it is sent."""
    for epoch, _ in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        accuracy = run_epoch(epoch)
        print(time.perf_counter() - began, accuracy, flush=True)


def start_worker(command):
    """A process that works, to be given its turns; many of them share a GPU's memory."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )


def take_turn(worker):
    """Lets a worker run an epoch: its seconds and accuracy."""
    worker.stdin.write("epoch\n")
    worker.stdin.flush()
    seconds, accuracy = map(float, worker.stdout.readline().split())
    time.sleep(0.3)  # for threads that spin a while after their work
    return seconds, accuracy
