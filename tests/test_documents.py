"""What the READMEs and requirements.txt say, against the results, the flags and each other."""

import re
import shlex
import statistics
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import tyro
from conftest import ROOT, read_json
from packaging.requirements import Requirement

import grpo_mnist
from grpo_mnist import Config, flag

READMES = ("README.md", "README_ch.md")
RESULTS = ROOT / "benchmarks" / "results"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def accuracy_rows():
    """A table row for each command that benchmarks/accuracy.py ran."""
    for row in read_json(RESULTS / "accuracy.json")["rows"]:
        cells = [f"`{row['command']}`"]
        for name in ("first_accuracy", "accuracy", "test_accuracy"):
            figure = row[name]
            cells.append(f"{figure['median']:.1%} ({figure['min']:.1%}-{figure['max']:.1%})")
        cells.append(f"{row['seconds']['median']:.0f} s")
        yield "| " + " | ".join(cells) + " |"


def seconds(figure):
    return f"{figure['median']:.2f} s ({figure['min']:.2f}-{figure['max']:.2f})"


def speed_rows():
    """A table row for each number of rounds that benchmarks/speed.py measured."""
    for row in read_json(RESULTS / "speed.json")["rows"]:
        cells = [str(row["num_iterations"])]
        for name in ("ours", "products", "pytorch", "pytorch, indexed", "without jit"):
            cells.append(seconds(row["epoch_seconds"][name]))
        yield "| " + " | ".join(cells) + " |"


def program_rows():
    """Whole runs, first steps and memory, of ours and of PyTorch's programs."""
    speed = read_json(RESULTS / "speed.json")
    names = ("ours", "pytorch", "pytorch, indexed")
    whole, first, memory = (
        speed["whole_run"]["seconds"],
        speed["first_step"]["seconds"],
        speed["whole_run"]["megabytes"],
    )
    sizes = [
        f"{f['median']:.0f} MB ({f['min']:.0f}-{f['max']:.0f})" for f in map(memory.get, names)
    ]
    for cells in (
        ["whole run", *(seconds(whole[name]) for name in names)],
        ["to the first step", *(seconds(first[name]) if name in first else "" for name in names)],
        ["peak memory", *sizes],
    ):
        yield "| " + " | ".join(cells) + " |"


def growth_rows(kind):
    """A table row for each size that benchmarks/growth.py measured."""
    for row in read_json(RESULTS / "growth.json")["growth"][kind]["rows"]:
        speed = f"{row['images_per_second']['median']:,.0f}"
        yield f"| {row['size']:,} | {seconds(row['epoch_seconds'])} | {speed} |"


def device_rows():
    """A table row for each layout of devices that benchmarks/devices.py compared with one."""
    for row in read_json(RESULTS / "devices.json")["same"]:
        first_step, epoch = row["first_step"], row["epoch"]
        equal = first_step["actions_equal"] and first_step["rewards_equal"]
        one = first_step["parameters_after_1_round"]["largest_by_seed"]
        four = first_step["parameters_after_4_rounds"]["largest_by_seed"]
        points = [100 * difference for difference in epoch["difference_by_seed"]]
        steps = epoch["first_step_with_a_flip_by_seed"]
        shares = epoch["share_of_answers_flipped_by_seed"]
        cells = [str(row["devices"]), str(row["processes"]), "equal" if equal else "not equal"]
        cells += [f"{max(one):.1e}", f"{statistics.median(four):.1e}", f"{max(four):.1e}"]
        cells += [f"{statistics.mean(points):+.2f} ({min(points):+.2f} to {max(points):+.2f})"]
        cells += [f"{min(steps)} to {max(steps)}", f"{min(shares):.1%} to {max(shares):.1%}"]
        yield "| " + " | ".join(cells) + " |"


def death_rows():
    """A table row for each process that benchmarks/devices.py killed."""
    for row in read_json(RESULTS / "devices.json")["killed"]:
        lines = f"{row['others_with_own_line']} of {row['others']}"
        same = f"{row['same_result']} of {row['resumed']}"
        cells = [str(row["processes"]), str(row["killed"]), seconds(row["seconds"]), lines, same]
        yield "| " + " | ".join(cells) + " |"


def interval(figures):
    return f"{figures['mean']:.2%} ± {figures['interval_95']:.2%}"


