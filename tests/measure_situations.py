"""Finds the situations of test_situations.py that fail with the programs of an earlier checkout, and writes
`tests/results/situations.json`, from which `tests/collect_results.py` makes the table of situations.

    git worktree add /tmp/before 500d7d0
    python tests/measure_situations.py /tmp/before    # about 10 minutes on 2 cores
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "situations.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401 (sets JAX up for tests before it is imported)
import test_situations  # noqa: E402

SECONDS = 120  # A test that takes longer has failed.


def failing(checkout: Path) -> set[str]:
    """The names of the tests that fail with the programs of a checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tests").mkdir()
        for path in [
            *checkout.glob("*.py"),
            ROOT / "README.md",
            *ROOT.glob("tests/*.py"),
            ROOT / "tests" / "pytest.ini",
        ]:
            shutil.copy(path, folder / path.relative_to(checkout if path.parent == checkout else ROOT))
        options = ["-m", "", "-o", f"faulthandler_timeout={SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
        command = [sys.executable, "-m", "pytest", "tests/test_situations.py", "--junitxml=report.xml", *options]
        subprocess.run(command, cwd=folder)
        cases = ElementTree.parse(folder / "report.xml").iter("testcase")
        return {case.get("name") for case in cases if {"failure", "error"} & {child.tag for child in case}}


if __name__ == "__main__":
    checkout = Path(sys.argv[1]).resolve()
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    failed, rows = failing(checkout), []
    for row in test_situations.TABLE:
        name = row["situation"].encode("unicode_escape").decode()  # As pytest writes it.
        rows.append(row | dict(failed_before=f"{row['test']}[{name}]" in failed))
    file = dict(command="python tests/measure_situations.py CHECKOUT", commit=run.stdout.strip(), rows=rows)
    RESULTS.write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n")
    print(f"{sum(row['failed_before'] for row in rows)} of {len(rows)} situations failed")
