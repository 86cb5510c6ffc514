"""How fast the trainer is beside what it can be compared with, and how its time grows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py speed|growth --data-dir DIR [--repeats 5] [--anew]

speed: an epoch of the trainer beside one of its bare matrix products, and of the same algorithm in
PyTorch; then whole programs, and their first steps, compiled anew each time, except for "ours,
cached". growth: an epoch while one thing grows.

All that is compared takes turns, round by round, so that whatever else the machine does falls on
all of it; each contestant is a process of its own. DIR/downloads/manual holds MNIST.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import ROOT, grpo_mnist
from tyro.conf import Positional

TARGET = 97.34  # percent of an epoch's sampled answers
PYTORCH = {  # Learner's options, and the program's flags
    "pytorch": (),
    "pytorch, indexed": ("indexed",),
    "pytorch, compiled": ("indexed", "compiled"),
}
LAST_LINE_OF_STEP = {  # which a program has once, and what to wait for
    "grpo_mnist.py": ("step_metrics.append(metrics)", "jax.block_until_ready(metrics)"),
    "pytorch_grpo.py": ("total_reward += rewards.mean()", "total_reward.item()"),
}
TRAINING_IMAGES = 60_000
SIZES = {
    "num_generations": (1, 2, 4, 8, 16, 32, 64),
    "batch_size": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "width": (32, 64, 128, 256, 512, 1024),
    "num_seeds": (1, 2, 4, 8, 16),
}


def products(dataset, config):
    """The matrix products of the same steps, jitted: the floor. The first round's also sample."""

    @jax.jit
    def step(weights, images):
        def loss_fn(weights):
            return (functools.reduce(jnp.matmul, weights, images) ** 2).sum() / 2

        for _ in range(config.num_iterations):
            gradients = jax.grad(loss_fn)(weights)
            weights = jax.tree.map(lambda w, g: w - 1e-6 * g, weights, gradients)
        return weights

    rng = np.random.default_rng(0)
    shapes = (784, 128), (128, 128), (128, 10)
    weights = [jnp.asarray(rng.normal(0, 0.01, shape), jnp.float32) for shape in shapes]
    images = jnp.asarray(dataset.train_images[: config.batch_size], jnp.float32) / 255
    while True:
        for _ in range(TRAINING_IMAGES // config.batch_size):
            weights = step(weights, images)
        yield jax.block_until_ready(weights)


def pytorch(options, dataset, config):
    import torch
    from pytorch_grpo import Learner

    images, labels = torch.tensor(dataset.train_images), torch.tensor(dataset.train_labels)
    learner = Learner(images, labels, config.num_iterations, **dict.fromkeys(options, True))
    while True:
        yield learner.train_epoch()


CONTESTANTS = {"ours": common.main_loop, "products": products}
CONTESTANTS |= {name: functools.partial(pytorch, PYTORCH[name]) for name in PYTORCH}


@functools.cache  # A process has one contestant, whose epochs follow one another.
def epochs_of(contestant, width=None, **settings):
    if width:
        common.widen(width)
    config = grpo_mnist.Config(**settings)
    return CONTESTANTS[contestant](grpo_mnist.load_dataset("mnist", config.data_dir), config)


def time_epoch(contestant, **settings):
    return timeit.timeit(lambda: next(epochs_of(contestant, **settings)), number=1)


def start(processes, contestant, **settings):
    """The turns of a new process, each an epoch; it ends with the stack of processes."""
    spawn = multiprocessing.get_context("spawn")
    process = processes.enter_context(ProcessPoolExecutor(1, spawn))
    return lambda: process.submit(time_epoch, contestant, **settings).result()


def time_program(kind, script, flags, environment):
    """Seconds from the start to some lines and to the end, and the peak memory."""
    environment = os.environ | environment
    environment["TORCHINDUCTOR_CACHE_DIR"] = "inductor"  # in a directory new for each run
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    text, figures = script.read_text(), {}
    if kind == "first_step":  # It ends there.
        line, wait = LAST_LINE_OF_STEP[script.name]
        before, after = text.split(line)
        text = f"{before}{line}; {wait}; os._exit(0){after}"
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, script.name).write_text(text)
        command = [sys.executable, script.name, *flags]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=directory, env=environment, **pipes)
        for line in process.stdout:
            seconds = time.perf_counter() - began
            figures.setdefault("first_line", seconds)
            accuracy = re.search(r"Accuracy: ([\d.]+)%", line)
            if accuracy and float(accuracy[1]) >= TARGET:
                figures.setdefault("target", seconds)
        _, status, usage = os.wait4(process.pid, 0)
        figures["seconds"] = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{command} failed")
    return figures | {"megabytes": usage.ru_maxrss * 1024 / 1e6}


def measure_speed(repeats):
    ours, theirs = ROOT / "grpo_mnist.py", ROOT / "benchmarks" / "pytorch_grpo.py"
    data_dir = f"--data-dir={os.environ['TFDS_DATA_DIR']}"
    turns = {}
    with contextlib.ExitStack() as stack:
        for rounds, name in itertools.product((4, 1), CONTESTANTS):
            turns[rounds, name] = start(stack, name, num_iterations=rounds)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": stack.enter_context(tempfile.TemporaryDirectory()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        programs = {"ours": (ours, [], {}), "ours, cached": (ours, [], cache)}
        for name, options in PYTORCH.items():
            programs[name] = theirs, [data_dir, *(f"--{option}" for option in options)], {}
        for kind, name in itertools.product(("whole_run", "first_step"), programs):
            turns[kind, name] = functools.partial(time_program, kind, *programs[name])
        given = common.take_turns(turns, repeats)

    def by_name(kind):
        return {key[1]: given[key] for key in given if key[0] == kind}

    def figures(kind, figure):
        return {name: [x[figure] for x in runs] for name, runs in by_name(kind).items()}

    return {
        "pytorch": version("torch"),
        "rows": [{"num_iterations": rounds, "epoch_seconds": by_name(rounds)} for rounds in (4, 1)],
        "whole_run": {x: figures("whole_run", x) for x in ("seconds", "megabytes")},
        "first_step": {"seconds": figures("first_step", "seconds")},
        "target": {"seconds": figures("whole_run", "target")},
        "first_line": {"seconds": figures("whole_run", "first_line")},
    }


def measure_growth(repeats):
    growth = {}
    for kind, sizes in SIZES.items():
        with contextlib.ExitStack() as stack:
            turns = {size: start(stack, "ours", **{kind: size}) for size in sizes}
            seconds = common.take_turns(turns, repeats)
        growth[kind] = {"rows": []}
        for size in sizes:
            settings = vars(grpo_mnist.Config()) | {kind: size}
            steps = TRAINING_IMAGES // settings["batch_size"]
            images = steps * settings["batch_size"] * settings["num_seeds"]
            row = {"size": size, "images": images, "epoch_seconds": seconds[size]}
            growth[kind]["rows"].append(row)
    return {"growth": growth}


def main(
    name: Positional[Literal["speed", "growth"]], data_dir: Path, repeats: int = 5, anew=False
):
    if common.results_to_continue(name, anew):
        print(f"{name}: measured already, for this program on such a machine; see --anew")
        return
    os.environ["TFDS_DATA_DIR"] = str(data_dir.resolve())
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Many processes share a GPU's memory.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    results = measure_speed(repeats) if name == "speed" else measure_growth(repeats)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    common.write_results(name, {"device": device} | results)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
