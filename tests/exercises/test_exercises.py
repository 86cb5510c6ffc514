"""Checks the answers in exercises.py; see the tutorial's exercises."""

import subprocess
import sys
from functools import partial

import exercises
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_mnist

COLLAPSE = (
    "--dataset digits --num-epochs 3 --baseline group --scale-rewards group --num-generations 8"
    " --num-iterations 1 --seed 1"
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def answered(result):
    """What an exercise has returned; skips the test if that is nothing yet."""
    if result is None:
        pytest.skip("returns nothing yet: see exercises.py")
    return result


def test_memory():
    for billions, mixed_precision, critic, reference, gigabytes in (
        (8, False, True, True, 144),
        (8, False, False, True, 80),
        (8, True, True, False, 256),
        (70, True, False, False, 1120),
    ):
        assert answered(exercises.memory(billions, mixed_precision, critic, reference)) == gigabytes


@pytest.mark.parametrize("num_right", [1, 50, 78, 95])
def test_advantage(num_right):
    answer = answered(exercises.advantage(num_right / 100))
    rewards = np.array([1.0] * num_right + [0.0] * (100 - num_right))[:, None]
    advantages = grpo_mnist.group_advantages(rewards, baseline="batch", scale_rewards="batch")
    np.testing.assert_allclose(answer, (advantages[0, 0], advantages[-1, 0]), rtol=1e-4)


@pytest.mark.parametrize(("share_right", "num_generations"), [(0.5, 2), (0.78, 4), (0.95, 8)])
def test_silent(share_right, num_generations, random):
    answer = answered(exercises.silent(share_right, num_generations))
    rewards = random.random((100_000, num_generations)) < share_right
    tried = np.asarray(grpo_mnist.all_equal(jnp.asarray(rewards), grpo_mnist.IMAGE)).mean()
    assert answer == pytest.approx(tried, abs=0.01)


def test_order():
    indices = np.asarray(answered(exercises.order(3, 4)))
    np.testing.assert_array_equal(indices.reshape(3, 4), [[0] * 4, [1] * 4, [2] * 4])


def test_held(random):
    ratios, advantages = random.uniform(0.5, 1.5, (50, 4)), random.choice([-1.0, 1.0], (50, 4))
    answer = answered(exercises.held(ratios, advantages, 0.2))
    loss = partial(grpo_mnist.ppo_clip_loss, clip_epsilon=0.2, clip_epsilon_high=0.2)
    slope = jax.grad(loss)(np.log(ratios), np.zeros((50, 4)), advantages)
    np.testing.assert_array_equal(answer, slope == 0)


@pytest.mark.parametrize("num_generations", [2, 8])
def test_loo(num_generations, random):
    rewards = random.normal(size=(5, num_generations))
    group, loo = (
        grpo_mnist.group_advantages(rewards, baseline=baseline, scale_rewards="none")
        for baseline in ("group", "loo")
    )
    np.testing.assert_allclose(answered(exercises.loo(group)), loo, rtol=1e-4, atol=1e-6)


def test_k3(random):
    """Weighted with the policy's probabilities, an unbiased estimate is the exact divergence."""
    log_probs, reference_log_probs = np.asarray(jax.nn.log_softmax(random.normal(size=(2, 10))))
    estimates = np.asarray(answered(exercises.k3(log_probs, reference_log_probs)))
    assert (estimates >= -1e-6).all()
    exact = np.sum(np.exp(log_probs) * (log_probs - reference_log_probs))
    assert np.sum(np.exp(log_probs) * estimates) == pytest.approx(exact, rel=1e-4)


def test_collapse(tmp_path):
    flags = answered(exercises.collapse())
    config = grpo_mnist.parse_flags([*COLLAPSE.split(), *flags])
    assert (config.seed, config.num_epochs, config.baseline) == (1, 3, "group")
    program = [sys.executable, grpo_mnist.__file__, *COLLAPSE.split(), *flags]
    subprocess.run([*program, f"--output-dir={tmp_path / 'run'}"], check=True)
    test_images = grpo_mnist.load_dataset("digits", tmp_path).test_images
    answers = grpo_mnist.load_actor(tmp_path / "run")(test_images / np.float32(255)).mode()
    counts = np.bincount(answers, minlength=10)
    assert counts.min() >= 10, f"answers to the test images, by digit: {counts}"
