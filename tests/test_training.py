"""Whole runs: that they learn what there is to learn, count right, and repeat themselves."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from conftest import (
    ROOT,
    assert_one_line_error,
    edited_program,
    read_history,
    read_json,
    run_program,
    start_program,
    train_in_memory,
    tree,
)
from faults import metrics_without_times
from flax import nnx
from scipy.stats import t

import grpo_mnist
from grpo_mnist import Config, UsageError


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
    assert summary["training_state_bytes"] == 4 * 4 * 118_282
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
    facts = {"versions", "device", "cores", "xla_flags", "program_sha256"}
    assert set(Config.__dataclass_fields__) | facts == set(config)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_returns_and_writes_the_same_and_hashes_its_last_parameters(digits, tmp_path, capsys):
    """A whole run with every term in the loss; its files against what train() returns."""
    config = Config(
        batch_size=4096,
        num_epochs=3,
        num_generations=2,
        baseline="critic",
        beta=0.01,
        entropy_coef=0.001,
        ref_sync_epochs=2,
        lr_schedule="constant",
    )
    opened = []
    returned = grpo_mnist.train(config, on_start=opened.append)
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.resolve() for path in opened] == [run]
    assert run.name.startswith("digits-0-2")
    output = capsys.readouterr().out
    assert output.index("digits INSTEAD.") < output.index("Starting GRPO on digits training...")
    assert "8 steps of 4096 images; 3157 images left over" in output
    history = read_history(run)
    assert history == returned
    assert [metrics["learning_rate"] for metrics in history] == [pytest.approx(3e-3)] * 3
    assert all(0 < metrics["kl"] < 3 for metrics in history)
    summary = read_json(run / "summary.json")
    last = grpo_mnist.load_actor(run)
    digest = hashlib.sha256()
    for layer in (last.hidden_1, last.hidden_2, last.output):
        digest.update(np.asarray(layer.bias).tobytes() + np.asarray(layer.kernel).tobytes())
    assert summary["params_sha256"] == digest.hexdigest()
    assert digest.hexdigest() in output
    # Float32: weights, gradients and Adam's two moments of both networks, and the reference.
    assert summary["training_state_bytes"] == 4 * (4 * (118_282 + 117_121) + 118_282)
    assert summary["test_accuracy"] == pytest.approx(share_of_right_answers(last, digits))
    assert read_json(run / "config.json")["dataset"] == "digits"

    # The reference became the actor of epoch 2, and stayed that.
    second, third = (arrays_of(run / "checkpoints" / f"epoch-{epoch}.npz") for epoch in (2, 3))
    for name in (name for name in third if name.startswith("reference.")):
        actor = name.replace("reference.", "networks.actor.")
        np.testing.assert_array_equal(second[name], second[actor])
        np.testing.assert_array_equal(third[name], second[actor])
        assert np.any(third[name] != third[actor])


def share_of_right_answers(actor, dataset):
    answers = actor(dataset.test_images.astype(np.float32) / 255).mode()
    return np.mean(np.asarray(answers) == dataset.test_labels)


def arrays_of(checkpoint):
    """What a checkpoint holds before its SHA-256."""
    return np.load(io.BytesIO(checkpoint.read_bytes()[:-32]))


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
    actor = grpo_mnist.Actor(784, 10, rngs=nnx.Rngs(0))
    several = jax.tree.map(lambda x: x[None], actor)
    answers, confidences = (x[0] for x in grpo_mnist.predict(several, digits.test_images))
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
        metrics.append(metrics_without_times(str(run)))
    assert hashes[0] == hashes[1]
    assert metrics[0] == metrics[1]


ALGORITHMS = {
    "REINFORCE": {"baseline": "none", "scale_rewards": "none", "num_iterations": 1},
    "GRPO": {"baseline": "group", "scale_rewards": "group", "num_generations": 4},
    "RLOO": {"baseline": "loo", "scale_rewards": "none", "num_generations": 4},
    "DAPO": {
        "baseline": "group",
        "scale_rewards": "group",
        "num_generations": 4,
        "clip_epsilon_high": 0.28,
        "dynamic_sampling": True,
    },
    "moving average": {"baseline": "ema"},
    "PPO": {"baseline": "critic"},
    "MaxRL": {"baseline": "group", "scale_rewards": "mean"},
    "CISPO": {"loss_type": "cispo", "clip_epsilon_high": 4.0},
    "DG": {"loss_type": "dg"},
    "TPO": {"loss_type": "tpo"},
}


ABSENT = {  # the metrics that a loss does not have: null in metrics.jsonl
    "cispo": ["clip_ratio_low"],
    "dg": ["clip_ratio_low", "clip_ratio_high"],
    "tpo": ["clip_ratio_low", "clip_ratio_high"],
}


@pytest.mark.parametrize("flags", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm_learns(digits, flags):
    """One epoch; chance is 10%."""
    (metrics,) = train_in_memory(digits, Config(num_epochs=1, **flags))
    assert metrics["test_accuracy"] > 0.4
    absent = {"kl", *ABSENT.get(flags.get("loss_type"), ())}
    assert {name for name, value in metrics.items() if value is None} == absent


def test_several_seeds_are_the_same_runs_as_each_alone(digits, capfd):
    """In one compiled program and in three runs: the same figures; on CPUs, the same parameters."""
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=4096", "--num-generations=2")
    flags += ("--num-iterations=1", "--learning-rate=1e-4")  # so that rounding stays small on a GPU
    assert grpo_mnist.main([*flags, "--seed=7", "--num-seeds=3", "--output-dir=together"]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    together = read_history("together")
    digests = read_json("together/summary.json")["by_seed"]["params_sha256"]
    for index in range(3):
        assert grpo_mnist.main([*flags, f"--seed={7 + index}", f"--output-dir={index}"]) == 0
        if jax.default_backend() == "cpu":
            assert digests[index] == read_json(f"{index}/summary.json")["params_sha256"]
        alone = read_history(str(index))
        for one, all_three in zip(alone, together, strict=True):
            for name, values in all_three["by_seed"].items():
                assert values[index] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    by_seed = np.array([epoch["by_seed"]["accuracy"] for epoch in together])
    for epoch, values, line in zip(together, by_seed, re.findall(r"Epoch .*", output), strict=True):
        low, high = t.interval(0.95, 2, values.mean(), values.std(ddof=1) / 3**0.5)
        assert epoch["accuracy"] == pytest.approx((low + high) / 2)
        assert epoch["interval_95"]["accuracy"] == pytest.approx((high - low) / 2)
        assert f"Accuracy: {100 * values.mean():.2f}% +- {100 * (high - low) / 2:.2f}%," in line
        assert 0 < high - low < 0.3
    summary = read_json("together/summary.json")
    assert summary["by_seed"]["accuracy"] == by_seed[-1].tolist()
    assert summary["interval_95"]["accuracy"] == together[-1]["interval_95"]["accuracy"]
    # What training keeps is counted for one seed, and is the same however many there are.
    alone = read_json("0/summary.json")
    assert summary["training_state_bytes"] == alone["training_state_bytes"]
    assert {"interval_95", "by_seed"} & set(alone) == set()
    assert len(set(digests)) == 3
    # The actor of each seed can be loaded; the first one's, if none is named.
    for seed, accuracy in zip((None, 8, 9), summary["by_seed"]["test_accuracy"], strict=True):
        actor = grpo_mnist.load_actor("together", seed)
        assert share_of_right_answers(actor, digits) == pytest.approx(accuracy)
    for seed in (6, 10):
        with pytest.raises(UsageError, match=f"together has the seeds 7 to 9, not {seed}"):
            grpo_mnist.load_actor("together", seed)


def test_an_actor_is_not_loaded_from_where_there_is_none(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path} is not the directory of a run"):
        grpo_mnist.load_actor(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 3}')  # of some other program
    with pytest.raises(UsageError, match=f"{tmp_path} is not the directory of a run"):
        grpo_mnist.load_actor(tmp_path)
    (tmp_path / "config.json").write_text('{"program_sha256": "..."}')
    with pytest.raises(UsageError, match=f"{tmp_path} holds no checkpoint"):
        grpo_mnist.load_actor(tmp_path)


def test_a_baseline_and_a_reward_of_ones_own_are_one_entry_each(tmp_path):
    """As the README has them: the median of an image's rewards, and how near an answer is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (reward,) = re.findall(r"`(return -abs.*)`", text)
    (baseline,) = re.findall(r'`("median": Statistic.*)`', text)
    program = edited_program(
        tmp_path / "nearest_digit.py",
        ("return (actions == labels[:, None]).astype(jnp.float32)", reward),
        ("BASELINES = {", f"BASELINES = {{\n    {baseline}"),
    )
    flags = ("--dataset=digits", "--baseline=median", "--num-epochs=2", "--output-dir=run")
    status, output, errors = run_program(*flags, program=program)
    assert (status, errors) == (0, "")
    assert read_json("run/config.json")["num_generations"] == 8
    last = read_history("run")[-1]
    assert last["accuracy"] > 0.5
    assert last["test_accuracy"] > 0.5
    assert -2 < last["reward"] < 0
    assert f"Accuracy: {100 * last['accuracy']:.2f}%, reward {last['reward']:.4f}, test " in output

    status, output, errors = run_program(*flags, "--num-generations=1", program=program)
    assert (status, output) == (2, "")
    assert_one_line_error(errors, "--num-generations 1 must be 2 or more")


