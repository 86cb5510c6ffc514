"""The formulas against numbers worked out by hand, and the step against a NumPy loop."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binom, chi2
from tensorflow_probability.substrates.jax import distributions as tfd

import grpo_mnist
from grpo_mnist import (
    Actor,
    Config,
    Critic,
    calculate_rewards,
    cispo_loss,
    dg_loss,
    group_advantages,
    ppo_clip_loss,
    tpo_loss,
)

BASELINES = ("batch", "group", "loo", "ema", "critic", "none")
SCALES = ("batch", "group", "none", "mean")
SHAPES = st.sampled_from([(1, 1), (1, 8), (5, 7), (300, 1)])  # each is compiled once
BY_ANSWER = (ppo_clip_loss, cispo_loss, dg_loss)  # the losses that are a mean over the answers
REWARDS = SHAPES.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)


@pytest.mark.parametrize("baseline", BASELINES)
def test_no_array_is_broadcast_by_accident(baseline):
    """(B,) never meets (B, G): with different sizes and ranks, every formula keeps its shape."""
    expected = jnp.zeros((3, 1)) if baseline == "critic" else 0.0
    with jax.numpy_rank_promotion("raise"):
        rewards = calculate_rewards(jnp.zeros((3, 4), int), jnp.zeros(3, int))
        for scale_rewards in SCALES:
            advantages = group_advantages(
                rewards, baseline=baseline, scale_rewards=scale_rewards, expected_rewards=expected
            )
            assert advantages.shape == (3, 4)
        weighted = grpo_mnist.average_over_signals(advantages)
        policy = tfd.Categorical(logits=jnp.zeros((3, 10)))
        actions = jnp.zeros((3, 4), int)
        losses = [
            *(loss(advantages, rewards, advantages, 0.2, 0.2) for loss in BY_ANSWER),
            tpo_loss(policy, policy.logits, actions[:, :1], advantages[:, :1]),
            *(
                grpo_mnist.kl_to_reference(policy, policy, actions, rewards, estimator)
                for estimator in ("exact", "k3", "k3_corrected")
            ),
        ]
    assert (rewards.shape, weighted.shape) == ((3, 4), (3, 4))
    assert {loss.shape for loss in losses} == {()}


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


EIGHT_REWARDS = [[7.2, 8.5, 6.1, 9.0, 7.8, 6.5, 8.2, 7.5]]  # their mean is 7.6


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_advantages_of_real_rewards_by_hand(baseline):
    advantages = group_advantages(EIGHT_REWARDS, baseline=baseline, scale_rewards="none")
    expected = [[-0.4, 0.9, -1.5, 1.4, 0.2, -1.1, 0.6, -0.1]]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)


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
    expected_rewards = {"ema": 0.5, "critic": np.array([[1.0], [4.0]])}.get(baseline)
    advantages = group_advantages(
        [[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]],
        baseline=baseline,
        scale_rewards=scale_rewards,
        expected_rewards=expected_rewards,
    )
    np.testing.assert_allclose(advantages, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("rewards", "with_group", "with_none"),
    [
        ([1, 0, 0, 0], [3, -1, -1, -1], [4, 0, 0, 0]),
        ([1, 1, 1, 0], [0.3333, 0.3333, 0.3333, -1], [1.3333, 1.3333, 1.3333, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
        ([5, -1, 0, 0], [4, -2, -1, -1], [5, -1, 0, 0]),
        ([1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),  # the mean is 0
        ([1, -3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),  # the mean is below 0
    ],
)
def test_maxrl_by_hand(rewards, with_group, with_none):
    """Beside an image of other rewards, which are none of its concern."""
    for baseline, expected in (("group", with_group), ("none", with_none)):
        advantages = group_advantages(
            [rewards, [0, 9, 9, 9]], baseline=baseline, scale_rewards="mean"
        )
        np.testing.assert_allclose(advantages[0], expected, atol=1e-4)


@pytest.mark.parametrize("num_answers", [2, 8, 64])
@pytest.mark.parametrize(("baseline", "power"), [("group", -1), ("none", 0)])
def test_the_expected_gradient_of_maxrl(num_answers, baseline, power):
    """E[sum of A grad log pi] / G = weight grad p, where p is the probability of the right answer.

    k of G answers are right with a binomial probability. The mean of grad log pi is grad p / p over
    the right answers and -grad p / (1 - p) over the wrong ones. The weights are (1 - (1 - p)^G) / p
    without a baseline, with G - 1 for G with one, and tend to the likelihood's.
    """
    right = np.arange(num_answers + 1)  # k
    rewards = np.arange(num_answers) < right[:, None]
    advantages = group_advantages(rewards, baseline=baseline, scale_rewards="mean")
    of_right, of_wrong = np.asarray(advantages)[:, [0, -1]].T
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        by_p = (right * of_right / p - (num_answers - right) * of_wrong / (1 - p)) / num_answers
        weight = binom.pmf(right, num_answers, p) @ by_p
        np.testing.assert_allclose(weight, (1 - (1 - p) ** (num_answers + power)) / p, rtol=1e-5)
        if num_answers == 2 and baseline == "group":
            assert weight == pytest.approx(1)  # as REINFORCE
        if num_answers == 64 and p >= 0.1:
            assert weight == pytest.approx(1 / p, rel=2e-3)  # as with the labels: grad log p


def advantages_by_loop(rewards, baseline, scale_rewards, expected_rewards=None):
    """The definitions, one reward after the other, in Python's own float64."""

    def mean(values):
        return sum(values) / len(values)

    def deviation(values):
        return mean([(value - mean(values)) ** 2 for value in values]) ** 0.5

    rows = [[float(reward) for reward in row] for row in rewards]
    batch = [reward for row in rows for reward in row]
    advantages = np.zeros(np.shape(rewards))
    for image, answer in np.ndindex(advantages.shape):
        own = rows[image]
        if scale_rewards == "mean" and mean(own) <= 0:
            continue  # MaxRL: nothing right, nothing to learn
        group = own if {baseline, scale_rewards} & {"group", "loo"} else batch
        if len(set(group)) == 1 and {baseline, scale_rewards} & {"batch", "group", "loo"}:
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


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@given(rewards=REWARDS, expected_reward=st.floats(-10, 10, width=32))
@settings(max_examples=25)
def test_advantages_against_a_loop(baseline, scale_rewards, rewards, expected_reward):
    # No deviations below what float32 can tell from 0, and no means.
    rewards = np.round(rewards, 0 if scale_rewards == "mean" else 2)
    expected_rewards = np.float32(expected_reward)
    if baseline == "critic":
        expected_rewards = expected_rewards + np.arange(len(rewards), dtype=np.float32)[:, None]
    advantages = group_advantages(
        rewards,
        baseline=baseline,
        scale_rewards=scale_rewards,
        expected_rewards=expected_rewards,
    )
    assert advantages.dtype == jnp.float32
    expected = advantages_by_loop(rewards, baseline, scale_rewards, expected_rewards)
    np.testing.assert_allclose(advantages, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("baseline", ["batch", "group", "loo"])
@given(reward=st.floats(-1e6, 1e6, width=32), shape=SHAPES)
@settings(max_examples=25)
def test_equal_rewards_give_exactly_zero(baseline, scale_rewards, reward, shape):
    rewards = np.full(shape, reward, np.float32)
    assert not np.any(group_advantages(rewards, baseline=baseline, scale_rewards=scale_rewards))


@given(reward=st.integers(-(10**6), 10**6), shape=SHAPES)
def test_equal_rewards_divided_by_their_mean_are_1_or_0(reward, shape):
    rewards = np.full(shape, reward, np.float32)
    advantages = group_advantages(rewards, baseline="none", scale_rewards="mean")
    np.testing.assert_allclose(advantages, float(reward > 0), rtol=1e-5)


@pytest.mark.parametrize(
    "names", [("group", "group"), ("loo", "none"), ("batch", "group"), ("group", "mean")]
)
@given(rewards=hnp.arrays(np.float32, (5, 7), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=25)
def test_an_image_of_equal_rewards_gets_exactly_zero_beside_others(names, rewards):
    rewards[2] = 0.1
    advantages = group_advantages(rewards, baseline=names[0], scale_rewards=names[1])
    assert not np.any(advantages[2])


@pytest.mark.parametrize(
    ("baseline", "scale_rewards", "same"),
    [
        ("batch", "batch", True),
        ("batch", "group", True),
        ("group", "group", True),
        ("ema", "batch", True),
        ("ema", "group", True),
        ("critic", "group", True),
        ("critic", "batch", False),
        ("group", "batch", False),
        ("loo", "batch", False),
        ("loo", "group", False),
    ],
)
def test_whether_the_deviation_is_taken_before_or_after_the_subtraction(
    baseline, scale_rewards, same
):
    """As the docstring of group_advantages says where it matters."""
    rewards = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    expected = {"ema": np.float32(0.3), "critic": np.linspace(0, 2, 6)[:, None]}.get(baseline)
    names = {"baseline": baseline, "expected_rewards": expected}
    before = group_advantages(rewards, scale_rewards=scale_rewards, **names)
    unscaled = np.asarray(group_advantages(rewards, scale_rewards="none", **names))
    after = unscaled / unscaled.std(axis={"batch": None, "group": 1}[scale_rewards], keepdims=True)
    assert (np.abs(after - before).max() < 1e-4) == same


def test_dynamic_sampling_is_the_mean_over_the_images_with_a_signal():
    rewards = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32)
    advantages = group_advantages(rewards, baseline="group", scale_rewards="group")
    log_probs, old_log_probs = np.log(np.random.default_rng(0).uniform(0.1, 0.9, (2, 4, 4)))
    loss = ppo_clip_loss(
        log_probs, old_log_probs, grpo_mnist.average_over_signals(advantages), 0.2, 0.3
    )
    some = np.array([1, 3])
    expected = ppo_clip_loss(log_probs[some], old_log_probs[some], advantages[some], 0.2, 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not np.any(grpo_mnist.average_over_signals(np.zeros((4, 4), np.float32)))


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


@pytest.mark.parametrize(
    ("baseline", "scale_rewards", "unknown"),
    [("mean", "batch", "'mean'"), ("batch", "std", "'std'"), ("none", "", "''")],
)
def test_an_unknown_baseline_or_scale_is_refused(baseline, scale_rewards, unknown):
    with pytest.raises(KeyError, match=unknown):
        group_advantages([[0.0, 1.0]], baseline=baseline, scale_rewards=scale_rewards)


@pytest.mark.parametrize("rewards", [[0.0, 1.0], [[[0.0, 1.0]]]])
def test_rewards_of_another_shape_are_refused(rewards):
    with pytest.raises(ValueError, match=re.escape(f"not {np.shape(rewards)}")):
        group_advantages(rewards, baseline="batch", scale_rewards="batch")


@pytest.mark.parametrize("names", [("batch", "batch"), ("group", "mean"), ("none", "mean")])
def test_rewards_that_are_not_numbers_do_not_pass_for_equal(names):
    advantages = group_advantages([[jnp.nan, 1.0]], baseline=names[0], scale_rewards=names[1])
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


@pytest.mark.parametrize(
    ("loss", "log_prob", "ratio", "advantage", "value", "slope"),
    # slope: of the loss, by log pi. The bound is 1.3; log 0.5 = -0.6931.
    [
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
        (dg_loss, 0.5, 1.0, 0.0, 0.0, 0.0),
    ],
)
def test_other_losses_by_hand(loss, log_prob, ratio, advantage, value, slope):
    arrays = (np.full((1, 1), x, np.float32) for x in (np.log(log_prob), np.log(log_prob / ratio)))
    result, gradient = jax.value_and_grad(loss)(*arrays, np.full((1, 1), advantage), 0.2, 0.3)
    np.testing.assert_allclose([result, gradient.item()], [value, slope], atol=1e-4)


def loss_of_answer(name, log_prob, old_log_prob, advantage, low, high):
    """The definitions: the loss of one answer, and its derivative by log pi."""
    ratio = np.exp(log_prob - old_log_prob)
    if name == "dg":
        weight = 1 / (1 + np.exp(advantage * log_prob))
    elif name == "cispo":
        weight = min(ratio, high)
    else:
        held = (ratio < low and advantage < 0) or (ratio > high and advantage > 0)
        surrogate = min(advantage * ratio, advantage * min(max(ratio, low), high))
        return -surrogate, 0.0 if held else -advantage * ratio
    return -weight * advantage * log_prob, -weight * advantage


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "dg"])
@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-2, 2, width=32)))
def test_losses_against_a_loop(name, arrays):
    total, slopes = 0.0, np.zeros((4, 5))
    for index in np.ndindex(4, 5):
        answer = (float(array[index]) for array in arrays)
        loss, slopes[index] = loss_of_answer(name, *answer, 1 - 0.2, 1 + 0.28)
        total += loss
    loss, gradient = jax.value_and_grad(grpo_mnist.LOSSES[name])(*arrays, 0.2, 0.28)
    np.testing.assert_allclose(loss, total / 20, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, slopes / 20, rtol=1e-4, atol=1e-5)


