"""How fast the trainer is beside what it can be compared with, and how its time grows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data-dir DIR [--repeats 5] [--anew] [speed] [growth]

speed: an epoch of the trainer beside one of its bare matrix products, of the same algorithm in
PyTorch (pytorch_grpo.py), and of the same network without jit. Whole programs, from their start to
their first line, the end of their first step, the epoch in which 97.34% of the sampled answers are
right, and the end of training; compiled anew each time, except for "ours, cached".

growth: an epoch while one thing grows, everything else being as by default: the answers per image,
the batch, the width of the hidden layers (an option of this benchmark alone), or the seeds.

All that is compared takes turns, round by round, so that whatever else the machine does falls on
all of it; the first round is not counted. Each contestant is a process of its own that runs an
epoch when told to. DIR/downloads/manual holds MNIST. Writes results/speed.json and growth.json.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    ROOT,
    describe_device,
    grpo_mnist,
    prepare_ours,
    results_to_continue,
    start_worker,
    take_turn,
    widen,
    work,
    write_results,
)
from flax import nnx

TARGET = 97.34  # percent of an epoch's sampled answers
TRAINING_IMAGES = 60_000
EPOCHS = 100  # more than are run, for the schedules of the learning rate
SIZES = {
    "num_generations": (1, 2, 4, 8, 16, 32, 64),
    "batch_size": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "width": (32, 64, 128, 256, 512, 1024),
    "num_seeds": (1, 2, 4, 8, 16),
}
SEEDS_ON_A_GPU = (1, 4, 16, 64, 256, 1024)


def prepare_products(dataset, config):
    """The matrix products of the same steps and nothing else, jitted: the floor.

    For each round, 3 products forward, 3 for the weights' gradients and 2 for the hidden layers';
    to sample, the first round's 3, which XLA shares between the two once the rounds are unrolled.
    """

    def products(images, weights):
        w1, w2, w3 = weights
        hidden_1 = images @ w1
        hidden_2 = hidden_1 @ w2
        return hidden_1, hidden_2, hidden_2 @ w3

    @jax.jit
    def step(images, weights):
        def one_round(weights, _):
            hidden_1, hidden_2, logits = products(images, weights)
            by_hidden_2 = logits @ weights[2].T
            by_hidden_1 = by_hidden_2 @ weights[1].T
            gradients = images.T @ by_hidden_1, hidden_1.T @ by_hidden_2, hidden_2.T @ logits
            return jax.tree.map(lambda w, g: w - 1e-6 * g, weights, gradients), None

        sampled = products(images, weights)[-1].sum()
        weights, _ = jax.lax.scan(one_round, weights, length=config.num_iterations, unroll=True)
        return weights, sampled

    rng = np.random.default_rng(0)
    shapes = (784, 128), (128, 128), (128, 10)
    weights = tuple(jnp.asarray(rng.normal(0, 0.01, shape), jnp.float32) for shape in shapes)
    images = jnp.asarray(dataset.train_images[: config.batch_size], jnp.float32) / 255

    def run_epoch(epoch):
        nonlocal weights
        for _ in range(TRAINING_IMAGES // config.batch_size):
            weights, sampled = step(images, weights)
        jax.block_until_ready((weights, sampled))
        return 0.0

    return run_epoch


def prepare_without_jit(dataset, config):
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

    def run_epoch(epoch):
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
        return float(jax.block_until_ready(sum(accuracies))) / len(accuracies)

    return run_epoch


def prepare_pytorch(dataset, config, indexed=False, compiled=False):
    import torch
    from pytorch_grpo import Learner

    images = torch.from_numpy(dataset.train_images.copy())
    labels = torch.from_numpy(dataset.train_labels)
    learner = Learner(images, labels, config.num_epochs, config.num_iterations, indexed, compiled)
    return lambda epoch: learner.train_epoch()


CONTESTANTS = {
    "ours": prepare_ours,
    "products": prepare_products,
    "pytorch": prepare_pytorch,
    "pytorch, indexed": functools.partial(prepare_pytorch, indexed=True),
    "pytorch, compiled": functools.partial(prepare_pytorch, indexed=True, compiled=True),
    "without jit": prepare_without_jit,
}


def run_worker(contestant, settings, data_dir):
    if "width" in settings:
        widen(settings.pop("width"))
    config = grpo_mnist.Config(num_epochs=EPOCHS, **settings)
    dataset = grpo_mnist.load_dataset("mnist", data_dir)
    work(CONTESTANTS[contestant](dataset, config))


def start(processes, data_dir, contestant, **settings):
    """The turns of a new process, each an epoch; it ends with the stack of processes."""
    flags = ["--data-dir", str(data_dir), "--worker", contestant, json.dumps(settings)]
    worker = processes.enter_context(start_worker([__file__, *flags]))
    return functools.partial(take_turn, worker)


def write_one_step(path):
    """A copy of the program that ends after its first step."""
    step = "step_metrics.append(metrics)"
    end = "; jax.block_until_ready(metrics); print('First step', flush=True); os._exit(0)"
    path.write_text((ROOT / "grpo_mnist.py").read_text().replace(step, step + end))
    return str(path)


def programs(data_dir, directory):
    """Whole runs and first steps: by kind and name the command, its last line, its environment."""
    pytorch = [str(ROOT / "benchmarks" / "pytorch_grpo.py"), "--data-dir", str(data_dir)]
    data = {"TFDS_DATA_DIR": str(data_dir)}
    cached = data | {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    compiled = [*pytorch, "--indexed", "--compiled"]
    fresh = {"TORCHINDUCTOR_CACHE_DIR": "inductor"}  # in a directory that is new for each run
    whole, one_step = [str(ROOT / "grpo_mnist.py")], [write_one_step(directory / "one_step.py")]
    completed, first = "--- Training completed! ---", "First step"
    return {
        ("whole_run", "ours"): (whole, completed, data),
        ("whole_run", "ours, cached"): (whole, completed, cached),
        ("whole_run", "pytorch"): (pytorch, completed, {}),
        ("whole_run", "pytorch, indexed"): ([*pytorch, "--indexed"], completed, {}),
        ("whole_run", "pytorch, compiled"): (compiled, completed, fresh),
        ("first_step", "ours"): (one_step, first, data),
        ("first_step", "ours, cached"): (one_step, first, cached),
        ("first_step", "pytorch"): ([*pytorch, "--one-step"], first, {}),
    }


def time_program(command, last, environment):
    """Seconds from the start to some lines, the last of which begins so, and the peak memory."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env=kept | environment,
        )
        figures = {}
        for line in process.stdout:
            seconds = time.perf_counter() - began
            figures.setdefault("first_line", seconds)
            accuracy = re.search(r"Accuracy: ([\d.]+)%", line)
            if accuracy and float(accuracy[1]) >= TARGET:
                figures.setdefault("target", seconds)
            if line.startswith(last):
                figures["seconds"] = seconds
        _, status, usage = os.wait4(process.pid, 0)
    if status or "seconds" not in figures:
        raise RuntimeError(f"{command} failed")
    return figures | {"megabytes": usage.ru_maxrss * 1024 / 1e6}


