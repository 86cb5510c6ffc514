"""What the READMEs and requirements.txt say, against the results, the flags and each other."""

import math
import re
import shlex
import statistics
from importlib.metadata import PackageNotFoundError, requires, version

import jax
import numpy as np
import pytest
import tuning
import tyro
from accuracy import PROMISED
from comparison import ALGORITHMS, DEFAULTS, TUNED
from conftest import METRICS, ROOT, flag, read_json
from one_update import signed
from packaging.requirements import Requirement

import grpo_mnist
from grpo_mnist import Config, group_advantages

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


def update_rows():
    """A table row for each image of the update by hand."""
    update = read_json(RESULTS / "one_update.json")
    answers = zip(
        update["labels"],
        update["answers"],
        update["rounds"][0]["probabilities"],
        update["rewards"],
        update["advantages"],
        strict=True,
    )
    for number, (label, answer, probability, reward, advantage) in enumerate(answers, start=1):
        cells = [number, label, answer, f"{probability:.1%}", f"{reward:.0f}", f"{advantage:+.4f}"]
        yield "| " + " | ".join(map(str, cells)) + " |"


def ratio_rows():
    """A table row for each of its rounds; what the clip holds is bold."""
    for number, each in enumerate(read_json(RESULTS / "one_update.json")["rounds"], start=1):
        ratios = [
            f"**{ratio:.3f}**" if held else f"{ratio:.3f}"
            for ratio, held in zip(each["ratios"], each["held"], strict=True)
        ]
        cells = [str(number), *ratios, signed(each["loss"]), f"{each['grad_norm']:.3f}"]
        yield "| " + " | ".join(cells) + " |"


EIGHT_REWARDS = [[7.2, 8.5, 6.1, 9.0, 7.8, 6.5, 8.2, 7.5]]


def eight_rows():
    """The rewards of eight answers to one prompt, and what the trainer makes of them."""
    raw, divided = (
        np.asarray(group_advantages(EIGHT_REWARDS, baseline="group", scale_rewards=scale))
        for scale in ("none", "group")
    )
    yield "| reward | " + " | ".join(f"{reward:.1f}" for reward in EIGHT_REWARDS[0]) + " |"
    for name, advantages in (
        ("minus the mean", raw),
        ("divided by the deviation", divided),
        ("divided by the sample deviation", divided * math.sqrt(7 / 8)),
    ):
        yield f"| {name} | " + " | ".join(f"{advantage:+.2f}" for advantage in advantages[0]) + " |"


def breaking_rows():
    """A table row for each run that benchmarks/breaking.py broke."""
    for row in read_json(RESULTS / "breaking.json")["rows"]:
        worst = row["worst_seed"]
        cells = [row["name"], f"`{row['command']}`", interval(row["accuracy"])]
        cells += [interval(row["test_accuracy"]), f"{row['test_accuracy']['by_seed'][worst]:.1%}"]
        cells += [f"{min(row['test_answers_by_digit'][worst]):,}"]
        yield "| " + " | ".join(cells) + " |"


def circulating_rows():
    """What is promised for the exercise's original values, what they give, and what labels give."""
    defaults, original, _ = read_json(RESULTS / "accuracy.json")["rows"]
    labels = read_json(RESULTS / "breaking.json")["labels"]["accuracy_by_epoch"]
    promised = [f"{share}%" for share in PROMISED.values()]
    measured, ours = (
        [f"{row[name]['median']:.1%}" for name in ("first_accuracy", "accuracy")]
        for row in (original, defaults)
    )
    taught = [f"{figures['mean']:.1%}" for figures in (labels[0], labels[-1])]
    for name, cells in (
        ("what the table promises", promised),
        ("these values, sampled answers", measured),
        ("the labels themselves, mean probability of the right digit", taught),
        ("`python grpo_mnist.py`, sampled answers", ours),
    ):
        yield f"| {name} | " + " | ".join(cells) + " |"


def metric_cells():
    """The figures of the defaults in the first and the last epoch, by metric, mean of the seeds.

    Results without a reward are of a program in which the accuracy was the mean reward.
    """
    (row,) = (r for r in read_json(RESULTS / "breaking.json")["rows"] if r["name"] == "defaults")
    cells = {}
    for name, by_epoch in ({"reward": row["by_epoch"]["accuracy"]} | row["by_epoch"]).items():
        kind = ".1%" if "accuracy" in name else ".2%" if "clip" in name else ".2g"
        cells[name] = [f"{statistics.mean(by_epoch[epoch]):{kind}}" for epoch in (0, -1)]
    return cells


