"""The formulas against numbers worked out by hand, and the step against a second one in NumPy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats
from tensorflow_probability.substrates.jax import distributions as tfd

import grpo_mnist
from grpo_mnist import Config, cispo_loss, dg_loss, ppo_clip_loss

COMBINATIONS = list(itertools.product(grpo_mnist.BASELINES, grpo_mnist.SCALES))


# --- Advantages ---


def advantages_of(rewards, baseline, scale_rewards, **options):
    names = {"baseline": baseline, "scale_rewards": scale_rewards}
    return grpo_mnist.group_advantages(rewards, **names, **options)


# All six: mean 2, deviation sqrt(8 / 6) = 1.1547; the first image's answers: mean 1, deviation
# sqrt(2 / 3) = 0.8165; the second's are equal.
TWO_IMAGES = [[0, 1, 2], [3, 3, 3]]
ALIKE = [[0, 4e-8]]  # They deviate by 2e-8, to which 1e-8 is added.
MAXRL = [[1, 0, 0, 0], [1, 1, 1, 1], [5, -1, 0, 0], [1, -1, 0, 0], [1, -3, 0, 0]]


@pytest.mark.parametrize(
    ("rewards", "baseline", "scale_rewards", "expected"),
    [
        (TWO_IMAGES, "batch", "none", [[-2, -1, 0], [1, 1, 1]]),
        (TWO_IMAGES, "group", "none", [[-1, 0, 1], [0, 0, 0]]),
        (TWO_IMAGES, "loo", "none", [[-1.5, 0, 1.5], [0, 0, 0]]),
        (TWO_IMAGES, "ema", "none", TWO_IMAGES),  # By default, 0 is expected.
        (TWO_IMAGES, "critic", "none", [[-1, 0, 1], [-1, -1, -1]]),
        (TWO_IMAGES, "none", "none", TWO_IMAGES),
        (TWO_IMAGES, "batch", "batch", [[-1.7321, -0.8660, 0], [0.8660, 0.8660, 0.8660]]),
        (TWO_IMAGES, "group", "group", [[-1.2247, 0, 1.2247], [0, 0, 0]]),
        (TWO_IMAGES, "loo", "group", [[-1.8371, 0, 1.8371], [0, 0, 0]]),
        (TWO_IMAGES, "batch", "group", [[-2.4495, -1.2247, 0], [0, 0, 0]]),
        (TWO_IMAGES, "critic", "batch", [[-0.8660, 0, 0.8660], [-0.8660, -0.8660, -0.8660]]),
        (ALIKE, "none", "batch", [[0, 4 / 3]]),
        (ALIKE, "none", "group", [[0, 4 / 3]]),
        ([[np.nan, 1]], "batch", "batch", [[np.nan, np.nan]]),  # which do not pass for equal
        ([[np.nan, 1]], "group", "mean", [[np.nan, np.nan]]),
        ([[np.nan, 1]], "none", "mean", [[np.nan, np.nan]]),
        (MAXRL, "group", "mean", [[3, -1, -1, -1], [0] * 4, [4, -2, -1, -1], [0] * 4, [0] * 4]),
        (MAXRL, "none", "mean", [[4, 0, 0, 0], [1] * 4, [5, -1, 0, 0], [0] * 4, [0] * 4]),
    ],
)
def test_every_baseline_by_hand(rewards, baseline, scale_rewards, expected):
    values = {"expected_rewards": np.array([[1.0], [4.0]])} if baseline == "critic" else {}
    advantages = advantages_of(rewards, baseline, scale_rewards, **values)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)


def advantages_by_loop(rewards, baseline, scale_rewards, expected_rewards):
    """The definitions, one answer after the other, in float64."""
    rewards = np.asarray(rewards, np.float64)
    expected_rewards = np.broadcast_to(expected_rewards, (len(rewards), 1))
    advantages = np.zeros(rewards.shape)
    for image, answer in np.ndindex(rewards.shape):
        own, reward = rewards[image], rewards[image, answer]
        groups = {"batch": rewards, "group": own, "loo": own}
        compared = [groups[name] for name in (baseline, scale_rewards) if name in groups]
        if any(np.ptp(group) == 0 for group in compared):
            continue  # nothing to compare: 0
        if scale_rewards == "mean" and own.mean() <= 0:
            continue  # MaxRL: nothing right, nothing to learn
        if baseline in ("ema", "critic"):
            reward -= expected_rewards[image, 0]
        elif baseline == "loo":
            reward -= np.delete(own, answer).mean()
        elif baseline != "none":
            reward -= groups[baseline].mean()
        if scale_rewards == "mean":
            reward /= own.mean()
        elif scale_rewards != "none":
            reward /= groups[scale_rewards].std() + 1e-8
        advantages[image, answer] = reward
    return advantages


@given(
    st.sampled_from([(5, 7), (30, 1)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
    )
)
@settings(max_examples=30)
def test_advantages_against_a_loop(rewards):
    expected_rewards = np.arange(len(rewards), dtype=np.float32)[:, None] - 2.5
    for names in COMBINATIONS:
        # No deviations below what float32 can tell from 0, and no means.
        rounded = np.round(rewards, 0 if "mean" in names else 2)
        advantages = advantages_of(rounded, *names, expected_rewards=expected_rewards)
        assert advantages.dtype == jnp.float32
        expected = advantages_by_loop(rounded, *names, expected_rewards)
        np.testing.assert_allclose(advantages, expected, rtol=2e-3, atol=2e-3, err_msg=f"{names}")


@pytest.mark.parametrize("names", [x for x in COMBINATIONS if {"batch", "group", "loo"} & {*x}])
def test_equal_rewards_give_exactly_zero(names):
    """However inexact their mean is in float32; for images, beside others with other rewards."""
    for values in np.random.default_rng(0).uniform(-1e6, 1e6, (20, 5)).astype(np.float32):
        rewards = np.full((30, 1), values[0])
        if {"group", "loo"} & {*names}:
            rewards = np.tile(values[:, None], 7)
        assert not np.any(advantages_of(rewards, *names))


def test_dynamic_sampling_is_the_mean_over_the_images_with_a_signal():
    """Two of these four have one. The losses are means, and proportional to the advantages."""
    advantages = np.array([[0, 0], [1, -1], [0, 0], [0, 3]], np.float32)
    np.testing.assert_allclose(grpo_mnist.average_over_signals(advantages), 2 * advantages)
    assert not np.any(grpo_mnist.average_over_signals(np.zeros((4, 4), np.float32)))


def test_names_and_shapes_that_do_not_exist_are_refused():
    for names, unknown in ((("mean", "batch"), "'mean'"), (("batch", "std"), "'std'")):
        with pytest.raises(KeyError, match=unknown):
            advantages_of([[0.0, 1.0]], *names)
    for rewards, shape in (([0.0, 1.0], r"\(2,\)"), ([[[0.0, 1.0]]], r"\(1, 1, 2\)")):
        with pytest.raises(ValueError, match=f"not {shape}"):
            advantages_of(rewards, "batch", "batch")


# --- Losses ---


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
        (cispo_loss, 0.5, 1.1, 2.0, 1.5249, -2.2),
        (cispo_loss, 0.5, 1.5, 2.0, 1.8022, -2.6),  # held at 1.3 times, and not at 0
        (cispo_loss, 0.5, 1.5, -2.0, -1.8022, 2.6),  # whatever the sign
        (cispo_loss, 0.5, 0.5, 2.0, 0.6931, -1.0),  # without a lower bound
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
    result, gradient = jax.value_and_grad(loss)(*arrays, 0.2, 0.3)
    np.testing.assert_allclose([result, gradient.item()], [value, slope], atol=1e-4)


def test_the_target_of_tpo_by_hand():
    """Answer 4 of a uniform policy, judged five ways; the gradient is the policy less the target.

    Only the advantage's sign counts: exp(3) / (exp(3) + 9 exp(-1/3)) = 0.7570, exp(-3) / (exp(-3) +
    9 exp(1/3)) = 0.0039. If the advantage is 0, the policy remains the target.
    """
    advantages = np.array([[0.001], [100], [-0.001], [-7], [0]], np.float32)
    of_answer = np.array([[0.7570], [0.7570], [0.0039], [0.0039], [0.1]])
    uniform, actions = np.zeros((5, 10), np.float32), np.full((5, 1), 4)

    def loss_of(logits):
        return grpo_mnist.tpo_loss(tfd.Categorical(logits), uniform, actions, advantages)

    loss, gradient = jax.value_and_grad(loss_of)(uniform)
    expected = np.where(np.arange(10) == 4, of_answer, (1 - of_answer) / 9)
    np.testing.assert_allclose(0.1 - 5 * gradient, expected, atol=1e-4)
    assert loss == pytest.approx(np.log(10), rel=1e-5)


def test_the_kl_term_on_average():
    """Over the answers of the policy or, if corrected, an older one: the value and its gradient."""
    logits = np.random.default_rng(5).normal(size=(3, 10)).astype(np.float32)
    p, q, older = special.softmax(logits, axis=1)
    exact = stats.entropy(p, q)
    gradient_of_kl, gradient_of_reverse_kl = p * (np.log(p / q) - exact), p - q

    def average(estimator, answering, logits):
        policy, reference = (tfd.Categorical(logits=x[None]) for x in (logits, np.log(q)))

        def kl_of(action):
            actions = action[None, None]
            ratio = policy.prob(actions) / jnp.asarray(answering)[action]
            return grpo_mnist.kl_to_reference(policy, reference, actions, ratio, estimator)

        return answering @ jax.vmap(kl_of)(jnp.arange(10))

    for estimator, answering, expected in (
        ("exact", p, gradient_of_kl),
        ("k3", p, gradient_of_reverse_kl),  # E[(1 - q/p) d log p] = -E_q[d log p]
        ("k3_corrected", p, gradient_of_kl),
        ("k3_corrected", older, gradient_of_kl),
    ):
        average_of = partial(average, estimator, answering)
        value, gradient = jax.jit(jax.value_and_grad(average_of))(logits[0])
        assert value == pytest.approx(exact, rel=1e-5)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


# --- The policy ---


def test_answers_are_sampled_from_the_policy():
    """Each image's own probabilities, by a chi-squared test; certain and impossible ones too."""
    logits = np.random.default_rng(1).normal(0, 2, (5, 10)).astype(np.float32)
    logits[3, :9] = logits[4, 5:] = -np.inf
    sample = jax.jit(partial(grpo_mnist.sample_answers, tfd.Categorical(logits=logits), 20_000))
    answers = np.asarray(sample(jax.random.key(3)))
    assert (answers.shape, answers.dtype) == ((5, 20_000), np.int32)
    for image, probabilities in zip(answers, special.softmax(np.float64(logits), 1), strict=True):
        counts, possible = np.bincount(image, minlength=10), probabilities > 0
        assert not counts[~possible].any()
        expected = 20_000 * probabilities[possible]
        assert possible.sum() == 1 or stats.chisquare(counts[possible], expected).pvalue > 1e-4


