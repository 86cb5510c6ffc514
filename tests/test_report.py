"""The pages and pictures of results are what the committed results make of them."""

import datetime
import re
import sys

import draw
import report
from common import RESULTS, ROOT, read_results
from matplotlib.testing.compare import compare_images


def test_generating_again_changes_nothing():
    rendered = report.pages()
    assert len(rendered) == 4
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_figures_and_links_that_are_out_of_date_are_renewed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = report.MARKED.sub(lambda table: re.sub(r"\d+\.\d+%", "0.0%", table[0]), text)
    stale = re.sub(r"\.py#L\d+", ".py#L1", stale)
    assert stale.count("0.0%") > 50
    assert stale.count("#L1)") > 10
    assert report.fill(stale, report.environment({})) == text


def test_drawing_again_changes_nothing(tmp_path, monkeypatch):
    """But for one_update.png, which needs MNIST."""
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw.py"])
    draw.main()
    drawn = list(tmp_path.iterdir())
    assert len(drawn) == 8
    for path in drawn:
        assert compare_images(str(RESULTS / path.name), str(path), tol=1) is None


def test_every_result_says_how_and_on_what_it_was_measured():
    for path in RESULTS.glob("*.json"):
        result = read_results(path.stem)
        assert result["command"] == f"python benchmarks/run.py {path.stem} --data-dir DIR"
        assert re.fullmatch("[0-9a-f]{64}", result["program_sha256"])
        assert datetime.date.fromisoformat(result["date"])
        assert all(result[fact] for fact in ("processor", "system", "cores"))
        assert {"python", "jax", "flax", "optax", "tfp-nightly", "numpy"} <= set(result["versions"])


def test_seeds_in_camps_are_shown_one_by_one_and_ratios_are_of_each_round():
    assert report.by_seed([0.95, 0.96, 0.97]) == "96.00% ± 2.48%"
    assert report.by_seed([0.955, 0.874]) == "95.5%, 87.4%"
    other = {"test_accuracy": [0.95, 0.96]}
    assert report.points({"test_accuracy": [0.96, 0.98]}, other) == "+1.50 ± 6.35"
    assert report.points({"test_accuracy": [0.96, 0.86]}, other) == "+1.00, -10.00"
    assert (
        report.ratio({"seconds": {"ours": [1, 4, 5], "theirs": [1, 8, 2]}}, "ours", "theirs") == 1
    )
    rows = [{"size": size, "epoch_seconds": [3 * size**2]} for size in (1, 2, 4, 8)]
    assert report.slope(rows) == "2.00 ± 0.00"
