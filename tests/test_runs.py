"""What guards a run: its lock, its log, and the refusal to resume what is not the run that it was."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import runs
import train as train_module
from common import BadInput, load_checkpoint
from conftest import flat, unread
from runs import cut_log, lock, log_state, write_log
from test_train import (  # noqa: F401
    ENV, ROOT, SMALL, TORCHRUN, data, flags, loopback, losses, one_thread, records)
from train import Train, train


@pytest.fixture
def refused(call):
    return lambda *arguments: call("train", *arguments, code=2)[1]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of six steps, to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(Train(out=str(out), data=str(data), **SMALL))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def change(folder, without=(), **values):
    """Replaces values of a run's checkpoint, and removes others."""
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True) | values
    torch.save({name: value for name, value in checkpoint.items() if name not in without}, folder / "ckpt.pt")


# ----------------------------------------------------------------------------------------------------- resume


def test_a_folder_that_holds_a_run_is_left_alone(folder, data, refused):
    before = contents(folder)
    assert "--resume" in refused(*flags(data, folder))
    others = {"n_layer=2": dict(n_layer=3), "seed=1337": dict(seed=1), "6 steps": dict(max_steps=5)}
    for words, settings in others.items():
        assert words in refused(*flags(data, folder, **settings), "--resume")
        assert before == contents(folder)


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "log.jsonl", "summary.json", "ckpt-4.pt"])
def test_each_file_of_a_run_is_a_run(name, data, tmp_path, refused):
    (tmp_path / name).write_text("something")
    line = refused(*flags(data, tmp_path))
    assert name in line and contents(tmp_path) == {name: b"something"}
    if name != "ckpt.pt":
        assert "ckpt.pt" in refused(*flags(data, tmp_path), "--resume")
        assert contents(tmp_path) == {name: b"something"}


def test_other_data_is_refused(folder, data, tmp_path, refused, monkeypatch):
    other = tmp_path / "small"
    text = (data.parent / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("def f7(", "def g7("))  # as many tokens
    command = [sys.executable, str(ROOT / "prepare.py"), "--input", str(tmp_path / "text.txt"),
               f"--out={tmp_path}", "--name=small"]
    subprocess.run(command, check=True, env=ENV, capture_output=True)
    sizes = [(where / "train.bin").stat().st_size for where in (data, other)]
    assert sizes[0] == sizes[1]
    before = contents(folder)
    line = refused(*flags(other, folder, max_steps=9), "--resume")
    assert "other text" in line and "--data" in line and before == contents(folder)
    monkeypatch.setattr(runs, "describe", lambda tokenizer: "another")
    assert "another tokenizer" in refused(*flags(other, folder, max_steps=9), "--resume")
    moved = shutil.copytree(data, tmp_path / "moved")  # the same text in another place is the same
    train(Train(out=str(folder), data=str(moved), resume=True, **SMALL | {"max_steps": 7}))
    assert len(losses(folder)) == 7


@pytest.mark.parametrize("content", ["", '{"step": 1, "loss": 3.0}\n', "notes\n"])
def test_a_foreign_log_is_left_alone(content, folder, data, refused):
    (folder / "log.jsonl").write_text(content)
    before = contents(folder)
    assert "log.jsonl" in refused(*flags(data, folder, max_steps=9), "--resume")
    assert before == contents(folder)


def test_a_log_that_was_moved_away_begins_anew(folder, data):
    (folder / "log.jsonl").unlink()
    for steps in (8, 10):
        train(Train(out=str(folder), data=str(data), resume=True, **SMALL | {"max_steps": steps}))
    assert [*losses(folder)] == [7, 8, 9, 10]


