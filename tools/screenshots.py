"""Pictures of a report as a browser shows it, for README and docs.

  ldt report RUN && python tools/screenshots.py RUN/report.html docs/images

writes NAME-desktop.png, NAME-dark.png and NAME-phone.png, NAME being the page's. Needs Chromium (Debian: chromium).
"""

import argparse
import json
import sys
from pathlib import Path

from browser import Browser
from program import run_tool

VIEWS = {
    "desktop": {"width": 1200, "height": 900},
    "dark": {"width": 1200, "height": 900, "dark": True},
    "phone": {"width": 390, "height": 844, "scale": 2.0},
}


def main() -> int:
    """Take the pictures; 1 if the page had something to complain about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("output", type=Path, help="directory of the pictures")
    parser.add_argument("--views", nargs="+", default=list(VIEWS), choices=list(VIEWS))
    parser.add_argument("--selector", default="", help="CSS selector of the part to show; without it the whole page")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        parser.error(f"{arguments.page} does not exist; make it with ldt report RUN")
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        browser = Browser()
    except FileNotFoundError as error:
        parser.error(str(error))
    with browser:
        for view in arguments.views:
            output = arguments.output / f"{arguments.page.stem}-{view}.png"
            browser.open(arguments.page, **VIEWS[view])  # type: ignore[arg-type]
            if not browser.evaluate(f"!!document.querySelector({json.dumps(arguments.selector or 'html')})"):
                parser.error(f"{arguments.page} has nothing that --selector {arguments.selector} matches")
            browser.screenshot(output, arguments.selector)
            print(output)
    for problem in browser.problems:
        print(f"the page complains: {problem}", file=sys.stderr)
    return 1 if browser.problems else 0


if __name__ == "__main__":
    run_tool(main)