@given(hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-2, 2, width=32)))
def test_cispo_without_a_bound_has_the_gradient_of_the_plain_surrogate(arrays):
    log_probs, old_log_probs, advantages = arrays

    def surrogate(log_probs):
        return -(jnp.exp(log_probs - old_log_probs) * advantages).mean()

    gradient = jax.grad(cispo_loss)(*arrays, 0.2, 1e6)
    np.testing.assert_allclose(gradient, jax.grad(surrogate)(log_probs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "clip_epsilon_high", "slope"),
    [(cispo_loss, 0.2, -1.2), (cispo_loss, 4.0, -2.0), (ppo_clip_loss, 0.2, 0.0)],
)
def test_the_bound_of_cispo_leaves_a_gradient(loss, clip_epsilon_high, slope):
    """Of a good answer that has become twice as probable."""
    log_probs = jnp.log(jnp.array([[0.4], [0.2]]))
    gradient = jax.grad(loss)(*log_probs[:, None], jnp.ones((1, 1)), 0.2, clip_epsilon_high)
    np.testing.assert_allclose(gradient, [[slope]], rtol=1e-5)


def target_by_loop(old_log_p, action, advantage):
    """TPO's definition: what the policy is drawn to after one answer -> (A,)."""
    scores = [advantage if answer == action else 0.0 for answer in range(10)]
    mean = sum(scores) / 10
    deviation = (sum((score - mean) ** 2 for score in scores) / 10) ** 0.5
    if deviation >= 1e-6:
        scores = [(score - mean) / deviation for score in scores]
    weights = np.array([np.exp(old_log_p[answer] + scores[answer]) for answer in range(10)])
    return weights / weights.sum()


