"""Draws every picture of the READMEs from the committed results, and those of formulas.

    python benchmarks/draw.py [--data-dir DIR]

one_update.png shows images of MNIST, and is drawn only with DIR, which is as for grpo_mnist.py.
"""

import argparse
import shlex
import tomllib
from pathlib import Path

import matplotlib.style
import numpy as np
from common import RESULTS, camps, fit_slope, grpo_mnist, over_seeds, read_results, rows_of, spread
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from one_update import COMMAND

TEMPLATES = Path(__file__).parent / "templates"
PROMISED = (1, 10), (85, 97)  # epochs and %, in the table that circulates with the original values


def new_figure(name):
    """A picture and its panels as pictures.toml describes them, with the curves that they show."""
    picture = tomllib.loads((TEMPLATES / "pictures.toml").read_text(encoding="utf-8"))[name]
    figure = Figure(figsize=picture["size"])
    panels = figure.subplot_mosaic(**picture["panels"])
    for letter, axes in panels.items():
        settings = picture.get("all", {}) | picture.get(letter, {})
        results, curves = settings.pop("results", None), settings.pop("curves", ())
        axes.set(**settings)
        axes.minorticks_off()
        for row_name, *curve in curves:
            draw_curve(axes, rows_of(results)[row_name], *curve)
    return figure, list(panels.values())


def draw_curve(axes, row, metric, style, label):
    """The mean with its 95% interval by epoch; or each seed, if they fall into camps in any."""
    curves = 100 * np.array(row["curves"][metric])  # (epochs, seeds)
    epochs = range(1, len(curves) + 1)
    if any(camps(by_seed / 100) for by_seed in curves):
        (line,) = axes.plot(epochs, curves[:, 0], style, lw=1, label=f"{label}, each seed")
        axes.plot(epochs, curves[:, 1:], style, lw=1, color=line.get_color())
        return
    mean, margin = np.transpose([tuple(over_seeds(by_seed).values()) for by_seed in curves])
    (line,) = axes.plot(epochs, mean, style, label=label)
    axes.fill_between(epochs, mean - margin, mean + margin, alpha=0.2, color=line.get_color())


def draw_learning():
    figure, (axes,) = new_figure("learning")
    axes.plot(*PROMISED, "kx", ms=8, mew=2, zorder=3, label="what is promised for them")
    return figure


def draw_breaking():
    figure, (_, axes, *_) = new_figure("breaking")
    collapse = rows_of("breaking")["class collapse"]
    confusion = np.array(collapse["worst_confusion"])
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axes, label="%", shrink=0.8)
    for image, answer in np.argwhere(shares >= 1):
        color = "white" if shares[image, answer] > 50 else "black"
        style = {"ha": "center", "va": "center", "size": 8, "color": color}
        axes.text(answer, image, f"{shares[image, answer]:.0f}", **style)
    axes.set_title(f"seed {collapse['worst_seed']} of it: answers to test images (% of a row)")
    axes.grid(False)
    return figure


def draw_algorithms():
    figure, (_, axes) = new_figure("algorithms")
    rows = rows_of("comparison")
    compared = [row for row in rows.values() if "command" in row and len(row["seeds"]) == 5]
    for metric, color, shift, label in (
        ("accuracy", "C0", -0.2, "training images, sampled answer"),
        ("test_accuracy", "C1", 0.2, "test images, likeliest answer"),
    ):
        axes.errorbar([], [], xerr=[], fmt="s", color=color, label=label)
        for position, row in enumerate(compared):
            errors = 100 - 100 * np.array(row[metric])
            mean, margin = over_seeds(errors).values()
            if camps(row[metric]):
                at = [position + shift] * len(errors)
                axes.plot(errors, at, "o", color=color, mfc="none", ms=5)
            else:
                axes.errorbar(mean, position + shift, xerr=margin, fmt="s", color=color)
    axes.plot([], [], "ko", mfc="none", ms=5, label="each seed, where they fall into camps")
    labels = 100 - 100 * np.mean(rows["labels, tuned"]["test_accuracy"])
    axes.axvline(labels, color="k", lw=1, ls=":", label="labels, tuned, test images")
    axes.set_yticks(range(len(compared)), [row["name"] for row in compared])
    axes.set_ylim(len(compared) - 0.4, -3.6)
    return figure


def draw_growth():
    results = read_results("growth")
    figure, panels = new_figure("growth")
    kinds = ("num_generations", "batch_size", "width", "num_seeds")
    for axes, kind in zip(panels, kinds, strict=True):
        rows = results["growth"][kind]["rows"]
        sizes = np.array([row["size"] for row in rows])
        times = [spread(row["epoch_seconds"]) for row in rows]
        low, median, high = (np.array([t[x] for t in times]) for x in ("min", "median", "max"))
        axes.errorbar(sizes, median, (median - low, high - median), fmt="o")
        slope, error = fit_slope(sizes, median).values()
        factor = np.exp(np.log(median).mean() - slope * np.log(sizes).mean())
        axes.plot(sizes, factor * sizes**slope, "k--", lw=1)
        axes.set_title(f"slope {slope:.2f}, standard error {error:.2f}", fontsize=9)
        axes.set_xticks(sizes, sizes, rotation=45)
    machine = f"{results['device']}, {results['cores']} cores; median and range"
    figure.suptitle(f"{machine} of {times[0]['n']}; dashed: the power of the size that fits best")
    return figure


