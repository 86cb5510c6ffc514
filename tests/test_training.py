"""Whole runs: that they learn what there is to learn, count right, and repeat themselves."""

import hashlib
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial

import jax
import numpy as np
import pytest
from common import train_in_memory
from conftest import ROOT, read_history, read_json, start_program
from faults import metrics_without_times
from scipy.stats import t

import grpo_mnist
from grpo_mnist import Config, UsageError, load_actor, main, parse_flags, predict, train

PROMISED = {  # the bounds of both accuracies; above the upper ones, labels would leak
    "mnist": {"accuracy": (0.97, 0.99), "test_accuracy": (0.965, 0.985)},
    "digits": {"accuracy": (0.99, 0.999), "test_accuracy": (0.92, 0.97)},
}


def test_the_documented_command_reaches_what_it_promises(dataset, request, monkeypatch, capfd):
    """The accuracy gate: without flags, on MNIST where its files are, else on the digits."""
    ready, end_epoch = [], grpo_mnist.end_epoch

    def watch(*arguments):
        ready.append([metrics["loss"].is_ready() for metrics in arguments[-1]])
        return end_epoch(*arguments)

    monkeypatch.setattr(grpo_mnist, "end_epoch", watch)
    if dataset.name == "mnist":
        monkeypatch.setenv("TFDS_DATA_DIR", str(request.getfixturevalue("mnist_dir")))
    history = train(parse_flags(["--output-dir=run"]))
    output, errors = capfd.readouterr()
    assert errors == ""
    assert f"Starting GRPO on {dataset.name} training...\n" in output
    assert read_history("run") == history
    summary = read_json("run/summary.json")
    for name, (low, high) in PROMISED[dataset.name].items():
        assert low < summary[name] < high
    assert summary["training_state_bytes"] == 4 * 4 * 118_282
    assert [len(steps) for steps in ready] == [len(dataset.train_labels) // 1024] * 10
    # The loop is ahead of the device, but by no more steps than fit into the memory.
    assert 1 <= max(steps.count(False) for steps in ready) <= 3
    for metrics in history:
        assert metrics["kl"] is None
        assert 0 < metrics["clip_ratio_low"] < 0.2
        assert metrics["ratio_max"] > 1
    assert history[0]["learning_rate"] > 0.0029
    assert history[-1]["learning_rate"] < 0.0001
    facts = {"versions", "device", "cores", "xla_flags", "program_sha256"}
    assert set(Config.__dataclass_fields__) | facts == set(read_json("run/config.json"))


def test_shuffled_labels_teach_nothing(dataset):
    """With rewards that have nothing to do with the images, the accuracy stays at chance."""
    labels = np.random.default_rng(0).permutation(dataset.train_labels)
    nonsense = dataset._replace(train_labels=labels)
    (metrics,) = train_in_memory(nonsense, Config(num_epochs=1, lr_schedule="constant"))
    assert 0.08 < metrics["accuracy"] < 0.125
    assert metrics["test_accuracy"] < 0.25  # an answer to all, right by luck at most so often


# --- The same run, here and elsewhere ---

FLAGS = (
    *("--dataset=digits", "--num-epochs=3", "--batch-size=18000", "--num-generations=2"),
    *("--num-iterations=1", "--baseline=ema", "--beta=0.01", "--ref-sync-epochs=2"),
    # The learning rate keeps rounding small on a GPU.
    *("--entropy-coef=0.001", "--learning-rate=1e-4", "--lr-schedule=constant"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with runs of this process, of seed 7, of 9, and of 7, 8 and 9 together.

    Another process with seed 7 runs meanwhile; it finds the step in the tests' compilation cache.
    """
    directory = tmp_path_factory.mktemp("runs")

    def run(name, *flags):
        with (directory / f"{name}.txt").open("w") as output, redirect_stdout(output):
            assert main([*FLAGS, *flags, f"--output-dir={directory / name}"]) == 0

    run("7", "--seed=7")
    with start_program(*FLAGS, "--seed=7", f"--output-dir={directory / 'other'}") as process:
        run("9", "--seed=9")
        run("together", "--seed=7", "--num-seeds=3")
        assert process.communicate(timeout=120)[1] == ""
    return directory


def test_the_same_seed_gives_the_same_parameters(runs):
    """In this process and in another, to the last bit; also with a step from the cache."""
    one, other = (read_json(runs / name / "summary.json") for name in ("7", "other"))
    assert one["params_sha256"] == other["params_sha256"]
    assert metrics_without_times(runs / "7") == metrics_without_times(runs / "other")


def test_the_files_of_a_run_hold_what_it_came_to(runs, digits):
    run = runs / "7"
    history, summary = read_history(run), read_json(run / "summary.json")
    assert [metrics["learning_rate"] for metrics in history] == [pytest.approx(1e-4)] * 3
    assert all(0 < metrics["kl"] < 3 for metrics in history)
    # Float32: weights, gradients and Adam's two moments, and the reference's weights.
    assert summary["training_state_bytes"] == 4 * (4 * 118_282 + 118_282)
    actor = load_actor(run)
    content = b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(actor))
    assert summary["params_sha256"] == hashlib.sha256(content).hexdigest()
    probabilities = np.asarray(actor(digits.test_images / np.float32(255)).probs_parameter())
    several = jax.tree.map(lambda x: x[None], actor)
    answers, confidences = (x[0] for x in predict(several, digits.test_images))
    np.testing.assert_array_equal(answers, probabilities.argmax(axis=1))
    np.testing.assert_allclose(confidences, probabilities.max(axis=1), rtol=1e-5)
    assert summary["test_accuracy"] == pytest.approx(np.mean(answers == digits.test_labels))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    # The reference became the actor of epoch 2, and stayed that.
    second, third = (np.load(run / "checkpoints" / f"epoch-{epoch}.npz") for epoch in (2, 3))
    for name in (name for name in third if name.startswith("reference.")):
        trained = name.replace("reference.", "networks.actor.")
        np.testing.assert_array_equal(second[name], second[trained])
        np.testing.assert_array_equal(third[name], second[trained])
        assert np.any(third[name] != third[trained])


def test_several_seeds_are_the_same_runs_as_each_alone(runs, digits):
    """In one compiled program and in runs of their own; on CPUs, the same parameters."""
    run, output = runs / "together", (runs / "together.txt").read_text()
    history, summary = read_history(run), read_json(run / "summary.json")
    by_seed = summary["by_seed"]
    assert "1 steps of 18000 images; 17925 images left over" in output
    assert f"params_sha256: {summary['params_sha256']}\n" in output
    for seed in (7, 9):
        alone = read_json(runs / str(seed) / "summary.json")
        assert {"interval_95", "by_seed"}.isdisjoint(alone)
        # What training keeps is counted for one seed, and is the same however many there are.
        assert summary["training_state_bytes"] == alone["training_state_bytes"]
        if jax.default_backend() == "cpu":
            assert by_seed["params_sha256"][seed - 7] == alone["params_sha256"]
        for one, all_three in zip(read_history(runs / str(seed)), history, strict=True):
            for name, values in all_three["by_seed"].items():
                assert values[seed - 7] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    for epoch, line in zip(history, re.findall(r"Epoch \d.*", output), strict=True):
        values = np.array(epoch["by_seed"]["accuracy"])
        margin = t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
        assert epoch["accuracy"] == pytest.approx(values.mean())
        assert epoch["interval_95"]["accuracy"] == pytest.approx(margin)
        assert f"Accuracy: {100 * values.mean():.2f}% +- {100 * margin:.2f}%," in line
    assert by_seed["accuracy"] == values.tolist()
    assert summary["interval_95"] == history[-1]["interval_95"]
    # The actor of each seed can be loaded; the first one's, if none is named.
    for seed, accuracy in zip((None, 8, 9), by_seed["test_accuracy"], strict=True):
        answers = load_actor(run, seed)(digits.test_images / np.float32(255)).mode()
        assert np.mean(answers == digits.test_labels) == pytest.approx(accuracy)


def test_an_actor_is_not_loaded_from_where_there_is_none(runs, tmp_path):
    for seed in (6, 10):
        with pytest.raises(UsageError, match=f"together has the seeds 7 to 9, not {seed}"):
            load_actor(runs / "together", seed)
    for config, reason in (
        ('{"seed": 3}', "is not the directory of a run"),  # but of some other program
        ('{"program_sha256": "..."}', "holds no checkpoint"),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UsageError, match=f"{tmp_path} {reason}"):
            load_actor(tmp_path)


def test_the_metrics_of_an_epoch_and_numbers_that_are_none(digits):
    """Means over the steps, but the largest ratio; infinity is named with epoch and seed."""
    config = parse_flags([*FLAGS, "--seed=5", "--num-seeds=3"])
    state = grpo_mnist.create_state(config)
    steps = [dict.fromkeys(("accuracy", "loss", "ratio_max"), np.full(3, x)) for x in (0.5, 1.0)]
    end_epoch = partial(grpo_mnist.end_epoch, config, digits, state, 2, time.perf_counter())
    metrics = end_epoch(steps)
    assert (metrics["epoch"], metrics["accuracy"], metrics["ratio_max"]) == (2, 0.75, 1.0)
    assert metrics["images_per_second"] * metrics["seconds"] == pytest.approx(2 * 3 * 18000)
    absent = {name for name, value in metrics.items() if value is None}
    assert absent == {"kl", "clip_ratio_low", "clip_ratio_high"}
    steps[1] = steps[1] | {"loss": np.array([1, np.nan, 1])}
    with pytest.raises(grpo_mnist.RunError, match="epoch 2, seed 6: not finite: loss;"):
        end_epoch(steps)
    bias = state.networks.actor.output.bias
    bias[...] = bias[...].at[2, 3].set(np.inf)
    with pytest.raises(grpo_mnist.RunError, match="epoch 2, seed 7: not finite: actor"):
        end_epoch(steps[:1])


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_the_code_is_clean(command):
    """The linter and the formatter that requirements.txt pins have nothing to say."""
    ruff = [sys.executable, "-m", "ruff", *command.split(), str(ROOT)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
