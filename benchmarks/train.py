"""Trains what commands.toml says, and writes down what each seed has reached.

    python benchmarks/train.py STUDY... --data-dir DIR [--anew]

The studies are accuracy, breaking, comparison, tuning and published. DIR is as for grpo_mnist.py;
every row trains on MNIST, unless its flags name other data. Writes results/STUDY.json, and for
accuracy the picture curves.png of the first run. It is written after each row, and an interrupted
study is continued: rows that are there for the same command, program, versions and machine are kept
unless they are to be made --anew.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, ROOT, grpo_mnist

MANY_ANSWERS = "python grpo_mnist.py --num-generations 64"
TIMED_EPOCHS = 7
FIRST_SEEDS, ALL_SEEDS, FINALISTS = 2, 6, 3
HELD_OUT = 10_000
MANY, LEAST = "10 epochs", 0.9734  # of the sampled answers right in epoch 5
PUBLISHED = {"width": 50, "updates": 10_000, "reward_bits": 1_000_000}
UPDATES_AT_ONCE = 200  # in one call of the compiled function


@functools.cache
def mnist(data_dir):
    return grpo_mnist.load_dataset("mnist", data_dir)


@contextlib.contextmanager
def finished_run(flags, data_dir):
    """A run of the program as a reader starts it: directory, metrics by epoch, output, seconds."""
    with tempfile.TemporaryDirectory() as directory:
        program = [sys.executable, str(ROOT / "grpo_mnist.py"), f"--data-dir={data_dir}"]
        program += ["--dataset=mnist"] * ("--dataset" not in flags) + shlex.split(flags)
        pipe, began = subprocess.PIPE, time.perf_counter()
        done = subprocess.run(program, check=True, stdout=pipe, text=True, cwd=directory)
        seconds = time.perf_counter() - began  # imports and compilation included
        (run_dir,) = Path(directory, "runs").iterdir()
        history = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        yield run_dir, history, done.stdout.splitlines(), seconds


def figures_of(asked, history):
    """What a row keeps of its metrics by epoch: of the last one, and what else it asks for."""
    epochs = [record["by_seed"] for record in history]
    figures = {metric: epochs[-1][metric] for metric in ("accuracy", "test_accuracy")}
    if "curves" in asked:
        figures["curves"] = {name: [epoch[name] for epoch in epochs] for name in asked["curves"]}
    if asked.get("first_and_last"):
        figures["first_and_last"] = {x: [epochs[0][x], epochs[-1][x]] for x in epochs[0]}
    return figures


def train_each_seed(asked, data_dir):
    """accuracy: what the settings in the README reach, each seed in a process of its own."""
    histories, facts = [], {"epoch_seconds": [], "seconds": [], "params_sha256": []}
    for seed in range(asked["seeds"]):
        flags = f"{asked['flags']} --seed={seed}"
        with finished_run(flags, data_dir) as (run_dir, history, output, seconds):
            summary = json.loads((run_dir / "summary.json").read_text())
            if asked["name"] == "defaults" and seed == 0:
                shutil.copy(run_dir / "curves.png", RESULTS)
        histories.append(history)
        facts["epoch_seconds"].append(float(np.median([each["seconds"] for each in history])))
        facts["seconds"].append(seconds)
        facts["params_sha256"].append(summary["params_sha256"])
        facts.setdefault("output", output[-5:])  # of the first run, as the README shows it
    history = [
        {"by_seed": {name: [each[name] for each in epoch] for name in asked["curves"]}}
        for epoch in zip(*histories, strict=True)
    ]
    return figures_of(asked, history) | facts


def break_on_purpose(asked, data_dir):
    """breaking: what single flags do to a run, and how often its actors answer each digit."""
    flags = f"{asked['flags']} --num-seeds={asked['seeds']}"
    with finished_run(flags, data_dir) as (run_dir, history, _, _):
        actors = [grpo_mnist.load_actor(run_dir, seed) for seed in range(asked["seeds"])]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *actors)
    dataset = mnist(data_dir)
    answers = np.asarray(grpo_mnist.predict(stacked, dataset.test_images)[0])
    figures = figures_of(asked, history)
    figures["worst_seed"] = worst = int(np.argmin(figures["test_accuracy"]))
    figures["test_answers_by_digit"] = [np.bincount(x, minlength=10).tolist() for x in answers]
    if asked.get("worst_confusion"):
        confusion = np.zeros((10, 10), int)  # what the image shows, what the worst seed says
        np.add.at(confusion, (dataset.test_labels, answers[worst]), 1)
        figures["worst_confusion"] = confusion.tolist()
    return figures


def compare_algorithms(asked, data_dir):
    """comparison: the algorithms side by side, and the settings that tuning has chosen.

    The algorithms have the program's defaults, but for what their names say: no setting was tuned
    for any of them.
    """
    flags = f"{asked['flags']} --num-seeds={asked['seeds']}"
    with finished_run(flags, data_dir) as (run_dir, history, _, _):
        summary = json.loads((run_dir / "summary.json").read_text())
    config = grpo_mnist.parse_flags(shlex.split(flags))
    images = len(mnist(data_dir).train_images) // config.batch_size * config.batch_size
    return figures_of(asked, history) | {
        "reward_bits": config.num_epochs * images * config.num_generations,
        "training_state_bytes": summary["training_state_bytes"],
    }


def teach(settings, dataset):
    """The same network taught the labels by cross-entropy, once per batch: metrics by epoch.

    settings are fields of Config, label_smoothing, and weight_decay, as in AdamW. accuracy is the
    probability that an answer sampled from the policy would be right.
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