@given(
    logits=hnp.arrays(np.float32, (2, 4, 10), elements=st.floats(-5, 5, width=32)),
    actions=hnp.arrays(np.int32, (4, 1), elements=st.integers(0, 9)),
    advantages=hnp.arrays(np.float32, (4, 1), elements=st.sampled_from([-3, -0.01, 0, 0.5, 20])),
)
def test_tpo_against_a_loop(logits, actions, advantages):
    total, expected = 0.0, np.zeros((4, 10))
    for image in range(4):
        log_p, old_log_p = (np.asarray(x[image], np.float64) for x in logits)
        log_p = log_p - np.log(np.exp(log_p).sum())
        target = target_by_loop(old_log_p, actions[image, 0], float(advantages[image, 0]))
        total -= sum(target * log_p)
        expected[image] = np.exp(log_p) - target
    loss, gradient = tpo_by_logits(*logits, actions, advantages)
    np.testing.assert_allclose(loss, total / 4, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected / 4, atol=1e-5)


def tpo_by_logits(logits, old_logits, actions, advantages):
    """The loss and its derivative."""

    def loss(logits):
        return tpo_loss(tfd.Categorical(logits=logits), old_logits, actions, advantages)

    return jax.value_and_grad(loss)(logits)


@pytest.mark.parametrize(
    ("advantage", "of_answer", "of_others"),
    # exp(3) / (exp(3) + 9 exp(-1/3)) and exp(-1/3) / the same; exp(-3) / (exp(-3) + 9 exp(1/3))
    [
        (0.001, 0.7570, 0.0270),
        (0.3, 0.7570, 0.0270),
        (100.0, 0.7570, 0.0270),  # only the sign counts
        (-0.001, 0.0039, 0.1107),
        (-7.0, 0.0039, 0.1107),
        (0.0, 0.1, 0.1),  # the policy remains the target
    ],
)
def test_the_target_of_tpo_by_hand(advantage, of_answer, of_others):
    """Answer 4 of a uniform policy; the gradient is the policy less the target."""
    uniform = jnp.zeros((1, 10))
    loss, gradient = tpo_by_logits(uniform, uniform, np.array([[4]]), np.full((1, 1), advantage))
    expected = np.where(np.arange(10) == 4, of_answer, of_others)
    np.testing.assert_allclose(0.1 - gradient[0], expected, atol=1e-4)
    assert loss == pytest.approx(np.log(10), rel=1e-5)


