"""The invariants of training: any number of processes, kills, the budget, what is not finite, bad input."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import runs
import train as train_module
from baselines import METHODS
from common import BadInput, load_checkpoint, run, save_checkpoint
from conftest import flat, uneven
from prepare import Data
from tokenizer import get_tokenizer, make_tokenizer
from train import Train, train

ROOT = Path(__file__).parent.parent
SMALL = dict(
    n_layer=2, n_head=2, n_embd=16, n_ff=24, block_size=16, max_steps=6, global_batch_size=4, eval_every=3,
    eval_windows=4, save_every=2, learning_rate=3e-3, device="cpu", init_std=0.02, router_bias=0.5, tau=0.3,
    lam=0.01, beta=1.0)
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
       "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
# Not --standalone: it looks the host's own name up, and waits for ever on a machine whose name is not known.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
SECONDS = ("tokens_per_second", "mfu", "waiting")  # what differs from run to run, or with the processes


class Killed(BaseException):
    """As kill -9 does: no handler of errors catches it."""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [f"def f{i}(x): return x * {i * i % 97} + {i}\n" for i in range(300)]
    (folder / "text.txt").write_text("".join(lines))
    script("prepare.py", "--input", folder / "text.txt", f"--out={folder}", "--name=small")
    return folder / "small"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums are then added in one order, in all the processes of a test. MFU is not what is tested here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(train_module, "measure_roof", lambda device, dtype: 1e9)
    yield
    torch.set_num_threads(before)


def script(name, *arguments, launcher=()):
    """A script in a process of its own, which is asked to end after three minutes, its workers with it."""
    command = [sys.executable, *launcher, str(ROOT / name), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    watchdog = threading.Timer(180, process.terminate)
    watchdog.start()
    out, _ = process.communicate()
    watchdog.cancel()
    assert process.returncode == 0, out
    return out


def flags(data, out, **settings):
    values = SMALL | {"budget": None} | settings
    return [str(ROOT / "config" / "tiny.py"), f"--data={data}", f"--out={out}",
            *(f"--{name}={value}" for name, value in values.items())]


def records(out):
    """The lines of a log, without what the clock says; all of them must be JSON as the standard has it."""
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{name: value for name, value in record.items() if name not in SECONDS} for record in found]


def losses(out):
    """Step → loss, from a log that must hold each step once."""
    found = [record for record in records(out) if "loss" in record]
    assert len({record["step"] for record in found}) == len(found)
    return {record["step"]: record["loss"] for record in found}


def summary(out):
    found = json.loads((Path(out) / "summary.json").read_text())
    assert {"machine", "torch", "python", "commit"} < found.keys(), "what made it"
    return {name: value for name, value in found.items() if name not in ("config", "seconds")}


def weights(out, name="ckpt.pt"):
    return load_checkpoint(Path(out) / name)[0].state_dict()


def same(a, b):
    """Whether two runs left the same log, summary, weights and best weights, bit for bit."""
    assert records(a) == records(b) and summary(a) == summary(b)
    for name in ("ckpt.pt", "best.pt"):
        one, two = weights(a, name), weights(b, name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not [*Path(b).glob("*.tmp")]
    return True


def die(monkeypatch, moment):
    """Dies at the moment-th of the moments at which a run does something that can be seen from outside."""
    count = 0

    def dying(function):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            result = function(*arguments, **named)
            count += 1
            if count == moment:
                raise Killed
            return result
        return call

    for name in ("write_log", "save_checkpoint", "evaluate", "lock", "write_whole"):
        monkeypatch.setattr(train_module, name, dying(getattr(train_module, name)))
    monkeypatch.setattr(torch.optim.AdamW, "step", dying(torch.optim.AdamW.step))
    monkeypatch.setattr(os, "replace", dying(os.replace))


# ----------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes(method, data, tmp_path, monkeypatch):
    """Bit for bit: a run that was cut in two by a resume has all that one has which was not."""
    explore = 2.0 if method == "adaptive" else 0.0
    settings = SMALL | dict(method=method, n_layer=3, data=str(data), budget=1.0, explore=explore)
    train(Train(out=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        original = torch.optim.AdamW.step
        steps = []

        def step(self, *arguments, **named):
            steps.append(1)
            if len(steps) == 4:
                raise Killed
            return original(self, *arguments, **named)

        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(Killed):
            train(Train(out=str(tmp_path / "cut"), **settings))
    assert load_checkpoint(tmp_path / "cut")[2]["step"] == 2
    train(Train(out=str(tmp_path / "cut"), resume=True, **settings))
    assert [*losses(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6] and same(tmp_path / "whole", tmp_path / "cut")


def by_momentum(model, config):
    """Another optimizer, in one more group, and with weights that stand still."""
    model.blocks[0].requires_grad_(False)
    own = {id(p) for p in model.router.parameters()}
    moved = [p for p in model.parameters() if id(p) not in own and p is not model.norm.weight]
    router = {"params": [*model.router.parameters()], "of_router": True}
    return torch.optim.SGD([router, {"params": moved}, {"params": [model.norm.weight]}], momentum=0.9)


def test_another_optimizer_trains_and_resumes(data, tmp_path, monkeypatch):
    """Its groups get the learning rates that are theirs, whatever their order."""
    monkeypatch.setattr(train_module, "make_optimizer", by_momentum)
    made = []
    monkeypatch.setattr(train_module, "learning_rate", lambda config, step: 0.125)
    monkeypatch.setattr(train_module, "router_rate", lambda config, step, start: 0.5)
    plain = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: made.append(
        [group["lr"] for group in self.param_groups]) or plain(self))
    settings = SMALL | dict(data=str(data), budget=None)
    train(Train(out=str(tmp_path / "whole"), **settings))
    train(Train(out=str(tmp_path / "cut"), **settings | {"max_steps": 4}))
    train(Train(out=str(tmp_path / "cut"), resume=True, **settings))
    assert losses(tmp_path / "cut")[6] == losses(tmp_path / "whole")[6]
    assert made == 12 * [[0.5, 0.125, 0.125]]


@pytest.mark.parametrize("started", [False, True])
def test_a_kill_at_any_moment_is_made_good_by_resume(started, data, tmp_path, monkeypatch):
    """Before and after every line of the log, checkpoint, evaluation, step, renaming, and the summary."""
    settings = SMALL | dict(data=str(data), budget=1.0, n_layer=1, max_steps=3, eval_every=2, keep_every=2)
    if started:
        train(Train(out=str(tmp_path / "source"), **settings | dict(max_latent=0, max_steps=1)))
        settings |= dict(init_from=str(tmp_path / "source"), n_layer=2, max_steps=2)
    train(Train(out=str(tmp_path / "whole"), **settings))
    moment, killed = 0, True
    while killed:
        moment += 1
        out = tmp_path / f"killed{moment}"
        with monkeypatch.context() as patch:
            die(patch, moment)
            try:
                train(Train(out=str(out), **settings))
                killed = False
            except Killed:
                pass
        if killed:
            begun = (out / "ckpt.pt").exists()
            assert begun or not (out / "log.jsonl").exists()
            train(Train(out=str(out), resume=begun, **settings))
        assert same(tmp_path / "whole", out), moment
    assert moment > 30


def test_kill_9_and_resume(data, tmp_path):
    arguments = flags(data, tmp_path / "killed", max_steps=60, save_every=5)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENV)
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 12:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(log.read_text().splitlines()) < 60
    script("train.py", *arguments, "--resume")
    train(Train(out=str(tmp_path / "whole"), data=str(data), **SMALL | dict(max_steps=60, save_every=5)))
    assert len(losses(tmp_path / "whole")) == 60 and same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_sigterm_saves_and_exits_cleanly(name, data, tmp_path):
    if not hasattr(signal, name):
        pytest.skip("Windows has no SIGHUP")
    arguments = flags(data, tmp_path / "run", max_steps=100000, save_every=100000, eval_every=100000)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out and "a second Ctrl-C" in err
    assert load_checkpoint(tmp_path / "run")[2]["step"] == max(losses(tmp_path / "run"))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("call", [2, 7])  # in the evaluation after step 3, and in the last one
def test_ctrl_c_ends_an_evaluation(call, data, tmp_path, monkeypatch):
    settings = SMALL | dict(data=str(data), micro_batch_size=1)
    train(Train(out=str(tmp_path / "whole"), **settings))
    calls = []
    original = Data.windows

    def windows(self, count, part):
        if part != slice(0, 1) or len(calls):  # not the trial before the run
            calls.append(part)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, count, part)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        patch.setattr(Data, "windows", windows)
        assert train(Train(out=str(tmp_path / "cut"), **settings)) == {}
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert len(calls) <= call
    assert load_checkpoint(tmp_path / "cut")[2]["step"] == (3 if call == 2 else 6)
    train(Train(out=str(tmp_path / "cut"), resume=True, **settings))
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_what_was_printed_was_saved_before(data, tmp_path, monkeypatch):
    """A terminal that cannot show λ, or has gone, costs no step."""
    settings = SMALL | dict(data=str(data), save_every=3)
    train(Train(out=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        def say(text):
            if text.startswith("step"):
                raise Killed

        patch.setattr(train_module, "say", say)
        with pytest.raises(Killed):
            train(Train(out=str(tmp_path / "cut"), **settings))
    assert load_checkpoint(tmp_path / "cut")[2]["step"] == 3
    train(Train(out=str(tmp_path / "cut"), resume=True, **settings))
    assert same(tmp_path / "whole", tmp_path / "cut")


# ---------------------------------------------------------------------------- started from trained weights


KIN = {"qkv_bias": True, "qk_norm": True, "head_dim": 6, "n_kv_head": 1, "rope_theta": 500.0}  # of a source


@pytest.fixture(scope="session")
def sources(data, tmp_path_factory):
    """Trained runs by name: vanilla, tied (with a shape of its own), and adaptive, which thinks."""
    folder = tmp_path_factory.mktemp("sources")
    kinds = {"vanilla": {"method": "vanilla"}, "tied": {"method": "vanilla", "tie_embeddings": True} | KIN,
             "unthinking": {"max_latent": 0}, "adaptive": {"max_latent": 2}}
    for name, settings in kinds.items():
        train(Train(out=str(folder / name), **SMALL | dict(data=str(data), n_layer=3) | settings))
    return folder


def continued(out, source, data, **settings):
    """A run of other shape settings that starts from a source → step 0 and the last line of its log."""
    settings = SMALL | dict(data=str(data), max_steps=2, budget=1.0) | settings
    train(Train(init_from=str(source), out=str(out), **settings))
    found = [record for record in records(out) if "val_loss" in record]
    assert found[0]["step"] == 0 and len(losses(out)) == 2
    return found[0]


@pytest.mark.parametrize("source,method,latent", [
    ("vanilla", "vanilla", 0), ("vanilla", "adaptive", 3), ("unthinking", "adaptive", 3),
    ("tied", "adaptive", 3), ("tied", "vanilla", 0), ("adaptive", "adaptive", 2), ("vanilla", "loop", 0)])
def test_a_run_begins_with_what_its_source_could(source, method, latent, sources, data, tmp_path, capsys):
    """Exactly: the same validation loss, also where thoughts are added; the shape is the source's."""
    first = continued(tmp_path, sources / source, data, method=method, max_latent=latent)
    before = summary(sources / source)
    assert first["val_loss"] == before["val_loss"] and first["val_steps"] == before["val_steps"]
    config = load_checkpoint(tmp_path)[0].config
    assert config.n_layer == 3 and config.embed_scale == load_checkpoint(sources / source)[0].scale
    if source == "tied":
        assert config.tie_embeddings and all(getattr(config, name) == value for name, value in KIN.items())
    out = capsys.readouterr().out
    assert f"starts from {sources / source}: " in out and "set otherwise, and not used: n_layer 2" in out
    assert ("new: router.weight" in out) == (method == "adaptive" and source != "adaptive")
    assert ("τ is above every reach" in out) == (latent == 3)
    checkpoint = load_checkpoint(tmp_path)[2]
    assert checkpoint["start"] == before["val_steps"] and checkpoint["best"] <= before["val_loss"]
    assert load_checkpoint(tmp_path / "best.pt")[2]["result"]["val_loss"] == checkpoint["best"]


