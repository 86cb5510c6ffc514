"""The formulas against numbers worked out by hand, and the step against a second one in NumPy."""

import itertools
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chi2
from tensorflow_probability.substrates.jax import distributions as tfd

import grpo_mnist
from grpo_mnist import Config, cispo_loss, dg_loss, ppo_clip_loss

BASELINES = ("batch", "group", "loo", "ema", "critic", "none")
SCALES = ("batch", "group", "none", "mean")
COMBINATIONS = list(itertools.product(BASELINES, SCALES))
COMPARING = [names for names in COMBINATIONS if {"batch", "group", "loo"} & set(names)]


# --- Rewards and advantages ---


def test_rewards_by_hand():
    actions = np.array([[3, 7, 3], [0, 1, 2]])
    rewards = grpo_mnist.calculate_rewards(actions, np.array([3, 2]))
    assert rewards.dtype == jnp.float32
    assert rewards.tolist() == [[1, 0, 1], [0, 0, 1]]


def advantages_of(rewards, baseline, scale_rewards, expected_rewards=0.0):
    return grpo_mnist.group_advantages(
        rewards, baseline=baseline, scale_rewards=scale_rewards, expected_rewards=expected_rewards
    )


@pytest.mark.parametrize(
    ("baseline", "scale_rewards", "expected"),
    # Two images with three answers each. All six: mean 2, deviation sqrt(8 / 6) = 1.1547; the
    # first image's: mean 1, deviation sqrt(2 / 3) = 0.8165; the second's are equal.
    [
        ("batch", "none", [[-2, -1, 0], [1, 1, 1]]),
        ("group", "none", [[-1, 0, 1], [0, 0, 0]]),
        ("loo", "none", [[-1.5, 0, 1.5], [0, 0, 0]]),
        ("ema", "none", [[-0.5, 0.5, 1.5], [2.5, 2.5, 2.5]]),
        ("critic", "none", [[-1, 0, 1], [-1, -1, -1]]),
        ("none", "none", [[0, 1, 2], [3, 3, 3]]),
        ("batch", "batch", [[-1.7321, -0.8660, 0], [0.8660, 0.8660, 0.8660]]),
        ("group", "batch", [[-0.8660, 0, 0.8660], [0, 0, 0]]),
        ("group", "group", [[-1.2247, 0, 1.2247], [0, 0, 0]]),
        ("loo", "group", [[-1.8371, 0, 1.8371], [0, 0, 0]]),
        ("batch", "group", [[-2.4495, -1.2247, 0], [0, 0, 0]]),
        ("critic", "batch", [[-0.8660, 0, 0.8660], [-0.8660, -0.8660, -0.8660]]),
        ("group", "mean", [[-1, 0, 1], [0, 0, 0]]),
        ("none", "mean", [[0, 1, 2], [1, 1, 1]]),
        ("critic", "mean", [[-1, 0, 1], [-0.3333, -0.3333, -0.3333]]),
    ],
)
def test_every_baseline_by_hand(baseline, scale_rewards, expected):
    expected_rewards = {"ema": 0.5, "critic": np.array([[1.0], [4.0]])}.get(baseline, 0.0)
    rewards = [[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]
    advantages = advantages_of(rewards, baseline, scale_rewards, expected_rewards)
    np.testing.assert_allclose(advantages, expected, atol=1e-4)


@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_deviations_are_1e_8_larger_and_nothing_is_expected_by_default(scale_rewards):
    rewards = [[0.0, 4e-8]]  # They deviate by 2e-8.
    advantages = grpo_mnist.group_advantages(
        rewards, baseline="critic", scale_rewards=scale_rewards
    )
    np.testing.assert_allclose(advantages, [[0, 4 / 3]], rtol=1e-4)


@pytest.mark.parametrize(
    ("rewards", "with_group", "with_none"),
    [
        ([1, 0, 0, 0], [3, -1, -1, -1], [4, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]),
        ([5, -1, 0, 0], [4, -2, -1, -1], [5, -1, 0, 0]),
        ([1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),  # the mean is 0
        ([1, -3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),  # the mean is below 0
    ],
)
def test_maxrl_by_hand(rewards, with_group, with_none):
    """Beside an image of other rewards, which are none of its concern."""
    for baseline, expected in (("group", with_group), ("none", with_none)):
        advantages = advantages_of([rewards, [0, 9, 9, 9]], baseline, "mean")
        np.testing.assert_allclose(advantages[0], expected, atol=1e-4)


def advantages_by_loop(rewards, baseline, scale_rewards, expected_rewards):
    """The definitions, one reward after the other, in Python's own float64."""

    def mean(values):
        return sum(values) / len(values)

    def deviation(values):
        center = mean(values)
        return mean([(value - center) ** 2 for value in values]) ** 0.5

    rows = [[float(reward) for reward in row] for row in rewards]
    batch = [reward for row in rows for reward in row]
    advantages = np.zeros(np.shape(rewards))
    for image, answer in np.ndindex(advantages.shape):
        own = rows[image]
        if scale_rewards == "mean" and mean(own) <= 0:
            continue  # MaxRL: nothing right, nothing to learn
        if len(set(own)) == 1 and {baseline, scale_rewards} & {"group", "loo"}:
            continue  # nothing to compare: 0
        if len(set(batch)) == 1 and "batch" in (baseline, scale_rewards):
            continue
        advantage = own[answer]
        if baseline == "batch":
            advantage -= mean(batch)
        elif baseline == "group":
            advantage -= mean(own)
        elif baseline == "loo":
            advantage -= mean(own[:answer] + own[answer + 1 :])
        elif baseline in ("ema", "critic"):
            advantage -= np.broadcast_to(expected_rewards, (len(rows), 1))[image, 0]
        if scale_rewards == "mean":
            advantage /= mean(own)
        elif scale_rewards != "none":
            advantage /= deviation(batch if scale_rewards == "batch" else own) + 1e-8
        advantages[image, answer] = advantage
    return advantages


@given(
    rewards=st.sampled_from([(5, 7), (30, 1)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
    ),
    expected_reward=st.floats(-10, 10, width=32),
)
@settings(max_examples=30)
def test_advantages_against_a_loop(rewards, expected_reward):
    for names in COMBINATIONS:
        # No deviations below what float32 can tell from 0, and no means.
        rounded = np.round(rewards, 0 if "mean" in names else 2)
        expected_rewards = np.float32(expected_reward)
        if "critic" in names:
            expected_rewards += np.arange(len(rewards), dtype=np.float32)[:, None]
        advantages = advantages_of(rounded, *names, expected_rewards)
        assert advantages.dtype == jnp.float32
        expected = advantages_by_loop(rounded, *names, expected_rewards)
        np.testing.assert_allclose(
            advantages, expected, rtol=2e-3, atol=2e-3, err_msg=" ".join(names)
        )


@pytest.mark.parametrize(("baseline", "scale_rewards"), COMPARING)
def test_equal_rewards_give_exactly_zero(baseline, scale_rewards):
    """However inexact their mean is in float32; for images, beside others with other rewards."""
    for values in np.random.default_rng(0).uniform(-1e6, 1e6, (20, 5)).astype(np.float32):
        rewards = np.full((30, 1), values[0])
        if {baseline, scale_rewards} & {"group", "loo"}:
            rewards = np.tile(values[:, None], 7)
        assert not np.any(advantages_of(rewards, baseline, scale_rewards))


def test_dynamic_sampling_is_the_mean_over_the_images_with_a_signal():
    rewards = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32)
    advantages = advantages_of(rewards, "group", "group")
    log_probs, old_log_probs = np.log(np.random.default_rng(0).uniform(0.1, 0.9, (2, 4, 4)))
    weighted = grpo_mnist.average_over_signals(advantages)
    clipped = jax.jit(ppo_clip_loss)
    loss = clipped(log_probs, old_log_probs, weighted, 0.2, 0.3)
    some = np.array([1, 3])
    expected = clipped(log_probs[some], old_log_probs[some], advantages[some], 0.2, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not np.any(grpo_mnist.average_over_signals(np.zeros((4, 4), np.float32)))


def test_names_and_shapes_that_do_not_exist_are_refused():
    for names, unknown in ((("mean", "batch"), "'mean'"), (("batch", "std"), "'std'")):
        with pytest.raises(KeyError, match=unknown):
            advantages_of([[0.0, 1.0]], *names)
    for rewards, shape in (([0.0, 1.0], r"\(2,\)"), ([[[0.0, 1.0]]], r"\(1, 1, 2\)")):
        with pytest.raises(ValueError, match=f"not {shape}"):
            advantages_of(rewards, "batch", "batch")


@pytest.mark.parametrize("names", [("batch", "batch"), ("group", "mean"), ("none", "mean")])
def test_rewards_that_are_not_numbers_do_not_pass_for_equal(names):
    assert np.isnan(advantages_of([[jnp.nan, 1.0]], *names)).all()


# --- Losses ---


@cache
def value_and_gradient(loss):
    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("loss", "probability", "ratio", "advantage", "value", "slope"),
    # slope: of the loss, by log pi. The bounds are 0.8 and 1.3; log 0.5 = -0.6931.
    [
        (ppo_clip_loss, 0.5, 1.1, 2.0, -2.2, -2.2),
        (ppo_clip_loss, 0.5, 1.5, 2.0, -2.6, 0.0),  # good, and already likelier by 1 + 0.3
        (ppo_clip_loss, 0.5, 0.5, 2.0, -1.0, -1.0),
        (ppo_clip_loss, 0.5, 1.5, -2.0, 3.0, 3.0),
        (ppo_clip_loss, 0.5, 0.5, -2.0, 1.6, 0.0),  # bad, and already rarer by 1 - 0.2
        (ppo_clip_loss, 0.5, 0.9, -2.0, 1.8, 1.8),
        (ppo_clip_loss, 0.5, 1.5, 0.0, 0.0, 0.0),
        (cispo_loss, 0.5, 1.1, 2.0, 1.5249, -2.2),
        (cispo_loss, 0.5, 1.5, 2.0, 1.8022, -2.6),  # held at 1.3 times, and not at 0
        (cispo_loss, 0.5, 1.5, -2.0, -1.8022, 2.6),  # whatever the sign
        (cispo_loss, 0.5, 0.5, 2.0, 0.6931, -1.0),
        (cispo_loss, 0.5, 0.5, -2.0, -0.6931, 1.0),  # without a lower bound
        (dg_loss, 0.5, 1.0, 1.0, 0.4621, -0.6667),  # the gate is 1 / (1 + 0.5^1) = 2 / 3
        (dg_loss, 0.5, 1.0, -1.0, -0.2310, 0.3333),  # 1 / (1 + 0.5^-1)
        (dg_loss, 0.01, 1.0, 1.0, 4.5596, -0.9901),  # improbable and good: in full
        (dg_loss, 0.01, 1.0, -1.0, -0.0456, 0.0099),  # improbable and bad: hardly
        (dg_loss, 0.5, 9.0, 2.0, 1.1090, -1.6),  # 1 / (1 + 0.5^2); no ratio comes in
    ],
)
def test_losses_by_hand(loss, probability, ratio, advantage, value, slope):
    numbers = (np.log(probability), np.log(probability / ratio), advantage)
    arrays = [np.full((1, 1), number, np.float32) for number in numbers]
    result, gradient = value_and_gradient(loss)(*arrays, 0.2, 0.3)
    np.testing.assert_allclose([result, gradient.item()], [value, slope], atol=1e-4)


def tpo_by_logits(logits, *arrays):
    return grpo_mnist.tpo_loss(tfd.Categorical(logits=logits), *arrays)


@pytest.mark.parametrize(
    ("advantage", "of_answer", "of_others"),
    # exp(3) / (exp(3) + 9 exp(-1/3)) and exp(-1/3) / the same; exp(-3) / (exp(-3) + 9 exp(1/3))
    [
        (0.001, 0.7570, 0.0270),
        (100.0, 0.7570, 0.0270),  # only the sign counts
        (-0.001, 0.0039, 0.1107),
        (-7.0, 0.0039, 0.1107),
        (0.0, 0.1, 0.1),  # the policy remains the target
    ],
)
def test_the_target_of_tpo_by_hand(advantage, of_answer, of_others):
    """Answer 4 of a uniform policy; the gradient is the policy less the target."""
    uniform = np.zeros((1, 10), np.float32)
    advantages = np.full((1, 1), advantage, np.float32)
    arrays = (uniform, np.array([[4]]), advantages)
    loss, gradient = value_and_gradient(tpo_by_logits)(uniform, *arrays)
    expected = np.where(np.arange(10) == 4, of_answer, of_others)
    np.testing.assert_allclose(0.1 - gradient[0], expected, atol=1e-4)
    assert loss == pytest.approx(np.log(10), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "later_round", "value_is_exact", "gradient_of"),
    [
        ("exact", False, True, "KL(policy || reference)"),
        ("k3", False, True, "KL(reference || policy)"),  # E[(1 - q/p) d log p] = -E_q[d log p]
        ("k3", True, False, None),  # The policy is no longer the one that answered.
        ("k3_corrected", False, True, "KL(policy || reference)"),
        ("k3_corrected", True, True, "KL(policy || reference)"),
    ],
)
def test_the_kl_term_on_average(estimator, later_round, value_is_exact, gradient_of):
    """Over the answers of the policy, or of an older one: the value and its gradient."""
    logits, fixed, older = np.random.default_rng(5).normal(size=(3, 1, 10)).astype(np.float32)
    reference = tfd.Categorical(logits=fixed)
    old = tfd.Categorical(logits=older if later_round else logits)

    def expected_kl(logits):
        policy = tfd.Categorical(logits=logits)

        def kl_of(action):
            actions = action[None, None]
            log_probs = (grpo_mnist.log_probs_of(each, actions) for each in (policy, old))
            ratio = jnp.exp(jnp.subtract(*log_probs))
            return grpo_mnist.kl_to_reference(policy, reference, actions, ratio, estimator)

        return old.probs_parameter()[0] @ jax.vmap(kl_of)(jnp.arange(10))

    p, q = (np.exp(x[0]) / np.exp(x[0]).sum() for x in (logits, fixed))
    exact = sum(p * np.log(p / q))
    value, gradient = jax.jit(jax.value_and_grad(expected_kl))(logits)
    assert (value == pytest.approx(exact, rel=1e-5)) == value_is_exact
    for name, expected in (
        ("KL(policy || reference)", p * (np.log(p / q) - exact)),
        ("KL(reference || policy)", p - q),
    ):
        assert np.allclose(gradient[0], expected, atol=1e-6) == (name == gradient_of)


# --- The policy ---


def test_answers_are_sampled_from_the_policy():
    """Each image's own probabilities, by a chi-squared test; certain and impossible ones too."""
    logits = np.random.default_rng(1).normal(0, 2, (5, 10)).astype(np.float32)
    logits[3, :9] = logits[4, 5:] = -np.inf
    policy = tfd.Categorical(logits=logits)
    sample = jax.jit(partial(grpo_mnist.sample_answers, policy, 20_000))
    answers = np.asarray(sample(jax.random.key(3)))
    assert answers.shape == (5, 20_000)
    assert answers.dtype == np.int32
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for image in range(5):
        counts = np.bincount(answers[image], minlength=10)
        possible = probabilities[image] > 0
        assert not counts[~possible].any()
        expected = 20_000 * probabilities[image, possible]
        statistic = ((counts[possible] - expected) ** 2 / expected).sum()
        assert statistic < chi2.isf(1e-4, max(possible.sum() - 1, 1))


@pytest.fixture(scope="module")
def state():
    """The initial state of one seed, with all that a state can have."""
    states = grpo_mnist.create_state(Config(baseline="critic", beta=1.0))
    return jax.tree.map(lambda x: x[0], states)


def test_the_actor_and_the_critic(state):
    actor, critic = state.networks
    policy = actor(jnp.zeros((5, 784)))
    assert isinstance(policy, tfd.Categorical)
    assert (policy.logits.shape, critic(jnp.zeros((5, 784))).shape) == ((5, 10), (5, 1))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (actor, critic)]
    assert sizes == [118_282, 117_121]


# --- The step ---


def short(**fields):
    return Config(**{"batch_size": 32, "num_generations": 4, "num_iterations": 2} | fields)


LARGE_STEPS = {"learning_rate": 0.03, "clip_epsilon_high": 0.5}
GRPO = {"baseline": "group", "scale_rewards": "group"}
CONFIGS = {
    "one round": short(num_iterations=1),
    "clipping": short(**LARGE_STEPS),
    "REINFORCE": short(baseline="none", scale_rewards="none"),
    "GRPO": short(**GRPO, beta=5.0, kl_estimator="k3"),
    "DAPO": short(**GRPO, clip_epsilon_high=0.28, dynamic_sampling=True),
    "exact KL": short(beta=5.0),
    "corrected k3": short(beta=0.5, kl_estimator="k3_corrected"),
    # Without the bonus, some gradients of the biases cancel to rounding.
    "RLOO": short(baseline="loo", scale_rewards="none", entropy_coef=0.1),
    "moving average": short(baseline="ema"),
    "PPO": short(baseline="critic", num_minibatches=2),
    "MaxRL": short(baseline="group", scale_rewards="mean"),
    "CISPO": short(**LARGE_STEPS, loss_type="cispo"),
    "DG": short(loss_type="dg"),
    "TPO": short(loss_type="tpo", num_generations=1, learning_rate=1e-3),
}


class Step(NamedTuple):
    before: grpo_mnist.TrainState
    rollout: grpo_mnist.Rollout
    after: grpo_mnist.TrainState
    metrics: dict


def take_step(state, images, labels, config):
    optimizer = grpo_mnist.create_optimizer(config, num_steps=3)
    has_critic, has_reference = config.baseline == "critic", config.beta > 0
    networks = state.networks if has_critic else state.networks._replace(critic=None)
    before = state._replace(
        networks=networks,
        optimizer_state=optimizer.init(networks),
        # As if the actor had moved away from it before.
        reference=jax.tree.map(lambda x: 0.9 * x, state.reference) if has_reference else None,
        moving_average=jnp.float32(0.3),
    )
    _, key = jax.random.split(before.key)
    rollout = grpo_mnist.sample_rollout(before, images, labels, key, config)
    step = grpo_mnist.train_step(before, images, labels, optimizer=optimizer, config=config)
    return Step(before, rollout, *step)


def take_steps(names, dataset, state):
    """A training step of each configuration on the first images of the data set.

    One program with all of them is compiled in half the time that one for each would take. No array
    may be broadcast to another rank: (B,) never meets (B, G).
    """

    def each(state, images, labels):
        return {name: take_step(state, images, labels, CONFIGS[name]) for name in names}

    batch = dataset.train_images[:32], dataset.train_labels[:32]
    with jax.numpy_rank_promotion("raise"):
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(each, compiler_options=options)(state, *batch)


@pytest.fixture(scope="module")
def steps(dataset, state):
    return take_steps(CONFIGS, dataset, state)


class NumPyNetwork:
    """The network and Adam written down again: float64, derivatives by hand."""

    def __init__(self, network):
        self.parameters = [np.array(value, np.float64) for value in parameters_of(network)]
        self.first_moments = [np.zeros_like(value) for value in self.parameters]
        self.second_moments = [np.zeros_like(value) for value in self.parameters]
        self.updates = 0

    def forward(self, images):
        w1, b1, w2, b2, w3, b3 = self.parameters
        hidden_1 = np.maximum(images @ w1 + b1, 0)
        hidden_2 = np.maximum(hidden_1 @ w2 + b2, 0)
        return hidden_1, hidden_2, hidden_2 @ w3 + b3

    def log_policy(self, images):
        """log pi, (B, A)."""
        logits = self.forward(images)[-1]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def update(self, images, by_outputs, learning_rate):
        """By Adam (arXiv 1412.6980, algorithm 1); returns the norm of the gradient.

        by_outputs is the derivative of the loss by the outputs, (B, 10) or (B, 1).
        """
        hidden_1, hidden_2, _ = self.forward(images)
        _, _, w2, _, w3, _ = self.parameters
        by_hidden_2 = (by_outputs @ w3.T) * (hidden_2 > 0)
        by_hidden_1 = (by_hidden_2 @ w2.T) * (hidden_1 > 0)
        layers = ((images, by_hidden_1), (hidden_1, by_hidden_2), (hidden_2, by_outputs))
        gradients = [x for inputs, by in layers for x in (inputs.T @ by, by.sum(axis=0))]
        self.updates += 1
        for index, gradient in enumerate(gradients):
            m = 0.9 * self.first_moments[index] + 0.1 * gradient
            v = 0.999 * self.second_moments[index] + 0.001 * gradient**2
            self.first_moments[index], self.second_moments[index] = m, v
            m, v = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
            self.parameters[index] -= learning_rate * m / (np.sqrt(v) + 1e-8)
        return np.sqrt(sum((gradient**2).sum() for gradient in gradients))


def parameters_of(network):
    layers = (network.hidden_1, network.hidden_2, network.output)
    return [np.asarray(value) for layer in layers for value in (layer.kernel, layer.bias)]


def assert_parameters_close(network, expected_network):
    """Adam's first steps have the size of the learning rate, whatever the gradient's.

    Where a gradient is 0 but for rounding, a step may differ; nowhere else, and by little on
    average.
    """
    values = parameters_of(network)
    for value, expected in zip(values, expected_network.parameters, strict=True):
        difference = np.abs(value - expected)
        assert np.mean(difference > 1e-5) < 0.01
        assert difference.mean() < 1e-5


class NumPyLearner:
    """Loss and updates written down again, with derivatives by hand."""

    def __init__(self, networks, config, num_updates):
        self.actor = NumPyNetwork(networks.actor)
        self.critic = NumPyNetwork(networks.critic) if networks.critic else None
        self.config, self.num_updates = config, num_updates
        self.metrics = []

    def update(self, images, actions, old_log_p, rewards, advantages, reference_log_p):
        config = self.config
        log_p = self.actor.log_policy(images)
        log_probs, old_log_probs, reference_log_probs = (
            np.take_along_axis(x, actions, axis=1) for x in (log_p, old_log_p, reference_log_p)
        )
        p, ratios = np.exp(log_p), np.exp(log_probs - old_log_probs)
        low, high = 1 - config.clip_epsilon, 1 + (config.clip_epsilon_high or config.clip_epsilon)
        entropies = -(p * log_p).sum(axis=1, keepdims=True)
        loss = -config.entropy_coef * entropies.mean()
        by_logits = config.entropy_coef * p * (log_p + entropies) / len(p)
        by_log_probs = np.zeros(actions.shape)
        metrics = {"entropy": entropies.mean(), "ratio_max": ratios.max()}
        if config.loss_type == "ppo_clip":
            surrogates = advantages * ratios
            bounds = advantages * np.clip(ratios, low, high)
            loss -= np.minimum(surrogates, bounds).mean()
            by_log_probs -= np.where(surrogates <= bounds, surrogates, 0) / actions.size
            metrics["clip_ratio_low"] = np.mean((ratios < low) & (advantages < 0))
            metrics["clip_ratio_high"] = np.mean((ratios > high) & (advantages > 0))
        elif config.loss_type == "tpo":
            scores = advantages * np.eye(10)[actions[:, 0]]
            whitened = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
            target = np.exp(old_log_p + whitened)
            target /= target.sum(axis=1, keepdims=True)
            loss -= (target * log_p).sum(axis=1).mean()
            by_logits += (p - target) / len(p)
        else:
            gates = 1 / (1 + np.exp(advantages * log_probs))
            weights = np.minimum(ratios, high) if config.loss_type == "cispo" else gates
            loss -= (weights * advantages * log_probs).mean()
            by_log_probs -= weights * advantages / actions.size
            if config.loss_type == "cispo":
                metrics["clip_ratio_high"] = np.mean(ratios > high)
        if config.beta > 0 and config.kl_estimator == "exact":
            divergences = (p * (log_p - reference_log_p)).sum(axis=1, keepdims=True)
            by_logits += config.beta * p * (log_p - reference_log_p - divergences) / len(p)
        elif config.beta > 0:
            log_ratios = reference_log_probs - log_probs
            divergences, slopes = np.exp(log_ratios) - log_ratios - 1, 1 - np.exp(log_ratios)
            if config.kl_estimator == "k3_corrected":  # d ratio / d log pi = ratio
                divergences, slopes = ratios * divergences, ratios * (divergences + slopes)
            by_log_probs += config.beta * slopes / actions.size
        if config.beta > 0:
            metrics["kl"] = divergences.mean()
            loss += config.beta * metrics["kl"]
        for image, answer in np.ndindex(actions.shape):  # d log pi / d logits = onehot - p
            onehot = np.eye(10)[actions[image, answer]]
            by_logits[image] += by_log_probs[image, answer] * (onehot - p[image])
        progress = self.actor.updates / self.num_updates
        learning_rate = 0.5 * (1 + np.cos(np.pi * progress)) * config.learning_rate
        metrics["learning_rate"] = learning_rate
        metrics["grad_norm"] = self.actor.update(images, by_logits, learning_rate)
        if self.critic:
            errors = self.critic.forward(images)[-1] - rewards  # (B, 1) - (B, G)
            loss += (errors**2).mean()
            by_values = 2 * errors.sum(axis=1, keepdims=True) / errors.size
            self.critic.update(images, by_values, learning_rate)
        self.metrics.append(metrics | {"loss": loss})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_against_a_numpy_learner(name, dataset, steps):
    before, rollout, after, metrics = steps[name]
    config = CONFIGS[name]
    B, G, M = config.batch_size, config.num_generations, config.num_minibatches
    assert rollout.actions.shape == rollout.rewards.shape == (B, G)
    learner = NumPyLearner(before.networks, config, num_updates=3 * config.num_iterations * M)

    images = dataset.train_images[:B] / 255
    log_p = learner.actor.log_policy(images)
    actions = np.asarray(rollout.actions)
    assert G == 1 or np.mean([len(set(row)) for row in actions.tolist()]) > 2
    old_log_probs = np.take_along_axis(log_p, actions, axis=1)
    np.testing.assert_allclose(rollout.old_log_probs, old_log_probs, atol=1e-5)
    right = np.zeros((B, G))
    for image, answer in np.ndindex(B, G):
        right[image, answer] = actions[image, answer] == dataset.train_labels[image]
    np.testing.assert_array_equal(rollout.rewards, right)
    assert metrics["accuracy"] == metrics["reward"] == pytest.approx(right.mean())
    assert metrics["reward_std"] == pytest.approx(right.std(), abs=1e-6)
    by_image = {"group", "loo", "mean"} & {config.baseline, config.scale_rewards}
    equal = np.mean([len(set(row)) == 1 for row in right]) if by_image else 0.0
    assert metrics["frac_reward_zero_std"] == pytest.approx(equal)
    assert np.any(after.key != before.key)
    assert after.moving_average == pytest.approx(0.9 * 0.3 + 0.1 * right.mean())

    expected = learner.critic.forward(images)[-1] if learner.critic else 0.3
    advantages = advantages_by_loop(right, config.baseline, config.scale_rewards, expected)
    if config.dynamic_sampling:
        assert 0 < equal < 1
        advantages /= 1 - equal
    np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-5)

    reference = NumPyNetwork(before.reference) if config.beta > 0 else learner.actor
    batch = (images, actions, log_p, right, advantages, reference.log_policy(images))
    for _ in range(config.num_iterations):
        for piece in np.arange(B).reshape(-1, M).T:
            learner.update(*(array[piece] for array in batch))
    assert_parameters_close(after.networks.actor, learner.actor)
    assert (learner.critic is None) == (after.networks.critic is None)
    if learner.critic:
        assert_parameters_close(after.networks.critic, learner.critic)
    of_the_batch = {"accuracy", "reward", "reward_std", "frac_reward_zero_std"}
    assert set(metrics) == set(learner.metrics[0]) | of_the_batch
    for name in learner.metrics[0]:
        average = max if name == "ratio_max" else np.mean
        expected = average([update[name] for update in learner.metrics])
        assert metrics[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_ratio_is_1_in_the_first_round_and_not_in_later_ones(steps):
    once = steps["one round"].metrics
    assert once["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert once["clip_ratio_low"] == once["clip_ratio_high"] == 0.0
    assert abs(once["loss"]) < 1e-6  # the mean of the advantages
    often = steps["clipping"].metrics
    assert often["ratio_max"] > 1.5
    assert often["clip_ratio_low"] > 0
    assert often["clip_ratio_high"] > 0
    assert steps["CISPO"].metrics["clip_ratio_high"] > often["clip_ratio_high"]


# --- Without its safeguards ---

ROLLOUT = "rollout = sample_rollout(state, images, labels, sampling_key, config)\n"
UPDATE_TOO_EARLY = """    average = 0.9 * state.moving_average + 0.1 * rollout.rewards.mean()
    state = state._replace(moving_average=average)
"""
SAFEGUARDS = {  # the function that has it; a text there, and another one; whom it is to alarm
    "equal rewards give exactly zero": (
        *("group_advantages", "all_equal(rewards, statistic.group)", "False"),
        None,
    ),
    "the moving average is updated after its use": (
        *("train_step", ROLLOUT, ROLLOUT + UPDATE_TOO_EARLY + "    " + ROLLOUT),
        "moving average",
    ),
    "the lower clip acts on bad answers": ("loss_fn", " & (advantages < 0)", "", "clipping"),
    "the upper clip acts on good answers": ("loss_fn", " & (advantages > 0)", "", "clipping"),
}


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_of_the_algorithm_turns_a_test_red(safeguard, dataset, state, monkeypatch):
    """When it is taken out; as long as it is there, that test is green above."""
    function, before, after, name = SAFEGUARDS[safeguard]
    changed(monkeypatch, function, before, after)
    guard = partial(test_equal_rewards_give_exactly_zero, "batch", "batch")
    if name:
        steps = take_steps([name], dataset, state)
        guard = partial(test_the_step_against_a_numpy_learner, name, dataset, steps)
    with pytest.raises(AssertionError):
        guard()
