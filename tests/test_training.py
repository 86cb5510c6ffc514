"""Whole runs: that they learn what there is to learn, count right, and repeat themselves."""

import hashlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import (
    ROOT,
    read_history,
    read_json,
    run_program,
    start_program,
    train_in_memory,
)
from flax import nnx

import grpo_mnist
from grpo_mnist import Config


def test_shuffled_labels_teach_nothing(dataset):
    """With rewards that have nothing to do with the images, the accuracy stays at chance."""
    labels = np.random.default_rng(0).permutation(dataset.train_labels)
    nonsense = dataset._replace(train_labels=labels)
    history = train_in_memory(nonsense, Config(num_epochs=2))
    for metrics in history:
        assert 0.08 < metrics["accuracy"] < 0.125
        assert metrics["test_accuracy"] < 0.25  # an answer to all, right by luck at most so often


def test_the_documented_command_reaches_what_it_promises(mnist_dir, tmp_path):
    """The accuracy gate: real MNIST, defaults. A perfect score would be a leak, and fails too."""
    status, output, errors = run_program(f"--data-dir={mnist_dir}", "--output-dir=run")
    assert (status, errors) == (0, "")
    assert output.startswith("Starting GRPO on mnist training...\n")
    summary = read_json("run/summary.json")
    assert 0.97 < summary["accuracy"] < 0.99
    assert 0.965 < summary["test_accuracy"] < 0.985
    assert summary["training_state_bytes"]["weights"] == 4 * 118_282
    history = read_history("run")
    assert len(history) == 10
    for metrics in history:
        # Counted over all 10,000 test images and all 58 x 1,024 sampled answers.
        assert (metrics["test_accuracy"] * 10_000) == pytest.approx(
            round(metrics["test_accuracy"] * 10_000), abs=1e-9
        )
        assert metrics["accuracy"] * 59_392 == pytest.approx(
            round(metrics["accuracy"] * 59_392), abs=0.02
        )
        assert metrics["kl"] is None
        assert 0 < metrics["clip_ratio_low"] < 0.2
        assert metrics["ratio_max"] > 1
    assert history[0]["learning_rate"] > 0.0029
    assert history[-1]["learning_rate"] < 0.0001

    config = read_json("run/config.json")
    assert set(Config.__dataclass_fields__) | {"versions", "device", "trained_on"} == set(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_returns_and_writes_the_same_and_hashes_its_last_parameters(
    digits, tmp_path, monkeypatch, capsys
):
    """A whole run with every term in the loss; its files against what train() knows."""
    states = []
    epoch = grpo_mnist.train_epoch

    def keep_state(*arguments):
        state, metrics = epoch(*arguments)
        states.append(jax.tree.map(np.array, state.actor))
        return state, metrics

    monkeypatch.setattr(grpo_mnist, "train_epoch", keep_state)
    config = Config(
        batch_size=4096,
        num_epochs=3,
        num_generations=2,
        beta=0.01,
        entropy_coef=0.001,
        ref_sync_epochs=1,
        lr_schedule="constant",
    )
    returned = grpo_mnist.train(config)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-0-2")
    output = capsys.readouterr().out
    assert output.index("INSTEAD OF MNIST") < output.index("Starting GRPO on digits training...")
    assert "8 steps of 4096 images; 3157 images left over" in output
    history = read_history(run)
    assert history == returned
    assert [metrics["learning_rate"] for metrics in history] == [pytest.approx(3e-3)] * 3
    assert all(0 < metrics["kl"] < 3 for metrics in history)
    summary = read_json(run / "summary.json")
    last = states[-1]
    digest = hashlib.sha256()
    for layer in (last.hidden_1, last.hidden_2, last.logits):
        digest.update(np.asarray(layer.bias).tobytes() + np.asarray(layer.kernel).tobytes())
    assert summary["params_sha256"] == digest.hexdigest()
    assert digest.hexdigest() in output
    parts = summary["training_state_bytes"]
    assert parts["weights"] == parts["gradients"] == parts["reference"] == 4 * 118_282
    assert parts["adam"] == pytest.approx(2 * 4 * 118_282, rel=1e-3)
    assert parts["total"] == sum(parts.values()) - parts["total"]
    answers, _ = grpo_mnist.predict(last, digits.test_images)
    assert summary["test_accuracy"] == pytest.approx(np.mean(answers == digits.test_labels))
    assert read_json(run / "config.json")["trained_on"] == "digits"


def test_a_terminal_gets_a_progress_bar():
    """Under `script`, standard output is a terminal; the epoch lines stay whole beside the bar."""
    if not shutil.which("script"):
        pytest.skip("needs script (util-linux) to play a terminal")
    program = f"{sys.executable} {ROOT / 'grpo_mnist.py'}"
    flags = "--dataset digits --num-epochs 2 --batch-size 4096 --output-dir run"
    done = subprocess.run(
        ["script", "-qec", f"stty cols 100; {program} {flags}", "/dev/null"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "Training" in done.stdout
    assert "0:00:0" in done.stdout
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", done.stdout).splitlines()
    assert len([line for line in lines if line.startswith("Epoch 1/2, Accuracy: ")]) == 1
    assert "--- Training completed! ---" in lines


def test_evaluation_counts_every_test_image(digits):
    actor, other = (grpo_mnist.Actor(784, 10, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert grpo_mnist.params_sha256(actor) != grpo_mnist.params_sha256(other)
    answers, confidences = grpo_mnist.predict(actor, digits.test_images)
    assert answers.shape == confidences.shape == (360,)
    for index in range(0, 360, 45):
        image = digits.test_images[index : index + 1].astype(np.float32) / 255
        probabilities = np.asarray(actor(image).probs_parameter())[0]
        assert answers[index] == probabilities.argmax()
        assert confidences[index] == pytest.approx(probabilities.max(), rel=1e-5)


def test_the_same_seed_gives_the_same_parameters():
    """Two processes with one seed agree to the last bit."""
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=8192", "--seed=3")
    processes = [start_program(*flags, f"--output-dir={run}") for run in range(2)]
    hashes, metrics = [], []
    for run, process in enumerate(processes):
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        hashes.append(read_json(f"{run}/summary.json")["params_sha256"])
        timings = {"seconds": None, "images_per_second": None}
        metrics.append([epoch | timings for epoch in read_history(str(run))])
    assert hashes[0] == hashes[1]
    assert metrics[0] == metrics[1]


def test_the_code_is_clean():
    """The linter and the formatter that requirements.txt pins have nothing to say."""
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
