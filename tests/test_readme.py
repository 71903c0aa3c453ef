"""The README: what it links is there, its line numbers are right, and it stays short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of(file):
    """The line at which each class, method and function of a file begins."""
    found = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = node.lineno
            for part in getattr(node, "body", []):
                if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef):
                    found[f"{node.name}.{part.name}"] = part.lineno
    return found


def test_lines_are_where_it_says():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 5
    wrong = {f"{file}: {name}": lines_of(file)[name] for name, file, line in links
             if lines_of(file)[name] != int(line)}
    assert not wrong, f"the README wants other line numbers: {wrong}"


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_what_is_linked_or_quoted_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [path for path in re.findall(r"\]\(([^)#]+)", text) if not path.startswith("http")]
    assert linked
    for path in linked:
        assert (ROOT / page).parent.joinpath(path).exists(), path
    for path in re.findall(r"`([\w/.-]+\.(?:json|py))`", text):
        assert (ROOT / path).exists() or (ROOT / page).parent.joinpath(path).exists(), path


def test_it_stays_short():
    assert len(README.splitlines()) <= 200
