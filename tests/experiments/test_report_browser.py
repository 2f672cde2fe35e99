"""The page in a real browser without a network: everything is drawn, and nothing is complained of."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import entry
from experiments.report import __main__ as report

# Test files are no package, so the composed records come from the neighbouring file by its path.
neighbour = runpy.run_path(str(Path(__file__).with_name("test_report.py")))
compose, record, write = neighbour["compose"], neighbour["record"], neighbour["write"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
    "--window-size=1280,2000",
    "--dump-dom",
]


def browse(folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = f"no browser: install one of {', '.join(BROWSERS)}"
    if browser is None and "CI" not in os.environ:
        pytest.skip(missing)  # a machine with Python alone passes the tests; the gate has to look at the page
    assert browser, missing
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_is_drawn_and_the_console_stays_silent(tmp_path):
    write(tmp_path, compose())
    report.main(entry.parse(report.Request, [str(tmp_path), "--tokens=300e9"]))
    document, console = browse(tmp_path)
    assert console == []
    for anchor in ("throughput", "efficiency", "mfu", "memory", "cost", "breakdown"):
        plot = document.split(f'id="{anchor}"', 1)[1].split("</figure>", 1)[0]
        assert 'class="main-svg"' in plot, anchor
        assert re.search(r'class="(trace scatter|trace bars|points)', plot), anchor
    assert 'data-title="Share chart' not in document  # plotly's upload button


def test_markup_in_a_record_is_shown_and_does_not_run(tmp_path):
    evil = "<img src=x onerror=console.error(1)><script>console.error(2)</script>"
    write(tmp_path, [record(preset=evil, note=evil, n_devices=n) for n in (1, 2)])
    report.main(entry.parse(report.Request, [str(tmp_path)]))
    document, console = browse(tmp_path)
    assert console == []
    assert "<img" not in document.split("<script>", 1)[0]
    assert "&lt;img src=x" in document


def test_choosing_a_view_shows_its_traces_and_its_axis_title(tmp_path):
    write(tmp_path, compose())
    report.main(entry.parse(report.Request, [str(tmp_path)]))
    choose = """<script>for (const anchor of ["mfu", "memory"]) {
      const chosen = document.querySelector(`select[data-for="${anchor}"]`);
      chosen.value = "1"; chosen.dispatchEvent(new Event("change"));
    }</script></body>"""
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("</body>", choose))
    document, console = browse(tmp_path)
    assert console == []
    plots = {anchor: document.split(f'id="{anchor}"', 1)[1].split("</figure>", 1)[0] for anchor in ("mfu", "memory")}
    assert "MFU (causal convention)" in plots["mfu"]
    assert "MFU (full convention)" not in plots["mfu"]
    assert ">1,024<" in plots["memory"]
    assert ">40,960<" not in plots["memory"]  # the second curve, strong scaling, does not reach that far
