"""How fast the trainer is beside what it can be compared with, and how its time grows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py speed|growth --data-dir DIR [--repeats 5] [--anew]

speed: an epoch of the trainer beside one of its bare matrix products, of the same algorithm in
PyTorch, and of the same network without jit; then whole programs, compiled anew each time, except
for "ours, cached". growth: an epoch while one thing grows, everything else being as by default.

All that is compared takes turns, round by round, so that whatever else the machine does falls on
all of it; each contestant is a process of its own. DIR/downloads/manual holds MNIST. Writes
results/speed.json or growth.json.
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
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import ROOT, grpo_mnist
from flax import nnx
from tyro.conf import Positional

TARGET = 97.34  # percent of an epoch's sampled answers
TRAINING_IMAGES = 60_000
EPOCHS = 100  # more than are run, for the schedules of the learning rate
SIZES = {
    "num_generations": (1, 2, 4, 8, 16, 32, 64),
    "batch_size": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "width": (32, 64, 128, 256, 512, 1024),
    "num_seeds": (1, 2, 4, 8, 16),
}


def products(dataset, config):
    """The matrix products of the same steps and nothing else, jitted: the floor.

    For each round, 3 products forward, 3 for the weights' gradients and 2 for the hidden layers';
    to sample, the first round's 3, which XLA shares between the two once the rounds are unrolled.
    """

    def logits(weights, images):
        return functools.reduce(jnp.matmul, weights, images)

    @jax.jit
    def step(weights, images):
        def one_round(weights, _):
            gradients = jax.grad(lambda weights: (logits(weights, images) ** 2).sum() / 2)(weights)
            return jax.tree.map(lambda w, g: w - 1e-6 * g, weights, gradients), None

        sampled = logits(weights, images).sum()
        weights, _ = jax.lax.scan(one_round, weights, length=config.num_iterations, unroll=True)
        return weights, sampled

    rng = np.random.default_rng(0)
    shapes = (784, 128), (128, 128), (128, 10)
    weights = tuple(jnp.asarray(rng.normal(0, 0.01, shape), jnp.float32) for shape in shapes)
    images = jnp.asarray(dataset.train_images[: config.batch_size], jnp.float32) / 255
    while True:
        for _ in range(TRAINING_IMAGES // config.batch_size):
            weights, sampled = step(weights, images)
        yield jax.block_until_ready((weights, sampled))


def without_jit(dataset, config):
    """The way a first attempt looks: NNX, and every operation by itself."""
    actor = grpo_mnist.Actor(784, 10, rngs=nnx.Rngs(0))
    num_updates = config.num_epochs * (TRAINING_IMAGES // config.batch_size) * config.num_iterations
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_updates)
    optimizer = nnx.Optimizer(actor, optax.adam(schedule), wrt=nnx.Param)
    rngs = nnx.Rngs(1)

    def loss_fn(actor, images, actions, old_log_probs, advantages):
        ratio = jnp.exp(actor(images).log_prob(actions) - old_log_probs)
        clipped_ratio = jnp.clip(ratio, 1 - config.clip_epsilon, 1 + config.clip_epsilon)
        return -jnp.minimum(advantages * ratio, advantages * clipped_ratio).mean()

    for epoch in itertools.count(1):
        accuracies = []
        for (images,), (labels,) in grpo_mnist.batches(config, dataset, epoch):
            images = jnp.asarray(images, jnp.float32) / 255
            policy = actor(images)
            actions = policy.sample(seed=rngs())
            old_log_probs = policy.log_prob(actions)
            rewards = (actions == labels).astype(jnp.float32)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
            for _ in range(config.num_iterations):
                learned = images, actions, old_log_probs, advantages
                optimizer.update(actor, nnx.grad(loss_fn)(actor, *learned))
            accuracies.append(rewards.mean())
        yield jax.block_until_ready(accuracies)


def pytorch(dataset, config, indexed=False, compiled=False):
    import torch
    from pytorch_grpo import Learner

    images = torch.from_numpy(dataset.train_images.copy())
    labels = torch.from_numpy(dataset.train_labels)
    learner = Learner(images, labels, config.num_epochs, config.num_iterations, indexed, compiled)
    while True:
        yield learner.train_epoch()


CONTESTANTS = {
    "ours": common.main_loop,
    "products": products,
    "pytorch": pytorch,
    "pytorch, indexed": functools.partial(pytorch, indexed=True),
    "pytorch, compiled": functools.partial(pytorch, indexed=True, compiled=True),
    "without jit": without_jit,
}


def become(contestant, data_dir, width=None, **settings):
    """Makes a process a contestant, with the iterator of its epochs."""
    global epochs
    if width:
        common.widen(width)
    config = grpo_mnist.Config(num_epochs=EPOCHS, **settings)
    epochs = CONTESTANTS[contestant](grpo_mnist.load_dataset("mnist", data_dir), config)


def run_epoch():
    return common.time_next(epochs)


def start(processes, contestant, data_dir, **settings):
    """The turns of a new process, each an epoch; it ends with the stack of processes."""
    prepare = functools.partial(become, contestant, data_dir, **settings)
    spawn = multiprocessing.get_context("spawn")
    process = processes.enter_context(ProcessPoolExecutor(1, spawn, prepare))
    return lambda: process.submit(run_epoch).result()


def programs(data_dir, directory):
    """Whole runs and first steps: by kind and name the command, and what its environment adds."""
    whole, one_step = ROOT / "grpo_mnist.py", directory / "one_step.py"
    step = "step_metrics.append(metrics)"
    end = "; jax.block_until_ready(metrics); print('First step', flush=True); os._exit(0)"
    one_step.write_text(whole.read_text().replace(step, step + end))
    pytorch = [ROOT / "benchmarks" / "pytorch_grpo.py", "--data-dir", data_dir]
    data = {"TFDS_DATA_DIR": str(data_dir)}
    cached = data | {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    fresh = {"TORCHINDUCTOR_CACHE_DIR": "inductor"}  # in a directory that is new for each run
    return {
        ("whole_run", "ours"): ([whole], data),
        ("whole_run", "ours, cached"): ([whole], cached),
        ("whole_run", "pytorch"): (pytorch, {}),
        ("whole_run", "pytorch, indexed"): ([*pytorch, "--indexed"], {}),
        ("whole_run", "pytorch, compiled"): ([*pytorch, "--indexed", "--compiled"], fresh),
        ("first_step", "ours"): ([one_step], data),
        ("first_step", "ours, cached"): ([one_step], cached),
        ("first_step", "pytorch"): ([*pytorch, "--one-step"], {}),
    }


def time_program(command, environment):
    """Seconds from the start to some lines, and the peak memory."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        command = [sys.executable, *command]
        process = subprocess.Popen(command, cwd=directory, env=kept | environment, **pipes)
        for line in process.stdout:
            seconds = time.perf_counter() - began
            figures.setdefault("first_line", seconds)
            accuracy = re.search(r"Accuracy: ([\d.]+)%", line)
            if accuracy and float(accuracy[1]) >= TARGET:
                figures.setdefault("target", seconds)
            if line.startswith(("--- Training completed! ---", "First step")):
                figures["seconds"] = seconds
        _, status, usage = os.wait4(process.pid, 0)
    if status or "seconds" not in figures:
        raise RuntimeError(f"{command} failed")
    return figures | {"megabytes": usage.ru_maxrss * 1024 / 1e6}


