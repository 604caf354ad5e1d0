"""What is tested is the wheel, and it brings no generic top-level module into an environment."""

import sys
from importlib.metadata import distribution
from pathlib import Path

import penstock.cluster
import penstock.operators
import penstock.pipelines


def test_the_installed_wheel_is_what_runs() -> None:
    for package in (penstock.operators, penstock.cluster, penstock.pipelines):
        assert Path(str(package.__file__)).is_relative_to(sys.prefix)


def test_wheel_holds_nothing_but_the_namespace() -> None:
    files = distribution("penstock").files or []
    tops = {file.parts[0] for file in files if file.parts[0] != ".." and not file.parts[0].endswith(".dist-info")}
    assert tops == {"penstock"}
    names = {str(file) for file in files}
    assert {"penstock/operators/py.typed", "penstock/pipelines/library/quickstart.yaml"} <= names
    assert "penstock/__init__.py" not in names
