"""Draws every picture of the READMEs, in both languages: `python benchmarks/draw.py`."""

from importlib.metadata import distribution

import numpy as np
from common import RESULTS, camps, grpo_mnist, over_seeds, read_results, rows_of
from matplotlib import font_manager, rc_context, style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from one_update import first_batch
from report import TEMPLATES, read_toml, slope

RIGHT, WRONG, NEUTRAL = "C0", "C1", "0.5"  # what the colors of answers mean in every picture
SHARES = LinearSegmentedColormap.from_list("shares", [(0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)])


def draw_panel(axes, t, grid=True, results=None, curves=(), **settings):
    """What pictures.toml has of it: settings; curves with 95% intervals, or of seeds in camps."""
    axes.set(**settings)
    axes.set(title=t(axes.get_title()), xlabel=t(axes.get_xlabel()), ylabel=t(axes.get_ylabel()))
    axes.minorticks_off()
    axes.grid(grid)
    for row_name, metric, line_style, label in curves:
        shares = np.array(rows_of(results)[row_name]["curves"][metric])  # (epochs, seeds)
        epochs = range(1, len(shares) + 1)
        if any(map(camps, shares)):
            axes.plot(epochs, 100 * shares, line_style, lw=1)[0].set_label(t(label))
        else:
            mean, error = np.transpose([[*over_seeds(each).values()] for each in 100 * shares])
            (line,) = axes.plot(epochs, mean, line_style, label=t(label))
            axes.fill_between(epochs, mean - error, mean + error, alpha=0.2, color=line.get_color())


def draw_bars(axes, update, i):
    """The ten probabilities of an image, before the update (outlined) and after it (filled)."""
    colors = [RIGHT if digit == update["labels"][i] else WRONG for digit in range(10)]
    axes.bar(range(10), update["probabilities_after"][i], color=colors)
    axes.bar(range(10), update["rounds"][0]["probabilities"][i], fill=False, edgecolor=NEUTRAL)
    axes.set_ylim(0, 0.17)


def draw_flow(t, image, bars, answers, after):
    """The third image of the update: probabilities, answers, rewards, advantages, and after it."""
    update, (_, _, images, _) = read_results("one_update"), first_batch()
    image.imshow(images[2].reshape(28, 28), cmap=SHARES)
    bars.bar(range(10), update["rounds"][0]["probabilities"][2], color=NEUTRAL)
    draw_bars(after, update, 2)
    answers.axis("off")
    colors = [RIGHT if reward else WRONG for reward in update["rewards"][2]]
    for x, (name, form) in enumerate({"answer": "d", "reward": ".0f", "advantage": "+.0f"}.items()):
        answers.text(x, 4.4, t(name), ha="center", size=9)
        for row, (value, color) in enumerate(zip(update[f"{name}s"][2], colors, strict=True)):
            answers.text(x, 3.4 - row, f"{value:{form}}", ha="center", size=12, color=color)


def draw_collapse(t, _, axes):
    """REINFORCE: the accuracy of each seed, and what the worst seed says to each digit."""
    row = rows_of("grown")["REINFORCE"]
    confusion = np.array(row["worst_confusion"])
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap=SHARES, vmin=0, vmax=400)
    for image, answer in np.argwhere(shares >= 1):
        text = f"{shares[image, answer]:.0f}"
        color = RIGHT if image == answer else WRONG
        axes.text(answer, image, text, ha="center", va="center", size=7, color=color)
    axes.set_title(t("answers of seed {} (% of a row)").format(row["worst_seed"]))


