"""What compare.py trains and says: finished runs are read back, and a run that diverges is a result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

import compare
import prepare
from compare import KINDS, TRAINED, Compare, Run, plain_run
from schedule import OF_ADAPTIVE, STEERING
from train import Train

ROOT = Path(__file__).parent.parent
SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_ff": 24, "block_size": 16, "max_latent": 2,
         "max_steps": 20, "global_batch_size": 2, "eval_windows": 2, "device": "cpu"}
STUB = '''
"""Stands in for train.py: what a run costs and reaches is a function of its flags, and it takes no time."""
import json, os, signal, sys, time
from pathlib import Path

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
out = Path(flags["out"])
out.mkdir(parents=True, exist_ok=True)
with open(out.parent / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(flags | {"threads": os.environ["OMP_NUM_THREADS"], "began": time.time()}) + "\\n")
here = Path(__file__).parent
rate, steps, latent = float(flags["learning_rate"]), int(flags["max_steps"]), int(flags["max_latent"])
if (here / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((out / "ckpt.pt").write_text("saved"), sys.exit(0)))
    (here / f"waits-{os.getpid()}").write_text("")
    time.sleep(60)
if flags["method"] == "mor" and (here / "crash").exists():
    sys.exit("Traceback (most recent call last):\\n  some\\nRuntimeError: mor fell over")
thinks = 0 if flags["method"] == "vanilla" or flags.get("tau") == "1.0" else latent
with open(out / "log.jsonl", "w") as log:
    for step in range(1, steps + 1):
        if rate > 0.1 and step == 3:
            sys.exit(print("train.py: diverged at step 3: loss nan", file=sys.stderr) or 3)
        row = {"step": step, "tokens": 32 * step, "flops": (1 + thinks) * 1e6 * step, "latent_steps": thinks}
        log.write(json.dumps(row) + "\\n")
        if step == steps:
            log.write(json.dumps({"step": step, "val_loss": 2.5}) + "\\n")
loss = 3 - thinks / 10 + abs(rate - 2e-3) + int(flags["seed"]) / 1e5
result = {"val_loss": loss, "perplexity": 9.0, "bits_per_byte": loss / 0.7, "val_steps": float(thinks)}
result |= {"flops": (1 + thinks) * 1e6 * steps, "tokens": 32 * steps, "seconds": 1.0, "parameters": 7}
(out / "summary.json").write_text(json.dumps({"config": flags, **result}))
'''


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    prepare.prepare(prepare.Prepare([str(tmp_path / "text.txt")], out=str(tmp_path), name="data"))
    return tmp_path / "data"


def flags(tmp_path, **other):
    folders = {name: f"{tmp_path}/{name}" for name in ("data", "out", "results")}
    return [f"--{name}={value}" for name, value in (SHAPE | folders | other).items()]


@pytest.fixture
def compared(call, data, tmp_path, monkeypatch):
    """compare.py with a stand-in for train.py → what it printed, or, where it must refuse, its one line."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "train.py").write_text(STUB)
    monkeypatch.setattr(compare, "TRAIN", tmp_path / "stub" / "train.py")

    def compared(*arguments, code=0, **other):
        return call("compare", *flags(tmp_path, **other), *arguments, code=code)[code == 2]
    return compared


def calls(tmp_path):
    path = tmp_path / "out-compare-3x16-20" / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stored(tmp_path):
    return json.loads((tmp_path / "results" / "quality-3x16-20.json").read_text())


