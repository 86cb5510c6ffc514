"""Teach a small network to read handwritten digits by trial and error, with GRPO.

The network looks at an image, guesses a digit, and hears "right" or "wrong"; it never
sees a label. Group Relative Policy Optimization (GRPO) turns that into a gradient: it is
PPO without the critic, where a guess counts as good if it did better than its group did
on average. One step on a batch:

    sample answers -> rewards -> group advantages -> several rounds of the PPO-clip loss

How this departs from the paper that introduced GRPO (DeepSeekMath, arXiv 2402.03300,
section 4.1), and why:

    group      there, G answers to one question; here, by default, one answer to each image
               of a batch, and the batch is the group. That is a good baseline, but blind to
               how hard an image is: batch-standardised REINFORCE in PPO's clothes
    KL term    there, always on, as the k3 estimate; here, off by default, and exact, since
               ten answers can be summed over
    episode    there, a text of many tokens; here, one guess, so that a ratio per token and a
               ratio per answer are the same thing
    reward     there, a learned reward model; here, a rule, as in DeepSeek-R1-Zero

    python grpo_mnist.py                      the defaults: MNIST, or digits without network
    python grpo_mnist.py --help               every flag
    python grpo_mnist.py --num-generations 8 --num-iterations 8 --learning-rate 2e-3

The defaults, 10 epochs of MNIST on two CPU cores: in the last epoch 97.8% of the sampled answers
are right, and then 97.2% of the test images, after 16 s in all (medians of five seeds;
benchmarks/results/accuracy.json).
"""

import argparse
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple


def stop_at_once(number, _):
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the progress bar has hidden the cursor
    os.write(2, f"grpo_mnist.py: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":  # before the slow imports, so that a signal during them is one line too
    signal.signal(signal.SIGINT, stop_at_once)
    signal.signal(signal.SIGTERM, stop_at_once)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tensorflow_probability.substrates.jax import distributions as tfd

# B images in a batch, G answers per image, A = 10 possible answers, K rounds per batch; S seeds.


# --- Actor: the policy ----------------------------------------------------------------------


class Network(nnx.Module):
    """in_features -> 128 -> ReLU -> 128 -> ReLU -> out_features, of float32 (B, in_features)."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.hidden_1 = nnx.Linear(in_features, 128, rngs=rngs)
        self.hidden_2 = nnx.Linear(128, 128, rngs=rngs)
        self.output = nnx.Linear(128, out_features, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.hidden_1(images))  # (B, 128)
        hidden = nnx.relu(self.hidden_2(hidden))  # (B, 128)
        return self.output(hidden)  # (B, out_features)


class Actor(Network):
    """The policy: for each of B images, grey values 0 to 1, a distribution over A answers.

    Network with a logit for each answer: 118,282 parameters for 784 features and 10 answers.
    """

    def __call__(self, images: jax.Array) -> tfd.Categorical:
        return tfd.Categorical(logits=super().__call__(images))


def sample_answers(policy, num_generations, key):
    """G answers to each image, drawn from its distribution -> int32 (B, G).

    By inverse transform sampling: the answer at which the probabilities, added up, pass a uniform
    random number. That takes one random number an answer; policy.sample takes ten.
    """
    cumulative = jnp.cumsum(policy.probs_parameter(), axis=1)  # (B, A)
    uniform = jax.random.uniform(key, (len(cumulative), num_generations, 1))
    return (uniform >= cumulative[:, None, :-1]).sum(axis=2)


def log_probs_of(policy, actions):
    """log pi(action | image) of actions int (B, G) -> float32 (B, G)."""
    log_probs = jax.nn.log_softmax(policy.logits)  # (B, A), once for all the answers
    return jnp.take_along_axis(log_probs, actions, axis=1)


class Critic(Network):
    """PPO's value network: the reward to expect for each of B images -> float32 (B, 1).

    Only baseline="critic" has one: 117,121 parameters more, what GRPO does without.
    """


# --- Rewards and advantages -----------------------------------------------------------------

BATCH, IMAGE = (0, 1), 1  # what makes up a group: these axes of rewards (B, G)


@jax.jit
def calculate_rewards(actions, labels):
    """1.0 for the right digit, else 0.0: actions int (B, G), labels int (B,) -> float32 (B, G)."""
    return (actions == labels[:, None]).astype(jnp.float32)


@partial(jax.jit, static_argnames=("baseline", "scale_rewards"))
def group_advantages(rewards, *, baseline, scale_rewards, expected_rewards=0.0):
    """How much better than expected each answer did: any real rewards (B, G) -> float32 (B, G).

    (r - baseline) / (deviation + 1e-8). "group" for both is GRPO (DeepSeekMath, arXiv 2402.03300,
    section 4.1.2; the 1e-8 is added), "loo" without deviation RLOO (arXiv 2402.14740), "group"
    without it Dr. GRPO (arXiv 2503.20783, section 3.2); with "batch" the batch is the group. "ema"
    and "critic" alone subtract expected_rewards: a moving average (), or values (B, 1). A group of
    equal rewards gets exactly 0 where its mean or deviation is used. ValueError for other names.

    The deviation is a population one (ddof=0), of the rewards before anything is subtracted. What
    is one number for all rewards that share a deviation leaves it as it is: taken after, it would
    be another only for "loo", and over a batch for "group" and "critic". The moving average of
    "ema" is one of rewards as they are; of rewards divided first it would be another.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    own_mean = rewards.mean(axis=IMAGE, keepdims=True)
    num_others = rewards.shape[1] - 1
    baselines = {
        "batch": rewards.mean(),
        "group": own_mean,
        "loo": own_mean - (rewards - own_mean) / num_others,  # the mean of the other answers
        "ema": expected_rewards,
        "critic": expected_rewards,
        "none": 0.0,
    }
    scales = {
        "batch": rewards.std() + 1e-8,
        "group": rewards.std(axis=IMAGE, keepdims=True) + 1e-8,
        "none": 1.0,
    }
    if baseline not in baselines or scale_rewards not in scales:
        raise ValueError(f"baseline {baseline!r} or scale_rewards {scale_rewards!r} is unknown")
    advantages = (rewards - baselines[baseline]) / scales[scale_rewards]
    # Equal rewards must give 0 even where rounding puts their mean beside them.
    for name, axes in (("batch", BATCH), ("group", IMAGE), ("loo", IMAGE)):
        if name in (baseline, scale_rewards):
            advantages = jnp.where(all_equal(rewards, axes), 0.0, advantages)
    return advantages


def all_equal(rewards, axes):
    """Whether a group has nothing to compare: rewards (B, G) -> bool (B, 1), or (1, 1) a batch."""
    return rewards.max(axes, keepdims=True) == rewards.min(axes, keepdims=True)


def average_over_signals(advantages):
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), without sampling anew.

    The loss is a mean over all answers and proportional to the advantages (B, G); divided by the
    share of the batch's images with an advantage other than 0, it is a mean over those images'
    answers. The terms for entropy and KL stay means over all images.
    """
    share = (advantages != 0).any(axis=1).mean()
    return advantages / jnp.maximum(share, 1 / len(advantages))


# --- Loss -----------------------------------------------------------------------------------


def ppo_clip_loss(log_probs, old_log_probs, advantages, clip_epsilon, clip_epsilon_high):
    """PPO's clipped surrogate, negated: three float arrays (B, G), two bounds -> a scalar.

    -mean(min(A r, A clip(r, 1 - epsilon, 1 + epsilon_high))) with r = pi / pi_old: PPO (arXiv
    1707.06347), equation 7; the second epsilon is from DAPO (arXiv 2503.14476), equation 10.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon_high)
    return -jnp.minimum(advantages * ratio, advantages * clipped_ratio).mean()


