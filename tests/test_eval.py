"""Perplexity against plain forwards, one token at a time; texts, the dials, and the command."""

import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from common import BadInput, save_checkpoint
from conftest import unread
from costs import forward_flops
from eval import Eval, perplexity, read_text, score_text, sweep, with_fewer_steps
from prepare import Data, Prepare, prepare
from test_score import make, plain
from tokenizer import describe, get_tokenizer, make_tokenizer, ranks_to_text

ROOT = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
END = BYTES.eot_token
SAYING = "The cat sat on the mat. " * 3 + "A dog, 42 birds\nand naïve `code += 1`.\n"


def tokens_of(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


# ----------------------------------------------------------------------------------------------- perplexity


def test_flops_and_steps_are_those_of_a_forward():
    """For one window: FLOPs per token are those of a forward with logits everywhere, over its tokens."""
    model, ids = make(block_size=64), tokens_of(SAYING)[:65]
    result, _ = perplexity(model, BYTES, ids, Eval())
    with torch.no_grad():
        out = model(torch.from_numpy(ids[:-1].astype(np.int64))[None])
    assert result["flops_per_token"] == round(sum(forward_flops(model, out.steps)).item() / (len(ids) - 1))
    assert result["latent_steps"] == pytest.approx(out.steps.mean().item())


@pytest.mark.parametrize("method", ["vanilla", "adaptive"])
@pytest.mark.parametrize("stride", [None, 1, 10, 32])
def test_perplexity_equals_an_independent_computation(method, stride, tmp_path):
    """Token by token, each from its own window; per word and byte from the text itself; at any batch size."""
    model, path = make(method), tmp_path / "text.txt"
    path.write_text(SAYING, encoding="utf-8")
    raw, context, step = SAYING.encode(), 32, stride or 16
    said = SAYING[1:]  # all that is predicted
    ids = [*raw, END]
    nats = 0.0
    for t in range(1, len(ids)):
        windows_before = max(0, math.ceil((t - context) / step))
        end = min(len(ids), 1 + context + windows_before * step)
        begin = max(0, end - 1 - context)
        nats += plain(model, ids[begin:t], ids[t : t + 1])[0].item()
    text = read_text([str(path)], BYTES)
    results = [perplexity(model, BYTES, text, Eval(stride=stride, batch_size=size))[0] for size in (1, 3, 50)]
    for result in results:
        assert (result["tokens"], result["bytes"]) == (len(ids), len(said.encode()))
        assert result["words"] == len(said.split())
        assert result["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
        assert math.log(result["word_perplexity"]) == pytest.approx(nats / len(said.split()), rel=1e-5)
        assert math.log(result["byte_perplexity"]) == pytest.approx(nats / len(said.encode()), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(nats / len(said.encode()) / math.log(2), rel=1e-5)
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        for name in ("latent_steps", "flops_per_token"):
            assert result[name] == results[0][name], "the batch size changes speed, not results"


def test_text_is_read_as_prepare_reads_it(tmp_path):
    """Files, a .jsonl, a file with separators and the .bin of the same documents give the same tokens.

    Empty documents and bytes that are no text are left out.
    """
    documents = [f"document {i}\n" * 9 for i in range(40)]
    records = [json.dumps({"text": text}) + "\n" for text in [*documents, " "]]
    (tmp_path / "all.jsonl").write_text("".join(records))
    (tmp_path / "files").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / "files" / f"{i:02}.txt").write_text(text)
    (tmp_path / "files" / "zz.txt").write_bytes(b"\xff\xfe")
    ids = read_text([str(tmp_path / "all.jsonl")], BYTES)
    assert bytes(ids[ids != END].astype(np.uint8)).decode() == "".join(documents)
    assert (ids == END).sum() == len(documents)
    assert np.array_equal(ids, read_text([str(tmp_path / "files")], BYTES))
    (tmp_path / "all.txt").write_text("<|endoftext|>".join([*documents, " "]))
    assert np.array_equal(ids, read_text([str(tmp_path / "all.txt")], BYTES, separator="<|endoftext|>"))
    source = str(tmp_path / "all.jsonl")
    folder = prepare(Prepare(input=[source], out=str(tmp_path), name="data", val_fraction=0.3))
    prepared = [read_text([str(folder / f"{split}.bin")], BYTES) for split in ("train", "val")]
    prepared = np.concatenate(prepared)
    parts = np.split(prepared, np.flatnonzero(prepared == END) + 1)[:-1]
    assert sorted(bytes(part[:-1].astype(np.uint8)).decode() for part in parts) == sorted(documents)
    assert np.array_equal(read_text([str(tmp_path / "all.jsonl")], BYTES, most=7), ids[:7])


def test_a_document_in_pieces_is_read_as_a_whole(tmp_path):
    """A document of many pieces, some of them blank, becomes the tokens of the whole text."""
    text = " \n" * 300_000 + "words and\n" * 60_000 + " " * 600_000 + "the end"
    (tmp_path / "long.txt").write_text(text)
    ids = read_text([str(tmp_path / "long.txt")], BYTES)
    assert bytes(ids[:-1].astype(np.uint8)).decode() == text and ids[-1] == END


def test_of_a_document_that_turns_out_to_be_no_text_the_rest_is_left_out(tmp_path, capsys):
    good = "words and more\n" * 100_000
    (tmp_path / "bad.txt").write_bytes(good.encode() + b"\xff" + b"more of it\n" * 40_000)
    (tmp_path / "good.txt").write_text("the next one")
    ids = read_text([str(tmp_path / "bad.txt"), str(tmp_path / "good.txt")], BYTES)
    first, second = bytes(np.where(ids == END, 0, ids).astype(np.uint8)).rstrip(b"\0").split(b"\0")
    assert good.encode().startswith(first) and second == b"the next one"
    assert capsys.readouterr().err.count("bad.txt: left out from where a document is no text") == 1


def test_a_large_bin_is_not_read_whole(tmp_path):
    """Of a val.bin of 600 MB, a thousand tokens are read, and as many as the default wants."""
    (tmp_path / "in.txt").write_text(SAYING * 20)
    source = str(tmp_path / "in.txt")
    folder = prepare(Prepare(input=[source], out=str(tmp_path), name="data", val_fraction=0.5))
    meta = json.loads((folder / "meta.json").read_text())
    meta["val"]["tokens"] = 300_000_000
    (folder / "meta.json").write_text(json.dumps(meta))
    with open(folder / "val.bin", "r+b") as file:
        file.truncate(600_000_000)  # sparse: it takes no room on the disk
    tracemalloc.start()
    ids = read_text([str(folder / "val.bin")], BYTES, most=1000)
    assert len(ids) == 1000 and tracemalloc.get_traced_memory()[1] < 2**21
    ids = read_text([str(folder / "val.bin")], BYTES, most=evaluation.MOST)
    assert len(ids) == evaluation.MOST and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_windows_are_scored_some_at_a_time(monkeypatch):
    """… so that memory does not grow with the text, and the result is that of all at once."""
    model, ids = make(), tokens_of(SAYING * 2)
    most, at_once = [], evaluation.score

    def counted(model, pairs, *rest):
        most.append(len(pairs))
        return at_once(model, pairs, *rest)

    monkeypatch.setattr(evaluation, "score", counted)
    whole, said = score_text(model, ids, Eval(batch_size=8), "", keep=True)
    assert len(most) == 1
    parts, same = score_text(model, ids, Eval(batch_size=1, stride=1), "", keep=True)
    assert max(most[1:]) <= 64 and len(most) > 3 and same.shape == said.shape
    again, _ = score_text(model, ids, Eval(batch_size=64, stride=1), "")
    assert parts["loss"] == pytest.approx(again["loss"], rel=1e-6)
    for name in ("latent_steps", "flops_per_token"):
        assert parts[name] == again[name]


def test_sweep_spans_the_dials_and_leaves_them_as_they_were():
    model, ids = make(), tokens_of(SAYING)
    points = sweep(model, ids, Eval(sweep=True))
    steps = [point["latent_steps"] for point in points]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 3, "from no thoughts to all of them"
    assert (model.tau, model.max_latent) == (0.25, 3)
    own = next(point for point in points if (point["tau"], point["max_latent"]) == (0.25, 3))
    assert own["loss"] == pytest.approx(perplexity(model, BYTES, ids, Eval())[0]["loss"])
    places = [(point["latent_steps"], point["loss"]) for point in points]
    front = {(x, y) for x, y in places if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)}
    best = [place for place, point in zip(places, points) if point["best"]]
    assert sorted(best) == sorted(front), "each best place once"
    assert {point["tau"] for point in sweep(model, ids, Eval(sweep=True, tau=0.25))} == {None, 0.25}


def test_what_fewer_steps_say_is_what_the_model_says_with_that_dial():
    model, ids = make(block_size=512), tokens_of(SAYING * 4)
    _, said = perplexity(model, BYTES, ids, Eval(analyze=True))
    at_most = with_fewer_steps(model, ids, said, Eval(analyze=True))
    assert len(at_most) == 4 and model.max_latent == 3
    for most, got in enumerate(at_most):
        model.max_latent = most
        want = plain(model, ids[:1].tolist(), ids[1:].astype(np.int64).tolist())
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, their prepared data, and a data folder of another tokenizer."""
    root = tmp_path_factory.mktemp("eval")
    records = [json.dumps({"text": f"{SAYING} {i}"}) + "\n" for i in range(30)]
    (root / "in.jsonl").write_text("".join(records))
    data = prepare(Prepare(input=[str(root / "in.jsonl")], out=str(root), name="data", val_fraction=0.2))
    infinite = make()
    with torch.no_grad():
        infinite.norm.weight *= 1e30
        infinite.head.weight *= 1e30  # finite weights, infinite logits
    for name, model in {"adaptive": make(), "vanilla": make("vanilla"), "infinite": infinite}.items():
        (root / name).mkdir()
        save_checkpoint(root / name / "ckpt.pt", model, BYTES, train={"data": str(data)}, step=7)
    (root / "alone").mkdir()
    save_checkpoint(root / "alone" / "ckpt.pt", make(), BYTES, train={"data": str(root / "gone")})
    other = make_tokenizer("other", r"\S+|\s+", {bytes([i]): 255 - i for i in range(256)})
    (root / "other").mkdir()
    meta = json.loads((data / "meta.json").read_text())
    for name in ("train.bin", "val.bin"):
        (root / "other" / name).write_bytes((data / name).read_bytes())
    (root / "other" / "ranks.tiktoken").write_bytes(ranks_to_text(other))
    (root / "other" / "meta.json").write_text(json.dumps(meta | {"tokenizer": describe(other)}))
    (root / "one.txt").write_text("a")
    (root / "changed").mkdir()
    for name, fingerprint in {"ckpt.pt": "0" * 64, "same.pt": Data(str(data), 1).fingerprint}.items():
        rest = {"train": {"data": str(data)}, "data": fingerprint}
        save_checkpoint(root / "changed" / name, make(), BYTES, **rest)
    return root


def test_a_run_alone_is_measured_on_its_own_validation_text(folder, call):
    out, _ = call("eval", folder / "adaptive", f"--json={folder / 'a.json'}")
    val = folder / "data" / "val.bin"
    call("eval", folder / "adaptive", "--text", val, "--batch_size=3", f"--json={folder / 'b.json'}")
    a, b = (json.loads((folder / name).read_text()) for name in ("a.json", "b.json"))
    assert a["perplexity"]["loss"] == pytest.approx(b["perplexity"]["loss"], rel=1e-6)
    assert a["step"] == 7 and "machine" in a and "the first" not in out
    assert f"{a['perplexity']['perplexity']:.4f} per token" in out
    assert a["tau"] == 0.25 and "τ 0.25, ℓ_max 3" in out
    out, _ = call("eval", folder / "changed" / "same.pt", "--max_tokens=20")
    assert "20 tokens" in out
    out, _ = call("eval", folder / "vanilla", "--max_tokens=20", f"--json={folder / 'c.json'}")
    found = json.loads((folder / "c.json").read_text())
    assert (found["tau"], found["max_latent"]) == (None, 0) and "τ" not in out and "ℓ_max" not in out


def test_of_a_large_validation_text_the_beginning_is_measured_and_said_to_be(folder, call, monkeypatch):
    monkeypatch.setattr(evaluation, "MOST", 300)
    out, _ = call("eval", folder / "adaptive", f"--json={folder / 'a.json'}")
    assert json.loads((folder / "a.json").read_text())["perplexity"]["tokens"] == 300
    assert "the first 300 tokens" in out and "--max_tokens" in out
    for more in (["--max_tokens=400"], ["--text", folder / "data" / "val.bin"]):
        out, _ = call("eval", folder / "adaptive", *more, f"--json={folder / 'a.json'}")
        found = json.loads((folder / "a.json").read_text())["perplexity"]
        assert found["tokens"] >= 400 and "the first" not in out


def test_dials_analysis_page_and_figure_from_the_command_line(folder, call):
    words = ["--max_latent=1", "--tau=0", "--max_tokens=200", "--analyze", "--sweep"]
    written = [f"--html={folder / 'page.html'}", f"--json={folder / 'c.json'}"]
    out, _ = call("eval", folder / "adaptive", *words, *written)
    found = json.loads((folder / "c.json").read_text())
    assert found["perplexity"]["latent_steps"] == 1 and found["perplexity"]["tokens"] == 200
    assert found["rank_correlation"] is None
    assert [point["latent_steps"] for point in found["sweep"]] == [0, 1]
    assert [row["step"] for row in found["further_steps"]] == [1]
    assert len((folder / "page.html").read_text()) > 20_000 and "what step k brings" in out
    pytest.importorskip("matplotlib")
    call("eval", folder / "adaptive", "--max_tokens=200", "--analyze", f"--plot={folder / 'figure.png'}")
    assert (folder / "figure.png").read_bytes()[1:4] == b"PNG"


WRONG = {
    "{root}/nowhere": "does not exist",
    "{root}/alone": "--text",
    "{root}/infinite": "not finite",
    "{root}/infinite --html={root}/never.html --json={root}/never.json": "not finite",
    "{root}/adaptive --text {root}/nothing.txt": "nothing.txt does not exist",
    "{root}/adaptive --text {root}/data/nothing.bin": "nothing.bin is not a train.bin or val.bin",
    "{root}/adaptive --text {root}/nothing/val.bin": "nothing/val.bin is not a train.bin or val.bin",
    "{root}/adaptive --limit=3": "limit is not read here, but by --tasks",
    "{root}/adaptive --key=code": "key is not read here, but by --text",
    "{root}/adaptive --html={root}/never.json --json={root}/data/../never.json": "--html and --json are both",
    "{root}/adaptive --text {root}/one.txt --json={root}/one.txt": "--text and --json are both",
    "{root}/adaptive --text {root}/one.txt": "fewer than two tokens",
    "{root}/adaptive --text {root}/one.txt --key=code": "--key=code is not read here",
    "{root}/adaptive --json={root}/adaptive/ckpt.pt": "ckpt.pt is a file of --run",
    "{root}/adaptive --json={root}/data/train.bin": "train.bin is a file that train.py or prepare.py wrote",
    "{root}/adaptive --html={root}/vanilla/ckpt.pt": "ckpt.pt is a file that train.py or prepare.py wrote",
    "{root}/adaptive --tasks any --stride=7": "stride is not read here, but by what reads text",
    "{root}/adaptive --text {root}/other/val.bin": "another tokenizer",
    "{root}/changed": "val.bin is other text than that of",
    "{root}/adaptive --stride=33": "beyond the context of 32",
    "{root}/adaptive --stride=0": "stride is 0",
    "{root}/adaptive --tau=2": "tau is 2.0",
    "{root}/adaptive --max_tokens=1": "max_tokens is 1",
    "{root}/adaptive --batch_size=0": "batch_size is 0",
    "{root}/adaptive --num_fewshot=-1": "num_fewshot is -1",
    "{root}/adaptive --plot=figure.png": "--analyze or --sweep",
    "{root}/adaptive --sweep --plot=figure.jpg": ".png",
    "{root}/adaptive --sweep --plot={root}/.png": "want a name in .png",
    "{root}/adaptive --json={root}/no/where.json": "folder does not exist",
    "{root}/adaptive --html={root}/data": "is a folder",
    "{root}/vanilla --sweep": "without latent steps",
    "{root}/vanilla --max_latent=2": "without latent steps",
    "{root}/vanilla --tau=0.5": "--tau=0.5 turns nothing",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_answered_with_one_line_and_exit_code_2(words, folder, call):
    assert WRONG[words] in call("eval", *words.format(root=folder).split(), code=2)[1]
    assert not list(folder.glob("never*")) and not list(folder.glob("*.tmp"))


def test_what_was_found_is_written_though_nobody_reads_what_is_printed(folder):
    command = [sys.executable, ROOT / "eval.py", folder / "adaptive", "--max_tokens=200", "--device=cpu",
               "--sweep", f"--json={folder}/kept.json"]
    done = unread(command)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert json.loads((folder / "kept.json").read_text())["sweep"]


@pytest.mark.parametrize("flag", ["json", "html", "plot"])
def test_what_was_found_is_printed_though_it_cannot_be_written(flag, folder, call, monkeypatch):
    def full(*_):
        raise BadInput("the disk is full")

    monkeypatch.setattr(evaluation, "write_whole", full)
    monkeypatch.setattr(evaluation.figures, "save", full)
    words = ["--sweep", "--max_tokens=200", "--device=cpu", f"--{flag}={folder / 'x.png'}"]
    out, err = call("eval", folder / "adaptive", *words, code=2)
    assert "perplexity" in out and "written" not in out and "the disk is full" in err


def test_outputs_are_tried_before_the_work_begins(folder, call, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the evaluation has begun")

    monkeypatch.setattr(evaluation, "perplexity", never)
    for flag in ("html", "json", "plot"):
        words = ["--analyze", f"--{flag}={folder / 'no' / 'where.png'}"]
        assert f"--{flag}" in call("eval", folder / "adaptive", *words, code=2)[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["--analyze", f"--plot={folder / 'figure.png'}"]
    assert "pip install matplotlib" in call("eval", folder / "adaptive", *words, code=2)[1]