def draw_one_update(t, *panels):
    """The ten probabilities of each image before and after; below, each answer's ratio."""
    update, (_, _, images, _) = read_results("one_update"), first_batch()
    *panels, below = panels
    for i, (image, bars) in enumerate(zip(panels[::2], panels[1::2], strict=True)):
        image.imshow(images[i].reshape(28, 28), cmap=SHARES)
        image.set(title=f"{t('image')} {i + 1}", xticks=[])
        draw_bars(bars, update, i)
    ratios = np.array([each["ratios"] for each in update["rounds"]])  # (rounds, images, answers)
    clipped = np.array([each["clipped"] for each in update["rounds"]])
    rounds, ends, ring = range(1, 5), set(), {"mfc": "none", "ms": 11}
    for i, j in np.ndindex(ratios.shape[1:]):
        advantage, answer = update["advantages"][i][j], update["answers"][i][j]
        color = NEUTRAL if advantage == 0 else RIGHT if advantage > 0 else WRONG
        below.plot(rounds, ratios[:, i, j], "o-", c=color)
        below.plot(rounds, ratios[:, i, j], "o", c=color, markevery=clipped[:, i, j], **ring)
        ends.add((ratios[-1, i, j], t("image {}, answer {}").format(i + 1, answer), color))
    height = 0.0
    for ratio, text, color in sorted(ends):
        height = max(ratio, height + 0.045)  # Names that would overlap are moved up.
        below.text(4.1, height, text, va="center", size=8, color=color)
    for color, words in ((RIGHT, "right"), (WRONG, "wrong"), (NEUTRAL, "silent group")):
        below.plot([], [], "o-", c=color, label=t(words))
    below.plot([], [], "o", c=NEUTRAL, label=t("clipped: no gradient"), **ring)
    below.axhspan(0.8, 1.2, color=NEUTRAL, alpha=0.15, zorder=0)


def draw_groups(t, *panels):
    """Rewards of four images with four answers each; what one of them is compared with."""
    rewards = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    framed = image, answer = 1, 2
    images, answers = np.indices(rewards.shape)
    own = images == image
    groups = {"batch": own | True, "group": own, "loo": own & (answers != answer)}
    for axes, (baseline, group) in zip(panels, groups.items(), strict=True):
        axes.pcolormesh(group, cmap=SHARES, vmin=0, vmax=5, edgecolors="0.6")
        for (i, j), reward in np.ndenumerate(rewards):
            color = RIGHT if reward else WRONG
            axes.text(j + 0.5, i + 0.5, reward, ha="center", va="center", color=color)
        axes.bar(answer + 0.5, 1, 1, bottom=image, fill=False, edgecolor=RIGHT, linewidth=2.5)
        gain = grpo_mnist.group_advantages(rewards, baseline=baseline, scale_rewards="none")[framed]
        axes.set_title(f"--baseline {baseline}\n1 - {1 - gain:.2f} = {gain:+.2f}")


def draw_clip(t, left, right):
    """What the loss counts for an answer, by its ratio; and advantages by the share of right."""
    ratio = np.linspace(0.4, 1.6, 241)
    for advantage, color, label in ((1.0, RIGHT, "Â = +1: right"), (-1.0, WRONG, "Â = -1: wrong")):
        loss = np.vectorize(grpo_mnist.ppo_clip_loss)(np.log(ratio), 0.0, advantage, 0.2, 0.2)
        clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
        left.plot(ratio, -loss, color, lw=2, label=t(label))
        left.plot(ratio[clipped], -loss[clipped], color, lw=7, alpha=0.4)
    left.plot([], [], NEUTRAL, lw=7, alpha=0.4, label=t("thick: clipped, no gradient"))
    share = np.arange(1, 100) / 100
    right.plot(share, np.sqrt((1 - share) / share), RIGHT, lw=2, label=t("right"))
    right.plot(share, -np.sqrt(share / (1 - share)), WRONG, lw=2, label=t("wrong"))


def draw_memory(t, axes):
    """Stacked bars of gigabytes for eight billion parameters."""
    for kind, weights, adam in (("bf16 + fp32", 6, 8), ("bf16", 2, 4)):
        network = [("W", weights), ("G", 2), ("Adam", adam)]
        actor, critic = ([(color, *part) for part in network] for color in ("C2", "C4"))
        reference = [(NEUTRAL, "W", 2)]
        ppo, grpo = actor + critic + reference, actor + reference
        for method, parts in (("GRPO, β = 0", actor), ("GRPO", grpo), ("PPO", ppo)):
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


