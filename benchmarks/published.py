"""A published study of this very task, run again with the trainer's own training step.

    python benchmarks/published.py --data-dir DIR

DIR is as for grpo_mnist.py. The study is section 3.3 of "Target Policy Optimization" (Kaddour 2026,
arXiv 2604.06159), its settings are those of its program (github.com/JeanKaddour/tpo): hidden layers
of 50, Adam at a constant 1e-3, batches of 100 images drawn with replacement, one guess per image,
one update per batch, 10,000 updates, 20 seeds. That is 1,000,000 guesses called right or wrong.
What it calls GRPO standardises the rewards of the batch; its other methods subtract the probability
that two guesses agree, the sum of pi(a)^2. All seeds of a method train in one program. Writes
results/published.json.
"""

import shlex
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import grpo_mnist, over_seeds, parse_options, write_results
from growth import widen

WIDTH = 50
NUM_UPDATES, EVALUATE_EVERY = 10_000, 200
SETTINGS = "--batch-size 100 --num-iterations 1 --learning-rate 1e-3 --lr-schedule constant"
SETTINGS += " --num-seeds 20"
AGREEMENT = "--baseline ema --scale-rewards none"  # what is expected is given by train
METHODS = {  # flags, and the test error that the study prints, if it does
    "PG": (AGREEMENT, 0.053),
    "GRPO": ("", 0.059),
    "DG": (f"{AGREEMENT} --loss-type dg", None),
    "TPO": (f"{AGREEMENT} --loss-type tpo", 0.029),
}


def train(flags, dataset):
    """Trains all seeds: their errors on the test images, (evaluations, seeds)."""
    config = grpo_mnist.parse_flags(shlex.split(f"{SETTINGS} {flags}"))
    optimizer = grpo_mnist.create_optimizer(config, NUM_UPDATES)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)

    def step(state, key):
        chosen = jax.random.randint(key, (config.batch_size,), 0, len(images))
        policy = state.networks.actor(images[chosen] / 255.0)
        agreement = (policy.probs_parameter() ** 2).sum(axis=1, keepdims=True)  # (B, 1)
        state = state._replace(moving_average=agreement)
        batch = images[chosen], labels[chosen]
        state, _ = grpo_mnist.train_step(state, *batch, optimizer=optimizer, config=config)
        return state._replace(moving_average=jnp.zeros(())), None

    @jax.jit
    @jax.vmap
    def steps(state, seed, number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), EVALUATE_EVERY)
        return jax.lax.scan(step, state, keys)[0]

    state, seeds = grpo_mnist.create_state(config), np.array(config.seeds)
    errors = []
    for number in range(1, NUM_UPDATES // EVALUATE_EVERY + 1):
        state = steps(state, seeds, np.full_like(seeds, number))
        answers, _ = grpo_mnist.predict(state.networks.actor, dataset.test_images)
        errors.append(np.mean(np.asarray(answers) != dataset.test_labels, axis=1))
    return np.array(errors)


def main():
    options = parse_options(__doc__)
    dataset = grpo_mnist.load_dataset("mnist", options.data_dir)
    widen(WIDTH)
    rows = []
    for name, (flags, published) in METHODS.items():
        began = time.perf_counter()
        errors = train(flags, dataset)
        final, seconds = over_seeds(errors[-1].tolist()), time.perf_counter() - began
        error = f"{final['mean']:.2%} +- {final['interval_95']:.2%}"
        print(f"{name}: test error {error}, {seconds:.0f} s", flush=True)
        rows.append(
            {
                "name": name,
                "flags": f"{SETTINGS} {flags}".strip(),
                "published_test_error": published,
                "test_error": final,
                "test_error_by_evaluation": errors.mean(axis=1).tolist(),
            }
        )
    reward_bits = NUM_UPDATES * 100
    settings = {"width": WIDTH, "updates": NUM_UPDATES, "reward_bits": reward_bits}
    write_results("published", settings | {"rows": rows})


if __name__ == "__main__":
    main()
