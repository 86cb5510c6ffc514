"""Teach a small network to read handwritten digits by trial and error, with GRPO.

The network looks at an image, answers with a digit, and hears "right" or "wrong"; it never sees a
label. Group Relative Policy Optimization (GRPO) turns that into a gradient. It is PPO without the
critic: an answer counts as good if it did better than its group did on average. One step:

    sample answers -> rewards -> group advantages -> K rounds of the PPO-clip loss

B is the number of images in a batch, G of answers per image, A = 10 of possible answers.

            the paper that introduced GRPO (*)   here
    group   G answers to one question            the answers to all images of a batch, or with
                                                 --baseline group the G answers to an image
    KL      always, estimated by k3              off by default; the exact sum
    answer  a text of many tokens                one digit, and so one ratio
    reward  a learned model                      a rule, as in DeepSeek-R1-Zero

(*) DeepSeekMath, arXiv 2402.03300, section 4.1. The default, with the batch as group, is REINFORCE
on batch-standardised rewards with PPO's clip; it does not see how hard an image is. 10 epochs of
MNIST take 16 s on two CPU cores (medians of five seeds): 97.8% of the sampled answers of the last
epoch are right, and 97.2% of the test images.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing.pool
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

if __name__ == "__main__":  # A signal during the slow imports ends the program at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import requests
import tensorflow_datasets as tfds
import tyro
from filelock import FileLock, Timeout
from flax import nnx
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import Progress
from tensorflow_probability.substrates.jax import distributions as tfd

# --- Policy ---------------------------------------------------------------------------------


class Network(nnx.Module):
    """in_features -> 128 -> ReLU -> 128 -> ReLU -> out_features; takes float32 (B, in_features)."""

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

    It has 118,282 parameters for 784 features and 10 answers.
    """

    def __call__(self, images: jax.Array) -> tfd.Categorical:
        return tfd.Categorical(logits=super().__call__(images))


class Critic(Network):
    """PPO's value network, 117,121 parameters: the reward to expect for B images -> (B, 1)."""


def sample_answers(policy, num_generations, key):
    """Draws G answers to each image from the policy -> int32 (B, G).

    By inverse transform sampling: the answer is the number of cumulative probabilities that are at
    most a uniform random number. policy.sample would draw ten random numbers per answer.
    """
    cumulative = jnp.cumsum(policy.probs_parameter(), axis=1)  # (B, A)
    uniform = jax.random.uniform(key, (len(cumulative), num_generations, 1))  # (B, G, 1)
    return (uniform >= cumulative[:, None, :-1]).sum(axis=2)


def log_probs_of(policy, actions):
    """log pi(action | image) of actions int (B, G) -> float32 (B, G)."""
    log_probs = jax.nn.log_softmax(policy.logits)  # (B, A)
    return jnp.take_along_axis(log_probs, actions, axis=1)


# --- Rewards and advantages -----------------------------------------------------------------


@jax.jit
def calculate_rewards(actions, labels):
    """1.0 for the right digit, else 0.0: actions int (B, G), labels int (B,) -> float32 (B, G)."""
    return (actions == labels[:, None]).astype(jnp.float32)


# The axes of rewards (B, G) over which a group extends: the batch, or the answers to an image.
BATCH, IMAGE = (0, 1), 1


class Statistic(NamedTuple):
    """A baseline or a scale: a function of rewards (B, G), and the group over which it is taken.

    In a group whose rewards are all equal, the advantages are exactly 0.
    """

    function: Callable  # Its result broadcasts to (B, G).
    group: Any  # BATCH, IMAGE, or None if it compares no rewards


def mean_of_others(rewards, expected):
    """The mean of the image's other G - 1 rewards, in terms of the mean of all G -> (B, G)."""
    mean = rewards.mean(axis=IMAGE, keepdims=True)
    return mean - (rewards - mean) / (rewards.shape[IMAGE] - 1)


BASELINES = {  # What is subtracted from a reward; expected is a moving average, or V(image).
    "batch": Statistic(lambda rewards, expected: rewards.mean(), BATCH),
    "group": Statistic(lambda rewards, expected: rewards.mean(IMAGE, keepdims=True), IMAGE),  # GRPO
    "loo": Statistic(mean_of_others, IMAGE),  # RLOO: "leave one out"
    "ema": Statistic(lambda rewards, expected: expected, None),
    "critic": Statistic(lambda rewards, expected: expected, None),  # PPO
    "none": Statistic(lambda rewards, expected: 0.0, None),  # REINFORCE
}
SCALES = {  # What the difference is divided by.
    "batch": Statistic(lambda rewards: rewards.std() + 1e-8, BATCH),
    "group": Statistic(lambda rewards: rewards.std(IMAGE, keepdims=True) + 1e-8, IMAGE),
    "none": Statistic(lambda rewards: 1.0, None),  # Dr. GRPO
}


@partial(jax.jit, static_argnames=("baseline", "scale_rewards"))
def group_advantages(rewards, *, baseline, scale_rewards, expected_rewards=0.0):
    """How much better than expected each answer did: any real rewards (B, G) -> float32 (B, G).

    (reward - baseline) / scale, by the tables above. "group" for both is GRPO (DeepSeekMath, arXiv
    2402.03300, section 4.1.2, which has no 1e-8), "group" without scale Dr. GRPO (arXiv 2503.20783,
    section 3.2), "loo" without scale RLOO (arXiv 2402.14740). expected_rewards is the moving
    average () of "ema", or the values (B, 1) of "critic".

    Deviations are population ones (ddof=0), of the rewards before the subtraction: afterwards, they
    would be others for "critic", "loo" and, over a batch, "group". The average of "ema" is one of
    rewards before the division. KeyError for an unknown name, ValueError for another shape.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have the shape (B, G), not {rewards.shape}")
    base, scale = BASELINES[baseline], SCALES[scale_rewards]
    advantages = (rewards - base.function(rewards, expected_rewards)) / scale.function(rewards)
    for group in (base.group, scale.group):
        if group is not None:  # Without this, a rounding error would be divided by 1e-8.
            advantages = jnp.where(all_equal(rewards, group), 0.0, advantages)
    return advantages


def all_equal(rewards, group):
    """Whether the rewards (B, G) of a group are all equal -> bool (B, 1), or (1, 1) for BATCH."""
    return rewards.max(group, keepdims=True) == rewards.min(group, keepdims=True)


def average_over_signals(advantages):
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), without sampling anew.

    An image carries a signal if its rewards differ, so that its advantages are not 0. The clipped
    loss is a mean over all answers and proportional to the advantages (B, G). Divided by the share
    of images with a signal, it is a mean over their answers.
    """
    share = (advantages != 0).any(axis=1).mean()
    return advantages / jnp.maximum(share, 1 / len(advantages))  # not 0 / 0 without any signal


