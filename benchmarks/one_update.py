"""One update by hand: eight images of MNIST, their answers, and four rounds, number by number.

    python benchmarks/one_update.py --data-dir DIR
    python benchmarks/one_update.py --data-dir DIR --write

DIR is as for grpo_mnist.py. The numbers are those of the first batch of COMMAND, from the
trainer's own functions. With --write, they go into results/one_update.json, and into the figure
one_update.png.
"""

import argparse
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, grpo_mnist, write_results

# A seed with several right answers, and a step so small that one can watch the clipping begin.
COMMAND = "python grpo_mnist.py --seed 2 --batch-size 8 --learning-rate 3e-4"


def first_update(dataset):
    """What train_step computes for the first batch, round by round, as lists; and the images."""
    config = grpo_mnist.parse_flags(shlex.split(COMMAND)[2:])
    images, labels = (x[0] for x in next(grpo_mnist.batches(config, dataset, epoch=1)))
    num_steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
    optimizer = grpo_mnist.create_optimizer(config, num_steps)
    state = jax.tree.map(lambda x: x[0], grpo_mnist.create_state(config))
    _, key = jax.random.split(state.key)
    rollout = grpo_mnist.sample_rollout(state, images, labels, key, config)
    networks, optimizer_state = state.networks, state.optimizer_state
    rounds = []
    for _ in range(config.num_iterations):
        log_probs = grpo_mnist.log_probs_of(networks.actor(rollout.images), rollout.actions)
        slope = jax.grad(grpo_mnist.ppo_clip_loss)(
            log_probs,
            rollout.old_log_probs,
            rollout.advantages,
            config.clip_epsilon,
            config.clip_epsilon_high or config.clip_epsilon,
        )
        gradients, metrics = jax.grad(grpo_mnist.loss_fn, has_aux=True)(networks, rollout, config)
        figures = {
            "probabilities": jnp.exp(log_probs),
            "ratios": jnp.exp(log_probs - rollout.old_log_probs),
            "held": slope == 0,
        }
        names = ("loss", "clip_ratio_low", "clip_ratio_high")
        rounds.append(
            {name: values[:, 0].tolist() for name, values in figures.items()}
            | {name: metrics[name].item() for name in names}
            | {"grad_norm": optax.tree.norm(gradients.actor).item()}
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        networks = optax.apply_updates(networks, updates)
    rewards, advantages = rollout.rewards[:, 0], rollout.advantages[:, 0]
    return {
        "labels": labels.tolist(),
        "answers": rollout.actions[:, 0].tolist(),
        "rewards": rewards.tolist(),
        "mean": rewards.mean().item(),
        "deviation": rewards.std().item(),
        "advantages": advantages.tolist(),
        "rounds": rounds,
    }, images


def draw(update, images):
    """The images and what came of them; below, how the ratios move, round by round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.6), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    first_round = update["rounds"][0]
    for i, axes in enumerate(top.subplots(1, 8)):
        axes.imshow(images[i].reshape(28, 28), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        right = update["rewards"][i] == 1
        verdict = "right" if right else "wrong"
        axes.set_title(f"image {i + 1}: a {update['labels'][i]}", fontsize=9)
        said = f"said {update['answers'][i]} ({first_round['probabilities'][i]:.1%})\n{verdict}"
        axes.set_xlabel(f"{said}, {update['advantages'][i]:+.2f}", fontsize=9)
        for spine in axes.spines.values():
            spine.set(color="C0" if right else "C1", linewidth=2)
    axes = bottom.subplots()
    ratios = np.array([each["ratios"] for each in update["rounds"]])  # (K, 8)
    numbers = np.arange(1, len(ratios) + 1)
    axes.axhspan(0.8, 1.2, color="0.9", zorder=0, label="between 1 - epsilon and 1 + epsilon")
    for i in np.argsort(update["rewards"])[::-1]:
        right = update["rewards"][i] == 1
        label = "right answers" if right else "wrong answers"
        color, style = ("C0", "o-") if right else ("C1", "s-")
        seen = axes.get_legend_handles_labels()[1]
        label = label if label not in seen else None
        axes.plot(numbers, ratios[:, i], style, color=color, ms=4, lw=1.2, label=label)
        held = [each["held"][i] for each in update["rounds"]]
        label = "held: no gradient from it"
        label = label if label not in seen and any(held) else None
        axes.plot(numbers[held], ratios[held, i], "o", mfc="none", mec="black", ms=10, label=label)
    axes.set(xticks=numbers, xlabel="round", ylabel="ratio: probability of the answer,\nnow / then")
    axes.set_title("four rounds on one batch of eight images", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(RESULTS / "one_update.png")


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
    update, images = first_update(dataset)
    print("\n".join(describe(update)))
    if options.write:
        write_results("one_update", {"command": COMMAND} | update)
        draw(update, images)


if __name__ == "__main__":
    main()
