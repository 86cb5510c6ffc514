"""What the READMEs and requirements.txt say, against the results, the flags and each other."""

import re
import shlex
from importlib.metadata import requires, version
from statistics import median

import jax
import numpy as np
import pytest
import tyro
from common import rows_of
from conftest import METRICS, ROOT, flag
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from report import MARKED, by_seed, environment, points

import grpo_mnist
from grpo_mnist import Config

PAGES = ("README.md", "README_ch.md", "benchmarks/README.md", "benchmarks/README_ch.md")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# --- Figures in the English prose; that the languages agree is tested below ---


def sentences():
    """Parts of the prose with the figures that results and formulas have for them."""
    results, rows = (environment({}).globals[name] for name in ("results", "rows"))
    machine, grown, compared = results["accuracy"], rows["grown"], rows["comparison"]
    defaults, original, digits = rows["accuracy"].values()
    yield f"takes about {median(defaults['seconds']):.0f} seconds on {machine['cores']} cores"
    yield f"cores ({machine['processor']}) and ends"
    first, *_, fifth = defaults["curves"]["accuracy"][:5]
    yield f"were right, {median(first):.1%} in the first epoch, more than 95% from the fifth on"
    assert min(fifth) > 0.95
    yield f"an accuracy of {digits['accuracy'][0]:.2%} and a test accuracy of"
    yield f"{digits['test_accuracy'][0]:.2%} after {median(digits['seconds']):.0f} seconds"
    grpo, ppo = compared["batch-mean GRPO"], compared["PPO with critic"]
    networks = grpo_mnist.create_state(Config(baseline="critic")).networks
    actor, critic = (sum(x.size for x in jax.tree.leaves(network)) for network in networks)
    yield f"the actor has {actor:,} parameters, and the critic would add {critic:,}"
    seconds = [f"{median(row['epoch_seconds']):.2f} s" for row in (ppo, grpo)]
    yield f"reaches {by_seed(ppo['test_accuracy'])} here in {seconds[0]} an epoch"
    yield f"the batch as group {by_seed(grpo['test_accuracy'])} in {seconds[1]}."
    yield f"the critic is worth {points(ppo, grpo)} points"
    labels = compared["labels, tuned"]["test_accuracy"]
    yield f"trained on labels, this network reaches {by_seed(labels)} of the test images"
    yield f"costs {points(compared['KL penalty, k3'], grpo).removeprefix('-')} points](benchmarks"
    yield f"TPO {points(compared['TPO'], grpo)} points of test accuracy"
    yield f"DG {points(compared['DG, K = 4'], grpo)}."
    yield f"the batch's mean ({points(compared['batch-mean GRPO, G = 8'], grpo)})"
    yield f"the image's own ({points(grown['ratio and clip'], grpo)})"
    behind = points(compared["strong setting"], compared["labels, tuned"]).removeprefix("-")
    yield f"falls short of training on labels by {behind} points"
    lost = sum(share < 0.9 for share in grown["baseline"]["test_accuracy"])
    yield f"{('No', 'One', 'Two', 'Three')[lost]} of five seeds still collapse"
    assert sum(share > 0.97 for share in grown["K = 1, as many updates"]["test_accuracy"]) == 4
    yield "but one of five seeds collapses"
    silent = grown["ratio and clip"]["curves"]["frac_reward_zero_std"]
    yield f"by the last epoch {np.mean(silent[-1]):.0%} of these groups are silent"
    taught = rows["breaking"]["labels, the exercise's original values"]
    first, last = original["curves"]["accuracy"][0], original["accuracy"]
    yield f"they reach {median(first):.1%} and {median(last):.1%}, and even trained on the"
    yield f"labels {median(taught['accuracy']):.1%}."
    yield f"= {results['one_update']['rounds'][1]['loss']:.4f}."
    silent = [0.95**size + 0.05**size for size in (8, 64)]
    yield f"which is {silent[0]:.0%} at p = 0.95 and G = 8, and {silent[1]:.0%} at G = 64"
    yield f"At p = 0.95 that is {(0.05 / 0.95) ** 0.5:+.2f} and {-((0.95 / 0.05) ** 0.5):+.2f}"
    # Bytes a parameter, for 8 billion; the reference has weights in bf16.
    bf16, mixed = (8 * sum(numbers) for numbers in ((2, 2, 4), (2, 4, 2, 8)))
    yield f"needs {2 * bf16 + 16} GB, GRPO {bf16 + 16} GB, and {bf16} GB without"
    yield f"moments {2 * mixed + 16}, {mixed + 16} and {mixed} GB"