def seconds(figure):
    return f"{figure['median']:.2f} s ({figure['min']:.2f}-{figure['max']:.2f})"


PYTORCH = ("pytorch", "pytorch, indexed", "pytorch, compiled")


def speed_rows():
    """A table row for each number of rounds that benchmarks/speed.py measured."""
    for row in read_json(RESULTS / "speed.json")["rows"]:
        cells = [str(row["num_iterations"])]
        for name in ("ours", "products", *PYTORCH, "without jit"):
            cells.append(seconds(row["epoch_seconds"][name]))
        yield "| " + " | ".join(cells) + " |"


def program_rows():
    """Whole programs, ours and PyTorch's: how long to what, and memory."""
    speed = read_json(RESULTS / "speed.json")
    names = ("ours", "ours, cached", *PYTORCH)
    for words, kind in (
        ("whole run", "whole_run"),
        ("to 97.34% of an epoch's answers right", "target"),
        ("to the first step", "first_step"),
        ("to the first line", "first_line"),
    ):
        figures = map(speed[kind]["seconds"].get, names)
        cells = [words, *(seconds(figure) if figure else "" for figure in figures)]
        yield "| " + " | ".join(cells) + " |"
    memory = [speed["whole_run"]["megabytes"][name] for name in names]
    sizes = [f"{f['median']:.0f} MB ({f['min']:.0f}-{f['max']:.0f})" for f in memory]
    yield "| " + " | ".join(["peak memory", *sizes]) + " |"


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


def points(figures):
    """A difference of shares, in percentage points."""
    return f"{100 * figures['mean']:+.2f} ± {100 * figures['interval_95']:.2f}"


def comparison_rows():
    """What benchmarks/comparison.py ran, by name."""
    return {row["name"]: row for row in read_json(RESULTS / "comparison.json")["rows"]}


def algorithm_rows():
    """A table row for each algorithm that benchmarks/comparison.py ran, and for the labels."""
    rows = comparison_rows()
    for name in ALGORITHMS:
        row = rows[name]
        cells = [name, f"`{row['command']}`", interval(row["accuracy"])]
        cells += [interval(row["test_accuracy"])]
        cells.append("" if name == DEFAULTS else points(row["difference"]))
        cells.append(f"{row['epoch_seconds']['median']:.2f} s")
        cells.append(f"{row['training_state_bytes'] / 1e6:.2f} MB")
        cells.append(f"{row['reward_bits'] / 1e6:.2f} M")
        yield "| " + " | ".join(cells) + " |"
    for row in read_json(RESULTS / "comparison.json")["supervised"]:
        accuracies = interval(row["accuracy"]), interval(row["test_accuracy"])
        yield "| " + " | ".join([row["name"], "cross-entropy", *accuracies, *[""] * 4]) + " |"


def strong_rows():
    """The same for the settings that were tuned."""
    rows = comparison_rows()
    for name in TUNED:
        row = rows[name]
        cells = [name, f"`{row['command']}`"]
        cells += [interval(row["accuracy_by_epoch"][4]), interval(row["accuracy"])]
        cells += [interval(row["test_accuracy"]), f"{row['epoch_seconds']['median']:.2f} s"]
        cells += [f"{row['reward_bits'] / 1e6:.2f} M"]
        yield "| " + " | ".join(cells) + " |"


