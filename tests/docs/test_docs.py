"""The examples of the README and the documentation run as they stand, and what they name exists."""

import importlib
import re
import tomllib
from pathlib import Path

import doc_pages as pages
import matplotlib
import pytest
import typer

from mmi_jax.cli.app import app, main

ROOT = pages.ROOT
SLOW = {
    "docs/faq.md",
    "docs/guides/add_a_model.md",
    "docs/guides/python.md",
    "docs/guides/search.md",
    "docs/how_it_works.md",
    "docs/index.md",
}
"""Pages whose examples compile a prefill; the README's is compiled in every run of the suite."""
MODULES = ("mmi_jax", "mmi_jax.flax", "pallas_kernels", "models")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def pages_with(*languages: str):
    return [
        pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for page in pages.pages()
        if pages.blocks(page, *languages)
        for name in [page_name(page)]
    ]


@pytest.fixture
def reader_directory(tmp_path, monkeypatch, no_shape_checks):
    """A directory in which the repository's files are found and examples may write."""
    for name in ("models", "docs", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")


@pytest.mark.parametrize("page", pages_with("python", "sh"))
def test_the_examples_of_a_page_run_in_order(page, reader_directory):
    namespace = {"__name__": "example"}
    for block in pages.blocks(page, "python", "sh"):
        if block.language == "sh":
            for words in pages.commands(block):
                assert words[0] == "mmi", f"{page_name(page)}:{block.line}: {words}"
                assert main(words[1:]) == 0, f"{page_name(page)}:{block.line}: {words}"
        else:  # blank lines before it, so that a traceback names the page's own lines
            exec(compile("\n" * (block.line - 1) + block.text, page_name(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages_with("console"))
def test_the_commands_of_a_page_parse(page):
    for block in pages.blocks(page, "console"):
        for words in pages.commands(block):
            try:
                check_command(words)
            except Exception as error:
                raise AssertionError(f"{page_name(page)}:{block.line}: {' '.join(words)}: {error}") from error


def check_command(words: list[str]) -> None:
    """Raises unless the command is one of the repository's, with options that it has."""
    match words:
        case ["mmi", *arguments]:
            parse_mmi(arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        case ["python" | "bash", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *_, requirement]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(.*)\]", requirement)) <= set(extras)
        case _:
            raise AssertionError("only mmi, make, python, bash and pip install are known")


def parse_mmi(arguments: list[str]) -> None:
    """Raises unless the arguments parse, under names that `--help` shows."""
    command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    hidden = {name for option in command.params if getattr(option, "hidden", False) for name in option.opts}
    assert not hidden & set(arguments), f"hidden options: {hidden & set(arguments)}"
    context = command.make_context(command.name, arguments)
    assert context is not None


@pytest.mark.parametrize("page", [pytest.param(page, id=page_name(page)) for page in pages.pages()])
def test_every_block_says_how_it_is_tested(page):
    for block in pages.blocks(page):
        assert block.language in pages.LANGUAGES, f"{page_name(page)}:{block.line}: {block.language!r}"


@pytest.mark.parametrize("page", [pytest.param(page, id=page_name(page)) for page in pages.pages()])
def test_every_file_that_a_page_names_exists(page):
    folders = "mmi_jax|pallas_kernels|models|tests|docs|bench|scripts|gpu_scripts|tpu_scripts"
    for name in re.findall(rf"`((?:{folders})/[\w/.*]*)", page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name.rstrip("/."))), f"{page_name(page)} names {name}"


@pytest.mark.slow
def test_the_notebook_runs(reader_directory):
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(pages.notebook_cells(pages.DOCS / "quickstart.ipynb")):
        exec(compile(cell, f"quickstart.ipynb, code cell {number}", "exec"), namespace)


def test_the_notebook_has_its_outputs_and_is_small():
    path = pages.DOCS / "quickstart.ipynb"
    assert path.stat().st_size < 500_000
    assert "image/png" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_describes_every_public_name(name):
    module = importlib.import_module(name)
    reference = "\n".join(path.read_text(encoding="utf-8") for path in (pages.DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", reference, flags=re.MULTILINE))
    exported = re.findall(r" (\w+) as \1$", Path(module.__file__ or "").read_text(), flags=re.MULTILINE)
    public = getattr(module, "__all__", exported)
    missing = {public_name for public_name in public if not any(d.endswith(f".{public_name}") for d in described)}
    assert not missing


def test_every_name_of_the_reference_exists():
    for page in (pages.DOCS / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


def test_the_readme_is_short_and_claims_what_holds():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert "first complete open implementation" in " ".join(text.split())
