"""The algorithms side by side on MNIST, beside what the labels themselves give.

    python benchmarks/comparison.py --data-dir DIR
    python benchmarks/comparison.py --data-dir DIR --go-on    keeps the rows that are there
    python benchmarks/comparison.py --draw                    only draws the figures anew

DIR is as for grpo_mnist.py. A row is one command of the program, with --num-seeds 5 added, and 10
for the two settings that tuning.py chose without the test images. The algorithms have the program's
defaults, but for what their names say: no setting was tuned for any of them. Differences are paired
by seed. Writes results/comparison.json, and the figures algorithms.png and strong.png.
"""

import dataclasses
import functools
import json
import shlex
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    RESULTS,
    command_of,
    finished_run,
    grpo_mnist,
    library_versions,
    over_seeds,
    parse_options,
    run_epoch,
    spread,
    state_and_step,
    write_results,
)

PATH = RESULTS / "comparison.json"
NUM_SEEDS, MANY_SEEDS = 5, 10
TIMED_EPOCHS = 7
PER_IMAGE = "--baseline group --num-generations 8"
DEFAULTS = "batch-mean GRPO"
ALGORITHMS = {
    "REINFORCE, K = 1": "--baseline none --scale-rewards none --num-iterations 1",
    "REINFORCE, batch baseline, K = 1": "--scale-rewards none --num-iterations 1",
    DEFAULTS: "",
    "moving average": "--baseline ema",
    "PPO with critic": "--baseline critic",
    "batch-mean GRPO, G = 8": "--num-generations 8",
    "GRPO, G = 8": f"{PER_IMAGE} --scale-rewards group",
    "RLOO, G = 8": "--baseline loo --scale-rewards none --num-generations 8",
    "Dr. GRPO, G = 8": f"{PER_IMAGE} --scale-rewards none",
    "DAPO, G = 8": f"{PER_IMAGE} --scale-rewards group --clip-epsilon-high 0.28 --dynamic-sampling",
    "MaxRL, G = 8": f"{PER_IMAGE} --scale-rewards mean",
    "MaxRL, no baseline, G = 8": "--baseline none --num-generations 8 --scale-rewards mean",
    "CISPO": "--loss-type cispo --clip-epsilon-high 4",
    "DG, K = 1": "--loss-type dg --num-iterations 1",
    "DG, K = 4": "--loss-type dg",
    "TPO": "--loss-type tpo",
    "KL penalty, exact": "--beta 0.1",
    "KL penalty, k3": "--beta 0.1 --kl-estimator k3",
    "KL penalty, k3_corrected": "--beta 0.1 --kl-estimator k3_corrected",
}
TUNED = {  # by tuning.py
    "strong setting": "--num-generations 64 --scale-rewards mean --baseline none"
    " --num-minibatches 32 --learning-rate 1e-3 --num-iterations 4 --entropy-coef 0.175",
    "equal feedback": "--num-epochs 16 --batch-size 500 --learning-rate 1e-3 --num-iterations 16"
    " --loss-type tpo",
}
MANY_ANSWERS = "--num-generations 64"
SUPERVISED = {
    "labels, batch 1024": {"num_seeds": NUM_SEEDS},
    "labels, batch 64": {"batch_size": 64, "learning_rate": 2e-3, "num_seeds": NUM_SEEDS},
    "labels, tuned": {  # by tuning.py
        "batch_size": 64,
        "learning_rate": 3e-3,
        "label_smoothing": 0.05,
        "weight_decay": 0.1,
        "num_seeds": MANY_SEEDS,
    },
}


def run(name, flags, num_seeds, data_dir):
    """A row: one command, its final figures and its curves."""
    config = grpo_mnist.parse_flags(shlex.split(flags))
    with finished_run(flags, data_dir, num_seeds) as (run_dir, history):
        summary = json.loads((run_dir / "summary.json").read_text())
    steps = 60_000 // config.batch_size
    row = {
        "name": name,
        "command": command_of(flags),
        "reward_bits": config.num_epochs * steps * config.batch_size * config.num_generations,
        "training_state_bytes": summary["training_state_bytes"],
    }
    return row | curves(name, history)


def curves(name, history):
    """The figures of a run by epoch, and those of the last epoch, from its metrics.jsonl."""
    figures = {}
    for metric in ("accuracy", "test_accuracy"):
        by_epoch = [
            {
                "mean": record[metric],
                "interval_95": record["interval_95"][metric],
                "by_seed": record["by_seed"][metric],
            }
            for record in history
        ]
        figures |= {metric: by_epoch[-1], f"{metric}_by_epoch": by_epoch}
    last = figures["test_accuracy"]
    print(f"{name}: test {last['mean']:.4f} +- {last['interval_95']:.4f}", flush=True)
    return figures