# --- The KL term ---


def two_policies(num_images=4):
    logits = jax.random.normal(jax.random.key(5), (2, num_images, 10))
    return tfd.Categorical(logits=logits[0]), tfd.Categorical(logits=logits[1])


def test_exact_kl_against_its_definition():
    policy, reference = two_policies()
    p, q = np.asarray(policy.probs_parameter()), np.asarray(reference.probs_parameter())
    expected = np.mean([sum(p[i] * np.log(p[i] / q[i])) for i in range(4)])
    kl = grpo_mnist.kl_to_reference(policy, reference, None, None, "exact")
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def expected_kl(policy, reference, estimator, old):
    """The KL term of an answer of the old policy: its mean and the gradient's, over all ten."""

    def expectation(logits):
        moved = tfd.Categorical(logits=logits)
        terms = []
        for action in np.arange(10)[:, None, None]:
            log_probs = (grpo_mnist.log_probs_of(each, action) for each in (moved, old))
            ratio = jnp.exp(jnp.subtract(*log_probs))
            terms.append(grpo_mnist.kl_to_reference(moved, reference, action, ratio, estimator))
        return old.probs_parameter()[0] @ jnp.stack(terms)

    return jax.value_and_grad(expectation)(policy.logits)


def kl_gradients(policy, reference):
    """By the policy's logits: of KL(policy || reference), and of KL(reference || policy)."""

    def reverse(logits):
        return reference.kl_divergence(tfd.Categorical(logits=logits)).mean()

    def forward(logits):
        return tfd.Categorical(logits=logits).kl_divergence(reference).mean()

    return jax.grad(forward)(policy.logits), jax.grad(reverse)(policy.logits)