def published_rows():
    """A table row for each method of the study that benchmarks/published.py ran again."""
    for row in read_json(RESULTS / "published.json")["rows"]:
        published, seeds = row["published_test_error"], row["test_error"]["by_seed"]
        cells = [row["name"], f"{published:.1%}" if published else "", interval(row["test_error"])]
        yield f"| {' | '.join(cells)} | {min(seeds):.1%} to {max(seeds):.1%} |"


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
    "to the first line": "到第一行為止",
    "to 97.34% of an epoch's answers right": "到一個週期的答案有 97.34% 答對為止",
    "peak memory": "記憶體峰值",
    "equal": "相同",
    "RLOO, G = 8": "RLOO，G = 8",
    "Dr. GRPO, G = 8": "Dr. GRPO，G = 8",
    "DAPO, G = 8": "DAPO，G = 8",
    "MaxRL, G = 8": "MaxRL，G = 8",
    "MaxRL, no baseline, G = 8": "MaxRL，沒有基準，G = 8",
    "DG, K = 1": "DG，K = 1",
    "DG, K = 4": "DG，K = 4",
    "KL penalty, exact": "KL 懲罰，精確值",
    "KL penalty, k3": "KL 懲罰，k3",
    "KL penalty, k3_corrected": "KL 懲罰，k3_corrected",
    "labels, tuned": "標籤，經過調校",
    "labels, batch 1024": "標籤，每批 1024 張",
    "labels, batch 64": "標籤，每批 64 張",
    "cross-entropy": "交叉熵",
    "reward": "獎勵",
    "minus the mean": "減去平均",
    "divided by the deviation": "再除以標準差",
    "divided by the sample deviation": "改除以樣本標準差",
    "what the table promises": "那張表的承諾",
    "these values, sampled answers": "這組數值，抽樣的答案",
    "the labels themselves, mean probability of the right digit": "直接用標籤，正確數字的平均機率",
    "`python grpo_mnist.py`, sampled answers": "`python grpo_mnist.py`，抽樣的答案",
    "defaults": "預設值",
    "class collapse": "類別崩塌",
    "class collapse, entropy bonus": "類別崩塌，加上熵獎勵",
    "no baseline, K = 1": "沒有基準，K = 1",
    "no baseline, K = 4": "沒有基準，K = 4",
    "K = 64, no clipping": "K = 64，不裁剪",
    "learning rate x 30": "學習率 x 30",
    "learning rate constant": "學習率固定",
    "strong setting": "高準確率設定",
    "equal feedback": "相同回饋量",
    "SIGKILL at a random moment": "在隨機時刻 SIGKILL",
    "SIGKILL at the n-th write, fsync, rename or unlink, every n": (
        "在第 n 次寫入、fsync、改名或刪除時 SIGKILL，n 取遍所有值"
    ),
    "power cut there: contents not synced are lost": "在同樣的時機斷電：未同步的內容遺失",
    "power cut there: names not synced are lost too": "在同樣的時機斷電：未同步的檔名也遺失",
    "resumed after each epoch": "在每個週期之後續訓",
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
    "resumed, the same result": "續訓後結果相同",
    "a notice; from the one before, resumed, the same result": "發出通知；從前一個續訓後結果相同",
    "one line, status 1": "一行訊息，結束代碼 1",
    "one line, status 1; resumed, the same result": "一行訊息，結束代碼 1；續訓後結果相同",
    "one line, status 130; resumed, the same result": "一行訊息，結束代碼 130；續訓後結果相同",
    "one line, status 143; resumed, the same result": "一行訊息，結束代碼 143；續訓後結果相同",
    "ends at once, status 130; resumed, the same result": "立即結束，結束代碼 130；續訓後結果相同",
    "ends at once, status 143; resumed, the same result": "立即結束，結束代碼 143；續訓後結果相同",
    "one line with both, status 2": "一行訊息列出兩者，結束代碼 2",
    "a notice with both": "通知列出兩者",
    "one line, status 2; the first is not disturbed": "一行訊息，結束代碼 2；第一次執行不受影響",
}


def tables(readme):
    """The bodies of the tables, each a list of rows."""
    found = re.findall(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", read(readme), re.MULTILINE)
    return [body.splitlines() for body in found]


def in_chinese(row):
    cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
    cells = [re.sub(r" to (?=[-+\d])", " 至 ", CHINESE.get(cell, cell)) for cell in cells]
    cells = [re.sub(r"^(\d+) of (\d+)$", r"\1 / \2", cell) for cell in cells]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("readme", READMES)
def test_the_tables_are_the_committed_results(readme):
    """Every result in its place, and no other table with figures of accuracy or time."""
    expected = [update_rows(), ratio_rows(), eight_rows(), algorithm_rows(), breaking_rows()]
    expected += [accuracy_rows(), circulating_rows(), strong_rows(), published_rows()]
    expected += [speed_rows(), program_rows()]
    expected += map(growth_rows, read_json(RESULTS / "growth.json")["growth"])
    expected += [fault_rows(), device_rows(), death_rows()]
    expected = [list(rows) for rows in expected]
    if readme == "README_ch.md":
        expected = [[in_chinese(row) for row in rows] for rows in expected]
    found = tables(readme)
    for rows in expected:
        assert rows in found, rows[0]
    assert [rows for rows in found if rows in expected] == expected
    others = [row for rows in found if rows not in expected for row in rows]
    metrics = [row for row in others if row.startswith("| `") and row.split("`")[1] in METRICS]
    for row in others:
        assert row in metrics or not re.search(r"\d\.\d+(%| s) ", row), row


@pytest.mark.parametrize("readme", READMES)
def test_the_metrics_are_those_of_the_program_with_the_figures_of_the_defaults(readme):
    (body,) = (rows for rows in tables(readme) if rows[0].startswith("| `accuracy` |"))
    rows = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in body]
    described = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert {*described, "epoch"} == set(METRICS)
    cells = {re.findall(r"\w+", row[0])[0]: row[2:4] for row in rows}
    for name, figures in metric_cells().items():
        assert cells[name] == figures, name