def supervise(name, settings, dataset):
    """A row: what the labels themselves teach, see teach."""
    return {"name": name} | settings | curves(name, teach(settings, dataset))


def teach(settings, dataset):
    """The same network taught the labels by cross-entropy, once per batch: metrics by epoch.

    settings are fields of Config, num_seeds among them, label_smoothing, and weight_decay, as in
    AdamW. accuracy is the probability that an answer sampled from the policy would be right.
    """
    settings = dict(settings)
    smoothing, decay = settings.pop("label_smoothing", 0.0), settings.pop("weight_decay", 0.0)
    config = grpo_mnist.Config(num_iterations=1, **settings)
    num_steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
    cosine = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    learning_rate = cosine if config.lr_schedule == "cosine" else config.learning_rate
    optimizer = optax.adamw(learning_rate, weight_decay=decay)
    actor = grpo_mnist.create_state(config).networks.actor

    def loss_fn(actor, images, labels):
        policy = actor(images.astype(jnp.float32) / 255)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
        loss = optax.softmax_cross_entropy(policy.logits, targets).mean()
        loss = loss - config.entropy_coef * policy.entropy().mean()
        return loss, jnp.exp(policy.log_prob(labels)).mean()

    def step(actor, adam, images, labels):
        gradients, accuracy = jax.grad(loss_fn, has_aux=True)(actor, images, labels)
        updates, adam = optimizer.update(gradients, adam, actor)
        return optax.apply_updates(actor, updates), adam, accuracy

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_of_each_seed(*arguments):
        return jax.lax.map(lambda of_one_seed: step(*of_one_seed), arguments)

    adam = jax.vmap(optimizer.init)(actor)
    history = []
    for epoch in range(1, config.num_epochs + 1):
        accuracies = []
        for images, labels in grpo_mnist.batches(config, dataset, epoch):
            actor, adam, accuracy = step_of_each_seed(actor, adam, images, labels)
            accuracies.append(accuracy)
        answers, _ = grpo_mnist.predict(actor, dataset.test_images)
        by_seed = {
            "accuracy": np.mean(jax.device_get(accuracies), axis=0),
            "test_accuracy": np.mean(np.asarray(answers) == dataset.test_labels, axis=1),
        }
        history.append(grpo_mnist.over_seeds(by_seed))
    return history


def time_epochs(commands, dataset):
    """Seconds per epoch of one seed, by command; the commands take turns, an epoch each."""
    runners = {}
    for flags in commands:
        config = grpo_mnist.parse_flags(shlex.split(flags))
        config = dataclasses.replace(config, num_epochs=TIMED_EPOCHS + 1)
        runners[flags] = [*state_and_step(dataset, config), config]
    seconds = {flags: [] for flags in commands}
    for epoch in range(1, TIMED_EPOCHS + 2):  # the first is not counted
        for flags, runner in runners.items():
            state, step, config = runner
            stream = grpo_mnist.batches(config, dataset, epoch)
            began = time.perf_counter()
            runner[0], step_metrics = run_epoch(step, state, stream)
            jax.device_get(step_metrics)
            if epoch > 1:
                seconds[flags].append(time.perf_counter() - began)
    return seconds