def far_apart(x, y):
    return np.linalg.norm(x - y) > 0.05 * np.linalg.norm(x)


def test_k3_averages_to_the_exact_kl():
    policy, reference = two_policies(num_images=1)
    exact = grpo_mnist.kl_to_reference(policy, reference, None, None, "exact")
    for estimator in ("k3", "k3_corrected"):
        value, _ = expected_kl(policy, reference, estimator, policy)
        np.testing.assert_allclose(value, exact, rtol=1e-5)
    actions = np.arange(10).reshape(10, 1, 1)
    assert min(grpo_mnist.kl_to_reference(policy, reference, a, None, "k3") for a in actions) >= 0


def test_the_gradient_of_k3_is_that_of_the_reverse_divergence():
    """Far from the reference it is that of KL(reference || policy), and not the exact one.

    E_p[d k3] = E_p[(1 - q/p) d log p] = -E_q[d log p] = d KL(q || p).
    """
    policy, reference = two_policies(num_images=1)
    exact, reverse = kl_gradients(policy, reference)
    _, gradient = expected_kl(policy, reference, "k3", policy)
    np.testing.assert_allclose(gradient, reverse, atol=1e-6)
    assert far_apart(exact, gradient)


def test_the_gradient_of_k3_agrees_with_the_exact_one_near_the_reference():
    """There the two divergences have the same curvature, so their gradients grow alike."""
    policy, other = two_policies(num_images=1)
    for step, agree in ((0.005, True), (1.0, False)):
        logits = policy.logits + step * (other.logits - policy.logits)
        reference = tfd.Categorical(logits=logits)
        exact, _ = kl_gradients(policy, reference)
        _, gradient = expected_kl(policy, reference, "k3", policy)
        assert far_apart(exact, gradient) != agree


@pytest.mark.parametrize("later_round", [False, True])
def test_the_gradient_of_corrected_k3_is_the_exact_one(later_round):
    """Also when the policy is no longer the one that answered, which k3 alone does not allow for.

    E_old[d (p/old k3)] = d E_p[k3] = d KL(p || q).
    """
    policy, reference = two_policies(num_images=1)
    old = tfd.Categorical(logits=policy.logits[:, ::-1]) if later_round else policy
    expected, _ = kl_gradients(policy, reference)
    value, gradient = expected_kl(policy, reference, "k3_corrected", old)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    exact = float(grpo_mnist.kl_to_reference(policy, reference, None, None, "exact"))
    assert value == pytest.approx(exact, rel=1e-5)
    uncorrected, _ = expected_kl(policy, reference, "k3", old)
    assert (uncorrected == pytest.approx(exact, rel=1e-5)) != later_round


# --- The actor and the step ---


def test_the_actor():
    actor = Actor(784, 10, rngs=nnx.Rngs(0))
    policy = actor(jnp.zeros((5, 784)))
    assert isinstance(policy, tfd.Categorical)
    assert policy.logits.shape == (5, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(actor)) == 118_282


def test_the_critic():
    critic = Critic(784, 1, rngs=nnx.Rngs(0))
    assert critic(jnp.zeros((5, 784))).shape == (5, 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(critic)) == 117_121


def test_answers_are_sampled_from_the_policy():
    """Each image's own probabilities, by a chi-squared test; certain and impossible ones too."""
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (5, 10)), jnp.float32)
    logits = logits.at[3, :9].set(-jnp.inf).at[4, 5:].set(-jnp.inf)
    policy = tfd.Categorical(logits=logits)
    answers = np.asarray(grpo_mnist.sample_answers(policy, 20_000, jax.random.key(3)))
    assert answers.shape == (5, 20_000)
    assert answers.dtype == np.int32
    probabilities = np.asarray(policy.probs_parameter(), np.float64)
    for image in range(5):
        counts = np.bincount(answers[image], minlength=10)
        possible = probabilities[image] > 0
        assert not counts[~possible].any()
        expected = 20_000 * probabilities[image, possible]
        statistic = ((counts[possible] - expected) ** 2 / expected).sum()
        assert statistic < chi2.isf(1e-4, max(possible.sum() - 1, 1))