def kl_to_reference(policy, reference, actions, estimator):
    """Mean KL(policy || reference) in nats: two policies, actions int (B, G) -> a scalar.

    "exact" sums over the ten answers. "k3" estimates from the sampled ones (DeepSeekMath,
    equation 4): for answers of this very policy its value is unbiased, but the gradient of that
    is the gradient of KL(reference || policy), so the two do not train alike.
    """
    if estimator == "exact":
        return policy.kl_divergence(reference).mean()
    log_ratio = log_probs_of(reference, actions) - log_probs_of(policy, actions)
    return (jnp.exp(log_ratio) - log_ratio - 1).mean()


def value_loss(values, rewards):
    """The critic's squared error: values (B, 1), rewards (B, G) -> a scalar. PPO, equation 9.

    Without that equation's weight c1: actor and critic share no parameter, and the size of Adam's
    steps does not depend on the scale of a gradient.
    """
    return ((values - rewards) ** 2).mean()


# --- Training step --------------------------------------------------------------------------


class Networks(NamedTuple):
    """What is trained, each with gradients and Adam's moments of its own."""

    actor: Actor
    critic: Critic | None  # None unless baseline is critic


class TrainState(NamedTuple):
    """Everything that a training step replaces."""

    networks: Networks
    optimizer_state: optax.OptState
    reference: Actor | None  # None while beta is 0
    moving_average: jax.Array  # float32 (), of the batches' mean rewards; 0 at first
    key: jax.Array


class Rollout(NamedTuple):
    """A batch and what was sampled for it, fixed while the actor learns from it."""

    images: jax.Array  # float32 (B, 784)
    actions: jax.Array  # int32 (B, G)
    old_log_probs: jax.Array  # float32 (B, G)
    rewards: jax.Array  # float32 (B, G)
    advantages: jax.Array  # float32 (B, G)
    reference_logits: jax.Array | None  # float32 (B, A); None while beta is 0


@partial(jax.jit, static_argnames=("optimizer", "config"))
def create_train_state(key, *, optimizer, config):
    """A fresh actor, a critic if it is the baseline, a copy of the actor if there is a KL term."""
    key, actor_key, critic_key = jax.random.split(key, 3)
    actor = Actor(784, 10, rngs=nnx.Rngs(actor_key))
    critic = Critic(784, 1, rngs=nnx.Rngs(critic_key)) if config.baseline == "critic" else None
    reference = jax.tree.map(jnp.copy, actor) if config.beta > 0 else None
    networks = Networks(actor, critic)
    return TrainState(networks, optimizer.init(networks), reference, jnp.zeros(()), key)


def sample_rollout(state, images, labels, key, config):
    """Lets the actor answer each image G times: uint8 (B, 784), int32 (B,) -> a Rollout."""
    images = images.astype(jnp.float32) / 255  # (B, 784)
    actor, critic = state.networks
    policy = actor(images)
    actions = sample_answers(policy, config.num_generations, key)  # (B, G), from one forward pass
    rewards = calculate_rewards(actions, labels)
    advantages = group_advantages(
        rewards,
        baseline=config.baseline,
        scale_rewards=config.scale_rewards,
        expected_rewards=state.moving_average if critic is None else critic(images),
    )
    return Rollout(
        images,
        actions,
        old_log_probs=log_probs_of(policy, actions),
        rewards=rewards,
        advantages=average_over_signals(advantages) if config.dynamic_sampling else advantages,
        reference_logits=state.reference(images).logits if config.beta > 0 else None,
    )


def loss_fn(networks, rollout, config):
    """What an update lowers: a scalar, and the metrics of the update, scalars by name."""
    policy = networks.actor(rollout.images)
    log_probs = log_probs_of(policy, rollout.actions)  # (B, G)
    old_log_probs, advantages = rollout.old_log_probs, rollout.advantages
    epsilon_low, epsilon_high = config.clip_epsilon, config.upper_clip_epsilon
    loss = ppo_clip_loss(log_probs, old_log_probs, advantages, epsilon_low, epsilon_high)
    entropy = policy.entropy().mean()
    metrics = {"entropy": entropy}
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * entropy
    if config.beta > 0:
        reference = tfd.Categorical(logits=rollout.reference_logits)
        kl = kl_to_reference(policy, reference, rollout.actions, config.kl_estimator)
        loss = loss + config.beta * kl
        metrics["kl"] = kl
    if networks.critic is not None:
        loss = loss + value_loss(networks.critic(rollout.images), rollout.rewards)
    ratio = jnp.exp(log_probs - old_log_probs)
    metrics["loss"] = loss
    metrics["ratio_max"] = ratio.max()
    metrics["clip_ratio_low"] = ((ratio < 1 - epsilon_low) & (advantages < 0)).mean()
    metrics["clip_ratio_high"] = ((ratio > 1 + epsilon_high) & (advantages > 0)).mean()
    return loss, metrics


@partial(jax.jit, static_argnames=("optimizer", "config"))
def train_step(state, images, labels, *, optimizer, config):
    """One batch: sample, reward, compare, and K rounds of updates (DeepSeekMath, algorithm 1).

    images uint8 (B, 784), labels int32 (B,) -> the new state, metrics (scalars by name).
    """
    key, sampling_key = jax.random.split(state.key)
    rollout = sample_rollout(state, images, labels, sampling_key, config)
    pieces = jax.tree.map(lambda x: cut(x, config.num_minibatches), rollout)

    def update(state, index):
        minibatch = jax.tree.map(lambda x: x[:, index], pieces)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.networks, minibatch, config)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        metrics["grad_norm"] = optax.tree.norm(gradients.actor)
        metrics["learning_rate"] = optimizer_state.hyperparams["learning_rate"]
        networks = optax.apply_updates(state.networks, updates)
        return state._replace(networks=networks, optimizer_state=optimizer_state), metrics

    # After its use in the rollout: a baseline that knew this batch would bias the gradient.
    moving_average = 0.9 * state.moving_average + 0.1 * rollout.rewards.mean()
    state = state._replace(key=key, moving_average=moving_average)
    indices = jnp.tile(jnp.arange(config.num_minibatches), config.num_iterations)  # K rounds
    # Unrolled by four; where that is the whole step, XLA shares a forward pass with the sampling.
    state, metrics = jax.lax.scan(update, state, indices, unroll=4)
    metrics = {name: summarize(name, values) for name, values in metrics.items()}
    metrics["accuracy"] = rollout.rewards.mean()
    metrics["reward_std"] = rollout.rewards.std()
    axes = IMAGE if config.compares_answers else BATCH
    metrics["frac_reward_zero_std"] = all_equal(rollout.rewards, axes).mean()
    return state, metrics


def cut(x, num_minibatches):
    """(B, ...) -> (B / M, M, ...): piece [:, m] has every M-th image, on whatever device it is."""
    return x.reshape(-1, num_minibatches, *x.shape[1:])


def summarize(name, values):
    """One number for many of the same metric: their mean; of ratio_max, the maximum."""
    return values.max(axis=0) if name == "ratio_max" else values.mean(axis=0)


# --- Evaluation -----------------------------------------------------------------------------


@jax.jit
def predict(actor, images):
    """The likeliest answer to each image, and its probability: uint8 (N, 784) -> (N,), (N,)."""
    policy = actor(images.astype(jnp.float32) / 255)
    return policy.mode(), policy.probs_parameter().max(axis=-1)


# --- Config: one field per flag -------------------------------------------------------------


class UsageError(ValueError):
    """The user asked for something invalid: a flag, a directory (exit status 2)."""


class RunError(RuntimeError):
    """Something went wrong on the way: data, disk, numbers (exit status 1)."""


