"""Whole runs: that they learn what there is to learn, count right, and repeat themselves."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_program, start_program, train_in_memory

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
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0.97 < summary["accuracy"] < 0.99
    assert 0.965 < summary["test_accuracy"] < 0.985
    assert summary["training_state_bytes"]["weights"] == 4 * 118_282
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
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

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(Config.__dataclass_fields__) | {"versions", "device"} == set(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_counts_every_test_image(digits):
    optimizer = grpo_mnist.create_optimizer(Config(), 1)
    actor = grpo_mnist.create_train_state(
        grpo_mnist.jax.random.key(0), optimizer=optimizer, config=Config()
    ).actor
    answers, confidences = grpo_mnist.predict(actor, digits.test_images)
    assert answers.shape == confidences.shape == (360,)
    for index in range(0, 360, 45):
        image = digits.test_images[index : index + 1].astype(np.float32) / 255
        probabilities = np.asarray(actor(image).probs_parameter())[0]
        assert answers[index] == probabilities.argmax()
        assert confidences[index] == pytest.approx(probabilities.max(), rel=1e-5)


def test_the_same_seed_gives_the_same_parameters(tmp_path):
    """Two processes with one seed agree to the last bit; another seed does not."""
    hashes, metrics = [], []
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=4096")
    processes = [
        start_program(*flags, f"--seed={seed}", f"--output-dir={run}")
        for run, seed in enumerate((3, 3, 4))
    ]
    for run, process in enumerate(processes):
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        hashes.append(json.loads((tmp_path / f"{run}/summary.json").read_text())["params_sha256"])
        lines = (tmp_path / f"{run}/metrics.jsonl").read_text().splitlines()
        timings = {"seconds": None, "images_per_second": None}
        metrics.append([json.loads(line) | timings for line in lines])
    assert hashes[0] == hashes[1] != hashes[2]
    assert metrics[0] == metrics[1] != metrics[2]


def test_the_code_is_clean():
    """The linter and the formatter that requirements.txt pins have nothing to say."""
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