def take_turns(turns, repeats):
    """What each turn gives, round by round; the first round is not counted."""
    by_round = []
    for number in range(repeats + 1):
        by_round.append({name: turn() for name, turn in turns.items()})
        print(f"round {number} of {repeats}", flush=True)
    return {name: [given[name] for given in by_round[1:]] for name in turns}


def measure_speed(repeats, data_dir):
    turns = {}
    with contextlib.ExitStack() as stack:
        for rounds in (4, 1):
            for name in CONTESTANTS:
                turns[rounds, name] = start(stack, data_dir, name, num_iterations=rounds)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for key, program in programs(data_dir, directory).items():
            turns[key] = functools.partial(time_program, *program)
        given = take_turns(turns, repeats)

    def figures(kind, figure):
        return {key[1]: [turn[figure] for turn in given[key]] for key in given if key[0] == kind}

    rows = []
    for rounds in (4, 1):
        accuracy = {name: by_round[-1] for name, by_round in figures(rounds, 1).items()}
        accuracy.pop("products")
        row = {"num_iterations": rounds, "epoch_seconds": figures(rounds, 0)}
        rows.append(row | {"accuracy_of_last_epoch": accuracy})
    return {
        "device": describe_device(),
        "pytorch": version("torch"),
        "rows": rows,
        "whole_run": {name: figures("whole_run", name) for name in ("seconds", "megabytes")},
        "first_step": {"seconds": figures("first_step", "seconds")},
        "target": {"seconds": figures("whole_run", "target")},
        "first_line": {"seconds": figures("whole_run", "first_line")},
    }


def growth_row(kind, size, given):
    """The seconds of each round, and the images that an epoch learns from, over all seeds."""
    config = grpo_mnist.Config(**({} if kind == "width" else {kind: size}))
    images = config.num_seeds * (TRAINING_IMAGES // config.batch_size) * config.batch_size
    return {"size": size, "images": images, "epoch_seconds": [turn[0] for turn in given]}


def measure_growth(repeats, data_dir):
    device, growth = describe_device(), {}
    on_a_gpu = {} if device.endswith("cpu") else {"num_seeds": SEEDS_ON_A_GPU}
    for kind, sizes in (SIZES | on_a_gpu).items():
        print(kind, flush=True)
        with contextlib.ExitStack() as stack:
            turns = {size: start(stack, data_dir, "ours", **{kind: size}) for size in sizes}
            given = take_turns(turns, repeats)
        growth[kind] = {"rows": [growth_row(kind, size, given[size]) for size in sizes]}
    return {"device": device, "growth": growth}


MEASUREMENTS = {"speed": measure_speed, "growth": measure_growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="speed, growth; without any, both")
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--anew", action="store_true", help="even what is there already")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        contestant, settings = options.worker
        run_worker(contestant, json.loads(settings), options.data_dir)
        return
    if not MEASUREMENTS.keys() >= set(options.names):
        parser.error("what can be measured is speed and growth")
    for name in options.names or MEASUREMENTS:
        if results_to_continue(name, options.anew):
            print(f"{name}: measured already, for this program on such a machine; see --anew")
        else:
            write_results(name, MEASUREMENTS[name](options.repeats, options.data_dir))


if __name__ == "__main__":
    main()
