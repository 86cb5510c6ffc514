"""One update by hand: three images, four answers to each, and four rounds, number by number.

    python benchmarks/one_update.py [--write]

The numbers are those of the first batch of COMMAND, from the trainer's own functions. With
--write, they go into results/one_update.json.
"""

import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import grpo_mnist, write_results

# A seed with a silent group between two others, and a step so small that clipping begins slowly.
COMMAND = """python grpo_mnist.py --dataset digits --baseline group --scale-rewards group \
--batch-size 3 --num-generations 4 --learning-rate 3e-4 --seed 17"""


def first_batch():
    """The configuration, the data set, and the first batch: uint8 (B, 784), int32 (B,)."""
    config = grpo_mnist.parse_flags(shlex.split(COMMAND)[2:])
    dataset = grpo_mnist.load_dataset("digits", config.data_dir)
    images, labels = next(grpo_mnist.batches(config, dataset, epoch=1))
    return config, dataset, images[0], labels[0]


def first_update():
    """What train_step computes for the first batch, round by round, as lists."""
    config, dataset, images, labels = first_batch()
    num_steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
    optimizer = grpo_mnist.create_optimizer(config, num_steps)
    state = jax.tree.map(lambda x: x[0], grpo_mnist.create_state(config))
    clip = config.clip_epsilon, config.clip_epsilon

    @jax.jit
    def sample(state):
        _, key = jax.random.split(state.key)
        return grpo_mnist.sample_rollout(state, images, labels, key, config)

    @jax.jit
    def one_round(networks, optimizer_state, rollout):
        policy = networks.actor(rollout.images)
        log_probs = grpo_mnist.log_probs_of(policy, rollout.actions)
        old_log_probs, advantages = rollout.old_log_probs, rollout.advantages
        slope = jax.grad(grpo_mnist.ppo_clip_loss)(log_probs, old_log_probs, advantages, *clip)
        gradients, metrics = jax.grad(grpo_mnist.loss_fn, has_aux=True)(networks, rollout, config)
        figures = {
            "probabilities": policy.probs_parameter(),  # (B, A), before the round
            "ratios": jnp.exp(log_probs - old_log_probs),
            "clipped": (slope == 0) & (advantages != 0),
            "grad_norm": optax.tree.norm(gradients.actor),
        }
        figures |= {name: metrics[name] for name in ("loss", "clip_ratio_low", "clip_ratio_high")}
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(networks, updates), optimizer_state, figures

    rollout = sample(state)
    networks, optimizer_state, rounds = state.networks, state.optimizer_state, []
    for _ in range(config.num_iterations):
        networks, optimizer_state, figures = one_round(networks, optimizer_state, rollout)
        rounds.append(figures)
    rewards, batch = rollout.rewards, {"baseline": "batch", "scale_rewards": "batch"}
    update = {
        "labels": labels,
        "answers": rollout.actions,
        "rewards": rewards,
        "means": rewards.mean(axis=1),
        "deviations": rewards.std(axis=1),
        "advantages": rollout.advantages,
        "batch_advantages": grpo_mnist.group_advantages(rewards, **batch),
        "rounds": rounds,
        "probabilities_after": networks.actor(rollout.images).probs_parameter(),
    }
    return jax.tree.map(lambda x: np.asarray(x).tolist(), update)


def describe(update):
    """Yields what a reader of the tutorial has before them, line by line."""
    for i, label in enumerate(update["labels"]):
        answers = [f"{answer:7d} " for answer in update["answers"][i]]
        rewards = [f"{reward:7.0f} " for reward in update["rewards"][i]]
        yield f"image {i + 1}, digit {label}"
        yield f"  {'answers':18}" + "".join(answers)
        yield f"  {'rewards':18}" + "".join(rewards) + f"  mean {update['means'][i]:.2f}"
        for name in ("advantages", "batch_advantages"):
            group = "group = batch" if name.startswith("batch") else "group = image"
            yield f"  {group:18}" + "".join(f"{each:+7.3f} " for each in update[name][i])
        for number, each in enumerate(update["rounds"], start=1):
            pairs = zip(each["ratios"][i], each["clipped"][i], strict=True)
            ratios = "".join(f"{ratio:7.3f}{'*' if clipped else ' '}" for ratio, clipped in pairs)
            yield f"  {f'ratios, round {number}':18}{ratios}"
    for number, each in enumerate(update["rounds"], start=1):
        yield f"round {number}: loss {each['loss']:+z.4f}, gradient norm {each['grad_norm']:.3f}"
    yield "*: clipped, no gradient from this answer"


def main(write: bool = False):
    update = first_update()
    print("\n".join(describe(update)))
    if write:
        write_results("one_update", update)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
