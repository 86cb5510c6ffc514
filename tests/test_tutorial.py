"""The tutorial against the program: its snippets, commands, messages, exercises and one update."""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import one_update
import pytest
from common import state_and_step
from conftest import ROOT, read_json, run_program
from test_documents import READMES, RESULTS, read

import grpo_mnist

EXAMPLE = "from grpo_mnist import "  # How a block begins that is no piece of the file.


def blocks(text, language):
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def folded(text):
    return "\n".join(re.findall(r"<details>.*?</details>", text, re.DOTALL))


def unfolded(text):
    return re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)


# --- What is shown of the file ---


@pytest.mark.parametrize("readme", READMES)
def test_snippets_are_lines_of_the_file(readme):
    blocks_of_python = blocks(unfolded(read(readme)), "python")
    snippets = [block for block in blocks_of_python if not block.startswith(EXAMPLE)]
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
            choices = itertools.product(*(as_texts(part, texts) for part in parts))
            return ["".join(choice) for choice in choices]
        case ast.FormattedValue(value=ast.Name(id=name)) if name in texts:
            others = {other: values for other, values in texts.items() if other != name}
            return [text for value in texts[name] for text in as_texts(value, others)]
    return ["..."]


@pytest.mark.parametrize("readme", READMES)
def test_messages_are_those_of_the_program(readme):
    rows = re.findall(r"^\| `([^`]*(?:\.\.\.|\. |[a-z]) [^`]*)` \| [^|]* \|$", read(readme), re.M)
    assert len(rows) > 14
    templates = list(message_templates())
    for message in rows:
        for piece in re.findall(r"cannot be had:|[^ ].*", message):  # the one quotes another
            assert any(piece.strip(" .") in template for template in templates), message


@pytest.mark.parametrize("readme", READMES)
def test_promises_name_tests_that_exist(readme):
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", read(readme))
    assert len(named) > 10
    for path, name in named:
        assert f"\ndef {name}(" in read(path), (path, name)


# --- What can be run ---


def masked(line):
    """A line without what differs from machine to machine."""
    return re.sub(r"[0-9a-f]{64}|\d[\d.,-]*", "#", line)


SHORT = sorted(
    {
        command
        for block in blocks(read("README.md"), "bash")
        for command in block.splitlines()
        if command.startswith("python grpo_mnist.py --dataset digits")
    }
)


def test_the_last_lines_are_those_of_the_committed_run():
    (shown,) = blocks(read("README.md"), "text")
    assert shown.splitlines() == committed_output()[-5:]


def committed_output():
    return read_json(RESULTS / "accuracy.json")["rows"][0]["runs"][0]["output"]


def test_there_are_short_commands():
    assert len(SHORT) == 2


@pytest.mark.parametrize("command", SHORT)
def test_the_short_commands_run_and_end_as_shown(command):
    status, output, errors = run_program(*shlex.split(command)[2:])
    assert (status, errors) == (0, "")
    shown = [masked(line.replace("mnist", "digits")) for line in committed_output()]
    assert [masked(line) for line in output.splitlines()[-5:]] == shown[-5:]
    if "--baseline group" in command:  # the one of the exercise
        assert re.search(r"^Accuracy 84\.\d\d%", output, re.MULTILINE), output


