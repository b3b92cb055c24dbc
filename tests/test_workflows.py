"""The workflows name what exists, and the versions that the project names."""

import pathlib
import re
import tomllib

from . import fuzz

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def classified_pythons():
    classifiers = "\n".join(PROJECT["classifiers"])
    return set(re.findall(r"Python :: (3\.\d+)", classifiers))


def text_of(name):
    return (WORKFLOWS / f"{name}.yml").read_text()


def test_every_python_of_the_classifiers_is_tested():
    assert set(re.findall(r'python: "(3\.\d+)"', text_of("tests"))) == classified_pythons()
    (installed,) = re.findall(r"python: \[(.*)\]", text_of("wheels"))
    assert set(re.findall(r"3\.\d+", installed)) == classified_pythons()
    assert PROJECT["requires-python"] == f">={min(classified_pythons())}"


def test_the_oldest_jax_is_tested_with_the_oldest_python():
    (oldest,) = (r for r in PROJECT["dependencies"] if r.startswith("jax"))
    assert f'{{python: "3.11", jax: "{oldest.replace(">=", "==")}"' in text_of("tests")


def test_scripts_and_tests_of_the_workflows_exist():
    text = "\n".join(path.read_text() for path in WORKFLOWS.iterdir())
    scripts = set(re.findall(r"(?:\.ci|\./\.github|tests)/[\w./-]+", text))
    assert {".ci/run", ".ci/smoke.py", ".ci/pages.py", "./.github/workflows/wheels.yml"} <= scripts
    assert not [script for script in scripts if not (ROOT / script).exists()]


def test_modules_that_the_workflows_run_exist():
    text = "\n".join(path.read_text() for path in WORKFLOWS.iterdir())
    modules = set(re.findall(r"python -m (\w+\.\w+)", text))
    assert modules == {"tests.fuzz", "tests.site", "benchmarks.reliability"}
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_every_reader_is_fuzzed_at_night():
    (readers,) = re.findall(r"reader: \[(.*)\]", text_of("nightly"))
    assert sorted(readers.split(", ")) == sorted(fuzz.READERS)


def test_the_wheels_are_built_when_their_files_change():
    (paths,) = re.findall(r"paths:\n((?: +- .*\n)+)", text_of("wheels"))
    listed = set(re.findall(r'- "?([\w./]+)', paths))
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", ".ci/smoke.py"} <= listed
    for path in listed:
        assert (ROOT / path).exists(), path


def test_the_citation_names_the_version_of_the_project():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
