"""The algorithm of grpo_mnist.py in PyTorch, as PyTorch is usually written: what to compare with.

    python benchmarks/pytorch_grpo.py --data-dir DIR

The same network, data, defaults, update, and test, without JAX; nothing is written. Batches come
from a DataLoader, or with --indexed out of one tensor; with --compiled the loss goes through
torch.compile. The four MNIST files are expected in DIR/downloads/manual.
"""

import argparse
import gzip
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NUM_EPOCHS, NUM_ITERATIONS = 10, 4
BATCH_SIZE, CLIP_EPSILON, LEARNING_RATE = 1024, 0.2, 3e-3


def read_mnist(data_dir, part):
    """Images and labels, from IDX files with headers of 16 and 8 bytes."""
    paths = sorted(Path(data_dir, "downloads", "manual").glob(f"{part}-*-ubyte.gz"))
    images, labels = (np.frombuffer(gzip.decompress(x.read_bytes()), np.uint8) for x in paths)
    images, labels = torch.tensor(images[16:]), torch.tensor(labels[8:], dtype=torch.int32)
    return images.reshape(-1, 784), labels


class Learner:
    """The actor, its optimizer, and an epoch of training."""

    def __init__(self, images, labels, num_epochs, num_iterations, indexed, compiled):
        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.images, self.labels = images, labels
        self.num_iterations, self.indexed = num_iterations, indexed
        self.steps = len(images) // BATCH_SIZE
        self.actor = nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=LEARNING_RATE)
        num_updates = num_epochs * self.steps * num_iterations
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_updates)
        self.loss = torch.compile(self.eager_loss) if compiled else self.eager_loss

    def batches(self):
        if not self.indexed:
            pairs = TensorDataset(self.images, self.labels)
            return iter(DataLoader(pairs, batch_size=BATCH_SIZE, shuffle=True, drop_last=True))
        order = torch.randperm(len(self.images)).split(BATCH_SIZE)[: self.steps]
        return ((self.images[chosen], self.labels[chosen]) for chosen in order)

    def policy(self, images):
        return torch.distributions.Categorical(logits=self.actor(images))

    def eager_loss(self, images, actions, old_log_probs, advantages):
        ratio = torch.exp(self.policy(images).log_prob(actions) - old_log_probs)
        clipped_ratio = ratio.clamp(1 - CLIP_EPSILON, 1 + CLIP_EPSILON)
        return -torch.minimum(advantages * ratio, advantages * clipped_ratio).mean()

    def step(self, images, labels):
        """One batch; the mean reward, left on the device."""
        images, labels = images.to(self.device).float() / 255, labels.to(self.device)
        with torch.no_grad():
            policy = self.policy(images)
            actions = policy.sample()
            old_log_probs = policy.log_prob(actions)
            rewards = (actions == labels).float()
            advantages = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-8)
        for _ in range(self.num_iterations):
            loss = self.loss(images, actions, old_log_probs, advantages)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        return rewards.mean()

    def train_epoch(self):
        """The mean reward of an epoch."""
        return sum(self.step(*batch) for batch in self.batches()).item() / self.steps

    @torch.no_grad()
    def accuracy(self, images, labels):
        answers = self.actor(images.to(self.device).float() / 255).argmax(dim=1)
        return (answers == labels.to(self.device)).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--indexed", action="store_true", help="batches without a DataLoader")
    parser.add_argument("--compiled", action="store_true", help="the loss through torch.compile")
    parser.add_argument("--one-step", action="store_true", help="end after the first step")
    options = parser.parse_args()
    train, test = (read_mnist(options.data_dir, part) for part in ("train", "t10k"))
    learner = Learner(*train, NUM_EPOCHS, NUM_ITERATIONS, options.indexed, options.compiled)
    if options.one_step:
        print(f"First step: {learner.step(*next(learner.batches())).item():.2%}", flush=True)
        return
    for epoch in range(1, NUM_EPOCHS + 1):
        accuracy, test_accuracy = learner.train_epoch(), learner.accuracy(*test)
        print(f"Epoch {epoch}, Accuracy: {accuracy:.2%}, test {test_accuracy:.2%}", flush=True)
    print("--- Training completed! ---", flush=True)


if __name__ == "__main__":
    main()