# --- Loss -----------------------------------------------------------------------------------


def ppo_clip_loss(log_probs, old_log_probs, advantages, clip_epsilon, clip_epsilon_high):
    """PPO's clipped surrogate, negated: three float arrays (B, G), two bounds -> a scalar.

    PPO (arXiv 1707.06347), equation 7, with ratio = pi / pi_old; the second epsilon is from DAPO
    (arXiv 2503.14476), equation 10.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon_high)
    return -jnp.minimum(advantages * ratio, advantages * clipped_ratio).mean()


def kl_to_reference(policy, reference, actions, estimator):
    """Mean KL(policy || reference) in nats: two policies, actions int (B, G) -> a scalar.

    "exact" sums over the ten answers. "k3" is DeepSeekMath's estimate from the sampled answers
    (equation 4). For answers of the policy itself its value is unbiased, but its expected gradient
    is that of KL(reference || policy), so the two do not train alike.
    """
    if estimator == "exact":
        return policy.kl_divergence(reference).mean()
    log_ratio = log_probs_of(reference, actions) - log_probs_of(policy, actions)
    return (jnp.exp(log_ratio) - log_ratio - 1).mean()


def value_loss(values, rewards):
    """The critic's squared error: values (B, 1), rewards (B, G) -> a scalar. PPO, equation 9."""
    return ((values - rewards) ** 2).mean()


# --- One training step ----------------------------------------------------------------------


class Networks(NamedTuple):
    """What is trained; each network has its own gradients and Adam moments."""

    actor: Actor
    critic: Critic | None  # None unless the baseline is "critic"


class TrainState(NamedTuple):
    """What training carries from one step to the next."""

    networks: Networks
    optimizer_state: optax.OptState
    reference: Actor | None  # None while beta is 0
    moving_average: jax.Array  # float32 (), of the batches' mean rewards; it starts at 0
    key: jax.Array


class Rollout(NamedTuple):
    """A batch and what was sampled for it, fixed while the actor learns from it."""

    images: jax.Array  # float32 (B, 784)
    actions: jax.Array  # int32 (B, G)
    old_log_probs: jax.Array  # float32 (B, G)
    rewards: jax.Array  # float32 (B, G)
    advantages: jax.Array  # float32 (B, G)
    reference_logits: jax.Array | None  # float32 (B, A); None while beta is 0


def sample_rollout(state, images, labels, key, config):
    """Lets the actor answer each image G times: uint8 (B, 784), int32 (B,) -> a Rollout."""
    images = images.astype(jnp.float32) / 255
    actor, critic = state.networks
    policy = actor(images)
    actions = sample_answers(policy, config.num_generations, key)  # (B, G), from one forward pass
    rewards = calculate_rewards(actions, labels)
    advantages = group_advantages(
        rewards,
        baseline=config.baseline,
        scale_rewards=config.scale_rewards,
        # Only "ema" and "critic" use it.
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
    """The loss of a minibatch, a scalar, and its metrics, scalars by name."""
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
    """One batch: a rollout, then K rounds of updates (DeepSeekMath, algorithm 1).

    images uint8 (B, 784), labels int32 (B,) -> the new state, metrics (scalars by name).
    """
    key, sampling_key = jax.random.split(state.key)
    rollout = sample_rollout(state, images, labels, sampling_key, config)
    M = config.num_minibatches
    # Minibatch m, [:, m] of (B / M, M, ...), is every M-th image: each device has as many of them.
    minibatches = jax.tree.map(lambda x: x.reshape(-1, M, *x.shape[1:]), rollout)

    def update(state, m):
        minibatch = jax.tree.map(lambda x: x[:, m], minibatches)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.networks, minibatch, config)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
        metrics["grad_norm"] = optax.tree.norm(gradients.actor)
        metrics["learning_rate"] = optimizer_state.hyperparams["learning_rate"]
        networks = optax.apply_updates(state.networks, updates)
        return state._replace(networks=networks, optimizer_state=optimizer_state), metrics

    # It is updated after the rollout, so that it does not depend on the answers that it judges.
    moving_average = 0.9 * state.moving_average + 0.1 * rollout.rewards.mean()
    state = state._replace(key=key, moving_average=moving_average)
    # K rounds over the minibatches, as a compiled loop; unroll=4 only makes it faster.
    indices = jnp.tile(jnp.arange(M), config.num_iterations)
    state, metrics = jax.lax.scan(update, state, indices, unroll=4)
    metrics = {name: summarize(name, values) for name, values in metrics.items()}
    metrics["accuracy"] = (rollout.actions == labels[:, None]).mean()
    metrics["reward"] = rollout.rewards.mean()
    metrics["reward_std"] = rollout.rewards.std()
    group = IMAGE if config.compares_answers else BATCH
    metrics["frac_reward_zero_std"] = all_equal(rollout.rewards, group).mean()
    return state, metrics


def summarize(name, values):
    """The mean over axis 0, but the maximum for ratio_max."""
    return values.max(axis=0) if name == "ratio_max" else values.mean(axis=0)


def predict(actor, images):
    """The likeliest answer to each image, and its probability: uint8 (N, 784) -> (N,), (N,)."""
    policy = actor(images.astype(jnp.float32) / 255)
    return policy.mode(), policy.probs_parameter().max(axis=-1)