def test_a_shape_that_was_typed_and_is_not_taken_is_named(sources, data, tmp_path, call):
    """Also one at its default, as head_dim=0; what comes from nowhere but the defaults is not."""
    words = [f"--init_from={sources}/tied", f"--data={data}", f"--out={tmp_path}", "--block_size=16"]
    out, _ = call("train", *words, "--eval_windows=4", "--max_steps=1", "--head_dim=0", "--qkv_bias=False")
    (line,) = [line for line in out.splitlines() if "not used" in line]
    assert "head_dim 0" in line and "qkv_bias False" in line and "qk_norm" not in line


def test_a_shape_that_is_not_taken_need_not_be_possible(sources, data, tmp_path):
    """mor wants three layers: its source has them."""
    continued(tmp_path, sources / "vanilla", data, method="mor", max_latent=1, n_layer=2)
    assert load_checkpoint(tmp_path)[0].config.n_layer == 3


def test_a_run_with_a_source_goes_on_with_it_however_it_is_written(sources, data, tmp_path, call):
    """And says what is wrong where it is not named, and what is not used where that is typed."""
    shutil.copytree(sources / "vanilla", tmp_path / "source")
    continued(tmp_path / "run", tmp_path / "source", data, max_latent=1)
    words = [*flags(data, tmp_path / "run", max_steps=3, max_latent=1, budget=1.0), "--resume"]
    assert "was trained with init_from=" in call("train", *words, code=2)[1]
    out, err = call("train", *words, "--init_from=nowhere", "--n_embd=64", code=2)
    assert "was trained with init_from=" in err and "not used" not in out
    out, _ = call("train", *words, f"--init_from={tmp_path}/source/", "--n_embd=64")
    assert "set otherwise, and not used" in out and "n_embd 64" in out


