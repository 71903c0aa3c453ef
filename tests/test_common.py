"""What all scripts share: files that stay whole, devices, checkpoints that are checked."""

import errno
import io
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common import (
    BadInput, about, autocast, check_output, check_tensor, load_checkpoint, measure_roof, optional,
    pick_device, precision, run, save_checkpoint, table, timed, turn, unusable, write_whole)
from conftest import uneven
from tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("bytes")


def test_an_optional_package_is_asked_for():
    assert optional("os.path", "x") is os.path
    with pytest.raises(BadInput, match="--plot needs not_there: pip install not_there"):
        optional("not_there.figure", "--plot")


def test_a_result_says_what_made_it(monkeypatch):
    found = about()
    assert found["machine"] and found["torch"] == torch.__version__ and found["python"] and "commit" in found
    monkeypatch.setenv("PATH", "")  # no git
    assert about()["commit"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for device in ("", "cuda", "cuda:1"):
        assert about(device)["machine"] == "a GPU"
    assert about("cpu")["machine"] == found["machine"], "that of the CPU, where it is asked for"


def test_a_result_tells_changed_code_apart(monkeypatch, tmp_path):
    """By the changes that are not committed, or not even known to git, of whatever bytes."""
    said = {"status": "", "rev-parse": "abc"}
    monkeypatch.setattr("common.git", lambda word, *_: said[word])
    monkeypatch.setattr("common.__file__", str(tmp_path / "common.py"))
    found = [about()["commit"]]
    said["status"] = "M a.py"
    for name, content in (("a.py", b"x = 1"), ("a.py", b"x = 2"), ("b.py", b"# caf\xe9")):
        (tmp_path / name).write_bytes(content)
        found.append(about()["commit"])
    assert found[0] == "abc" and len({*found}) == 4
    assert all(name.startswith("abc-dirty-") for name in found[1:])


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_config_of_ones_own_is_no_changed_code(monkeypatch, tmp_path):
    monkeypatch.setattr("common.__file__", str(tmp_path / "common.py"))
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "a"]
    for words in (["init"], commit):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text("n_layer = 2\n")
    assert about()["commit"] and "dirty" not in about()["commit"]
    (tmp_path / "mine.py").write_text("n_layer = 2\n")
    assert "dirty" in about()["commit"]


def test_weights_of_low_precision_are_saved_as_they_are_loaded(tmp_path):
    model = uneven(vocab_size=257).bfloat16()
    save_checkpoint(tmp_path / "ckpt.pt", model, TOKENIZER)
    loaded = load_checkpoint(tmp_path)[0]
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters()))
    weights = model.state_dict() | {"count": torch.tensor([3])}
    save_checkpoint(tmp_path / "counted.pt", model, TOKENIZER, weights)
    assert torch.load(tmp_path / "counted.pt")["model"]["count"].dtype == torch.int64


def test_a_table_is_aligned():
    lines = table(["a", "bb"], [["x", 1], ["yyy", 22]]).splitlines()
    assert lines == ["| a   | bb |", "|-----|---:|", "| x   |  1 |", "| yyy | 22 |"]


class Full(io.BytesIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "λ")
    write_whole(str(path), b"two")
    (tmp_path / ".a.json.tmp").write_text("left by a run that was killed")
    write_whole(path, "three λ")
    assert path.read_text(encoding="utf-8") == "three λ" and [*tmp_path.iterdir()] == [path]
    (tmp_path / "a.json.tmp").write_text("a file of the user's")
    write_whole(path, "three λ")
    assert (tmp_path / "a.json.tmp").read_text() == "a file of the user's"
    (tmp_path / "a.json.tmp").unlink()
    for fails in ("fsync", "replace"):
        message = "a.json cannot be written: No space left"
        with monkeypatch.context() as patch, pytest.raises(BadInput, match=message):
            patch.setattr(os, fails, lambda *_: Full().write(b""))
            write_whole(path, "four")
        assert path.read_text(encoding="utf-8") == "three λ" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(BadInput, match="cannot be written"):
        write_whole(tmp_path / "no" / "a.json", "x")


