"""Settings: later ones win, types and ranges are checked, a wrong one answered with what would be right."""

import importlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import pytest

from configurator import (NANOGPT, RANGES, BadInput, check_apart, check_range, check_read, configure,
                          flags_of, reason, run, typed)

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    run: str = ""  # a folder
    steps: int = 10  # how many
    rate: float = 0.5  # how fast
    fast: bool = False  # or not
    limit: int | None = None  # none: no limit
    compiled: bool | None = None  # none: wherever it pays
    names: list[str] = field(default_factory=lambda: ["a", "b"])  # several
    tau: float = 0.1  # τ
    temperature: float | None = None  # T
    num_fewshot: list[int] = field(default_factory=list)  # several numbers
    title: str | None = None  # none: no title


def test_a_file_then_flags(tmp_path):
    lines = ['"""doc"""', "steps = 3", "rate = 1", "limit = 5", "fast = True", 'names = ["x", "y"]']
    (tmp_path / "a.py").write_text("\n".join(lines))
    (tmp_path / "b.py").write_text("\ufeffsteps = 4\nlimit = None\n", encoding="utf-8")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    wanted = Settings(steps=7, rate=1.0, limit=5, fast=True, names=["x", "y"])
    assert configure(Settings, [a, "--steps=7"]) == wanted
    (tmp_path / "c.py").write_text("num_fewshot = []\n")
    for words in (["--num_fewshot=3", str(tmp_path / "c.py")], ["--num_fewshot=3", "--num_fewshot="]):
        assert configure(Settings, words).num_fewshot == []
    with pytest.raises(BadInput, match="--names is empty"):
        configure(Settings, ["--names="])
    assert configure(Settings, [a, b]) == Settings(steps=4, rate=1.0, limit=None, fast=True, names=["x", "y"])


def test_the_default_file_applies_where_none_is_named(tmp_path):
    (tmp_path / "a.py").write_text("steps = 3\n")
    (tmp_path / "b.py").write_text("rate = 3\n")
    assert configure(Settings, ["--rate=2"], default=tmp_path / "a.py") == Settings(steps=3, rate=2.0)
    assert configure(Settings, [str(tmp_path / "b.py")], default=tmp_path / "a.py") == Settings(rate=3.0)


def test_what_nothing_reads_must_stand_at_its_default():
    readers = {"walk": "steps names", "run": "steps rate", "rest": ""}
    for chosen, own in ((["walk"], {"steps": 3, "names": []}), (["run", "walk"], {"rate": 3.0, "names": []}),
                        (["rest"], {"steps": 10, "names": ["a", "b"], "limit": 3})):
        check_read(Settings(**own), readers, chosen, "--parts ")
    for chosen, own, words in ((["walk"], {"rate": 3.0}, "rate is not read here, but by --parts run"),
                               (["rest"], {"steps": 3}, "steps .* by --parts walk or run"),
                               (["run", "rest"], {"names": []}, "names .* by --parts walk")):
        with pytest.raises(BadInput, match=words):
            check_read(Settings(**own), readers, chosen, "--parts ")


def test_what_was_typed_is_known():
    words = ["--steps=3", "--num-fewshot", "0", "5", "config/a.py", "--fast"]
    assert typed(words) == {"steps", "num_fewshot", "fast"}


def test_files_that_are_named_twice_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_apart(Settings(run="", names=[]), "run", "names")
    check_apart(Settings(run=f"{tmp_path}/a", names=[f"{tmp_path}/b", f"{tmp_path}/b"]), "run", "names")
    for same in (f"{tmp_path}/a", f"{tmp_path}/x/../a", f"{tmp_path}/link"):
        with pytest.raises(BadInput, match="--run and --names are both .*, but must be two files"):
            check_apart(Settings(run=f"{tmp_path}/a", names=["b", same]), "run", "names")