def test_a_threshold_beside_a_budget_is_named_where_trained_weights_start(sources, data, tmp_path, call):
    words = [f"--init_from={sources}/tied", f"--data={data}", "--block_size=16", "--eval_windows=4",
             "--max_steps=1", "--tau=0.3"]
    with_budget, _ = call("train", *words, f"--out={tmp_path}/a", "--budget=1")
    without, _ = call("train", *words, f"--out={tmp_path}/b", "--budget=None")
    assert "tau is what the budget makes it; set otherwise, and not used" in with_budget
    assert "tau is what" not in without


def test_shards_of_one_process_are_spoken_of(data, tmp_path, call):
    out, _ = call("train", *flags(data, tmp_path), "--shard", "--max_steps=1")
    assert "--shard changes nothing here" in out


def test_a_source_need_not_stay(sources, data, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sources / "tied", source)
    continued(tmp_path / "run", source, data, max_latent=1)
    shutil.rmtree(source)
    config = Train(init_from=str(source), resume=True, out=str(tmp_path / "run"),
                   **SMALL | dict(data=str(data), max_steps=3, max_latent=1, budget=1.0))
    assert train(config)["tokens"] == 3 * 4 * 16
    with pytest.raises(BadInput, match="was trained with init_from="):
        train(replace(config, init_from=str(sources / "vanilla")))