@pytest.fixture(scope="module")
def state():
    """The initial state of one seed, with an actor and a critic."""
    states = grpo_mnist.create_state(Config(baseline="critic"))
    return jax.tree.map(lambda x: x[0], states)


def test_the_actor_and_the_critic(state):
    actor, critic = state.networks
    policy = actor(jnp.zeros((5, 784)))
    assert isinstance(policy, tfd.Categorical)
    assert (policy.logits.shape, critic(jnp.zeros((5, 784))).shape) == ((5, 10), (5, 1))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (actor, critic)]
    assert sizes == [118_282, 117_121]


# --- The step ---


short = partial(Config, batch_size=32, num_generations=4, num_iterations=2)
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


def take_step(state, images, labels, config):
    """A state made of that one, its rollout, the state after the step, and the step's metrics."""
    optimizer = grpo_mnist.create_optimizer(config, num_steps=3)
    actor, critic = state.networks
    networks = grpo_mnist.Networks(actor, critic if config.baseline == "critic" else None)
    # As if the actor had moved away from the reference before.
    reference = jax.tree.map(lambda x: 0.9 * x, actor) if config.beta > 0 else None
    adam = optimizer.init(networks)
    before = grpo_mnist.TrainState(networks, adam, reference, jnp.float32(0.3), state.key)
    _, key = jax.random.split(before.key)
    rollout = grpo_mnist.sample_rollout(before, images, labels, key, config)
    step = grpo_mnist.train_step(before, images, labels, optimizer=optimizer, config=config)
    return before, rollout, *step