# --- Config: one field per flag -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does; a flag is a field with dashes. UsageError for values that cannot work."""

    # What to read. auto is MNIST if it can be had, else scikit-learn's digits.
    dataset: Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"] = "auto"
    # Where tensorflow-datasets keeps its data. The default is $TFDS_DATA_DIR.
    data_dir: Path = dataclasses.field(
        default_factory=lambda: Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    )
    num_epochs: int = 10  # Passes over the training images.
    batch_size: int = 1024  # B, images per step.
    # G, answers sampled per image. None: 8 where the answers to an image are compared, else 1.
    num_generations: int | None = None
    num_iterations: int = 4  # K, rounds of the PPO-clip loss per batch (mu in the GRPO paper).
    num_minibatches: int = 1  # Pieces that a round is cut into, with an Adam update each.
    learning_rate: float = 3e-3  # Adam's step size, at the start of the schedule.
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # Cosine falls to 0 over the run.
    clip_epsilon: float = 0.2  # PPO's epsilon: ratios are clipped at 1 - epsilon and 1 + epsilon.
    clip_epsilon_high: float | None = None  # DAPO's epsilon for the upper bound. None: the same.
    # What is subtracted from a reward: the mean reward of the batch, of the image's own answers
    # (GRPO) or of its other answers (RLOO), a moving average, a critic's value (PPO), or nothing.
    baseline: Literal[*BASELINES] = "batch"
    # What the difference is divided by: the standard deviation of the rewards of the batch, or of
    # the image's own answers (GRPO), or nothing (Dr. GRPO).
    scale_rewards: Literal[*SCALES] = "batch"
    beta: float = 0.0  # Weight of KL(policy || reference). The reference is the initial actor.
    # Exact sums over the ten answers; k3 estimates from the sampled ones, as LLM trainers must.
    kl_estimator: Literal["exact", "k3"] = "exact"
    ref_sync_epochs: int = 0  # Make the current actor the reference every so many epochs. 0: never.
    entropy_coef: float = 0.0  # Weight of a bonus for the policy's entropy.
    dynamic_sampling: bool = False  # DAPO: average over the images whose answers carry a signal.
    seed: int = 0  # Decides the weights, the order of the images and every sampled answer.
    num_seeds: int = 1  # Independent runs, of this seed and those after it, in one program.
    output_dir: Path | None = None  # Where to write. None: runs/<dataset>-<seed>-<time>.
    resume: Path | None = None  # Continue the run in this directory, with the flags that it has.
    # Several hosts: host:port of process 0, or auto on clusters that JAX knows, such as Slurm's.
    coordinator_address: str | None = None
    num_processes: int | None = None  # Several hosts: the number of processes in all.
    process_id: int | None = None  # Several hosts: the number of this process, from 0.

    def __post_init__(self):
        complete_and_check(self)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def compares_answers(self) -> bool:
        """Whether a group is the answers to one image, rather than those of a batch."""
        return IMAGE in (BASELINES[self.baseline].group, SCALES[self.scale_rewards].group)

    @property
    def upper_clip_epsilon(self) -> float:
        return self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high


# --- Main loop ------------------------------------------------------------------------------
# S seeds are trained in one program: state, images and metrics have a leading axis (S,) here.


def train(config: Config, on_start: Callable[[Path], None] = lambda run_dir: None) -> list[dict]:
    """Trains, printing and writing on the way; returns the metrics of each epoch (see METRICS).

    Calls on_start with the run's directory once that is open. Raises UsageError before it writes
    any result, RunError if data, numbers or the disk fail. With config.resume, it continues a run.
    """
    began = time.perf_counter()
    start_jax(config)
    if config.resume:
        config = config_to_resume(config)
        if (config.resume / "summary.json").exists():
            say(f"{config.resume}: this run is finished; nothing is left to do.")
            return [json.loads(line) for line in (config.resume / "metrics.jsonl").open()]
    with multiprocessing.pool.ThreadPool(1) as pool:
        reading = pool.apply_async(load_dataset, (config.dataset, config.data_dir))
        state = create_state(config)  # This compiles while the data are read.
        dataset = reading.get()
    facts = describe_run(config, dataset)
    check_run(config, dataset, facts)
    steps = len(dataset.train_images) // config.batch_size  # in an epoch
    with open_run_dir(config, facts) as run_dir:
        on_start(run_dir)
        announce(config, facts, dataset, state, run_dir)
        state, history, earlier_seconds = restore(config, facts, state)
        began -= earlier_seconds  # as if it had not been interrupted
        step = compile_step(config, dataset, state)
        hidden = jax.process_index() > 0 or not (sys.stdout and sys.stdout.isatty())
        with Progress(transient=True, disable=hidden) as progress:
            bar = progress.add_task("Training", total=(config.num_epochs - len(history)) * steps)
            for epoch in range(len(history) + 1, config.num_epochs + 1):
                epoch_began, step_metrics = time.perf_counter(), []
                for images, labels in batches(config, dataset, epoch):
                    state, metrics = step(state, images, labels)
                    step_metrics.append(metrics)
                    progress.advance(bar)
                    if len(step_metrics) % 4 == 0:  # Stay only a few steps ahead of the device.
                        jax.block_until_ready(step_metrics[-2])
                history.append(end_epoch(config, dataset, state, epoch, epoch_began, step_metrics))
                if config.ref_sync_epochs and epoch % config.ref_sync_epochs == 0:
                    state = state._replace(reference=jax.tree.map(jnp.copy, state.networks.actor))
                write_checkpoint(facts, state, history, time.perf_counter() - began, run_dir)
                report_epoch(config, history, run_dir)
        end_run(config, dataset, state, history, began, run_dir)
    return history


def start_jax(config: Config) -> None:
    """Joins the processes of several hosts, if --coordinator-address asks for it; finds devices."""
    try:
        if config.coordinator_address is not None and not jax.distributed.is_initialized():
            print("Waiting for the other processes...", flush=True)
            address = None if config.coordinator_address == "auto" else config.coordinator_address
            join = partial(jax.distributed.initialize, heartbeat_timeout_seconds=30)
            flags = address, config.num_processes, config.process_id
            with multiprocessing.pool.ThreadPool(1) as pool:
                pool.apply_async(join, flags).get(timeout=120)  # JAX's own limit would abort.
        jax.devices()
    except multiprocessing.TimeoutError as error:
        raise RunError("not all processes came in 2 minutes; start all of them anew") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        platforms = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        reason = f"JAX finds no devices or processes, with {platforms}: {first_line(error)}"
        raise UsageError(f"{reason}; correct that, or the flags of several hosts") from error


def check_run(config: Config, dataset, facts: dict) -> None:
    """UsageError if the batch is larger than the data or cannot be divided among the devices;
    RunError if the processes differ in flags, data set, versions, devices, program or checkpoints.
    """
    size, num_devices = f"--batch-size {config.batch_size}", jax.device_count()
    if config.batch_size > len(dataset.train_images):
        images = f"{len(dataset.train_images)} training images of {dataset.name}"
        raise UsageError(f"{size} is more than the {images}; choose a smaller one")
    divisor = num_devices * config.num_minibatches
    if config.batch_size % divisor:
        pieces = f"{config.num_minibatches} minibatches on {num_devices} devices"
        raise UsageError(f"{size} cannot be divided into {pieces}; make it a multiple of {divisor}")
    must_agree = [facts[name] for name in facts if name not in (*PLACE_FIELDS, "cores")]
    if config.resume:
        must_agree += [path.name for path in checkpoint_paths(config.resume)]
    digest = hashlib.sha256(json.dumps(must_agree).encode()).digest()
    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError as error:
        what = "flags, data, versions, program or checkpoints"
        raise RunError(f"the processes differ in {what}; start all with the same") from error