class Interrupted(Exception):
    """A signal asked the run to stop (128 + its number); arguments: the number, the directory."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does; a flag is a field with dashes.

    Raises UsageError, naming flag, value and rule, for a value of the wrong type, not finite or
    out of range, and for combinations that cannot work.
    """

    # What to read; auto is MNIST if it can be had, else scikit-learn's digits.
    dataset: Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"] = "auto"
    # Where the data are kept, as tensorflow-datasets does it; the default is $TFDS_DATA_DIR.
    data_dir: Path = dataclasses.field(
        default_factory=lambda: Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    )
    num_epochs: int = 10  # Passes over the training images.
    batch_size: int = 1024  # B, images per step; by default the group is all their answers.
    num_generations: int = 1  # G, answers sampled per image.
    num_iterations: int = 4  # K, rounds of the PPO-clip loss per batch (mu in the GRPO paper).
    num_minibatches: int = 1  # Minibatches per round, the same in each; one Adam update each.
    learning_rate: float = 3e-3  # Adam's step size, at the start of the schedule.
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # Cosine falls to 0 over the run.
    clip_epsilon: float = 0.2  # PPO's epsilon: beyond 1 +- epsilon, a ratio gains nothing more.
    clip_epsilon_high: float | None = None  # DAPO's epsilon for the upper bound; None: the same.
    # Subtracted from a reward: the mean over the batch, over the image's own answers (GRPO) or over
    # its other answers (RLOO), a moving average, a critic's value (PPO), or nothing (REINFORCE).
    baseline: Literal["batch", "group", "loo", "ema", "critic", "none"] = "batch"
    # Divides it: the standard deviation over the batch or over the image's own answers, or nothing
    # (Dr. GRPO).
    scale_rewards: Literal["batch", "group", "none"] = "batch"
    beta: float = 0.0  # Weight of KL(policy, reference), the reference being the actor at first.
    # Exact over the ten answers, or k3, estimated from sampled answers as LLM trainers must.
    kl_estimator: Literal["exact", "k3"] = "exact"
    ref_sync_epochs: int = 0  # Make the reference the current actor every so many epochs; 0: never.
    entropy_coef: float = 0.0  # Weight of a bonus for undecided answers.
    dynamic_sampling: bool = False  # DAPO: average over the groups that carry a signal only.
    seed: int = 0  # Decides the weights, the order of the images and every sampled answer.
    num_seeds: int = 1  # Independent runs, seed and those after it, in one compiled program.
    output_dir: Path | None = None  # Where to write; None: runs/<dataset>-<seed>-<time>.
    # Continue the run in this directory; its own config holds, and other flags may not contradict.
    resume: Path | None = None
    # Several hosts: host:port of process 0, how many processes there are, and which one this is,
    # from 0. On clusters that JAX knows, such as Slurm's, it finds out; 1 process then runs alone.
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if has_type(Path(), field.type) and isinstance(value, str | Path):
                object.__setattr__(self, field.name, Path(os.path.expanduser(value)))
            elif not has_type(value, field.type):
                raise UsageError(f"{flag(field.name)} {value!r} must be {field.type}")
        for name, allowed, rule in self.rules():
            if not allowed and (name in PLACE or not self.resume):
                raise UsageError(f"{flag(name)} {getattr(self, name)} must be {rule}")

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Yields (field, whether its value is allowed, what it must be)."""
        for name, value in vars(self).items():
            fits = not isinstance(value, int | float) or abs(value) < 3.4e38
            yield name, fits, "a finite number, within float32"
        for name in ("num_epochs", "batch_size", "num_generations", "num_iterations", "num_seeds"):
            yield name, getattr(self, name) >= 1, "1 or more"
        sizes = "--batch-size x --num-generations x --num-seeds is to stay below 2**31"
        answers = self.batch_size * self.num_generations
        yield "num_generations", answers * self.num_seeds < 2**31, f"smaller: {sizes}"
        alone = "2 or more: a group of one learns nothing"
        by_batch = "batch" in (self.baseline, self.scale_rewards)
        yield "batch_size", answers > 1 or not by_batch, alone
        several = self.num_generations > 1 or not self.compares_answers
        names = f"--baseline {self.baseline} with --scale-rewards {self.scale_rewards}"
        yield "num_generations", several, f"2 or more: {names} compares the answers to an image"
        useful = self.compares_answers or not self.dynamic_sampling
        groups = "--baseline is group or loo, or --scale-rewards group"
        yield "dynamic_sampling", useful, f"off unless {groups}"
        pieces = self.num_minibatches
        fits = pieces >= 1 and self.batch_size % pieces == 0
        yield "num_minibatches", fits, f"1 or more, and a divisor of --batch-size {self.batch_size}"
        updates = self.num_iterations * pieces
        yield "num_iterations", updates < 2**31, "smaller: it x --num-minibatches is below 2**31"
        yield "learning_rate", np.float32(self.learning_rate) > 0, "above 0, in float32 too"
        yield "clip_epsilon", 0 < self.clip_epsilon < 1, "above 0 and below 1"
        yield "clip_epsilon_high", self.upper_clip_epsilon > 0, "above 0"
        for name in ("beta", "ref_sync_epochs", "entropy_coef"):
            yield name, getattr(self, name) >= 0, "0 or more"
        for name, unused in (("kl_estimator", "exact"), ("ref_sync_epochs", 0)):
            useful = self.beta > 0 or getattr(self, name) == unused
            yield name, useful, f"{unused} while --beta is 0, which leaves the KL term out"
        yield "seed", 0 <= self.seed <= 2**32 - self.num_seeds, "0 or more, the last below 2**32"
        address, number, count = self.coordinator_address, self.process_id, self.num_processes
        fits = address is None or re.fullmatch(r".+:\d+", address)
        yield "coordinator_address", fits, "host:port"
        yield "num_processes", count is None or count >= 1, "1 or more"
        fits = number is None or 0 <= number < (count or math.inf)
        yield "process_id", fits, f"0 or more, and below --num-processes {count}"

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def compares_answers(self) -> bool:
        """Whether a group is the answers to one image, rather than those of a batch."""
        return bool({"group", "loo"} & {self.baseline, self.scale_rewards})

    @property
    def upper_clip_epsilon(self) -> float:
        """clip_epsilon_high, or clip_epsilon where that is None."""
        return self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high


# Fields that may be others when a run is resumed: its place affects the rounding at most.
PLACE = {"data_dir", "coordinator_address", "num_processes", "process_id"}


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def has_type(value: Any, annotation: Any) -> bool:
    """Whether a Config field may hold the value; a bool is not an int, but an int is a float."""
    kinds = typing.get_args(annotation) or (annotation,)
    if typing.get_origin(annotation) is Literal:
        return value in kinds
    is_path = isinstance(value, Path) and Path in kinds
    return is_path or type(value) in kinds or (type(value) is int and float in kinds)


# --- Main loop ------------------------------------------------------------------------------


def train(config: Config, signals: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Trains, printing and writing as it goes; returns the metrics of each epoch (see METRICS).

    Raises UsageError before anything is written, RunError if data, numbers or the disk fail, and
    Interrupted after the step during which a signal's number has appeared in signals (of several
    processes: soon after one of them gets SIGTERM). A run that has not ended otherwise is continued
    by config.resume, as if nothing had happened.
    """
    began = time.perf_counter()
    find_devices()
    if config.num_processes not in (None, jax.process_count()):
        raise UsageError(
            f"--num-processes {config.num_processes}, but JAX knows of {jax.process_count()}; call"
            " join_processes before anything else of JAX"
        )
    dataset_name = config.dataset
    if config.resume:
        config, dataset_name, history = config_to_resume(config, unsaid=Config())
        if (config.resume / "summary.json").exists():
            say(f"{config.resume}: this run is finished; nothing is left to do.")
            return history
    refuse_uneven_shares(config)
    reading = in_background(find_dataset(dataset_name, config.data_dir))
    state = create_state(config)  # XLA compiles while the data are read
    dataset = reading.result()
    steps_per_epoch = len(dataset.train_images) // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {len(dataset.train_images)}"
            f" training images of {dataset.name}; choose a smaller one"
        )
    num_steps = config.num_epochs * steps_per_epoch
    facts = describe_run(config, dataset)
    refuse_different_runs(config, facts)
    with open_output_dir(config, facts) as output_dir:
        announce(config, dataset, state, output_dir)
        run, newest = restore(config, state, facts)
        if config.resume and not newest:
            say("Resumed: from the start; there is no checkpoint yet")
        began -= run.seconds
        first_batch = next(batches(dataset, config, epoch=1))
        step = compile_step(run.state, first_batch, config, num_steps)
        done = len(run.history) * steps_per_epoch + len(run.step_metrics)
        stop = StopRequest(signals)
        with progress_bar(num_steps, done) as advance:
            while stop.go_on() and len(run.history) < config.num_epochs:
                run = train_epoch(run, step, dataset, config, advance, stop.go_on)
                run = run._replace(seconds=time.perf_counter() - began)
                if is_first_process():
                    newest = write_checkpoint(run, facts, output_dir, previous=newest)
                if not run.step_metrics:
                    report_epoch(run.history, config, output_dir)
        if stop.stopped_by:
            raise Interrupted(stop.stopped_by, output_dir)
        predictions = predict_all(run.state.networks.actor, dataset.test_images)
        if is_first_process():
            answers, confidences = jax.device_get(predictions)
            plot_curves(run.history, config, dataset, answers[0], confidences[0], output_dir)
            summary = summarize_run(run, config, dataset, time.perf_counter() - began)
            write_json(output_dir / "summary.json", summary)  # the last file: the run is finished
            announce_end(summary, output_dir)
    return run.history


