"""What each image needs is what its extra declares, and what is declared is pinned."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"kernels", "protos", "services", "shared"}


def requirements(extra: str) -> set[str]:
    """Canonical names of an extra's distributions, our own extras unfolded, with those that every image has."""
    names: set[str] = set()
    pending = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.name == PROJECT["name"]:
            pending += [r for name in requirement.extras for r in PROJECT["optional-dependencies"][name]]
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def imported_packages(*entry_points: str) -> dict[str, str]:
    """Foreign top-level packages that these modules import, by way of ours or not, with one module that does."""
    found: dict[str, str] = {}
    pending, seen = [ROOT / path for path in entry_points], set[Path]()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imported_names(path):
            top = name.partition(".")[0]
            if top in OURS:
                pending += _files_of(name)
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def _imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _files_of(name: str) -> list[Path]:
    base = ROOT.joinpath(*name.split("."))
    candidates = [base.with_suffix(".py"), *(parent / "__init__.py" for parent in (base, *base.parents))]
    return [path for path in candidates if path.is_file() and ROOT in path.parents]


PROVIDED_BY = {"google": "protobuf", "grpc": "grpcio", "pydantic_core": "pydantic", "ucxx": "ucxx-cu13"}
# Only where there is a GPU, imported by the backend that needs it.
OPTIONAL = {"triton", "cuda"}


@pytest.mark.parametrize(
    ("extra", "services"),
    [
        ("gateway", ["gateway"]),
        ("transfer", ["kv_transfer"]),
        ("engine", ["prefill", "decode"]),
        ("cli", ["cli"]),
    ],
)
def test_each_image_declares_what_its_services_import(extra, services):
    files = [str(p.relative_to(ROOT)) for s in services for p in (ROOT / "services" / s).rglob("*.py")]
    declared = requirements(extra)
    undeclared = {
        package: importer
        for package, importer in imported_packages(*files).items()
        if package not in OPTIONAL and canonicalize_name(PROVIDED_BY.get(package, package)) not in declared
    }
    assert not undeclared, f"extra {extra!r} lacks {undeclared}"


@pytest.mark.parametrize("extra", ["gateway", "transfer", "cli"])
def test_images_without_an_engine_have_no_torch(extra):
    assert "torch" not in requirements(extra)


@pytest.mark.parametrize("service", ["gateway", "kv_transfer", "cli"])
def test_services_without_an_engine_run_without_torch(service):
    program = f"import services.{service}.__main__, sys; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr or "torch was imported"


def test_no_image_has_transformers():
    for extra in ("gateway", "worker", "gpu", "cli"):
        assert "transformers" not in requirements(extra)


def test_exactly_one_build_of_ucxx_can_be_chosen():
    builds = {name for extra in PROJECT["optional-dependencies"] for name in requirements(extra) if "ucxx" in name}
    assert len(builds) == 1


def pins() -> dict[str, Version]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    result = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), f"not a plain pin: {line!r}"
        result[canonicalize_name(name)] = Version(version)
    return result


def test_every_declared_dependency_is_pinned_within_its_range():
    pinned = pins()
    declared = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, declared):
        if requirement.name != PROJECT["name"]:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_pins_hold_for_any_platform():
    assert not {name: version for name, version in pins().items() if version.local}


def test_our_kernels_are_not_mistaken_for_the_hubs():
    """transformers probes a distribution named `kernels` and, within a range of versions, uses what it finds."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
    assert not Version("0.18.2") <= Version(PROJECT["version"]) < Version("0.19")


def test_importing_kernels_imports_neither_torch_nor_triton():
    program = "import kernels, sys; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_transformers_still_loads_beside_our_packages():
    program = "from transformers import AutoModelForCausalLM"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
