"""pyproject.toml, constraints.txt, requirements.txt and environment.yml say the same."""

import re
import tomllib
from importlib.metadata import version

import pytest
import yaml
from notebook_checks import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9a-z.]+", line) for line in lines), (
        "only exact pins, no local suffixes"
    )
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_pinned_inside_its_range(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier and requirement.specifier.contains(pin)


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_what_is_installed_is_inside_its_range(requirement):
    assert requirement.specifier.contains(Version(version(requirement.name)).public)


@pytest.mark.parametrize("name", ["matplotlib", "jupyterlab", "nbval"])
def test_what_changes_recorded_output_keeps_to_one_minor_version(name):
    specifier = next(r.specifier for r in DIRECT if r.name == name)
    major, minor = pins()[name].split(".")[:2]
    assert not specifier.contains(f"{major}.{int(minor) + 1}.0") and specifier.contains(f"{major}.{minor}.99")


def test_requirements_point_to_the_pins_and_to_the_project():
    assert (ROOT / "requirements.txt").read_text().splitlines() == ["-c constraints.txt", "-e .[dev]"]


def test_conda_file_installs_the_same_by_pip():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = conda["dependencies"]
    assert (conda["name"], pip, packages) == ("kvshot", "pip", {"pip": ["-r requirements.txt"]})
    assert PROJECT["requires-python"] == ">=3.11" and Version(python.removeprefix("python=")) >= Version("3.11")