class Step(NamedTuple):
    before: grpo_mnist.TrainState
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
    before = jax.tree.map(lambda x: x[0], grpo_mnist.create_state(config))
    before = before._replace(moving_average=jnp.float32(0.3))
    if config.beta > 0:  # as if the actor had moved away from it before
        before = before._replace(reference=jax.tree.map(lambda x: 0.9 * x, before.reference))
    images = dataset.train_images[: config.batch_size]
    labels = dataset.train_labels[: config.batch_size]
    _, key = jax.random.split(before.key)
    rollout = grpo_mnist.sample_rollout(before, images, labels, key, config)
    step = grpo_mnist.train_step
    after, metrics = step(before, images, labels, optimizer=optimizer, config=config)
    STEPS[config] = Step(before, after, jax.device_get(metrics), rollout, labels)
    return STEPS[config]


class NumPyNetwork:
    """The network and Adam written down again: float64, derivatives by hand."""

    def __init__(self, network):
        layers = (network.hidden_1, network.hidden_2, network.output)
        self.parameters = [
            np.array(value, np.float64) for layer in layers for value in (layer.kernel, layer.bias)
        ]
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
        logits = logits - logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def gradients(self, images, by_outputs):
        """Of a loss by the parameters, from its derivative by the outputs."""
        hidden_1, hidden_2, _ = self.forward(images)
        _, _, w2, _, w3, _ = self.parameters
        by_hidden_2 = (by_outputs @ w3.T) * (hidden_2 > 0)
        by_hidden_1 = (by_hidden_2 @ w2.T) * (hidden_1 > 0)
        gradients = []
        for inputs, outputs in (
            (images, by_hidden_1),
            (hidden_1, by_hidden_2),
            (hidden_2, by_outputs),
        ):
            gradients += [inputs.T @ outputs, outputs.sum(axis=0)]
        return gradients

    def update(self, gradients, learning_rate):
        """Adam (arXiv 1412.6980, algorithm 1)."""
        self.updates += 1
        for index, gradient in enumerate(gradients):
            m = 0.9 * self.first_moments[index] + 0.1 * gradient
            v = 0.999 * self.second_moments[index] + 0.001 * gradient**2
            self.first_moments[index], self.second_moments[index] = m, v
            m, v = m / (1 - 0.9**self.updates), v / (1 - 0.999**self.updates)
            self.parameters[index] = self.parameters[index] - learning_rate * m / (
                np.sqrt(v) + 1e-8
            )

    def assert_close_to(self, network):
        layers = (network.hidden_1, network.hidden_2, network.output)
        values = [np.asarray(value) for layer in layers for value in (layer.kernel, layer.bias)]
        for value, expected in zip(values, self.parameters, strict=True):
            # Adam's first steps have the size of the learning rate, whatever the gradient's: where
            # a gradient is 0 but for rounding, a step may differ; nowhere else, and by little on
            # average.
            difference = np.abs(value - expected)
            assert np.mean(difference > 1e-5) < 0.01
            assert difference.mean() < 1e-5


