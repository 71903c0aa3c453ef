"""What stands around the loop of train.py: processes, evaluation, and all that guards the folder of a run.

What is notable here:
* A run exists from its first checkpoint, which is written before the first step and the first log line.
* A checkpoint knows the length and the checksum that the log had then. --resume cuts the log there: a run
  that was killed ends with the log of one that was not, and a log that is another's is left alone.
* The lock on a folder is the system's own: a process that dies leaves none.
"""

import errno
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common import BadInput, autocast, check_no_run, check_tensor, precision, reason
from configurator import mute, on_end
from log import send
from model import LLaMA
from prepare import Data
from shard import load_whole, local, parameters_of, resume_parts, shard
from tokenizer import describe


def number_from(name: str, unset: int) -> int:
    """An environment variable as an integer; −1 where it is none, which `ends_with_the_others` refuses."""
    text = os.environ.get(name) or str(unset)
    return int(text) if text.isdecimal() else -1


RANK = number_from("RANK", 0)  # which process this is; torchrun sets all three
LOCAL_RANK = number_from("LOCAL_RANK", 0)  # which on its machine
WORLD = number_from("WORLD_SIZE", 1)  # how many there are
DIVERGED = 3  # exit code of a training whose numbers are no longer finite
FREE = (  # --resume may change these: only max_steps, and mor's micro-batches, change more than rounding
    "out", "resume", "data", "max_steps", "micro_batch_size", "eval_every", "save_every", "keep_every",
    "log_every", "device", "compile", "checkpointing", "tensorboard", "shard")


@dataclass
class Progress:
    """How far a run has come. ckpt.pt holds all of it, beside the model and the optimizer."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # that they took
    products: int = 0  # FLOPs of their forwards in matrix products: exact, all processes together
    attention: int = 0  # the same in attention
    best: float = math.inf  # lowest validation loss
    start: float = 0.0  # latent steps in validation before the first step, of a model that starts trained
    result: dict = field(default_factory=dict)  # the last evaluation
    threshold: tuple | None = None  # what the BudgetController remembers
    log: tuple = (0, "")  # length and checksum of log.jsonl


class Stop:
    """Ctrl-C, SIGTERM or a terminal that is closed asks for an end after this step; a second one ends at
    once, and saves nothing.

    With several processes each gets a Ctrl-C twice, from the terminal and from torchrun: what follows within
    two seconds is taken for an echo.
    """

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0
        signal.signal(signal.SIGINT, self.ask)
        on_end(self.ask)

    def ask(self, number: int, frame) -> None:
        if not self.asked:
            self.asked = True
            self.since = time.monotonic()
            of_torchrun = WORLD > 1 and number == signal.SIGTERM  # as when another process has failed
            if RANK == 0 and not of_torchrun:  # not by print, which the signal may have interrupted
                line = b"\ntrain.py: saves and stops after this step; a second Ctrl-C ends at once\n"
                with suppress(OSError):  # nobody may read it
                    os.write(2, line)
        elif WORLD == 1 or time.monotonic() - self.since > 2:
            os._exit(128 + number)


@contextmanager
def signals_as_before() -> Iterator[None]:
    """Where train() is called from Python, as in a notebook, Ctrl-C is its caller's again when it ends. Not
    among several processes, where its echo may come later (see Stop).
    """
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, answer in before.items() if WORLD == 1 else ():
            if signal.getsignal(number) != answer:
                signal.signal(number, answer)


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Where a process of several fails, the others' collectives fail or wait for ever. So it ends at once,
    torchrun ends the others, and only the first to fail says why, in one line. Raises BadInput where the
    environment is not as torchrun makes it.
    """
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    met = os.environ.get("MASTER_ADDR") and number_from("MASTER_PORT", -1) > 0
    if not 0 <= LOCAL_RANK <= RANK < WORLD or WORLD > 1 and not met:
        found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise BadInput(f"the environment holds {found}, as no torchrun sets it: start with torchrun, or "
                       "unset them")
    try:
        yield
    except Exception as error:
        if WORLD == 1:
            raise
        if first_to_fail():
            print(failure(error), file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, BadInput) else 1)  # at once: threads of collectives may wait for ever


