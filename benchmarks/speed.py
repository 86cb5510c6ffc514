"""An epoch of this trainer, of the same algorithm in PyTorch, and of its bare matrix products.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data-dir DIR

Each contestant is a process of its own that runs one epoch when told to; they take turns, so
that whatever else the machine does falls on all of them. Writes results/speed.json.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from common import grpo_mnist, spread, write_results

CONTESTANTS = ("ours", "products", "pytorch", "pytorch, indexed")
STEPS = 58  # of 1,024 images: an epoch of MNIST
EPOCHS = 100  # more than are run, for the schedules of the learning rate


def prepare_ours(dataset, config):
    """The trainer's own main loop, with nothing but the reporting left out."""
    state = grpo_mnist.create_state(config)
    first_batch = next(grpo_mnist.batches(dataset, config, epoch=1))
    step = grpo_mnist.compile_step(state, first_batch, config, EPOCHS * STEPS)

    def run_epoch(epoch):
        nonlocal state
        batches = grpo_mnist.batches(dataset, config, epoch)
        state, step_metrics, _ = grpo_mnist.stream_batches(step, state, batches)
        return grpo_mnist.average_over_steps(step_metrics)["accuracy"].item()

    return run_epoch


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


def prepare_pytorch(dataset, config, loader=True):
    """The same algorithm, network and data in PyTorch.

    With a DataLoader, as its tutorials do it; or without, with the batches indexed out of one
    tensor as this trainer does it.
    """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    all_images = torch.from_numpy(dataset.train_images.copy())
    all_labels = torch.from_numpy(dataset.train_labels)
    actor = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
    updates = EPOCHS * STEPS * config.num_iterations
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    low, high = 1 - config.clip_epsilon, 1 + config.upper_clip_epsilon

    def indexed_batches():
        order = torch.randperm(len(all_images))
        for start in range(0, STEPS * config.batch_size, config.batch_size):
            chosen = order[start : start + config.batch_size]
            yield all_images[chosen], all_labels[chosen]

    def loaded_batches():
        pairs = TensorDataset(all_images, all_labels)
        return DataLoader(pairs, batch_size=config.batch_size, shuffle=True, drop_last=True)

    def policy_for(images):
        return torch.distributions.Categorical(logits=actor(images))

    def run_epoch(epoch):
        rewarded = torch.zeros(())
        for images, labels in loaded_batches() if loader else indexed_batches():
            images = images.float() / 255
            with torch.no_grad():
                policy = policy_for(images)
                actions = policy.sample()
                old_log_probs = policy.log_prob(actions)
                rewards = (actions == labels).float()
                deviation = rewards.std(unbiased=False)
                advantages = (rewards - rewards.mean()) / (deviation + 1e-8)
                rewarded += rewards.mean()
            for _ in range(config.num_iterations):
                ratio = torch.exp(policy_for(images).log_prob(actions) - old_log_probs)
                clipped_ratio = ratio.clamp(low, high)
                loss = -torch.minimum(advantages * ratio, advantages * clipped_ratio).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return float(rewarded) / STEPS

    return run_epoch


def work(contestant, num_iterations, data_dir):
    """A contestant: prepares, and then runs an epoch for every line that it is sent."""
    config = grpo_mnist.Config(num_iterations=num_iterations)
    dataset = grpo_mnist.load_dataset("mnist", data_dir)
    prepare = {
        "ours": prepare_ours,
        "products": prepare_products,
        "pytorch": prepare_pytorch,
        "pytorch, indexed": functools.partial(prepare_pytorch, loader=False),
    }
    run_epoch = prepare[contestant](dataset, config)
    for epoch, _ in enumerate(sys.stdin, start=1):
        began = time.perf_counter()
        accuracy = run_epoch(epoch)
        print(time.perf_counter() - began, accuracy, flush=True)


def measure(num_iterations, repeats, data_dir):
    """Lets the contestants take turns; the first epoch of each is not counted."""
    workers = {}
    for contestant in CONTESTANTS:
        flags = ["--worker", contestant, "--num-iterations", str(num_iterations)]
        command = [sys.executable, __file__, *flags, "--data-dir", str(data_dir)]
        workers[contestant] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seconds = {contestant: [] for contestant in CONTESTANTS}
    accuracy = {}
    for _ in range(repeats + 1):
        for contestant, worker in workers.items():
            worker.stdin.write("epoch\n")
            worker.stdin.flush()
            taken, accuracy[contestant] = map(float, worker.stdout.readline().split())
            seconds[contestant].append(taken)
            time.sleep(0.3)  # for threads that spin a while after their work
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    counted = {contestant: taken[1:] for contestant, taken in seconds.items()}
    ratios = {}
    for other in CONTESTANTS[1:]:
        pairs = zip(counted["ours"], counted[other], strict=True)
        ratios[f"ours / {other}"] = spread([ours / theirs for ours, theirs in pairs])
    return {
        "num_iterations": num_iterations,
        "epoch_seconds": {name: spread(taken) for name, taken in counted.items()},
        "ratios": ratios,
        "accuracy_of_last_epoch": {
            name: accuracy[name] for name in CONTESTANTS if name != "products"
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--num-iterations", type=int, default=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.num_iterations, options.data_dir)
        return
    rows = []
    for num_iterations in (4, 1):
        row = measure(num_iterations, options.repeats, options.data_dir.resolve())
        rows.append(row)
        print(f"K = {num_iterations}")
        for name, figure in (row["epoch_seconds"] | row["ratios"]).items():
            print(
                f"  {name:24} {figure['median']:.3f} ({figure['min']:.3f} to {figure['max']:.3f})"
            )
    write_results("speed", {"pytorch": version("torch"), "rows": rows})


if __name__ == "__main__":
    main()