@pytest.mark.parametrize("readme", READMES)
def test_gigabytes_are_as_many_as_they_must_be(readme):
    """Bytes a parameter, for 8 billion; the reference has weights in bf16."""
    text = read(readme)
    for weights, gradients, adam in (((2,), 2, 4), ((2, 4), 2, 8)):
        one = 8 * (sum(weights) + gradients + adam)
        cells = [" + ".join(str(8 * each) for each in weights), 8 * gradients, 8 * adam, one]
        cells += [2 * one + 16, one + 16, one]
        assert f"| {' | '.join(map(str, cells))} |" in text
        assert f"{1 - (one + 16) / (2 * one + 16):.0%}" in text


@pytest.mark.parametrize("readme", READMES)
def test_the_machine_is_that_of_the_committed_results(readme):
    text = " ".join(read(readme).split())
    accuracy, speed = (read_json(RESULTS / f"{name}.json") for name in ("accuracy", "speed"))
    for path in RESULTS.glob("*.json"):
        for fact in ("versions", "cores"):
            assert read_json(path)[fact] == accuracy[fact]
        for fact in ("date", "processor"):
            assert read_json(path)[fact] in text
    assert re.search(rf"\b{accuracy['cores']} (cores|個核心)", text)
    for name, number in (accuracy["versions"] | {"PyTorch": speed["pytorch"]}).items():
        if name in ("jax", "flax", "PyTorch", "python"):
            assert f"{name if name != 'python' else 'Python'} {number.split('+')[0]}" in text


def test_the_results_reach_what_was_asked_for():
    """Whoever measures anew and commits worse figures shall notice."""
    defaults, original, digits = read_json(RESULTS / "accuracy.json")["rows"]
    assert len(defaults["runs"]) == len(original["runs"]) == len(digits["runs"]) == 5
    assert digits["accuracy"]["min"] > 0.98
    assert defaults["mean_accuracy"] >= 0.9734
    assert defaults["accuracy"]["min"] > 0.97
    assert defaults["mean_test_accuracy"] >= 0.97
    assert 0.7 < original["mean_accuracy"] < 0.9
    check_comparison()
    check_published()
    check_speed()
    check_devices()
    check_what_was_broken()
    faults = {row["fault"]: row for row in read_json(RESULTS / "faults.json")["rows"]}
    assert all(row["kept"] == row["tried"] for row in faults.values())
    assert faults["SIGKILL at a random moment"]["tried"] == 50
    assert faults["one bit of the newest checkpoint flipped"]["tried"] == 200


def check_comparison():
    comparison, rows = read_json(RESULTS / "comparison.json"), comparison_rows()
    assert list(rows) == [*ALGORITHMS, *TUNED]
    for name, flags in (ALGORITHMS | TUNED).items():
        assert rows[name]["command"] == f"python grpo_mnist.py {flags}".strip()
        by_seed = rows[name]["test_accuracy"]["by_seed"]
        assert len(by_seed) == (10 if name in TUNED else 5)
        if name in ALGORITHMS:
            others = rows[DEFAULTS]["test_accuracy"]["by_seed"]
            pairs = [one - other for one, other in zip(by_seed, others, strict=True)]
            assert np.allclose(rows[name]["difference"]["by_seed"], pairs)
    strong, equal = rows["strong setting"], rows["equal feedback"]
    assert strong["test_accuracy"]["mean"] >= 0.984
    assert strong["accuracy_by_epoch"][4]["mean"] >= 0.9734
    assert equal["test_accuracy"]["mean"] >= 0.982
    assert equal["reward_bits"] <= 1_000_000
    assert "--num-generations" not in equal["command"]
    assert comparison["ratio_64_answers_to_1"]["median"] <= 1.3
    assert min(rows["REINFORCE, K = 1"]["test_accuracy"]["by_seed"]) < 0.88
    tuned = read_json(RESULTS / "tuning.json")
    assert len(tuned["labels"]) == len(tuned["10 epochs"])
    for kind, row in (("10 epochs", strong), ("1,000,000 reward bits", equal)):
        candidate = tuning.taken(kind, tuned[kind])["candidate"]
        # 16 passes over 60,000 images, as the 20 over 50,000: at most 1,000,000 answers.
        flags = candidate.replace("--num-epochs 20", "--num-epochs 16")
        assert row["command"] == f"python grpo_mnist.py {flags}"
    candidate = tuning.taken("labels", tuned["labels"])["candidate"]
    labels, against = comparison["supervised"][-1], comparison["strong_minus_labels"]
    assert candidate.items() <= labels.items()
    by_seed = (row["test_accuracy"]["by_seed"] for row in (strong, labels))
    assert np.allclose(against["by_seed"], np.subtract(*by_seed))
    assert against["mean"] + against["interval_95"] > 0  # as good as the labels, or not told apart
    assert labels["test_accuracy"]["mean"] > 0.98