def measure_speed(data_dir, repeats):
    turns = {}
    with contextlib.ExitStack() as stack:
        for rounds, name in itertools.product((4, 1), CONTESTANTS):
            turns[rounds, name] = start(stack, name, data_dir, num_iterations=rounds)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for key, program in programs(data_dir, directory).items():
            turns[key] = functools.partial(time_program, *program)
        given = common.take_turns(turns, repeats)

    def figures(kind, name):
        return {key[1]: [x[name] for x in given[key]] for key in given if key[0] == kind}

    rows = [{"num_iterations": rounds, "epoch_seconds": {}} for rounds in (4, 1)]
    for row, name in itertools.product(rows, CONTESTANTS):
        row["epoch_seconds"][name] = given[row["num_iterations"], name]
    return {
        "pytorch": version("torch"),
        "rows": rows,
        "whole_run": {name: figures("whole_run", name) for name in ("seconds", "megabytes")},
        "first_step": {"seconds": figures("first_step", "seconds")},
        "target": {"seconds": figures("whole_run", "target")},
        "first_line": {"seconds": figures("whole_run", "first_line")},
    }


def measure_growth(data_dir, repeats):
    growth = {kind: {"rows": []} for kind in SIZES}
    for kind, sizes in SIZES.items():
        with contextlib.ExitStack() as stack:
            turns = {size: start(stack, "ours", data_dir, **{kind: size}) for size in sizes}
            given = common.take_turns(turns, repeats)
        for size in sizes:  # with the images that an epoch learns from, over all seeds
            config = grpo_mnist.Config(**({} if kind == "width" else {kind: size}))
            images = TRAINING_IMAGES // config.batch_size * config.batch_size * config.num_seeds
            row = {"size": size, "images": images, "epoch_seconds": given[size]}
            growth[kind]["rows"].append(row)
    return {"growth": growth}


MEASUREMENTS = {"speed": measure_speed, "growth": measure_growth}


def main(name: Positional[Literal[*MEASUREMENTS]], data_dir: Path, repeats: int = 5, anew=False):
    if common.results_to_continue(name, anew):
        print(f"{name}: measured already, for this program on such a machine; see --anew")
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Many processes share a GPU's memory.
    results = MEASUREMENTS[name](data_dir.resolve(), repeats)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    common.write_results(name, {"device": device} | results)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