def create_state(config: Config) -> TrainState:
    """A fresh state for S seeds, the same on every device."""

    def create(seed):
        key, actor_key, critic_key = jax.random.split(jax.random.key(seed), 3)
        actor = Actor(784, 10, rngs=nnx.Rngs(actor_key))
        critic = Critic(784, 1, rngs=nnx.Rngs(critic_key)) if config.baseline == "critic" else None
        reference = jax.tree.map(jnp.copy, actor) if config.beta > 0 else None
        networks = Networks(actor, critic)
        optimizer = create_optimizer(config, 1)  # The state does not depend on the schedule.
        return TrainState(networks, optimizer.init(networks), reference, jnp.zeros(()), key)

    # Less effort compiles in half the time. It was tried on CPUs only.
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    create = for_each_seed(create, config.num_seeds)
    on_each_device, _ = shardings()
    create = jax.jit(create, out_shardings=on_each_device, compiler_options=quick)
    return create(np.array(config.seeds, np.uint32))


def compile_step(config: Config, dataset, state: TrainState) -> Callable:
    """train_step for S seeds and all devices: step(state, images, labels) -> state, metrics (S,).

    It reuses the memory of the state that it is given. Each process has whole batches, uint8
    (S, B, 784) and int32 (S, B), and hands over the images of its own devices.
    """
    num_steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
    step = partial(train_step, optimizer=create_optimizer(config, num_steps), config=config)
    on_each_device, by_image = shardings()
    jitted = jax.jit(
        for_each_seed(step, config.num_seeds),
        donate_argnums=0,
        out_shardings=on_each_device,
    )

    def split(x):
        return jax.make_array_from_callback(x.shape, by_image, x.__getitem__)

    first_batch = next(batches(config, dataset, epoch=1))
    compiled = jitted.lower(state, *map(split, first_batch)).compile()
    return lambda state, *batch: compiled(state, *map(split, batch))


def create_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """Adam; the learning rate stays, or falls to 0 along a cosine over the run's updates."""
    learning_rate = config.learning_rate
    if config.lr_schedule == "cosine":
        num_updates = num_steps * config.num_iterations * config.num_minibatches
        learning_rate = optax.cosine_decay_schedule(learning_rate, num_updates)
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


def for_each_seed(function: Callable, num_seeds: int) -> Callable:
    """vmap over the seeds; not for one alone, since batched matrix products are slower."""

    def for_one_seed(*arguments):
        results = function(*jax.tree.map(lambda x: x.squeeze(0), arguments))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), results)

    return jax.vmap(function) if num_seeds > 1 else for_one_seed


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """How arrays lie on all devices: replicated; or split along axis 1, the images."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))


def batches(config: Config, dataset, epoch: int) -> Iterator[tuple]:
    """Yields an epoch's full batches, images (S, B, 784) and labels (S, B), of the training set.

    The order depends on (seed, epoch) alone. Images that do not fill a batch are left over.
    """
    num_images = len(dataset.train_images)
    orders = [np.random.default_rng((seed, epoch)).permutation(num_images) for seed in config.seeds]
    for start in range(0, num_images - config.batch_size + 1, config.batch_size):
        chosen = np.stack([order[start : start + config.batch_size] for order in orders])
        yield dataset.train_images.take(chosen, axis=0), dataset.train_labels.take(chosen)


predict_all = jax.jit(jax.vmap(predict, in_axes=(0, None)))  # -> (S, N), (S, N)


def end_epoch(config: Config, dataset, state, epoch, began, step_metrics) -> dict[str, Any]:
    """The epoch's line of metrics.jsonl. Waits for the device; RunError for numbers not finite."""
    by_step = jax.tree.map(lambda *values: np.array(values), *jax.device_get(step_metrics))
    seconds = time.perf_counter() - began
    metrics = {name: summarize(name, values) for name, values in by_step.items()}  # (S,) by name
    answers, _ = predict_all(state.networks.actor, dataset.test_images)
    metrics["test_accuracy"] = np.mean(np.asarray(answers) == dataset.test_labels, axis=1)
    for index, seed in enumerate(config.seeds):
        wrong = [name for name, values in metrics.items() if not np.isfinite(values[index])]
        if not all(np.isfinite(x[index]).all() for x in jax.tree.leaves(state.networks)):
            wrong.append("the parameters")
        if wrong:
            where = f"epoch {epoch}, seed {seed}: not finite: {', '.join(wrong)}"
            raise RunError(f"{where}; earlier checkpoints stay; try a smaller --learning-rate")
    images = len(step_metrics) * config.batch_size * config.num_seeds
    figures = {"epoch": epoch, "seconds": seconds, "images_per_second": images / seconds}
    figures |= over_seeds(metrics)
    return {name: figures.pop(name, None) for name in METRICS} | figures


# --- Data -----------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """Images uint8 (N, 784), grey values 0 to 255; labels int32 (N,), 0 to 9."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Reads a data set, named as by its flag, from data_dir; downloads it there if it is missing.

    Raises DataUnavailable if it cannot be had (within 10 seconds if there is no network), RunError
    if a file is not what it should be, UsageError if data_dir is not a directory.
    """
    if name == "digits":
        return load_digits()
    try:
        return load_idx_files("mnist" if name == "auto" else name, Path(data_dir))
    except DataUnavailable as reason:
        if name != "auto":
            raise
        say(f"NOTICE: {reason}")
        say("NOTICE: training on scikit-learn's small digits INSTEAD OF MNIST.")
        return load_digits()


def load_idx_files(name: str, data_dir: Path) -> Dataset:
    """Reads the four files of MNIST or of one of its relatives.

    tensorflow-datasets knows their addresses, checksums and places, but its own reader would need
    TensorFlow, so NumPy decodes them. Files put into downloads/manual by hand come first.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a directory; name another")
    downloads, url_infos = data_dir / "downloads", tfds.builder_cls(name).url_infos
    paths = {}
    for url, info in sorted(url_infos.items()):  # The test set's files come first.
        kept = downloads / name / tfds.core.download.resource.get_dl_fname(url, info.checksum)
        by_hand = [downloads / "manual" / folder / info.filename for folder in (name, "")]
        paths[url] = next((path for path in by_hand if path.exists()), kept)
    present = [url for url in paths if paths[url].exists()]
    packed = {url: read_file(paths[url], url, url_infos[url]) for url in present}
    for url in sorted(paths.keys() - packed.keys()):
        try:
            packed[url] = download(url, url_infos[url].checksum)
        except DataUnavailable as error:
            files = ", ".join(url_infos[each].filename for each in paths if each not in packed)
            source, target = os.path.dirname(url), downloads / "manual" / name
            remedy = f"connect to the network, or fetch {files} from {source}/ into {target}"
            raise DataUnavailable(f"{name} cannot be had: {error}; {remedy}") from error
        paths[url].parent.mkdir(parents=True, exist_ok=True)
        arriving = paths[url].with_name(f"{paths[url].name}.{os.getpid()}")  # It may come twice.
        write_file(arriving, packed[url])
        arriving.replace(paths[url])
    # In the IDX format, 16 bytes come before the pixels, and 8 before the labels.
    contents = [np.frombuffer(gzip.decompress(packed[url]), np.uint8) for url in paths]
    test_images, train_images = (pixels[16:].reshape(-1, 784) for pixels in contents[::2])
    test_labels, train_labels = (labels[8:].astype(np.int32) for labels in contents[1::2])
    return Dataset(name, train_images, train_labels, test_images, test_labels)


