"""Settings: later ones win, types are checked, and a wrong one is answered with what would be right."""

from dataclasses import dataclass, field

import pytest

from configurator import BadInput, configure


@dataclass
class Settings:
    run: str = ""  # a folder
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    fast: bool = False  # or not
    limit: int | None = None  # none: no limit
    compiled: bool | None = None  # none: wherever it pays
    names: list[str] = field(default_factory=lambda: ["a", "b"])  # several


def test_a_file_then_flags(tmp_path):
    (tmp_path / "a.py").write_text('"""doc"""\nsteps = 3\nrate = 1\nlimit = 5\nfast = True\n')
    (tmp_path / "b.py").write_text("steps = 4\nlimit = None\n")
    assert configure(Settings, [str(tmp_path / "a.py"), "--steps=7"]) == Settings(steps=7, rate=1.0, limit=5, fast=True)
    assert configure(Settings, [str(tmp_path / "a.py"), str(tmp_path / "b.py")]) == Settings(steps=4, rate=1.0, limit=None, fast=True)


@pytest.mark.parametrize("argv,want", [
    (["--steps=3"], dict(steps=3)),
    (["--steps", "3", "--fast"], dict(steps=3, fast=True)),
    (["--fast", "false"], dict(fast=False)),
    (["--compiled", "--steps=3"], dict(compiled=True, steps=3)),
    (["--compiled", "None"], dict(compiled=None)),
    (["--rate=1e-3", "--limit=2"], dict(rate=1e-3, limit=2)),
    (["--names", "a", "b", "--steps=1"], dict(names=["a", "b"], steps=1)),
    (["out/x"], dict(run="out/x")),
    (["--limit=-1"], dict(limit=-1)),
])
def test_forms(argv, want):
    assert configure(Settings, argv, positional=("run",)) == Settings(**want)


@pytest.mark.parametrize("argv,words", [
    (["--stpes=3"], ["stpes", "steps"]),
    (["--steps=3.5"], ["--steps", "whole number"]),
    (["--rate=fast"], ["--rate", "number"]),
    (["--fast=maybe"], ["--fast", "True or False"]),
    (["--rate"], ["--rate", "value"]),
    (["--names"], ["--names", "value"]),
    (["a", "b"], ["'b'"]),
])
def test_wrong_settings(argv, words):
    with pytest.raises(BadInput) as error:
        configure(Settings, argv, positional=("run",))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_bare_argument_that_is_no_file_is_no_config_file(tmp_path):
    (tmp_path / "a.py").write_text("steps = 3")
    assert configure(Settings, [str(tmp_path / "a.py"), "import a.py"], positional=("run",)) == Settings(steps=3, run="import a.py")
    with pytest.raises(BadInput, match="cannot be read"):
        configure(Settings, [str(tmp_path / "b.py")])


def test_a_config_file_runs_no_code(tmp_path):
    (tmp_path / "a.py").write_text(f"steps = open({str(tmp_path / 'made')!r}, 'w')\n")
    with pytest.raises(BadInput, match="line 1"):
        configure(Settings, [str(tmp_path / "a.py")])
    assert not (tmp_path / "made").exists()


def test_help_shows_defaults_and_comments(capsys):
    with pytest.raises(SystemExit) as stopped:
        configure(Settings, ["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--steps=10" in out and "how many" in out and "none: no limit" in out and "--names=a b " in out
