"""Draws every picture of the READMEs, in both languages, from the committed results and formulas.

    python benchmarks/draw.py

The pictures have no background, so that they can be read on light pages and on dark ones.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import matplotlib.font_manager
import matplotlib.style
import numpy as np
from common import RESULTS, camps, fit_slope, grpo_mnist, over_seeds, read_results, rows_of, spread
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from one_update import first_batch

TEMPLATES = Path(__file__).parent / "templates"
PROMISED = (1, 10), (85, 97)  # epochs and %, in the table that circulates with the original values
RIGHT, WRONG, NEUTRAL = "C0", "C1", "0.5"  # what the colors of answers mean in every picture
SHARES = LinearSegmentedColormap.from_list("shares", [(0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)])


def read_toml(name):
    return tomllib.loads((TEMPLATES / name).read_text(encoding="utf-8"))


def new_figure(picture, t):
    """A picture and its panels as pictures.toml has them, with their curves; t translates words."""
    figure = Figure(figsize=picture["size"])
    panels = figure.subplot_mosaic(**picture["panels"])
    for letter, axes in panels.items():
        settings = picture.get("all", {}) | picture.get(letter, {})
        results, curves = settings.pop("results", None), settings.pop("curves", ())
        for words in {"title", "xlabel", "ylabel"} & set(settings):
            settings[words] = t(settings[words])
        axes.set(**settings)
        axes.minorticks_off()
        for row_name, metric, style, label in curves:
            draw_curve(axes, rows_of(results)[row_name], metric, style, t(label))
    return figure, list(panels.values())


def draw_curve(axes, row, metric, style, label):
    """The mean with its 95% interval by epoch; or each seed, if they fall into camps in any."""
    curves = 100 * np.array(row["curves"][metric])  # (epochs, seeds)
    epochs = range(1, len(curves) + 1)
    if any(camps(by_seed / 100) for by_seed in curves):
        axes.plot(epochs, curves, style, lw=1)[0].set_label(label)
        return
    mean, margin = np.transpose([tuple(over_seeds(by_seed).values()) for by_seed in curves])
    (line,) = axes.plot(epochs, mean, style, label=label)
    axes.fill_between(epochs, mean - margin, mean + margin, alpha=0.2, color=line.get_color())


def draw_bars(axes, before, after, label):
    """The ten probabilities of an image, before the update (outlined) and after it (filled)."""
    colors = [RIGHT if digit == label else WRONG for digit in range(10)]
    axes.bar(range(10), after, color=colors)
    axes.bar(range(10), before, fill=False, edgecolor=NEUTRAL)
    axes.grid(False)


def draw_flow(figure, panels, t):
    """The third image of the update: probabilities, answers, rewards, advantages, and after it."""
    update, (_, _, images, _) = read_results("one_update"), first_batch()
    label, before = update["labels"][2], update["rounds"][0]["probabilities"][2]
    image, bars, answers, after = panels
    image.imshow(images[2].reshape(28, 28), cmap=SHARES)
    image.grid(False)
    bars.bar(range(10), before, color=NEUTRAL)
    draw_bars(after, before, update["probabilities_after"][2], label)
    answers.axis("off")
    for column, name in enumerate(("answer", "reward", "advantage")):
        answers.text(column, 4.4, t(name), ha="center", size=9)
    rows = zip(*(update[name][2] for name in ("answers", "rewards", "advantages")), strict=True)
    for row, (answer, reward, advantage) in enumerate(rows):
        color = RIGHT if reward else WRONG
        for column, text in enumerate((f"{answer}", f"{reward:.0f}", f"{advantage:+.0f}")):
            answers.text(column, 3.4 - row, text, ha="center", size=12, color=color)


def draw_collapse(figure, panels, t):
    """REINFORCE: the accuracy of each seed, and what the worst seed says to each digit."""
    _, axes = panels
    row = rows_of("grown")["REINFORCE"]
    confusion = np.array(row["worst_confusion"])
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap=SHARES, vmin=0, vmax=400)
    for image, answer in np.argwhere(shares >= 1):
        text = f"{shares[image, answer]:.0f}"
        color = RIGHT if image == answer else WRONG
        axes.text(answer, image, text, ha="center", va="center", size=7, color=color)
    axes.set_title(t("answers of seed {} (% of a row)").format(row["worst_seed"]))
    axes.grid(False)


def draw_one_update(figure, panels, t):
    """The ten probabilities of each image before and after; below, each answer's ratio."""
    update, (_, _, images, _) = read_results("one_update"), first_batch()
    *panels, below = panels
    for i, (image, bars) in enumerate(zip(panels[::2], panels[1::2], strict=True)):
        image.imshow(images[i].reshape(28, 28), cmap=SHARES)
        image.set(title=t("image {}").format(i + 1), xticks=[], yticks=[])
        image.grid(False)
        before, after = update["rounds"][0]["probabilities"][i], update["probabilities_after"][i]
        draw_bars(bars, before, after, update["labels"][i])
        bars.set(ylim=(0, 0.17), yticks=[])
    ratios, clipped = (
        np.array([x[name] for x in update["rounds"]]) for name in ("ratios", "clipped")
    )
    rounds, ends = np.arange(1, 5), {}
    for i, j in np.ndindex(ratios.shape[1:]):
        advantage, answer = update["advantages"][i][j], update["answers"][i][j]
        color = NEUTRAL if advantage == 0 else RIGHT if advantage > 0 else WRONG
        below.plot(rounds, ratios[:, i, j], color=color, marker="o")
        at = clipped[:, i, j]
        below.plot(rounds[at], ratios[at, i, j], "o", color=color, mfc="none", ms=11)
        ends[t("image {}, answer {}").format(i + 1, answer)] = ratios[-1, i, j], color
    height = 0.0
    for text, (ratio, color) in sorted(ends.items(), key=lambda end: end[1]):
        height = max(ratio, height + 0.045)  # Names that would overlap are moved up.
        below.text(4.1, height, text, va="center", size=8, color=color)
    for color, words in ((RIGHT, "right"), (WRONG, "wrong"), (NEUTRAL, "silent group")):
        below.plot([], [], "o-", color=color, label=t(words))
    below.plot([], [], "o", color=NEUTRAL, mfc="none", ms=11, label=t("clipped: no gradient"))
    below.axhspan(0.8, 1.2, color=NEUTRAL, alpha=0.15, zorder=0)