@pytest.mark.parametrize("context", [8, 40])
def test_the_context_may_be_another(context, sources, data, tmp_path):
    first = continued(tmp_path, sources / "tied", data, max_latent=0, block_size=context)
    assert math.isfinite(first["val_loss"]) and load_checkpoint(tmp_path)[0].config.block_size == context


def test_what_cannot_be_started_from_is_one_line(sources, data, tmp_path, call):
    def refused(*arguments):
        _, err = call("train", *flags(data, tmp_path / "run"), *arguments, code=2)
        assert not (tmp_path / "run").exists()
        return err

    assert "not/there does not exist" in refused("--init_from=not/there")
    (tmp_path / "cut.pt").write_bytes((sources / "tied" / "ckpt.pt").read_bytes()[:999])
    assert "cut.pt is corrupt" in refused(f"--init_from={tmp_path}/cut.pt")
    own = make_tokenizer("own", r"\S+|\s+", {bytes([i]): 255 - i for i in range(256)})
    save_checkpoint(tmp_path / "other.pt", uneven("vanilla", vocab_size=257), own)
    line = refused(f"--init_from={tmp_path}/other.pt")
    assert "another tokenizer (bytes) than that" in line and "--tokenizer=" in line
    flat = uneven("vanilla", n_layer=1, vocab_size=257)
    save_checkpoint(tmp_path / "flat.pt", flat, get_tokenizer("bytes"))
    config = Train(init_from=f"{tmp_path}/flat.pt", out=f"{tmp_path}/run", method="mor",
                   **SMALL | dict(data=str(data), n_layer=3))
    with pytest.raises(BadInput, match="mor needs"):
        train(config)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ any number of processes