def test_the_update_by_hand_is_what_the_code_computes(mnist, mnist_dir):
    """In the trainer's own step, too: the mean of the losses, and what it held."""
    committed = read_json(RESULTS / "one_update.json")
    update, _ = one_update.first_update(mnist)
    assert (update["labels"], update["answers"]) == (committed["labels"], committed["answers"])
    for name in ("rewards", "mean", "deviation", "advantages"):
        np.testing.assert_allclose(update[name], committed[name], rtol=1e-5)
    for ours, theirs in zip(update["rounds"], committed["rounds"], strict=True):
        assert ours["held"] == theirs["held"]
        for name in ("probabilities", "ratios", "loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    config = grpo_mnist.parse_flags(shlex.split(one_update.COMMAND)[2:])
    state, step = state_and_step(mnist, config)
    images, labels = next(grpo_mnist.batches(config, mnist, epoch=1))
    _, metrics = step(state, images, labels)
    for name in ("loss", "clip_ratio_low", "clip_ratio_high", "grad_norm"):
        by_round = [each[name] for each in committed["rounds"]]
        assert metrics[name] == pytest.approx(np.mean(by_round), rel=1e-3)
    program = [sys.executable, str(ROOT / "benchmarks" / "one_update.py"), "--data-dir", mnist_dir]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    described = list(one_update.describe(committed))
    assert list(map(masked, printed.splitlines())) == list(map(masked, described))


def test_a_trained_network_is_loaded_as_shown(tmp_path, digits):
    """The README's example, with digits in the place of MNIST."""
    blocks_of_python = blocks(unfolded(read("README.md")), "python")
    (example,) = (block for block in blocks_of_python if block.startswith(EXAMPLE))
    example = example.replace("mnist-0", "digits-0").replace('"mnist"', '"digits"')
    (run_dir,) = re.findall(r"runs/[\w-]+", example)
    grpo_mnist.train(grpo_mnist.Config(dataset="digits", num_epochs=1, output_dir=run_dir))
    names = {}
    exec(example, names)
    assert len(names["answers"]) == len(names["probabilities"]) == 5
    answers = names["actor"](digits.test_images / np.float32(255)).mode()
    accuracy = np.mean(np.asarray(answers) == digits.test_labels)
    assert accuracy == pytest.approx(read_json(f"{run_dir}/summary.json")["test_accuracy"])


# --- The exercises ---

WRONG = {  # plausible, and to be found out
    "memory": "return billions * (16 if mixed_precision else 8)",
    "advantage": "return 1 - share_right, -share_right",
    "silent": "return share_right**num_generations",
    "order": "return np.tile(np.arange(num_images), num_generations)",
    "held": "return abs(ratios - 1) > epsilon",
    "loo": "return group_advantages",
    "k3": "return log_probs - reference_log_probs",
    "collapse": "return []",
}


def run_exercises(directory, answers):
    """Runs the exercises as a reader would who has filled in the answers: outcomes by exercise."""
    shutil.copytree(ROOT / "tests" / "exercises", directory)
    with (directory / "exercises.py").open("a") as file:
        file.write(answers)
    program = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(directory)]
    program += [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    outcomes = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED) \S*::test_(\w+)", done.stdout, re.MULTILINE):
        outcomes.setdefault(name, set()).add(outcome)
    return outcomes, done.stdout


def test_the_folded_answers_solve_the_exercises(tmp_path):
    answers = blocks(folded(read("README.md")), "python")
    outcomes, output = run_exercises(tmp_path / "exercises", "\n\n".join(answers))
    assert outcomes == {name: {"PASSED"} for name in WRONG}, output


def instead(bodies):
    """The functions of the exercises with other bodies, to be appended to the file."""
    text = read("tests/exercises/exercises.py")
    functions = {name: re.search(rf"^def {name}\(.*\):$", text, re.M)[0] for name in bodies}
    return "\n\n".join(f"{functions[name]}\n    {body}\n" for name, body in bodies.items())


def test_wrong_answers_do_not(tmp_path):
    outcomes, output = run_exercises(tmp_path / "exercises", instead(WRONG))
    assert all("FAILED" in outcomes[name] for name in WRONG), output


def test_without_answers_they_are_skipped(tmp_path):
    outcomes, output = run_exercises(tmp_path / "exercises", instead(dict.fromkeys(WRONG, "...")))
    assert outcomes == {}
    assert re.search(r"returns nothing yet.*\n.* 14 skipped", output), output


# --- Traditional Chinese, as written in Taiwan ---


def test_no_character_is_simplified():
    """Big5, the character set of Taiwan, has none of those that are Simplified only."""
    unknown = {
        character
        for character in read("README_ch.md")
        if "\u3400" <= character <= "\u9fff" and not is_traditional(character)
    }
    assert unknown == set()


def is_traditional(character):
    try:
        character.encode("big5")
    except UnicodeEncodeError:
        return False
    return character not in SIMPLIFIED_IN_BIG5


# Simplified forms that Big5 has for other reasons, as rare characters of their own.
SIMPLIFIED_IN_BIG5 = "与个么优体儿凄听圣坏复宁岭庄异怀怜惊扑扰机构气泞洁洼痒离篱网茧虱蚕触"


@pytest.mark.parametrize(
    "word", ["数据", "默認", "信息", "網絡", "程序", "內存", "運行", "代碼", "激活", "算法", "缺省"]
)
def test_words_are_those_of_taiwan(word):
    text = read("README_ch.md").replace("演算法", "").replace("結束代碼", "")
    assert word not in text
