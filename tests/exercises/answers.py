"""The answers to exercises.py."""

import numpy as np


def memory(billions, mixed_precision, critic, reference):
    per_parameter = 2 + 2 + 4 + 4 + 4 if mixed_precision else 2 + 2 + 2 + 2
    return billions * (per_parameter * (2 if critic else 1) + (2 if reference else 0))


def advantage(share_right):
    odds = share_right / (1 - share_right)
    return odds**-0.5, -(odds**0.5)


def silent(share_right, num_generations):
    return share_right**num_generations + (1 - share_right) ** num_generations


def order(num_images, num_generations):
    return np.repeat(np.arange(num_images), num_generations)


def clipped(ratios, advantages, epsilon):
    too_high, too_low = ratios > 1 + epsilon, ratios < 1 - epsilon
    return (too_high & (advantages > 0)) | (too_low & (advantages < 0))


def loo(group_advantages):
    num_generations = group_advantages.shape[1]
    return group_advantages * num_generations / (num_generations - 1)


def k3(log_probs, reference_log_probs):
    log_ratio = reference_log_probs - log_probs
    return np.exp(log_ratio) - log_ratio - 1


def collapse():
    return ["--num-iterations", "4"]