def take_steps(names, dataset, state):
    """A training step of each of these configurations on the first images of the data set.

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


def parameters_of(network):
    layers = (network.hidden_1, network.hidden_2, network.output)
    return [np.array(x, np.float64) for layer in layers for x in (layer.kernel, layer.bias)]


class NumPyNetwork:
    """The network and Adam written down again: float64, derivatives by hand."""

    def __init__(self, network):
        self.parameters = parameters_of(network)
        self.moments = [(0.0, 0.0)] * 6
        self.updates = 0

    def forward(self, images):
        w1, b1, w2, b2, w3, b3 = self.parameters
        hidden_1 = np.maximum(images @ w1 + b1, 0)
        hidden_2 = np.maximum(hidden_1 @ w2 + b2, 0)
        return hidden_1, hidden_2, hidden_2 @ w3 + b3

    def log_policy(self, images):
        """log pi, (B, A)."""
        return special.log_softmax(self.forward(images)[-1], axis=1)

    def update(self, images, by_outputs, learning_rate):
        """By Adam (arXiv 1412.6980, algorithm 1); returns the norm of the gradient."""
        hidden_1, hidden_2, _ = self.forward(images)
        _, _, w2, _, w3, _ = self.parameters
        by_hidden_2 = (by_outputs @ w3.T) * (hidden_2 > 0)
        by_hidden_1 = (by_hidden_2 @ w2.T) * (hidden_1 > 0)
        layers = ((images, by_hidden_1), (hidden_1, by_hidden_2), (hidden_2, by_outputs))
        gradients = [x for inputs, by in layers for x in (inputs.T @ by, by.sum(axis=0))]
        self.updates += 1
        for index, gradient in enumerate(gradients):
            m, v = self.moments[index]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            self.moments[index] = m, v
            m, v = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
            self.parameters[index] -= learning_rate * m / (np.sqrt(v) + 1e-8)
        return np.sqrt(sum((gradient**2).sum() for gradient in gradients))


def assert_parameters_close(network, expected_network):
    """Adam's steps are of one size, and may differ where a gradient is 0 but for rounding."""
    for value, expected in zip(parameters_of(network), expected_network.parameters, strict=True):
        difference = np.abs(value - expected)
        assert np.mean(difference > 1e-5) < 0.01
        assert difference.mean() < 1e-5