def read_file(path: Path, url: str, info: Any) -> bytes:
    """The content of a file; RunError if its SHA-256 is not the registered one."""
    content = path.read_bytes() if path.is_file() else b""
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != info.checksum:
        expected = f"expected {int(info.size):,} bytes with SHA-256 {info.checksum}"
        found = f"found: {len(content):,} bytes with SHA-256 {sha256}"
        remedy = f"remove it, or put {url} there (other data sets belong in manual/<dataset>)"
        raise RunError(f"{path} is not the file that it should be: {expected}, {found}; {remedy}")
    return content


def download(url: str, sha256: str) -> bytes:
    """Fetches a file; DataUnavailable if it is not the one with that SHA-256."""
    try:  # In threads: looking up a name has no time limit, and those of requests are per read.
        with multiprocessing.pool.ThreadPool(2) as pool:
            asking = pool.apply_async(requests.get, (url,), {"stream": True, "timeout": 3})
            response = asking.get(timeout=7)
            content = pool.apply_async(lambda: response.content).get(timeout=300)
    except (OSError, multiprocessing.TimeoutError) as error:  # Those of requests are OSErrors.
        raise DataUnavailable(f"no answer from {url} ({type(error).__name__})") from error
    if not response.ok:
        raise DataUnavailable(f"HTTP status {response.status_code} from {url}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataUnavailable(f"{url} sent another file, of {len(content):,} bytes")
    return content


def load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, enlarged to 24x24 in a margin of 2.

    The last 360 are the test set; the others, in all 25 shifts of up to 2 pixels, are for training.
    """
    from sklearn import datasets

    small_images, labels = datasets.load_digits(return_X_y=True)
    images = np.kron(small_images.reshape(-1, 8, 8) * (255 / 16), np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    labels = labels.astype(np.int32)
    shifts = list(itertools.product(range(-2, 3), repeat=2))
    shifted = np.concatenate([np.roll(images[:-360], shift, axis=(1, 2)) for shift in shifts])
    train = shifted.reshape(-1, 784), np.tile(labels[:-360], len(shifts))
    return Dataset("digits", *train, images[-360:].reshape(-1, 784), labels[-360:])


# --- Run directory and checkpoints ----------------------------------------------------------

CHECKPOINT_FORMAT = 2  # Raise it with every change that older programs cannot read.
HOST_FIELDS = ("coordinator_address", "num_processes", "process_id")
PLACE_FIELDS = (*HOST_FIELDS, "data_dir", "output_dir", "resume")  # They may change on resuming.


@contextlib.contextmanager
def open_run_dir(config: Config, facts: dict) -> Iterator[Path]:
    """Creates the run's directory, or opens the one to resume, and writes config.json.

    Of several processes, only the first does. A lock keeps other runs out; the system frees it when
    a process dies. UsageError if the directory cannot be written, holds another run, or is in use.
    """
    second = int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(second))
    default = Path("runs", f"{facts['dataset']}-{config.seed}-{stamp}")
    if jax.process_index() == 0 and default.exists():  # Another was begun in the same second.
        default = Path(f"{default}-{os.getpid()}")
    run_dir = config.resume or config.output_dir or default
    if jax.process_index() > 0:
        yield run_dir
        return
    named = f"{'--resume' if config.resume else '--output-dir'} {run_dir}"
    for name in ("config.json", "metrics.jsonl", "curves.png", "summary.json", "checkpoints/*"):
        if not config.resume and any(run_dir.glob(name)):
            remedy = f"name a new one, or continue that with --resume {run_dir}"
            raise UsageError(f"{named} holds a run ({name}); {remedy}")
    checkpoints = run_dir / "checkpoints"
    try:
        new = [path for path in (checkpoints, *checkpoints.parents) if not path.exists()]
        checkpoints.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_directory(path.parent)
        lock = FileLock(run_dir / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise UsageError(f"{named} is in use by another run; wait for its end") from error
    except OSError as error:
        raise UsageError(f"{named} cannot be written ({error.strerror}); name another") from error
    with lock:
        write_file(run_dir / "config.json", json.dumps(facts, indent=2).encode())
        yield run_dir


def config_to_resume(config: Config) -> Config:
    """The config of the run in config.resume, with what config says of data and hosts.

    UsageError if there is no run, or if config, config.json and checkpoint contradict each other.
    """
    run_dir, written = config.resume, None
    newest = newest_checkpoint(run_dir)
    with contextlib.suppress(OSError, ValueError, TypeError):  # If damaged, it is written anew.
        written = dict(json.loads((run_dir / "config.json").read_text()))
    facts = newest[1]["facts"] if newest else written
    if not facts:
        raise UsageError(f"--resume {run_dir} is not the directory of a run; name another")
    fields = {name: facts[name] for name in Config.__dataclass_fields__ if name in facts}
    here = {"output_dir": run_dir, "resume": run_dir}
    stored = Config(**fields | dict.fromkeys(HOST_FIELDS) | here)
    if config.output_dir is None:  # It does not come from parse_flags.
        unsaid = vars(Config(resume=run_dir))
        said = {name: value for name, value in vars(config).items() if value != unsaid[name]}
        config = dataclasses.replace(stored, **said)
    for name in [name for name in fields if name not in PLACE_FIELDS]:
        value, kept = getattr(config, name), getattr(stored, name)
        if value != kept:
            both = f"{flag(name)} {value} contradicts {kept}, which the run in {run_dir} has"
            raise UsageError(f"{both}; leave the flag out, or start another run")
        if written and written.get(name) != facts[name]:
            both = f"has {written.get(name)} for {name}, and the newest checkpoint {kept}"
            raise UsageError(f"{run_dir}/config.json {both}; put back the one that is right")
    return config


def write_checkpoint(facts: dict, state: TrainState, history: list, seconds, run_dir: Path) -> None:
    """Writes an .npz file with its SHA-256 at the end, beside the checkpoint of the epoch before.

    Not with Orbax, which restores flipped bits silently and does not fall back from a damaged step.
    """
    if jax.process_index() > 0:
        return
    content, directory = io.BytesIO(), run_dir / "checkpoints"
    header = {"format": CHECKPOINT_FORMAT, "facts": facts, "history": history, "seconds": seconds}
    np.savez(content, header=json.dumps(header), **named_arrays(state))
    width = len(str(facts["num_epochs"]))  # Names are to be in the order of the epochs.
    path, previous = (directory / f"epoch-{len(history) - i:0{width}}.npz" for i in (0, 1))
    for old in set(checkpoint_paths(run_dir)) - {previous}:
        old.unlink()
    write_file(path, content.getvalue() + hashlib.sha256(content.getbuffer()).digest())


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """The newest first."""
    return sorted((run_dir / "checkpoints").glob("epoch-*.npz"), reverse=True)


def newest_checkpoint(run_dir: Path, notify=False) -> tuple[Path, dict, dict] | None:
    """Path, header and arrays of a run's newest whole checkpoint; None if there is none yet."""
    paths = checkpoint_paths(run_dir)
    for path in paths:
        content = path.read_bytes() if path.is_file() else b""
        packed, digest = content[:-32], content[-32:]
        if hashlib.sha256(packed).digest() == digest:
            arrays = dict(np.load(io.BytesIO(packed)))
            header = json.loads(str(arrays.pop("header")))
            if header["format"] != CHECKPOINT_FORMAT:
                formats = f"format {header['format']}, and this program reads {CHECKPOINT_FORMAT}"
                raise UsageError(f"{path} has {formats}; continue with the program that wrote it")
            return path, header, arrays
        if notify:
            say(f"NOTICE: {path} does not match its SHA-256; it is damaged and not used.")
    finished, begun = ((run_dir / name).exists() for name in ("summary.json", "metrics.jsonl"))
    if (paths or begun) and not finished:
        damaged = ", ".join(path.name for path in paths) or "none is left"
        where = f"{run_dir / 'checkpoints'} holds no whole checkpoint ({damaged})"
        raise RunError(f"{where}; put one back, or start the run again in another --output-dir")
    return None


def restore(config: Config, facts: dict, fresh: TrainState) -> tuple[TrainState, list, float]:
    """State, history and seconds of the newest checkpoint, if there is one; says what changed."""
    newest = newest_checkpoint(config.resume, notify=True) if config.resume else None
    if newest is None:
        return fresh, [], 0.0
    path, header, arrays = newest
    history, expected = header["history"], named_arrays(fresh)
    shapes = [{name: (x.shape, x.dtype) for name, x in each.items()} for each in (arrays, expected)]
    if shapes[0] != shapes[1]:
        raise RunError(f"{path} holds other arrays than this program has; was it changed since?")
    metrics = config.resume / "metrics.jsonl"
    if metrics.exists() and metrics.read_bytes().count(b"\n") > len(history):
        say(f"NOTICE: {metrics} knows of later epochs; they are trained again.")
    before, now = (each | each["versions"] for each in (header["facts"], facts))
    for name in ("device", "cores", "xla_flags", "program_sha256", *facts["versions"]):
        if now[name] != before.get(name):
            say(f"NOTICE: {name} was {before.get(name)}, is {now[name]}: results may differ.")
    say(f"Resumed: {len(history)} of {config.num_epochs} epochs are done, from {path}")
    write_history(history, config.resume)
    state = jax.tree.unflatten(jax.tree.structure(fresh), [arrays[name] for name in expected])
    on_each_device, _ = shardings()
    state = jax.device_put(state, on_each_device)
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    return state, history, header["seconds"]


def load_actor(run_dir: Path, seed: int | None = None) -> Actor:
    """The trained actor of a run, from its newest whole checkpoint, to be called on images.

    Of several seeds, it is the first or the one asked for. UsageError if there is no such run, seed
    or checkpoint; RunError if all checkpoints of an unfinished run are damaged.
    """
    newest = newest_checkpoint(Path(run_dir), notify=True)
    if newest is None:
        raise UsageError(f"{run_dir} holds no checkpoint; name a run that has finished an epoch")
    _, header, arrays = newest
    first, num_seeds = header["facts"]["seed"], header["facts"]["num_seeds"]
    index = 0 if seed is None else seed - first
    if not 0 <= index < num_seeds:
        raise UsageError(f"{run_dir} has the seeds {first} to {first + num_seeds - 1}, not {seed}")
    actor = Actor(784, 10, rngs=nnx.Rngs(0))
    leaves = [jnp.asarray(arrays[f"networks.actor.{name}"][index]) for name in named_arrays(actor)]
    return jax.tree.unflatten(jax.tree.structure(actor), leaves)


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by name, such as networks.actor.output.bias.value of a TrainState."""
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        arrays[jax.tree_util.keystr(path, simple=True, separator=".")] = np.asarray(leaf)
    return arrays


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, onto the disk; of several processes, the first does."""
    if jax.process_index() > 0:
        return
    temporary = path.with_name(f"{path.name}.tmp")  # The name is not there before the content.
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = f"{path} cannot be written: {error.strerror}"
        raise RunError(f"{reason}; once it can, go on with --resume") from error


def sync_directory(path: Path) -> None:
    """Brings the names in a directory onto the disk, where the system can."""
    with contextlib.suppress(PermissionError):  # Windows does not open directories.
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# --- Reports --------------------------------------------------------------------------------

METRICS = (  # Unless said otherwise, means over the epoch's batches or updates, and over seeds.
    "epoch",  # 1 is the first
    "accuracy",  # share of the sampled answers that are the label
    "reward",  # mean of calculate_rewards, whatever that gives
    "test_accuracy",  # share of the test images whose likeliest answer is the label
    "seconds",  # of training alone
    "images_per_second",
    "loss",  # all its terms: clip, KL, entropy, critic; no measure of progress
    "reward_std",  # standard deviation of a batch's rewards
    "frac_reward_zero_std",  # share of the groups (batches, or images) whose rewards are all equal
    "entropy",  # of the policy, in nats; ln 10 = 2.3 is pure guessing
    "kl",  # from the reference, in nats; null while beta is 0
    "ratio_max",  # the largest pi / pi_old of the epoch
    "clip_ratio_low",  # share of all answers that have A < 0 and a ratio below 1 - epsilon
    "clip_ratio_high",  # share of all answers that have A > 0 and a ratio above 1 + epsilon_high
    "grad_norm",  # of the actor's gradients
    "learning_rate",
)


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def describe_run(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What config.json holds: the fields of Config, and on what they were used."""
    fields = vars(config) | {"dataset": dataset.name, "resume": None}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    libraries = ("jax", "flax", "optax", "tfp-nightly", "numpy")
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return {name: str(x) if isinstance(x, Path) else x for name, x in fields.items()} | {
        "versions": {"python": sys.version.split()[0]}
        | {name: version(name) for name in libraries},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}",
        "cores": len(cores),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "program_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }


def announce(config: Config, facts: dict, dataset, state: TrainState, run_dir: Path) -> None:
    """Says what is about to happen, before the first long wait."""
    num_images = len(dataset.train_images)
    steps, left_over = divmod(num_images, config.batch_size)
    actor, critic = (sum(x[0].size for x in jax.tree.leaves(network)) for network in state.networks)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    say(f"Starting GRPO on {dataset.name} training...")
    say(f"Device: {facts['device']}; {versions}")
    seeds = config.seed if config.num_seeds == 1 else f"{config.seed} to {config.seeds[-1]}"
    say(f"Parameters: {actor:,} of the actor, {critic:,} of the critic; seed: {seeds}")
    say(f"Data: {num_images:,} training images, {len(dataset.test_images):,} test images")
    say(f"Epoch: {steps} steps of {config.batch_size} images; {left_over} images left over")
    say(f"Output: {run_dir}")


def over_seeds(by_seed: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of figures (S,) by name; of several seeds also their values, and 95% intervals.

    interval_95 is what follows the +-: Student's t * deviation (ddof=1) / sqrt(S).
    """
    by_seed = {name: np.asarray(values, np.float64) for name, values in by_seed.items()}
    figures = {name: values.mean().item() for name, values in by_seed.items()}
    num_seeds = len(by_seed["accuracy"])
    if num_seeds > 1:
        from scipy.special import stdtrit

        factor = (stdtrit(num_seeds - 1, 0.975) / num_seeds**0.5).item()
        intervals = {name: factor * values.std(ddof=1).item() for name, values in by_seed.items()}
        lists = {name: values.tolist() for name, values in by_seed.items()}
        figures |= {"interval_95": intervals, "by_seed": lists}
    return figures


def percent(figures: dict, name: str) -> str:
    """Such as "97.86%", or of several seeds "97.86% +- 0.09%"."""
    interval = f" +- {figures['interval_95'][name]:.2%}" if "interval_95" in figures else ""
    return f"{figures[name]:.2%}{interval}"


def write_history(history: list[dict], run_dir: Path) -> None:
    lines = [json.dumps(record) + "\n" for record in history]
    write_file(run_dir / "metrics.jsonl", "".join(lines).encode())


def report_epoch(config: Config, history: list[dict], run_dir: Path) -> None:
    """Prints the last epoch's line and brings metrics.jsonl up to date."""
    write_history(history, run_dir)
    last = history[-1]
    differs = abs(last["reward"] - last["accuracy"]) > 1e-6
    reward = f", reward {last['reward']:.4f}" if differs else ""
    accuracy, test_accuracy = percent(last, "accuracy"), percent(last, "test_accuracy")
    speed = f"{last['seconds']:.2f} s, {last['images_per_second']:,.0f} images/s"
    number = f"{last['epoch']}/{config.num_epochs}"
    say(f"Epoch {number}, Accuracy: {accuracy}{reward}, test {test_accuracy}, {speed}")


def end_run(config: Config, dataset, state, history: list, began, run_dir: Path) -> None:
    """Draws the picture, writes summary.json, which marks the run as finished, and says so."""
    plot_curves(config, dataset, state, history, run_dir)
    names = ("accuracy", "reward", "test_accuracy", "interval_95", "by_seed")
    summary = {name: history[-1][name] for name in names if name in history[-1]}
    summary |= {"dataset": dataset.name, "num_epochs": config.num_epochs}
    summary["training_state_bytes"] = training_state_bytes(state)
    parameters = jax.device_get(jax.tree.leaves(state.networks.actor))
    summary["params_sha256"] = params_sha256(parameters)
    if config.num_seeds > 1:
        of_each = [[x[index] for x in parameters] for index in range(config.num_seeds)]
        hashes = {"params_sha256": [params_sha256(arrays) for arrays in of_each]}
        summary["by_seed"] = summary["by_seed"] | hashes
    summary["seconds"] = time.perf_counter() - began
    write_file(run_dir / "summary.json", json.dumps(summary, indent=2).encode())
    accuracy, test_accuracy = percent(summary, "accuracy"), percent(summary, "test_accuracy")
    duration = f"{config.num_epochs} epochs and {summary['seconds']:.1f} s"
    say("--- Training completed! ---")
    say(f"Accuracy {accuracy}, test accuracy {test_accuracy} after {duration}")
    say(f"params_sha256: {summary['params_sha256']}")
    say(f"Learning curve: {run_dir / 'curves.png'}")


def plot_curves(config: Config, dataset, state: TrainState, history: list, run_dir: Path) -> None:
    """Draws accuracy by epoch, and up to twelve wrong test answers, from sure to doubtful."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    axes, epochs = left.subplots(), range(1, len(history) + 1)
    for name, style, label in (
        ("accuracy", "o-", "training images, sampled answers"),
        ("test_accuracy", "s--", "test images, likeliest answer"),
    ):
        mean = np.array([100 * record[name] for record in history])
        axes.plot(epochs, mean, style, label=label)
        if config.num_seeds > 1:
            margin = np.array([100 * record["interval_95"][name] for record in history])
            label = f"95% interval of {config.num_seeds} seeds"
            axes.fill_between(epochs, mean - margin, mean + margin, alpha=0.25, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=f"GRPO on {dataset.name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    predictions = predict_all(state.networks.actor, dataset.test_images)
    answers, confidences = (np.asarray(x)[0] for x in predictions)
    wrong = np.flatnonzero(answers != dataset.test_labels)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")]
    counts = f"{len(wrong):,} of {len(answers):,}"
    right.suptitle(f"Seed {config.seed}: {counts} test images wrong; some, surest first")
    shown = wrong[:: max(1, -(-len(wrong) // 12))]
    for axes, index in itertools.zip_longest(right.subplots(3, 4).flat, shown):
        axes.axis("off")
        if index is not None:
            axes.imshow(dataset.test_images[index].reshape(28, 28), cmap="gray_r")
            said = f"{dataset.test_labels[index]}: said {answers[index]}, {confidences[index]:.0%}"
            axes.set_title(said, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture)
    write_file(run_dir / "curves.png", picture.getvalue())


def training_state_bytes(state: TrainState) -> dict[str, Any]:
    """Bytes that training keeps for each seed: weights, their gradients, Adam's two moments."""
    sizes = {"reference": {"weights": sum(x[0].nbytes for x in jax.tree.leaves(state.reference))}}
    for name, network in state.networks._asdict().items():
        weights = sum(x[0].nbytes for x in jax.tree.leaves(network))
        sizes[name] = {"weights": weights, "gradients": weights, "adam": 2 * weights}
    return sizes | {"total": sum(sum(parts.values()) for parts in sizes.values())}


def params_sha256(parameters: list[np.ndarray]) -> str:
    """SHA-256 over the bytes of the actor's arrays, of all seeds, in the order of their names."""
    return hashlib.sha256(b"".join(x.tobytes() for x in parameters)).hexdigest()


# --- Flags and exit status ------------------------------------------------------------------


class UsageError(ValueError):
    """The user asked for something invalid: a flag, a directory (exit status 2)."""


class RunError(RuntimeError):
    """Something went wrong on the way: data, disk, numbers (exit status 1)."""


class DataUnavailable(RunError):
    """The files are neither on this machine nor to be had from the network."""


def main(argv: list[str] | None = None, on_start: Callable = lambda run_dir: None) -> int:
    """Runs the program; returns 0 if it is done, 1 if it failed, and 2 for invalid flags."""
    try:
        train(parse_flags(argv), on_start)
        return 0
    except (UsageError, RunError, OSError, UnicodeError, MemoryError, JaxRuntimeError) as error:
        message = first_line(error)
        if isinstance(error, MemoryError | JaxRuntimeError):
            message += "; if memory ran out, lower --batch-size or --num-generations"
            message += "; if another process has ended, see why, and start all again, with --resume"
        if isinstance(error, BrokenPipeError):  # The reader of our output has gone, as `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"grpo_mnist.py: {message}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1


def first_line(error: object) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def end_at_signals(run_dir: Path | None = None) -> None:
    """Lets Ctrl-C and SIGTERM end the process at once, with a line that says how to resume.

    Not by an exception, which Python loses where it is raised in a callback.
    """
    command = shlex.join([sys.executable, sys.argv[0], "--resume", str(run_dir)])
    hint = f"; resume with: {command}" if run_dir else ""
    if jax.distributed.is_initialized():
        hint += " on every host, with its own flags of several hosts"

    def end(number, _):
        if sys.stdout and sys.stdout.isatty():
            os.write(1, b"\r\x1b[2K\x1b[?25h")  # Clears the progress bar, shows the cursor again.
        os.write(2, f"grpo_mnist.py: stopped by {signal.Signals(number).name}{hint}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def parse_flags(argv: list[str] | None) -> Config:
    """Flags to Config; with --resume, a flag that is left out is as in the run to continue."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?", type=os.path.expanduser)
    run_dir = finder.parse_known_args(argv)[0].resume
    defaults = {"default": config_to_resume(Config(resume=run_dir))} if run_dir else {}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Config, args=argv, description=first_line(__doc__), **defaults)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
    # tyro explains a mistake in a box, of which the first sentence is kept.
    lines = (line.strip("| \u2502") for line in box.getvalue().splitlines()[1:])
    sentence = " ".join(itertools.takewhile(lambda line: line.strip("-\u2500"), lines))
    raise UsageError(sentence.removeprefix("Error parsing Config: ") + " (see --help)")


def flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def complete_and_check(config: Config) -> None:
    """Fills in what depends on other fields; UsageError for a value that breaks a rule."""
    for name in ("data_dir", "output_dir", "resume"):
        if getattr(config, name) is not None:
            object.__setattr__(config, name, Path(getattr(config, name)).expanduser())
    for name in ("dataset", "lr_schedule", "baseline", "scale_rewards", "kl_estimator"):
        choices = get_args(Config.__dataclass_fields__[name].type)
        if getattr(config, name) not in choices:
            raise UsageError(f"{flag(name)} {getattr(config, name)!r} must be one of {choices}")
    if config.num_generations is None:
        object.__setattr__(config, "num_generations", 8 if config.compares_answers else 1)
    for name, holds, rule in rules(config):
        if not holds:
            raise UsageError(f"{flag(name)} {getattr(config, name)} must be {rule}")


def rules(c: Config) -> Iterator[tuple[str, bool, str]]:
    """Yields (field, whether the rule holds, what the value must be)."""
    for name, value in vars(c).items():
        finite = not isinstance(value, int | float) or abs(value) < 3.4e38
        yield name, finite, "a finite number, within float32"
    counts = ("num_epochs", "batch_size", "num_generations", "num_iterations", "num_minibatches")
    for name in (*counts, "num_seeds"):
        yield name, getattr(c, name) >= 1, "1 or more"
    for name in ("beta", "ref_sync_epochs", "entropy_coef"):
        yield name, getattr(c, name) >= 0, "0 or more"
    answers, updates = c.batch_size * c.num_generations, c.num_iterations * c.num_minibatches
    alone = answers == 1 and "batch" in (c.baseline, c.scale_rewards)
    yield "batch_size", not alone, "2 or more: a group of one learns nothing"
    sizes = "smaller: --batch-size x --num-generations x --num-seeds must be below 2**31"
    yield "num_generations", answers * c.num_seeds < 2**31, sizes
    several, where = c.num_generations > 1, "where the answers to an image are compared"
    yield "num_generations", several or not c.compares_answers, f"2 or more {where}"
    yield "dynamic_sampling", c.compares_answers or not c.dynamic_sampling, f"on only {where}"
    yield "num_iterations", updates < 2**31, "smaller: x --num-minibatches, below 2**31 in all"
    yield "learning_rate", np.float32(c.learning_rate) > 0, "above 0, in float32 too"
    yield "clip_epsilon", 0 < c.clip_epsilon < 1, "above 0 and below 1"
    yield "clip_epsilon_high", c.upper_clip_epsilon > 0, "above 0"
    unused = "while --beta is 0, which leaves the KL term out"
    yield "kl_estimator", c.beta > 0 or c.kl_estimator == "exact", f"exact {unused}"
    yield "ref_sync_epochs", c.beta > 0 or c.ref_sync_epochs == 0, f"0 {unused}"
    yield "seed", 0 <= c.seed <= 2**32 - c.num_seeds, "0 or more, the last below 2**32"
    yield "output_dir", not c.resume or c.output_dir in (None, c.resume), f"{c.resume}, as --resume"
    address, port = c.coordinator_address, (c.coordinator_address or "").rpartition(":")[2]
    given = [value is not None for value in (address, c.num_processes, c.process_id)]
    fits = not any(given) or address == "auto" or (all(given) and port.isdigit())
    yield "coordinator_address", fits, "host:port, with --num-processes and --process-id, or auto"


if __name__ == "__main__":
    end_at_signals()
    status = main(on_start=end_at_signals)
    if status and jax.distributed.is_initialized():
        os._exit(status)  # sys.exit would wait for the other processes.
    sys.exit(status)