def draw_groups(figure, panels, t):
    """Rewards of four images with four answers each; what one of them is compared with."""
    rewards = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    framed = image, answer = 1, 2
    images, answers = np.indices(rewards.shape)
    own = images == image
    groups = {"batch": own | True, "group": own, "loo": own & (answers != answer)}
    figure.suptitle(t("rewards: the framed one is compared with the mean of the shaded ones"))
    for axes, (baseline, group) in zip(panels, groups.items(), strict=True):
        axes.pcolormesh(group, cmap=SHARES, vmin=0, vmax=5, edgecolors="0.6")
        for (i, j), reward in np.ndenumerate(rewards):
            color = RIGHT if reward else WRONG
            axes.text(j + 0.5, i + 0.5, reward, ha="center", va="center", color=color)
        axes.add_patch(Rectangle((answer, image), 1, 1, fill=False, edgecolor=RIGHT, linewidth=2.5))
        advantages = grpo_mnist.group_advantages(rewards, baseline=baseline, scale_rewards="none")
        by_hand = f"1 - {1 - advantages[framed]:.2f} = {advantages[framed]:+.2f}"
        axes.set_title(f"--baseline {baseline}\n{by_hand}")
        axes.grid(False)


def draw_clip(figure, panels, t):
    """What the loss counts for an answer, by its ratio; and advantages by the share of right."""
    left, right = panels
    ratio = np.linspace(0.4, 1.6, 241)
    for advantage, color, label in ((1.0, RIGHT, "Â = +1: right"), (-1.0, WRONG, "Â = -1: wrong")):
        loss = np.vectorize(grpo_mnist.ppo_clip_loss)(np.log(ratio), 0.0, advantage, 0.2, 0.2)
        clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
        left.plot(ratio, -loss, color, lw=2, label=t(label))
        left.plot(ratio[clipped], -loss[clipped], color, lw=7, alpha=0.4)
    left.plot([], [], NEUTRAL, lw=7, alpha=0.4, label=t("thick: clipped, no gradient"))
    left.set_xticks([0.4, 0.8, 1.0, 1.2, 1.6])
    share = np.arange(1, 100) / 100
    right.plot(share, np.sqrt((1 - share) / share), RIGHT, lw=2, label=t("right"))
    right.plot(share, -np.sqrt(share / (1 - share)), WRONG, lw=2, label=t("wrong"))