def rows(out, title):
    """The table under a title: the cells of each row, the name of the run first."""
    lines = out[out.index(title) :].splitlines()[3:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_real_train_py(call, data, tmp_path):
    """Trains with train.py itself, once at a rate that diverges, and reads everything back without it."""
    arguments = [*flags(tmp_path, max_steps=3), "--methods", "adaptive", "no thoughts", "--rates", "2e-3",
                 "1e30"]
    arguments += ["--parts", "rates", "--jobs=2"]
    first, _ = call("compare", *arguments)
    path = tmp_path / "results" / "quality-3x16-3.json"
    runs = json.loads(path.read_text())["runs"]
    assert len(runs) == 4 and {run["method"] for run in runs} == {"adaptive"}
    for run in runs:
        if run["learning_rate"] == 1e30:
            assert run["val_loss"] is run["flops"] is None
            continue
        assert run["val_loss"] > 0 and run["tokens"] == 3 * 2 * 16 and run["seed"] == 1337 and "commit" in run
        assert [step for step, _, _ in run["curve"]] == [1, 2, 3]
        assert run["curve"][-1][1:] == [run["flops"], run["val_loss"]]
        assert run["train_steps"] == 0 if run["tau"] == 1 else 0 < run["train_steps"] <= 2
    assert [row[5] for row in rows(first, "Learning rates")][2:] == ["1 of 1 diverged"] * 2
    assert not list((tmp_path / "out-compare-3x16-3").rglob("*.tmp"))
    shutil.rmtree(tmp_path / "out-compare-3x16-3")
    shutil.rmtree(data)
    again, _ = call("compare", *arguments)
    assert again == first[first.index("\nLearning rates") :] and json.loads(path.read_text())["runs"] == runs


def test_every_setting_of_train_py_is_known_and_has_its_default():
    ours = {f.name: (f.type, f.default) for f in fields(Compare)}
    set_here = {"resume", "eval_every", "save_every", "keep_every", "log_every", "tensorboard", "init_from",
                "shard"}
    assert {f.name for f in fields(Train)} - set_here == set(TRAINED)
    for f in fields(Train):
        assert f.name in set_here or ours[f.name] == (f.type, f.default), f.name
    assert Train().log_every == 1, "compare.py leaves it so, and reads every step"


def test_all_tables(compared, tmp_path):
    parts = "rates", "tokens", "flops", "pareto", "lengths"
    out = compared("--rates", "1e-3", "2e-3", "--seeds=2", "--parts", *parts)
    everyone = list(KINDS)
    rates = rows(out, "Learning rates (first seed):")
    assert [row[0] for row in rates] == [f"{who}, rate {rate}" for rate in (0.001, 0.002) for who in everyone]
    tokens = rows(out, "At equal tokens (2 seeds):")
    assert [row[0] for row in tokens] == [f"{who}, rate 0.002" for who in everyone], "each at its best rate"
    assert tokens[0][1:] == ["640", "2.000e+07", "0.00", "0.00", "3.0134 ± 0.0000", "4.3048"]
    equal = rows(out, "At equal training FLOPs, those of adaptive; the number of steps is what they buy:")
    assert [row[0] for row in equal[:2]] == ["vanilla, 60 steps, rate 0.002", "adaptive, rate 0.002"]
    assert {row[2] for row in equal} == {"6.000e+07"}
    pareto = [row[0] for row in rows(out, "Loss against passes, at equal tokens:")]
    assert pareto == [f"{who}, rate 0.002" for who in KINDS if who not in ("mor", "no thoughts")] + [
        "vanilla, 6 layers, rate 0.002", "vanilla, 9 layers, rate 0.002", "vanilla, 12 layers, rate 0.002",
        *(f"adaptive, budget {budget}, rate 0.002" for budget in ("0.5", "1", "1.5", "2")),
        "loop, K = 1, rate 0.002", "pause, K = 1, rate 0.002", "ponder, K = 1, rate 0.002",
        "ponder2, K = 2, rate 0.002", "all steps, K = 1, rate 0.002"]
    made = calls(tmp_path)
    assert len(made) == len(stored(tmp_path)["runs"]) == len({tuple(sorted(each.items())) for each in made})
    plain = next(each for each in made if each["method"] == "vanilla" and each["seed"] == "1338")
    told = {"n_embd": "16", "eval_every": "2", "save_every": "2", "resume": "False"}
    assert told.items() <= plain.items() and "dtype" not in plain, "what is empty is left to train.py"
    assert not {*OF_ADAPTIVE, *STEERING} & plain.keys(), "what vanilla does not read is not said to it"


def test_finished_runs_are_read_back(compared, tmp_path):
    arguments = ["--rates", "1e-3", "2e-3", "--methods", "vanilla", "adaptive"]
    arguments += ["--parts", "rates", "tokens", "flops"]
    first = compared(*arguments)
    made, kept = len(calls(tmp_path)), stored(tmp_path)
    again = compared(*arguments)
    assert len(calls(tmp_path)) == made and stored(tmp_path) == kept
    assert again == re.sub(r"(?m)^\d+ of .*\n", "", first)
    compared(*arguments, "--seeds=2")
    assert 0 < len(calls(tmp_path)) - made < made, "only what the second seed wants is new"
    assert stored(tmp_path)["runs"][: len(kept["runs"])] == kept["runs"]
    path = tmp_path / "results" / "quality-3x16-20.json"
    path.write_text(path.read_text().replace('"commit": "', '"commit": "another'))
    out = compared(*arguments)
    assert "runs of commit another" in out and "are not made again" in out


def test_a_run_that_diverges_is_a_result(compared, tmp_path):
    """The sweep goes on, the JSON stays JSON, and another rate is the best."""
    out = compared("--rates", "0.5", "2e-3", "--methods", "vanilla", "loop", "--parts", "rates", "tokens")
    rates = rows(out, "Learning rates (first seed):")
    assert [row[0] for row in rates[1:3]] == ["loop, rate 0.5", "vanilla, rate 0.002"]
    assert rates[0][1:] == ["–", "–", "0.00", "–", "1 of 1 diverged", "–"] and rates[2][5] == "3.0134"
    assert [row[0] for row in rows(out, "At equal tokens")] == ["vanilla, rate 0.002", "loop, rate 0.002"]
    text = (tmp_path / "results" / "quality-3x16-20.json").read_text()
    run = json.loads(text, parse_constant=pytest.fail)["runs"][0]
    assert run["method"] == "vanilla" and run["learning_rate"] == 0.5
    assert run["val_loss"] is None and run["curve"] == []
    made = len(calls(tmp_path))
    compared("--rates", "0.5", "2e-3", "--methods", "vanilla", "loop", "--parts", "rates", "tokens")
    assert len(calls(tmp_path)) == made, "it is not tried again"


def test_what_is_asked_for_twice_is_made_once(compared, tmp_path):
    out = compared("--rates", "2e-3", "0.002", "--methods", "loop", "loop", "--parts", "rates")
    assert len(calls(tmp_path)) == 1 and len(rows(out, "Learning rates")) == 1


def test_all_diverge(compared, tmp_path):
    config = tmp_path / "fast.py"
    config.write_text("learning_rate = 0.6\n")
    out = compared(str(config), "--rates", "0.5", "--seeds=2", "--methods", "vanilla", "loop")
    assert "2 of 2 diverged" in out and "vanilla diverged" in out and "loop diverged" in out


def test_other_settings_are_refused(compared, tmp_path):
    arguments = ["--methods", "vanilla", "--parts", "tokens"]
    compared(*arguments)
    before, made = stored(tmp_path), len(calls(tmp_path))
    for name, value in (("weight_decay", 0.5), ("block_size", 12), ("dtype", "bfloat16")):
        assert name in compared(*arguments, f"--{name}={value}", code=2)
    assert stored(tmp_path) == before and len(calls(tmp_path)) == made
    path = tmp_path / "results" / "quality-3x16-20.json"
    older = stored(tmp_path)  # of before there was a setting: its runs had the default
    del older["settings"]["explore"]
    path.write_text(json.dumps(older))
    assert "explore" in compared(*arguments, "--explore=1", code=2)
    for name, value in (("device", "cpu"), ("compile", "False"), ("jobs", 2), ("seed", 1337)):
        compared(*arguments, f"--{name}={value}")
    assert len(calls(tmp_path)) == made


def test_other_data_are_refused(compared, data, tmp_path):
    """Tables of finished runs need no data; but runs on different texts never share a table."""
    compared("--methods", "vanilla", "--parts", "tokens")
    (tmp_path / "text.txt").write_text("jumps over the lazy dog " * 200)
    prepare.prepare(prepare.Prepare([str(tmp_path / "text.txt")], out=str(tmp_path), name="other"))
    shutil.rmtree(data)
    (tmp_path / "other").rename(data)
    compared("--methods", "vanilla", "--parts", "tokens")
    made = len(calls(tmp_path))
    assert "other data" in compared("--methods", "vanilla", "loop", "--parts", "tokens", code=2)
    shutil.rmtree(data)
    compared("--methods", "vanilla", "--parts", "tokens")
    assert "prepare.py" in compared("--methods", "vanilla", "loop", "--parts", "tokens", code=2)
    assert len(calls(tmp_path)) == made


def test_what_is_in_results_reads_as_ever(call, tmp_path, monkeypatch):
    """The README's runs, of an earlier version: every table comes back, without a run and without data."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "quality-3x64-400.json", tmp_path / "results")
    before = (tmp_path / "results" / "quality-3x64-400.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    methods = [who for who in KINDS if who != "all steps"]
    arguments = ["--seeds=3", "--lam=0", "--methods", *methods]
    arguments += ["--parts", "rates", "tokens", "flops", "pareto"]
    out, _ = call("compare", ROOT / "config" / "micro.py", *arguments)
    vanilla = ["vanilla, rate 0.006", "819,200", "1.091e+12", "0.00", "0.00", "1.7858 ± 0.0129", "2.5765"]
    assert vanilla in rows(out, "At equal tokens")
    assert "mor, 1072 steps, rate 0.006" in [row[0] for row in rows(out, "At equal training FLOPs")]
    assert rows(out, "Loss against passes")[-1][0] == "ponder2, K = 3, rate 0.012"
    assert (tmp_path / "results" / "quality-3x64-400.json").read_bytes() == before
    runs = json.loads(before)["runs"]
    settings = compare.configure(Compare, [str(ROOT / "config" / "micro.py")], also="train.py")
    assert list(compare.Runs(settings).finished.values()) == runs, "each is another run"


def test_a_method_that_cannot_be_built_is_refused_before_any_is_trained(compared, tmp_path):
    assert "mor needs" in compared("--methods", "vanilla", "mor", "--parts", "tokens", "--n_layer=2", code=2)
    assert not (tmp_path / "results").exists()


def test_jobs_share_the_cores(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.torch, "get_num_threads", lambda: 7)
    (tmp_path / "stub" / "wait").write_text("")
    interrupt_when(tmp_path, 3)
    compared("--methods", "vanilla", "loop", "pause", "ponder", "--parts", "tokens", "--jobs=3", code=130)
    assert len(calls(tmp_path)) == 3 and {each["threads"] for each in calls(tmp_path)} == {"2"}


def interrupt_when(tmp_path, waiting):
    """Sends this process a Ctrl-C as soon as so many stand-ins are at work."""
    code = ("import os, signal, sys, time; from pathlib import Path\n"
            "while len(list(Path(sys.argv[1]).glob('waits-*'))) < int(sys.argv[2]): time.sleep(0.05)\n"
            "time.sleep(0.2); os.kill(int(sys.argv[3]), signal.SIGINT)")
    subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "stub"), str(waiting), str(os.getpid())])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_runs_and_the_same_command_goes_on(compared, data, tmp_path, number):
    (tmp_path / "stub" / "wait").write_text("")
    arguments = ["--methods", "vanilla", "loop", "pause", "--parts", "tokens"]
    stub = str(tmp_path / "stub" / "train.py")
    script = f"import compare; compare.TRAIN = {stub!r}; compare.run(compare.main)"
    command = [sys.executable, "-c", script, *flags(tmp_path), *arguments, "--jobs=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "stub").glob("waits-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and len(err.splitlines()) == 1 and "interrupted" in err
    assert len(calls(tmp_path)) == 2, "the third is not begun"
    saved = list((tmp_path / "out-compare-3x16-20").glob("*/ckpt.pt"))
    assert len(saved) == 2, "each was asked to stop, and saved"
    (tmp_path / "stub" / "wait").unlink()
    compared(*arguments)
    assert sorted(each["resume"] for each in calls(tmp_path)[2:]) == ["False", "True", "True"]
    assert len(stored(tmp_path)["runs"]) == 3


def test_a_run_that_fails_ends_the_sweep_with_its_last_line(compared, tmp_path):
    (tmp_path / "stub" / "crash").write_text("")
    err = compared("--methods", "vanilla", "mor", "loop", "--parts", "tokens", code=2)
    assert "mor, rate 0.004, seed 1337" in err and "RuntimeError: mor fell over" in err
    said = Path(re.search(r"\S+\.stderr", err).group())
    assert "Traceback" in said.read_text()
    assert [run["method"] for run in stored(tmp_path)["runs"]] == ["vanilla"]
    assert [run["method"] for run in calls(tmp_path)] == ["vanilla", "mor"], "loop does not begin"


def test_two_at_once_keep_each_others_runs(compared, tmp_path):
    arguments = [*flags(tmp_path), "--methods", "vanilla", "--parts", "tokens"]
    settings = compare.configure(Compare, arguments, default=compare.TINY, also="train.py")
    ours = compare.Runs(settings)
    compared("--methods", "loop", "--parts", "tokens")
    ours.make([plain_run("vanilla", settings)])
    assert [run["method"] for run in stored(tmp_path)["runs"]] == ["loop", "vanilla"]


def test_the_figure(compared, tmp_path):
    pytest.importorskip("matplotlib")
    out = compared("--methods", "vanilla", "adaptive", "--rates", "2e-3", "0.5", "--parts", "rates", "--plot")
    svg = tmp_path / "results" / "quality-3x16-20.svg"
    assert out.count("written: ") == 2 and "<svg" in svg.read_text()
    assert svg.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".svg", ".png"}


def test_a_figure_without_matplotlib_is_refused_before_the_work(compared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in compared("--plot", code=2)
    assert not calls(tmp_path) and not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments,words", [
    (["--budgets", "1", "99", "--parts", "pareto"], ["99", "max_latent 2"]),
    (["--budgets", "1"], ["budgets", "--parts pareto"]),
    (["--rate_steps=1", "--parts", "tokens"], ["rate_steps", "--parts rates"]),
    (["--seeds=2", "--parts", "rates"], ["seeds", "--parts tokens"]),
    (["--budgets", "-1"], ["budgets"]),
    (["--budget=3"], ["3", "max_latent"]),
    (["--rates", "nan"], ["rates"]),
    (["--rates", "0"], ["rates"]),
    (["--learning_rate=-1"], ["learning_rate"]),
    (["--learning_rate=1e-3"], ["learning_rate", "--rates"]),
    (["--course=0.1", "--budget=None"], ["--course is not read here", "--budget"]),
    (["--methods", "vanilla", "no thoughts", "--explore=2"], ["explore", "--methods adaptive"]),
    (["--methods", "loop", "--parts", "pareto", "--budgets", "1"], ["budgets", "--methods adaptive"]),
    (["--methods", "loop", "--parts", "pareto", "--depths", "2"], ["depths", "--methods vanilla"]),
    (["--methods", "vanilla", "--parts", "pareto", "--ks", "1"], ["ks is not read", "--methods loop"]),
    (["--methods", "vanilla", "loop", "--lam=3"], ["--lam is not read here", "--methods adaptive"]),
    (["--methods", "all steps", "--budget=1"], ["--budget is not read here", "--methods adaptive"]),
    (["--methods", "vanilla", "--exit_loss=1"], ["exit_loss", "--methods adaptive or all steps"]),
    (["--warmup=2"], ["warmup"]),
    (["--grad_clip=-1"], ["grad_clip"]),
    (["--seeds=0"], ["seeds"]),
    (["--seed=-1"], ["seed"]),
    (["--jobs=0"], ["jobs"]),
    (["--max_steps=0"], ["max_steps"]),
    (["--parts", "speed"], ["speed", "pareto"]),
    (["--methods", "lop"], ["lop", "loop"]),
    (["--method=loop"], ["--methods"]),
    (["--eval_every=3"], ["eval_every"]),
    (["--out="], ["out"]),
    (["--n_head=3"], ["n_head"])])
def test_wrong_input_is_refused_before_anything_is_written(arguments, words, compared, tmp_path):
    err = compared(*arguments, code=2)
    assert all(word in err for word in words), err
    assert not calls(tmp_path)
    assert not (tmp_path / "results").exists() and not (tmp_path / "out-compare-3x16-20").exists()


def test_results_that_are_no_results_are_left_alone(compared, tmp_path):
    path = tmp_path / "results" / "quality-3x16-20.json"
    path.parent.mkdir()
    runs = ['{"settings": {}, "runs": {"a": %s}}' % run for run in ("{}", "1", "[]")]
    for content in ("", "[]", "{}", "\0\1", *runs):
        path.write_text(content)
        assert "--results" in compared("--methods", "vanilla", code=2)
        assert path.read_text() == content and not calls(tmp_path)


def test_default_budgets_fit_max_latent():
    assert Compare(max_latent=1).budgets == [0.5, 1.0]
    assert Compare(max_latent=5).budgets == [0.5, 1.0, 1.5, 2.0]
    assert Compare(max_latent=0).budgets == []
    Compare(max_latent=1, budget=1.4, methods=["all steps"])  # which has none: not refused


def test_the_budgets_of_pareto_have_a_course(compared):
    out = compared("--parts", "pareto", "--methods", "adaptive", "--budgets", "1", "--budget=None",
                   "--course=0.1")
    assert "adaptive, budget 1" in out


def test_adaptive_at_a_fixed_depth_is_a_control(compared):
    """And is made once; with a budget or a price a τ of 0 or 1 is only where it begins."""
    fixed = ["--tau=0", "--budget=None", "--lam=0"]
    out = compared(*fixed, "--rates", "1e-3", "--methods", "vanilla", "adaptive", "all steps")
    assert [row[0].split(",")[0] for row in rows(out, "At equal tokens")] == ["vanilla", "all steps"]
    out = compared(*fixed, "--budget=1", "--rates", "2e-3", "--methods", "adaptive", "all steps")
    assert [row[0].split(",")[0] for row in rows(out, "At equal tokens")] == ["adaptive", "all steps"]


def test_a_setting_makes_only_those_anew_that_read_it(compared, tmp_path):
    methods = ["--budget=1", "--parts", "tokens", "--methods", "vanilla", "loop", "all steps", "adaptive"]
    compared(*methods)
    assert len(calls(tmp_path)) == 4
    compared(*methods, "--beta=3", "--tau=0.2")
    assert len(calls(tmp_path)) == 5
    compared(*methods, "--beta=3", "--tau=0.2", "--max_latent=1")
    assert len(calls(tmp_path)) == 8  # vanilla has no latent steps


def test_runs_are_keyed_by_what_they_are():
    settings = Compare(learning_rate=2e-3, budget=1.0, tau=0.2, lam=0.1)
    adaptive, control = plain_run("adaptive", settings), plain_run("no thoughts", settings)
    assert adaptive == Run("adaptive", 2e-3, 1337, 3, 1.0, 0.2, 0.1, 1.0, 4, 1000, 0)
    assert adaptive.who == "adaptive"
    assert control == Run("adaptive", 2e-3, 1337, 3, None, 1.0, 0.0, 1.0, 4, 1000, 0)
    assert control.who == "no thoughts" and plain_run("all steps", settings).who == "all steps"
    assert plain_run("ponder2", settings).max_latent == 1 and plain_run("loop", settings).budget is None
    assert len({adaptive, control, plain_run("adaptive", settings)}) == 2
