"""The shape of the repository: what is checked in, what is named how, what the README promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "protos", "services", "shared")


def test_nothing_under_tests_is_a_package():
    """With `__init__.py` there, `tests/services` would shadow `services`."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_directory_with_modules_is_a_package():
    """A directory without `__init__.py` imports here and is missing from the wheel's checks."""
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module.parent


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc"])
def test_no_module_is_named_for_nothing(name):
    assert not [path for package in PACKAGES for path in (ROOT / package).rglob(f"{name}.py")]


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]


def test_every_make_target_that_the_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]
    named = {match for text in texts for match in re.findall(r"\bmake ([a-z-]+)", text)}
    named &= {match for text in texts for match in re.findall(r"(?:`|^|\n|\$ )make ([a-z-]+)", text)}
    assert named <= targets, named - targets


def test_every_option_of_tandem_that_the_readme_shows_exists():
    source = (ROOT / "services" / "cli" / "__main__.py").read_text()
    # typer makes --kv-cache-bytes of kv_cache_bytes; some options are spelt out.
    known = {"--" + name.replace("_", "-") for name in re.findall(r"^    (\w+): Annotated", source, re.MULTILINE)}
    known |= set(re.findall(r'"(--[a-z-]+)"', source)) | {"--help", "--run-dir"}
    for command in readme_commands():
        if re.match(r"(\.venv/bin/)?tandem |make up ", command):
            used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", command.partition("#")[0]))
            assert used <= known, f"{command}: {used - known}"


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
