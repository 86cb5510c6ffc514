"""One update by hand: eight images of MNIST, their answers, and four rounds, number by number.

    python benchmarks/one_update.py --data-dir DIR [--write]

DIR is as for grpo_mnist.py. The numbers are those of the first batch of COMMAND, from the
trainer's own functions. With --write, they go into results/one_update.json.
"""

import argparse
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import grpo_mnist, write_results

# A seed with several right answers, and a step so small that one can watch the clipping begin.
COMMAND = "python grpo_mnist.py --seed 2 --batch-size 8 --learning-rate 3e-4"


def first_update(dataset):
    """What train_step computes for the first batch, round by round, as lists."""
    config = grpo_mnist.parse_flags(shlex.split(COMMAND)[2:])
    images, labels = (x[0] for x in next(grpo_mnist.batches(config, dataset, epoch=1)))
    num_steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
    optimizer = grpo_mnist.create_optimizer(config, num_steps)
    state = jax.tree.map(lambda x: x[0], grpo_mnist.create_state(config))
    clip = config.clip_epsilon, config.clip_epsilon_high or config.clip_epsilon

    @jax.jit
    def sample(state):
        _, key = jax.random.split(state.key)
        return grpo_mnist.sample_rollout(state, images, labels, key, config)

    @jax.jit
    def one_round(networks, optimizer_state, rollout):
        log_probs = grpo_mnist.log_probs_of(networks.actor(rollout.images), rollout.actions)
        old_log_probs, advantages = rollout.old_log_probs, rollout.advantages
        slope = jax.grad(grpo_mnist.ppo_clip_loss)(log_probs, old_log_probs, advantages, *clip)
        gradients, metrics = jax.grad(grpo_mnist.loss_fn, has_aux=True)(networks, rollout, config)
        figures = {
            "probabilities": jnp.exp(log_probs)[:, 0],
            "ratios": jnp.exp(log_probs - old_log_probs)[:, 0],
            "held": slope[:, 0] == 0,
            "grad_norm": optax.tree.norm(gradients.actor),
        }
        figures |= {name: metrics[name] for name in ("loss", "clip_ratio_low", "clip_ratio_high")}
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(networks, updates), optimizer_state, figures

    rollout = sample(state)
    networks, optimizer_state, rounds = state.networks, state.optimizer_state, []
    for _ in range(config.num_iterations):
        networks, optimizer_state, figures = one_round(networks, optimizer_state, rollout)
        rounds.append({name: np.asarray(values).tolist() for name, values in figures.items()})
    rewards, advantages = rollout.rewards[:, 0], rollout.advantages[:, 0]
    return {
        "labels": labels.tolist(),
        "answers": rollout.actions[:, 0].tolist(),
        "rewards": rewards.tolist(),
        "mean": rewards.mean().item(),
        "deviation": rewards.std().item(),
        "advantages": advantages.tolist(),
        "rounds": rounds,
    }


def describe(update):
    """Yields what a reader of the tutorial has before them, line by line."""
    for name in ("labels", "answers"):
        yield f"{name:13}" + "".join(f"{digit:8d}" for digit in update[name])
    probabilities = update["rounds"][0]["probabilities"]
    yield "probabilities" + "".join(f"{probability:8.3f}" for probability in probabilities)
    yield f"{'rewards':13}" + "".join(f"{reward:8.0f}" for reward in update["rewards"])
    yield f"{'advantages':13}" + "".join(f"{advantage:+8.4f}" for advantage in update["advantages"])
    for number, each in enumerate(update["rounds"], start=1):
        pairs = zip(each["ratios"], each["held"], strict=True)
        ratios = "".join(f"{ratio:7.3f}{'*' if held else ' '}" for ratio, held in pairs)
        gradient = f"gradient {each['grad_norm']:.3f}"
        yield f"{f'ratios, {number}':13}{ratios}  loss {signed(each['loss'])}  {gradient}"
    yield f"mean {update['mean']:.3f}, deviation {update['deviation']:.4f}; *: held by the clip"


def signed(loss):
    """Four decimals; no minus before a 0 that is one but for rounding."""
    return f"{round(loss, 4) + 0:+.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    try:
        dataset = grpo_mnist.load_dataset("mnist", options.data_dir.expanduser())
    except (grpo_mnist.RunError, grpo_mnist.UsageError) as error:
        parser.exit(1, f"one_update.py: {error}\n")
    update = first_update(dataset)
    print("\n".join(describe(update)))
    if options.write:
        write_results("one_update", update)


if __name__ == "__main__":
    main()
