"""`python -m tests.compatibility [NAME ...]`: the tests of this folder in an environment for each supported release.

Environments, the columns of the table, are `lowest` (the lowest version of everything that pyproject.toml admits),
minor releases such as `5.17` (their newest patch), and `today` (whatever the package index has, without a pin); by
default all of them. They share torch and the test tools with the one that runs this, except for `lowest`, and hold
transformers and what it needs.
`--write` keeps the table in docs/compatibility.md.
"""

import argparse
import datetime
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

from modeling_delta_llava.configuration_delta_llava import OLDEST_TRANSFORMERS, UNTESTED_TRANSFORMERS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"
OLDEST, UNTESTED = Version(OLDEST_TRANSFORMERS), Version(UNTESTED_TRANSFORMERS)
MINORS = [f"{OLDEST.major}.{minor}" for minor in range(OLDEST.minor, UNTESTED.minor)]
SHOWN = ("transformers", "huggingface_hub", "torch")
DOCUMENT = ROOT / "docs" / "compatibility.md"


def install(python: Path, *packages: str) -> None:
    """Installs packages into the environment of `python`; pip says what went wrong and ends the run."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", "--quiet", *packages]
    subprocess.run(command, check=True, cwd=ROOT)


def make_environment(row: str) -> Path:
    """A new environment for a row of the table; its Python."""
    folder = FOLDER / row
    venv.create(folder, clear=True)
    python = folder / "bin" / "python"
    if row == "lowest":
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*uv, "--resolution", "lowest-direct", "--editable", str(ROOT)], check=True)
        install(python, "pytest", "pytest-timeout")
        return python
    # What is installed here comes first; the rest is found in the environment that runs this.
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    shared = sysconfig.get_path("purelib")
    (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
    if row == "today":
        eager = ("--upgrade", "--upgrade-strategy", "eager")
        install(python, *eager, f"torch=={version('torch')}", "hqq", "--editable", str(ROOT))
        install(python, "--upgrade", "transformers")
    else:
        release = f"=={OLDEST}" if row == MINORS[0] else f"~={row}.0"
        install(python, "--constraint", "requirements/common.txt", f"transformers{release}", "hqq")
    return python


def run_tests(row: str, python: Path) -> dict[str, str]:
    """What each test of this folder says in an environment, by its name as the table shows it."""
    report = FOLDER / f"{row}.xml"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/compatibility"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the family with properties for each test
    if row not in ("today", MINORS[-1]):
        command += ["-o", "filterwarnings=default"]  # only the newest release has to be free of deprecations
    subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    results: dict[str, str] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        name = test.attrib["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        said = {entry.attrib["name"]: entry.attrib["value"] for entry in test.iter("property")}.get("result", "yes")
        if test.find("failure") is not None or test.find("error") is not None:
            said = "**no**"
        elif test.find("skipped") is not None:
            said = "not tried"
        results[name] = "**no**" if results.get(name) == "**no**" else said
    return results


def versions_of(python: Path) -> dict[str, str]:
    code = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    output = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(SHOWN, output.split(), strict=True))


def table(columns: dict[str, dict[str, str]]) -> str:
    """A Markdown table of what each environment (column) says."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [
        f"| {name} | {' | '.join(column.get(name, '**no**') for column in columns.values())} |" for name in names
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = ["lowest", *MINORS, "today"]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(rows))
    parser.add_argument("--write", action="store_true", help="keep the table in docs/compatibility.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(rows):
        parser.error(f"no such row: {', '.join(unknown)}; choose from {', '.join(rows)}")
    columns, failed = {}, []
    for row in arguments.rows or rows:
        print(f"== {row}", flush=True)
        python = make_environment(row)
        versions = versions_of(python)
        columns[row] = versions | run_tests(row, python)
        # A release that came out after ours may fail: that is what the range is for.
        if "**no**" in columns[row].values() and Version(versions["transformers"]) < UNTESTED:
            failed.append(row)
    print(table(columns))
    if arguments.write:
        text = DOCUMENT.read_text(encoding="utf-8").partition("<!-- table -->")[0]
        date = datetime.datetime.now(datetime.UTC).date()
        DOCUMENT.write_text(f"{text}<!-- table -->\nTried on {date}:\n\n{table(columns)}\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
