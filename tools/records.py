"""Write the README's table of records from the files of `records/`: `python tools/records.py`; `--check` only compares.

A row is a record's best score of the settings it was scored with most often: after how many samples and hours, on what.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from program import run_tool

from ldt.files import write_atomic
from ldt.reporting.curves import best_score, hours_at, of_most_images, score_names
from ldt.reporting.history import History, number, read_history
from ldt.reporting.summary import count, date, duration, score

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- records: python tools/records.py -->", "<!-- end of records -->"
HEAD = "| record | score | samples | running time | processes | hardware | made | commit |"


def table(records: Path) -> str:
    """Markdown: a line a record, by name."""
    found = sorted(p for p in records.glob("*") if (p / "metrics.jsonl").is_file())
    if not found:
        return "There is none yet."
    rows = [row for path in found for row in rows_of(read_history(path, path.name))]
    return "\n".join([HEAD, re.sub(r"[^|]+", "---", HEAD), *rows])


def rows_of(run: History) -> Iterator[str]:
    """A line for each score of a record."""
    attempt = run.attempts[-1] if run.attempts else {}
    for name in score_names([run]):
        best = best_score(run, name)
        first = next(r for r in of_most_images(run, name) if number(r, name) == best)
        samples = number(first, "samples_seen")
        cells = [
            f"[{run.name}](records/{run.name})",
            f"{name} {score(best)} of {count(number(first, 'images'))} images",
            count(samples),
            duration(hours_at(run, samples)),
            str(attempt.get("world_size", "–")),
            str(attempt.get("hardware") or "–"),
            date(number(attempt, "time")).partition(" ")[0],
            str(attempt.get("git") or "–").partition("-")[0][:10],
        ]
        yield f"| {' | '.join(cells)} |"


def updated(page: str, records: Path) -> str:
    """The page with the table between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no place for the table: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Exit code: 1 where the table is not that of the files and `--check` was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, default=ROOT / "records")
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    flags = parser.parse_args(arguments)
    old = flags.page.read_text()
    new = updated(old, flags.records)
    if flags.check:
        print(f"{flags.page}: the table is {'' if new == old else 'not '}that of {flags.records}")
        return int(new != old)
    write_atomic(flags.page, new.encode())
    print(f"table of records: {flags.page}")
    return 0


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
