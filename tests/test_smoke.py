"""The first thing to run: does it work here at all? About 10 seconds."""

import pytest
from common import train_in_memory
from conftest import METRICS, read_history, start_program, tree

from grpo_mnist import Config, load_dataset


def test_the_program_trains_and_a_tiny_subset_is_learned(tmp_path):
    """Two epochs in another process; here, one batch 60 times: the same steps, compiled once."""
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=512", "--output-dir=run")
    with start_program(*flags) as process:
        digits = load_dataset("digits", tmp_path)
        images, labels = digits.train_images[:512], digits.train_labels[:512]
        tiny = digits._replace(train_images=images, train_labels=labels)
        history = train_in_memory(tiny, Config(batch_size=512, num_epochs=60))
        output, errors = process.communicate(timeout=120)
    assert history[0]["accuracy"] < 0.5
    assert history[-1]["accuracy"] > 0.95  # from right and wrong alone

    assert (process.returncode, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0] == "Starting GRPO on digits training..."
    assert "--- Training completed! ---" in lines
    epochs = [line for line in lines if line.startswith("Epoch ")]
    assert [line.split(", ")[0] for line in epochs] == ["Epoch 1/2", "Epoch 2/2"]
    files = [".lock", "checkpoints", "checkpoints/epoch-1.npz", "checkpoints/epoch-2.npz"]
    files += ["config.json", "curves.png", "metrics.jsonl", "summary.json"]
    assert tree("run") == files
    metrics = read_history("run")
    assert [set(epoch) for epoch in metrics] == [METRICS] * 2
    for line, epoch in zip(epochs, metrics, strict=True):
        assert f"Accuracy: {100 * epoch['accuracy']:.2f}%, test " in line  # no reward beside it
        assert epoch["reward"] == pytest.approx(epoch["accuracy"])
    assert metrics[1]["accuracy"] > metrics[0]["accuracy"] > 0.2