def first_to_fail() -> bool:
    """Counts the failures in the store of torchrun, by which all processes have met."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"failed processes of attempt {attempt}", 1) == 1
    except (KeyError, RuntimeError, ValueError):  # it has gone, and torchrun with it
        return False


def failure(error: Exception) -> str:
    """What befell this process, in one line; where it is no bad input, with the place in our files."""
    if isinstance(error, BadInput):
        return f"train.py: {' '.join(str(error).split())}"
    ours = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ours]
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
    what = f"{where}{type(error).__name__}: {reason(error)}"
    return f"train.py: process {RANK} of {WORLD} failed, so all end; --resume goes on. {what}"


# ----------------------------------------------------------------------------------- numbers of all processes


def shares(config) -> tuple[int, int]:
    """Sequences of a process in one optimizer step, and in one forward."""
    share = config.global_batch_size // WORLD
    return share, min(config.micro_batch_size or share, share)


def distribute(model: LLaMA, device: torch.device, config) -> LLaMA | DistributedDataParallel:
    """Moves a model to the device and joins the other processes, where there are any: gradients are averaged
    over them, and with config.shard weights, gradients and moments are shared out.
    """
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if WORLD > 1 and config.shard:
        shard(model, device, precision(device, config.dtype))
        return model
    model.to(device)
    if WORLD == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def exact(device: torch.device) -> torch.device:
    """Where to add up in float64: Apple's GPUs have none, and NCCL adds on GPUs alone."""
    return device if device.type == "cuda" else torch.device("cpu")


def add_up(sums: dict[str, Tensor], device: torch.device) -> dict[str, float | Tensor]:
    """Each named tensor summed over the processes, 0-dim ones as a float: one all-reduce, one wait for the
    device.
    """
    total = torch.cat([value.to(exact(device)).double().flatten() for value in sums.values()])
    if WORLD > 1:
        dist.all_reduce(total)
    parts = total.cpu().split([value.numel() for value in sums.values()])
    return {name: part if sums[name].dim() else part.item() for name, part in zip(sums, parts)}


def clip_gradients(model: LLaMA, most: float) -> float:
    """Scales the gradient down to a norm of `most` (0: not at all), and returns the norm that it had."""
    norm = clip_grad_norm_(model.parameters(), most or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def waiting(executed: list[Tensor], most: int) -> float:
    """The share of their time in which processes wait for the one that has most live tokens, pass by pass.

    executed: this process's steps (b, T) of each forward. A pass takes as long as its largest number of live
    tokens: 1 − mean over processes / largest, both summed over the passes.
    """
    live = torch.stack([(steps >= k).sum() for steps in executed for k in range(most + 1)])
    table = torch.zeros(WORLD, len(live), device=live.device)
    table[RANK] = live
    dist.all_reduce(table)
    return 1 - (table.mean(0).sum() / table.amax(0).sum()).item()


@torch.no_grad()
def evaluate(model: LLaMA, data: Data, config, micro: int, device: torch.device, stop: Stop) -> dict:
    """Validation loss (nats per token), perplexity, bits per byte and mean latent steps, on the same windows.

    Empty where a stop was asked for.
    """
    zero = torch.zeros((), dtype=torch.float64, device=exact(device))
    sums = {"nats": zero, "steps": zero, "tokens": zero}
    model.eval()
    for first in range(0, config.eval_windows, WORLD * micro):
        if add_up({"stop": zero + stop.asked}, device)["stop"]:
            break
        i = first + RANK * micro
        counts = i < config.eval_windows  # one that has no windows left still takes part in each pass
        x, y = data.windows(config.eval_windows, slice(i, i + micro) if counts else slice(0, 1))
        with autocast(device, config.dtype):
            o = model(send(x, device), send(y, device))
        sums["nats"] = sums["nats"] + o.ce.to(zero.device) * y.numel() * counts
        sums["steps"] = sums["steps"] + o.steps.sum().to(zero.device) * counts
        sums["tokens"] = sums["tokens"] + y.numel() * counts
        del o  # or its logits and its cache would outlive the next forward
    model.train()
    sums["stop"] = zero + stop.asked
    total = add_up(sums, device)
    if total["stop"]:
        return {}
    loss = total["nats"] / total["tokens"]
    text = data.meta["val"]
    return {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) * text["tokens"] / text["bytes"],
        "val_steps": total["steps"] / total["tokens"],
    }


def say(text: str) -> None:
    """Prints a line, above the progress bar, in one of the processes. A training goes on without a reader."""
    try:
        if RANK == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
    except OSError:  # its reader has gone, or its disk is full
        mute()


