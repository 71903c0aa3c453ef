"""What bench.py says: its tables and files, whom it times and when, and that it counts tokens, not ticks."""

import json
import sys
from pathlib import Path

import pytest

import bench
from baselines import METHODS, build
from bench import Bench, Contestant, alternate
from common import save_checkpoint
from conftest import uneven, unread
from model import Config
from tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent
SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_ff": 24, "block_size": 32, "vocab_size": 67}


@pytest.fixture
def measured(call, tmp_path):
    """bench.py on a small shape → what it printed or, where it must refuse, its one line."""
    def measured(*arguments, code=0):
        shape = [f"--{name}={value}" for name, value in SHAPE.items()]
        return call("bench", *shape, f"--results={tmp_path}/results", *arguments, code=code)[code == 2]
    return measured


def written(tmp_path, name):
    return json.loads((tmp_path / "results" / name).read_text())


def test_flops(measured, tmp_path):
    assert "mor" not in measured("flops", "--batch=1", "--n_layer=1")  # which needs three layers
    out = measured("flops", "--mean_latent=1", "--batch=4")
    assert "written: " in out
    result = written(tmp_path, "flops-3x16.json")
    methods = result["methods"]
    assert set(methods) == set(METHODS) and all(r["counted_equals_formula"] for r in methods.values())
    assert "NO" not in out and result["context"] == 32 and result["mean_latent"] == 1 and "commit" in result
    assert methods["loop"]["passes"] == pytest.approx(4)
    assert methods["adaptive"]["passes"] == pytest.approx(2, abs=0.1)
    odd = ["--vocab_size=50257", "--n_embd=36", "--n_ff=8", "--block_size=37", "--batch=3"]  # beyond float32
    assert "NO" not in measured("flops", *odd, "--methods", "ponder", "mor", "adaptive", "--exit_loss=0.5")
    measured("flops", "--mean_latent=1", "--batch=4", "--methods", "adaptive", "vanilla", "--exit_loss=0.5")
    exits = written(tmp_path, "flops-3x16.json")["methods"]
    assert all(r["counted_equals_formula"] and r["counted"] == r["training"] for r in exits.values())
    assert exits["adaptive"]["counted"] > methods["adaptive"]["counted"]
    for r in methods.values():
        assert r["estimate"] == pytest.approx(6 * r["parameters"] * r["passes"])
        assert r["prefill"] >= r["decode"] > 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(METHODS) and len({len(line) for line in table}) == 1
    head = ["method", "parameters", "passes", "training / token", "× vanilla", "counted = formula",
            "6 N passes", "prefill / token", "decode / token"]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == head


def test_memory(measured, tmp_path):
    """A micro-batch fits that is as large as it may be, more of them where less is kept."""
    big = ["--n_embd=1024", "--n_ff=2752", "--n_head=16", "--n_layer=24", "--block_size=2048"]
    out = measured("memory", *big, "--vocab_size=50304", "--world=4", "--batch=2")
    result = written(tmp_path, "memory-24x1024.json")
    kept, recomputed = result["bytes"].values()
    assert kept["weights"] == 4 * kept["AdamW's moments"] / 8 == pytest.approx(4 * 0.406e9 / 4, rel=0.01)
    assert kept["activations"] > 5 * recomputed["activations"] and "--checkpointing" in out
    small, large = result["fits"]["80 GB"], result["fits"]["141 GB"]
    assert 0 < small[0] < large[0] < large[1] and small[0] < small[1] < large[1]
    assert "world" in measured("memory", "--world=0", code=2) and "memory" in measured("speeds", code=2)


def test_what_was_measured_is_written_though_nobody_reads_what_is_printed(tmp_path):
    command = [sys.executable, ROOT / "bench.py", "flops", "--methods=vanilla", f"--results={tmp_path}"]
    done = unread(command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "flops-3x128.json").read_text())["methods"]["vanilla"]


def test_flops_of_what_is_too_big_to_execute(measured, tmp_path):
    big = ["--n_embd=1024", "--n_ff=2752", "--n_head=16", "--n_layer=24", "--block_size=2048"]
    out = measured("flops", *big, "--vocab_size=50304", "--methods", "vanilla", "adaptive", "--batch=2")
    methods = written(tmp_path, "flops-24x1024.json")["methods"]
    assert "by formula" in out and "too big to execute" in out and "counted" not in methods["vanilla"]
    N, T, d, V = 24 * (4 * 1024**2 + 3 * 1024 * 2752), 2048, 1024, 50304
    assert methods["vanilla"]["training"] == 3 * 2 * (N + d * V) + 3.5 * 24 * 4 * T * d
    assert methods["adaptive"]["passes"] == pytest.approx(2.5, abs=0.01)