def create_state(config: Config) -> TrainState:
    """A fresh state for S seeds, the same on every device; its arrays have a leading axis (S,)."""
    optimizer = create_optimizer(config, 1)  # the schedule's length is not in the state
    create_one = partial(create_train_state, optimizer=optimizer, config=config)

    def create(seeds):
        return for_each_seed(create_one, config.num_seeds)(jax.vmap(jax.random.key)(seeds))

    on_each_device, _ = shardings()
    # Compiles in half the time; elsewhere than on a processor it was not tried.
    quickly = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    create = jax.jit(create, out_shardings=on_each_device, compiler_options=quickly)
    return create(np.array(config.seeds, np.uint32))


def compile_step(state: TrainState, batch: tuple, config: Config, num_steps: int) -> Callable:
    """train_step for S seeds and all devices, as one program for such a state and such a batch.

    step(leaves of the state, images (S, B, 784), labels (S, B)) -> the leaves of the new state,
    metrics (S,) by name. It reuses the memory of the leaves: do not touch them again. Leaves, since
    taking the networks apart at every call costs more than the call. Each process has the batch
    whole, and hands its own devices' share of the images over.
    """
    optimizer = create_optimizer(config, num_steps)
    step_of_one = partial(train_step, optimizer=optimizer, config=config)
    step_of_all = for_each_seed(step_of_one, config.num_seeds)
    structure = jax.tree.structure(state)

    def step_on_leaves(leaves, images, labels):
        state, metrics = step_of_all(jax.tree.unflatten(structure, leaves), images, labels)
        return jax.tree.leaves(state), metrics

    on_each_device, by_image = shardings()
    jitted = jax.jit(
        step_on_leaves,
        donate_argnums=0,
        in_shardings=(on_each_device, by_image, by_image),
        out_shardings=on_each_device,
    )

    def share(x):
        return jax.make_array_from_callback(x.shape, by_image, x.__getitem__)

    compiled = jitted.lower(jax.tree.leaves(state), *map(share, batch)).compile()
    return lambda leaves, *batch: compiled(leaves, *map(share, batch))


@jax.jit
def predict_all(actor, images):
    """predict for S actors, of the same images: uint8 (N, 784) -> (S, N), (S, N)."""
    return jax.vmap(predict, in_axes=(0, None))(actor, images)


def for_each_seed(function: Callable, num_seeds: int) -> Callable:
    """vmap over the seeds; not for one alone, since XLA is slower at batches of products."""
    if num_seeds > 1:
        return jax.vmap(function)

    def for_one_seed(*arguments):
        results = function(*jax.tree.map(lambda x: x.squeeze(0), arguments))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), results)

    return for_one_seed


class Run(NamedTuple):
    """A run between two steps: what a checkpoint holds of it."""

    state: TrainState
    history: list[dict[str, Any]]  # of the finished epochs, see METRICS
    step_metrics: list[dict[str, Any]]  # of the steps of the epoch under way, (S,) by name
    epoch_seconds: float  # of the epoch under way
    seconds: float  # of the whole run


def train_epoch(run, step, dataset, config, advance, go_on) -> Run:
    """Trains to the end of the epoch under way, or until go_on says no after a step."""
    epoch, done = len(run.history) + 1, len(run.step_metrics)
    stream = itertools.islice(batches(dataset, config, epoch), done, None)
    state, step_metrics, seconds = stream_batches(step, run.state, stream, advance, go_on)
    seconds += run.epoch_seconds
    step_metrics = run.step_metrics + step_metrics
    metrics = average_over_steps(step_metrics)
    finished = len(step_metrics) == len(dataset.train_images) // config.batch_size
    if finished:
        answers, _ = predict_all(state.networks.actor, dataset.test_images)
        metrics["test_accuracy"] = np.mean(np.asarray(answers) == dataset.test_labels, axis=1)
    check_finite(metrics, state.networks, config, epoch)
    if not finished:
        return run._replace(state=state, step_metrics=step_metrics, epoch_seconds=seconds)
    record = epoch_record(metrics, config, epoch, seconds, len(step_metrics))
    state = sync_reference(state, config, epoch)
    return Run(state, [*run.history, record], [], epoch_seconds=0.0, seconds=run.seconds)


def stream_batches(
    step, state, stream, advance=lambda: None, go_on=lambda: True
) -> tuple[TrainState, list, float]:
    """Streams batches through the step, calling advance after each, while go_on says so.

    Returns the state, the metrics of each step, (S,) by name, and the seconds. The loop stays a few
    steps ahead of the device, which never waits, but not further: the progress bar tells the truth,
    and a signal need not wait for the rest of the epoch.
    """
    began = time.perf_counter()
    step_metrics = []
    leaves, structure = jax.tree.flatten(state)
    for images, labels in stream:
        leaves, metrics = step(leaves, images, labels)
        step_metrics.append(metrics)
        if len(step_metrics) % 4 == 0:
            jax.block_until_ready(step_metrics[-2])
        advance()
        if not go_on():
            break
    step_metrics = jax.device_get(step_metrics)
    return jax.tree.unflatten(structure, leaves), step_metrics, time.perf_counter() - began


def average_over_steps(step_metrics: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The metrics of an epoch, (S,) by name, from those of its steps."""
    return {
        name: summarize(name, np.array([step[name] for step in step_metrics], np.float32))
        for name in step_metrics[0]
    }


def create_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Adam; the learning rate stays, or falls to 0 along a cosine over the run's updates."""
    learning_rate = config.learning_rate
    if config.lr_schedule == "cosine":
        num_updates = num_steps * config.num_iterations * config.num_minibatches
        learning_rate = optax.cosine_decay_schedule(learning_rate, num_updates)
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


def sync_reference(state: TrainState, config: Config, epoch: int) -> TrainState:
    """Makes the reference the current actor, where the epoch that has ended is one for it."""
    if config.ref_sync_epochs == 0 or epoch % config.ref_sync_epochs:
        return state
    return state._replace(reference=jax.tree.map(jnp.copy, state.networks.actor))


def check_finite(metrics: dict, networks: Networks, config: Config, epoch: int) -> None:
    """Raises RunError, naming epoch, seed and quantity, if a number is no longer one."""
    finite = {name: np.isfinite(values) for name, values in metrics.items()}
    finite["the parameters"] = np.all(
        [np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in jax.tree.leaves(networks)], axis=0
    )
    for index, seed in enumerate(config.seeds):
        if wrong := [name for name in finite if not finite[name][index]]:
            raise RunError(
                f"epoch {epoch}, seed {seed}: not finite: {', '.join(wrong)}; what was"
                " written before stays; try another run with a smaller --learning-rate"
            )


# --- Devices and processes ------------------------------------------------------------------


def join_processes(config: Config) -> None:
    """Makes the processes of several hosts one run: those of the flags, or those that JAX detects.

    UsageError if the flags do not say enough, RunError if the processes do not meet.
    """
    if config.num_processes == 1:
        return
    flags = config.coordinator_address, config.num_processes, config.process_id
    requested = os.environ.get("JAX_COORDINATOR_ADDRESS") or flags != (None, None, None)
    initialize = partial(jax.distributed.initialize, *flags, heartbeat_timeout_seconds=30)
    try:
        with warnings.catch_warnings(action="ignore"):  # of clusters that JAX takes this for
            joining = in_background(initialize)
            if not wait([joining], timeout=3).done:
                print("Waiting for the other processes...", flush=True)
            joining.result(timeout=117)  # less than JAX's own limit, at which it would abort
    except TimeoutError as error:
        raise RunError(
            "not all processes have come in 2 minutes; see what they say, and start them again, or"
            " run alone with --num-processes 1"
        ) from error
    except Exception as error:
        if requested and isinstance(error, ValueError):
            raise UsageError(
                "--coordinator-address, --num-processes and --process-id belong together:"
                f" {first_line(error)}"
            ) from error
        alone = any(text in str(error) for text in ("should be defined", "must be called before"))
        if requested or not alone:
            raise RunError(
                f"the processes did not meet: {first_line(error)}; to run alone, say"
                " --num-processes 1"
            ) from error


def find_devices() -> list[jax.Device]:
    """Those of all processes; UsageError if the environment asks for one that is not there."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        raise UsageError(
            f"JAX finds no device with JAX_PLATFORMS={platforms}; unset it, or install JAX for it"
        ) from error


def is_first_process() -> bool:
    """Whether this process prints and writes: of several, the first alone does."""
    return jax.process_index() == 0


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """How arrays lie on all processes' devices: replicated; or split along axis 1, the images.

    Automatic axes: XLA itself finds where it must sum over all devices.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))


