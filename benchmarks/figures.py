"""The tutorial's pictures of formulas: what is kept in memory, what a group is, what the clip does.

    python benchmarks/figures.py

Draws memory.png, groups.png and clip.png into results/, on a white ground of their own, so that
they can be read on a dark page, too.
"""

import numpy as np
from common import RESULTS, grpo_mnist
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_memory():
    """Stacked bars of gigabytes for eight billion parameters."""
    figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    names, position = [], 0
    for kind, weights, adam in (("mixed precision", 2 + 4, 8), ("all in bf16", 2, 4)):
        network = [("weights", weights), ("gradients", 2), ("Adam's moments", adam)]
        actor, critic = ([(who, part, 8 * size) for part, size in network] for who in "AC")
        reference = [("R", "weights", 16)]
        for method, parts in (
            ("GRPO, beta = 0", actor),
            ("GRPO", actor + reference),
            ("PPO", actor + critic + reference),
        ):
            left = 0
            for who, part, size in parts:
                color = {"A": "C0", "C": "C1", "R": "0.6"}[who]
                alpha = {"weights": 1, "gradients": 0.45, "Adam's moments": 0.7}[part]
                axes.barh(position, size, left=left, color=color, alpha=alpha, edgecolor="white")
                label = {"weights": "W", "gradients": "G", "Adam's moments": "Adam"}[part]
                axes.text(left + size / 2, position, label, ha="center", va="center", size=8)
                left += size
            axes.text(left + 2, position, f"{left} GB", va="center", size=9)
            names.append(f"{method}, {kind}")
            position += 1
    for color, label in (("C0", "actor"), ("C1", "critic"), ("0.6", "reference")):
        axes.barh(0, 0, color=color, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(
        xlabel="GB for 8 billion parameters: W weights, G gradients, Adam its moments",
        xlim=(0, 300),
    )
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(RESULTS / "memory.png")


def draw_groups():
    """Rewards of four images with four answers each; what one of them is compared with."""
    rewards = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    image, answer = 1, 2
    own = [(image, other) for other in range(4)]
    figure = Figure(figsize=(9, 3.1), dpi=120, layout="constrained")
    for axes, baseline, group in zip(
        figure.subplots(1, 3),
        ("batch", "group", "loo"),
        (list(np.ndindex(4, 4)), own, [cell for cell in own if cell != (image, answer)]),
        strict=True,
    ):
        advantages = grpo_mnist.group_advantages(rewards, baseline=baseline, scale_rewards="none")
        for i, j in np.ndindex(4, 4):
            color = "#cfe3f5" if (i, j) in group else "white"
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="0.6"))
            axes.text(j + 0.5, i + 0.5, rewards[i, j], ha="center", va="center")
        frame = {"fill": False, "edgecolor": "C3", "linewidth": 2.5}
        axes.add_patch(Rectangle((answer, image), 1, 1, **frame))
        axes.set(xlim=(0, 4), ylim=(4, 0), aspect="equal")
        axes.set_xticks(np.arange(4) + 0.5, ["answer 1", "2", "3", "4"], fontsize=8)
        axes.set_yticks(np.arange(4) + 0.5, ["image 1", "2", "3", "4"], fontsize=8)
        mean = rewards[image, answer] - advantages[image, answer]
        axes.set_title(f"--baseline {baseline}: 1 - {mean:.2f} = {1 - mean:+.2f}", fontsize=10)
    figure.suptitle(
        "rewards: the framed one is compared with the mean of the blue ones", fontsize=10
    )
    figure.savefig(RESULTS / "groups.png")


def draw_clip():
    """What the loss counts for an answer, by its ratio; and advantages by the share of right."""
    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    ratio = np.linspace(0.4, 1.6, 241)
    for advantage, color, label in ((1.0, "C0", "A = +1: right"), (-1.0, "C1", "A = -1: wrong")):
        counted = [-grpo_mnist.ppo_clip_loss(np.log(r), 0.0, advantage, 0.2, 0.2) for r in ratio]
        counted = np.array(counted)
        held = ratio > 1.2 if advantage > 0 else ratio < 0.8
        left.plot(ratio, counted, color=color, lw=2, label=label)
        left.plot(ratio[held], counted[held], color="black", lw=5, alpha=0.4)
    left.plot([], [], color="black", lw=5, alpha=0.4, label="held: flat, no gradient")
    left.axvspan(0.8, 1.2, color="0.9", zorder=0, label="1 - epsilon to 1 + epsilon")
    left.set(
        xlabel="ratio", ylabel="what the loss counts, negated", title="the clip, epsilon = 0.2"
    )
    left.legend(fontsize=8, loc="center right")
    num_right = np.arange(1, 100)
    advantages = [
        grpo_mnist.group_advantages(
            np.arange(100)[:, None] < num, baseline="batch", scale_rewards="batch"
        )
        for num in num_right
    ]
    right.plot(
        num_right / 100, [a[0, 0] for a in advantages], color="C0", lw=2, label="a right answer"
    )
    right.plot(
        num_right / 100, [a[-1, 0] for a in advantages], color="C1", lw=2, label="a wrong answer"
    )
    right.axhline(0, color="0.6", lw=1)
    right.set(xlabel="share of right answers in the batch", ylabel="advantage", ylim=(-7, 7))
    right.set(title="what is rare counts more")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "clip.png")


if __name__ == "__main__":
    draw_memory()
    draw_groups()
    draw_clip()
    print("drawn: memory.png, groups.png, clip.png")