def draw(results):
    """The figures, readable on a light and on a dark page: they bring their own white ground."""
    from matplotlib.figure import Figure

    rows = {row["name"]: row for row in results["rows"]}
    figure = Figure(figsize=(11, 6.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    by_epoch = [
        figures["by_seed"] for figures in rows["REINFORCE, K = 1"]["test_accuracy_by_epoch"]
    ]
    lines = left.plot(range(1, 11), 100 * np.array(by_epoch), color="C7", lw=1)
    lines[0].set_label("REINFORCE, K = 1: each of 5 seeds")
    for name in ("batch-mean GRPO", "PPO with critic", "GRPO, G = 8"):
        draw_curve(left, rows[name], "test_accuracy_by_epoch", "o-")
    left.set(title="test images: mean and 95% interval, n = 5")
    finish_curves(left)
    names = list(reversed(ALGORITHMS))
    for metric, color, marker, shift, label in (
        ("accuracy", "C0", "o", 0.2, "training images, sampled answer"),
        ("test_accuracy", "C1", "s", -0.2, "test images, likeliest answer"),
    ):
        style = {"fmt": marker, "color": color, "capsize": 3, "ms": 5}
        for position, name in enumerate(names):
            figures = rows[name][metric]
            value, width = 100 * figures["mean"], 100 * figures["interval_95"]
            if value >= 96.8:
                right.errorbar(value, position + shift, xerr=width, label=label, **style)
                label = None  # once is enough
            else:  # off the scale
                text = f"← {value:.1f} ± {width:.1f}"
                right.text(96.85, position + shift, text, color=color, va="center", size=8)
    labels = results["supervised"][-1]
    mean = 100 * labels["test_accuracy"]["mean"]
    right.axvline(mean, color="black", lw=1, ls=":", label="labels, tuned, test images")
    right.set_yticks(range(len(names)), names)
    right.set(xlim=(96.8, 99.6), ylim=(-0.6, len(names) + 1.4), xlabel="accuracy (%)")
    right.set(title="after 10 epochs: mean and 95% interval, n = 5")
    right.set_xticks(np.arange(97, 99.6, 0.5))
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper right")
    figure.savefig(RESULTS / "algorithms.png")

    figure = Figure(figsize=(6.5, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, name, line in (
        (rows["strong setting"], "strong setting", "-"),
        (rows[DEFAULTS], "defaults", "--"),
    ):
        draw_curve(axes, row, "test_accuracy_by_epoch", f"s{line}", f"{name}, test images")
        draw_curve(axes, row, "accuracy_by_epoch", f"o{line}", f"{name}, sampled answers")
    draw_curve(axes, labels, "test_accuracy_by_epoch", ":", "labels, tuned, test images")
    axes.set(ylim=(82, 100), title="mean and 95% interval; n = 5 (defaults) and 10 seeds")
    finish_curves(axes)
    figure.savefig(RESULTS / "strong.png")
    print("drawn: algorithms.png, strong.png")


def draw_curve(axes, row, name, style, label=None):
    mean = 100 * np.array([figures["mean"] for figures in row[name]])
    margin = 100 * np.array([figures["interval_95"] for figures in row[name]])
    epochs = np.arange(1, len(mean) + 1)
    axes.plot(epochs, mean, style, label=label or row["name"], lw=1.5, ms=4)
    axes.fill_between(epochs, mean - margin, mean + margin, alpha=0.2)


def finish_curves(axes):
    axes.set(xlabel="epoch", ylabel="accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def differences(row, other):
    """The test accuracy of a row minus another's, seed by seed, with mean and interval."""
    pairs = zip(row["test_accuracy"]["by_seed"], other["test_accuracy"]["by_seed"], strict=True)
    return over_seeds([one - two for one, two in pairs])


def main():
    options = parse_options(__doc__, "--go-on")
    there = json.loads(PATH.read_text()) if options.draw or options.go_on else {}
    if options.draw:
        draw(there)
        return
    dataset = grpo_mnist.load_dataset("mnist", options.data_dir)
    same = there.get("versions") == library_versions()
    kept = {row["name"]: row for row in there.get("rows", ()) if same}
    rows = {}

    def add(name, flags, num_seeds):
        row = kept.get(name, {})
        if row.get("command") != command_of(flags):
            row = run(name, flags, num_seeds, options.data_dir)
        rows[name] = row
        write_results("comparison", {"rows": list(rows.values())})  # an hour's work is not lost

    for name, flags in ALGORITHMS.items():
        add(name, flags, NUM_SEEDS)
    for name, flags in TUNED.items():
        add(name, flags, MANY_SEEDS)
    supervised = [supervise(*item, dataset) for item in SUPERVISED.items()]
    seconds = time_epochs([*ALGORITHMS.values(), MANY_ANSWERS, *TUNED.values()], dataset)
    ratios = [many / one for many, one in zip(seconds[MANY_ANSWERS], seconds[""], strict=True)]
    for name in ALGORITHMS:
        rows[name]["difference"] = differences(rows[name], rows[DEFAULTS])
    for name, flags in (ALGORITHMS | TUNED).items():
        rows[name]["epoch_seconds"] = spread(seconds[flags])
    results = {
        "epoch_seconds_64_answers": spread(seconds[MANY_ANSWERS]),
        "ratio_64_answers_to_1": spread(ratios),
        "supervised": supervised,
        "strong_minus_labels": differences(rows["strong setting"], supervised[-1]),
        "rows": list(rows.values()),
    }
    write_results("comparison", results)
    draw(results)


if __name__ == "__main__":
    main()