def test_the_log_is_cut_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "log.jsonl"
    assert log_state(path)[0] == 0
    write_log(path, {"step": 1})
    size, checksum = log_state(path)
    write_log(path, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    cut_log(path, size, checksum)
    assert path.read_text() == '{"step": 1}\n' and log_state(path) == (size, checksum)
    with pytest.raises(ValueError):
        write_log(path, {"loss": float("nan")})
    assert path.read_text() == '{"step": 1}\n'


def test_a_longer_schedule_is_said(folder, data, capsys):
    train(Train(out=str(folder), data=str(data), resume=True, **SMALL))
    assert "learning rate" not in capsys.readouterr().out
    train(Train(out=str(folder), data=str(data), resume=True, **SMALL | {"max_steps": 12}))
    out = capsys.readouterr().out
    assert "learning rate jumps from 3.00e-04 to" in out and len(losses(folder)) == 12


def test_other_code_is_said(folder, data, capsys):
    settings = Train(out=str(folder), data=str(data), resume=True, **SMALL | {"max_steps": 7})
    train(settings)
    assert "commit" not in capsys.readouterr().out
    change(folder, commit="0badc0de")
    train(settings)
    assert "saved at commit 0badc0de" in capsys.readouterr().out
    change(folder, without=["commit"])  # as an older version wrote it
    train(settings)
    assert "commit" not in capsys.readouterr().out


def test_a_finished_run_is_finished(folder, data):
    before = contents(folder)
    train(Train(out=str(folder), data=str(data), resume=True, **SMALL))
    assert records(folder) and before["log.jsonl"] == (folder / "log.jsonl").read_bytes()


@pytest.mark.parametrize("values,words", [
    (dict(step=-5), ["corrupt", "-5"]),
    (dict(step="2"), ["corrupt", "step"]),
    (dict(without=["threshold"]), ["sampled"]),
    (dict(without=["optimizer"]), ["sampled", "optimizer"]),
    (dict(data="another"), ["other text"]),
    (dict(seconds=[1]), ["corrupt", "seconds"]),
    (dict(optimizer={"state": {0: 3}}), ["optimizer"]),
])
def test_a_checkpoint_that_cannot_be_resumed(values, words, folder, data, refused):
    change(folder, **values)
    before = contents(folder)
    line = refused(*flags(data, folder, max_steps=9), "--resume")
    assert all(word in line for word in words), line
    assert before == contents(folder)


@pytest.mark.parametrize("name,value", [
    ("exp_avg", torch.zeros(3)),
    ("exp_avg_sq", torch.zeros(257, 15)),
    ("exp_avg", torch.zeros(257, 16, dtype=torch.float64)),
    ("exp_avg_sq", torch.full((257, 16), float("nan"))),
    ("step", torch.zeros(2)),
    ("exp_avg", None),
    ("exp_avg", "text"),
])
def test_an_optimizer_that_does_not_fit(name, value, folder, data, refused):
    state = torch.load(folder / "ckpt.pt", weights_only=True)["optimizer"]
    state["state"][0][name] = value
    change(folder, optimizer=state)
    before = contents(folder)
    line = refused(*flags(data, folder, max_steps=9), "--resume")
    assert "optimizer" in line and before == contents(folder)


def test_a_checkpoint_of_the_first_version_is_sampled_not_resumed(folder, data, refused):
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    old = {name: value for name, value in checkpoint["train"].items() if name not in ("keep_every", "dtype")}
    new = ("products", "attention", "best", "result", "log", "data")
    change(folder, new, train=old, flops=(1, 2), tokens=384)
    model, _, _ = load_checkpoint(folder)
    assert sum(len(said.token) for said in model.generate([[1, 2]], 3)) == 3
    before = contents(folder)
    assert "older version" in refused(*flags(data, folder, max_steps=9), "--resume")
    assert before == contents(folder)


def test_what_an_older_version_could_not_set_stands_at_its_default(folder, data, refused):
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    change(folder, train={name: value for name, value in checkpoint["train"].items() if name != "explore"})
    words = *flags(data, folder, max_steps=7), "--resume"
    assert "explore=0.0, not 3.0" in refused(*words, "--explore=3")
    assert train(Train(**SMALL | dict(out=str(folder), data=str(data), max_steps=7, resume=True)))


def test_a_model_that_was_kept_is_not_resumed(folder, data, refused):
    os.replace(folder / "best.pt", folder / "ckpt.pt")
    assert "no optimizer" in refused(*flags(data, folder, max_steps=9), "--resume")


# ------------------------------------------------------------------------------------------------------- lock


def test_a_second_run_in_one_folder_is_refused(folder, data, tmp_path, refused):
    held = lock(folder)
    before = contents(folder)
    assert "another train.py" in refused(*flags(data, folder, max_steps=9), "--resume")
    assert before == contents(folder)
    held.close()
    train(Train(out=str(folder), data=str(data), resume=True, **SMALL | {"max_steps": 7}))
    with pytest.raises(BadInput):
        held = lock(tmp_path / "new")
        lock(tmp_path / "new")
    held.close()


HOLDS = """
import pathlib, sys, time, runs
held = runs.lock(pathlib.Path(sys.argv[1]))
print(1)
time.sleep(600)
"""


def test_a_dead_process_leaves_no_lock(tmp_path):
    command = [sys.executable, "-u", "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENV)
    assert process.stdout.readline() == b"1\n"
    with pytest.raises(BadInput, match="another train.py"):
        lock(tmp_path)
    process.kill()
    process.wait()
    (tmp_path / ".ckpt.pt.tmp").write_text("half of it")
    (tmp_path / "notes.tmp").write_text("the user's own")
    (tmp_path / "folder.tmp").mkdir()
    lock(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.tmp", "folder.tmp"}


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path, refused):
    (tmp_path / "file").write_text("")
    assert "--out=" in refused(*flags(data, tmp_path / "file" / "run"))


# ---------------------------------------------------------------------------------------------- disk, signals


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("line,mode", [(4, "rb+"), (5, "a")])
def test_a_full_disk_at_the_log_is_one_line(line, mode, data, tmp_path, monkeypatch, refused):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        def full(path, how, **named):
            if how == mode and path.exists() and len(losses(out)) == line:
                full_disk()
            return open(path, how, **named)

        patch.setattr(runs, "open", full, raising=False)
        said = refused(*flags(data, out))
    assert "log.jsonl" in said and "No space left" in said and "--resume" in said
    assert load_checkpoint(out)[2]["step"] == line // 2 * 2 - 2 * (mode == "rb+")
    train(Train(out=str(out), data=str(data), resume=True, **SMALL))
    assert [*losses(out)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_at_a_checkpoint_is_one_line(data, tmp_path, monkeypatch, refused):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = torch.save

        def save(state, file):
            if state["step"] == 4:
                full_disk()
            original(state, file)

        patch.setattr(torch, "save", save)
        line = refused(*flags(data, out))
    assert "ckpt.pt" in line and "No space left" in line and not [*out.glob("*.tmp")]
    assert load_checkpoint(out)[2]["step"] == 2
    train(Train(out=str(out), data=str(data), resume=True, **SMALL))
    assert [*losses(out)] == [1, 2, 3, 4, 5, 6]


STOPS = """
import os, signal, time
from runs import Stop
stop = Stop()
os.kill(os.getpid(), signal.{0})
assert stop.asked
os.kill(os.getpid(), signal.{0})
time.sleep(2.1 if {1} else 0)
print("alive", flush=True)
os.kill(os.getpid(), signal.{0})
time.sleep(60)
"""


def test_numbers_that_are_lists_may_diverge_too(tmp_path, capsys):
    runs.check_finite({"loss": 1.0, "by layer": [1.0, 2.0], "by head": torch.ones(2, 2)}, 1, tmp_path)
    with pytest.raises(SystemExit) as ended:
        runs.check_finite({"loss": 1.0, "by layer": [1.0, float("nan")]}, 1, tmp_path)
    assert ended.value.code == 3 and "by layer" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_seen_by_several_processes_too(value, monkeypatch):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setattr(runs.dist, "all_reduce", lambda *_: None)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert 0 < runs.largest(model, optimizer) < 1
    model.weight.data[0, 1] = value
    assert runs.largest(model, optimizer) == float("inf")


@pytest.mark.parametrize("name,code,world", [("SIGINT", 130, 1), ("SIGTERM", 143, 2)])
def test_a_second_signal_ends_at_once(name, code, world):
    """Of several processes each gets two for one press, from the terminal and from torchrun."""
    command = [sys.executable, "-c", STOPS.format(name, world > 1)]
    environment = ENV | {"WORLD_SIZE": str(world)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == code and ("alive" in result.stdout) == (world > 1)
    assert result.stderr.count("second Ctrl-C") == (name == "SIGINT") and "Traceback" not in result.stderr


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": "a"}, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "x"}])
def test_what_torchrun_did_not_set_is_refused(environment, data, tmp_path):
    """… in one line: what a job before, or a scheduler, left in the environment."""
    command = [sys.executable, ROOT / "train.py", *flags(data, tmp_path / "run")]
    result = subprocess.run(command, env=ENV | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "torchrun" in result.stderr and not (tmp_path / "run").exists()


def test_a_training_goes_on_without_a_reader(data, tmp_path):
    command = [sys.executable, ROOT / "train.py", *flags(data, tmp_path / "run", max_steps=8, eval_every=2)]
    done = unread(command, env=ENV)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.skipif(not loopback(), reason="no loopback interface")
def test_ctrl_c_under_torchrun_saves_and_is_seen(data, tmp_path):
    arguments = flags(data, tmp_path / "run", max_steps=100000, save_every=100000, eval_every=100000)
    command = [sys.executable, *TORCHRUN, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "run")[2]["step"]
    assert step == max(losses(tmp_path / "run"))
    lines = out.splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith(f"stopped after step {step}, saved to")]
    assert len(found) == 1 and set(lines[found[0] - 1]) == set(lines[found[0] + 1]) == {"="}


def test_a_terminal_of_another_encoding_costs_nothing(data, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *flags(data, tmp_path / "run", budget=1.0)]
    result = subprocess.run(command, env=ENV | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert result.returncode == 0 and b"?" in result.stdout and not result.stderr


# ----------------------------------------------------------------------------------------------- Apple's GPUs


class OnMac(torch.Tensor):
    """Stands in for a tensor on a GPU of Apple's: says that it is elsewhere ("meta"), and refuses float64."""

    @staticmethod
    def __new__(cls, inside):
        if inside.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device="meta")

    def __init__(self, inside):
        self.inside = inside

    def tolist(self):
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return on_mac(function, arguments, named or {})


class Mac(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return on_mac(function, arguments, named or {})


def inside(value):
    return value.inside if isinstance(value, OnMac) else value


def on_mac(function, arguments, named):
    """Runs an operation on the CPU, and puts its result where a Mac would."""
    outside = {}

    def take_out(value):
        if isinstance(value, OnMac):
            outside[id(value.inside)] = value
        return inside(value)

    def put_back(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, OnMac):
            return value
        return outside[id(value)] if id(value) in outside else OnMac(value)

    there, named = tree_map(take_out, [arguments, named])
    goes_to_mac = bool(outside)
    if named.get("device") is not None:
        goes_to_mac = named["device"].type == "meta"
        named["device"] = torch.device("cpu")
    result = function(*there, **named)
    if function is torch.ops.aten.copy_.default:
        return arguments[0]
    return tree_map(put_back, result) if goes_to_mac else result


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("method", ["adaptive", "mor"])
def test_training_runs_where_there_is_no_float64(method, data, tmp_path, monkeypatch):
    settings = SMALL | dict(data=str(data), method=method, n_layer=3, micro_batch_size=2)
    here, there = (Train(out=str(tmp_path / name), **settings) for name in ("here", "there"))
    resumed = Train(out=str(tmp_path / "there"), resume=True, **settings | {"max_steps": 8})
    train(here)
    monkeypatch.setattr(train_module, "pick_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    adam, save = torch.optim.AdamW, torch.save
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **named: adam(*a, foreach=False, **named))
    monkeypatch.setattr(torch, "save", lambda state, file: save(tree_map(inside, state), file))
    with Mac():
        with pytest.raises(TypeError):
            torch.zeros((), device=torch.device("meta")).double()
        train(there)
        train(resumed)
    for one, two in zip(records(tmp_path / "here"), records(tmp_path / "there")):
        assert flat(one) == pytest.approx(flat(two), rel=1e-5, abs=1e-5)
    assert len(losses(tmp_path / "there")) == 8