def test_flops_of_a_checkpoint(call, tmp_path):
    """Takes its shape and the mean latent steps of its last evaluation, and refuses others beside it."""
    def measured(*arguments, code=0):
        return call("bench", "flops", f"--checkpoint={tmp_path}", f"--results={tmp_path}/results", *arguments,
                    code=code)[code == 2]

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    tokenizer = get_tokenizer("bytes")
    model = uneven(vocab_size=tokenizer.n_vocab)
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer, result={"val_steps": 0.75})
    out = measured("--methods", "adaptive", "--batch=4")
    assert "0.75 mean latent steps" in out
    result = written(tmp_path, "flops-3x32.json")
    assert result["context"] == 64 and result["methods"]["adaptive"]["passes"] == pytest.approx(1.75, abs=0.1)
    for layers in (2, 3):  # all methods that can be, of that shape: mor needs three
        shape = dict(n_layer=layers, n_embd=16, n_head=2, n_ff=24, block_size=8, vocab_size=tokenizer.n_vocab)
        save_checkpoint(tmp_path / "ckpt.pt", build(Config(**shape)), tokenizer, result={"val_steps": 0.75})
        measured("--batch=2")
        assert ("mor" in written(tmp_path, f"flops-{layers}x16.json")["methods"]) == (layers == 3)
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer)
    assert "evaluated" in measured(code=2)
    save_checkpoint(tmp_path / "ckpt.pt", uneven("vanilla", vocab_size=tokenizer.n_vocab), tokenizer,
                    result={"val_steps": 0.0})
    assert "adaptive" in measured(code=2)
    for own in ("n_layer=4", "max_latent=2", "mean_latent=1"):
        assert f"{own[:-2]} is not read here" in measured(f"--{own}", code=2)


def test_a_config_file_may_hold_what_only_training_reads(measured, tmp_path):
    config = tmp_path / "config.py"
    config.write_text('data = "data/none"\nmax_steps = 3\nmax_latent = 2\n')
    measured("flops", config, "--methods", "loop", "--batch=1")
    assert written(tmp_path, "flops-3x16.json")["methods"]["loop"]["passes"] == pytest.approx(3)
    config.write_text("n_layr = 3\n")
    assert "n_layer" in measured("flops", config, code=2)


def test_speed(measured, tmp_path):
    out = measured("speed", "--methods", "vanilla", "adaptive", "--rounds=1", "--batch=2")
    result = written(tmp_path, "speed-cpu-3x16.json")
    names = ["vanilla", *(f"adaptive, {mean} steps" for mean in ("0", "0.5", "1", "1.5", "2", "3"))]
    assert list(result["methods"]) == names and result["batch"] == 2 and result["context"] == 32
    ratios = [result["methods"][name]["flop_ratio"] for name in names]
    assert ratios[0] == 1 and ratios[1:] == sorted(ratios[1:]) and ratios[-1] > 3.5
    for r in result["methods"].values():
        assert set(r["tokens_per_second"]) == {"training", "prefill", "decode 1", "decode 16"}
        assert min(*r["tokens_per_second"].values(), r["mfu"], r["bandwidth"], r["memory"]) > 0
    assert result["methods"]["adaptive, 3 steps"]["decode_steps"] == 3
    assert result["methods"]["adaptive, 0 steps"]["decode_steps"] == 0
    head = ["method", "training tok/s", "± spread", "time ratio", "FLOP ratio", "time / FLOPs", "MFU",
            "prefill tok/s", "decode tok/s, batch 1", "of bandwidth", "batch 16", "kept MiB"]
    assert [cell.strip() for cell in out.splitlines()[0].strip("|").split("|")] == head


def test_speed_of_a_context_of_one_token(measured):
    assert "adaptive" in measured("speed", "--block_size=1", "--batch=1", "--rounds=1", "--methods=adaptive")


def test_speed_of_all_methods_runs(measured, tmp_path):
    measured("speed", "--rounds=1", "--batch=1", "--max_latent=1", "--n_kv_head=1")
    methods = written(tmp_path, "speed-cpu-3x16.json")["methods"]
    adaptive = {"adaptive, 0 steps", "adaptive, 0.5 steps", "adaptive, 1 steps"}
    assert set(methods) == set(METHODS) - {"adaptive"} | adaptive


