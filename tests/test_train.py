"""The invariants of training: processes, resume, atomic files, the budget; and every wrong input, one line and exit code 2."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train as train_module
from baselines import METHODS
from configurator import BadInput, run
from train import BudgetController, Data, Train, load_checkpoint, train

ROOT = Path(__file__).parent.parent
SMALL = dict(n_layer=2, n_head=2, n_embd=16, n_ff=24, block_size=16, max_steps=6, global_batch_size=4, eval_every=3, eval_windows=4, save_every=2,
             learning_rate=3e-3, device="cpu", init_std=0.02, router_bias=0.5, tau=0.3, lam=0.01, beta=1.0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"def f{i}(x): return x * {i * i % 97} + {i}\n" for i in range(300)))
    script("prepare.py", "--input", folder / "text.txt", f"--out={folder}", "--name=small")
    return folder / "small"


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
# Not --standalone: it looks the host's own name up, and waits forever on a machine whose name does not resolve.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]


def script(name, *arguments, launcher=()):
    """A script in a process of its own, which is asked to end after three minutes; torchrun then ends its workers too."""
    command = [sys.executable, *launcher, str(ROOT / name), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    watchdog = threading.Timer(180, process.terminate)
    watchdog.start()
    out, _ = process.communicate()
    watchdog.cancel()
    assert process.returncode == 0, out
    return out


@pytest.fixture
def refused(call):
    return lambda *arguments: call("train", *arguments, code=2)[1]


def flags(data, out, **settings):
    return [str(ROOT / "config" / "tiny.py"), f"--data={data}", f"--out={out}", "--budget=None", *(f"--{k}={v}" for k, v in (SMALL | settings).items())]


def losses(out):
    """Step → loss, from a log that must hold each step once."""
    records = [r for r in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: r["loss"] for r in records}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes(method, data, tmp_path):
    """Bit for bit: a run cut into two by a resume has the losses and the weights of one that was not."""
    settings = SMALL | dict(method=method, n_layer=3, data=str(data), budget=1.0)
    whole = train(Train(out=str(tmp_path / "whole"), **settings))
    steps = list(losses(tmp_path / "whole"))
    cut = Train(out=str(tmp_path / "cut"), **settings)
    original = torch.optim.AdamW.step
    try:
        def step(self, *a, **k):
            step.count = getattr(step, "count", 0) + 1
            if step.count == 4:
                raise KeyboardInterrupt  # dies in its fourth step, like a kill: nothing is saved
            return original(self, *a, **k)
        torch.optim.AdamW.step = step
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    finally:
        torch.optim.AdamW.step = original
    cut.resume = True
    resumed = train(cut)
    assert steps == [1, 2, 3, 4, 5, 6] and losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert {k: resumed[k] for k in ("val_loss", "val_steps", "flops", "tokens")} == {k: whole[k] for k in ("val_loss", "val_steps", "flops", "tokens")}
    a, b = (load_checkpoint(tmp_path / run)[0].state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_kill_9_and_resume(data, tmp_path):
    arguments = flags(data, tmp_path / "killed", max_steps=60, save_every=5)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.DEVNULL, env=ENV)
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 12:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(tmp_path / "killed")) < 60
    script("train.py", *arguments, "--resume")
    script("train.py", *flags(data, tmp_path / "whole", max_steps=60, save_every=5))  # the threads are as many, and so the last digits the same
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 60


def test_sigterm_saves_and_exits_cleanly(data, tmp_path):
    arguments = flags(data, tmp_path / "run", max_steps=100000, save_every=100000, eval_every=100000)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=subprocess.PIPE, text=True, env=ENV)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out
    assert load_checkpoint(tmp_path / "run")[2]["step"] == max(losses(tmp_path / "run"))


def loopback():
    """Whether this machine can talk to itself; a sandbox without a network may not."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        return True
    except OSError:
        return False


