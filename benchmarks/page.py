"""From ``sagewan ui`` until a prompt can be typed, and until its plan stands under the button.

    python -m benchmarks.page --runs 5

Wall clock, which means something on an idle machine only, and processor time of the server and of
the browser, which can be compared on a busy one. Chromium runs before the clock starts, as a user's
browser does; each run is a first visit, with nothing cached in the browser.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

from tests.ui.browser.conftest import CHROMIUM, FLAGS, environment_of

COLUMNS = ("answers", "typed", "planned", "server CPU", "browser CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        browser.new_context().new_page().goto("about:blank")
        time.sleep(1)
        print("seconds " + "".join(f"{name:>12}" for name in COLUMNS))
        rows = []
        for number in range(runs + 1):
            row = once(browser)
            if number:  # The first one also reads the files from the disk.
                rows.append(row)
                print("        " + "".join(f"{one:12.2f}" for one in row), flush=True)
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        print("median  " + "".join(f"{one:12.2f}" for one in middle))
        browser.close()


def once(browser: Any) -> tuple[float, ...]:
    """The columns of one start."""
    with tempfile.TemporaryDirectory() as folder:
        page = browser.new_context().new_page()
        before = browser_time()
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "sagewan", "ui", "--no-browser"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of(Path(folder)),
        )
        assert process.stdout is not None
        url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        answers = time.perf_counter() - began
        page.goto(url, wait_until="commit")
        # Playwright's own waiting before it fills looks only each half second.
        page.wait_for_selector("#field-prompt textarea")
        page.fill("#field-prompt textarea", "a red ball")
        typed = time.perf_counter() - began
        page.wait_for_selector("#sw-brief .sw-chip")
        planned = time.perf_counter() - began
        assert page.input_value("#field-prompt textarea") == "a red ball"
        times = psutil.Process(process.pid).cpu_times()
        spent = browser_time() - before
        page.context.close()
        process.terminate()
        process.wait(60)
        process.stdout.close()
    return answers, typed, planned, times.user + times.system, spent


def browser_time() -> float:
    """Processor seconds of every Chromium that this process has started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        if "chrom" in process.name():
            times = process.cpu_times()
            total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