def test_what_is_read_is_not_written_over(tmp_path):
    """Neither a file of a folder of text, nor a run's checkpoint; a page may stand beside that."""
    (tmp_path / "deep").mkdir()
    for name in ("ckpt.pt", "log.jsonl", "page.html", "deep/a.txt"):
        (tmp_path / name).write_text("")
    for name in ("ckpt.pt", "log.jsonl"):
        with pytest.raises(BadInput, match=f"--names={tmp_path}/{name} is a file of --run"):
            check_apart(Settings(run=f"{tmp_path}", names=[f"{tmp_path}/{name}"]), "run", "names")
    for name in ("page.html", "new.pt", "deep/a.txt"):
        check_apart(Settings(run=f"{tmp_path}", names=[f"{tmp_path}/{name}"]), "run", "names")
    for name in ("ckpt.pt", "log.jsonl"):  # where a run is named by one of its files, too
        (tmp_path / "best.pt").write_text("")
        with pytest.raises(BadInput, match=f"--names={tmp_path}/{name} is a file of --run"):
            check_apart(Settings(run=f"{tmp_path}/best.pt", names=[f"{tmp_path}/{name}"]), "run", "names")
    check_apart(Settings(run=f"{tmp_path}/best.pt", names=[f"{tmp_path}/page.html"]), "run", "names")
    check_apart(Settings(run="", names=[f"{tmp_path}", f"{tmp_path}/deep/a.txt"]), "run", "names")
    with pytest.raises(BadInput, match="is a file of --names"):
        check_apart(Settings(run=f"{tmp_path}/deep/a.txt", names=[f"{tmp_path}"]), "names", "run")


def test_what_is_closed_is_no_terminal():
    """Standard streams that were closed where a script was started: it runs, and what it says is lost."""
    code = "from configurator import run; import sys; "
    code += "run(lambda: print(sys.stdin.read(), sys.stderr.isatty()))"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(f"{sys.executable} -c '{code}' </dev/null {closed}", shell=True, cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done
        assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else " False\n"), done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_output_on_a_full_disk_is_one_line():
    code = "import sys; sys.argv = [\"talks.py\"]; from configurator import run; run(lambda: print(1))"
    command = f"{sys.executable} -c '{code}' >/dev/full"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "talks.py: what is printed cannot be written: No space left" in done.stderr


def test_a_file_that_the_system_refuses_is_one_line(capsys):
    """Python's own questions about paths raise, where a folder may not be entered or a name is too long."""
    for main, word in ((lambda: Path("n" * 300).is_file(), "File name too long"),
                       (lambda: open("/no/such/file"), "/no/such/file")):
        with pytest.raises(SystemExit) as stopped:
            run(main)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and line.count("\n") == 1 and word in line
    with pytest.raises(OSError):
        run(lambda: os.close(10**6))  # a fault of ours, which is to be seen
    long = "n" * 300 + ".py"
    assert configure(Settings, [long], positional=("run",)).run == long, "a text that is no config file"


HALF = """
import os, signal, sys
sys.path.insert(0, {root!r})
sys.argv = ["halves.py"]
from common import run, whole
def main():
    with whole("text") as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.{name})
run(main)
"""