def draw_one_update(images):
    """The images and what came of them; below, how the ratios move, round by round."""
    update = read_results("one_update")
    right = np.array(update["rewards"]) == 1
    figure, (*panels, below) = new_figure("one_update")
    for i, axes in enumerate(panels):
        axes.imshow(images[i].reshape(28, 28), cmap="gray_r")
        said = f"said {update['answers'][i]} ({update['rounds'][0]['probabilities'][i]:.1%})"
        verdict = f"{'right' if right[i] else 'wrong'}, {update['advantages'][i]:+.2f}"
        axes.set_title(f"image {i + 1}: a {update['labels'][i]}")
        axes.set_xlabel(f"{said}\n{verdict}", fontsize=9)
        axes.spines[:].set(color="C0" if right[i] else "C1", linewidth=2)
    below.axhspan(0.8, 1.2, color="0.9", zorder=0, label="between 1 - epsilon and 1 + epsilon")
    ratios, held = (np.array([each[x] for each in update["rounds"]]) for x in ("ratios", "held"))
    rounds = np.arange(1, len(ratios) + 1)
    below.plot(rounds, ratios[:, right], "C0o-")[0].set_label("right answers")
    below.plot(rounds, ratios[:, ~right], "C1s-")[0].set_label("wrong answers")
    at, image = held.nonzero()
    below.plot(rounds[at], ratios[at, image], "ko", mfc="none", ms=10, label="held: no gradient")
    return figure


def draw_memory():
    """Stacked bars of gigabytes for eight billion parameters."""
    figure, (axes,) = new_figure("memory")
    for kind, weights, adam in (("mixed precision", 6, 8), ("all in bf16", 2, 4)):
        network = [("W", 1, weights), ("G", 0.45, 2), ("Adam", 0.7, adam)]
        actor, critic = ([(color, *part) for part in network] for color in ("C0", "C1"))
        reference = [("0.6", "W", 1, 2)]
        for method, parts in (
            ("GRPO, beta = 0", actor),
            ("GRPO", actor + reference),
            ("PPO", actor + critic + reference),
        ):
            left, name = 0, f"{method}, {kind}"
            for color, label, alpha, size in parts:
                bar = axes.barh(name, 8 * size, left=left, color=color, alpha=alpha, ec="white")
                axes.bar_label(bar, [label], label_type="center", size=8)
                left += 8 * size
            axes.bar_label(bar, [f"{left} GB"], padding=4, size=9)
    for color, label in (("C0", "actor"), ("C1", "critic"), ("0.6", "reference")):
        axes.barh(name, 0, color=color, label=label)
    return figure


def draw_groups():
    """Rewards of four images with four answers each; what one of them is compared with."""
    rewards = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    framed = image, answer = 1, 2
    images, answers = np.indices(rewards.shape)
    own = images == image
    groups = {"batch": own | True, "group": own, "loo": own & (answers != answer)}
    figure, panels = new_figure("groups")
    figure.suptitle("rewards: the framed one is compared with the mean of the blue ones")
    for axes, (baseline, group) in zip(panels, groups.items(), strict=True):
        axes.pcolormesh(group, cmap="Blues", vmin=0, vmax=4, edgecolors="0.6")
        for (i, j), reward in np.ndenumerate(rewards):
            axes.text(j + 0.5, i + 0.5, reward, ha="center", va="center")
        axes.add_patch(Rectangle((answer, image), 1, 1, fill=False, edgecolor="C3", linewidth=2.5))
        advantages = grpo_mnist.group_advantages(rewards, baseline=baseline, scale_rewards="none")
        by_hand = f"1 - {1 - advantages[framed]:.2f} = {advantages[framed]:+.2f}"
        axes.set_title(f"--baseline {baseline}: {by_hand}")
        axes.grid(False)
    return figure


def draw_clip():
    """What the loss counts for an answer, by its ratio; and advantages by the share of right."""
    figure, (left, right) = new_figure("clip")
    ratio = np.linspace(0.4, 1.6, 241)
    for advantage, color, label in ((1.0, "C0", "A = +1: right"), (-1.0, "C1", "A = -1: wrong")):
        loss = np.vectorize(grpo_mnist.ppo_clip_loss)(np.log(ratio), 0.0, advantage, 0.2, 0.2)
        held = ratio > 1.2 if advantage > 0 else ratio < 0.8
        left.plot(ratio, -loss, color, lw=2, label=label)
        left.plot(ratio[held], -loss[held], "k", lw=5, alpha=0.4)
    left.plot([], [], "k", lw=5, alpha=0.4, label="held: flat, no gradient")
    left.axvspan(0.8, 1.2, color="0.9", zorder=0, label="1 - epsilon to 1 + epsilon")
    share = np.arange(1, 100) / 100
    right.plot(share, np.sqrt((1 - share) / share), lw=2, label="a right answer")
    right.plot(share, -np.sqrt(share / (1 - share)), lw=2, label="a wrong answer")
    return figure


def save(figure, name):
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(RESULTS / f"{name}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    with matplotlib.style.context(TEMPLATES / "pictures.mplstyle"):
        if options.data_dir:
            dataset = grpo_mnist.load_dataset("mnist", options.data_dir.expanduser())
            config = grpo_mnist.parse_flags(shlex.split(COMMAND)[2:])
            images, _ = next(grpo_mnist.batches(config, dataset, epoch=1))
            save(draw_one_update(images[0]), "one_update")
        save(new_figure("strong")[0], "strong")
        formulas = draw_memory, draw_groups, draw_clip
        for draw in (draw_learning, draw_breaking, draw_algorithms, draw_growth, *formulas):
            save(draw(), draw.__name__.removeprefix("draw_"))


if __name__ == "__main__":
    main()