def lost_a_digit():
    """How many seeds of the published study's methods ended without one of the digits."""
    rows = read_json(RESULTS / "published.json")["rows"]
    return {r["name"]: sum(error > 0.13 for error in r["test_error"]["by_seed"]) for r in rows}


def check_published():
    published = read_json(RESULTS / "published.json")
    assert published["reward_bits"] == 1_000_000
    for row in published["rows"]:
        error = row["test_error"]
        assert len(error["by_seed"]) == 20
        assert all(each < 0.061 or each > 0.13 for each in error["by_seed"])
        if row["published_test_error"]:
            assert abs(error["mean"] - row["published_test_error"]) < error["interval_95"]
    assert lost_a_digit()["DG"] == lost_a_digit()["TPO"] == 0


def check_what_was_broken():
    rows = {row["name"]: row for row in read_json(RESULTS / "breaking.json")["rows"]}
    lost = {  # in how many seeds a digit is hardly ever answered
        name: sum(min(counts) < 100 for counts in row["test_answers_by_digit"])
        for name, row in rows.items()
    }
    assert lost["defaults"] == lost["no baseline, K = 4"] == lost["K = 64"] == 0
    assert lost["class collapse"] == 1
    assert lost["class collapse, entropy bonus"] == 0
    assert lost["no baseline, K = 1"] == 3
    assert lost["K = 1"] == 2
    assert lost["learning rate x 30"] == 5
    accuracy = {name: row["accuracy"]["mean"] for name, row in rows.items()}
    assert 0.0045 < accuracy["defaults"] - accuracy["no baseline, K = 4"] < 0.0055
    assert abs(accuracy["K = 64"] - accuracy["defaults"]) < 0.002
    assert accuracy["K = 64, no clipping"] < 0.9
    assert accuracy["learning rate constant"] < accuracy["defaults"]
    dead = rows["learning rate x 30"]
    for counts in dead["test_answers_by_digit"]:
        assert max(counts) == sum(counts)
    for name in ("entropy", "grad_norm", "loss"):
        assert np.allclose(dead["by_epoch"][name][1:], 0, atol=1e-6)
    algorithms = {row["command"]: row for row in comparison_rows().values()}
    for row in rows.values():  # the same command gave the same figures
        if row["command"] in algorithms:
            for metric in ("accuracy", "test_accuracy"):
                assert row[metric]["mean"] == algorithms[row["command"]][metric]["mean"]


def check_speed():
    speed = read_json(RESULTS / "speed.json")
    for row, rounds, floor in zip(speed["rows"], (4, 1), (1.2, 1.4), strict=True):
        assert row["num_iterations"] == rounds
        assert min(figure["n"] for figure in row["epoch_seconds"].values()) >= 5
        ratios = {name: figure["median"] for name, figure in row["ratios"].items()}
        assert ratios["ours / products"] <= floor
        for name in PYTORCH:
            assert ratios[f"ours / {name}"] < 0.7
        assert ratios["ours / without jit"] <= 0.12
    for kind, pair, bound in (
        ("whole_run", "ours / pytorch", 0.7),
        ("whole_run", "ours / pytorch, indexed", 0.8),
        ("first_step", "ours / pytorch", 1.6),
        ("first_step", "ours, cached / pytorch", 1),
        ("target", "ours / pytorch, indexed", 0.65),
    ):
        assert speed[kind]["ratios"][pair]["median"] < bound
    assert speed["first_line"]["seconds"]["ours"]["median"] < 0.5
    assert speed["whole_run"]["megabytes"]["ours"]["median"] < 620


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