def test_figures_in_the_prose_are_those_of_results_and_formulas():
    text = " ".join(read("README.md").split())
    for sentence in sentences():
        assert sentence in text
    equations = re.findall(r"(?: |^)([-(][^=a-z]*\d[^=a-z]* / [\d.]+) = ([-+]\d\.\d+)", text)
    assert len(equations) == 3
    for left, right in equations:
        assert eval(left.replace("·", "*")) == pytest.approx(float(right), abs=5e-4)


def test_no_table_of_results_is_written_by_hand():
    by_hand = MARKED.sub("", read("README.md"))
    for row in re.findall(r"^\|.*", by_hand, re.MULTILINE):
        assert not re.search(r"\d\.\d+(%| s) ", row), row


def test_every_metric_is_described():
    (table,) = re.findall(r"table: metrics.*?<!-- end", read("README.md"), re.DOTALL)
    names = "".join(re.findall(r"^\| (`[^|]*)", table, re.MULTILINE))
    assert {*re.findall(r"`(\w+)`", names), "epoch"} == set(METRICS)


# --- Flags and commands ---


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


# --- Languages and links ---


@pytest.mark.parametrize(("english", "chinese"), [PAGES[:2], PAGES[2:]])
def test_the_two_languages_agree(english, chinese):
    """The same headings by level, code, tables, links, pictures and numbers, in the same order."""
    texts = [read(page).replace("_ch.", ".") for page in (english, chinese)]
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


@pytest.mark.parametrize("page", PAGES[::2])
def test_english_pages_have_chinese_in_the_link_to_the_other_language_only(page):
    text = read(page).replace("[繁體中文](README_ch.md)", "")
    assert not re.findall(r"[\u3000-\u9fff\uff00-\uffef]+", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """A heading's anchor is the one that GitHub gives it."""
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", read(page)):
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), path
        assert file.suffix != ".png" or file.read_bytes().startswith(b"\x89PNG"), path
        if file.suffix == ".md" and anchor:
            headings = re.findall(r"^#+ (.*)", read(file).lower(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", x).replace(" ", "-") for x in headings]


# --- Traditional Chinese, as written in Taiwan ---

# Simplified forms that Big5 has for other reasons, as rare characters of their own.
SIMPLIFIED_IN_BIG5 = "与个么优体儿凄听圣坏复宁岭庄异怀怜惊扑扰机构气泞洁洼痒离篱网茧虱蚕触"
MAINLAND = ("数据", "默認", "信息", "網絡", "程序", "內存", "運行", "代碼", "激活", "算法", "缺省")


@pytest.mark.parametrize("page", PAGES[1::2])
def test_no_character_is_simplified_and_no_word_is_of_the_mainland(page):
    """Big5, the character set of Taiwan, has none of those that are Simplified only."""
    text = read(page).replace("演算法", "").replace("結束代碼", "")
    characters = set(re.findall("[\u3400-\u9fff]", text))
    assert {x for x in characters if not x.encode("big5", "ignore")} == set()
    assert characters & set(SIMPLIFIED_IN_BIG5) == set()
    assert [word for word in MAINLAND if word in text] == []


# --- The header and the pins ---


def test_the_header_quotes_the_committed_result():
    defaults = rows_of("accuracy")["defaults"]
    header = " ".join(grpo_mnist.__doc__.split())
    assert f"{median(defaults['accuracy']):.1%} of the sampled answers" in header
    assert f"{median(defaults['test_accuracy']):.1%} of the test images" in header
    assert f"take {median(defaults['seconds']):.0f} s on two CPU cores (medians of" in header


PINS = re.findall(r"^[^#\n].*", read("requirements.txt"), re.MULTILINE)
PYTHONS = re.findall(r"\b3\.\d+", read("requirements.txt").partition(":")[0])


def needed(lines, environment):
    """What the lines require in an environment; what it does not say is as it is here."""
    return [x for x in map(Requirement, lines) if not x.marker or x.marker.evaluate(environment)]


def test_everything_is_pinned():
    """Each requirement, and whatever it requires in turn, has one exact version for this Python."""
    assert all(re.fullmatch(r"[\w-]+==[\w.]+( ; .*)?", pin) for pin in PINS)
    pinned = [canonicalize_name(pin.name) for pin in needed(PINS, {})]
    assert len(set(pinned)) == len(pinned)
    for pin in needed(PINS, {}):
        assert str(pin.specifier) == f"=={version(pin.name)}"
        for requirement in needed(requires(pin.name) or (), {"extra": ""}):
            assert canonicalize_name(requirement.name) in pinned, requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_gets_one_jax_and_no_second_tfp(python):
    assert f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]};" in read("README.md")
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    names = [pin.name for pin in needed(PINS, environment)]
    assert names.count("jax") == names.count("flax") == names.count("numpy") == 1
    assert not {"tensorflow", "tensorflow-probability"} & set(names)
