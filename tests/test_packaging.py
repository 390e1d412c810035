"""What is installed: two packages in site-packages, the same files from a wheel and from an editable install."""

import configparser
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from modeling_delta_llava.configuration_delta_llava import TRANSFORMERS_RANGE, UNTESTED_TRANSFORMERS

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
DATA_SUFFIXES = {".yaml", ".yml", ".json", ".jinja", ".jpg", ".png", ".md", ".txt"}
SOURCE_FOLDERS = sorted(set(SETUPTOOLS["package-dir"].values()))

# Imports every package by its full name, here and in a spawned process which unpickles a class of it by reference.
USE_THE_INSTALLED_PACKAGE = """
import concurrent.futures, importlib, json, multiprocessing, sys

sys.path.append({site_packages!r})

def describe(error_class, name):
    return error_class.__module__, importlib.import_module(name).__file__

if __name__ == "__main__":
    from delta_llava.errors import UserError

    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        there = [pool.submit(describe, UserError, name).result()[1] for name in {names!r}]
    here = [importlib.import_module(name).__file__ for name in {names!r}]
    assert here == there, (here, there)
    assert "conversion" not in sys.modules and "hub_cards" not in sys.modules
    print(json.dumps(here))
"""


def packaged_files() -> dict[str, Path]:
    """Installed path -> source file, read from the folders of the package-dir table."""
    files = {}
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in DATA_SUFFIXES | {".py"}:
                files[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory) -> Path:
    """What packaging needs, copied, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in SOURCE_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run(arguments: list[str | Path], **options) -> str:
    completed = subprocess.run(arguments, capture_output=True, text=True, timeout=240, **options)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([sys.executable, *pip_wheel, "--wheel-dir", folder, source_copy])
    (path,) = folder.glob("*.whl")
    return path


def installed_locations(python: Path | str, folder: Path, **environment: str) -> list[Path]:
    """Where a script run outside the checkout, and its spawned child, find every package."""
    script = folder / "use_the_installed_package.py"
    site_packages = sysconfig.get_path("purelib")
    script.write_text(
        USE_THE_INSTALLED_PACKAGE.format(site_packages=site_packages, names=SETUPTOOLS["packages"]), encoding="utf-8"
    )
    output = run([python, script], cwd=folder, env={**os.environ, **environment})
    return [Path(name).resolve() for name in json.loads(output)]


def test_wheel_has_its_two_packages(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (top_level,) = [name for name in archive.namelist() if name.endswith(".dist-info/top_level.txt")]
        assert archive.read(top_level).decode().split() == ["delta_llava", "modeling_delta_llava"]
        roots = {name.split("/")[0] for name in archive.namelist()}
    version = PYPROJECT["project"]["version"]
    assert roots == {"delta_llava", "modeling_delta_llava", f"delta_llava-{version}.dist-info"}


def test_wheel_has_every_source_and_data_file(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        for name, source in packaged_files().items():
            assert name in packed, f"{source.relative_to(ROOT)} is not in the wheel"
            assert archive.read(name) == source.read_bytes()
    assert packed == set(packaged_files())


def test_every_source_folder_is_listed():
    folders = {Path(name).parent.as_posix() for name in packaged_files() if name.endswith(".py")}
    assert {folder.replace("/", ".") for folder in folders} == set(SETUPTOOLS["packages"])


def test_wheel_states_licence_and_command(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "delta-llava = delta_llava.cli:main" in archive.read(entry_points).decode()
        (licence,) = [name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE")]
        assert "Apache License" in archive.read(licence).decode()


def test_wheel_install_is_importable_everywhere(wheel: Path, tmp_path: Path):
    target = tmp_path / "target"
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel])
    assert {path.name for path in target.iterdir() if path.is_dir()} >= {"modeling_delta_llava"}
    assert not (target / "conversion").exists()
    for location in installed_locations(sys.executable, tmp_path, PYTHONPATH=str(target)):
        assert location.is_relative_to(target.resolve())


def test_editable_install_is_importable_everywhere(source_copy: Path, tmp_path: Path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip_install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--editable", source_copy]
    run(
        [sys.executable, "-m", "pip", "--python", python, *pip_install],
        env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")},
    )
    locations = installed_locations(python, tmp_path)
    folders = [SETUPTOOLS["package-dir"].get(name) for name in SETUPTOOLS["packages"]]
    for name, folder, location in zip(SETUPTOOLS["packages"], folders, locations, strict=True):
        expected = folder or name.replace(".", "/")
        assert location == (source_copy / expected / "__init__.py").resolve()


def test_this_environment_imports_by_full_name_only():
    for name in SETUPTOOLS["packages"]:
        assert importlib.util.find_spec(name) is not None
    code = "import importlib.util as u; print(u.find_spec('conversion'), u.find_spec('hub_cards'))"
    assert run([sys.executable, "-c", code], cwd=sysconfig.get_path("purelib")) == "None None\n"


def test_version_is_the_one_of_pyproject():
    assert importlib.metadata.version("delta-llava") == PYPROJECT["project"]["version"]
    assert "dynamic" not in PYPROJECT["project"]


def test_setup_cfg_says_nothing_that_pyproject_says():
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(setup_cfg.sections()) == {"flake8", "pycodestyle"}
    for section in setup_cfg.values():
        if section.name != "DEFAULT":
            assert section.getint("max-line-length") == PYPROJECT["tool"]["ruff"]["line-length"]


def test_one_range_of_transformers_is_stated_everywhere():
    requirements = {Requirement(line).name: Requirement(line) for line in PYPROJECT["project"]["dependencies"]}
    assert requirements["transformers"].specifier == SpecifierSet(TRANSFORMERS_RANGE)
    assert f"transformers{TRANSFORMERS_RANGE}" in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "requirements" / "newest.txt").read_text(encoding="utf-8")
    assert "-c common.txt" in text.splitlines()
    (newest,) = re.findall(r"^transformers==(\S+)$", text, flags=re.MULTILINE)
    major, minor = map(int, newest.split(".")[:2])
    assert f"{major}.{minor + 1}" == UNTESTED_TRANSFORMERS


def test_pins_satisfy_the_declared_requirements():
    pins = dict(
        line.split("==")
        for name in ("common", "newest")
        for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = [*PYPROJECT["project"]["dependencies"], *extras["dev"], *extras["finetuning"], *extras["quantization"]]
    for requirement in map(Requirement, installed):
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement


def test_photograph_is_small_and_its_origin_stated():
    path = ROOT / "assets" / "cat.jpg"
    assert path.stat().st_size <= 60_000
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.convert("RGB").size == (451, 300)
    text = (ROOT / "assets" / "README.md").read_text(encoding="utf-8")
    assert "`cat.jpg`" in text
    assert "CC0" in text