def algorithm_rows():
    """A table row for each algorithm that benchmarks/comparison.py ran, and for the labels."""
    results = read_json(RESULTS / "comparison.json")
    for row in results["algorithms"] + results["supervised"]:
        cells = [row["name"], interval(row["accuracy"]), interval(row["test_accuracy"])]
        if "command" in row:
            cells[1:1] = [f"`{row['command']}`"]
            cells.append(f"{row['epoch_seconds']['median']:.2f} s")
            cells.append(f"{row['training_state_bytes']['total'] / 1e6:.2f} MB")
            cells.append(f"{row['reward_bits'] / 1e6:.2f} M")
        else:
            cells[1:1] = ["cross-entropy"]
            cells += [""] * 3
        yield "| " + " | ".join(cells) + " |"


def strong_rows():
    """The same for the settings that were tuned."""
    results = read_json(RESULTS / "comparison.json")
    for row in (results["strong"], results["equal_feedback"]):
        cells = [row["name"], f"`{row['command']}`"]
        cells += [interval(row["accuracy_by_epoch"][4]), interval(row["accuracy"])]
        cells += [interval(row["test_accuracy"]), f"{row['epoch_seconds']['median']:.2f} s"]
        cells += [f"{row['reward_bits'] / 1e6:.2f} M"]
        yield "| " + " | ".join(cells) + " |"


def fault_rows():
    """A table row for each fault that benchmarks/faults.py tried."""
    for row in read_json(RESULTS / "faults.json")["rows"]:
        yield f"| {row['fault']} | {row['promise']} | {row['tried']} | {row['kept']} |"


CHINESE = {  # the names of rows that README_ch.md translates
    "REINFORCE, K = 1": "REINFORCE，K = 1",
    "REINFORCE, batch baseline, K = 1": "REINFORCE，批次基準，K = 1",
    "batch-mean GRPO": "批次平均 GRPO",
    "batch-mean GRPO, G = 8": "批次平均 GRPO，G = 8",
    "GRPO, G = 8": "GRPO，G = 8",
    "moving average": "移動平均",
    "PPO with critic": "PPO，含評論家",
    "whole run": "整次執行",
    "to the first step": "到第一步為止",
    "peak memory": "記憶體峰值",
    "equal": "相同",
    "RLOO, G = 8": "RLOO，G = 8",
    "Dr. GRPO, G = 8": "Dr. GRPO，G = 8",
    "DAPO, G = 8": "DAPO，G = 8",
    "labels, batch 1024": "標籤，每批 1024 張",
    "labels, batch 64": "標籤，每批 64 張",
    "cross-entropy": "交叉熵",
    "strong setting": "高準確率設定",
    "equal feedback": "相同回饋量",
    "SIGKILL at a random moment": "在隨機時刻 SIGKILL",
    "SIGKILL at the n-th write, fsync, rename or unlink, every n": (
        "在第 n 次寫入、fsync、改名或刪除時 SIGKILL，n 取遍所有值"
    ),
    "power cut there: contents not synced are lost": "同上但為斷電：未同步的內容遺失",
    "power cut there: names not synced are lost too": "同上但為斷電：未同步的檔名也遺失",
    "resumed after each epoch": "在每個週期之後接續",
    "newest checkpoint cut short": "最新的檢查點被截短",
    "newest checkpoint emptied": "最新的檢查點被清空",
    "newest checkpoint deleted": "最新的檢查點被刪除",
    "one bit of the newest checkpoint flipped": "最新的檢查點有一個位元翻轉",
    "both checkpoints damaged": "兩個檢查點都損壞",
    "disk full": "磁碟已滿",
    "output directory moved away": "輸出目錄被移走",
    "a file in its place": "輸出目錄被換成檔案",
    "SIGINT at a random moment": "在隨機時刻 SIGINT",
    "SIGTERM at a random moment": "在隨機時刻 SIGTERM",
    "checkpoint of a newer format": "檢查點的格式較新",
    "checkpoint of another library version": "檢查點的函式庫版本不同",
    "NaN in the parameters": "參數出現 NaN",
    "NaN in the gradients": "梯度出現 NaN",
    "NaN in the data": "資料出現 NaN",
    "a second run in the directory": "同一目錄的第二次執行",
    "resumed, the same result": "接續後結果相同",
    "a notice; from the one before, resumed, the same result": "發出通知；從前一個接續後結果相同",
    "one line, status 1": "一行訊息，結束代碼 1",
    "one line, status 1; resumed, the same result": "一行訊息，結束代碼 1；接續後結果相同",
    "one line, status 130; resumed, the same result": "一行訊息，結束代碼 130；接續後結果相同",
    "one line, status 143; resumed, the same result": "一行訊息，結束代碼 143；接續後結果相同",
    "one line with both, status 2": "一行訊息列出兩者，結束代碼 2",
    "a notice with both": "通知列出兩者",
    "one line, status 2; the first is not disturbed": "一行訊息，結束代碼 2；第一次執行不受影響",
}


