"""The first thing to run: does it work here at all? About 10 seconds."""

import pytest
from common import train_in_memory
from conftest import METRICS, read_history, run_program, tree

from grpo_mnist import Config


def test_the_program_trains_and_writes_its_files(tmp_path):
    status, output, errors = run_program(
        "--dataset=digits", "--num-epochs=2", "--batch-size=512", "--output-dir=run"
    )
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0] == "Starting GRPO on digits training..."
    assert "--- Training completed! ---" in lines
    epochs = [line for line in lines if line.startswith("Epoch ")]
    assert [line.split(", ")[0] for line in epochs] == ["Epoch 1/2", "Epoch 2/2"]
    files = [".lock", "checkpoints", "checkpoints/epoch-1.npz", "checkpoints/epoch-2.npz"]
    files += ["config.json", "curves.png", "metrics.jsonl", "summary.json"]
    assert tree(tmp_path) == ["run", *(f"run/{name}" for name in files)]

    metrics = read_history("run")
    assert [set(epoch) for epoch in metrics] == [METRICS] * 2
    for line, epoch in zip(epochs, metrics, strict=True):
        assert f"Accuracy: {100 * epoch['accuracy']:.2f}%, test " in line  # no reward beside it
        assert epoch["reward"] == pytest.approx(epoch["accuracy"])
    assert metrics[1]["accuracy"] > metrics[0]["accuracy"] > 0.2


def test_a_tiny_subset_is_learned(digits):
    """One batch, 140 times: the answers become right, from right/wrong alone.

    As many steps as above, so that they are compiled already.
    """
    images, labels = digits.train_images[:512], digits.train_labels[:512]
    tiny = digits._replace(train_images=images, train_labels=labels)
    history = train_in_memory(tiny, Config(batch_size=512, num_epochs=140))
    assert history[0]["accuracy"] < 0.5
    assert history[-1]["accuracy"] > 0.95