def say_stopped(step: int, path: Path) -> None:
    line = f"stopped after step {step}, saved to {path}; go on with --resume"
    if WORLD > 1:  # torchrun follows with its own account of the signal, a long one
        rule = "=" * len(line)
        line = f"\n{rule}\n{line}\n{rule}\n(torchrun adds a traceback, as it was interrupted)\n"
    say(line)


def check_finite(numbers: dict[str, float], step: int, path: Path) -> None:
    """Ends a run that has diverged, with exit code 3. What its last checkpoint, at path, holds is finite."""
    wrong = [f"{name} {value}" for name, value in numbers.items() if not np.isfinite(np.asarray(value)).all()]
    if not wrong:
        return
    if RANK == 0:
        advice = f"{path} is of an earlier step, and finite; a lower --learning_rate may help"
        with suppress(OSError):  # the exit code says so, too
            tqdm.write(f"train.py: diverged at step {step}: {', '.join(wrong)}; {advice}", file=sys.stderr)
    sys.exit(DIVERGED)


def largest(model: LLaMA, optimizer: torch.optim.Optimizer) -> float:
    """The largest absolute value among weights and moments: not finite where one of them is not."""
    tensors = [*model.state_dict().values()]
    for moments in optimizer.state.values():
        tensors += moments.values()
    own = torch.stack([local(tensor).abs().amax() for tensor in tensors if local(tensor).numel()]).amax()
    if WORLD > 1:
        own = own.nan_to_num(nan=math.inf, posinf=math.inf)  # backends differ on whether a NaN is the largest
        dist.all_reduce(own, dist.ReduceOp.MAX)
    return own.item()


# -------------------------------------------------------------------------------------------- lock, log.jsonl


