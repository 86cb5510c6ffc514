"""How fast: an epoch, a whole run, the first step, beside what they could be compared with.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data-dir DIR

An epoch of this trainer, of its bare matrix products, of the same algorithm in PyTorch
(pytorch_grpo.py), and of the same network without jit: each contestant is a process of its own that
runs one epoch when told to. Whole programs, from their start to the line that says that training is
completed, and to the end of their first step, without any compilation cache. All take turns, round
by round, so that whatever else the machine does falls on all of them; the first round is not
counted. The four MNIST files are expected in DIR/downloads/manual. Writes results/speed.json.
"""

import argparse
import functools
import os
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

CONTESTANTS = ("ours", "products", "pytorch", "pytorch, indexed", "without jit")
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


def prepare_pytorch(dataset, config, indexed=False):
    import torch
    from pytorch_grpo import Learner

    images, labels = torch.from_numpy(dataset.train_images.copy()), dataset.train_labels
    schedule = config.num_epochs, config.num_iterations
    learner = Learner(images, torch.from_numpy(labels), *schedule, indexed)
    return lambda epoch: learner.train_epoch()


def run_worker(contestant, num_iterations, data_dir):
    config = grpo_mnist.Config(num_iterations=num_iterations, num_epochs=EPOCHS)
    dataset = grpo_mnist.load_dataset("mnist", data_dir)
    prepare = {
        "ours": prepare_ours,
        "products": prepare_products,
        "pytorch": prepare_pytorch,
        "pytorch, indexed": functools.partial(prepare_pytorch, indexed=True),
        "without jit": prepare_without_jit,
    }
    work(prepare[contestant](dataset, config))


def run_one_step(data_dir):
    """The program itself, up to the end of its first step."""

    compile_step = grpo_mnist.compile_step

    def compile_one_step(*arguments):
        step = compile_step(*arguments)

        def one_step(*batch):
            _, metrics = step(*batch)
            print(f"First step: {metrics['accuracy'].item():.2%}", flush=True)
            os._exit(0)

        return one_step

    grpo_mnist.compile_step = compile_one_step
    grpo_mnist.main([f"--data-dir={data_dir}", "--output-dir=run"])


def time_program(command, line_begins):
    """Seconds from the start to the line, and the peak memory in MB."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=environment,
        )
        (seconds,) = (
            time.perf_counter() - began for line in process.stdout if line.startswith(line_begins)
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed")
    return {"seconds": seconds, "megabytes": usage.ru_maxrss * 1024 / 1e6}


def programs(data_dir):
    """Whole runs and first steps: name, command, the line to wait for."""
    at, completed, first = (
        ["--data-dir", str(data_dir)],
        "--- Training completed! ---",
        "First step:",
    )
    pytorch = [str(ROOT / "benchmarks" / "pytorch_grpo.py"), *at]
    return {
        "whole run": {
            "ours": ([str(ROOT / "grpo_mnist.py"), *at], completed),
            "pytorch": (pytorch, completed),
            "pytorch, indexed": ([*pytorch, "--indexed"], completed),
        },
        "first step": {
            "ours": ([__file__, *at, "--one-step"], first),
            "pytorch": ([*pytorch, "--one-step"], first),
        },
    }


def ratios(by_contestant):
    """Ours to each other one, round by round."""
    ours = by_contestant["ours"]
    return {
        f"ours / {name}": spread([one / other for one, other in zip(ours, values, strict=True)])
        for name, values in by_contestant.items()
        if name != "ours"
    }


def measure(repeats, data_dir):
    """Rounds in which everything has its turn."""
    workers = {}
    for num_iterations in (4, 1):
        for contestant in CONTESTANTS:
            flags = ["--worker", contestant, "--num-iterations", str(num_iterations)]
            command = [__file__, *flags, "--data-dir", str(data_dir)]
            workers[num_iterations, contestant] = start_worker(command)
    seconds = {key: [] for key in workers}
    accuracy = {}
    whole = {kind: {name: [] for name in each} for kind, each in programs(data_dir).items()}
    for turn in range(repeats + 1):
        for key, worker in workers.items():
            taken, accuracy[key] = take_turn(worker)
            seconds[key].append(taken)
        for kind, each in programs(data_dir).items():
            for name, (command, line) in each.items():
                whole[kind][name].append(time_program(command, line))
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
        counted = {name: [run["seconds"] for run in runs[1:]] for name, runs in each.items()}
        results[kind.replace(" ", "_")] = {
            "seconds": {name: spread(taken) for name, taken in counted.items()},
            "ratios": ratios(counted),
            "megabytes": {
                name: spread([run["megabytes"] for run in runs[1:]]) for name, runs in each.items()
            },
        }
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--one-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--num-iterations", type=int, default=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data_dir = options.data_dir.resolve()
    if options.worker:
        run_worker(options.worker, options.num_iterations, data_dir)
        return
    if options.one_step:
        run_one_step(data_dir)
        return
    results = measure(options.repeats, data_dir)
    device = {"device": describe_device(), "pytorch": version("torch")}
    for name in ("whole_run", "first_step"):
        print(name, results[name]["ratios"])
    for row in results["rows"]:
        print(row["num_iterations"], row["epoch_seconds"], row["ratios"])
    write_results("speed", device | results)


if __name__ == "__main__":
    main()
