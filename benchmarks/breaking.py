"""Break it on purpose: what single flags do to a run on MNIST, five seeds each.

    python benchmarks/breaking.py --data-dir DIR
    python benchmarks/breaking.py --data-dir DIR --go-on    keeps the rows that are there
    python benchmarks/breaking.py --draw                    only draws the figure anew

DIR is as for grpo_mnist.py. A row is one command of the program, with --num-seeds 5 added. Also
what the labels themselves teach with the values that this exercise usually comes with. Writes
results/breaking.json, and the figure breaking.png.
"""

import json

import numpy as np
from common import (
    RESULTS,
    command_of,
    final_actor,
    finished_run,
    grpo_mnist,
    library_versions,
    parse_options,
    write_results,
)
from comparison import supervise

PATH = RESULTS / "breaking.json"
NUM_SEEDS = 5
PER_IMAGE = "--baseline group --scale-rewards group --num-generations 8 --num-iterations 1"
RUNS = {
    "defaults": "",
    "class collapse": PER_IMAGE,
    "class collapse, entropy bonus": f"{PER_IMAGE} --entropy-coef 0.01",
    "no baseline, K = 1": "--baseline none --scale-rewards none --num-iterations 1",
    "no baseline, K = 4": "--baseline none --scale-rewards none",
    "K = 1": "--num-iterations 1",
    "learning rate x 30": "--learning-rate 0.09",
    "learning rate constant": "--lr-schedule constant",
    "K = 64": "--num-iterations 64",
    "K = 64, no clipping": "--num-iterations 64 --clip-epsilon 0.999 --clip-epsilon-high 1e9",
}
METRICS = (
    *("accuracy", "test_accuracy", "loss", "reward_std", "frac_reward_zero_std", "entropy"),
    *("ratio_max", "clip_ratio_low", "clip_ratio_high", "grad_norm"),
)


def run(name, flags, data_dir, dataset):
    """A row: every metric of every seed by epoch, and how often the actor answers each digit."""
    with finished_run(flags, data_dir, NUM_SEEDS) as (run_dir, history):
        actor = final_actor(run_dir, NUM_SEEDS)
    answers, _ = grpo_mnist.predict(actor, dataset.test_images)
    answers = np.asarray(answers)
    counts = [np.bincount(each, minlength=10).tolist() for each in answers]
    worst = int(np.argmin(history[-1]["by_seed"]["test_accuracy"]))
    confusion = np.zeros((10, 10), int)  # what the image shows, what the worst seed says
    np.add.at(confusion, (dataset.test_labels, answers[worst]), 1)
    last = history[-1]
    print(f"{name}: {last['accuracy']:.4f}, test {last['by_seed']['test_accuracy']}", flush=True)
    return {
        "name": name,
        "command": command_of(flags),
        "by_epoch": {
            metric: [record["by_seed"][metric] for record in history] for metric in METRICS
        },
        "accuracy": {"mean": last["accuracy"], "interval_95": last["interval_95"]["accuracy"]},
        "test_accuracy": {
            "mean": last["test_accuracy"],
            "interval_95": last["interval_95"]["test_accuracy"],
            "by_seed": last["by_seed"]["test_accuracy"],
        },
        "test_answers_by_digit": counts,
        "worst_seed": worst,
        "worst_confusion": confusion.tolist(),
    }


def draw(rows):
    """The figure, on its own white ground, so that it can be read on a dark page, too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.6), dpi=120, layout="constrained")
    (one, two), (three, four) = figure.subplots(2, 2)
    collapse = rows["class collapse"]
    epochs = np.arange(1, 11)
    curves = 100 * np.array(collapse["by_epoch"]["test_accuracy"])  # (epochs, seeds)
    worst = collapse["worst_seed"]
    lines = one.plot(epochs, np.delete(curves, worst, axis=1), color="C0", lw=1)
    lines[0].set_label("the other seeds")
    one.plot(epochs, curves[:, worst], color="C3", lw=2, label=f"seed {worst}")
    saved = 100 * np.array(rows["class collapse, entropy bonus"]["by_epoch"]["test_accuracy"])
    lines = one.plot(epochs, saved, color="C2", lw=1, ls="--")
    lines[0].set_label("with entropy bonus 0.01, each of 5 seeds")
    one.set(title="class collapse: groups of 8 answers, K = 1, n = 5")
    one.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(80, 100))
    confusion = np.array(collapse["worst_confusion"])
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True)
    picture = two.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for image, answer in np.ndindex(10, 10):
        if shares[image, answer] >= 1:
            color = "white" if shares[image, answer] > 50 else "black"
            text = f"{shares[image, answer]:.0f}"
            two.text(answer, image, text, ha="center", va="center", color=color, fontsize=8)
    two.set(xticks=range(10), yticks=range(10), xlabel="answer", ylabel="digit in the image")
    two.set(title=f"seed {worst} of it: answers to test images (% of a row)")
    figure.colorbar(picture, ax=two, label="%", shrink=0.8)
    for name, style in (
        ("defaults", "o-"),
        ("no baseline, K = 4", "v-"),
        ("learning rate constant", "s-"),
        ("no baseline, K = 1", "^-"),
        ("learning rate x 30", "x-"),
    ):
        draw_curve(three, rows[name], style, label=name)
    three.set(title="mean and range of 5 seeds", xlabel="epoch", ylabel="test accuracy (%)")
    three.set(ylim=(0, 100))
    for name, style in (
        ("K = 1", "^-"),
        ("defaults", "o-"),
        ("K = 64", "s-"),
        ("K = 64, no clipping", "x-"),
    ):
        label = "K = 4 (defaults)" if name == "defaults" else name
        draw_curve(four, rows[name], style, label)
    four.set(title="rounds per batch: mean and range of 5 seeds", xlabel="epoch")
    four.set(ylabel="test accuracy (%)")
    for axes in (one, three, four):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center right" if axes is three else "lower right")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(RESULTS / "breaking.png")
    print("drawn: breaking.png")


def draw_curve(axes, row, style, label):
    """The mean over the seeds, and their range, epoch by epoch."""
    curves = 100 * np.array(row["by_epoch"]["test_accuracy"])  # (epochs, seeds)
    epochs = np.arange(1, len(curves) + 1)
    lines = axes.plot(epochs, curves.mean(axis=1), style, ms=4, lw=1.2, label=label)
    low, high = curves.min(axis=1), curves.max(axis=1)
    axes.fill_between(epochs, low, high, alpha=0.2, color=lines[0].get_color())


def main():
    options = parse_options(__doc__, "--go-on")
    there = json.loads(PATH.read_text()) if options.draw or options.go_on else {"rows": []}
    if options.draw:
        draw({row["name"]: row for row in there["rows"]})
        return
    same = there.get("versions") == library_versions()
    kept = {row["command"]: row for row in there["rows"] if same}
    dataset = grpo_mnist.load_dataset("mnist", options.data_dir)
    original = {"learning_rate": 1e-4, "lr_schedule": "constant", "num_seeds": NUM_SEEDS}
    labels = supervise("labels, the exercise's original values", original, dataset)
    rows = {}
    for name, flags in RUNS.items():
        rows[name] = kept.get(command_of(flags)) or run(name, flags, options.data_dir, dataset)
        results = {"num_seeds": NUM_SEEDS, "labels": labels, "rows": list(rows.values())}
        write_results("breaking", results)  # each time: an hour's work is not lost to a mistake
    draw(rows)


if __name__ == "__main__":
    main()