def draw_memory(figure, panels, t):
    """Stacked bars of gigabytes for eight billion parameters."""
    (axes,) = panels
    for kind, weights, adam in (("bf16 + fp32", 6, 8), ("bf16", 2, 4)):
        network = [("W", weights), ("G", 2), ("Adam", adam)]
        actor, critic = ([(color, *part) for part in network] for color in ("C2", "C4"))
        reference = [(NEUTRAL, "W", 2)]
        for method, parts in (
            ("GRPO, β = 0", actor),
            ("GRPO", actor + reference),
            ("PPO", actor + critic + reference),
        ):
            left, name = 0, f"{method}, {kind}"
            for color, label, size in parts:
                bar = axes.barh(name, 8 * size, left=left, color=color, edgecolor="white")
                axes.bar_label(bar, [label], label_type="center", size=8, color="white")
                left += 8 * size
            axes.text(max(left, 80) + 4, name, f"{left} GB", va="center", size=9)
    for color, label in (("C2", "actor"), ("C4", "critic"), (NEUTRAL, "reference")):
        axes.barh(name, 0, color=color, label=t(label))
    axes.axvline(80, color="C3", ls="--", label=t("a GPU of 80 GB"))
    axes.grid(axis="y", visible=False)


def draw_learning(figure, panels, t):
    axes, _ = panels
    axes.plot(*PROMISED, "x", color="C3", ms=8, mew=2, label=t("what is promised for them"))


def draw_algorithms(figure, panels, t):
    """The error of every algorithm after ten epochs."""
    (axes,) = panels
    rows = rows_of("comparison")
    compared = [row for row in rows.values() if "command" in row and len(row["seeds"]) == 5]
    for metric, color, shift, label in (
        ("accuracy", "C2", -0.2, "training images, sampled answer"),
        ("test_accuracy", "C4", 0.2, "test images, likeliest answer"),
    ):
        axes.errorbar([], [], xerr=[], fmt="s", color=color, label=t(label))
        for position, row in enumerate(compared):
            errors = 100 - 100 * np.array(row[metric])
            mean, margin = over_seeds(errors).values()
            if camps(row[metric]):
                at = [position + shift] * len(errors)
                axes.plot(errors, at, "o", color=color, mfc="none", ms=5)
            else:
                axes.errorbar(mean, position + shift, xerr=margin, fmt="s", color=color)
    axes.plot([], [], "o", color=NEUTRAL, mfc="none", ms=5, label=t("each seed, where in camps"))
    labels = 100 - 100 * np.mean(rows["labels, tuned"]["test_accuracy"])
    axes.axvline(labels, color=NEUTRAL, lw=1, ls=":", label=t("labels, tuned, test images"))
    axes.set_yticks(range(len(compared)), [t(row["name"]) for row in compared])
    axes.set_ylim(len(compared) - 0.4, -4.6)


def draw_growth(figure, panels, t):
    results = read_results("growth")
    kinds = ("num_generations", "batch_size", "width", "num_seeds")
    for axes, kind in zip(panels, kinds, strict=True):
        rows = results["growth"][kind]["rows"]
        sizes = np.array([row["size"] for row in rows])
        times = [spread(row["epoch_seconds"]) for row in rows]
        low, median, high = (np.array([x[y] for x in times]) for y in ("min", "median", "max"))
        axes.errorbar(sizes, median, (median - low, high - median), fmt="o")
        slope, error = fit_slope(sizes, median).values()
        factor = np.exp(np.log(median).mean() - slope * np.log(sizes).mean())
        axes.plot(sizes, factor * sizes**slope, "--", color=NEUTRAL, lw=1)
        axes.set_title(f"{t('slope')} {slope:.2f} ± {error:.2f}", fontsize=9)
        axes.set_xticks(sizes, sizes, rotation=45)


def draw_all(t, suffix, directory):
    """Writes NAME + suffix + .png into the directory for every picture of pictures.toml."""
    for name, picture in read_toml("pictures.toml").items():
        figure, panels = new_figure(picture, t)
        if draw := globals().get(f"draw_{name}"):  # what the picture shows beside its curves
            draw(figure, panels, t)
        for axes in figure.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(**picture.get("legend", {}))
        figure.savefig(directory / f"{name}{suffix}.png")


def main(directory=RESULTS):
    font = distribution("mpltw").locate_file("mpltw/TaipeiSansTCBeta-Regular.ttf")
    matplotlib.font_manager.fontManager.addfont(str(font))
    words = read_toml("chinese.toml")
    with matplotlib.style.context(TEMPLATES / "pictures.mplstyle"):
        draw_all(str, "", directory)
        with matplotlib.rc_context({"font.family": ["Taipei Sans TC Beta", "DejaVu Sans"]}):
            draw_all(lambda text: words.get(text, text), "_ch", directory)


if __name__ == "__main__":
    main()