def refuse_uneven_shares(config: Config) -> None:
    """UsageError if the devices would not get as many images of a batch each."""
    num_devices, pieces = jax.device_count(), config.num_minibatches
    if config.batch_size % (num_devices * pieces):
        minibatches = f" in {pieces} minibatches" if pieces > 1 else ""
        raise UsageError(
            f"--batch-size {config.batch_size}{minibatches} cannot be divided among {num_devices}"
            f" devices; make it a multiple of {num_devices * pieces}, or hide some devices"
        )


def refuse_different_runs(config: Config, facts: dict[str, Any]) -> None:
    """RunError if process 0 has other flags, data, program or checkpoint than this one."""
    may_differ = PLACE | {"cores", "output_dir", "resume"}
    must_agree = {name: value for name, value in facts.items() if name not in may_differ}
    found = newest_checkpoint(config.resume) if config.resume else None
    checkpoint = found and (found[0].name, found[1])
    text = json.dumps([must_agree, checkpoint], sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if not np.array_equal(multihost_utils.broadcast_one_to_all(digest), digest):
        raise RunError(
            f"process {jax.process_index()} has other flags, data, versions, program or checkpoint"
            " than process 0; start all with the same"
        )


class StopRequest:
    """The signal after which to stop; asked after each step and each epoch whether to go on.

    Several processes stop after the same step, as JAX arranges it within a second or so once one of
    them gets SIGTERM.
    """

    def __init__(self, signals: Sequence[int]):
        self.signals, self.questions, self.stopped_by = signals, itertools.count(), None

    def go_on(self) -> bool:
        if jax.distributed.is_initialized():
            stop = multihost_utils.reached_preemption_sync_point(next(self.questions))
        else:
            stop = len(self.signals) > 0
        if stop:
            self.stopped_by = self.signals[0] if self.signals else signal.SIGTERM
        return self.stopped_by is None


# --- Data: files, verified; batches ---------------------------------------------------------


class DataUnavailable(RunError):
    """The files are neither on this machine nor to be had from the network."""


class Dataset(NamedTuple):
    """Images uint8 (N, 784), grey values 0 to 255; labels int32 (N,), 0 to 9."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Reads a data set, named as by its flag, from data_dir; downloads it there if it is missing.

    Raises DataUnavailable if it cannot be had (within 10 seconds if there is no network),
    RunError if a file is not what it should be, UsageError if data_dir is not a directory.
    """
    return find_dataset(name, Path(data_dir))()


def find_dataset(name: str, data_dir: Path) -> Callable[[], Dataset]:
    """Finds the files, or downloads them, and returns a function that checks and reads them.

    That function may be called in a thread, since it imports nothing: while tensorflow-datasets is
    being imported, it replaces Python's own import, and what JAX imports beside it may fail.
    """
    if name == "digits":
        return find_digits()
    try:
        return find_idx_files("mnist" if name == "auto" else name, data_dir)
    except DataUnavailable as reason:
        if name != "auto":
            raise
        say(f"NOTICE: {reason}")
        say("NOTICE: training on scikit-learn's small digits INSTEAD OF MNIST.")
        return find_digits()


def find_idx_files(name: str, data_dir: Path) -> Callable[[], Dataset]:
    """As find_dataset, for the four files of MNIST or of one of its relatives.

    tensorflow-datasets knows their addresses and checksums and keeps them; its own reader would
    need TensorFlow, so NumPy decodes them.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a directory; name another")
    downloads = data_dir / "downloads"
    url_infos = tfds.builder_cls(name).url_infos
    paths = {}
    for url, info in sorted(url_infos.items()):
        by_hand = downloads / "manual" / info.filename
        cached = downloads / name / get_dl_fname(url, info.checksum)
        paths[url] = by_hand if by_hand.exists() else cached
    here = [url for url in paths if paths[url].exists()]
    if missing := [url for url in paths if url not in here]:
        for url in here:  # checked before a network is asked for the others
            read_idx_file(paths[url], url, url_infos[url])
        download(name, missing, url_infos, downloads)
    return partial(read_idx_files, name, paths, url_infos)


def read_idx_files(name: str, paths: dict[str, Path], url_infos: dict[str, Any]) -> Dataset:
    """Reads four files, given by their addresses in order: those of the test set come first."""
    in_order = [read_idx_file(paths[url], url, url_infos[url]) for url in paths]
    images = [array.reshape(-1, 784) for array in in_order[::2]]
    labels = [array.astype(np.int32) for array in in_order[1::2]]
    return Dataset(name, images[1], labels[1], images[0], labels[0])


def download(name: str, urls: list[str], url_infos: dict[str, Any], downloads: Path) -> None:
    """Fetches files through tensorflow-datasets, which checks them, into its own cache.

    They arrive in a temporary directory, so that nothing half-written is ever found there.
    """
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    failures = (requests.RequestException, tfds.download.DownloadError, NonMatchingChecksumError)
    if not (failure := why_unreachable(urls[0])):
        (downloads / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as arriving:
            try:
                manager = tfds.download.DownloadManager(
                    download_dir=arriving, url_infos=url_infos, dataset_name=name
                )
                for url in urls:  # one by one: when one fails, no other is being written
                    manager.download(url)
                for path in Path(arriving, name).iterdir():
                    path.replace(downloads / name / path.name)
            except failures as error:
                failure = first_line(error)
    if failure:
        files = ", ".join(url_infos[url].filename for url in urls)
        raise DataUnavailable(
            f"{name} cannot be had: {failure}; connect to the network, or fetch {files} from"
            f" {os.path.dirname(urls[0])}/ and put them into {downloads / 'manual'}"
        )


def why_unreachable(url: str, seconds: float = 4.0) -> str | None:
    """None if the server answers in time, else the reason in a few words.

    Asked beforehand, since tensorflow-datasets retries for minutes and sets no timeout; asked in
    a thread, since looking up a name has none either.
    """
    import requests

    def ask() -> str | None:
        try:
            response = requests.head(url, timeout=seconds, allow_redirects=True)
        except OSError as error:  # which requests' own exceptions are
            return f"no connection to {url} ({type(error).__name__})"
        return None if response.ok else f"HTTP status {response.status_code} from {url}"

    try:
        return in_background(ask).result(timeout=seconds)
    except TimeoutError:
        return f"no answer from {url} in {seconds:.0f} s"


def in_background(function: Callable) -> Future:
    """Calls the function in a thread, which does not keep the program from ending."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def read_idx_file(path: Path, url: str, info: Any) -> np.ndarray:
    """Decodes a gzipped IDX file of bytes, if its SHA-256 is the registered one.

    IDX: two zero bytes, the element type, the number of dimensions, each dimension as a
    big-endian int32, the elements.
    """
    try:
        packed = path.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        found = f"{len(packed):,} bytes with SHA-256 {digest}"
    except OSError as error:
        digest, found = None, error.strerror
    if digest != info.checksum:
        raise RunError(
            f"{path} is not the file that it should be: expected {int(info.size):,} bytes with"
            f" SHA-256 {info.checksum}, found: {found}; remove it (another data set needs another"
            f" --data-dir) and run again, connected to the network or with {url} saved in its place"
        )
    content = gzip.decompress(packed)
    num_dimensions = content[3]
    shape = np.frombuffer(content, ">i4", num_dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def find_digits() -> Callable[[], Dataset]:
    """As find_dataset, for scikit-learn's digits."""
    from sklearn import datasets

    return partial(enlarge_digits, *datasets.load_digits(return_X_y=True))


def enlarge_digits(small_images: np.ndarray, labels: np.ndarray) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, enlarged to 24x24 in a margin of 2.

    The last 360 are the test set; the others are in the training set, in all 25 shifts of up to
    2 pixels.
    """
    images = np.kron(small_images.reshape(-1, 8, 8) * (255 / 16), np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = labels.astype(np.int32)
    shifts = list(itertools.product(range(-2, 3), repeat=2))
    shifted_images = [np.roll(images[:-360], shift, axis=(1, 2)) for shift in shifts]
    return Dataset(
        "digits",
        np.concatenate(shifted_images).reshape(-1, 784),
        np.tile(labels[:-360], len(shifts)),
        images[-360:].reshape(-1, 784),
        labels[-360:],
    )


def batches(dataset: Dataset, config: Config, epoch: int) -> Iterator[tuple]:
    """Yields an epoch's full batches, images (S, B, 784) and labels (S, B), of the training set.

    Each seed has an order of its own, which depends on (seed, epoch) alone. The images that do
    not fill a batch are left over, other ones in each epoch.
    """
    num_images = len(dataset.train_images)
    orders = [np.random.default_rng((seed, epoch)).permutation(num_images) for seed in config.seeds]
    for start in range(0, num_images - config.batch_size + 1, config.batch_size):
        chosen = np.stack([order[start : start + config.batch_size] for order in orders])
        yield dataset.train_images.take(chosen, axis=0), dataset.train_labels.take(chosen)


# --- Checkpoints ----------------------------------------------------------------------------

CHECKPOINT_FORMAT = 1  # to be raised with every change that this program could not read


def write_checkpoint(run: Run, facts: dict, output_dir: Path, previous: Path | None) -> Path:
    """Writes the run into checkpoints/, keeps the previous one beside it; returns its path.

    An .npz file with its SHA-256 at the end: the arrays of the state, and the rest as JSON. Not
    Orbax, which restores flipped bits without a word and does not fall back from a damaged step:
    the digest and the search would be needed all the same.
    """
    rest = run._replace(state=None)._asdict()
    header = {"format": CHECKPOINT_FORMAT, "facts": facts, "run": rest}
    content = io.BytesIO()
    text = json.dumps(header, default=np.ndarray.tolist)
    np.savez(content, header=text, **named_arrays(run.state))
    step = f"-step-{len(run.step_metrics)}" if run.step_metrics else ""
    path = output_dir / "checkpoints" / f"epoch-{len(run.history)}{step}.npz"
    write_file(path, content.getbuffer(), hashlib.sha256(content.getbuffer()).digest())
    for other in {*checkpoint_paths(output_dir), *path.parent.glob("epoch-*.npz.tmp")}:
        if other not in (path, previous):
            other.unlink()
    return path


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict, dict] | None:
    """The newest whole checkpoint of a run: its path, header, and arrays; None before the first.

    RunError if all are damaged or lost, UsageError if a newer program wrote the newest.
    """
    paths = checkpoint_paths(run_dir)
    for path in paths:
        content = b""
        with contextlib.suppress(OSError):  # what cannot be read is damaged, too
            content = path.read_bytes()
        packed, digest = content[:-32], content[-32:]
        if hashlib.sha256(packed).digest() == digest:
            arrays = dict(np.load(io.BytesIO(packed)))
            header = json.loads(str(arrays.pop("header")))
            if header["format"] > CHECKPOINT_FORMAT:
                raise UsageError(
                    f"{path} has format {header['format']}, and this program reads format"
                    f" {CHECKPOINT_FORMAT}; continue the run with the program that wrote it"
                )
            return path, header, arrays
    unfinished = not (run_dir / "summary.json").exists()
    if unfinished and (paths or (run_dir / "metrics.jsonl").exists()):
        damaged = ", ".join(path.name for path in paths) or "none is left"
        raise RunError(
            f"{run_dir / 'checkpoints'} holds no whole checkpoint ({damaged}); put one back, or"
            " start the run again in another --output-dir"
        )
    return None


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """The newest first."""
    names = {
        path: re.fullmatch(r"epoch-(\d+)(-step-(\d+))?\.npz", path.name)
        for path in (run_dir / "checkpoints").glob("*.npz")
    }
    position = {path: (int(name[1]), int(name[3] or 0)) for path, name in names.items() if name}
    return sorted(position, key=position.get, reverse=True)


def restore(config: Config, fresh: TrainState, facts: dict) -> tuple[Run, Path | None]:
    """The run as its newest whole checkpoint has it, and that one's path; or a fresh run.

    RunError if its arrays are not those that this program has.
    """
    found = newest_checkpoint(config.resume) if config.resume else None
    if found is None:
        return Run(fresh, [], [], epoch_seconds=0.0, seconds=0.0), None
    path, header, arrays = found
    paths = checkpoint_paths(config.resume)
    for damaged in paths[: paths.index(path)]:
        say(f"NOTICE: {damaged} does not match its SHA-256; it is damaged and not used.")
    if is_first_process():
        for old in paths[paths.index(path) + 2 :]:  # the run was stopped before it removed this one
            old.unlink()
    expected = named_arrays(fresh)
    shapes, expected_shapes = (
        {name: (x.shape, x.dtype) for name, x in each.items()} for each in (arrays, expected)
    )
    if shapes != expected_shapes:
        raise RunError(f"{path} holds other arrays than this program has; was it changed since?")
    state = jax.tree.unflatten(jax.tree.structure(fresh), [arrays[name] for name in expected])
    state = jax.device_put(state, shardings()[0])
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    run = Run(**header["run"])._replace(state=state)
    announce_restored(run, path, header["facts"], facts)
    write_history(run.history, config.resume)
    return run, path


def announce_restored(run: Run, path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Says from where the run goes on, and what is not as it was when it stopped."""
    last, metrics = len(run.history), path.parent.parent / "metrics.jsonl"
    if metrics.exists() and metrics.read_bytes().count(b"\n") > last:
        say(f"NOTICE: {metrics} knows of later epochs; they are trained again.")
    before, after = (each | each["versions"] for each in (then, now))
    for name in ("device", "cores", "xla_flags", "program_sha256", *now["versions"]):
        if after[name] != before.get(name):
            say(f"NOTICE: {name} was {before.get(name)}, is {after[name]}: results may differ.")
    steps = f" and {len(run.step_metrics)} steps" if run.step_metrics else ""
    say(f"Resumed: {last} of {then['num_epochs']} epochs{steps} are done, from {path}")


def named_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of a state by name, such as networks.actor.output.bias.value."""
    state = state._replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def config_to_resume(given: Config, unsaid: Config) -> tuple[Config, str, list[dict[str, Any]]]:
    """The config of the run in given.resume, the name of its data set, its finished epochs.

    UsageError if there is no run, if config.json and the newest checkpoint contradict each other,
    or if a field of given contradicts them, being neither as there nor as in unsaid. Only those of
    PLACE may be others.
    """
    run_dir = given.resume
    found = newest_checkpoint(run_dir)
    stored = read_config(run_dir / "config.json")
    facts = found[1]["facts"] if found else stored
    if facts is None:
        raise UsageError(f"--resume {run_dir} is not the directory of a run; name another")
    fields = {name: facts[name] for name in vars(given) if name in facts}
    config = Config(**fields | {"resume": run_dir})
    for name in vars(given).keys() - PLACE:
        value, said = getattr(config, name), getattr(given, name)
        if said not in (value, getattr(unsaid, name), run_dir):
            raise UsageError(
                f"{flag(name)} {said} contradicts {value}, which the run in {run_dir} has; leave"
                " the flag out, or start another run"
            )
        if stored and stored.get(name) != facts.get(name):
            raise UsageError(
                f"{run_dir}/config.json has {stored.get(name)} for {name}, and {found[0]}"
                f" {facts.get(name)}; they are of different runs, or edited: put the right one back"
            )
    place = {name: getattr(given, name) for name in PLACE}
    if given.data_dir == unsaid.data_dir and config.data_dir.exists():
        del place["data_dir"]
    config = dataclasses.replace(config, **place)
    return config, facts["trained_on"], found[1]["run"]["history"] if found else []


def read_config(path: Path) -> dict[str, Any] | None:
    """What is in config.json; None if that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_text())
        return facts if isinstance(facts, dict) else None


# --- Reporting ------------------------------------------------------------------------------

METRICS = (  # means over the epoch: of rewards over its batches, of the loss over its updates;
    # and means over the seeds
    "epoch",  # 1 is the first
    "accuracy",  # share of the sampled answers that were right: the mean reward
    "test_accuracy",  # share of the test images whose likeliest answer is right
    "seconds",  # of training alone
    "images_per_second",
    "loss",  # no measure of progress: with baseline batch, group or loo it is about 0 in a batch's
    # first round, whatever the actor knows; with a critic, its squared error is in it
    "reward_std",  # standard deviation of a batch's rewards
    "frac_reward_zero_std",  # share of the groups whose rewards are all equal; a group is a batch,
    # or the answers to an image if baseline or scale_rewards is group or loo
    "entropy",  # of the policy, in nats; ln 10 = 2.3 is pure guessing
    "kl",  # from the reference, in nats; null while beta is 0, since then there is none
    "ratio_max",  # the largest pi / pi_old of the epoch
    "clip_ratio_low",  # share of answers worse than expected (A < 0) and held at 1 - epsilon
    "clip_ratio_high",  # share of answers better than expected (A > 0) and held at 1 + epsilon
    "grad_norm",  # of the actor's gradients
    "learning_rate",
)


@contextlib.contextmanager
def open_output_dir(config: Config, facts: dict[str, Any]) -> Iterator[Path]:
    """Creates the run's directory with the facts in config.json, or opens the one to resume.

    Only the first process does; to others it yields what they were told. Keeps other runs out until
    it is left; the system takes the lock from a process that dies. UsageError if the directory
    cannot be written, holds another run, or is in use.
    """
    default_name = f"{facts['trained_on']}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    output_dir = config.resume or config.output_dir or Path("runs", default_name)
    if config.resume is config.output_dir is None and output_dir.exists():  # of the same second
        output_dir = Path(f"{output_dir}-{os.getpid()}")
    if not is_first_process():
        yield output_dir
        return
    said = f"{'--resume' if config.resume else '--output-dir'} {output_dir}"
    try:
        refuse_another_run(config, output_dir)
        checkpoints = output_dir / "checkpoints"
        new = [path for path in (checkpoints, *checkpoints.parents) if not path.exists()]
        checkpoints.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_directory(path.parent)
        lock = (output_dir / ".lock").open("a")
    except OSError as error:
        raise UsageError(f"{said} cannot be written ({error.strerror}); name another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{said} is in use by another run; wait for its end") from error
        refuse_another_run(config, output_dir)
        if read_config(output_dir / "config.json") is None:
            write_json(output_dir / "config.json", facts)
        yield output_dir


def refuse_another_run(config: Config, output_dir: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "curves.png", "summary.json", "checkpoints/*"):
        if not config.resume and any(output_dir.glob(name)):
            raise UsageError(
                f"--output-dir {output_dir} holds a run ({name}); name a new one, or continue that"
                f" with --resume {output_dir}"
            )


def describe_run(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What config.json holds: the fields of Config, and where and on what they were used."""
    fields = vars(config) | {"resume": None}
    facts = {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()}
    facts |= {"trained_on": dataset.name, "versions": library_versions()}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    program = Path(__file__).read_bytes()
    return facts | {
        "device": describe_devices(),
        "cores": len(cores),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "program_sha256": hashlib.sha256(program).hexdigest(),
    }


def announce(config: Config, dataset: Dataset, state: TrainState, output_dir: Path) -> None:
    """Says what is about to happen, before the first long wait."""
    num_images = len(dataset.train_images)
    steps, left_over = divmod(num_images, config.batch_size)
    sizes = training_state_bytes(state)  # a parameter has 4 bytes
    num_parameters, in_critic = (sizes[name]["weights"] // 4 for name in ("actor", "critic"))
    critic = f"{in_critic:,} parameters" if in_critic else "none"
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    say(f"Starting GRPO on {dataset.name} training...")
    say(f"Device: {describe_devices()}; {versions}")
    say(f"Actor: {num_parameters:,} parameters; critic: {critic}; {describe_seeds(config)}")
    say(f"Data: {num_images:,} training images, {len(dataset.test_images):,} test images")
    say(f"Epoch: {steps} steps of {config.batch_size} images; {left_over} images left over")
    say(f"Output: {output_dir}")


def describe_seeds(config: Config) -> str:
    if config.num_seeds == 1:
        return f"seed {config.seed}"
    return f"seeds {config.seeds[0]} to {config.seeds[-1]}: mean and 95% interval"


def epoch_record(metrics, config, epoch, seconds, num_steps) -> dict[str, Any]:
    """A line of metrics.jsonl, from the metrics (S,) by name."""
    figures = over_seeds(metrics)
    images_per_second = num_steps * config.batch_size * config.num_seeds / seconds
    figures |= {"epoch": epoch, "seconds": seconds, "images_per_second": images_per_second}
    return {name: figures.pop(name, None) for name in METRICS} | figures


def over_seeds(by_seed: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of figures (S,) by name; of several seeds also their values, and the 95% intervals.

    An interval is mean +- t * deviation (ddof=1) / sqrt(S), of Student's t distribution with S - 1
    degrees of freedom; interval_95 is what follows the +-.
    """
    by_seed = {name: np.asarray(values, np.float64) for name, values in by_seed.items()}
    figures = {name: values.mean().item() for name, values in by_seed.items()}
    num_seeds = len(by_seed["accuracy"])
    if num_seeds > 1:
        from scipy.special import stdtrit

        factor = stdtrit(num_seeds - 1, 0.975) / math.sqrt(num_seeds)
        figures["interval_95"] = {
            name: (factor * values.std(ddof=1)).item() for name, values in by_seed.items()
        }
        figures["by_seed"] = {name: values.tolist() for name, values in by_seed.items()}
    return figures


def percent(figures: dict[str, Any], name: str) -> str:
    """Such as "97.86%", or of several seeds "97.86% +- 0.09%"."""
    interval = f" +- {figures['interval_95'][name]:.2%}" if "interval_95" in figures else ""
    return f"{figures[name]:.2%}{interval}"


def report_epoch(history: list[dict[str, Any]], config: Config, output_dir: Path) -> None:
    """Prints the last epoch's line and brings metrics.jsonl up to date."""
    write_history(history, output_dir)
    last = history[-1]
    say(
        f"Epoch {last['epoch']}/{config.num_epochs}, Accuracy: {percent(last, 'accuracy')},"
        f" test {percent(last, 'test_accuracy')}, {last['seconds']:.2f} s,"
        f" {last['images_per_second']:,.0f} images/s"
    )


def write_history(history: list[dict[str, Any]], output_dir: Path) -> None:
    lines = [json.dumps(record) + "\n" for record in history]
    write_file(output_dir / "metrics.jsonl", "".join(lines).encode())


def summarize_run(run: Run, config: Config, dataset: Dataset, seconds: float) -> dict[str, Any]:
    """What summary.json holds; the seconds are those of the whole run."""
    actor, last = jax.device_get(run.state.networks.actor), run.history[-1]
    names = ("accuracy", "test_accuracy", "interval_95", "by_seed")
    figures = {"dataset": dataset.name, "num_epochs": config.num_epochs}
    figures |= {name: last[name] for name in names if name in last}
    if config.num_seeds > 1:
        actors = [jax.tree.map(lambda x, i=i: x[i], actor) for i in range(config.num_seeds)]
        hashes = {"params_sha256": [params_sha256(each) for each in actors]}
        figures["by_seed"] = last["by_seed"] | hashes
    return figures | {
        "seconds": seconds,
        "training_state_bytes": training_state_bytes(run.state),
        "params_sha256": params_sha256(actor),
    }


def announce_end(summary: dict[str, Any], output_dir: Path) -> None:
    accuracy, test_accuracy = percent(summary, "accuracy"), percent(summary, "test_accuracy")
    say("--- Training completed! ---")
    say(
        f"Accuracy {accuracy}, test accuracy {test_accuracy}"
        f" after {summary['num_epochs']} epochs and {summary['seconds']:.1f} s"
    )
    say(f"params_sha256: {summary['params_sha256']}")
    say(f"Learning curve: {output_dir / 'curves.png'}")


def plot_curves(history, config, dataset, answers, confidences, output_dir: Path) -> None:
    """Draws curves.png: accuracy by epoch, of several seeds with the 95% interval as a band; and
    twelve wrong test answers of the first seed, from sure to doubtful.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes = left.subplots()
    for name, style, label in (
        ("accuracy", "o-", "training images, sampled answers"),
        ("test_accuracy", "s--", "test images, likeliest answer"),
    ):
        epochs = [record["epoch"] for record in history]
        mean = np.array([100 * record[name] for record in history])
        axes.plot(epochs, mean, style, label=label)
        if config.num_seeds > 1:
            margin = np.array([100 * record["interval_95"][name] for record in history])
            axes.fill_between(epochs, mean - margin, mean + margin, alpha=0.25)
    title = f"GRPO on {dataset.name}, {describe_seeds(config)}"
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    wrong = np.flatnonzero(answers != dataset.test_labels)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")]
    shown = wrong[:: max(1, -(-len(wrong) // 12))]
    counts = f"{len(wrong):,} of {len(answers):,}"
    right.suptitle(f"Seed {config.seed}: {counts} test images wrong; some, surest first")
    for axes, index in itertools.zip_longest(right.subplots(3, 4).flat, shown):
        axes.axis("off")
        if index is not None:
            axes.imshow(dataset.test_images[index].reshape(28, 28), cmap="gray_r")
            truth, answer = dataset.test_labels[index], answers[index]
            axes.set_title(f"{truth}: said {answer}, {confidences[index]:.0%}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture)
    write_file(output_dir / "curves.png", picture.getvalue())


def training_state_bytes(state: TrainState) -> dict[str, Any]:
    """Bytes that training keeps for each seed: weights, their gradients, Adam's two moments."""
    first, second = (optax.tree.get(state.optimizer_state, name) for name in ("mu", "nu"))

    def count(tree: Any) -> int:
        return sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(tree))

    sizes = {}
    for name, network in state.networks._asdict().items():
        adam = count(getattr(first, name)) + count(getattr(second, name))
        sizes[name] = {"weights": count(network), "gradients": count(network), "adam": adam}
    sizes["reference"] = {"weights": count(state.reference)}
    return sizes | {"total": sum(sum(parts.values()) for parts in sizes.values())}


def params_sha256(actor: Actor) -> str:
    """SHA-256 over the bytes of the parameters, in the order of their names, all seeds in each."""
    parameters = jax.device_get(jax.tree.leaves(actor))
    return hashlib.sha256(b"".join(x.tobytes() for x in parameters)).hexdigest()


@contextlib.contextmanager
def progress_bar(num_steps: int, done: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; draws on a terminal, and nothing into a pipe."""
    columns = TextColumn("Training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    seen = is_first_process() and sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, transient=True, refresh_per_second=4, disable=not seen) as progress:
        task = progress.add_task("", total=num_steps, completed=done)
        yield lambda: progress.advance(task)


def library_versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "tfp-nightly", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def describe_devices() -> str:
    """Such as "1 x cpu", or "4 x cpu of 2 processes"."""
    devices, processes = find_devices(), jax.process_count()
    together = f" of {processes} processes" if processes > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{together}"


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=2).encode() + b"\n")


def write_file(path: Path, *chunks: Any) -> None:
    """Writes a file whole or not at all, and on the disk before it returns.

    Under another name first, so that its content is there before its name is. Of several processes,
    only the first does.
    """
    if not is_first_process():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror}; once it can, go on with --resume"
        ) from error


def sync_directory(path: Path) -> None:
    """Brings the names in a directory onto the disk."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def say(line: str) -> None:
    if is_first_process():
        print(line, flush=True)


# --- main: flags in, exit status out --------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the program. 0: done, 1: failed, 2: invalid flags, 130: Ctrl-C, 143: SIGTERM."""
    signals = []

    def note(number, frame):
        if signals:  # a second one does not wait for the step
            stop_at_once(number, frame)
        signals.append(number)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    before = {}
    try:
        config = parse_flags(argv)
        join_processes(config)
        # With several processes JAX watches for SIGTERM itself, and tells the others.
        joined = jax.distributed.is_initialized()
        for number in (signal.SIGINT,) if joined else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
        train(config, signals)
        return 0
    except Interrupted as interruption:
        number, run_dir = interruption.args
        command = shlex.join([sys.executable, sys.argv[0], "--resume", str(run_dir)])
        if jax.distributed.is_initialized():
            command += " on every host, with its own three flags"
        further = f"go on with: {command}" if is_first_process() else "so did the others"
        return complain(f"stopped by {signal.Signals(number).name}; {further}", 128 + number)
    except UsageError as error:
        return complain(error, status=2)
    except BrokenPipeError as error:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return complain(error, status=1)
    except (RunError, OSError, UnicodeError) as error:
        return complain(error, status=1)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        remedy = "if memory ran out, lower --batch-size or --num-generations"
        if jax.distributed.is_initialized():
            remedy += "; if another process has ended, see why, and start all again, with --resume"
        return complain(f"{first_line(error)}; {remedy}", status=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_flags(argv: list[str] | None) -> Config:
    """Flags to Config; with --resume, what they leave unsaid is as in the run to continue.

    tyro explains a mistake in a box; this raises its first sentence.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?", type=os.path.expanduser)
    run_dir = finder.parse_known_args(argv)[0].resume
    unsaid = Config(resume=run_dir)
    if run_dir:
        unsaid, *_ = config_to_resume(unsaid, unsaid)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = tyro.cli(Config, args=argv, default=unsaid, description=first_line(__doc__))
        return config_to_resume(config, unsaid)[0] if run_dir else config
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
    lines = (line.strip("| \u2502") for line in box.getvalue().splitlines()[1:])
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("-\u2500"), lines))
    raise UsageError(sentence.removeprefix("Error parsing Config: ") + " (see --help)")


def complain(error: object, status: int) -> int:
    """Prints one line on standard error and hands the exit status through."""
    print(f"grpo_mnist.py: {first_line(error)}", file=sys.stderr, flush=True)
    return status


def first_line(error: object) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status in (1, 2) and jax.distributed.is_initialized():  # else it waits for the others
        os._exit(status)
    sys.exit(status)