def test_growth(measured, tmp_path):
    out = measured("growth", "--contexts", "16", "32", "--rounds=1")
    micro = written(tmp_path, "growth-cpu-3x16.json")["microseconds_per_token"]
    assert {"context 16", "context 32, vanilla", "ℓ_max 0", "ℓ_max 8"} <= set(micro)
    assert all(time > 0 for times in micro.values() for time in times.values())
    assert "ratio: prefill" in out and out.count("ℓ_max") == 1


@pytest.mark.parametrize("mean", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("batch", [1, 16])
def test_decoding_counts_tokens_and_not_ticks(monkeypatch, mean, batch):
    """With a second for whatever is timed, the time per token says how many tokens were counted."""
    def a_second(work, device):
        work()
        return 1.0
    monkeypatch.setattr(bench, "timed", a_second)
    settings = Bench(what="speed", **SHAPE | {"block_size": 64})
    contestant = Contestant(settings, settings.config_of("adaptive"), mean, 1)
    contestant.force()
    contestant.measure_decoding(batch)
    tokens = 1 / contestant.found[f"decode {batch}"][0]
    assert 8 * batch <= tokens < 9 * batch, "an eighth of the context for each row"
    if batch == 1 and mean in (0, 3):
        assert contestant.found["steps"] == [mean]


def test_twins_share_a_model_but_not_their_steps():
    settings = Bench(what="speed", max_latent=3, **SHAPE)
    first = Contestant(settings, settings.config_of("adaptive"), 0.0, 2)
    second = Contestant(settings, settings.config_of("adaptive"), 3.0, 2, first)
    assert second.model is first.model and second.optimizer is first.optimizer
    steps = []
    for contestant in (first, second, first):
        contestant.force()
        contestant.measure_training()
        steps.append(contestant.steps.mean().item())
    assert steps == [0, 3, 0]
    assert second.found["FLOPs"][0] > 4 * first.found["FLOPs"][0]


def test_rounds_alternate_and_the_first_is_forgotten():
    class Fake:
        def __init__(self, name):
            self.name, self.found = name, {}

        def force(self):
            pass

    contestants, order = [Fake(name) for name in "abcd"], []

    def measure(contestant):
        order.append(contestant.name)
        contestant.found.setdefault("times", []).append(len(order))

    rounds = sum(1 for _ in alternate(contestants, 5, measure))
    assert rounds == 5 and [len(c.found["times"]) for c in contestants] == [5] * 4
    played = ["".join(order[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(r) == list("abcd") for r in played) and len(set(played)) > 2
    first = min(time for contestant in contestants for time in contestant.found["times"])
    assert first == 5, "what the first round measured is gone"


@pytest.mark.parametrize("arguments,words", [
    (["fly"], ["fly", "flops"]),
    ([], ["flops, speed, growth, memory"]),
    (["flops", "--methods", "lop"], ["lop", "loop"]),
    (["flops", "--method=loop"], ["--methods"]),
    (["flops", "--mean_latent=9"], ["mean_latent"]),
    (["flops", "--mean_latent=nan"], ["mean_latent"]),
    (["flops", "--checkpoint=nowhere"], ["nowhere"]),
    (["flops", "--batch=0"], ["batch"]),
    (["speed", "--batch=-1"], ["batch"]),
    (["speed", "--rounds=0"], ["rounds"]),
    (["speed", "--dtype=float16"], ["float16"]),
    (["speed", "--device=abacus"], ["abacus"]),
    (["flops", "--tau=0.5"], ["--tau is not read", "--mean_latent"]),
    (["memory", "--compile"], ["compile", "speed or growth"]),
    (["flops", "--device=cpu"], ["device", "speed or growth"]),
    (["memory", "--dtype=float16"], ["float16"]),
    (["growth", "--contexts", "256", "-5"], ["contexts"]),
    (["growth", "--batch=4"], ["batch", "flops or speed or memory"]),
    (["memory", "--methods", "loop"], ["methods", "flops or speed"]),
    (["flops", "--data=x"], ["data"]),
    (["flops", "--n_layer=2", "--methods", "mor"], ["mor", "n_layer"]),
    (["flops", "--n_head=3"], ["n_head"])])
def test_wrong_input(arguments, words, measured, tmp_path):
    err = measured(*arguments, code=2)
    assert all(word in err for word in words) and not list(tmp_path.rglob("*.json"))


def test_a_results_folder_that_cannot_be_is_refused_before_the_work(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(bench, "bench_flops", None)
    _, err = call("bench", "flops", f"--results={tmp_path}/file/results", code=2)
    assert "--results" in err and (tmp_path / "file").read_text() == "mine"
