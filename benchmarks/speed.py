"""How fast: an epoch, a whole run, the first step, beside what they could be compared with.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data-dir DIR

An epoch of this trainer, of its bare matrix products, of the same algorithm in PyTorch
(pytorch_grpo.py, eager and through torch.compile), and of the same network without jit: each
contestant is a process of its own that runs one epoch when told to. Whole programs, from their
start to their first line, to the epoch in which 97.34% of the sampled answers are right, and to the
line that says that training is completed; and to the end of their first step. Nothing that was
compiled is kept from one run to the next, except for "ours, cached". All take turns, round by
round, so that whatever else the machine does falls on all of them; the first round is not counted.
The four MNIST files are expected in DIR/downloads/manual. Writes results/speed.json.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import (
    ROOT,
    describe_device,
    grpo_mnist,
    prepare_ours,
    spread,
    start_worker,
    take_turn,
    work,
    write_results,
)

CONTESTANTS = (
    *("ours", "products", "pytorch", "pytorch, indexed", "pytorch, compiled", "without jit"),
)
TARGET = 97.34  # percent of an epoch's sampled answers
STEPS = 58  # of 1,024 images: an epoch of MNIST
EPOCHS = 100  # more than are run, for the schedules of the learning rate


def prepare_products(dataset, config):
    """The matrix products of the same steps and nothing else, jitted: the floor.

    For each round, 3 products forward, 3 for the weights' gradients and 2 for the hidden layers';
    to sample, the first round's 3, which XLA shares between the two once the rounds are unrolled.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

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
        rounds = config.num_iterations
        weights, _ = jax.lax.scan(one_round, weights, length=rounds, unroll=rounds)
        return weights, sampled

    rng = np.random.default_rng(0)
    shapes = (784, 128), (128, 128), (128, 10)
    weights = tuple(jnp.asarray(rng.normal(0, 0.01, shape), jnp.float32) for shape in shapes)
    images = jnp.asarray(dataset.train_images[: config.batch_size], jnp.float32) / 255

    def run_epoch(epoch):
        nonlocal weights
        for _ in range(STEPS):
            weights, sampled = step(images, weights)
        jax.block_until_ready((weights, sampled))
        return 0.0

    return run_epoch


