"""The formulas against numbers worked out by hand, and the step against a NumPy loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorflow_probability.substrates.jax import distributions as tfd

import grpo_mnist
from grpo_mnist import Actor, Config, calculate_rewards, group_advantages, ppo_clip_loss

BASELINES = ("batch", "none")
SCALES = ("batch", "none")
SHAPES = st.sampled_from([(1, 1), (1, 8), (8, 1), (5, 7), (300, 1)])  # each is compiled once
REWARDS = SHAPES.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)


def test_no_array_is_broadcast_by_accident():
    """(B,) never meets (B, G): with different sizes and ranks, every formula keeps its shape."""
    with jax.numpy_rank_promotion("raise"):
        rewards = calculate_rewards(jnp.zeros((3, 4), int), jnp.zeros(3, int))
        advantages = group_advantages(rewards, baseline="batch", scale_rewards="batch")
        loss = ppo_clip_loss(advantages, rewards, advantages, 0.2, 0.2)
    assert (rewards.shape, advantages.shape, loss.shape) == ((3, 4), (3, 4), ())


# --- Rewards ---


def test_rewards_by_hand():
    actions = np.array([[3, 7, 3], [0, 1, 2]])
    rewards = calculate_rewards(actions, np.array([3, 2]))
    assert rewards.dtype == jnp.float32
    assert rewards.tolist() == [[1, 0, 1], [0, 0, 1]]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_rewards_against_a_loop(num_images, num_answers, seed):
    rng = np.random.default_rng(seed)
    actions, labels = rng.integers(0, 3, (num_images, num_answers)), rng.integers(0, 3, num_images)
    rewards = np.asarray(calculate_rewards(actions, labels))
    for image in range(num_images):
        for answer in range(num_answers):
            assert rewards[image, answer] == float(actions[image, answer] == labels[image])


# --- Advantages ---


@pytest.mark.parametrize(
    ("right", "wrong", "advantage_right", "advantage_wrong"),
    # sqrt((1 - p) / p) and -sqrt(p / (1 - p)) for p = 0.78, 0.95 and 0.5
    [(78, 22, 0.5311, -1.8829), (95, 5, 0.2294, -4.3589), (3, 3, 1.0, -1.0)],
)
def test_advantages_by_hand(right, wrong, advantage_right, advantage_wrong):
    rewards = np.array([1.0] * right + [0.0] * wrong, np.float32)[:, None]
    advantages = np.asarray(group_advantages(rewards, baseline="batch", scale_rewards="batch"))
    np.testing.assert_allclose(advantages[:right], advantage_right, atol=1e-4)
    np.testing.assert_allclose(advantages[right:], advantage_wrong, atol=1e-4)


def test_advantages_of_real_rewards_by_hand():
    rewards = [[7.2, 8.5, 6.1, 9.0, 7.8, 6.5, 8.2, 7.5]]  # their mean is 7.6
    advantages = group_advantages(rewards, baseline="batch", scale_rewards="none")
    np.testing.assert_allclose(
        advantages, [[-0.4, 0.9, -1.5, 1.4, 0.2, -1.1, 0.6, -0.1]], atol=1e-5
    )


def advantages_by_loop(rewards, baseline, scale_rewards):
    """The definition, one reward after the other, in Python's own float64."""
    values = [float(reward) for row in rewards for reward in row]
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    advantages = [value - mean if baseline == "batch" else value for value in values]
    if scale_rewards == "batch":
        advantages = [advantage / (deviation + 1e-8) for advantage in advantages]
    if len(set(values)) == 1 and "batch" in (baseline, scale_rewards):
        advantages = [0.0] * len(values)
    return np.reshape(advantages, np.shape(rewards))


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=REWARDS)
@settings(max_examples=60)
def test_advantages_against_a_loop(baseline, scale_rewards, rewards):
    rewards = np.round(rewards, 2)  # no deviations below what float32 can tell from 0
    advantages = group_advantages(rewards, baseline=baseline, scale_rewards=scale_rewards)
    assert advantages.dtype == jnp.float32
    expected = advantages_by_loop(rewards, baseline, scale_rewards)
    np.testing.assert_allclose(advantages, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale_rewards", SCALES)
@given(reward=st.floats(-1e6, 1e6, width=32), shape=SHAPES)
def test_equal_rewards_give_exactly_zero(scale_rewards, reward, shape):
    rewards = np.full(shape, reward, np.float32)
    advantages = group_advantages(rewards, baseline="batch", scale_rewards=scale_rewards)
    assert not np.any(advantages)


def test_equal_rewards_whose_mean_is_inexact():
    rewards = np.full((1000, 1), 0.1, np.float32)
    assert rewards.mean(dtype=np.float32) != rewards[0, 0] or jnp.mean(rewards) != rewards[0, 0]
    assert not np.any(group_advantages(rewards, baseline="batch", scale_rewards="batch"))


@given(rewards=REWARDS, shift=st.floats(-10, 10), scale=st.floats(0.5, 20))
def test_neither_a_shift_nor_a_scale_of_the_rewards_matters(rewards, shift, scale):
    rewards = np.round(rewards)
    before = group_advantages(rewards, baseline="batch", scale_rewards="batch")
    after = group_advantages(scale * rewards + shift, baseline="batch", scale_rewards="batch")
    if rewards.min() < rewards.max():
        np.testing.assert_allclose(before, after, atol=2e-3)
        np.testing.assert_allclose(np.mean(after), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(after), 1, atol=1e-4)


@pytest.mark.parametrize("names", [("mean", "batch"), ("batch", "std"), ("none", "")])
def test_an_unknown_baseline_or_scale_is_refused(names):
    with pytest.raises(ValueError, match="unknown"):
        group_advantages([[0.0, 1.0]], baseline=names[0], scale_rewards=names[1])


def test_rewards_that_are_not_numbers_do_not_pass_for_equal():
    advantages = group_advantages([[jnp.nan, 1.0]], baseline="batch", scale_rewards="batch")
    assert np.isnan(advantages).all()


# --- Loss ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    # slope: of the surrogate, by the ratio. It is 0 where clipping acts, and only there.
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.0),
        (1.5, 2.0, 2.6, 0.0),  # better than its group, and already likelier by 1 + 0.3
        (0.5, 2.0, 1.0, 2.0),
        (1.5, -2.0, -3.0, -2.0),
        (0.5, -2.0, -1.6, 0.0),  # worse than its group, and already rarer by 1 - 0.2
        (0.9, -2.0, -1.8, -2.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, surrogate, slope):
    old_log_prob = jnp.log(0.3)

    def loss(ratio):
        log_probs = (jnp.log(ratio) + old_log_prob).reshape(1, 1)
        old_log_probs = old_log_prob.reshape(1, 1)
        return ppo_clip_loss(log_probs, old_log_probs, jnp.full((1, 1), advantage), 0.2, 0.3)

    value, gradient = jax.value_and_grad(loss)(jnp.float32(ratio))
    np.testing.assert_allclose([value, gradient], [-surrogate, -slope], atol=1e-5)