def test_files_of_a_run_and_of_prepared_text_are_not_replaced_and_others_of_their_names_are(tmp_path):
    for name in ("ckpt.pt", "log.jsonl", "summary.json", "meta.json", "val.bin", "page.html"):
        (tmp_path / name).write_text("")
    ours = {"ckpt.pt", "log.jsonl", "summary.json"}
    for more in ((), ("train.bin", "meta.json", "val.bin")):
        for name in more:
            (tmp_path / name).write_text("")
        ours |= {*more}
        for path in tmp_path.iterdir():
            if path.name in ours:
                with pytest.raises(BadInput, match=f"{path.name} is a file that train.py or prepare.py"):
                    check_output(path, "--json")
            else:
                check_output(path, "--json")
    (tmp_path / "ckpt.pt").unlink()
    check_output(tmp_path / "summary.json", "--json")  # what --json itself has written may come again


def test_names_of_any_bytes_are_written(tmp_path):
    write_whole(tmp_path / "a.json", json.dumps({"run": "out/\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"run": "out/\udcff"}, "as it is named"
    with pytest.raises(BadInput, match="--json=.* cannot be written: File name too long"):
        check_output(tmp_path / ("n" * 248 + ".json"), "--json")  # with what is written beside it first


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "far").mkdir()
    os.symlink(tmp_path / "far" / "a.json", tmp_path / "link.json")
    os.symlink(tmp_path / "circle", tmp_path / "circle")
    for content in ("one", "two"):
        check_output(tmp_path / "link.json", "--json")
        write_whole(tmp_path / "link.json", content)
        assert (tmp_path / "far" / "a.json").read_text() == content and (tmp_path / "link.json").is_symlink()
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/null", tmp_path / "fifo", tmp_path / "circle"):
        with pytest.raises(BadInput, match="--json="):
            check_output(path, "--json")


def test_an_output_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    check_output(tmp_path / "a.html", "--html")
    check_output(tmp_path / "file", "--html")
    for path in (tmp_path, tmp_path / "no" / "a.html", tmp_path / "file" / "a.html"):
        with pytest.raises(BadInput, match="--html="):
            check_output(path, "--html")
    with pytest.raises(BadInput, match="--json="):
        check_output(tmp_path / "file" / "a.json", "--json", make=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"] and (tmp_path / "file").read_text() == "x"
    check_output(tmp_path / "new" / "a.json", "--json", make=True)
    assert (tmp_path / "new").is_dir()
    if os.getuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(BadInput, match="Permission"):
            check_output(tmp_path / "a.html", "--html")
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------------------------------------------- devices


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("tpu9", "meta", "cuda:77", "cpu cpu", "hpu"):
        with pytest.raises(BadInput, match=f"--device={name} .*cpu"):
            pick_device(name)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(BadInput, match="process 4 .*--nproc_per_node=4 at most"):
        pick_device("cuda", 4)


def test_mps_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    assert pick_device("mps").type == "mps"
    assert precision(torch.device("mps")) is torch.float32


def test_precision_is_what_the_device_does_well(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has)
        assert precision(cuda) is (torch.bfloat16 if has else torch.float32)
        assert precision(cpu) is torch.float32
    assert precision(cpu, "bfloat16") is torch.bfloat16 and precision(cuda, "float32") is torch.float32
    for wrong in ("float16", "int8"):
        with pytest.raises(BadInput, match=f"--dtype={wrong}.*bfloat16"):
            autocast(cpu, wrong)
    a = torch.ones(2, 2)
    with autocast(cpu):
        assert (a @ a).dtype is torch.float32
    with autocast(cpu, "bfloat16"):
        assert (a @ a).dtype is torch.bfloat16


def test_the_roof_is_timed_where_the_product_is_made(monkeypatch):
    made = []
    original = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: made.append(len(a)) or original(a, b))
    assert measure_roof(torch.device("cpu")) > 0 and made == [1024] * 8
    assert timed(lambda: None, torch.device("cpu")) >= 0


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    save_checkpoint(path, uneven(vocab_size=257), TOKENIZER, step=3, train={"seed": 1})
    return path


def test_a_checkpoint_comes_back(saved):
    for path in (saved, str(saved.parent)):
        model, tokenizer, checkpoint = load_checkpoint(path)
        assert checkpoint["step"] == 3 and checkpoint["train"] == {"seed": 1} and not model.training
        assert asdict(model.config) == checkpoint["config"] and tokenizer.encode_ordinary("ä") == [195, 164]
        original = uneven(vocab_size=257).state_dict()
        assert all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items())
    assert [*saved.parent.iterdir()] == [saved]


def test_a_tied_head_comes_back_tied(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", uneven("vanilla", vocab_size=257, tie_embeddings=True), TOKENIZER)
    model = load_checkpoint(tmp_path)[0]
    assert model.head.weight is model.embed.weight


def test_a_checkpoint_of_before_grouped_queries_loads(saved, tmp_path):
    state = torch.load(saved, weights_only=True)
    del state["config"]["n_kv_head"], state["config"]["tie_embeddings"]
    torch.save(state, tmp_path / "ckpt.pt")
    x = torch.randint(0, 257, (2, 9))
    assert torch.equal(load_checkpoint(tmp_path)[0](x).logits, load_checkpoint(saved)[0](x).logits)


def test_what_is_not_finite_is_never_saved(saved, tmp_path):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved.read_bytes())
    model = uneven(vocab_size=257)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad():
            model.blocks[1].w2.weight[3, 4] = bad
        with pytest.raises(BadInput, match="blocks.1.w2.weight is not finite"):
            save_checkpoint(path, model, TOKENIZER)
    assert path.read_bytes() == saved.read_bytes() and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_checkpoint_of_before(error, saved, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved.read_bytes())

    def half(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(BadInput, match="ckpt.pt cannot be written: (No space|unexpected)"):
        save_checkpoint(path, uneven(vocab_size=257), TOKENIZER)
    assert path.read_bytes() == saved.read_bytes() and [*tmp_path.iterdir()] == [path]


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-code-ran",))


def refused(path, content, *words):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput) as error:
        load_checkpoint(path)
    line = str(error.value)
    assert path.name in line and "\n" not in line and all(word in line for word in words), line


def test_wrong_checkpoints(saved, tmp_path):
    good = saved.read_bytes()
    state = torch.load(saved, weights_only=True)
    refused(tmp_path / "truncated.pt", good[: len(good) // 2], "corrupt")
    refused(tmp_path / "noise.pt", b"not a checkpoint at all", "corrupt")
    refused(tmp_path / "empty.pt", b"", "corrupt")
    refused(tmp_path / "other.pt", {"weights": torch.zeros(3)}, "not written by")
    refused(tmp_path / "list.pt", [1, 2], "not written by")
    refused(tmp_path / "ranks.pt", state | {"ranks": state["ranks"][:-5]}, "does not fit", "sha256")
    refused(tmp_path / "lacks.pt", {k: v for k, v in state.items() if k != "model"}, "does not fit")
    refused(tmp_path / "hostile.pt", {"format": Hostile()}, "code")
    assert not Path("hostile-code-ran").exists()
    with pytest.raises(BadInput, match="does not exist"):
        load_checkpoint(tmp_path / "missing")


def gpu_is_full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def cpu_is_full(*_, **__):
    torch.empty(2**50)


@pytest.mark.parametrize("full", [gpu_is_full, cpu_is_full])
def test_a_model_that_memory_cannot_hold_is_not_called_corrupt(full, saved, monkeypatch):
    for where, name in ((torch.nn.Module, "to"), (torch, "load")):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match="does not fit .*memory"):
            patch.setattr(where, name, full)
            load_checkpoint(saved)


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:79] data. DefaultCPUAllocator: not enough memory: you tried")
])
def test_every_system_says_in_its_own_words_that_memory_ran_out(error):
    assert "memory" in unusable(error, "is damaged")
    assert unusable(RuntimeError("another"), "is damaged") == "is damaged"