@pytest.mark.parametrize("readme", READMES)
def test_the_tables_are_the_committed_results(readme):
    lines = read(readme).splitlines()
    rows = [line for line in lines if re.match(r"\| .*(\d(%| s| MB) |\d+ \| \d+ \|$)", line)]
    expected = [*accuracy_rows(), *speed_rows(), *program_rows()]
    for kind in read_json(RESULTS / "growth.json")["growth"]:
        expected += growth_rows(kind)
    expected += [*algorithm_rows(), *strong_rows(), *fault_rows(), *device_rows(), *death_rows()]
    if readme == "README_ch.md":
        expected = [
            " | ".join(CHINESE.get(cell, cell) for cell in f"{row} ".split(" | ")).strip()
            for row in (row.removeprefix("| ") for row in expected)
        ]
        expected = [f"| {row}" for row in expected]
    assert rows == expected


@pytest.mark.parametrize("readme", READMES)
def test_the_machine_is_that_of_the_committed_results(readme):
    text = read(readme)
    accuracy, speed = (read_json(RESULTS / f"{name}.json") for name in ("accuracy", "speed"))
    for path in RESULTS.glob("*.json"):
        for fact in ("versions", "processor", "cores"):
            assert read_json(path)[fact] == accuracy[fact]
        assert read_json(path)["date"] in text
    assert re.search(rf"\b{accuracy['cores']} (cores|核心)", text)
    assert accuracy["processor"] in text
    for name, number in (accuracy["versions"] | {"PyTorch": speed["pytorch"]}).items():
        if name in ("jax", "flax", "PyTorch", "python"):
            assert f"{name if name != 'python' else 'Python'} {number.split('+')[0]}" in text
    repeats = speed["rows"][0]["epoch_seconds"]["ours"]["n"]
    assert re.search(rf"(\(range\) of|共)\s+{repeats}\b", text)


def test_the_results_reach_what_was_asked_for():
    """Whoever measures anew and commits worse figures shall notice."""
    defaults, original = read_json(RESULTS / "accuracy.json")["rows"]
    assert len(defaults["runs"]) == len(original["runs"]) == 5
    assert defaults["mean_accuracy"] >= 0.9734
    assert defaults["accuracy"]["min"] > 0.97
    assert defaults["mean_test_accuracy"] >= 0.97
    assert 0.7 < original["mean_accuracy"] < 0.9
    comparison = read_json(RESULTS / "comparison.json")
    assert len(comparison["algorithms"]) >= 9
    for row in [comparison["strong"], comparison["equal_feedback"], *comparison["algorithms"]]:
        assert len(row["test_accuracy"]["by_seed"]) == 5
    strong, (_, labels) = comparison["strong"]["test_accuracy"], comparison["supervised"]
    assert strong["mean"] + strong["interval_95"] > labels["test_accuracy"]["mean"] > 0.98
    assert comparison["strong"]["accuracy_by_epoch"][4]["mean"] >= 0.9734
    assert comparison["equal_feedback"]["test_accuracy"]["mean"] >= 0.98
    assert comparison["equal_feedback"]["reward_bits"] <= 1_000_000
    assert comparison["ratio_64_answers_to_1"]["median"] <= 1.3
    assert min(comparison["algorithms"][0]["test_accuracy"]["by_seed"]) < 0.88
    check_speed()
    check_devices()
    faults = {row["fault"]: row for row in read_json(RESULTS / "faults.json")["rows"]}
    assert all(row["kept"] == row["tried"] for row in faults.values())
    assert faults["SIGKILL at a random moment"]["tried"] == 50
    assert faults["one bit of the newest checkpoint flipped"]["tried"] == 200


def check_speed():
    speed = read_json(RESULTS / "speed.json")
    for row, rounds, floor in zip(speed["rows"], (4, 1), (1.3, 1.55), strict=True):
        assert row["num_iterations"] == rounds
        assert min(figure["n"] for figure in row["epoch_seconds"].values()) >= 5
        ratios = {name: figure["median"] for name, figure in row["ratios"].items()}
        assert ratios["ours / products"] <= floor
        assert ratios["ours / pytorch"] < 0.8
        assert ratios["ours / pytorch, indexed"] < 1
        assert ratios["ours / without jit"] <= 0.12
    assert speed["whole_run"]["ratios"]["ours / pytorch"]["median"] < 1
    assert speed["first_step"]["ratios"]["ours / pytorch"]["median"] < 2
    assert speed["whole_run"]["megabytes"]["ours"]["median"] < 750