@pytest.mark.parametrize("name,code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_a_signal_leaves_half_written_is_removed(name, code, tmp_path):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    command = [sys.executable, "-c", HALF.format(root=str(ROOT), name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr, [*tmp_path.iterdir()]) == (code, "halves.py: terminated\n", [])


@pytest.mark.parametrize("error,shown", [
    ("KeyboardInterrupt", "eval.py: interrupted\n"), ("ValueError", None)])
def test_ctrl_c_in_the_imports_is_one_line(error, shown):
    code = f"import sys; sys.argv = ['eval.py']; import configurator; raise {error}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and (done.stderr == shown or shown is None and "Traceback" in done.stderr)


def test_a_home_folder_behind_an_equals_sign_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert configure(Settings, ["--run=~/a", "--names", "~/b", "~"]).run == str(tmp_path / "a")
    assert configure(Settings, ["--names", "~/b", "~"]).names == [str(tmp_path / "b"), "~"]


@pytest.mark.parametrize("argv,want", [
    (["--steps=3"], dict(steps=3)),
    (["--steps", "3", "--fast"], dict(steps=3, fast=True)),
    (["--fast", "false"], dict(fast=False)),
    (["--compiled", "--steps=3"], dict(compiled=True, steps=3)),
    (["--compiled", "None"], dict(compiled=None)),
    (["--rate=1e-3", "--limit=2"], dict(rate=1e-3, limit=2)),
    (["--names", "a", "b", "--steps=1"], dict(names=["a", "b"], steps=1)),
    (["--num-fewshot", "0", "5"], dict(num_fewshot=[0, 5])),
    (["out/x"], dict(run="out/x")),
    (["--steps=-1"], dict(steps=-1)),
    (["--temperature=0"], dict(temperature=0.0)),
    (["--temperature=none"], dict(temperature=None)),
])
def test_forms(argv, want):
    assert configure(Settings, argv, positional=("run",)) == Settings(**want)


@pytest.mark.parametrize("argv,words", [
    (["--stpes=3"], ["stpes", "'steps'"]),
    (["--steps=3.5"], ["--steps", "whole number"]),
    (["--rate=fast"], ["--rate", "number"]),
    (["--fast=maybe"], ["--fast", "True or False"]),
    (["--rate"], ["--rate", "value"]),
    (["--names"], ["--names", "value"]),
    (["--run", "--steps=2"], ["--run", "value"]),
    (["--run="], ["--run", "not empty"]),
    ([""], ["run", "not empty"]),
    (["a", "b"], ["'b'"]),
    (["--tau=1.5"], ["--tau", "1.5", "[0, 1]"]),
    (["--tau=nan"], ["--tau", "nan", "[0, 1]"]),
    (["--temperature=1e-300"], ["--temperature", "0.001"]),
    (["--temperature=inf"], ["--temperature", "100"]),
    (["--limit=0"], ["--limit", "[1, 1e9]"]),
    (["--num_fewshot", "0", "-1"], ["--num_fewshot", "-1", "[0, 1000]"]),
    (["--max_iters=3"], ["max_iters", "--help"]),
    (["--dropout=0.1"], ["dropout", "nanoGPT"]),
    (["--lr=3"], ["'lr'", "--help"]),
])
def test_wrong_settings(argv, words):
    with pytest.raises(BadInput) as error:
        configure(Settings, argv, positional=("run",))
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line
    assert "did you mean" not in line or "steps" in words[-1], "only what is close is suggested"


def test_what_nanogpt_calls_it_is_known():
    from train import Train
    for theirs, ours in {"lr": "learning_rate", "batch_size": "micro_batch_size", "max_iters": "max_steps",
                         "out_dir": "out", "eval_interval": "eval_every"}.items():
        with pytest.raises(BadInput, match=f"{theirs}.*{ours!r} here"):
            configure(Train, [f"--{theirs}=1"])
    assert not set(NANOGPT) & {f.name for f in fields(Train)}


def test_a_bare_argument_that_is_no_file_is_no_config_file(tmp_path):
    (tmp_path / "a.py").write_text("steps = 3")
    argv = [str(tmp_path / "a.py"), "import a.py"]
    assert configure(Settings, argv, positional=("run",)) == Settings(steps=3, run="import a.py")
    with pytest.raises(BadInput, match="cannot be read"):
        configure(Settings, [str(tmp_path / "b.py")])


def test_the_value_of_a_flag_is_no_config_file(tmp_path):
    """Nor does it stand for one: the default is read."""
    default = tmp_path / "default.py"
    default.write_text("steps = 3")
    for argv in (["--run", "b.py"], ["--names", "b.py", "c.py"], ["--fast", "--run", f"{default}"]):
        assert configure(Settings, argv, default=default).steps == 3
    (tmp_path / "own.py").write_text("rate = 1")
    assert configure(Settings, ["--fast", f"{tmp_path}/own.py"], default=default).steps == 10
    assert configure(Settings, ["--steps=4"], default=default).steps == 4


@pytest.mark.parametrize("source,words", [
    ("steps = open('{made}', 'w')", ["line 1", "steps"]), ("import os", ["line 1", "plain assignments"]),
    ("steps = 2 +", ["line 1"]), ("stpes = 2", ["line 1", "'steps'"]), ("steps = 'two'", ["line 1", "whole"]),
    ("tau = 2", ["line 1", "tau", "[0, 1]"]), ("tau = 1e400", ["tau", "inf"]), ("steps = 1\0", ["a.py"]),
    ("steps = [1, 2]", ["steps", "whole number"]), ("a = b = 1", ["line 1"]), ("steps = " + "(" * 5000, []),
    ("run = None", ["line 1", "run must be one text"]), ("run = ['a']", ["line 1", "run must be one text"]),
    ("names = {'a': 1}", ["line 1", "names must be a plain"]), ("run = b'a'", ["run must be a plain"]),
    ("steps = [1]", ["steps is '[1]'", "whole number"]), ("tau = '0.5'", ["tau", "'0.5'", "a number"]),
    ("num_fewshot = ['1']", ["num_fewshot", "whole number"]), ("num_fewshot = ''", ["num_fewshot"]),
    ("names = None", ["names must be a list of texts"]), ("names = [['a']]", ["must be a list of texts"]),
    ("title = ['a']", ["title must be one text"]), ("title = 5", ["title must be one text"]),
    ("run = 'a\\0b'", ["line 1", "run", "zero byte"]), ("names = ['\\0']", ["line 1", "names", "zero byte"]),
])
def test_wrong_config_files(source, words, tmp_path):
    (tmp_path / "a.py").write_text(source.replace("{made}", str(tmp_path / "made")))
    with pytest.raises(BadInput) as error:
        configure(Settings, [str(tmp_path / "a.py")])
    line = str(error.value)
    assert all(word in line for word in ["a.py", *words]) and "\n" not in line, line
    assert not (tmp_path / "made").exists()


def test_a_file_may_hold_what_another_script_reads(tmp_path):
    (tmp_path / "a.py").write_text("steps = 3\nglobal_batch_size = 4\n")
    assert configure(Settings, [str(tmp_path / "a.py")], also="train.py") == Settings(steps=3)
    with pytest.raises(BadInput, match="global_batch_size"):
        configure(Settings, [str(tmp_path / "a.py")])
    with pytest.raises(BadInput, match="global_batch_size"):
        configure(Settings, ["--global_batch_size=4"], also="train.py")
    (tmp_path / "b.py").write_text('init_from = "out/v"\n')
    with pytest.raises(BadInput, match="b.py, line 1: init_from is not read here, but by train.py alone"):
        configure(Settings, [str(tmp_path / "b.py")], also="train.py")


def test_settings_become_a_command_line_again():
    @dataclass
    class Listed:
        name: str = ""
        lengths: list[int] = field(default_factory=list)
        more: list[float] = field(default_factory=list)
        budget: float | None = 1.0
        odd: bool = False

    for settings in (Listed(), Listed("a b", [1, 2], [0.5], None, True)):
        assert configure(Listed, flags_of(asdict(settings))) == settings


def test_help_is_shown_whatever_the_values_are(capsys, tmp_path):
    (tmp_path / "source.py").write_text("import this")
    with pytest.raises(SystemExit):
        configure(Settings, ["--names", f"{tmp_path}/source.py", "--help"])
    assert "--steps=10" in capsys.readouterr().out


def test_help_shows_defaults_ranges_and_comments(capsys, tmp_path):
    (tmp_path / "a.py").write_text("steps = 3\n")
    with pytest.raises(SystemExit) as stopped:
        configure(Settings, ["--help"], positional=("run",), default=tmp_path / "a.py")
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "[run]" in out
    lines = [["--steps=3", "how many"], ["--limit=None", "none: no limit"], ["--names=a b ", "several"],
             ["--num_fewshot= ", "[0, 1000]"], ["--tau=0.1", "τ", "in [0, 1]"], ["--rate=0.5", "how fast"]]
    for words in lines:
        assert any(all(word in line for word in words) for line in out.splitlines()), (words, out)


def settings_of(script):
    """The settings class of a script, which it hands to configure."""
    call = re.search(r"\bconfigure\((\w+)", (ROOT / script).read_text(encoding="utf-8"))
    return call and getattr(importlib.import_module(script.removesuffix(".py")), call[1])


SCRIPTS = [path.name for path in sorted(ROOT.glob("*.py"))
           if path.stem != "configurator" and "= configure(" in path.read_text(encoding="utf-8")]


def default_of(f):
    return f.default if f.default is not MISSING else f.default_factory()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_that_holds_its_default(script):
    kinds = typing.get_type_hints(settings_of(script))
    for f in fields(settings_of(script)):
        if not {int, float} & {kinds[f.name], *typing.get_args(kinds[f.name])}:
            continue
        assert f.name in RANGES, f.name
        default = default_of(f)
        for value in default if isinstance(default, list) else [default]:
            check_range(f.name, value, f.name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_shows_what_applies_and_needs_no_torch(script):
    code = ("import sys, runpy; sys.modules['torch'] = None; "
            "sys.argv = [sys.argv[1], '--help']; runpy.run_path(sys.argv[0], run_name='__main__')")
    ran = subprocess.run([sys.executable, "-c", code, str(ROOT / script)], capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "cp1252"})  # which has no λ
    assert ran.returncode == 0, ran.stderr.decode("cp1252")
    out = ran.stdout.decode("cp1252")
    has_default = re.search(r"\bconfigure\(.*default=", (ROOT / script).read_text(encoding="utf-8"))
    tiny = runpy.run_path(str(ROOT / "config" / "tiny.py")) if has_default else {}
    for f in fields(settings_of(script)):
        value = tiny.get(f.name, default_of(f))
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown = f"  --{f.name}={text} ".encode("cp1252", "replace").decode("cp1252")
        assert any(line.startswith(shown) for line in out.splitlines()), (shown, out)


def test_help_takes_no_value_of_a_flag_for_a_config_file(capsys, tmp_path):
    (tmp_path / "own.py").write_text("n_embd = 96")
    for words, width in ((["--out", f"{tmp_path}/own.py"], 128), (["--shard", f"{tmp_path}/own.py"], 96),
                         ([f"{tmp_path}/own.py", "--out=x"], 96), (["--out=x", f"{tmp_path}/own.py"], 96)):
        with pytest.raises(SystemExit):
            configure(settings_of("train.py"), [*words, "--help"], default=ROOT / "config" / "tiny.py")
        assert f"  --n_embd={width} " in capsys.readouterr().out, words


def test_a_missing_package_is_one_line():
    ran = subprocess.run([sys.executable, "-S", str(ROOT / "train.py")], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": ""})  # without site-packages
    assert ran.returncode == 2 and ran.stderr.startswith("train.py: torch is not installed")
    assert ran.stderr.count("\n") == 1 and "requirements.txt" in ran.stderr


# --------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("error,code,line", [
    (BadInput("a\nb"), 2, "script.py: a b\n"), (KeyboardInterrupt(), 130, "script.py: interrupted\n")])
def test_run_says_it_in_one_line(error, code, line, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == code and capsys.readouterr().err == line


def test_only_training_runs_in_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as another tool may have left it
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    run(lambda: print("measures"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    run(lambda: print("trains"))
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as stopped:
        run(lambda: print("measures"))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "measures\ntrains\n"
    assert shown.err == "eval.py: runs in one process: start it with python in place of torchrun\n"


def test_what_the_encoding_lacks_is_still_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    run(lambda: print("λ 0.1", flush=True))
    assert out.buffer.getvalue().split() == [b"?", b"0.1"]


def test_the_reason_of_an_exception_is_never_empty():
    assert reason(ValueError()) == "ValueError" and reason(OSError(28, "No space left")) == "No space left"
    long = reason(ValueError("word " * 100 + "\nend"))
    assert len(long) <= 160 and long.endswith("word …")
