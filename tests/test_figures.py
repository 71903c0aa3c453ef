"""Curves of runs from their logs, and loss against FLOPs."""

import json
import sys

import pytest

import figures
from common import BadInput
from compare import Run
from figures import curves, frontier, lines_of, loss_against_flops, read_log

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path):
    """A run at work: a line of log every second step, an evaluation every third, and half a line."""
    rows = []
    for step in range(1, 13):
        if step % 2 == 0:
            row = {"step": step, "tokens": 100 * step, "flops": 1e6 * step, "latent_steps": 3 - step / 8}
            rows.append(row | {"tau": step / 100, "lr": 1e-3})
        if step % 3 == 0:
            rows.append({"step": step, "val_loss": 3 - step / 10, "val_steps": 1.5})
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "log.jsonl").write_text(text + '{"step": 14, "tok')
    return tmp_path / "run"


def test_curves_are_those_of_the_log(run):
    """Validation stands at the tokens and FLOPs of its step, also where that step has no line of its own."""
    lines = curves(read_log(str(run)))
    assert lines == curves(read_log(f"{run}/log.jsonl"))
    for name, unit in (("loss by tokens", 100), ("loss by FLOPs", 1e6)):
        x, y = zip(*lines[name])
        assert x == pytest.approx([unit * step for step in (3, 6, 9, 12)])
        assert y == pytest.approx([2.7, 2.4, 2.1, 1.8])
    assert lines["val_steps"][0] == (300, 1.5)
    assert lines["tau"] == [(100 * step, step / 100) for step in range(2, 13, 2)]
    assert lines["latent_steps"][-1] == (1200, 1.5) and lines["lr"][0] == (200, 1e-3)


@pytest.mark.parametrize("kind,magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_command_draws_any_runs(kind, magic, run, call, tmp_path):
    file = tmp_path / f"curves.{kind}"
    run = run.rename(tmp_path / "a$x_$b")  # which is no formula
    out, _ = call("compare", "plot", run, run / "log.jsonl", f"--file={file}")
    assert file.read_bytes().startswith(magic) and out == f"written: {file}\n"


def test_a_log_that_two_runs_have_written_is_refused(run):
    lines = (run / "log.jsonl").read_text().splitlines(True)
    (run / "log.jsonl").write_text("".join(lines[:4] + lines[:2]))
    with pytest.raises(BadInput, match="log.jsonl has its steps out of order"):
        read_log(str(run))


def test_every_run_is_drawn(run):
    figure = figures.draw_curves([str(run), f"{run}/log.jsonl"])
    loss, flops, steps, tau, rate, legend = figure.axes
    for axis in (loss, flops, steps, tau, rate):
        drawn = [line for line in axis.lines if len(line.get_xdata())]
        assert len(drawn) == (4 if axis is steps else 2)
    assert list(loss.lines[0].get_ydata()) == pytest.approx([2.7, 2.4, 2.1, 1.8])
    assert [text.get_text() for text in legend.get_legend().get_texts()] == [str(run), f"{run}/log.jsonl"]


def test_runs_of_a_comparison_are_named_by_what_differs():
    runs = [f"out/t-compare-3x16-20/method={who}-learning_rate=1e-05-seed={seed}-tau=0.1"
            for who, seed in (("loop", 1), ("mor", 1), ("mor", 2))]
    short = ["method=loop-seed=1", "method=mor-seed=1", "method=mor-seed=2"]
    assert figures.labels_of(runs) == [f"out/t-compare-3x16-20/{name}" for name in short]
    assert figures.labels_of(runs[1:]) == ["seed=1", "seed=2"]
    assert figures.labels_of(runs[:1]) == runs[:1] and figures.labels_of(["a$b", "a$b"]) == ["a\\$b"] * 2


def test_a_line_holds_the_best_for_the_flops():
    points = [(4, 2.0), (1, 3.0), (2, 3.5), (3, 2.5), (5, 2.0), (4, 2.2)]
    assert frontier(points) == [(1, 3.0), (3, 2.5), (4, 2.0)] and frontier([]) == []
    figure = loss_against_flops({0: {"adaptive": points, "loop": [(2, 3.0)]}, 90: {"loop": [(1, 2.0)]}})
    axis, other = figure.axes
    assert "90 tokens" in other.get_title() and other.lines[0].get_color() == axis.lines[2].get_color()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["adaptive", "loop"]
    assert [len(line.get_xdata()) for line in axis.lines] == [6, 3, 1, 1]


def test_a_method_gives_the_curves_of_all_its_kinds_for_each_text():
    def run(method, seed, K=1, tokens=0, layers=2):
        return Run(method, 1e-3, seed, K, None, 0.1, 0.0, 1.0, layers, 20, tokens)

    def result(flops, loss):
        return {"flops": flops, "curve": [(10, flops / 2, loss + 1), (20, flops, loss)]}

    finished = {run("loop", 0): result(4, 2.0), run("loop", 1): result(4, 3.0),
                run("pause", 0): result(6, 2.0), run("pause", 1): result(6, 2.0),
                run("pause", 0, 2): result(8, 1.0), run("pause", 1, 2): result(8, 1.5),
                run("loop", 0, layers=4): result(6, 1.0), run("loop", 1, layers=4): result(6, 2.0),
                run("mor", 0): result(1, 1.0),  # one seed, where others have two
                run("mor", 0, tokens=90): result(1, 1.0),  # but not on this text
                run("ponder", 0): result(1, 1.0), run("ponder", 1): {"flops": None, "curve": []}}
    pause = [(3, 3.0), (6, 2.0), (4, 2.25), (8, 1.25)]
    loops = {"loop": [(2, 3.5), (4, 2.5)], "loop, more layers": [(3, 2.5), (6, 1.5)]}
    assert lines_of(finished) == {0: {**loops, "pause": pause}, 90: {"mor": [(0.5, 2.0), (1, 1.0)]}}
    assert lines_of({}) == {}


@pytest.mark.parametrize("words,wanted", [
    ([], "name the folders"),
    (["{tmp}/nowhere"], "nowhere"),
    (["{tmp}/broken.jsonl"], "broken.jsonl"),
    (["{tmp}/empty.jsonl"], "no step of training"),
    (["{tmp}/before.jsonl"], "before.jsonl is not the log.jsonl"),
    (["{tmp}/lacks.jsonl"], "lacks.jsonl is not the log.jsonl"),
    (["{tmp}/run", "--file={tmp}/a.gif"], ".png"),
    (["{tmp}/run", "--file={tmp}/no/a.png"], "--file"),
    (["{tmp}/log.png", "--file={tmp}/log.png"], "--runs and --file are both"),
])
def test_wrong_input(words, wanted, run, call, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"step": 1}\nnonsense\n')
    (tmp_path / "empty.jsonl").write_text("")
    zero, step = '{"step": 0, "flops": 0, "tokens": 0}\n', '{"step": 1, "flops": 1}\n'
    (tmp_path / "before.jsonl").write_text(zero + '{"step": 0, "val_loss": 1, "val_steps": 0}\n')
    (tmp_path / "lacks.jsonl").write_text(step + '{"step": 1, "val_loss": 1, "val_steps": 0}\n')
    before = sorted(tmp_path.rglob("*"))
    assert wanted in call("compare", "plot", *(word.format(tmp=tmp_path) for word in words), code=2)[1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(run, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in call("compare", "plot", run, code=2)[1]
