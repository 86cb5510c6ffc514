"""What the READMEs and requirements.txt say, against the results, the flags and each other."""

import math
import re
import shlex
from importlib.metadata import requires, version

import jax
import numpy as np
import pytest
import tyro
from common import median, rows_of
from conftest import METRICS, ROOT, flag
from packaging.requirements import Requirement
from report import MARKED, MARKS, by_seed, environment, points, ratio

import grpo_mnist
from grpo_mnist import Config

PAGES = ("README.md", "README_ch.md", "benchmarks/README.md", "benchmarks/README_ch.md")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# --- Figures in the English prose; that the languages agree is tested below ---


def sentences():
    """Parts of the prose with the figures that the results have for them, section by section."""
    results, rows = (environment({}).globals[name] for name in ("results", "rows"))
    machine, runs, algorithms = results["accuracy"], rows["accuracy"], rows["comparison"]
    yield f"about {median(runs['defaults']['seconds']):.0f} seconds after the program has started"
    yield f"on {machine['cores']} cores ({machine['processor']}):"
    yield f"ends with an accuracy of {runs['digits']['accuracy'][0]:.2%} and"
    yield f"and a test accuracy of {runs['digits']['test_accuracy'][0]:.2%} after"
    yield f"after {median(runs['digits']['seconds']):.0f} seconds. MNIST can"
    grpo, ppo = algorithms["batch-mean GRPO"], algorithms["PPO with critic"]
    networks = grpo_mnist.create_state(Config(baseline="critic")).networks
    actor, critic = (sum(x.size for x in jax.tree.leaves(network)) for network in networks)
    yield f"the actor has {actor:,} parameters"
    yield f"would add {critic:,}: going without saves {critic / (actor + critic):.1%} of them"
    megabytes = [f"{row['training_state_bytes'] / 1e6:.2f} MB" for row in (grpo, ppo)]
    yield f"moments take {' instead of '.join(megabytes)}."
    many, one = results["comparison"]["epoch_seconds_64_answers"], grpo["epoch_seconds"]
    in_pairs = results["comparison"] | {"epoch_seconds": {"64 answers": many, "1": one}}
    yield f"{ratio(in_pairs, '64 answers', '1'):.2f} times the time for 64 of them"
    labels = algorithms["labels, tuned"]["test_accuracy"]
    yield f"Learning from labels gives this network {by_seed(labels)} of the test images"
    yield f"PPO with its critic ({points(ppo, grpo)} points on the test images)"
    yield f"TPO is the best, {points(algorithms['TPO'], grpo)} points above the defaults"
    yield f"followed by DG with 4 rounds ({points(algorithms['DG, K = 4'], grpo)})"
    lost = sum(share < 0.88 for share in algorithms["CISPO"]["test_accuracy"])
    yield f"and {lost} of its five seeds ends below 88%"
    yield f"the gradient of k3 costs: {points(algorithms['KL penalty, k3'], grpo)} points"
    without_jit = 1 / ratio(results["speed"]["rows"][0], "ours", "without jit")
    yield f"Without `jax.jit` the same network takes {without_jit:.0f} times as long"
    collapse, free = rows["breaking"]["class collapse"], rows["breaking"]["K = 64, no clipping"]
    seed = collapse["worst_seed"]
    digit = np.argmin(collapse["test_answers_by_digit"][seed])
    yield f'In seed {seed}, the network said "{digit}" ever more rarely'
    yield f"no answer to an image of a {digit} was right"
    yield f"There is no way back: {collapse['test_accuracy'][seed]:.1%} at the end"
    yield f"first epoch, {np.mean(free['curves']['clip_ratio_low'][0]):.0%} of the answers"
    yield f"At the end it is {by_seed(free['accuracy'])}, a matter of luck"
    constant, defaults = rows["breaking"]["learning rate constant"], rows["breaking"]["defaults"]
    yield f"{by_seed(constant['accuracy'])} instead of {by_seed(defaults['accuracy'])}, the noise"
    update = results["one_update"]
    mean, deviation, loss = update["mean"], update["deviation"], update["rounds"][1]["loss"]
    yield f"√({mean:.3f} · (1 - {mean:.3f})) = {deviation:.4f}"
    yield f")) / 8 = {loss:.4f}."


def test_figures_in_the_prose_are_the_committed_results():
    text = " ".join(read("README.md").split())
    for sentence in sentences():
        assert sentence in text


def test_figures_of_formulas_are_right():
    text = " ".join(read("README.md").split())
    assert f"which is {0.95**8 + 0.05**8:.0%} at p = 0.95 and G = 8" in text
    for share in (0.78, 0.95):
        right, wrong = math.sqrt((1 - share) / share), -math.sqrt(share / (1 - share))
        assert f"{right:+.2f} and {wrong:+.2f}" in text
    sums = re.findall(r"(-\([^=]*\) / 8) = (-\d\.\d+)", text)
    assert len(sums) == 2
    for products, loss in sums:
        assert f"{eval(products.replace('·', '*')):.4f}" == loss
    assert f"√(7/8) = {math.sqrt(7 / 8):.2f}" in text
    least, most = (np.std([1] * ones + [0] * (8 - ones)) for ones in (1, 4))
    assert f"between {least:.2f} and {most:.1f}" in text
    assert f"factor of {most / least:.1f} at most" in text
    mean, deviation = np.mean(MARKS), np.std(MARKS)
    assert f"Their mean is {mean:.1f}, their deviation {deviation:.3f}" in text


def test_no_table_of_results_is_written_by_hand():
    by_hand = MARKED.sub("", read("README.md"))
    for row in re.findall(r"^\|.*", by_hand, re.MULTILINE):
        assert not re.search(r"\d\.\d+(%| s) ", row), row


