"""Checks the answers in exercises.py; see the tutorial's exercises."""

from functools import partial

import exercises
import jax
import numpy as np
import pytest

import grpo_mnist

COLLAPSE = """--dataset digits --num-epochs 3 --baseline group --scale-rewards group
    --num-generations 8 --num-iterations 1 --seed 1"""


def answer(name, *arguments):
    """What an exercise returns; if that is nothing yet, the test fails in one line."""
    result = getattr(exercises, name)(*arguments)
    if result is None:
        pytest.fail(f"{name} returns nothing yet: see tests/exercises/exercises.py", pytrace=False)
    return result


def test_memory():
    for billions, mixed_precision, critic, reference, gigabytes in (
        (8, False, True, True, 144),
        (8, False, False, True, 80),
        (8, True, True, False, 256),
        (70, True, False, False, 1120),
    ):
        assert answer("memory", billions, mixed_precision, critic, reference) == gigabytes


def test_advantage():
    for num_right in (1, 50, 78, 95):
        rewards = np.array([1.0] * num_right + [0.0] * (100 - num_right))[:, None]
        advantages = grpo_mnist.group_advantages(rewards, baseline="batch", scale_rewards="batch")
        right_and_wrong = advantages[0, 0], advantages[-1, 0]
        np.testing.assert_allclose(answer("advantage", num_right / 100), right_and_wrong, rtol=1e-4)


def test_silent():
    random = np.random.default_rng(0)
    for share_right, num_generations in ((0.5, 2), (0.78, 4), (0.95, 8)):
        rewards = random.random((100_000, num_generations)) < share_right
        tried = grpo_mnist.all_equal(rewards, grpo_mnist.IMAGE).mean()
        assert answer("silent", share_right, num_generations) == pytest.approx(tried, abs=0.01)


def test_order():
    np.testing.assert_array_equal(answer("order", 3, 4), [0] * 4 + [1] * 4 + [2] * 4)


def test_clipped():
    random = np.random.default_rng(0)
    ratios, advantages = random.uniform(0.5, 1.5, (50, 4)), random.choice([-1.0, 1.0], (50, 4))
    loss = partial(grpo_mnist.ppo_clip_loss, clip_epsilon=0.2, clip_epsilon_high=0.2)
    slope = jax.grad(loss)(np.log(ratios), np.zeros((50, 4)), advantages)
    np.testing.assert_array_equal(answer("clipped", ratios, advantages, 0.2), slope == 0)


def test_loo():
    undivided = partial(grpo_mnist.group_advantages, scale_rewards="none")
    random = np.random.default_rng(0)
    for num_generations in (2, 8):
        rewards = random.normal(size=(5, num_generations))
        group, loo = undivided(rewards, baseline="group"), undivided(rewards, baseline="loo")
        np.testing.assert_allclose(answer("loo", group), loo, rtol=1e-4, atol=1e-6)


def test_k3():
    """Weighted with the policy's probabilities, an unbiased estimate is the exact divergence."""
    log_probs, reference_log_probs = np.log(np.random.default_rng(0).dirichlet([1] * 10, size=2))
    estimates = np.asarray(answer("k3", log_probs, reference_log_probs))
    assert (estimates >= -1e-6).all()
    exact = np.sum(np.exp(log_probs) * (log_probs - reference_log_probs))
    assert np.sum(np.exp(log_probs) * estimates) == pytest.approx(exact, rel=1e-4)


def test_collapse():
    config = grpo_mnist.parse_flags([*COLLAPSE.split(), *answer("collapse"), "--output-dir=run"])
    assert (config.seed, config.num_epochs, config.baseline) == (1, 3, "group")
    grpo_mnist.train(config)
    images = grpo_mnist.load_dataset("digits", config.data_dir).test_images / np.float32(255)
    counts = np.bincount(grpo_mnist.load_actor("run")(images).mode(), minlength=10)
    assert counts.min() >= 10, f"answers to the test images, by digit: {counts}"
