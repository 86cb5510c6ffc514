"""The tutorial against the program: its snippets, commands, messages, exercises and one update."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import one_update
import optax
import pytest
from common import read_results, state_and_step
from conftest import ROOT, edited_program, read_history, read_json
from test_documents import read

import grpo_mnist
from grpo_mnist import Config


def blocks(language, section=""):
    """The contents of the fenced blocks of a language, in all sections or the one of a number."""
    sections = re.split(r"^## ", read("README.md"), flags=re.MULTILINE)
    text = "\n".join(part for part in sections if part.startswith(section))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --- What is shown of the file, in English; test_documents.py compares the languages ---


def test_snippets_of_the_tour_are_lines_of_the_file_in_its_order():
    snippets = blocks("python", "7. ")
    assert len(snippets) > 5
    places = [read("grpo_mnist.py").index(f"\n{snippet}") for snippet in snippets]
    assert places == sorted(places)


def test_messages_are_those_of_the_program():
    """Piece by piece; where it has a value, the tutorial has three dots."""
    program = re.sub(r'"\s+f?"', "", read("grpo_mnist.py"))  # texts that go on in the next line
    messages = re.findall(r"^\| `([^`]* [^`]*)` \| [^|]* \|$", read("README.md"), re.MULTILINE)
    assert len(messages) > 10
    for piece in "...".join(messages).split("..."):
        assert piece.strip(" ().") in program, piece


# --- What can be run ---


def test_the_whole_algorithm_as_one_listing_learns(digits):
    """It is GRPO with G = 8: after 40 batches, most answers are right."""
    (listing,) = blocks("python", "2. ")
    config = Config(dataset="digits", baseline="group", batch_size=256)
    actor = jax.tree.map(lambda x: x[0], grpo_mnist.create_state(config)).networks.actor
    optimizer = optax.adam(config.learning_rate)
    names = vars(grpo_mnist) | {
        "actor": actor,
        "optimizer": optimizer,
        "optimizer_state": optimizer.init(actor),
        "batches": [
            (jnp.asarray(images[0], jnp.float32) / 255, labels[0])
            for images, labels in itertools.islice(grpo_mnist.batches(config, digits, epoch=1), 40)
        ],
        "keys": map(jax.random.key, itertools.count()),
        "G": config.num_generations,
        "K": config.num_iterations,
    }
    exec(listing, names)
    assert names["rewards"].shape == (256, 8)
    assert names["rewards"].mean() > 0.7


def masked(text):
    """A text without what differs from machine to machine."""
    return re.sub(r"[0-9a-f]{64}|\d[\d.,-]*", "#", text)


def test_the_last_lines_are_as_shown_and_the_network_can_be_used(capfd, digits):
    """With digits in the place of MNIST, by the lines that a notebook would have."""
    shown, _ = blocks("text")
    assert shown.splitlines() == read_results("accuracy")["rows"][0]["output"][-5:]
    *_, notebook = blocks("python", "8. ")
    names = {}
    exec(notebook, names)
    output, errors = capfd.readouterr()
    assert errors == ""
    shown = re.sub(r"runs/mnist[\d-]+", "runs/first", shown)
    assert masked(output).endswith(masked(shown))
    assert len(names["answers"]) == len(names["probabilities"]) == 5
    answers = grpo_mnist.load_actor("runs/first")(digits.test_images / np.float32(255)).mode()
    accuracy = np.mean(np.asarray(answers) == digits.test_labels)
    assert accuracy == pytest.approx(names["history"][-1]["test_accuracy"])
    assert accuracy == pytest.approx(read_json(Path("runs/first/summary.json"))["test_accuracy"])


def test_a_reward_and_a_baseline_of_ones_own_are_one_entry_each(tmp_path, monkeypatch, capfd):
    reward, baseline, _ = blocks("python", "8. ")
    edited_program(
        tmp_path / "nearest_digit.py",
        (blocks("python", "7. ")[1].strip(), reward.strip()),
        ("BASELINES = {", f"BASELINES = {{\n    {baseline.strip()}"),
    )
    monkeypatch.syspath_prepend(tmp_path)
    program = importlib.import_module("nearest_digit")
    flags = ["--dataset=digits", "--baseline=median", "--num-epochs=1", "--output-dir=run"]
    assert program.main(flags) == 0
    assert read_json("run/config.json")["num_generations"] == 8
    (last,) = read_history("run")
    assert last["accuracy"] > 0.25
    assert last["test_accuracy"] > 0.4
    assert -2 < last["reward"] < 0
    line = f"Accuracy: {100 * last['accuracy']:.2f}%, reward {last['reward']:.4f}, test "
    assert line in capfd.readouterr().out
    assert program.main([*flags, "--num-generations=1"]) == 2
    assert "--num-generations 1 must be 2 or more" in capfd.readouterr().err


def test_the_update_by_hand_is_what_the_code_computes(digits, capsys):
    """In the trainer's own step, too: the mean of the losses, and what it clipped."""
    (command,) = blocks("bash", "4. ")
    assert command.strip() == one_update.COMMAND
    committed, update = read_results("one_update"), one_update.first_update()
    for name in ("labels", "answers", "rewards", "advantages", "batch_advantages"):
        np.testing.assert_allclose(update[name], committed[name], rtol=1e-5)
    for ours, theirs in zip(update["rounds"], committed["rounds"], strict=True):
        assert ours["clipped"] == theirs["clipped"]
        for name in ("probabilities", "ratios", "loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    config = grpo_mnist.parse_flags(shlex.split(one_update.COMMAND)[2:])
    state, step = state_and_step(digits, config)
    _, metrics = step(state, *next(grpo_mnist.batches(config, digits, epoch=1)))
    for name in ("loss", "clip_ratio_low", "clip_ratio_high", "grad_norm"):
        by_round = [each[name] for each in committed["rounds"]]
        assert metrics[name] == pytest.approx(np.mean(by_round), rel=1e-3)
    one_update.main()
    described = "\n".join([*one_update.describe(committed), ""])
    assert masked(capsys.readouterr().out) == masked(described)


# --- The exercises ---

WRONG = {  # plausible, and to be found out
    "memory": lambda billions, mixed, *_: billions * (16 if mixed else 8),
    "advantage": lambda share_right: (1 - share_right, -share_right),
    "silent": lambda share_right, num_generations: share_right**num_generations,
    "order": lambda num_images, num_generations: list(range(num_images)) * num_generations,
    "clipped": lambda ratios, advantages, epsilon: abs(ratios - 1) > epsilon,
    "loo": lambda group_advantages: group_advantages,
    "k3": lambda log_probs, reference_log_probs: log_probs - reference_log_probs,
    "collapse": lambda: ["--num-epochs", "10"],
}


def check(name, answer, monkeypatch):
    """Checks an answer as if a reader had written it into exercises.py."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "exercises")
    checks = importlib.import_module("test_exercises")
    monkeypatch.setattr(checks.exercises, name, answer)
    getattr(checks, f"test_{name}")()


EXERCISES = re.findall(r"^def (\w+)", read("tests/exercises/exercises.py"), re.MULTILINE)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_answer_solves_the_exercise(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "exercises")
    check(name, getattr(importlib.import_module("answers"), name), monkeypatch)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_wrong_answer_or_none_does_not(name, monkeypatch):
    """Without an answer, the exercise fails in one line."""
    assert f"`-k {name}`" in " ".join(read("README.md").split())
    with pytest.raises(AssertionError):
        check(name, WRONG[name], monkeypatch)
    with pytest.raises(pytest.fail.Exception, match=f"^{name} returns nothing yet: .*$") as failure:
        check(name, lambda *_: None, monkeypatch)
    assert not failure.value.pytrace


def test_the_run_of_the_last_exercise_collapses(capfd, monkeypatch):
    with pytest.raises(AssertionError, match=r"by digit: .* 0 +\d+\]"):  # no answer is 8
        check("collapse", lambda: [], monkeypatch)
    flags = " ".join(importlib.import_module("test_exercises").COLLAPSE.split())
    assert f"python grpo_mnist.py {flags}\n" in blocks("bash")
    assert re.search(r"^Accuracy 84\.\d\d%", capfd.readouterr().out, re.MULTILINE)