def check_devices():
    devices = read_json(RESULTS / "devices.json")
    assert {(row["devices"], row["processes"]) for row in devices["same"]} == {
        *((2, 1), (8, 1), (2, 2), (4, 4))
    }
    for row in devices["same"]:
        assert row["first_step"]["actions_equal"]
        assert row["first_step"]["rewards_equal"]
        assert abs(statistics.mean(row["epoch"]["difference_by_seed"])) < 0.001
    for row in devices["killed"]:
        assert row["seconds"]["max"] < 120
        assert row["same_result"] == row["resumed"]


def speed_figures():
    """The ratios and the slopes that the prose names."""
    speed, growth = (read_json(RESULTS / f"{name}.json") for name in ("speed", "growth"))
    kinds = [row["ratios"] for row in speed["rows"]]
    kinds += [speed[name]["ratios"] for name in ("whole_run", "first_step")]
    for ratios in kinds:
        for name, figure in ratios.items():
            without_jit = name == "ours / without jit"
            yield f"{1 / figure['median']:.0f}" if without_jit else f"{figure['median']:.2f}"
    for each in growth["growth"].values():
        yield f"{each['slopes']['overall']:.2f}"
    yield f"{growth['growth']['width']['slopes']['at_the_end']:.2f}"


@pytest.mark.parametrize("readme", READMES)
def test_figures_in_the_prose_are_the_committed_results(readme):
    comparison = read_json(RESULTS / "comparison.json")
    figures = [
        f"{comparison['ratio_64_answers_to_1']['median']:.2f}",
        interval(comparison["strong"]["test_accuracy"]),
        interval(comparison["supervised"][1]["test_accuracy"]),
        f"{1 - comparison['equal_feedback']['test_accuracy']['mean']:.2%}",
        f"{comparison['equal_feedback']['reward_bits']:,}",
        *speed_figures(),
    ]
    prose = [line for line in read(readme).splitlines() if not line.startswith("|")]
    for figure in figures:
        assert figure in "\n".join(prose), figure


@pytest.mark.parametrize("readme", READMES)
def test_every_command_in_a_readme_parses(readme):
    commands = re.findall(r"python grpo_mnist\.py([^`\n&|]*)", read(readme))
    assert len(commands) >= 3
    for flags in commands:
        tyro.cli(Config, args=shlex.split(flags, comments=True))


@pytest.mark.parametrize("readme", READMES)
def test_the_flags_are_those_of_config(readme):
    """Every flag has its row, with its default; no row is of a flag that is not there."""
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| `?([^|`]*)`? \|", read(readme), re.MULTILINE))
    assert list(rows) == [flag(name) for name in Config.__dataclass_fields__]
    defaults = Config()
    for name in set(Config.__dataclass_fields__) - {"data_dir"}:
        default = getattr(defaults, name)
        if default is None:
            continue  # said in words
        if default is False:
            assert rows[flag(name)] == "off"
        else:
            assert type(default)(rows[flag(name)]) == default


def test_the_two_languages_agree():
    """The same headings by level, code, tables, links, pictures and numbers, in the same order."""
    one, other = read(READMES[0]), read(READMES[1])
    for pattern in (
        r"^#+ ",
        r"^```.*?^```",
        r"`[^`\n]+`",
        r"\]\((?!README)[^)]*\)",
        r"^\|",
        r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d",
    ):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (one, other)]
        assert found[0] == found[1], pattern


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(readme)):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_the_header_quotes_the_committed_result():
    defaults = read_json(RESULTS / "accuracy.json")["rows"][0]
    accuracy, test_accuracy = defaults["accuracy"]["median"], defaults["test_accuracy"]["median"]
    header = " ".join(grpo_mnist.__doc__.split())
    assert f"{accuracy:.1%} of the sampled answers" in header
    assert f"{test_accuracy:.1%} of the test images" in header
    assert f"after {defaults['seconds']['median']:.0f} s in all" in header


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
        try:
            assert version(name) == number
        except PackageNotFoundError:
            pytest.fail(f"{name} is pinned and not installed")
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert re.sub(r"[-_.]+", "-", requirement.name).lower() in pinned, requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_one_jax_and_no_second_tfp(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    names = [p.name for p in pins() if p.marker is None or p.marker.evaluate(environment)]
    assert names.count("jax") == names.count("flax") == names.count("numpy") == 1
    assert "tensorflow-probability" not in names
    assert "tensorflow" not in names