def lock(folder: Path):
    """Makes the folder, and returns its lock, an open file: held until it is closed or its process dies.

    Removes what a killed process left half written. Raises BadInput where another process holds the lock, or
    where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise BadInput(f"--out={folder} cannot be written: {reason(error)}") from None
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # any other: a file system that knows no locks
            file.close()
            raise BadInput(f"another train.py is at work in {folder}: wait for its end, or choose another "
                           "--out") from None
    for half in (*folder.glob(".*.pt.tmp"), folder / ".summary.json.tmp"):
        half.unlink(missing_ok=True)
    return file


class Board:
    """What log.jsonl has, for TensorBoard, whose package must be installed; in the same folder.

    What was written there after step `step`, that of the last checkpoint, is purged, as it is from the log.
    """

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(out), purge_step=step + 1)

    def write(self, record: dict) -> None:
        for name, value in record.items():
            numbers = value if isinstance(value, list) else [value]
            for k, number in enumerate(numbers, 1):
                tag = f"{name}/{k}" if isinstance(value, list) else name
                self.writer.add_scalar(tag, number, record["step"])
        self.writer.flush()


def write_log(path: Path, record: dict, board: Board | None = None) -> None:
    """Appends a record, a line of JSON, in one of the processes; also to the board, where there is one.

    Raises BadInput on a full disk.
    """
    if RANK > 0:
        return
    where = path
    try:
        with open(path, "a", newline="\n") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if board:
            where = path.parent / "events.out.tfevents…"
            board.write(record)
    except OSError as error:
        raise unwritten(where, error) from None


def log_state(path: Path) -> tuple[int, str]:
    """Length and SHA-256 of a log, once it is on the disk: no checkpoint survives a power cut without it."""
    if not path.exists():
        return 0, hashlib.sha256().hexdigest()
    try:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            content = file.read()
    except OSError as error:
        raise unwritten(path, error) from None
    return len(content), hashlib.sha256(content).hexdigest()


def unwritten(path: Path, error: OSError) -> BadInput:
    advice = "the last checkpoint is as it was: mend that, and go on with --resume"
    return BadInput(f"{path} cannot be written ({reason(error)}); {advice}")


def cut_log(path: Path, size: int, checksum: str) -> None:
    """Removes what a run wrote after its last checkpoint. Raises BadInput where the log is not its own.

    A log that was taken away begins anew.
    """
    if not path.exists():
        return
    if hashlib.sha256(path.read_bytes()[:size]).hexdigest() != checksum:
        raise BadInput(f"{path} does not begin as this run wrote it: bring that back, or move this file away")
    os.truncate(path, size)


# ----------------------------------------------------------------------------------------------------- checks


def check_new(config, data: Data) -> None:
    """Raises BadInput where config (a Train) and data make no run, or would meet another. Writes nothing."""
    vocabulary = data.tokenizer.n_vocab
    if config.vocab_size and config.vocab_size < vocabulary:
        raise BadInput(f"vocab_size is {config.vocab_size}, but the tokenizer of {config.data} has "
                       f"{vocabulary} tokens")
    data.windows(config.eval_windows, slice(0, 1))  # refuses more than there are
    share, micro = shares(config)
    if config.global_batch_size % WORLD:
        raise BadInput(f"global_batch_size {config.global_batch_size} does not divide by {WORLD} processes")
    if share % micro:
        raise BadInput(f"the {share} sequences of a process (global_batch_size {config.global_batch_size} / "
                       f"{WORLD}) do not divide into micro_batch_size {config.micro_batch_size}")
    out = Path(config.out)
    if config.resume and not (out / "ckpt.pt").exists():
        raise BadInput(f"--out={out} holds no ckpt.pt, so there is nothing to resume: name the folder of a "
                       "run, or begin one without --resume")
    if not config.resume:
        check_no_run(out, "go on with --resume, or choose another --out")


def check_resumed(config, checkpoint: dict, data: Data, optimizer: torch.optim.Optimizer) -> None:
    """Raises BadInput where a checkpoint is not of the run that config and data describe.

    What is FREE may differ, and so may the length, if the run has not come further already.
    """
    path = f"{config.out}/ckpt.pt"
    if not {"train", "data", "optimizer", *asdict(Progress())} <= checkpoint.keys():
        raise BadInput(f"{path} can be sampled, not resumed: it has no optimizer, or is of an older version")
    unset = asdict(type(config)())  # for settings that are newer than the checkpoint
    begun = {"init_from": None} | unset | checkpoint["train"]  # that first, as it sets others
    for name, old in begun.items():
        new = getattr(config, name, None)
        same = new == old or name == "init_from" and old and os.path.realpath(new) == os.path.realpath(old)
        if name not in FREE and not same:
            advice = "resume it as it was, or choose another --out"
            raise BadInput(f"{config.out} was trained with {name}={old}, not {new}: {advice}")
    if checkpoint["data"] != data.fingerprint:
        what = "other text" if checkpoint["tokenizer"] == describe(data.tokenizer) else "another tokenizer"
        advice = "prepare it as it was, name where that lies with --data, or choose another --out"
        raise BadInput(f"{config.out} was trained with {what} than that of {config.data}: {advice}")
    for name, default in asdict(Progress()).items():
        if default is not None and type(checkpoint[name]) is not type(default):
            raise BadInput(f"{path} is corrupt: {name} is {checkpoint[name]!r}")
    step = checkpoint["step"]
    if step < 0:
        raise BadInput(f"{path} is corrupt: it is of step {step}")
    if step > config.max_steps:
        raise BadInput(f"{config.out} has done {step} steps already: max_steps must be at least that")
    check_moments(f"{path}: optimizer", checkpoint["optimizer"], optimizer)


def restore(last: tuple, config, data: Data, model: LLaMA, optimizer: torch.optim.Optimizer) -> dict:
    """Puts what load_checkpoint read of config.out into model and optimizer, shared out or not, and returns
    the rest of it. Raises BadInput where it cannot be resumed.
    """
    path = Path(config.out) / "ckpt.pt"
    saved, _, checkpoint = last
    check_resumed(config, checkpoint, data, optimizer)
    if saved is None:
        resume_parts(path.with_name(checkpoint["parts"]), model, optimizer, begun=checkpoint["step"] > 0)
    else:
        load_whole(model, optimizer, saved.state_dict(), checkpoint["optimizer"])
    return {name: value for name, value in checkpoint.items() if name not in ("model", "optimizer")}


def check_moments(where: str, saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raises BadInput where Adam's state does not fit its parameters: fused, it would read past their end.
    Another optimizer knows its own.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        return
    parameters = parameters_of(optimizer)
    count = torch.zeros(())
    try:
        for i, moments in saved["state"].items():
            check_tensor(f"{where}, step", moments["step"], count)
            check_tensor(f"{where}, exp_avg", moments["exp_avg"], parameters[i])
            check_tensor(f"{where}, exp_avg_sq", moments["exp_avg_sq"], parameters[i])
    except (AttributeError, IndexError, KeyError, TypeError):
        raise BadInput(f"{where} is not that of this model") from None