def close(a, b):
    """Whether two logs are the same up to rounding: latent steps and FLOPs exactly."""
    assert len(a) == len(b)
    for one, two in zip(a, b):
        assert flat(one) == pytest.approx(flat(two), rel=1e-5, abs=1e-5)
        for name in ("step", "tokens", "latent_steps", "reached", "flops", "val_steps"):
            assert one.get(name) == two.get(name)
    return True


CASES = {  # the settings of the runs that are made once in one process, and in two
    "adaptive": dict(budget=1.0, grad_clip=0.5),
    "explores": dict(budget=1.0, explore=2.0, exit_loss=0.5, weigh_values=True),
    "halted": dict(tau=1.0),
    "none": dict(max_latent=0),
    "ponder2": dict(method="ponder2", max_latent=2),
    "pause": dict(method="pause"),
}


def test_a_training_that_explores_takes_the_steps_of_its_budget(data, tmp_path):
    settings = dict(max_latent=1, budget=0.25, explore=4.0, course=0.0, max_steps=40, data=str(data))
    train(Train(out=str(tmp_path / "run"), **SMALL | settings))
    steps = [row["latent_steps"] for row in records(tmp_path / "run") if "latent_steps" in row][8:32]
    assert abs(sum(steps) / len(steps) - 0.25) < 0.05


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_no_number(name, data, tmp_path):
    settings = SMALL | CASES[name] | dict(data=str(data), global_batch_size=8)
    for micro in (0, 4, 2, 1):
        train(Train(out=str(tmp_path / str(micro)), **settings, micro_batch_size=micro))
        assert close(records(tmp_path / "0"), records(tmp_path / str(micro)))
    assert len(set(losses(tmp_path / "0").values())) == 6