def prepare_without_jit(dataset, config):
    """The way a first attempt looks: NNX, and every operation by itself."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    actor = grpo_mnist.Actor(784, 10, rngs=nnx.Rngs(0))
    num_updates = config.num_epochs * STEPS * config.num_iterations
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

    images, labels = torch.from_numpy(dataset.train_images.copy()), dataset.train_labels
    schedule = config.num_epochs, config.num_iterations
    learner = Learner(images, torch.from_numpy(labels), *schedule, indexed, compiled)
    return lambda epoch: learner.train_epoch()


def run_worker(contestant, num_iterations, data_dir):
    config = grpo_mnist.Config(num_iterations=num_iterations, num_epochs=EPOCHS)
    dataset = grpo_mnist.load_dataset("mnist", data_dir)
    prepare = {
        "ours": prepare_ours,
        "products": prepare_products,
        "pytorch": prepare_pytorch,
        "pytorch, indexed": functools.partial(prepare_pytorch, indexed=True),
        "pytorch, compiled": functools.partial(prepare_pytorch, indexed=True, compiled=True),
        "without jit": prepare_without_jit,
    }
    work(prepare[contestant](dataset, config))


def write_one_step(path):
    """A copy of the program that ends after its first step."""
    program, at = (ROOT / "grpo_mnist.py").read_text(), " step_metrics.append(metrics)\n"
    before, _, after = program.partition(at)
    end = "; jax.block_until_ready(metrics); print('First step', flush=True); os._exit(0)\n"
    path.write_text(before + at.rstrip() + end + after)
    return str(path)


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
    if status:
        raise RuntimeError(f"{command} failed")
    return figures | {"megabytes": usage.ru_maxrss * 1024 / 1e6}


def programs(data_dir, directory):
    """Whole runs and first steps: name, command, the line to wait for, environment."""
    pytorch = [str(ROOT / "benchmarks" / "pytorch_grpo.py"), "--data-dir", str(data_dir)]
    data = {"TFDS_DATA_DIR": str(data_dir)}
    cached = data | {
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    fresh = {"TORCHINDUCTOR_CACHE_DIR": "inductor"}  # in a directory that is new for each run
    whole, one_step = [str(ROOT / "grpo_mnist.py")], [write_one_step(directory / "one_step.py")]
    completed, first = "--- Training completed! ---", "First step"
    return {
        "whole run": {
            "ours": (whole, completed, data),
            "ours, cached": (whole, completed, cached),
            "pytorch": (pytorch, completed, {}),
            "pytorch, indexed": ([*pytorch, "--indexed"], completed, {}),
            "pytorch, compiled": ([*pytorch, "--indexed", "--compiled"], completed, fresh),
        },
        "first step": {
            "ours": (one_step, first, data),
            "ours, cached": (one_step, first, cached),
            "pytorch": ([*pytorch, "--one-step"], first, {}),
        },
    }


def ratios(by_contestant):
    """Ours, without and with a cache, to each other one, round by round."""
    ours = [name for name in by_contestant if name.startswith("ours")]
    return {
        f"{one} / {other}": spread(
            [mine / its for mine, its in zip(by_contestant[one], values, strict=True)]
        )
        for one in ours
        for other, values in by_contestant.items()
        if other not in ours
    }


def measure(repeats, data_dir, directory):
    """Rounds in which everything has its turn."""
    workers = {}
    for num_iterations in (4, 1):
        for contestant in CONTESTANTS:
            flags = ["--worker", contestant, "--num-iterations", str(num_iterations)]
            command = [__file__, *flags, "--data-dir", str(data_dir)]
            workers[num_iterations, contestant] = start_worker(command)
    seconds = {key: [] for key in workers}
    accuracy = {}
    to_time = programs(data_dir, directory)
    whole = {kind: {name: [] for name in each} for kind, each in to_time.items()}
    for turn in range(repeats + 1):
        for key, worker in workers.items():
            taken, accuracy[key] = take_turn(worker)
            seconds[key].append(taken)
        for kind, each in to_time.items():
            for name, program in each.items():
                whole[kind][name].append(time_program(*program))
        print(f"round {turn} of {repeats}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for num_iterations in (4, 1):
        counted = {name: seconds[num_iterations, name][1:] for name in CONTESTANTS}
        rows.append(
            {
                "num_iterations": num_iterations,
                "epoch_seconds": {name: spread(taken) for name, taken in counted.items()},
                "ratios": ratios(counted),
                "accuracy_of_last_epoch": {
                    name: accuracy[num_iterations, name]
                    for name in CONTESTANTS
                    if name != "products"
                },
            }
        )
    results = {"rows": rows}
    for kind, each in whole.items():
        results[kind.replace(" ", "_")] = {
            figure: {name: [run[figure] for run in runs[1:]] for name, runs in each.items()}
            for figure in ("seconds", "megabytes")
        }
    for figure in ("target", "first_line"):
        runs_by_name = whole["whole run"]
        results[figure] = {
            "seconds": {name: [x[figure] for x in runs[1:]] for name, runs in runs_by_name.items()}
        }
    for name in ("whole_run", "first_step", "target", "first_line"):
        timed = results[name]
        timed["ratios"] = ratios(timed["seconds"])
        for figure in timed.keys() - {"ratios"}:
            timed[figure] = {who: spread(values) for who, values in timed[figure].items()}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--num-iterations", type=int, default=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data_dir = options.data_dir.resolve()
    if options.worker:
        run_worker(options.worker, options.num_iterations, data_dir)
        return
    with tempfile.TemporaryDirectory() as directory:
        results = measure(options.repeats, data_dir, Path(directory))
    device = {"device": describe_device(), "pytorch": version("torch")}
    for name in ("whole_run", "first_step", "target"):
        print(name, results[name]["ratios"])
    for row in results["rows"]:
        print(row["num_iterations"], row["epoch_seconds"], row["ratios"])
    write_results("speed", device | results)


if __name__ == "__main__":
    main()