class NumPyLearner:
    """Loss and updates written down again: loops, derivatives by hand."""

    def __init__(self, networks, config, num_updates):
        self.actor = NumPyNetwork(networks.actor)
        self.critic = NumPyNetwork(networks.critic) if networks.critic else None
        self.config, self.num_updates = config, num_updates
        self.metrics = []

    def update(self, images, actions, old_log_p, rewards, advantages, reference_log_p):
        """d loss / d logits = sum over the answers of d loss / d log pi (onehot - p) / (B G)."""
        config = self.config
        low, high = 1 - config.clip_epsilon, 1 + (config.clip_epsilon_high or config.clip_epsilon)
        log_p = self.actor.log_policy(images)
        p = np.exp(log_p)
        by_logits = np.zeros_like(p)
        loss, ratios, too_low, too_high = 0.0, np.zeros(actions.shape), 0, 0
        for image, answer in np.ndindex(actions.shape):
            action, advantage = actions[image, answer], float(advantages[image, answer])
            log_prob, old_log_prob = log_p[image, action], old_log_p[image, action]
            ratio = ratios[image, answer] = np.exp(log_prob - old_log_prob)
            any_sign = config.loss_type == "cispo"
            too_low += ratio < low and advantage < 0
            too_high += ratio > high and (advantage > 0 or any_sign)
            if config.loss_type == "tpo":
                target = target_by_loop(old_log_p[image], action, advantage)
                loss -= sum(target * log_p[image]) / actions.size
                by_logits[image] += (p[image] - target) / actions.size
                continue
            one_loss, by_log_prob = loss_of_answer(
                config.loss_type, log_prob, old_log_prob, advantage, low, high
            )
            loss += one_loss / actions.size
            by_logits[image] += by_log_prob * (np.eye(10)[action] - p[image]) / actions.size
        entropies = -(p * log_p).sum(axis=1)
        loss -= config.entropy_coef * entropies.mean()
        by_logits += config.entropy_coef * p * (log_p + entropies[:, None]) / len(images)
        metrics = {"entropy": entropies.mean(), "ratio_max": ratios.max()}
        if config.loss_type == "ppo_clip":
            metrics["clip_ratio_low"] = too_low / actions.size
        if config.loss_type in ("ppo_clip", "cispo"):
            metrics["clip_ratio_high"] = too_high / actions.size
        if config.beta > 0:
            kl = self.kl_divergence(log_p, reference_log_p, actions, ratios)
            metrics["kl"], kl_by_logits = kl
            loss += config.beta * metrics["kl"]
            by_logits += config.beta * kl_by_logits
        gradients = self.actor.gradients(images, by_logits)
        metrics["grad_norm"] = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        progress = self.actor.updates / self.num_updates
        metrics["learning_rate"] = 0.5 * (1 + np.cos(np.pi * progress)) * config.learning_rate
        self.actor.update(gradients, metrics["learning_rate"])
        if self.critic:
            errors = self.critic.forward(images)[-1] - rewards  # (B, 1) - (B, G)
            loss += (errors**2).mean()
            by_values = 2 * errors.sum(axis=1, keepdims=True) / errors.size
            self.critic.update(self.critic.gradients(images, by_values), metrics["learning_rate"])
        self.metrics.append(metrics | {"loss": loss})

    def kl_divergence(self, log_p, log_q, actions, ratios):
        """Its mean over the images, and the derivative of that by the logits."""
        p = np.exp(log_p)
        if self.config.kl_estimator == "exact":
            by_image = (p * (log_p - log_q)).sum(axis=1, keepdims=True)
            return by_image.mean(), p * (log_p - log_q - by_image) / len(p)
        kl, by_logits = 0.0, np.zeros_like(p)
        for image, answer in np.ndindex(actions.shape):
            action = actions[image, answer]
            log_ratio = log_q[image, action] - log_p[image, action]
            k3, by_log_p = np.exp(log_ratio) - log_ratio - 1, 1 - np.exp(log_ratio)
            if self.config.kl_estimator == "k3_corrected":  # d ratio / d log p = ratio
                ratio = ratios[image, answer]
                k3, by_log_p = ratio * k3, ratio * k3 + ratio * by_log_p
            kl += k3 / actions.size
            by_logits[image] += by_log_p * (np.eye(10)[action] - p[image]) / actions.size
        return kl, by_logits


ONE_ROUND = Config(batch_size=64, num_iterations=1)
FOUR_ROUNDS = Config(batch_size=64)
LONG_ROUNDS = Config(batch_size=64, num_iterations=2, learning_rate=0.03, clip_epsilon_high=0.5)
FOUR_ANSWERS = Config(batch_size=32, num_iterations=3, num_generations=4, baseline="none")
MINIBATCHES = Config(batch_size=64, num_iterations=2, num_minibatches=4, scale_rewards="none")
ENTROPY_BONUS = Config(batch_size=64, num_iterations=2, entropy_coef=0.5)
KL = Config(batch_size=64, beta=5.0)
KL_K3 = Config(batch_size=64, beta=5.0, kl_estimator="k3", num_generations=2)
KL_CORRECTED = dataclasses.replace(KL_K3, kl_estimator="k3_corrected", num_iterations=2)
HELD_BACK = Config(batch_size=64, beta=1000.0, ref_sync_epochs=2)
GRPO = Config(batch_size=32, num_generations=8, baseline="group", scale_rewards="group")
DAPO = dataclasses.replace(GRPO, clip_epsilon_high=0.28, dynamic_sampling=True)
RLOO = Config(  # without the bonus, some gradients of the biases cancel to rounding
    batch_size=64, num_generations=4, baseline="loo", scale_rewards="none", entropy_coef=0.1
)
MOVING_AVERAGE = Config(batch_size=64, baseline="ema", num_iterations=2)
PPO = Config(
    batch_size=64, num_generations=2, num_iterations=1, num_minibatches=2, baseline="critic"
)
MAXRL = Config(batch_size=32, num_iterations=2, baseline="group", scale_rewards="mean")
MAXRL_ALONE = dataclasses.replace(MAXRL, baseline="none")
CISPO = dataclasses.replace(LONG_ROUNDS, num_iterations=3, loss_type="cispo")
DG = Config(batch_size=64, num_iterations=2, loss_type="dg")
TPO = dataclasses.replace(DG, num_minibatches=2, learning_rate=1e-3, loss_type="tpo")