def loopback():
    """Whether this machine can talk to itself; a sandbox without a network may not."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        return True
    except OSError:
        return False


def kill_step(monkeypatch, number):
    original = torch.optim.AdamW.step
    done = []

    def step(self, *arguments, **named):
        done.append(1)
        if len(done) == number:
            raise Killed
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def in_two_processes(data, folder):
    """What each of two processes does in the test below: this file is run by torchrun."""
    def once(out, **settings):
        try:
            train(Train(out=str(folder / out), data=str(data), **SMALL | settings))
        except Killed:
            pass

    dist.init_process_group("gloo")  # once: to join anew for each run takes long, and not always succeeds
    runs.dist.init_process_group = lambda backend: None
    torch.set_num_threads(1)
    for name, settings in CASES.items():
        once(f"{name} in two", **settings)
    once("mor in two", method="mor", n_layer=3)
    once("one, then two", resume=True, **CASES["adaptive"])
    with pytest.MonkeyPatch.context() as patch:
        kill_step(patch, 4)
        once("two, then one", **CASES["adaptive"])
    dist.destroy_process_group()


@pytest.mark.skipif(not loopback(), reason="no loopback interface")
def test_two_processes_are_one(data, tmp_path, monkeypatch):
    """Losses to rounding, latent steps and FLOPs exactly; also where a run is resumed with another number."""
    def once(out, **settings):
        train(Train(out=str(tmp_path / out), data=str(data), **SMALL | settings))

    for name, settings in CASES.items():
        once(f"{name} in one", **settings)
    once("mor in one", method="mor", n_layer=3, micro_batch_size=2)  # it balances in each forward by itself
    with monkeypatch.context() as patch:
        kill_step(patch, 4)
        with pytest.raises(Killed):
            once("one, then two", **CASES["adaptive"])
    script("tests/test_train.py", data, tmp_path, launcher=TORCHRUN)
    once("two, then one", resume=True, **CASES["adaptive"])
    for name in (*CASES, "mor"):
        assert close(records(tmp_path / f"{name} in one"), records(tmp_path / f"{name} in two"))
    for name in ("one, then two", "two, then one"):
        assert close(records(tmp_path / "adaptive in one"), records(tmp_path / name))
        assert summary(tmp_path / name)["flops"] == summary(tmp_path / "adaptive in one")["flops"]
    assert len(set(losses(tmp_path / "adaptive in one").values())) == 6


# ------------------------------------------------------------------------------------------------- not finite


def diverges(capsys, config):
    """What a run says that must diverge. It must leave a log of JSON, and checkpoints that are finite."""
    with pytest.raises(SystemExit) as stopped:
        train(config)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == runs.DIVERGED
    assert len(lines) == 1 and lines[0].startswith("train.py: diverged")
    if Path(config.out, "log.jsonl").exists():
        records(config.out)
    for path in Path(config.out).glob("*.pt"):
        assert all(torch.isfinite(weight).all() for weight in load_checkpoint(path)[0].parameters())
    return lines[0]


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.learning_rate", lambda config, step: 1e30 if step == 2 else 1e-3)
    line = diverges(capsys, Train(out=str(tmp_path / "run"), data=str(data), **SMALL | {"eval_every": 5}))
    assert "at step 4" in line and "ckpt.pt" in line
    assert load_checkpoint(tmp_path / "run")[2]["step"] == 2


def test_a_source_whose_predictions_are_not_finite_is_no_start(sources, data, tmp_path, capsys):
    model, tokenizer, checkpoint = load_checkpoint(sources / "vanilla")
    model.head.weight.data.fill_(3e38)
    save_checkpoint(tmp_path / "huge.pt", model, tokenizer)
    config = Train(**SMALL | dict(init_from=f"{tmp_path}/huge.pt", out=str(tmp_path / "run"), data=str(data)))
    assert "at step 0" in diverges(capsys, config) and not (tmp_path / "run" / "log.jsonl").exists()


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, capsys):
    settings = SMALL | dict(learning_rate=1e300, save_every=1, keep_every=1)
    line = diverges(capsys, Train(out=str(tmp_path / "run"), data=str(data), **settings))
    assert "at step 1: largest weight" in line
    assert load_checkpoint(tmp_path / "run")[2]["step"] == 0


def test_an_evaluation_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch, capsys):
    settings = SMALL | dict(save_every=3)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: {"val_loss": math.nan, "val_steps": 0.0})
    line = diverges(capsys, Train(out=str(tmp_path / "run"), data=str(data), **settings))
    assert "at step 3: val_loss nan" in line
    assert load_checkpoint(tmp_path / "run")[2]["step"] == 0 and not (tmp_path / "run" / "best.pt").exists()


def test_moments_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch, capsys):
    original = torch.optim.AdamW.step

    def step(self, *arguments, **named):
        original(self, *arguments, **named)
        self.state[self.param_groups[0]["params"][0]]["exp_avg_sq"][0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    diverges(capsys, Train(out=str(tmp_path / "run"), data=str(data), **SMALL))
    assert load_checkpoint(tmp_path / "run")[2]["step"] == 0


# ----------------------------------------------------------------------------- budget, optimizer, checkpoints


def test_router_keeps_its_learning_rate(data, tmp_path):
    for longer in ({}, {"max_steps": 9, "resume": True}):
        settings = SMALL | longer
        train(Train(out=str(tmp_path / "run"), data=str(data), **settings))
        matrices, vectors, router = load_checkpoint(tmp_path / "run")[2]["optimizer"]["param_groups"]
        assert len(router["params"]) == 1 and router["lr"] == 40 / (SMALL["n_embd"] * settings["max_steps"])
        assert matrices["lr"] == vectors["lr"] < SMALL["learning_rate"]
        assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == router["weight_decay"] == 0


@pytest.mark.parametrize("budget,missed", [(3.0, False), (2.9, True)])
def test_a_budget_that_is_missed_is_said(data, tmp_path, capsys, monkeypatch, budget, missed):
    """With a threshold that stays where one step is taken, and with a true one."""
    if missed:
        monkeypatch.setattr(train_module.BudgetController, "update", lambda self, counts, wanted: 0.999)
    settings = SMALL | {"budget": budget, "max_steps": 50, "eval_every": 50, "save_every": 50, "tau": 0.1}
    result = train(Train(out=str(tmp_path / "run"), data=str(data), **settings))
    assert ("is missed" in capsys.readouterr().out) == missed == (abs(result["val_steps"] / budget - 1) > 0.1)
    config = load_checkpoint(tmp_path / "run")[0].config
    tau = [record["tau"] for record in records(tmp_path / "run") if "tau" in record]
    assert tau[0] == 0.1 and config.tau != 0.1 and abs(config.tau - tau[-1]) < 0.1, "τ as it was moved"


def test_a_gradient_clip_of_zero_is_none(data, tmp_path):
    for clip in (0.0, 1e9, 0.1):
        train(Train(out=str(tmp_path / str(clip)), data=str(data), **SMALL, grad_clip=clip))
    off, high, low = (losses(tmp_path / str(clip)) for clip in (0.0, 1e9, 0.1))
    assert off == high != low


def test_best_and_kept_models(data, tmp_path, monkeypatch):
    values = iter([2.0, 1.0, 3.0])
    evaluation = dict(perplexity=1.0, bits_per_byte=1.0, val_steps=1.0)
    monkeypatch.setattr(train_module, "evaluate", lambda *_: {"val_loss": next(values)} | evaluation)
    settings = SMALL | dict(eval_every=2, keep_every=2)
    train(Train(out=str(tmp_path / "run"), data=str(data), **settings))
    models = {path.name: load_checkpoint(path) for path in (tmp_path / "run").glob("*.pt")}
    assert {name: found[2]["step"] for name, found in models.items()} == {
        "ckpt.pt": 6, "best.pt": 4, "ckpt-2.pt": 2, "ckpt-4.pt": 4, "ckpt-6.pt": 6}
    kept, last = weights(tmp_path / "run", "ckpt-6.pt"), weights(tmp_path / "run")
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert not torch.equal(kept["embed.weight"], weights(tmp_path / "run", "best.pt")["embed.weight"])
    assert "optimizer" in models["ckpt.pt"][2] and "optimizer" not in models["best.pt"][2]


def test_dtype_is_that_of_the_products(data, tmp_path, refused):
    for dtype in ("", "float32", "bfloat16"):
        train(Train(out=str(tmp_path / f"run{dtype}"), data=str(data), **SMALL, dtype=dtype))
    default, fp32, bf16 = (losses(tmp_path / f"run{dtype}") for dtype in ("", "float32", "bfloat16"))
    assert default == fp32 != bf16 and bf16 == pytest.approx(fp32, abs=0.05)
    assert "dtype" in refused(*flags(data, tmp_path / "runbfloat16"), "--resume")
    assert "float16" in refused(*flags(data, tmp_path / "half"), "--dtype=float16")


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.fixture
def refused(call):
    return lambda *arguments: call("train", *arguments, code=2)[1]


@pytest.mark.parametrize("extra,words", [
    (["--data=nowhere"], ["nowhere", "prepare.py"]),
    (["--n_layr=3"], ["n_layr", "n_layer"]),
    (["--n_layer=two"], ["n_layer", "whole number"]),
    (["--n_embd=15"], ["n_embd", "n_head"]),
    (["--tau=1.5"], ["tau", "[0, 1]"]),
    (["--method=vanila"], ["vanila", "vanilla"]),
    (["--method=mor"], ["mor", "n_layer"]),
    (["--method=loop", "--explore=2"], ["explore is not read", "--method=adaptive"]),
    (["--max_latent=0", "--weigh_values"], ["weigh_values is not read", "max_latent"]),
    (["--max_latent=0", "--course=0.1"], ["not read here", "max_latent"]),
    (["--budget=None", "--course=0.1"], ["--course is not read here", "budget"]),
    (["--train_tokens=16"], ["--train_tokens=16", "window of 17"]),
    (["--global_batch_size=4", "--micro_batch_size=3"], ["micro_batch_size", "divide"]),
    (["--block_size=100000"], ["window", "block_size"]),
    (["--vocab_size=100"], ["vocab_size", "257"]),
    (["--budget=7"], ["budget", "max_latent"]),
    (["--device=tpu9"], ["device", "cpu"]),
    (["--dtype=float64"], ["dtype", "bfloat16"]),
    (["--eval_windows=100000"], ["eval_windows"]),
    (["--warmup=2"], ["warmup", "[0, 1]"]),
    (["--grad_clip=-1"], ["grad_clip"]),
    (["--learning_rate=inf"], ["learning_rate"]),
    (["--seed=-1"], ["seed"]),
    (["--max_steps"], ["max_steps", "value"]),
    (["somewhere"], ["somewhere", "--key=value"]),
    (["nowhere.py"], ["nowhere.py"]),
    (["--resume"], ["ckpt.pt", "--out"]),
])
def test_wrong_arguments(extra, words, data, tmp_path, refused):
    line = refused(*flags(data, tmp_path / "run"), *extra)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_among_prepared_text(data, refused):
    before = sorted(data.iterdir())
    assert "holds prepared text already (train.bin)" in refused(*flags(data, data))
    assert sorted(data.iterdir()) == before


@pytest.mark.parametrize("source,words", [
    ("n_layer = 2 +\n", ["line 1"]),
    ("n_layer = open('x')\n", ["line 1", "n_layer"]),
    ("import os\n", ["plain assignments"]),
    ("n_lyer = 2\n", ["n_lyer", "n_layer"]),
    ("\nn_layer = 'two'\n", ["line 2", "whole number"]),
])
def test_wrong_config_files(source, words, tmp_path, refused):
    (tmp_path / "bad.py").write_text(source)
    line = refused(tmp_path / "bad.py")
    assert all(word in line for word in words), line


def write_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize("change,words", [
    (lambda f: cut(f / "train.bin", 0), ["train.bin"]),
    (lambda f: cut(f / "val.bin", -3), ["val.bin"]),
    (lambda f: (f / "meta.json").write_text("{"), ["prepare.py"]),
    (lambda f: (f / "meta.json").unlink(), ["meta.json"]),
    (lambda f: cut(f / "ranks.tiktoken", -20), ["ranks", "prepare.py"]),
    (lambda f: write_meta(f, lambda m: m["tokenizer"].update(sha256="0")), ["sha256"]),
    (lambda f: write_meta(f, lambda m: m.update(dtype="float16")), ["float16", "uint16"]),
    (lambda f: write_meta(f, lambda m: m.update(document="58")), ["document", "'58'"]),
    (lambda f: (f / "train.bin").write_bytes(b"\xff" * len((f / "train.bin").read_bytes())), ["65535"]),
])
def test_damaged_data(change, words, data, tmp_path, refused):
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    change(folder)
    line = refused(*flags(folder, tmp_path / "run"))
    assert all(word in line for word in words), line


def test_help_prints_every_field():
    out = script("train.py", "--help")
    assert all(word in out for word in ("--tau=0.1", "reach is at least", "--budget=1.4", "moving τ"))


def test_too_little_gpu_memory_is_one_line(monkeypatch, capsys):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_module, "train", train)
    monkeypatch.setattr(sys, "argv", ["train.py", "--micro_batch_size=8"])
    with pytest.raises(SystemExit) as stopped:
        run(train_module.main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert all(word in line for word in ("--micro_batch_size=8", "--checkpointing", "mor"))


def test_tensorboard_shows_what_the_log_has(data, tmp_path, monkeypatch, refused):
    """… once each, of a resumed run too; and where its package is missing nothing is written."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = SMALL | dict(out=str(tmp_path / "run"), data=str(data), tensorboard=True)
    train(Train(**settings | dict(max_steps=4)))
    train(Train(**settings, resume=True))
    shown = events.EventAccumulator(str(tmp_path / "run"))
    shown.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "tau", "flops", "val_loss", "val_steps"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])
    reached = [row["reached"][2] for row in rows if "reached" in row]
    assert [event.value for event in shown.Scalars("reached/3")] == pytest.approx(reached)

    def full(board, record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Board, "write", full)
        with pytest.raises(BadInput, match="events.out.tfevents.* cannot be written .No space left"):
            train(Train(**settings | dict(out=str(tmp_path / "full"))))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in refused("--tensorboard", f"--data={data}", f"--out={tmp_path}/other")
    assert not (tmp_path / "other").exists()


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]), Path(sys.argv[2]))
