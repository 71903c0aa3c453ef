"""The README: what it links is there, its line numbers and losses are right, and it stays short."""

import ast
import json
import re
import statistics
from collections import defaultdict
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


SETTINGS = ("method", "n_layer", "max_latent", "budget", "tau", "lam", "beta", "learning_rate", "max_steps",
            "train_tokens")  # in which runs of one file differ


def losses_of_seeds():
    """Of every kind of run in results/ its losses, seed by seed: at the end, and the lowest of its curve."""
    kinds = defaultdict(dict)
    for file in (ROOT / "results").rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        runs = content.get("runs", []) if isinstance(content, dict) else content
        for run in (run for run in runs if "val_loss" in run):
            settings = run.get("config", run)
            kinds[file, *(settings.get(name) for name in SETTINGS)][settings["seed"]] = run
    for seeds in kinds.values():
        runs = [seeds[seed] for seed in sorted(seeds)]
        if len(runs) > 1:
            yield [run["val_loss"] for run in runs]
            curves = [run.get("curve") or [[run["val_loss"]]] for run in runs]
            yield [min(loss for *_, loss in curve) for curve in curves]


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_means_and_seeds_are_those_of_the_results(page):
    """A loss with its deviation, and three losses in a row of a table, are quoted as results/ has them."""
    measured = set()
    for losses in losses_of_seeds():
        for digits in (3, 4):
            measured.add(f"{statistics.mean(losses):.{digits}f} ± {statistics.stdev(losses):.{digits}f}")
        measured.add(", ".join(f"{loss:.4f}" for loss in losses))
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"\d\.\d+ ± \d\.\d+|(?<=\| )\d\.\d{4}, \d\.\d{4}, \d\.\d{4}(?= \|)", text)
    assert len(quoted) > 30
    assert not [losses for losses in quoted if losses not in measured]


def test_it_stays_short():
    assert len(README.splitlines()) <= 200