def test_a_compilation_cache_changes_no_bit(tmp_path):
    """As the README switches it on: filled by one run, and only read by the next."""
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=4096")
    without = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    cache = tmp_path / "cache"
    cached = without | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    cached |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = []
    for run, environment in (("without", without), ("fills", cached), ("reads", cached)):
        status, _, errors = run_program(*flags, f"--output-dir={run}", env=environment)
        assert (status, errors) == (0, "")
        kept.append({name for name in tree(cache) if not name.endswith("-atime")})
    assert kept[1] == kept[2] != set()
    summaries = [read_json(f"{run}/summary.json") for run in ("without", "fills", "reads")]
    assert len({summary["params_sha256"] for summary in summaries}) == 1


def test_the_loop_stays_ahead_of_the_device_by_a_few_steps(monkeypatch):
    """Else the progress bar would lie, and the batches sent off would fill the memory."""
    losses, pending = [], []
    compile_step = grpo_mnist.compile_step

    def compile_and_watch(*arguments):
        compiled = compile_step(*arguments)

        def step(*arguments):
            pending.append(sum(not loss.is_ready() for loss in losses))
            state, metrics = compiled(*arguments)
            losses.append(metrics["loss"])
            return state, metrics

        return step

    monkeypatch.setattr(grpo_mnist, "compile_step", compile_and_watch)
    grpo_mnist.train(Config(dataset="digits", num_epochs=1, num_iterations=8))
    assert len(pending) == 35
    assert 1 <= max(pending) <= 6


def test_a_number_that_is_none_is_named_with_epoch_and_seed(digits):
    config = Config(seed=5, num_seeds=3)
    state = grpo_mnist.create_state(config)
    metrics = {"accuracy": np.ones(3), "loss": np.zeros(3), "entropy": np.ones(3)}
    bad_metrics = metrics | {"entropy": np.array([1, np.nan, 1])}
    # As train() calls it at the end of an epoch, here the second.
    end_epoch = partial(grpo_mnist.end_epoch, config, digits, state, 2, time.perf_counter())
    assert end_epoch([metrics, metrics])["entropy"] == 1
    with pytest.raises(grpo_mnist.RunError, match="epoch 2, seed 6: not finite: entropy;"):
        end_epoch([metrics, bad_metrics])
    bias = state.networks.actor.output.bias
    bias[...] = bias[...].at[2, 3].set(np.inf)
    with pytest.raises(grpo_mnist.RunError, match="epoch 2, seed 7: not finite: actor"):
        end_epoch([metrics, metrics])


def test_the_code_is_clean():
    """The linter and the formatter that requirements.txt pins have nothing to say."""
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