def tutorial_figures():
    """The figures that the prose names, by what they are."""
    defaults, _, digits = read_json(RESULTS / "accuracy.json")["rows"]
    comparison, speed, growth, update, breaking = (
        read_json(RESULTS / f"{name}.json")
        for name in ("comparison", "speed", "growth", "one_update", "breaking")
    )
    machine = read_json(RESULTS / "accuracy.json")
    algorithms = comparison_rows()
    strong, equal = algorithms["strong setting"], algorithms["equal feedback"]
    networks = grpo_mnist.create_state(Config(baseline="critic")).networks
    actor, critic = (sum(x.size for x in jax.tree.leaves(network)) for network in networks)
    megabytes = {
        name: f"{algorithms[name]['training_state_bytes'] / 1e6:.2f}"
        for name in ("batch-mean GRPO", "PPO with critic")
    }
    labels = interval(comparison["supervised"][-1]["test_accuracy"])
    digits_end = digits["runs"][0]
    figures = {
        "CORES": f"{machine['cores']}",
        "PROCESSOR": machine["processor"],
        "DEFAULT_SECONDS": f"{defaults['seconds']['median']:.0f}",
        "DIGITS_ACCURACY": f"{digits_end['accuracy'][-1]:.2%}",
        "DIGITS_TEST": f"{digits_end['test_accuracy'][-1]:.2%}",
        "DIGITS_SECONDS": f"{digits['seconds']['median']:.0f}",
        "ACTOR": f"{actor:,}",
        "CRITIC": f"{critic:,}",
        "CRITIC_SHARE": f"{critic / (actor + critic):.1%}",
        "GRPO_MB": megabytes["batch-mean GRPO"],
        "PPO_MB": megabytes["PPO with critic"],
        "RATIO_64": f"{comparison['ratio_64_answers_to_1']['median']:.2f}",
        "LABELS_TEST": labels,
        "STRONG_TEST": interval(strong["test_accuracy"]),
        "STRONG_MINUS_LABELS": points(comparison["strong_minus_labels"]),
        "EQUAL_ERROR": f"{1 - equal['test_accuracy']['mean']:.2%}",
        "BITS": f"{equal['reward_bits']:,}",
        "CRITIC_POINTS": points(algorithms["PPO with critic"]["difference"]),
        "TPO_POINTS": points(algorithms["TPO"]["difference"]),
        "DG_POINTS": points(algorithms["DG, K = 4"]["difference"]),
        "K3_POINTS": points(algorithms["KL penalty, k3"]["difference"]),
        "CISPO_LOST": f"{sum(x < 0.88 for x in algorithms['CISPO']['test_accuracy']['by_seed'])}",
        "PG_LOST": f"{lost_a_digit()['PG']}",
        "GRPO_LOST": f"{lost_a_digit()['GRPO']}",
        "SPEED_N": f"{speed['rows'][0]['epoch_seconds']['ours']['n']}",
        "S_WE": f"{growth['growth']['width']['slopes']['at_the_end']:.2f}",
    }
    for name, kind in (
        *(("S_G", "num_generations"), ("S_B", "batch_size")),
        *(("S_W", "width"), ("S_S", "num_seeds")),
    ):
        figures[name] = f"{growth['growth'][kind]['slopes']['overall']:.2f}"
    for rounds, row in zip((4, 1), speed["rows"], strict=True):
        medians = {name: ratio["median"] for name, ratio in row["ratios"].items()}
        figures[f"K{rounds}_PRODUCTS"] = f"{medians['ours / products']:.2f}"
        figures[f"K{rounds}_TORCH"] = f"{medians['ours / pytorch']:.2f}"
        figures[f"K{rounds}_INDEXED"] = f"{medians['ours / pytorch, indexed']:.2f}"
        figures[f"K{rounds}_COMPILED"] = f"{medians['ours / pytorch, compiled']:.2f}"
        figures[f"JIT_{rounds}"] = f"{1 / medians['ours / without jit']:.0f}"
    for name, kind, pair in (
        ("WHOLE_TORCH", "whole_run", "ours / pytorch"),
        ("WHOLE_INDEXED", "whole_run", "ours / pytorch, indexed"),
        ("FIRST_TORCH", "first_step", "ours / pytorch"),
        ("CACHED_TORCH", "whole_run", "ours, cached / pytorch"),
        ("CACHED_INDEXED", "whole_run", "ours, cached / pytorch, indexed"),
        ("CACHED_FIRST", "first_step", "ours, cached / pytorch"),
        ("TARGET_TORCH", "target", "ours / pytorch"),
        ("TARGET_INDEXED", "target", "ours / pytorch, indexed"),
    ):
        figures[name] = f"{speed[kind]['ratios'][pair]['median']:.2f}"
    for name, ours in (("CACHED_SECONDS", "ours, cached"), ("FIRST_SECONDS", "ours")):
        figures[name] = f"{speed['first_step']['seconds'][ours]['median']:.2f}"
    second = update["rounds"][1]
    for name, reward in (("R2_RIGHT", 1), ("R2_WRONG", 0)):
        chosen = zip(second["ratios"], update["rewards"], strict=True)
        figures[name] = " + ".join(f"{ratio:.3f}" for ratio, r in chosen if r == reward)
    figures |= {"MEAN": f"{update['mean']:.3f}", "DEVIATION": f"{update['deviation']:.4f}"}
    figures["R2_LOSS"] = f"{second['loss']:.4f}"
    advantages = np.array(update["advantages"])
    held = np.where(advantages > 0, 1.2, 0.8) * advantages
    figures["HELD_LOSS"] = f"{-held.mean():.4f}"
    figures["EIGHT_DEVIATION"] = f"{np.std(EIGHT_REWARDS):.3f}"
    figures["LABELS_ORIGINAL"] = interval(breaking["labels"]["test_accuracy"])
    figures |= breaking_figures({row["name"]: row for row in breaking["rows"]})
    versions = machine["versions"] | {"torch": speed["pytorch"].split("+")[0]}
    return figures | {name.upper(): versions[name] for name in ("jax", "flax", "torch", "python")}


