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

HERE = ROOT / "benchmarks"
TEMPLATES = HERE / "templates"
PROGRAM = ROOT / "grpo_mnist.py"
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n\n.*\n\|[-|]+\|\n)((?:\|.*\n)*)")


def read_toml(name):
    return tomllib.loads((TEMPLATES / name).read_text(encoding="utf-8"))


def percent(share, digits=1):
    return f"{share:.{digits}%}"


def by_seed(shares, as_range=False):
    """The mean with its 95% interval, or the median with its range; each seed's, if in camps."""
    if camps(shares):
        return ", ".join(map(percent, shares))
    if as_range:
        return median_and_range(shares, ".1%")
    mean, interval = common.over_seeds(shares).values()
    return f"{mean:.2%} ± {interval:.2%}"


def points(one, other):
    """The difference of two rows' test accuracies, paired by seed, in percentage points."""
    pairs = 100 * np.subtract(one["test_accuracy"], other["test_accuracy"])
    if camps(pairs / 100):
        return ", ".join(f"{difference:+.2f}" for difference in pairs)
    mean, interval = common.over_seeds(pairs).values()
    return f"{mean:+z.2f} ± {interval:.2f}"  # z: no minus before 0


def median_and_range(values, form=".2f", unit=""):
    median, low, high = (f"{spread(values)[x]:{form}}" for x in ("median", "min", "max"))
    return f"{median}{unit} ({low}-{high})"


def seconds(values):
    return median_and_range(values, unit=" s")


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
        line = program.count("\n", 0, definition.end()) + 1
        return f"[`{link[1]}`](grpo_mnist.py#L{line})"

    return re.sub(r"\[`(\w+)`\]\(grpo_mnist\.py#L\d+\)", renew_link, MARKED.sub(fill_table, text))


def pages():
    """Each page and what it should be."""
    rendered = {}
    for name, words in (("README.md", {}), ("README_ch.md", read_toml("chinese.toml"))):
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
