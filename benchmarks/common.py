"""What the benchmarks share: where things are, on what they were measured, how they are kept."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

import grpo_mnist  # noqa: E402


def parse_options(description, *switches):
    """--data-dir, without which only --draw can do something; --draw; and further switches."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve())
    for name in ("--draw", *switches):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    if options.data_dir is None and not options.draw:
        parser.error("--data-dir is missing")
    return options


def library_versions():
    libraries = ("jax", "flax", "optax", "tfp-nightly", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def describe_device():
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def describe_machine():
    """What a reader needs to know to compare figures with their own."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": library_versions(),
    }


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
        if len(step_metrics) % 4 == 0:
            jax.block_until_ready(step_metrics[-2])
    return state, step_metrics


def mean_accuracy(step_metrics):
    """The mean over the steps and the seeds; waits for the device."""
    return float(np.mean([metrics["accuracy"] for metrics in jax.device_get(step_metrics)]))


def command_of(flags):
    return f"python grpo_mnist.py {flags}".strip()


@contextlib.contextmanager
def finished_run(flags, data_dir, num_seeds):
    """A run of the program on MNIST: yields its directory, and its metrics epoch by epoch."""
    with tempfile.TemporaryDirectory() as directory:
        output_dir = Path(directory) / "run"
        program = [sys.executable, str(ROOT / "grpo_mnist.py"), *shlex.split(flags)]
        program += [f"--num-seeds={num_seeds}", f"--output-dir={output_dir}"]
        program += ["--dataset=mnist", f"--data-dir={data_dir}"]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        yield output_dir, [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]


def final_actor(run_dir, num_seeds):
    """The actors of the seeds from 0 on, from the last checkpoint of a run, as one with an axis."""
    actors = [grpo_mnist.load_actor(run_dir, seed) for seed in range(num_seeds)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *actors)


def prepare_ours(dataset, config):
    """The trainer's own main loop, with nothing but the reporting left out: runs an epoch."""
    state, step = state_and_step(dataset, config)

    def run_one(epoch):
        nonlocal state
        stream = grpo_mnist.batches(config, dataset, epoch)
        state, step_metrics = run_epoch(step, state, stream)
        return mean_accuracy(step_metrics)

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


def spread(values):
    """The median with its range, and how many there were."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def over_seeds(by_seed):
    """A figure's mean over the seeds, with its 95% interval and each seed's own."""
    figures = grpo_mnist.over_seeds({"accuracy": by_seed})
    interval = figures["interval_95"]["accuracy"]
    return {"mean": figures["accuracy"], "interval_95": interval, "by_seed": list(by_seed)}


def write_results(name, results):
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(describe_machine() | results, indent=2) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
