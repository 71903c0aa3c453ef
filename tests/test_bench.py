"""What bench.py says: counted FLOPs equal the formula, forced routers have the mean they were asked for, runs are read back."""

import json

import pytest
import torch

import prepare
from baselines import METHODS
from bench import counted, formula, going_on, make
from model import Config
from train import training_flops

SHAPE = dict(n_layer=3, n_head=2, n_embd=16, n_ff=24, block_size=32, vocab_size=67)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("K", [0, 1, 3])
def test_counted_flops_are_the_formula(method, K):
    """Exactly: what torch sees executed, what the docstring of `formula` says, and what the model itself keeps count of."""
    model = make(Config(method=method, max_latent=K, **SHAPE), "cpu", 0.5 * K).eval()
    idx, targets = (torch.randint(0, 67, (3, 32)) for _ in range(2))
    total, reached = counted(model, idx, targets)
    matmul, attention = formula(model.config, 3, 32, reached, rounds=3)
    assert (matmul, attention) == (model.matmul_flops, model.attention_flops)
    assert total == 3 * matmul + 3.5 * attention == training_flops(model)
    if method == "adaptive" and K == 3:
        assert len(reached) > 1 and reached[-1][0] < 3 * 32


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_a_forced_router_has_its_mean(mean):
    model = make(Config(max_latent=3, **SHAPE), "cpu", mean)
    with torch.no_grad():
        steps = model(torch.randint(0, 67, (32, 32))).steps
    assert steps.mean().item() == pytest.approx(mean, abs=0.01)
    q = going_on(mean, 3)
    assert q + q**2 + q**3 == pytest.approx(mean, abs=1e-6)


@pytest.fixture
def measured(call, tmp_path):
    """bench.py on a small shape → what it printed, or, where it must refuse, the line that it refused with."""
    def measured(*arguments, code=0):
        return call("bench", *(f"--{k}={v}" for k, v in SHAPE.items()), f"--results={tmp_path}/results", *arguments, code=code)[code == 2]
    return measured


def test_flops(measured, tmp_path):
    out = measured("flops", "--mean_latent=1")
    result = json.loads((tmp_path / "results" / "flops-3x16.json").read_text())
    assert set(result["methods"]) == set(METHODS) and all(r["counted_equals_formula"] for r in result["methods"].values())
    assert "NO" not in out and result["methods"]["loop"]["passes"] == pytest.approx(4) and result["methods"]["adaptive"]["passes"] == pytest.approx(2, abs=0.1)


def test_speed(measured, tmp_path):
    measured("speed", "--methods", "vanilla", "adaptive", "--rounds=1", "--batch=2")
    result = json.loads((tmp_path / "results" / "speed-cpu-3x16.json").read_text())
    names = ["vanilla", *(f"adaptive, {m} steps" for m in ("0", "0.5", "1", "1.5", "2", "3"))]
    assert list(result["methods"]) == names
    ratios = [result["methods"][name]["flop_ratio"] for name in names]
    assert ratios[0] == 1 and ratios[1:] == sorted(ratios[1:]) and ratios[-1] > 3.5
    assert all(min(r["tokens_per_second"].values()) > 0 for r in result["methods"].values())


def test_growth(measured, tmp_path):
    measured("growth", "--contexts", "8", "16", "--rounds=1")
    micro = json.loads((tmp_path / "results" / "growth-cpu-3x16.json").read_text())["microseconds_per_token"]
    assert {"context 8", "context 16, vanilla", "ℓ_max 0", "ℓ_max 8"} <= set(micro)
    assert all(time > 0 for times in micro.values() for time in times.values())


def test_quality_reads_finished_runs_back(measured, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200)
    prepare.prepare(prepare.Prepare([str(tmp_path / "text.txt")], out=str(tmp_path), name="data"))
    arguments = ["quality", f"--data={tmp_path}/data", f"--out={tmp_path}/out", "--vocab_size=0", "--max_steps=3", "--global_batch_size=2", "--eval_windows=2", "--device=cpu",
                 "--methods", "vanilla", "adaptive", "--seeds=2", "--rates", "1e-3", "2e-3"]
    arguments += ["--parts", "rates", "tokens", "flops"]
    first = measured(*arguments)
    path = next((tmp_path / "results").glob("quality-*.json"))
    runs = json.loads(path.read_text())["runs"]
    assert "adaptive" in first and "±" in first and any("steps" in name for name in runs)
    again = measured(*arguments)
    assert json.loads(path.read_text())["runs"] == runs and first.splitlines()[-5:] == again.splitlines()[-5:]
    assert "other settings" in measured(*arguments, "--weight_decay=0.5", code=2)


@pytest.mark.parametrize("arguments,words", [(["fly"], ["fly", "flops"]), ([], ["flops, speed, growth or quality"]), (["flops", "--methods", "lop"], ["lop", "loop"]),
                                             (["flops", "--mean_latent=9"], ["mean_latent"]), (["flops", "--checkpoint=nowhere"], ["nowhere"])])
def test_wrong_input(arguments, words, measured):
    err = measured(*arguments, code=2)
    assert all(word in err for word in words) and len(err.splitlines()) == 1