def loss_by_image(log_p, constant_log_p, config, actions, old_log_p, advantages, reference_log_p):
    """The loss of each image (B,), and its metrics. Through constant_log_p goes no gradient."""
    log_probs, constant, old, reference = (
        np.take_along_axis(x, actions, axis=1)
        for x in (log_p, constant_log_p, old_log_p, reference_log_p)
    )
    p, ratios = np.exp(log_p), np.exp(log_probs - old)
    low, high = 1 - config.clip_epsilon, 1 + (config.clip_epsilon_high or config.clip_epsilon)
    metrics = {"entropy": -(p * log_p).sum(axis=1), "ratio_max": ratios}
    if config.loss_type == "ppo_clip":
        bounds = advantages * np.clip(ratios, low, high)
        loss = -np.minimum(advantages * ratios, bounds).mean(axis=1)
        metrics["clip_ratio_low"] = (ratios < low) & (advantages < 0)
        metrics["clip_ratio_high"] = (ratios > high) & (advantages > 0)
    elif config.loss_type == "tpo":
        scores = stats.zscore(advantages * np.eye(10)[actions[:, 0]], axis=1)
        loss = -(special.softmax(old_log_p + scores, axis=1) * log_p).sum(axis=1)
    else:
        weights = 1 / (1 + np.exp(advantages * constant))
        if config.loss_type == "cispo":
            weights = np.minimum(np.exp(constant - old), high)
            metrics["clip_ratio_high"] = ratios > high
        loss = -(weights * advantages * log_probs).mean(axis=1)
    loss = loss - config.entropy_coef * metrics["entropy"]
    if config.beta == 0:
        return loss, metrics
    if config.kl_estimator == "exact":
        metrics["kl"] = (p * (log_p - reference_log_p)).sum(axis=1)
    else:
        divergences = np.exp(reference - log_probs) - (reference - log_probs) - 1
        weights = ratios if config.kl_estimator == "k3_corrected" else 1.0
        metrics["kl"] = (weights * divergences).mean(axis=1)
    return loss + config.beta * metrics["kl"], metrics


