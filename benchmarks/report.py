"""Writes the pages of results, and what the tutorial shows of them, from results/.

    python benchmarks/report.py

The pages README.md and README_ch.md of this directory are rendered from templates/, which has the
words of both languages. In the tutorial, the rows of the tables between markers are filled in, and
the links to lines of grpo_mnist.py renewed.
"""

import re
import tomllib

import common
import jinja2
import numpy as np
from common import RESULTS, ROOT, camps, spread
from one_update import signed  # noqa: F401, for the templates

HERE = ROOT / "benchmarks"
TEMPLATES = HERE / "templates"
PROGRAM = ROOT / "grpo_mnist.py"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n\n.*\n\|[-|]+\|\n)((?:\|.*\n)*)")


def percent(share, digits=1):
    return f"{share:.{digits}%}"


def by_seed(shares):
    """The mean with its 95% interval; the seeds' own, if they fall into camps."""
    if camps(shares):
        return ", ".join(map(percent, shares))
    figures = common.over_seeds(shares)
    return f"{figures['mean']:.2%} ± {figures['interval_95']:.2%}"


def points(one, other):
    """The difference of two rows' test accuracies, paired by seed, in percentage points."""
    pairs = np.subtract(one["test_accuracy"], other["test_accuracy"])
    if camps(pairs):
        return ", ".join(f"{100 * difference:+.2f}" for difference in pairs)
    figures = common.over_seeds(pairs)
    mean = round(100 * figures["mean"], 2) + 0  # no minus before 0
    return f"{mean:+.2f} ± {100 * figures['interval_95']:.2f}"


def shares(values):
    """The median with its range; the seeds' own, if they fall into camps."""
    if camps(values):
        return ", ".join(map(percent, values))
    figures = spread(values)
    return f"{figures['median']:.1%} ({figures['min']:.1%}-{figures['max']:.1%})"


def seconds(values, unit="s", digits=2):
    median, low, high = (f"{spread(values)[x]:.{digits}f}" for x in ("median", "min", "max"))
    return f"{median} {unit} ({low}-{high})"


def ratio(timed, one, other):
    """The median of the ratios, round by round; an older result holds these, and not the rounds."""
    if "ratios" in timed:
        return timed["ratios"][f"{one} / {other}"]["median"]
    times = timed.get("epoch_seconds") or timed["seconds"]
    return float(np.median(np.divide(times[one], times[other])))


def slope(rows):
    """The p of time ~ size ** p, with its standard error."""
    times = [common.median(row["epoch_seconds"]) for row in rows]
    fit = common.fit_slope([row["size"] for row in rows], times)
    return f"{fit['slope']:.2f} ± {fit['standard_error']:.2f}"


def errors(row):
    return [1 - accuracy for accuracy in row["test_accuracy"]]


def changed_flags(command, before):
    """The flags of a command, with their values, that the command before it does not have."""
    return " ".join(flag for flag in re.findall(r"--\S+ \S+", command) if flag not in before)


def environment(words):
    """The templates, with the results and this file's functions; words translate names of rows."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    whitespace = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    templates = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **whitespace)
    studies = ("accuracy", "breaking", "comparison", "grown", "published")
    templates.globals |= globals() | {
        "results": {path.stem: common.read_results(path.stem) for path in RESULTS.glob("*.json")},
        "rows": {name: common.rows_of(name) for name in studies},
        "program": common.program_sha256(PROGRAM.read_text(encoding="utf-8")),
        "t": lambda name: words.get(name, name),
    }
    return templates


def fill(text, templates):
    """A page of the tutorial with its tables and its links to lines of the program renewed."""
    tables = templates.get_template("tables.jinja").module
    figures = templates.globals["rows"]["grown"]["defaults"]["first_and_last"]
    program = PROGRAM.read_text(encoding="utf-8")

    def fill_metric(row):
        """A metric with its figures in the first and the last epoch, means of the seeds."""
        cells = row.split(" | ")
        name = re.search(r"\w+", cells[0])[0]
        if name in figures:
            kind = ".1%" if "accuracy" in name else ".2%" if "clip" in name else ".2g"
            cells[2:4] = [f"{np.mean(seeds):{kind}}" for seeds in figures[name]]
        return " | ".join(cells)

    def fill_table(table):
        name, head, rows = table.groups()
        if name == "metrics":
            return name + head + "".join(map(fill_metric, rows.splitlines(keepends=True)))
        return name + head + getattr(tables, name)()

    def renew_link(link):
        (definition,) = re.finditer(rf"^(def|class) {link[1]}\b", program, re.MULTILINE)
        line = program[: definition.end()].count("\n") + 1
        return f"[`{link[1]}`](grpo_mnist.py#L{line})"

    return re.sub(r"\[`(\w+)`\]\(grpo_mnist\.py#L\d+\)", renew_link, MARKED.sub(fill_table, text))


def pages():
    """Each page and what it should be."""
    chinese = tomllib.loads((TEMPLATES / "chinese.toml").read_text(encoding="utf-8"))
    rendered = {}
    for name, words in (("README.md", {}), ("README_ch.md", chinese)):
        templates = environment(words)
        rendered[ROOT / name] = fill((ROOT / name).read_text(encoding="utf-8"), templates)
        rendered[HERE / name] = templates.get_template(f"{name}.jinja").render()
    return rendered


def main():
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