def breaking_figures(rows):
    """Those of the runs that were broken on purpose."""
    collapse = rows["class collapse"]
    worst = collapse["worst_seed"]
    gone = rows["K = 64, no clipping"]["by_epoch"]["clip_ratio_low"][0]
    return {
        "COLLAPSE_SEED": f"{worst}",
        "COLLAPSE_DIGIT": f"{np.argmin(collapse['test_answers_by_digit'][worst])}",
        "COLLAPSE_TEST": f"{collapse['test_accuracy']['by_seed'][worst]:.1%}",
        "K64_FREE": interval(rows["K = 64, no clipping"]["accuracy"]),
        "K64_GONE": f"{statistics.mean(gone):.0%}",
        "CONSTANT": interval(rows["learning rate constant"]["accuracy"]),
        "DEFAULTS": interval(rows["defaults"]["accuracy"]),
    }


# Figures that are so short that they could stand anywhere, with the words around them.
AROUND = {
    "CORES": ("on {} cores", "機器有 {} 個核心"),
    "DEFAULT_SECONDS": ("about {} seconds after the program has started", "程式啟動 {} 秒後"),
    "DIGITS_SECONDS": ("{} seconds. MNIST can", "需時 {} 秒。MNIST"),
    "GRPO_MB": ("take {} MB instead of", "動差共占 {} MB"),
    "SPEED_N": ("(range) of {} rounds", "共測量 {} 次"),
    "CISPO_LOST": ("{} of its five seeds ends below 88%", "五個種子裡有 {} 個不到 88%"),
    "PG_LOST": ("{} of the 20 seeds of PG", "PG 有 {} 個種子"),
    "GRPO_LOST": ("and {} of those of GRPO", "GRPO 有 {} 個"),
    "JIT_4": ("without jit it takes {} times as long", "沒有 jit 則要花 {} 倍"),
    "JIT_1": ("and {}. (With one round", "與 {}。（只更新一輪"),
    "WHOLE_TORCH": ("The whole run takes {} times", "加 DataLoader 的 {} 倍、加索引"),
    "CACHED_TORCH": ("the whole run takes {} and", "整次執行是 {} 倍與"),
    "CACHED_SECONDS": ("comes after {} s instead", "只要 {} s，而不是"),
    "FIRST_SECONDS": ("instead of {} s, with", "而不是 {} s，所得"),
    "TARGET_TORCH": ("are right, it takes {} and", "所需時間是 PyTorch 的 {} 倍與"),
    "S_W": ("has a slope of {} in all", "整體斜率為 {}，"),
    "S_S": ("Seeds, slope {}:", "種子數的斜率為 {}："),
    "COLLAPSE_SEED": ("In seed {}, the network said", "在種子 {} 裡"),
    "COLLAPSE_DIGIT": ("no answer to an image of a {} was", "從此對 {} 的影像"),
    "K64_GONE": ("in the first epoch, {} of the answers", "第一個週期中有 {} 的答案"),
}