@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-2, 2, width=32)))
def test_loss_against_a_loop(arrays):
    log_probs, old_log_probs, advantages = arrays
    total = 0.0
    for index in np.ndindex(4, 5):
        ratio = np.exp(float(log_probs[index]) - float(old_log_probs[index]))
        clipped_ratio = min(max(ratio, 1 - 0.2), 1 + 0.28)
        total += min(float(advantages[index]) * ratio, float(advantages[index]) * clipped_ratio)
    loss = ppo_clip_loss(log_probs, old_log_probs, advantages, 0.2, 0.28)
    np.testing.assert_allclose(loss, -total / 20, rtol=1e-4, atol=1e-4)


# --- The KL term ---


def two_policies(num_images=4):
    logits = jax.random.normal(jax.random.key(5), (2, num_images, 10))
    return tfd.Categorical(logits=logits[0]), tfd.Categorical(logits=logits[1])


def test_exact_kl_against_its_definition():
    policy, reference = two_policies()
    p, q = np.asarray(policy.probs_parameter()), np.asarray(reference.probs_parameter())
    expected = np.mean([sum(p[i] * np.log(p[i] / q[i])) for i in range(4)])
    kl = grpo_mnist.kl_to_reference(policy, reference, None, "exact")
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_k3_averages_to_the_exact_kl():
    policy, reference = two_policies()
    exact = grpo_mnist.kl_to_reference(policy, reference, None, "exact")
    actions = policy.sample(100_000, seed=jax.random.key(0)).T
    answers = [actions[:, i::25] for i in range(25)]
    estimates = [grpo_mnist.kl_to_reference(policy, reference, some, "k3") for some in answers]
    assert min(estimates) >= 0
    error = np.std(estimates) / 5  # of the mean of 25
    assert abs(np.mean(estimates) - exact) < 4 * error


# --- The actor and the step ---


def test_the_actor():
    actor = Actor(784, 10, rngs=nnx.Rngs(0))
    policy = actor(jnp.zeros((5, 784)))
    assert isinstance(policy, tfd.Categorical)
    assert policy.logits.shape == (5, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(actor)) == 118_282