@pytest.mark.parametrize("full", [gpu_is_full, cpu_is_full])
def test_too_little_memory_is_one_line(full, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(full)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and "too little memory" in line
    with pytest.raises(RuntimeError, match="size"):  # a fault of ours is shown as one
        run(lambda: torch.ones(2) @ torch.ones(3))


@pytest.mark.parametrize("name,value,words", [
    ("n_embd", 64, ["embed.weight", "[257, 32]", "[257, 64]"]), ("n_layer", 2, ["does not fit", "adaptive"]),
    ("block_size", 10**9, ["block_size"]), ("n_ff", 10**18, ["n_ff"]), ("n_layer", 10**9, ["n_layer"]),
    ("vocab_size", 10**8, ["embed.weight"]), ("tau", float("nan"), ["tau"]), ("n_head", "4", ["not fit"]),
    ("method", "loop", ["not fit", "loop"]), ("method", "lop", ["not fit", "lop"]), ("extra", 1, ["extra"]),
])
def test_a_config_that_does_not_fit_allocates_nothing(name, value, words, saved, tmp_path):
    state = torch.load(saved, weights_only=True)
    refused(tmp_path / "bad.pt", state | {"config": state["config"] | {name: value}}, *words)


@pytest.mark.parametrize("change,words", [
    (lambda t: t.half(), ["torch.float16"]), (lambda t: t.T, ["must be torch.float32"]),
    (lambda t: "x", ["str"]), (lambda t: t.to_sparse(), ["torch.sparse_coo"]),
    (lambda t: t.log(), ["not finite"]), (lambda t: t / 0, ["not finite"]),
])
def test_a_tensor_that_is_not_what_it_must_be(change, words, saved, tmp_path):
    state = torch.load(saved, weights_only=True)
    state["model"]["head.weight"] = change(state["model"]["head.weight"])
    refused(tmp_path / "bad.pt", state, "head.weight", *words)


def test_every_flipped_byte_is_found_or_changes_nothing(saved, tmp_path):
    good = bytearray(saved.read_bytes())
    whole = load_checkpoint(saved)[0].state_dict()
    found = 0
    for place in range(0, len(good), len(good) // 150):
        good[place] ^= 0xFF
        (tmp_path / "bad.pt").write_bytes(good)
        good[place] ^= 0xFF
        try:
            weights = load_checkpoint(tmp_path / "bad.pt")[0].state_dict()
        except BadInput:
            found += 1
            continue
        assert all(torch.equal(whole[name], tensor) for name, tensor in weights.items()), place
    assert found > 75


def test_check_tensor():
    check_tensor("x", torch.ones(2), torch.zeros(2))
    check_tensor("x", torch.tensor(3), torch.tensor(4))
    for bad in (torch.ones(3), torch.ones(2).double(), torch.tensor([1.0, float("nan")]), [1.0, 2.0], None):
        with pytest.raises(BadInput, match="^opt "):
            check_tensor("opt", bad, torch.zeros(2))


@pytest.mark.parametrize("method,settings,dials,word", [
    ("adaptive", {}, (0.5, 1), ""), ("adaptive", {}, (None, 9), ""), ("loop", {}, (None, 1), ""),
    ("vanilla", {}, (0.5, None), "--tau=0.5"), ("loop", {}, (0.5, None), "--tau=0.5"),
    ("adaptive", {"max_latent": 0}, (0.5, None), "--tau=0.5"),
    ("vanilla", {}, (None, 1), "--max_latent=1"),
    ("adaptive", {"max_latent": 0}, (None, 1), "--max_latent=1"),
    ("mor", {}, (None, 2), ""), ("mor", {}, (None, 4), "knows at most 3")])
def test_dials_that_turn_nothing_are_refused(method, settings, dials, word):
    model = uneven(method, **settings)
    before = model.tau, model.max_latent
    if word:
        with pytest.raises(BadInput, match=word):
            turn(model, "out/run", *dials)
        assert (model.tau, model.max_latent) == before
    else:
        turn(model, "out/run", *dials)
        assert (model.tau, model.max_latent) == tuple(a if b is None else b for a, b in zip(before, dials))