def test_every_metric_is_described():
    (section,) = re.findall(r"^## 10\..*?(?=^## )", read("README.md"), re.MULTILINE | re.DOTALL)
    names = "".join(re.findall(r"^\| (`[^|]*)", section, re.MULTILINE))
    assert {*re.findall(r"`(\w+)`", names), "epoch"} == set(METRICS)


def test_gigabytes_are_as_many_as_they_must_be():
    """Bytes a parameter, for 8 billion; the reference has weights in bf16."""
    text = read("README.md")
    for weights, gradients, adam in (((2,), 2, 4), ((2, 4), 2, 8)):
        one = 8 * (sum(weights) + gradients + adam)
        cells = [" + ".join(str(8 * each) for each in weights), 8 * gradients, 8 * adam, one]
        cells += [2 * one + 16, one + 16, one]
        assert f"| {' | '.join(map(str, cells))} |" in text
        assert f"{1 - (one + 16) / (2 * one + 16):.0%}" in text


# --- Flags, commands and promises ---


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page):
    commands = re.findall(r"python grpo_mnist\.py([^`\n&|]*)", read(page))
    assert len(commands) >= 3
    for flags in commands:
        tyro.cli(Config, args=shlex.split(flags, comments=True))


def test_the_flags_are_those_of_config():
    """Every flag has its row, with its default; no row is of a flag that is not there."""
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| `?([^|`]*)`? \|", read("README.md"), re.MULTILINE))
    fields = Config.__dataclass_fields__
    assert list(rows) == [flag(name) for name in fields]
    for name, field in fields.items():
        shown, default = rows[flag(name)], field.default
        if name != "data_dir" and default is not None:  # These are described in words.
            assert shown == "off" if default is False else type(default)(shown) == default
    numbers = [str(config.num_generations) for config in (Config(), Config(baseline="group"))]
    assert re.findall(r"\d+", rows["--num-generations"]) == numbers


def test_promises_name_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", read("README.md"))
    assert len(named) > 10
    for path, name in named:
        assert f"\ndef {name}(" in read(path), (path, name)


# --- Languages and links ---


@pytest.mark.parametrize(("english", "chinese"), [PAGES[:2], PAGES[2:]])
def test_the_two_languages_agree(english, chinese):
    """The same headings by level, code, tables, links, pictures and numbers, in the same order."""
    texts = [read(page).replace("README_ch.md", "README.md") for page in (english, chinese)]
    for pattern in (
        r"^#+ ",
        r"^```.*?^```",
        r"`[^`\n]+`",
        r"\]\(([^)#]*(?:#L\d+)?)[^)]*\)",  # a heading's anchor is in its language
        r"^\|(?:-+\|)*| \|",  # rows and their cells
        r"^\d+\. |^- ",
        r"</?\w+>|<!--.*?-->",
        r"[-+]?(?<![\w.])\d[\d.,]*\d|[-+]?(?<![\w.])\d",
    ):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in texts]
        assert found[0] == found[1], pattern


def anchors(text):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not target.startswith(("http://", "https://")):
            assert file.exists(), target
            if file.suffix == ".png":
                assert file.read_bytes().startswith(b"\x89PNG"), target
            if file.suffix == ".md" and anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), target


# --- Traditional Chinese, as written in Taiwan ---

# Simplified forms that Big5 has for other reasons, as rare characters of their own.
SIMPLIFIED_IN_BIG5 = "与个么优体儿凄听圣坏复宁岭庄异怀怜惊扑扰机构气泞洁洼痒离篱网茧虱蚕触"
MAINLAND = ("数据", "默認", "信息", "網絡", "程序", "內存", "運行", "代碼", "激活", "算法", "缺省")


@pytest.mark.parametrize("page", PAGES[1::2])
def test_no_character_is_simplified_and_no_word_is_of_the_mainland(page):
    """Big5, the character set of Taiwan, has none of those that are Simplified only."""
    text = read(page).replace("演算法", "").replace("結束代碼", "")
    characters = {character for character in text if "\u3400" <= character <= "\u9fff"}
    unknown = {x for x in characters if not x.encode("big5", "ignore")}
    assert unknown | (characters & set(SIMPLIFIED_IN_BIG5)) == set()
    assert [word for word in MAINLAND if word in text] == []


# --- The header and the pins ---


def test_the_header_quotes_the_committed_result():
    defaults = rows_of("accuracy")["defaults"]
    header = " ".join(grpo_mnist.__doc__.split())
    assert f"{median(defaults['accuracy']):.1%} of the sampled answers" in header
    assert f"{median(defaults['test_accuracy']):.1%} of the test images" in header
    assert f"take {median(defaults['seconds']):.0f} s on two CPU cores (medians of" in header


def pins():
    lines = [line.split("#")[0].strip() for line in read("requirements.txt").splitlines()]
    return [Requirement(line) for line in lines if line]


def test_everything_is_pinned():
    """Each requirement, and whatever it requires in turn, has one exact version for this Python."""
    pinned = {}
    for pin in pins():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        if pin.marker is None or pin.marker.evaluate():
            name = pin.name.lower().replace("_", "-")
            assert name not in pinned
            pinned[name] = str(pin.specifier).removeprefix("==")
    for name, number in pinned.items():
        assert version(name) == number
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert re.sub(r"[-_.]+", "-", requirement.name).lower() in pinned, requirement


PYTHONS = re.findall(r"\b3\.\d+", read("requirements.txt").partition(":")[0])


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_gets_one_jax_and_no_second_tfp(python):
    assert f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]};" in read("README.md")
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    names = [p.name for p in pins() if p.marker is None or p.marker.evaluate(environment)]
    assert names.count("jax") == names.count("flax") == names.count("numpy") == 1
    assert not {"tensorflow", "tensorflow-probability"} & set(names)
