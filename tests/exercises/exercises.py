"""Your answers to the exercises of the tutorial: replace each `...`, and let pytest check it.

    python -m pytest tests/exercises -k memory

An exercise that is not answered yet fails in one line. answers.py has the answers.
"""

import numpy as np  # noqa: F401


def memory(billions, mixed_precision, critic, reference):
    """Gigabytes that training keeps for an actor of so many billion parameters.

    Weights, gradients and Adam's two moments: all in bf16 (2 bytes each), or with
    mixed_precision bf16 weights and gradients, and fp32 (4 bytes) master weights and moments. A
    critic is as large as the actor and trained like it; a reference has bf16 weights only.
    """
    ...


def advantage(share_right):
    """The advantages (of a right answer, of a wrong one) where that share of a batch is right."""
    ...


def silent(share_right, num_generations):
    """The probability that all answers to an image get the same reward, right or wrong."""
    ...


def order(num_images, num_generations):
    """Trainers of language models keep answers in one long list, prompt after prompt.

    The index of the image (0 to B - 1) to which each of the B * G answers belongs, int (B * G,), so
    that rewards.reshape(B, G) has the answers to one image in one row.
    """
    ...


def clipped(ratios, advantages, epsilon):
    """Whether the clipped loss gives an answer no gradient -> bool (B, G).

    ratios and advantages are float (B, G).
    """
    ...


def loo(group_advantages):
    """RLOO's advantages from those of the group's mean, neither divided: float (B, G) -> (B, G).

    No rewards needed: the mean of the others is in the mean of all.
    """
    ...


def k3(log_probs, reference_log_probs):
    """An estimate of KL(policy || reference) from each sampled answer -> float array, >= 0.

    Both arguments are log-probabilities of the sampled answers, under the one and the other.
    """
    ...


def collapse():
    """Flags, such as ["--learning-rate", "1e-3"], that save the run of the exercise.

    That run never answers with one of the digits: `python grpo_mnist.py --dataset digits
    --num-epochs 3 --baseline group --scale-rewards group --num-generations 8 --num-iterations 1
    --seed 1`. With your flags added, each digit is to be the answer to at least 10 of the 360 test
    images. Do not change the seed, the baseline or the number of epochs.
    """
    ...