def repeat_study(asked, data_dir):
    """published: a study of this very task, run again with the trainer's own training step.

    The study is section 3.3 of "Target Policy Optimization" (Kaddour 2026, arXiv 2604.06159), its
    settings are those of its program (github.com/JeanKaddour/tpo): hidden layers of 50, Adam at a
    constant 1e-3, batches of 100 images drawn with replacement, one guess per image, one update per
    batch, 10,000 updates, 20 seeds. That is 1,000,000 guesses called right or wrong. What it calls
    GRPO standardises the rewards of the batch; its other methods subtract the probability that two
    guesses agree, the sum of pi(a)^2. All seeds of a method train in one program.
    """
    dataset, seeds = mnist(data_dir), np.arange(asked["seeds"])
    config = grpo_mnist.parse_flags([*shlex.split(asked["flags"]), f"--num-seeds={len(seeds)}"])
    optimizer = grpo_mnist.create_optimizer(config, PUBLISHED["updates"])
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)

    def step(state, key):
        chosen = jax.random.randint(key, (config.batch_size,), 0, len(images))
        policy = state.networks.actor(images[chosen] / 255.0)
        agreement = (policy.probs_parameter() ** 2).sum(axis=1, keepdims=True)  # (B, 1)
        state = state._replace(moving_average=agreement)  # what --baseline ema subtracts
        batch = images[chosen], labels[chosen]
        state, _ = grpo_mnist.train_step(state, *batch, optimizer=optimizer, config=config)
        return state._replace(moving_average=jnp.zeros(())), None

    @jax.jit
    @jax.vmap
    def steps(state, seed, number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), UPDATES_AT_ONCE)
        return jax.lax.scan(step, state, keys)[0]

    default = grpo_mnist.Network.__init__
    common.widen(PUBLISHED["width"])
    state = grpo_mnist.create_state(config)
    grpo_mnist.Network.__init__ = default
    for number in range(1, PUBLISHED["updates"] // UPDATES_AT_ONCE + 1):
        state = steps(state, seeds, np.full_like(seeds, number))
    answers, _ = grpo_mnist.predict(state.networks.actor, dataset.test_images)
    right = np.asarray(answers) == dataset.test_labels
    published = asked.get("published_test_error")
    return {"published_test_error": published, "test_accuracy": right.mean(axis=1).tolist()}


STUDIES = {
    "accuracy": train_each_seed,
    "grown": break_on_purpose,
    "breaking": break_on_purpose,
    "comparison": compare_algorithms,
    "published": repeat_study,
}


def train_rows(study, table, data_dir, anew):
    """Trains the rows of a study that are not there yet; those of comparison are also timed."""
    results = common.results_to_continue(study, anew)
    rows = [find_or_describe(study, asked, results.get("rows", [])) for asked in table]
    results |= PUBLISHED if study == "published" else {}
    for asked, row in zip(table, rows, strict=True):
        if "test_accuracy" in row:
            continue
        if "settings" in asked:
            settings = asked["settings"] | {"num_seeds": asked["seeds"]}
            row |= figures_of(asked, teach(settings, mnist(data_dir)))
        else:
            row |= STUDIES[study](asked, data_dir)
        test = grpo_mnist.over_seeds({"accuracy": row["test_accuracy"]})
        print(f"{study}, {row['name']}: test {grpo_mnist.percent(test, 'accuracy')}", flush=True)
        results["rows"] = [each for each in rows if "test_accuracy" in each]
        common.write_results(study, results)
    timed = [row for row in rows if study == "comparison" and "command" in row]
    if any("epoch_seconds" not in row for row in timed):
        seconds = time_epochs([MANY_ANSWERS, *(row["command"] for row in timed)], mnist(data_dir))
        for row in timed:
            row["epoch_seconds"] = seconds[row["command"]]
        results["epoch_seconds_64_answers"] = seconds[MANY_ANSWERS]
        common.write_results(study, results)


def find_or_describe(study, asked, there):
    """The row with its figures, if it is there; otherwise only what it trains."""
    if "settings" in asked:
        how = {"settings": asked["settings"]}
    elif study == "published":  # It takes more than a command.
        how = {"flags": asked["flags"]}
    else:
        how = {"command": f"python grpo_mnist.py {asked['flags']}".strip()}
    row = {"name": asked["name"]} | how | {"seeds": list(range(asked["seeds"]))}
    return next((old for old in there if row.items() <= old.items()), row)


def time_epochs(commands, dataset):
    """Seconds per epoch of one seed, by command; the commands take turns, an epoch each."""
    runners = {}
    for command in commands:
        config = grpo_mnist.parse_flags(shlex.split(command)[2:])
        config = dataclasses.replace(config, num_epochs=TIMED_EPOCHS + 1)
        runners[command] = common.prepare_ours(dataset, config)
    seconds = {command: [] for command in commands}
    for epoch in range(1, TIMED_EPOCHS + 2):
        for command, run_one in runners.items():
            began = time.perf_counter()
            run_one(epoch)
            seconds[command].append(time.perf_counter() - began)
    return {command: taken[1:] for command, taken in seconds.items()}  # without the first one


def tune(candidates, data_dir, anew):
    """tuning: how the strong settings were chosen, on training images held out.

    Trains on the first 50,000 training images and tests on the last 10,000, never on the test
    images: two seeds of each candidate, then six of the best FINALISTS of each kind, of which one
    is taken. Each core trains one seed at a time. As many candidates that learn from the labels are
    tried as with 10 epochs of right and wrong.
    """
    there = common.results_to_continue("tuning", anew)
    results = {}
    for kind, of_a_kind in candidates.items():
        kept = {str(row["candidate"]): row for row in there.get(kind, ())}
        fresh = ({"candidate": candidate, "held_out": []} for candidate in of_a_kind)
        results[kind] = [kept.get(str(row["candidate"]), row) for row in fresh]
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with context.Pool(cores.qsize(), stay_on_a_core, (cores,)) as pool:
        for num_seeds in (FIRST_SEEDS, ALL_SEEDS):
            tasks = [
                (kind, row, seed, data_dir)
                for kind, rows in results.items()
                for row in (rows if num_seeds == FIRST_SEEDS else best(kind, rows)[:FINALISTS])
                for seed in range(len(row["held_out"]), num_seeds)
            ]
            for (kind, row, *_), history in zip(tasks, pool.imap(try_out, tasks), strict=True):
                row["held_out"].append(history[-1]["test_accuracy"])
                if kind == MANY:
                    row.setdefault("accuracy_epoch_5", []).append(history[4]["accuracy"])
                print(f"{row['candidate']}: {row['held_out']}", flush=True)
                common.write_results("tuning", {"held_out_images": HELD_OUT} | results)
    for kind, rows in results.items():
        print(f"taken for {kind}: {taken(kind, rows)['candidate']}")


def stay_on_a_core(cores):
    """Gives this process a core of its own; JAX has not looked at the machine yet."""
    os.sched_setaffinity(0, {cores.get()})


def try_out(task):
    """One seed of a candidate: its metrics by epoch, with the held-out images as test images."""
    kind, row, seed, data_dir = task
    name, images, labels, *_ = mnist(data_dir)
    train, test = (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])
    dataset = grpo_mnist.Dataset(name, *train, *test)
    if kind == "labels":
        return teach(row["candidate"] | {"seed": seed}, dataset)
    config = grpo_mnist.parse_flags([*shlex.split(row["candidate"]), f"--seed={seed}"])
    return common.train_in_memory(dataset, config)


def best(kind, rows):
    """The rows that may be taken, the best on the held-out images first."""
    sure = [row for row in rows if kind != MANY or np.mean(row["accuracy_epoch_5"]) >= LEAST]
    return sorted(sure, key=lambda row: np.mean(row["held_out"]), reverse=True)


def taken(kind, rows):
    """The candidate with the best mean of all seeds on the held-out images.

    With many answers, only if the sampled answers of epoch 5 are right in 97.34% of cases.
    """
    return best(kind, [row for row in rows if len(row["held_out"]) == ALL_SEEDS])[0]


def main():
    table = tomllib.loads((ROOT / "benchmarks" / "commands.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=table, metavar="STUDY")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--anew", action="store_true", help="keep nothing of what is there")
    options = parser.parse_args()
    for study in options.studies:
        facts = table[study], options.data_dir.resolve(), options.anew
        tune(*facts) if study == "tuning" else train_rows(study, *facts)


if __name__ == "__main__":
    main()