def draw_learning(t, axes, _):
    """What the table that circulates with the original values promises after epochs 1 and 10."""
    axes.plot([1, 10], [85, 97], "C3x", ms=8, mew=2, label=t("what is promised for them"))


def draw_algorithms(t, axes):
    """The error of every algorithm after ten epochs."""
    rows = rows_of("comparison")
    compared = [row for row in rows.values() if "command" in row and len(row["seeds"]) == 5]
    for metric, color, shift, label in (
        ("accuracy", "C2", -0.2, "training images, sampled answer"),
        ("test_accuracy", "C4", 0.2, "test images, likeliest answer"),
    ):
        axes.errorbar([], [], xerr=[], fmt="s", color=color, label=t(label))
        for height, row in enumerate(compared):
            errors = 100 - 100 * np.array(row[metric])
            if camps(row[metric]):
                axes.plot(errors, [height + shift] * 5, "o", color=color, mfc="none", ms=5)
            else:
                mean, margin = over_seeds(errors).values()
                axes.errorbar(mean, height + shift, xerr=margin, fmt="s", color=color)
    axes.plot([], [], "o", color=NEUTRAL, mfc="none", ms=5, label=t("each seed, where in camps"))
    labels = 100 - 100 * np.mean(rows["labels, tuned"]["test_accuracy"])
    axes.axvline(labels, color=NEUTRAL, lw=1, ls=":", label=t("labels, tuned, test images"))
    axes.set_yticks(range(len(compared)), [t(row["name"]) for row in compared])
    axes.set_ylim(len(compared) - 0.4, -4.6)


def draw_growth(t, *panels):
    growth = read_results("growth")["growth"]
    for axes in panels:
        rows = growth[axes.get_label()]["rows"]  # the panel's name in pictures.toml
        sizes, times = [row["size"] for row in rows], [row["epoch_seconds"] for row in rows]
        low, median, high = np.quantile(times, (0, 0.5, 1), axis=1)
        axes.errorbar(sizes, median, (median - low, high - median), fmt="o")
        line = np.polyfit(np.log(sizes), np.log(median), 1)
        axes.plot(sizes, np.exp(np.polyval(line, np.log(sizes))), "--", color=NEUTRAL, lw=1)
        axes.set_title(f"{t('slope')} {slope(rows)}", fontsize=9)
        axes.set_xticks(sizes, sizes, rotation=45)


def draw_all(t, suffix, directory):
    """Writes NAME + suffix + .png into the directory for every picture of pictures.toml."""
    for name, picture in read_toml("pictures.toml").items():
        figure = Figure(figsize=picture["size"])
        panels = figure.subplot_mosaic(**picture["panels"])
        if "title" in picture:
            figure.suptitle(t(picture["title"]))
        for letter, axes in panels.items():
            draw_panel(axes, t, **picture.get("all", {}) | picture.get(letter, {}))
        if draw := globals().get(f"draw_{name}"):  # what the picture shows beside its curves
            draw(t, *panels.values())
        for axes in figure.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(**picture.get("legend", {}))
        figure.savefig(directory / f"{name}{suffix}.png")


def main(directory=RESULTS):
    font = distribution("mpltw").locate_file("mpltw/TaipeiSansTCBeta-Regular.ttf")
    font_manager.fontManager.addfont(font)
    words = read_toml("chinese.toml")
    with style.context(TEMPLATES / "pictures.mplstyle"):
        draw_all(str, "", directory)
        with rc_context({"font.family": ["Taipei Sans TC Beta", "DejaVu Sans"]}):
            draw_all(lambda text: words.get(text, text), "_ch", directory)


if __name__ == "__main__":
    main()
