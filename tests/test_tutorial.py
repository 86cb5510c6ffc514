"""The tutorial against the program: its snippets, commands, messages, exercises and one update."""

import ast
import importlib
import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import one_update
import pytest
from common import read_results, state_and_step
from conftest import ROOT, read_json
from test_documents import read

import grpo_mnist

EXAMPLE = "from grpo_mnist import "  # How a block begins that is no piece of the file.


def blocks(language, folded=False):
    """The contents of the fenced blocks of a language: the folded ones, or the others."""
    parts = re.split(r"</?details>", read("README.md"))[int(folded) :: 2]
    return re.findall(rf"^```{language}\n(.*?)^```$", "\n".join(parts), re.MULTILINE | re.DOTALL)


# --- What is shown of the file, in English; test_documents.py compares the languages ---


def test_snippets_are_lines_of_the_file():
    snippets = [block for block in blocks("python") if not block.startswith(EXAMPLE)]
    assert len(snippets) > 10
    for snippet in snippets:
        assert f"\n{snippet}" in read("grpo_mnist.py"), snippet


def message_templates():
    """Every text in the program, with ... where a value stands that is not itself a text."""
    for function in ast.walk(ast.parse(read("grpo_mnist.py"))):
        if isinstance(function, ast.FunctionDef):
            texts = {}  # What the variables of the function are given, by name.
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    texts.setdefault(ast.unparse(node.targets[0]), []).append(node.value)
            for node in ast.walk(function):
                yield from as_texts(node, texts)


def as_texts(node, texts):
    """The messages that a piece of code can make."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(each) for each in product(*(as_texts(part, texts) for part in parts))]
        case ast.FormattedValue(value=ast.Name(id=name)) if name in texts:
            others = {other: values for other, values in texts.items() if other != name}
            return [text for value in texts[name] for text in as_texts(value, others)]
    return ["..."]


def test_messages_are_those_of_the_program():
    rows = re.findall(r"^\| `([^`]* [^`]*)` \| [^|]* \|$", read("README.md"), re.MULTILINE)
    assert len(rows) > 14
    templates = list(message_templates())
    for message in rows:
        for piece in re.findall(r"cannot be had:|[^ ].*", message):  # the one quotes another
            assert any(piece.strip(" .") in template for template in templates), message


# --- What can be run ---


def masked(text):
    """A text without what differs from machine to machine."""
    return re.sub(r"[0-9a-f]{64}|\d[\d.,-]*", "#", text)


def test_a_first_look_and_the_use_of_its_network_are_as_shown(capfd, digits):
    """With digits in the place of MNIST."""
    (shown,) = blocks("text")
    assert shown.splitlines() == read_results("accuracy")["rows"][0]["output"][-5:]
    assert "python grpo_mnist.py --dataset digits --num-epochs 2\n" in blocks("bash")
    assert grpo_mnist.main(["--dataset", "digits", "--num-epochs", "2"]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert masked(output).endswith(masked(shown.replace("mnist", "digits")))
    (run_dir,) = Path("runs").iterdir()
    (example,) = (x for x in blocks("python") if x.startswith(EXAMPLE))
    example = re.sub(r"runs/[\w-]+", str(run_dir), example.replace('"mnist"', '"digits"'))
    names = {}
    exec(example, names)
    assert len(names["answers"]) == len(names["probabilities"]) == 5
    answers = names["actor"](digits.test_images / np.float32(255)).mode()
    accuracy = np.mean(np.asarray(answers) == digits.test_labels)
    assert accuracy == pytest.approx(read_json(run_dir / "summary.json")["test_accuracy"])


def test_the_update_by_hand_is_what_the_code_computes(mnist, mnist_dir, monkeypatch, capsys):
    """In the trainer's own step, too: the mean of the losses, and what it held."""
    committed = read_results("one_update")
    update = one_update.first_update(mnist)
    for name in ("labels", "answers", "rewards", "mean", "deviation", "advantages"):
        np.testing.assert_allclose(update[name], committed[name], rtol=1e-5)
    for ours, theirs in zip(update["rounds"], committed["rounds"], strict=True):
        assert ours["held"] == theirs["held"]
        for name in ("probabilities", "ratios", "loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    config = grpo_mnist.parse_flags(shlex.split(one_update.COMMAND)[2:])
    state, step = state_and_step(mnist, config)
    _, metrics = step(state, *next(grpo_mnist.batches(config, mnist, epoch=1)))
    for name in ("loss", "clip_ratio_low", "clip_ratio_high", "grad_norm"):
        by_round = [each[name] for each in committed["rounds"]]
        assert metrics[name] == pytest.approx(np.mean(by_round), rel=1e-3)
    monkeypatch.setattr("sys.argv", ["one_update.py", "--data-dir", str(mnist_dir)])
    one_update.main()
    described = "\n".join([*one_update.describe(committed), ""])
    assert masked(capsys.readouterr().out) == masked(described)


# --- The exercises ---

WRONG = {  # plausible, and to be found out
    "memory": lambda billions, mixed, *_: billions * (16 if mixed else 8),
    "advantage": lambda share_right: (1 - share_right, -share_right),
    "silent": lambda share_right, num_generations: share_right**num_generations,
    "order": lambda num_images, num_generations: list(range(num_images)) * num_generations,
    "held": lambda ratios, advantages, epsilon: abs(ratios - 1) > epsilon,
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
def test_the_folded_answer_solves_the_exercise(name, monkeypatch):
    names = {"np": np}
    exec("\n".join(blocks("python", folded=True)), names)
    check(name, names[name], monkeypatch)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_wrong_answer_or_none_does_not(name, monkeypatch):
    """Without an answer, the exercise fails in one line."""
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
