"""Trains what commands.toml says, and writes down what each seed has reached.

    python benchmarks/train.py STUDY --data-dir DIR [--anew]

The studies are accuracy, grown, breaking, comparison, tuning and published. DIR is as for
grpo_mnist.py; every row trains on MNIST, unless its command names other data. Writes
results/STUDY.json, and for accuracy the picture curves.png of the first run. It is written after
each row, and an interrupted study is continued: rows that are there for the same command, program,
versions and machine are kept unless they are to be made --anew.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
import tomllib
from functools import partial
from pathlib import Path
from typing import Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import RESULTS, ROOT, grpo_mnist
from sklearn.metrics import confusion_matrix
from tyro.conf import Positional

Study = Literal["accuracy", "grown", "breaking", "comparison", "published", "tuning"]
TIMED_EPOCHS = 7
FIRST_SEEDS, ALL_SEEDS, FINALISTS = 2, 6, 3
HELD_OUT = 10_000
MANY, LEAST = "10 epochs", 0.9734  # of the sampled answers right in epoch 5
PUBLISHED_WIDTH, PUBLISHED_UPDATES = 50, 10_000


def flags_of(asked, data_dir):
    return ["--dataset=mnist", f"--data-dir={data_dir}", *shlex.split(asked["command"])[2:]]


def figures_of(asked, epochs):
    """What a row keeps of its metrics by epoch: of the last one, and what else it asks for."""
    figures = {metric: epochs[-1][metric] for metric in ("accuracy", "test_accuracy")}
    if "curves" in asked:
        figures["curves"] = {name: [epoch[name] for epoch in epochs] for name in asked["curves"]}
    if "first_and_last" in asked:
        figures["first_and_last"] = {x: [epochs[0][x], epochs[-1][x]] for x in epochs[0]}
    return figures


def train_each_seed(asked, data_dir):
    """accuracy: the program as a reader starts it, each seed in a process of its own."""
    command = [sys.executable, ROOT / "grpo_mnist.py", *flags_of(asked, data_dir)]
    histories, seconds, outputs = [], [], []
    for seed in range(asked["seeds"]):
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            output = subprocess.check_output([*command, f"--seed={seed}"], cwd=directory, text=True)
            seconds.append(time.perf_counter() - began)  # imports and compilation included
            (run_dir,) = Path(directory, "runs").iterdir()
            histories.append([json.loads(line) for line in (run_dir / "metrics.jsonl").open()])
            if asked["name"] == "defaults" and seed == 0:
                shutil.copy(run_dir / "curves.png", RESULTS)
        outputs.append(output.splitlines()[-5:])
    epochs = [
        {name: [each[name] for each in epoch] for name in asked["curves"]}
        for epoch in zip(*histories, strict=True)
    ]
    return figures_of(asked, epochs) | {"seconds": seconds, "output": outputs[0]}


def train_all_seeds(study, asked, dataset, data_dir):
    """breaking, comparison: a run with all seeds; how often its actors give each answer."""
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [f"--num-seeds={asked['seeds']}", f"--output-dir={run_dir}"]
        config = grpo_mnist.parse_flags([*flags_of(asked, data_dir), *flags])
        epochs = [record["by_seed"] for record in grpo_mnist.train(config)]
        actors = [grpo_mnist.load_actor(run_dir, seed) for seed in config.seeds]
        summary = json.loads(Path(run_dir, "summary.json").read_text())
    figures = figures_of(asked, epochs)
    if study == "comparison":
        steps = config.num_epochs * (len(dataset.train_images) // config.batch_size)
        figures["reward_bits"] = steps * config.batch_size * config.num_generations
        return figures | {"training_state_bytes": summary["training_state_bytes"]}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *actors)
    confusions = [  # what the image shows, what the seed says
        confusion_matrix(dataset.test_labels, answers, labels=range(10))
        for answers in grpo_mnist.predict(stacked, dataset.test_images)[0]
    ]
    figures["worst_seed"] = worst = int(np.argmin(figures["test_accuracy"]))
    figures["test_answers_by_digit"] = [each.sum(axis=0).tolist() for each in confusions]
    if "worst_confusion" in asked:
        figures["worst_confusion"] = confusions[worst].tolist()
    return figures


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

    def step(of_one_seed):
        actor, adam, images, labels = of_one_seed
        gradients, accuracy = jax.grad(loss_fn, has_aux=True)(actor, images, labels)
        updates, adam = optimizer.update(gradients, adam, actor)
        return optax.apply_updates(actor, updates), adam, accuracy

    step_of_each_seed = jax.jit(partial(jax.lax.map, step))
    adam = jax.vmap(optimizer.init)(actor)
    epochs = []
    for epoch in range(1, config.num_epochs + 1):
        accuracies = []
        for batch in grpo_mnist.batches(config, dataset, epoch):
            actor, adam, accuracy = step_of_each_seed((actor, adam, *batch))
            accuracies.append(accuracy)
        accuracy = np.mean(jax.device_get(accuracies), axis=0).tolist()
        epochs.append({"accuracy": accuracy, "test_accuracy": test_accuracy(actor, dataset)})
    return epochs


def test_accuracy(actor, dataset):
    """That of each seed of an actor, as the trainer computes it."""
    answers, _ = grpo_mnist.predict(actor, dataset.test_images)
    return (np.asarray(answers) == dataset.test_labels).mean(axis=1).tolist()


def repeat_study(asked, dataset):
    """published: a study of this very task, run again with the trainer's own training step.

    The settings are those of its program (github.com/JeanKaddour/tpo). What it calls GRPO
    standardises the rewards of the batch; its other methods subtract the probability that two
    guesses agree, the sum of pi(a)^2. All seeds of a method train in one program.
    """
    seeds = np.arange(asked["seeds"])
    config = grpo_mnist.parse_flags([*shlex.split(asked["flags"]), f"--num-seeds={len(seeds)}"])
    optimizer = grpo_mnist.create_optimizer(config, PUBLISHED_UPDATES)
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
    def train(state, seed):
        numbers = jnp.arange(1, PUBLISHED_UPDATES // 200 + 1)  # 200 updates each, as in the result
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
        keys = jax.vmap(partial(jax.random.split, num=200))(keys)
        return jax.lax.scan(step, state, keys.reshape(-1))[0]

    common.widen(PUBLISHED_WIDTH)
    state = train(grpo_mnist.create_state(config), seeds)
    return {
        "published_test_error": asked.get("published_test_error"),
        "reward_bits": PUBLISHED_UPDATES * config.batch_size,
        "test_accuracy": test_accuracy(state.networks.actor, dataset),
    }


def train_rows(study, table, dataset, data_dir, anew):
    """Trains the rows of a study that are not there yet; those of comparison are also timed."""
    results, rows = common.results_to_continue(study, anew), []
    for asked in table:
        row = {x: asked[x] for x in ("name", "command", "flags", "settings") if x in asked}
        row["seeds"] = list(range(asked["seeds"]))
        rows.append(next((x for x in results.get("rows", ()) if row.items() <= x.items()), row))
    for asked, row in zip(table, rows, strict=True):
        if "test_accuracy" in row:
            continue
        if "settings" in asked:
            settings = asked["settings"] | {"num_seeds": asked["seeds"]}
            row |= figures_of(asked, teach(settings, dataset))
        elif study == "accuracy":
            row |= train_each_seed(asked, data_dir)
        elif study == "published":
            row |= repeat_study(asked, dataset)
        else:
            row |= train_all_seeds(study, asked, dataset, data_dir)
        print(f"{study}, {row['name']}: test {np.mean(row['test_accuracy']):.2%}", flush=True)
        results["rows"] = [each for each in rows if "test_accuracy" in each]
        common.write_results(study, results)
    timed = [row for row in rows if study == "comparison" and "command" in row]
    if any("epoch_seconds" not in row for row in timed):
        turns = {}
        for row in timed:  # one seed of each
            config = grpo_mnist.parse_flags(shlex.split(row["command"])[2:])
            epochs = common.main_loop(dataset, config)
            turns[row["name"]] = partial(timeit.timeit, partial(next, epochs), number=1)
        seconds = common.take_turns(turns, TIMED_EPOCHS)
        for row in timed:
            row["epoch_seconds"] = seconds[row["name"]]
        common.write_results(study, results)


def tune(candidates, dataset, anew):
    """tuning: how the strong settings were chosen, on training images held out.

    Trains on the first 50,000 training images and tests on the last 10,000, never on the test
    images: two seeds of each candidate, then six of the best FINALISTS of each kind, of which one
    is taken.
    """
    there, results = common.results_to_continue("tuning", anew), {}
    for kind, of_a_kind in candidates.items():
        kept = {str(row["candidate"]): row for row in there.get(kind, ())}
        results[kind] = [kept.get(str(x), {"candidate": x, "held_out": []}) for x in of_a_kind]
    held_out = [array[-HELD_OUT:] for array in dataset[1:3]]
    dataset = grpo_mnist.Dataset("mnist", *(array[:-HELD_OUT] for array in dataset[1:3]), *held_out)
    for num_seeds, finalists in ((FIRST_SEEDS, None), (ALL_SEEDS, FINALISTS)):
        for kind, rows in results.items():
            for row in best(kind, rows)[:finalists] if finalists else rows:
                if len(row["held_out"]) < num_seeds:
                    row |= try_out(row["candidate"], num_seeds, dataset)
                    print(row, flush=True)
                    common.write_results("tuning", results)


def try_out(candidate, num_seeds, dataset):
    """A candidate's accuracy of each seed on the held-out images, which are its test images."""
    if isinstance(candidate, dict):
        epochs = teach(candidate | {"num_seeds": num_seeds}, dataset)
    else:
        config = grpo_mnist.parse_flags([*shlex.split(candidate), f"--num-seeds={num_seeds}"])
        epochs = [record["by_seed"] for record in common.train_in_memory(dataset, config)]
    return {"held_out": epochs[-1]["test_accuracy"], "accuracy_epoch_5": epochs[4]["accuracy"]}


def best(kind, rows):
    """The rows that may be taken, the best on the held-out images first.

    With many answers, only if the sampled answers of epoch 5 are right in 97.34% of cases.
    """
    sure = [row for row in rows if kind != MANY or np.mean(row["accuracy_epoch_5"]) >= LEAST]
    return sorted(sure, key=lambda row: np.mean(row["held_out"]), reverse=True)


def taken(kind, rows):
    """The candidate with the best mean of all seeds on the held-out images."""
    return best(kind, [row for row in rows if len(row["held_out"]) == ALL_SEEDS])[0]


def main(study: Positional[Study], data_dir: Path, anew: bool = False):
    table = tomllib.loads((ROOT / "benchmarks" / "commands.toml").read_text(encoding="utf-8"))
    dataset = grpo_mnist.load_dataset("mnist", data_dir)
    if study == "tuning":
        tune(table[study], dataset, anew)
    else:
        train_rows(study, table[study], dataset, data_dir.resolve(), anew)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