class Step(NamedTuple):
    actor: Actor  # as it was before
    after: grpo_mnist.TrainState
    metrics: dict
    rollout: grpo_mnist.Rollout
    labels: np.ndarray


STEPS = {}  # what one_step has done before


def one_step(dataset, config):
    """One training step on the first images of the data set."""
    if config in STEPS:
        return STEPS[config]
    optimizer = grpo_mnist.create_optimizer(config, num_steps=3)
    with jax.disable_jit():  # op by op: each is compiled once for all the tests
        key = jax.random.key(config.seed)
        before = grpo_mnist.create_train_state(key, optimizer=optimizer, config=config)
    images = dataset.train_images[: config.batch_size]
    labels = dataset.train_labels[: config.batch_size]
    _, key = jax.random.split(before.key)
    rollout = grpo_mnist.sample_rollout(before, images, labels, key, config)
    actor, rollout = jax.tree.map(np.array, (before.actor, rollout))
    step = grpo_mnist.train_step
    after, metrics = step(before, images, labels, optimizer=optimizer, config=config)
    STEPS[config] = Step(actor, after, jax.device_get(metrics), rollout, labels)
    return STEPS[config]


class NumPyLearner:
    """The same network, loss and Adam written down again: float64, loops, derivatives by hand."""

    def __init__(self, actor, config, num_updates):
        layers = (actor.hidden_1, actor.hidden_2, actor.logits)
        self.parameters = [
            np.array(value, np.float64) for layer in layers for value in (layer.kernel, layer.bias)
        ]
        self.first_moments = [np.zeros_like(value) for value in self.parameters]
        self.second_moments = [np.zeros_like(value) for value in self.parameters]
        self.config, self.num_updates, self.updates = config, num_updates, 0
        self.metrics = []

    def forward(self, images):
        w1, b1, w2, b2, w3, b3 = self.parameters
        hidden_1 = np.maximum(images @ w1 + b1, 0)
        hidden_2 = np.maximum(hidden_1 @ w2 + b2, 0)
        logits = hidden_2 @ w3 + b3
        logits -= logits.max(axis=1, keepdims=True)
        return hidden_1, hidden_2, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def gradients(self, images, actions, old_log_probs, advantages, reference_log_p):
        """d loss / d logits = sum over the answers of -A r (onehot - p) / (B G), if not clipped."""
        config = self.config
        low, high = 1 - config.clip_epsilon, 1 + config.upper_clip_epsilon
        hidden_1, hidden_2, log_p = self.forward(images)
        p = np.exp(log_p)
        by_logits = np.zeros_like(p)
        loss, ratios, clipped_low, clipped_high = 0.0, [], 0, 0
        for image, answer in np.ndindex(actions.shape):
            action, advantage = actions[image, answer], float(advantages[image, answer])
            ratio = np.exp(log_p[image, action] - old_log_probs[image, answer])
            ratios.append(ratio)
            loss -= min(advantage * ratio, advantage * np.clip(ratio, low, high)) / actions.size
            too_low, too_high = ratio < low and advantage < 0, ratio > high and advantage > 0
            clipped_low, clipped_high = clipped_low + too_low, clipped_high + too_high
            if not (too_low or too_high):
                one_hot = np.eye(10)[action]
                by_logits[image] -= advantage * ratio * (one_hot - p[image]) / actions.size
        entropies = -(p * log_p).sum(axis=1)
        loss -= config.entropy_coef * entropies.mean()
        by_logits += config.entropy_coef * p * (log_p + entropies[:, None]) / len(images)
        if config.beta > 0:
            kl, kl_by_logits = self.kl_divergence(log_p, reference_log_p, actions)
            loss += config.beta * kl
            by_logits += config.beta * kl_by_logits
        self.metrics.append(
            ({"kl": kl} if config.beta > 0 else {})
            | {
                "loss": loss,
                "entropy": entropies.mean(),
                "ratio_max": max(ratios),
                "clip_ratio_low": clipped_low / actions.size,
                "clip_ratio_high": clipped_high / actions.size,
            }
        )
        _, _, w2, _, w3, _ = self.parameters
        by_hidden_2 = (by_logits @ w3.T) * (hidden_2 > 0)
        by_hidden_1 = (by_hidden_2 @ w2.T) * (hidden_1 > 0)
        gradients = []
        for inputs, outputs in (
            (images, by_hidden_1),
            (hidden_1, by_hidden_2),
            (hidden_2, by_logits),
        ):
            gradients += [inputs.T @ outputs, outputs.sum(axis=0)]
        self.metrics[-1]["grad_norm"] = np.sqrt(sum((g**2).sum() for g in gradients))
        return gradients

    def kl_divergence(self, log_p, log_q, actions):
        """Its mean over the images, and the derivative of that by the logits."""
        p = np.exp(log_p)
        if self.config.kl_estimator == "exact":
            by_image = (p * (log_p - log_q)).sum(axis=1, keepdims=True)
            return by_image.mean(), p * (log_p - log_q - by_image) / len(p)
        kl, by_logits = 0.0, np.zeros_like(p)
        for image, answer in np.ndindex(actions.shape):
            action = actions[image, answer]
            log_ratio = log_q[image, action] - log_p[image, action]
            kl += (np.exp(log_ratio) - log_ratio - 1) / actions.size
            by_log_p = 1 - np.exp(log_ratio)
            by_logits[image] += by_log_p * (np.eye(10)[action] - p[image]) / actions.size
        return kl, by_logits

    def update(self, *minibatch):
        """Adam (arXiv 1412.6980, algorithm 1) with the cosine schedule's learning rate."""
        rate = (
            0.5 * (1 + np.cos(np.pi * self.updates / self.num_updates)) * self.config.learning_rate
        )
        gradients = self.gradients(*minibatch)
        self.metrics[-1]["learning_rate"] = rate
        self.updates += 1
        for index, gradient in enumerate(gradients):
            m = 0.9 * self.first_moments[index] + 0.1 * gradient
            v = 0.999 * self.second_moments[index] + 0.001 * gradient**2
            self.first_moments[index], self.second_moments[index] = m, v
            m, v = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
            self.parameters[index] = self.parameters[index] - rate * m / (np.sqrt(v) + 1e-8)


