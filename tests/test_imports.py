"""The import contract: operators import nothing of ours, cluster only operators, pipelines both; only cluster imports
Ray."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "operators": {"penstock.operators"},
    "cluster": {"penstock.operators", "penstock.cluster"},
    "pipelines": {"penstock.operators", "penstock.cluster", "penstock.pipelines"},
}
FORBIDDEN = {
    "operators": {"ray", "fsspec", "s3fs", "botocore", "aiobotocore", "yaml", "pydantic", "typer"},
    "cluster": {"yaml", "pydantic", "typer"},
    "pipelines": {"ray", "s3fs", "botocore", "aiobotocore"},
}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Import():
                yield from (name.name for name in node.names)
            case ast.ImportFrom():
                assert node.level == 0, f"{path}: relative import, imports are absolute here"
                yield str(node.module)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_their_charter_allows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            if module.startswith("penstock"):
                assert any(module.startswith(allowed) for allowed in MAY_IMPORT[package]), f"{path} imports {module}"
            assert module.split(".")[0] not in FORBIDDEN[package], f"{path} imports {module}"


def test_no_source_unpickles() -> None:
    for path in [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")]:
        assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal"} & set(imported_modules(path)), path
        assert "allow_pickle" not in path.read_text("utf-8"), path