def update(actor, critic, config, images, rewards, *batch):
    """An update of both networks: its metrics. Derivatives by logits are central differences."""
    log_p = actor.log_policy(images)
    loss, metrics = loss_by_image(log_p, log_p, config, *batch)
    by_logits = np.zeros(log_p.shape)
    for logit, shift in enumerate(1e-5 * np.eye(10)):
        moved = (special.log_softmax(log_p + x, axis=1) for x in (shift, -shift))
        more, less = (loss_by_image(x, log_p, config, *batch)[0] for x in moved)
        by_logits[:, logit] = (more - less) / 2e-5 / len(images)
    progress = actor.updates / (3 * config.num_iterations * config.num_minibatches)
    learning_rate = 0.5 * (1 + np.cos(np.pi * progress)) * config.learning_rate
    metrics |= {"loss": loss.mean(), "learning_rate": learning_rate}
    metrics["grad_norm"] = actor.update(images, by_logits, learning_rate)
    if critic:
        errors = critic.forward(images)[-1] - rewards  # (B, 1) - (B, G)
        metrics["loss"] += (errors**2).mean()
        by_values = 2 * errors.sum(axis=1, keepdims=True) / errors.size
        critic.update(images, by_values, learning_rate)
    return {name: np.max(x) if name == "ratio_max" else np.mean(x) for name, x in metrics.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_against_a_numpy_learner(name, dataset, steps):
    before, rollout, after, metrics = steps[name]
    config = CONFIGS[name]
    B, G, M = config.batch_size, config.num_generations, config.num_minibatches
    actor = NumPyNetwork(before.networks.actor)
    critic = NumPyNetwork(before.networks.critic) if config.baseline == "critic" else None

    images = dataset.train_images[:B] / 255
    log_p = actor.log_policy(images)
    actions = np.asarray(rollout.actions)
    assert actions.shape == rollout.rewards.shape == (B, G)
    assert G == 1 or np.mean([len(set(row)) for row in actions.tolist()]) > 2
    old_log_probs = np.take_along_axis(log_p, actions, axis=1)
    np.testing.assert_allclose(rollout.old_log_probs, old_log_probs, atol=1e-5)
    right = np.equal(actions, dataset.train_labels[:B].reshape(B, 1)).astype(float)
    np.testing.assert_array_equal(rollout.rewards, right)
    assert rollout.rewards.dtype == jnp.float32
    assert metrics["accuracy"] == metrics["reward"] == pytest.approx(right.mean())
    assert metrics["reward_std"] == pytest.approx(right.std(), abs=1e-6)
    by_image = {"group", "loo", "mean"} & {config.baseline, config.scale_rewards}
    equal = np.mean(np.ptp(right, axis=1) == 0) if by_image else 0.0
    assert metrics["frac_reward_zero_std"] == pytest.approx(equal)
    assert np.any(after.key != before.key)
    assert after.moving_average == pytest.approx(0.9 * 0.3 + 0.1 * right.mean())

    expected = critic.forward(images)[-1] if critic else 0.3
    advantages = advantages_by_loop(right, config.baseline, config.scale_rewards, expected)
    if config.dynamic_sampling:
        assert 0 < equal < 1
        advantages /= 1 - equal
    np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-5)

    reference = NumPyNetwork(before.reference) if config.beta > 0 else actor
    batch = (images, right, actions, log_p, advantages, reference.log_policy(images))
    pieces = [*np.arange(B).reshape(-1, M).T] * config.num_iterations
    updates = [update(actor, critic, config, *(x[piece] for x in batch)) for piece in pieces]
    assert_parameters_close(after.networks.actor, actor)
    assert (critic is None) == (after.networks.critic is None)
    if critic:
        assert_parameters_close(after.networks.critic, critic)
    of_the_batch = {"accuracy", "reward", "reward_std", "frac_reward_zero_std"}
    assert set(metrics) == set(updates[0]) | of_the_batch
    for metric in updates[0]:
        average = max if metric == "ratio_max" else np.mean
        expected = average([each[metric] for each in updates])
        assert metrics[metric] == pytest.approx(expected, rel=1e-3, abs=1e-5), metric
    if name == "clipping":  # both bounds
        assert min(metrics["clip_ratio_low"], metrics["clip_ratio_high"]) > 0


ROLLOUT = "rollout = sample_rollout(state, images, labels, sampling_key, config)\n"
AVERAGE = "average = 0.9 * state.moving_average + 0.1 * rollout.rewards.mean()\n    "
TOO_EARLY = f"{ROLLOUT}    {AVERAGE}state = state._replace(moving_average=average)\n    {ROLLOUT}"
SAFEGUARDS = {  # a text of a function, what takes its place, and the configuration that notices it
    "all_equal(rewards, statistic.group)": ("group_advantages", "False", None),
    ROLLOUT: ("train_step", TOO_EARLY, "moving average"),  # updated before its use
    " & (advantages < 0)": ("loss_fn", "", "clipping"),
    " & (advantages > 0)": ("loss_fn", "", "clipping"),
}


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_each_safeguard_turns_a_test_red(safeguard, dataset, state, monkeypatch):
    function, without, name = SAFEGUARDS[safeguard]
    changed(monkeypatch, function, safeguard, without)
    guard = partial(test_equal_rewards_give_exactly_zero, ("batch", "batch"))
    if name:
        steps = take_steps([name], dataset, state)
        guard = partial(test_the_step_against_a_numpy_learner, name, dataset, steps)
    with pytest.raises(AssertionError):
        guard()
