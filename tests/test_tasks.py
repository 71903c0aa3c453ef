"""The task of known difficulty: its documents are right, and what is told of a model is true."""

import json
import os
import shutil

import pytest
import torch

import figures
import prepare
import tasks
from prepare import Data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setattr(tasks.hops, "__defaults__", (300, 0))
    prepare.prepare(prepare.Prepare(task="hops", out=str(folder)))
    patch.undo()
    return folder / "hops"


def test_every_answer_follows_from_its_table():
    documents = list(tasks.hops(50, seed=3))
    assert len(set(documents)) == 50 and documents == list(tasks.hops(50, seed=3))
    for document in documents:
        table, questions = document.split(";")
        image = dict(table.split())
        asked = [questions[i : i + 3] for i in range(0, len(questions), 3)]
        assert sorted(image) == sorted(image.values()) == list(tasks.SYMBOLS)
        assert len({question[:2] for question in asked}) == len(asked) == tasks.QUESTIONS
        for hops, x, y in asked:
            went = [x]
            for _ in range(int(hops)):
                went.append(image[went[-1]])
            assert went[-1] == y and len(set(went)) == int(hops) + 1, "in one cycle, none comes back so soon"


class Oracle:
    """Knows the answer to questions of at most two hops, says "a" to others, and takes h steps at them."""

    def __init__(self, block_size=256):
        self.embed = torch.nn.Embedding(257, 1)
        self.config = type("Config", (), {"block_size": block_size})

    def __call__(self, idx):
        logits = torch.zeros(*idx.shape, 257)
        steps = torch.zeros(idx.shape)
        for row, text in enumerate(idx.tolist()):
            text = bytes(text).decode()
            image = dict(text.split(";")[0].split())
            for i in range(text.index(";") + 2, len(text), 3):
                hops, x = int(text[i - 1]), text[i]
                steps[row, i] = hops
                for _ in range(hops):
                    x = image[x]
                logits[row, i, ord(x if hops < 3 else "a")] = 1
        return type("Output", (), {"logits": logits, "steps": steps})


def test_accuracy_and_steps_are_counted_where_a_question_ends(data):
    *rows, elsewhere = tasks.answers(Oracle(), Data(str(data), 1), 8)
    assert [row["hops"] for row in rows] == [1, 2, 3, 4] == [row["steps"] for row in rows]
    assert [row["accuracy"] for row in rows[:2]] == [1, 1] and elsewhere["steps"] == 0
    assert all(0.02 < row["accuracy"] < 0.3 for row in rows[2:]), "one answer in eight is a"


def test_windows_begin_where_documents_do(data):
    found = Data(str(data), 60)
    inputs, targets = found.batch(1337, 0, 8, slice(None))
    for row in (*inputs.tolist(), *found.windows(5, slice(None))[0].tolist()):
        table, questions = bytes(row).decode().split(";")
        assert len(table) == 23 and len(questions) == 36
    assert (targets[:, -1] == found.tokenizer.eot_token).all() and len(inputs.unique(dim=0)) > 4


def test_the_command(data, tmp_path, call, monkeypatch):
    from train import Train, train
    shape = dict(n_layer=1, n_head=2, n_embd=16, n_ff=24, block_size=128, max_steps=1, global_batch_size=2,
                 eval_windows=2, device="cpu", tau=0.0)
    train(Train(data=str(data), out=str(tmp_path / "run"), **shape))
    out, _ = call("tasks", tmp_path / "run", f"--data={data}")
    said = int(out.split()[-6])
    assert 2 < said < 50 and out.endswith(f"\n{said} documents of the validation text\n")  # all there are
    out, _ = call("tasks", tmp_path / "run", f"--data={data}", "--documents=4", "--max_latent=1",
                  f"--json={tmp_path}/hops.json")
    found = json.loads((tmp_path / "hops.json").read_text())
    assert "\n4 documents" in out and found["settings"]["documents"] == 4
    assert "| elsewhere" in out and len(found["rows"]) == 5 and found["rows"][0]["steps"] == 1
    assert "--plot=x.txt" in call("tasks", tmp_path / "run", f"--data={data}", "--plot=x.txt", code=2)[1]
    other = tmp_path / "other"
    shutil.copytree(data, other)
    err = call("tasks", tmp_path / "run", f"--data={other}", f"--json={other}/meta.json", code=2)[1]
    assert "meta.json is a file of --data" in err
    os.truncate(other / "val.bin", 4)
    meta = json.loads((other / "meta.json").read_text())
    meta["val"]["tokens"] = 2
    (other / "meta.json").write_text(json.dumps(meta))
    assert "no whole document" in call("tasks", tmp_path / "run", f"--data={other}", code=2)[1]


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"hops": h, "accuracy": h / 4, "steps": 5.0 - h} for h in (1, 2, 3, 4)]
    figure = figures.steps_against_hops([*rows, {"hops": None, "accuracy": None, "steps": 0.5}])
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [0.25, 0.5, 0.75, 1.0]
    assert [bar.get_height() for bar in right.patches] == [4, 3, 2, 1, 0.5]
    figures.save(figure, tmp_path / "hops.png")
    assert (tmp_path / "hops.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments,words", [
    (["--task=jumps"], ["jumps", "hops"]), (["--task=hops", "--input", "x.txt"], ["--input"]),
    (["--task=hops", "--tokenizer=gpt2"], ["--tokenizer"])])
def test_a_task_that_cannot_be(arguments, words, call, tmp_path):
    err = call("prepare", *arguments, f"--out={tmp_path}/data", code=2)[1]
    assert all(word in err for word in words) and not (tmp_path / "data").exists()


def test_documents_of_a_task_stay_whole(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.hops, "__defaults__", (30, 0))
    err = call("prepare", "--task=hops", "--val_fraction=1e-12", f"--out={tmp_path}", code=2)[1]
    assert "--val_fraction=1e-12 leaves training or validation no document" in err
    assert not [*tmp_path.iterdir()]


def test_short_contexts_are_refused(data):
    with pytest.raises(ValueError, match="do not fit block_size 32"):
        tasks.answers(Oracle(32), Data(str(data), 1), 8)


def test_a_run_on_other_tokens_and_other_data_are_refused(data, tmp_path, call):
    pytest.importorskip("tokenizers")
    source = tmp_path / "text.txt"
    source.write_text("to be or not to be\n" * 400)
    call("prepare", "--input", source, "--name=words", "--tokenizer=bpe:260", f"--out={tmp_path}")
    call("train", f"--data={tmp_path}/words", f"--out={tmp_path}/run", "--n_layer=1", "--n_embd=16",
         "--n_head=2", "--block_size=16", "--max_steps=1", "--global_batch_size=2", "--eval_windows=2",
         "--device=cpu")
    err = call("tasks", tmp_path / "run", f"--data={data}", code=2)[1]
    assert "another tokenizer" in err
    err = call("tasks", tmp_path / "run", f"--data={tmp_path}/words", code=2)[1]
    assert "is not of prepare.py --task=hops" in err