STEP_CONFIGS = {
    "K=1": ONE_ROUND,
    "K=4": FOUR_ROUNDS,
    "clipping": LONG_ROUNDS,
    "four answers": FOUR_ANSWERS,
    "minibatches": MINIBATCHES,
    "entropy": ENTROPY_BONUS,
    "KL": KL,
    "KL by k3": KL_K3,
    "KL by corrected k3": KL_CORRECTED,
    "GRPO": GRPO,
    "DAPO": DAPO,
    "RLOO": RLOO,
    "moving average": MOVING_AVERAGE,
    "PPO": PPO,
    "MaxRL": MAXRL,
    "MaxRL without a baseline": MAXRL_ALONE,
    "CISPO": CISPO,
    "DG": DG,
    "TPO": TPO,
}


@pytest.mark.parametrize("config", STEP_CONFIGS.values(), ids=STEP_CONFIGS)
def test_the_step_against_a_numpy_learner(dataset, config):
    step = one_step(dataset, config)
    before, rollout, metrics = step.before, step.rollout, step.metrics
    B, G, M = config.batch_size, config.num_generations, config.num_minibatches
    assert rollout.actions.shape == rollout.rewards.shape == (B, G)
    learner = NumPyLearner(before.networks, config, num_updates=3 * config.num_iterations * M)

    images = dataset.train_images[:B] / 255
    log_p = learner.actor.log_policy(images)
    actions = np.asarray(rollout.actions)
    old_log_probs = np.take_along_axis(log_p, actions, axis=1)
    np.testing.assert_allclose(rollout.old_log_probs, old_log_probs, atol=1e-5)
    right = np.zeros((B, G))
    for image, answer in np.ndindex(B, G):
        right[image, answer] = actions[image, answer] == step.labels[image]
    np.testing.assert_array_equal(rollout.rewards, right)
    assert metrics["accuracy"] == metrics["reward"] == pytest.approx(right.mean())
    assert metrics["reward_std"] == pytest.approx(right.std(), abs=1e-6)
    by_image = {"group", "loo", "mean"} & {config.baseline, config.scale_rewards}
    equal = np.mean([len(set(row)) == 1 for row in right]) if by_image else 0.0
    assert metrics["frac_reward_zero_std"] == pytest.approx(equal)
    assert step.after.moving_average == pytest.approx(0.9 * 0.3 + 0.1 * right.mean())

    expected = learner.critic.forward(images)[-1] if learner.critic else 0.3
    advantages = advantages_by_loop(right, config.baseline, config.scale_rewards, expected)
    if config.dynamic_sampling:
        assert 0 < equal < 1
        advantages /= 1 - equal
    np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-5)

    reference_log_p = log_p
    if config.beta > 0:
        reference_log_p = NumPyNetwork(before.reference).log_policy(images)
    batch = (images, actions, log_p, right, advantages, reference_log_p)
    for _ in range(config.num_iterations):
        for piece in np.arange(B).reshape(-1, M).T:
            learner.update(*(array[piece] for array in batch))
    learner.actor.assert_close_to(step.after.networks.actor)
    assert (learner.critic is None) == (step.after.networks.critic is None)
    if learner.critic:
        learner.critic.assert_close_to(step.after.networks.critic)
    of_the_batch = {"accuracy", "reward", "reward_std", "frac_reward_zero_std"}
    assert set(metrics) == set(learner.metrics[0]) | of_the_batch
    assert ("kl" in metrics) == (config.beta > 0)
    for name in learner.metrics[0]:
        average = max if name == "ratio_max" else np.mean
        expected = average([update[name] for update in learner.metrics])
        assert metrics[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_the_ratio_is_1_in_the_first_round_and_not_in_later_ones(dataset):
    once = one_step(dataset, ONE_ROUND).metrics
    assert once["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert once["clip_ratio_low"] == once["clip_ratio_high"] == 0.0
    assert abs(once["loss"]) < 1e-6  # the mean of the advantages
    often = one_step(dataset, LONG_ROUNDS).metrics
    assert often["ratio_max"] > 1.5
    assert often["clip_ratio_low"] > 0
    assert often["clip_ratio_high"] > 0
    assert one_step(dataset, CISPO).metrics["clip_ratio_high"] > often["clip_ratio_high"]


def test_the_answers_of_an_image_differ_and_belong_to_it(dataset):
    """G answers share an image: repeated, not tiled, and each drawn on its own."""
    step = one_step(dataset, FOUR_ANSWERS)
    actor, rollout = step.before.networks.actor, step.rollout
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
        before, after = step.before, step.after.networks.actor
        reference = (before.reference or before.networks.actor)(step.rollout.images)
        policy = after(step.rollout.images)
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
    assert (
        np.abs(rollout.reference_logits - state.networks.actor(rollout.images).logits).max() > 1e-3
    )