@pytest.mark.skipif(not loopback(), reason="no loopback interface")
def test_two_processes_are_one_with_accumulation(data, tmp_path):
    for method in ("adaptive", "mor"):
        one, two = tmp_path / f"{method}1", tmp_path / f"{method}2"
        settings = dict(method=method, n_layer=3, compile=False)
        train(Train(out=str(one), data=str(data), **SMALL | settings, micro_batch_size=2))
        script("train.py", *flags(data, two, **settings), launcher=TORCHRUN)
        a, b = losses(one), losses(two)
        assert list(a) == list(b) and all(abs(a[s] - b[s]) < 1e-5 for s in a)
        assert len(set(a.values())) == 6
        log = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
        assert log[0][-1] == pytest.approx(log[1][-1], abs=1e-5)


def test_batches_are_a_function_of_seed_and_step(data):
    d = Data(str(data), 16)
    x, y = d.batch(1, 5, 8, slice(0, 8))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(torch.cat([d.batch(1, 5, 8, slice(i, i + 2))[0] for i in range(0, 8, 2)]), x)
    assert not torch.equal(d.batch(1, 6, 8, slice(0, 8))[0], x) and not torch.equal(d.batch(2, 5, 8, slice(0, 8))[0], x)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr("train.learning_rate", lambda config, step: 1e30 if step == 2 else 1e-3)
    with pytest.raises(SystemExit) as stopped:
        train(Train(out=str(tmp_path / "run"), data=str(data), **SMALL))
    assert "at step 4" in stopped.value.code and "ckpt.pt at step 2" in stopped.value.code
    assert all(torch.isfinite(p).all() for p in load_checkpoint(tmp_path / "run")[0].parameters())


def test_budget_controller_lands_on_its_budget():
    """On a plant that integrates: the router drifts up by what a thought is worth, and down by λ."""
    for worth in (0.005, 0.02, 0.05):
        controller, steps, lam = BudgetController(1.0, 3, 1000), 3.0, 0.0
        for step in range(2000):
            steps = min(3.0, max(0.0, steps + max(-0.02, min(0.02, worth - lam))))
            lam = controller.update(step, steps)
        assert abs(steps - 1.0) < 0.1 and abs(lam - worth) < 0.2 * worth


@pytest.mark.parametrize("budget", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("length", [200, 1000, 20_000])
def test_budget_controller_lands_by_the_end_where_pruning_is_slow_to_undo(budget, length):
    """On a router of limited speed, which goes up ten times slower than down."""
    for worth in (0.05, 0.2, 0.5):
        controller, steps, lam = BudgetController(budget, 3, length), 3.0, 0.0
        for step in range(length):
            drive = max(-1.0, min(1.0, (worth - lam) / worth)) * steps * 12 / length
            steps = min(3.0, steps + (drive if drive < 0 else 0.1 * drive))
            lam = controller.update(step, steps)
        assert abs(steps / budget - 1) < 0.1 and abs(lam / worth - 1) < 0.3, (worth, steps, lam)


def test_router_keeps_its_learning_rate(data, tmp_path):
    for longer in ({}, {"max_steps": 9, "resume": True}):
        settings = SMALL | longer
        train(Train(out=str(tmp_path / "run"), data=str(data), **settings))
        matrices, vectors, router = load_checkpoint(tmp_path / "run")[2]["optimizer"]["param_groups"]
        assert len(router["params"]) == 1 and router["lr"] == 40 / (SMALL["n_embd"] * settings["max_steps"])
        assert matrices["lr"] == vectors["lr"] < SMALL["learning_rate"]


# ----------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("extra,words", [
    (["--data=nowhere"], ["nowhere", "prepare.py"]),
    (["--n_layr=3"], ["n_layr", "n_layer"]),
    (["--n_layer=two"], ["n_layer", "whole number"]),
    (["--n_embd=15"], ["n_embd", "n_head"]),
    (["--tau=1.5"], ["tau", "[0, 1]"]),
    (["--method=vanila"], ["vanila", "vanilla"]),
    (["--global_batch_size=4", "--micro_batch_size=3"], ["micro_batch_size", "divide"]),
    (["--block_size=100000"], ["window", "block_size"]),
    (["--vocab_size=100"], ["vocab_size", "257"]),
    (["--budget=7"], ["budget", "max_latent"]),
    (["--device=tpu9"], ["device", "cpu"]),
    (["--max_steps"], ["max_steps", "value"]),
    (["somewhere"], ["somewhere", "--key=value"]),
    (["nowhere.py"], ["nowhere.py"]),
])
def test_wrong_arguments(extra, words, data, tmp_path, refused):
    line = refused(*flags(data, tmp_path / "run"), *extra)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source,words", [("n_layer = 2 +\n", ["line 1"]), ("n_layer = open('x')\n", ["line 1", "n_layer"]), ("import os\n", ["plain assignments"]),
                                          ("n_lyer = 2\n", ["n_lyer", "n_layer"]), ("\nn_layer = 'two'\n", ["line 2", "whole number"])])
