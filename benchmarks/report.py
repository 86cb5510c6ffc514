"""Writes the pages of results, and what the tutorial shows of them, from results/.

    python benchmarks/report.py

The pages of this directory are rendered from templates/. In the tutorial, the rows of the marked
tables are filled in, and the links to lines of grpo_mnist.py renewed.
"""

import re
import tomllib
from statistics import median

import common
import jinja2
import numpy as np
from common import RESULTS, ROOT, camps
from scipy.stats import linregress

TEMPLATES = ROOT / "benchmarks" / "templates"
PROGRAM = ROOT / "grpo_mnist.py"
STUDIES = ("accuracy", "breaking", "comparison", "grown", "published")  # with named rows
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n\n.*\n\|[-|]+\|\n)((?:\|.*\n)*)")


def read_toml(name):
    return tomllib.loads((TEMPLATES / name).read_text(encoding="utf-8"))


def by_seed(shares, each=".1%", average=".2%", as_range=False):
    """The mean with its 95% interval, or the median with its range; each seed's, if in camps."""
    if camps(shares):
        return ", ".join(f"{share:{each}}" for share in shares)
    if as_range:
        return median_and_range(shares, "", each)
    mean, interval = common.over_seeds(shares).values()
    return f"{mean:{average}} ± {interval:.2%}"


def points(one, other):
    """The difference of two rows' test accuracies, paired by seed, in percentage points."""
    pairs = np.subtract(one["test_accuracy"], other["test_accuracy"])
    return by_seed(pairs, "+z.2%", "+z.2%").replace("%", "")  # z: no minus before 0


def median_and_range(values, unit=" s", form=".2f"):
    return f"{median(values):{form}}{unit} ({min(values):{form}}-{max(values):{form}})"


def ratio(timed, one, other):
    """The median of the ratios, round by round."""
    times = timed.get("epoch_seconds") or timed["seconds"]
    return median(np.divide(times[one], times[other]))


def slope(rows):
    """The p of time ~ size ** p, by least squares on the logarithms, with its standard error."""
    times = [median(row["epoch_seconds"]) for row in rows]
    fit = linregress(np.log([row["size"] for row in rows]), np.log(times))
    return f"{fit.slope:.2f} ± {fit.stderr:.2f}"


def environment(words):
    """The templates, with the results and this file's functions; words translate names of rows."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    whitespace = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    templates = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **whitespace)
    templates.globals |= globals() | {
        "results": {path.stem: common.read_results(path.stem) for path in RESULTS.glob("*.json")},
        "rows": {name: common.rows_of(name) for name in STUDIES},
        "program": common.program_sha256(PROGRAM.read_text(encoding="utf-8")),
        "errors": lambda row: [1 - share for share in row["test_accuracy"]],
        "percent": "{:.1%}".format,
        "t": lambda name: words.get(name, name),
    }
    return templates


def fill(text, templates):
    """A page of the tutorial with its tables and its links to lines of the program renewed."""
    tables = templates.get_template("tables.jinja").module
    figures = templates.globals["rows"]["breaking"]["defaults"]["first_and_last"]
    program = PROGRAM.read_text(encoding="utf-8")

    def fill_metric(row):
        """A metric with its figures in the first and the last epoch, means of the seeds."""
        cells, name = row.split(" | "), re.search(r"\w+", row)[0]
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
        rendered[RESULTS.parent / name] = templates.get_template(f"{name}.jinja").render()
    return rendered


def main():
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