ONE_ROUND = Config(batch_size=64, num_iterations=1)
FOUR_ROUNDS = Config(batch_size=64)
LONG_ROUNDS = Config(batch_size=64, learning_rate=0.03, clip_epsilon_high=0.5)
FOUR_ANSWERS = Config(batch_size=32, num_iterations=3, num_generations=4, baseline="none")
MINIBATCHES = Config(batch_size=64, num_iterations=2, num_minibatches=4, scale_rewards="none")
ENTROPY_BONUS = Config(batch_size=64, num_iterations=2, entropy_coef=0.5)
KL = Config(batch_size=64, beta=5.0)
KL_K3 = Config(batch_size=64, beta=5.0, kl_estimator="k3", num_generations=2)
HELD_BACK = Config(batch_size=64, beta=1000.0, ref_sync_epochs=2)


@pytest.mark.parametrize(
    "config",
    [ONE_ROUND, FOUR_ROUNDS, LONG_ROUNDS, FOUR_ANSWERS, MINIBATCHES, ENTROPY_BONUS, KL, KL_K3],
    ids=["K=1", "K=4", "clipping", "four answers", "minibatches", "entropy", "KL", "KL by k3"],
)
def test_the_step_against_a_numpy_learner(dataset, config):
    step = one_step(dataset, config)
    rollout, metrics = step.rollout, step.metrics
    B, G, M = config.batch_size, config.num_generations, config.num_minibatches
    assert rollout.actions.shape == rollout.rewards.shape == (B, G)
    learner = NumPyLearner(step.actor, config, num_updates=3 * config.num_iterations * M)

    images = dataset.train_images[:B] / 255
    log_p = learner.forward(images)[2]
    old_log_probs = np.take_along_axis(log_p, rollout.actions, axis=1)
    np.testing.assert_allclose(rollout.old_log_probs, old_log_probs, atol=1e-5)
    right = np.zeros((B, G))
    for image, answer in np.ndindex(B, G):
        right[image, answer] = rollout.actions[image, answer] == step.labels[image]
    np.testing.assert_array_equal(rollout.rewards, right)
    assert metrics["accuracy"] == pytest.approx(right.mean())
    assert metrics["reward_std"] == pytest.approx(right.std(), abs=1e-6)
    advantages = advantages_by_loop(right, config.baseline, config.scale_rewards)
    np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-5)

    batch = (images, rollout.actions, old_log_probs, advantages, log_p)
    for _ in range(config.num_iterations):
        for piece in np.split(np.arange(B), M):
            learner.update(*(array[piece] for array in batch))
    layers = (step.after.actor.hidden_1, step.after.actor.hidden_2, step.after.actor.logits)
    values = [np.asarray(value) for layer in layers for value in (layer.kernel, layer.bias)]
    for value, expected in zip(values, learner.parameters, strict=True):
        # Adam's first steps have the size of the learning rate, whatever the gradient's: where a
        # gradient is 0 but for rounding, a step may differ; nowhere else, and by little on average.
        assert np.mean(np.abs(value - expected) > 1e-5) < 0.01
        assert np.abs(value - expected).mean() < 1e-5
    assert ("kl" in metrics) == ("kl" in learner.metrics[0]) == (config.beta > 0)
    for name in learner.metrics[0]:
        average = max if name == "ratio_max" else np.mean
        expected = average([update[name] for update in learner.metrics])
        assert metrics[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_ratio_is_1_in_the_first_round_and_not_in_later_ones(dataset):
    once = one_step(dataset, ONE_ROUND).metrics
    assert once["ratio_max"] == 1.0
    assert once["clip_ratio_low"] == once["clip_ratio_high"] == 0.0
    assert abs(once["loss"]) < 1e-6  # the mean of the advantages
    often = one_step(dataset, LONG_ROUNDS).metrics
    assert often["ratio_max"] > 1.5
    assert often["clip_ratio_low"] > 0
    assert often["clip_ratio_high"] > 0


def test_the_answers_of_an_image_differ_and_belong_to_it(dataset):
    """G answers share an image: repeated, not tiled, and each drawn on its own."""
    step = one_step(dataset, FOUR_ANSWERS)
    actor, rollout = step.actor, step.rollout
    for image in range(0, 32, 8):
        log_p = jax.nn.log_softmax(actor(rollout.images[image : image + 1]).logits)[0]
        expected = log_p[rollout.actions[image]]
        np.testing.assert_allclose(rollout.old_log_probs[image], expected, atol=1e-5)
    assert np.mean([len(set(row)) for row in rollout.actions.tolist()]) > 2


def test_a_kl_term_holds_the_actor_back(dataset):
    """With a weight that drowns the reward, the actor stays close to the reference."""
    moved = {}
    for config in (FOUR_ROUNDS, HELD_BACK):
        step = one_step(dataset, config)
        reference, policy = step.actor(step.rollout.images), step.after.actor(step.rollout.images)
        moved[config.beta] = float(policy.kl_divergence(reference).mean())
        assert ("kl" in step.metrics) == (config.beta > 0)
    assert step.metrics["kl"] > 0
    assert moved[HELD_BACK.beta] < moved[0.0] / 5


def test_the_kl_term_is_from_the_reference_and_not_from_the_last_policy(dataset):
    state = one_step(dataset, HELD_BACK).after
    images, labels = dataset.train_images[:64], dataset.train_labels[:64]
    rollout = grpo_mnist.sample_rollout(state, images, labels, jax.random.key(0), HELD_BACK)
    expected = state.reference(rollout.images).logits
    np.testing.assert_allclose(rollout.reference_logits, expected, atol=1e-6)
    assert np.abs(rollout.reference_logits - state.actor(rollout.images).logits).max() > 1e-3


def test_k3_pulls_towards_the_reverse_divergence():
    """Averaged over all ten answers: k3's value is KL(p || q), its gradient that of KL(q || p)."""
    policy, reference = two_policies(num_images=1)

    @jax.jit
    def k3_by_answer(logits):
        moved = tfd.Categorical(logits=logits)
        return jax.vmap(lambda a: grpo_mnist.kl_to_reference(moved, reference, a, "k3"))(
            jnp.arange(10)[:, None, None]
        )

    def divergence(logits, reverse):
        p, q = tfd.Categorical(logits=logits), reference
        return (q.kl_divergence(p) if reverse else p.kl_divergence(q)).mean()

    p = policy.probs_parameter()[0]
    np.testing.assert_allclose(
        p @ k3_by_answer(policy.logits), divergence(policy.logits, False), rtol=1e-4
    )
    gradient = jnp.tensordot(p, jax.jacobian(k3_by_answer)(policy.logits), 1)
    reverse = jax.grad(divergence)(policy.logits, True)
    forward = jax.grad(divergence)(policy.logits, False)
    np.testing.assert_allclose(gradient, reverse, atol=1e-5)
    assert np.abs(gradient - forward).max() > 0.01


def test_the_reference_is_refreshed_when_asked(dataset):
    state = one_step(dataset, HELD_BACK).after
    for epoch, refreshed in ((1, False), (2, False), (3, True), (4, False), (5, True)):
        reference = grpo_mnist.sync_reference(state, HELD_BACK, epoch).reference
        same = np.array_equal(reference.logits.kernel, state.actor.logits.kernel)
        assert same == refreshed, epoch