def test_wrong_config_files(source, words, tmp_path, refused):
    (tmp_path / "bad.py").write_text(source)
    line = refused(tmp_path / "bad.py")
    assert all(word in line for word in words), line


def damaged(data, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    change(folder)
    return folder


def write_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("change,words", [
    (lambda f: (f / "train.bin").write_bytes(b""), ["train.bin", "prepare.py"]),
    (lambda f: (f / "val.bin").write_bytes((f / "val.bin").read_bytes()[:-3]), ["val.bin", "prepare.py"]),
    (lambda f: (f / "meta.json").write_text("{"), ["prepare.py"]),
    (lambda f: (f / "meta.json").unlink(), ["meta.json"]),
    (lambda f: (f / "ranks.tiktoken").write_bytes((f / "ranks.tiktoken").read_bytes()[:-20]), ["ranks", "prepare.py"]),
    (lambda f: write_meta(f, lambda m: m["tokenizer"].update(sha256="0")), ["sha256"]),
    (lambda f: (f / "train.bin").write_bytes(b"\xff\xff" * (len((f / "train.bin").read_bytes()) // 2)), ["65535", "vocabulary"]),
])
def test_damaged_data(change, words, data, tmp_path, refused):
    folder = damaged(data, tmp_path, change)
    line = refused(*flags(folder, tmp_path / "run"))
    assert all(word in line for word in words), line


def test_a_folder_that_holds_another_run_is_left_alone(data, tmp_path, refused):
    train(Train(out=str(tmp_path / "run"), data=str(data), **SMALL))
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert "--resume" in refused(*flags(data, tmp_path / "run"))
    assert "n_layer=2" in refused(*flags(data, tmp_path / "run", n_layer=3), "--resume")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-code-ran",))


def test_wrong_checkpoints(data, tmp_path):
    train(Train(out=str(tmp_path / "run"), data=str(data), **SMALL))
    good = (tmp_path / "run" / "ckpt.pt").read_bytes()
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)

    def bad(name, content, *words):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(BadInput) as error:
            load_checkpoint(path)
        assert name in str(error.value) and "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value

    bad("truncated.pt", good[: len(good) // 2])
    bad("noise.pt", b"not a checkpoint at all")
    bad("empty.pt", b"")
    bad("other.pt", {"weights": torch.zeros(3)}, "not written by")
    bad("list.pt", [1, 2], "not written by")
    bad("shape.pt", state | {"config": state["config"] | {"n_embd": 32}}, "does not fit")
    bad("ranks.pt", state | {"ranks": state["ranks"][:-5]}, "does not fit")
    bad("hostile.pt", {"format": Hostile()})
    assert not Path("hostile-code-ran").exists()
    with pytest.raises(BadInput, match="does not exist"):
        load_checkpoint(tmp_path / "missing")


def test_help_prints_every_field():
    out = script("train.py", "--help")
    assert "--tau=0.1" in out and "reach is at least" in out and "--budget=None" in out and "λ is steered" in out


def test_too_little_gpu_memory_is_one_line(monkeypatch, capsys):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_module, "train", train)
    monkeypatch.setattr(sys, "argv", ["train.py", "--micro_batch_size=8"])
    with pytest.raises(SystemExit) as stopped:
        run(train_module.main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and "--micro_batch_size=8" in line and "--checkpointing" in line