@pytest.mark.parametrize("readme", READMES)
def test_figures_in_the_prose_are_the_committed_results(readme):
    prose = [line for line in read(readme).splitlines() if not line.startswith("|")]
    text = " ".join(" ".join(prose).split())
    for name, figure in tutorial_figures().items():
        around = AROUND.get(name, ("{}", "{}"))[readme == "README_ch.md"].format(figure)
        assert re.search(rf"(?<![\d.,]){re.escape(around)}(?![.,]?\d)", text), (name, figure)


def test_figures_of_formulas_are_right():
    """Those that both languages quote without a result; that they agree is tested elsewhere."""
    text = " ".join(read("README.md").split())
    assert f"which is {0.95**8 + 0.05**8:.0%} at p = 0.95 and G = 8" in text
    for share in (0.78, 0.95):
        right, wrong = math.sqrt((1 - share) / share), -math.sqrt(share / (1 - share))
        assert f"{right:+.2f} and {wrong:+.2f}" in text
    assert f"√(7/8) = {math.sqrt(7 / 8):.2f}" in text
    least, most = (np.std([1] * ones + [0] * (8 - ones)) for ones in (1, 4))
    assert f"between {least:.2f} and {most:.1f}" in text
    assert f"factor of {most / least:.1f} at most" in text
    assert f"Their mean is {np.mean(EIGHT_REWARDS):.1f}" in text


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
    fields = Config.__dataclass_fields__
    assert list(rows) == [flag(name) for name in fields]
    for name in set(fields) - {"data_dir"}:
        default = fields[name].default
        if default is None:
            continue  # It is described in words.
        if default is False:
            assert rows[flag(name)] == "off"
        else:
            assert type(default)(rows[flag(name)]) == default
    numbers = [str(config.num_generations) for config in (Config(), Config(baseline="group"))]
    assert re.findall(r"\d+", rows["--num-generations"]) == numbers


def test_the_two_languages_agree():
    """The same headings by level, code, tables, links, pictures and numbers, in the same order."""
    one, other = read(READMES[0]), read(READMES[1])
    for pattern in (
        r"^#+ ",
        r"^```.*?^```",
        r"`[^`\n]+`",
        r"\]\((?!README)([^)#]*(?:#L\d+)?)[^)]*\)",  # a heading's anchor is in its language
        r"^\|(?: ?-*\|)*",
        r"^\d+\. |^- ",
        r"</?\w+>",
        r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d",
    ):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (one, other)]
        assert found[0] == found[1], pattern
    columns = [[row.count(" | ") for rows in tables(readme) for row in rows] for readme in READMES]
    assert columns[0] == columns[1]


def anchors(text):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme):
    text = read(readme)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith(("http://", "https://")):
            assert (ROOT / path).exists(), target
            if path.endswith(".png"):
                assert (ROOT / path).read_bytes().startswith(b"\x89PNG"), target
            assert path or anchor in anchors(text), target


@pytest.mark.parametrize("readme", READMES)
def test_links_into_the_file_lead_to_what_they_name(readme):
    lines = read("grpo_mnist.py").splitlines()
    links = re.findall(r"\[`(\w+)`\]\(grpo_mnist\.py#L(\d+)\)", read(readme))
    assert len(links) > 10
    for name, number in links:
        numbers = [i for i, x in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", x)]
        assert numbers == [int(number)], f"{name} is in line {numbers}"


def test_the_header_quotes_the_committed_result():
    defaults = read_json(RESULTS / "accuracy.json")["rows"][0]
    accuracy, test_accuracy = defaults["accuracy"]["median"], defaults["test_accuracy"]["median"]
    header = " ".join(grpo_mnist.__doc__.split())
    assert f"{accuracy:.1%} of the sampled answers" in header
    assert f"{test_accuracy:.1%} of the test images" in header
    assert f"take {defaults['seconds']['median']:.0f} s on two CPU cores (medians of" in header


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
