"""The algorithm of grpo_mnist.py in PyTorch, as PyTorch is usually written: what to compare with.

    python benchmarks/pytorch_grpo.py --data-dir DIR [--indexed] [--compiled]

The same network, data, defaults, update, and test; nothing is written. Batches come from a
DataLoader, or with --indexed out of one tensor; with --compiled the loss goes through
torch.compile. The four MNIST files are expected in DIR/downloads/manual.
"""

import gzip
import os
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

NUM_EPOCHS, BATCH_SIZE = 10, 1024
CLIP_EPSILON, LEARNING_RATE = 0.2, 3e-3


def read_mnist(data_dir, part):
    """Images and labels, from IDX files with headers of 16 and 8 bytes."""
    paths = sorted(Path(data_dir, "downloads", "manual").glob(f"{part}-*-ubyte.gz"))
    images, labels = (np.frombuffer(gzip.decompress(x.read_bytes()), np.uint8) for x in paths)
    return torch.tensor(images[16:]).reshape(-1, 784), torch.tensor(labels[8:]).int()


class Learner:
    """The actor, its optimizer, and an epoch of training."""

    def __init__(self, images, labels, num_iterations=4, indexed=False, compiled=False):
        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.data = TensorDataset(images, labels)
        self.steps = len(images) // BATCH_SIZE
        self.num_iterations, self.indexed = num_iterations, indexed
        self.actor = nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=LEARNING_RATE)
        num_updates = NUM_EPOCHS * self.steps * num_iterations
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_updates)
        self.loss = torch.compile(self.eager_loss) if compiled else self.eager_loss

    def batches(self):
        if not self.indexed:
            return DataLoader(self.data, BATCH_SIZE, shuffle=True, drop_last=True)
        order = torch.randperm(len(self.data)).split(BATCH_SIZE)[: self.steps]
        return (self.data[chosen] for chosen in order)

    def eager_loss(self, images, actions, old_log_probs, advantages):
        log_probs = Categorical(logits=self.actor(images)).log_prob(actions)
        ratio = torch.exp(log_probs - old_log_probs)
        clipped_ratio = ratio.clamp(1 - CLIP_EPSILON, 1 + CLIP_EPSILON)
        return -torch.minimum(advantages * ratio, advantages * clipped_ratio).mean()

    def train_epoch(self):
        """The mean reward of an epoch."""
        total_reward = 0
        for images, labels in self.batches():
            images, labels = images.to(self.device).float() / 255, labels.to(self.device)
            with torch.no_grad():
                policy = Categorical(logits=self.actor(images))
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
            total_reward += rewards.mean()  # It stays on the device.
        return total_reward.item() / self.steps

    @torch.no_grad()
    def accuracy(self, images, labels):
        answers = self.actor(images.to(self.device).float() / 255).argmax(dim=1)
        return (answers == labels.to(self.device)).float().mean().item()


def main(data_dir: Path, indexed: bool = False, compiled: bool = False):
    train, test = (read_mnist(data_dir, part) for part in ("train", "t10k"))
    learner = Learner(*train, indexed=indexed, compiled=compiled)
    for epoch in range(1, NUM_EPOCHS + 1):
        accuracy, test_accuracy = learner.train_epoch(), learner.accuracy(*test)
        print(f"Epoch {epoch}, Accuracy: {accuracy:.2%}, test {test_accuracy:.2%}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
