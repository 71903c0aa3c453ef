"""The one training script: one process, or several under torchrun.

    python train.py                                    config/tiny.py: minutes on a laptop CPU
    python train.py --max_latent=0 --out=out/vanilla   the same without thoughts
    torchrun --nproc_per_node=8 train.py config/410m.py

What is notable here:
* A batch is a function of (seed, step), and each process takes its slice of it: any number of processes sees the same
  tokens, and a resumed run needs no data state. A run that was killed goes on bit for bit with --resume.
* `budget` is the mean number of latent steps per token to aim for: λ is steered so that training lands there.
* FLOPs are counted by the model as it executes, halted tokens really absent; MFU is against a roof measured at the start.
"""

import contextlib
import json
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from baselines import build
from configurator import BadInput, configure, run
from model import AdaptiveLatentCoT, Config, LLaMA
from prepare import describe, ranks_to_text, restore_tokenizer

FORMAT = "nanoLatentCoT 1"
TINY = Path(__file__).parent / "config" / "tiny.py"


@dataclass
class Train(Config):
    vocab_size: int = 0  # rows of the embedding and of the head; 0: the vocabulary of the data
    data: str = "data/python"  # folder that prepare.py wrote
    out: str = "out/tiny"  # folder of this run: log.jsonl, ckpt.pt and, at the end, summary.json
    resume: bool = False  # go on with the run in out
    seed: int = 1337  # of the weights and of the batches
    max_steps: int = 1000  # optimizer steps
    global_batch_size: int = 16  # sequences in one optimizer step, over all processes
    micro_batch_size: int = 0  # sequences in one forward; 0: all that fall to a process
    learning_rate: float = 1e-3  # peak; cosine to a tenth of it
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    budget: float | None = None  # mean latent steps per token to aim for by steering λ; None: λ stays at lam
    eval_every: int = 100  # steps between evaluations
    eval_windows: int = 128  # windows of validation text, the same for every method and seed
    save_every: int = 100  # steps between checkpoints
    log_every: int = 1  # steps between lines of log.jsonl
    device: str = ""  # cpu, cuda or cuda:N; empty: cuda where there is one
    compile: bool | None = None  # torch.compile each block; None: on CUDA only
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        self.model_config(self.vocab_size or 1)  # its checks
        if self.vocab_size < 0 or self.max_steps < 1 or self.global_batch_size < 1 or self.micro_batch_size < 0:
            raise ValueError("vocab_size and micro_batch_size must be 0 or more, max_steps and global_batch_size 1 or more")
        if min(self.eval_every, self.eval_windows, self.save_every, self.log_every) < 1:
            raise ValueError("eval_every, eval_windows, save_every and log_every must be 1 or more")
        if self.max_latent == 0 or self.method != "adaptive":
            self.budget, self.lam = None, 0.0  # nothing to steer
        if self.budget is not None and not 0 <= self.budget <= self.max_latent:
            raise ValueError(f"budget is {self.budget}, but must lie between 0 and max_latent {self.max_latent}")

    def model_config(self, vocab_size: int) -> Config:
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)} | {"vocab_size": vocab_size})


# ----------------------------------------------------------------------------------------------------- data


class Data:
    """The tokens of a prepared folder. Raises BadInput where the folder is not whole or does not fit the model."""

    def __init__(self, folder: str, block_size: int) -> None:
        self.folder, self.block_size = Path(folder), block_size
        if not self.folder.is_dir():
            raise BadInput(f"{folder} does not exist: run python prepare.py first, or name another folder with --data")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = restore_tokenizer(self.meta["tokenizer"], (self.folder / "ranks.tiktoken").read_bytes())
            self.tokens = {split: self._open(split) for split in ("train", "val")}
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{folder} is not a folder of prepare.py ({error}): remove it and run python prepare.py again") from None

    def _open(self, split: str) -> np.ndarray:
        path, dtype, count = self.folder / f"{split}.bin", np.dtype(self.meta["dtype"]), self.meta[split]["tokens"]
        if path.stat().st_size != count * dtype.itemsize:
            raise BadInput(f"{path} holds {path.stat().st_size:,} bytes, but meta.json says {count * dtype.itemsize:,}: run python prepare.py again")
        if count < self.block_size + 1:
            raise BadInput(f"{path} holds {count:,} tokens, fewer than one window of block_size + 1 = {self.block_size + 1}")
        return np.memmap(path, dtype, "r")

    def _cut(self, split: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        window = self.tokens[split][starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        if window.max() >= self.tokenizer.n_vocab:
            raise BadInput(f"{self.folder}/{split}.bin holds token {window.max()}, beyond the vocabulary {self.tokenizer.n_vocab} of meta.json")
        window = torch.from_numpy(window)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def batch(self, seed: int, step: int, size: int, part: slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets (part, block_size): that part of the `size` windows of this step."""
        starts = np.random.default_rng((seed, step)).integers(0, len(self.tokens["train"]) - self.block_size, size)
        return self._cut("train", starts[part])

    def windows(self, count: int, part: slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of evenly spaced windows of the validation text, or a part of them."""
        return self._cut("val", np.linspace(0, len(self.tokens["val"]) - self.block_size - 1, count).astype(np.int64)[part])


@torch.no_grad()
def evaluate(model: LLaMA, data: Data, windows: int, batch: int, device: torch.device, rank: int = 0, world: int = 1) -> dict:
    """Validation loss (nats per token), perplexity, bits per byte and mean latent steps, on the same windows each time."""
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for i in range(rank * batch, windows, world * batch):
        x, y = (t.to(device) for t in data.windows(windows, slice(i, i + batch)))
        with autocast(device):
            out = model(x, y)
        total += torch.stack((out.ce * y.numel(), out.steps.sum(), torch.tensor(y.numel(), device=device))).double()
    model.train()
    if world > 1:
        dist.all_reduce(total)
    loss, steps = (total[:2] / total[2]).tolist()
    val = data.meta["val"]
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) * val["tokens"] / val["bytes"], "val_steps": steps}


# ---------------------------------------------------------------------------------------------- checkpoints


def write_whole(path: Path, text: str) -> None:
    """Writes text beside path, then renames: never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_checkpoint(path: Path, model: LLaMA, tokenizer, **rest) -> None:
    """Writes the model, its tokenizer and `rest` (plain values and tensors) beside path, then renames: never half a file."""
    ranks = torch.frombuffer(bytearray(ranks_to_text(tokenizer)), dtype=torch.uint8)
    state = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "tokenizer": describe(tokenizer), "ranks": ranks}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state | rest, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu"):
    """path: a run's folder or a file → model (in eval mode), tokenizer, checkpoint (a dict).

    Runs no code that the file may hold (weights_only). Raises BadInput for a file that is missing, corrupt or not ours.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path} does not exist; want the folder of a run of train.py, or its ckpt.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} is corrupt or no checkpoint: {' '.join(str(error).split())[:120] or type(error).__name__}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise BadInput(f"{path} was not written by this project's train.py (format {FORMAT!r})")
    try:
        model = build(Config(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        tokenizer = restore_tokenizer(checkpoint["tokenizer"], bytes(checkpoint["ranks"].cpu().numpy()))
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} does not fit the model that it describes: {' '.join(str(error).split())[:160]}") from None
    return model.eval(), tokenizer, checkpoint


# ------------------------------------------------------------------------------------------------- training


class BudgetController:
    """Steers λ so that the mean of executed latent steps lands on the budget: proportional + integral, damped.

    The aim falls from ℓ_max to the budget over the first half of training, so that λ rises from 0 and every step is learnt
    before any is pruned. e = (mean + trend) / aim − 1, within ±1, where mean is a running mean (0.9) of the executed steps and
    trend how far it has moved from a slow one; λ = kp · e + I, I += ki · e / max_steps, both at least 0. The trend is what damps: a
    step that was pruned gives its router no more gradient, so that too much pruning is slow to undo. All times but the running
    mean's are shares of the training, in `router_rate` too, so that the loop is much the same for every length.
    """

    kp, ki = 0.3, 6.0

    def __init__(self, budget: float, most: int, max_steps: int) -> None:
        self.budget, self.most, self.max_steps = budget, most, max_steps
        self.mean, self.slow, self.integral = float(most), float(most), 0.0

    def update(self, step: int, steps: float) -> float:
        """Mean executed latent steps of optimizer step `step` → λ of the next."""
        self.mean += 0.1 * (steps - self.mean)
        self.slow += (self.mean - self.slow) / max(10, 0.08 * self.max_steps)
        aim = self.budget + (self.most - self.budget) * max(0.0, 1 - step / (0.5 * self.max_steps))
        error = max(-1.0, min(1.0, (2 * self.mean - self.slow) / max(aim, 0.01) - 1))
        self.integral = max(0.0, self.integral + self.ki / self.max_steps * error)
        return max(0.0, self.kp * error + self.integral)


def learning_rate(config: Train, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    rise = max(1, round(config.warmup * config.max_steps))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(1, config.max_steps - rise)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def router_rate(config: Train) -> float:
    """Steady, and slow enough to steer: Adam moves a logit over d features by d times the learning rate."""
    return 40 / (config.n_embd * config.max_steps)


def make_optimizer(model: LLaMA, config: Train) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    router = [named.pop(name) for name in list(named) if name == "router.weight" and isinstance(model, AdaptiveLatentCoT)]
    matrices = [p for p in named.values() if p.dim() >= 2]
    rest = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if router:
        groups.append({"params": router, "weight_decay": 0.0, "lr": router_rate(config)})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def training_flops(model: LLaMA) -> float:
    """FLOPs of forward and backward so far: a matrix product's backward is two of its kind, fused attention's is 2.5."""
    return 3.0 * model.matmul_flops + 3.5 * model.attention_flops


def autocast(device: torch.device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def measure_roof(device: torch.device) -> float:
    """FLOP/s of a large matrix product, in the precision that training uses: what MFU is a share of."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a --device flag names; empty: cuda where there is one. Raises BadInput."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device={name} cannot be used here; want cpu{', cuda' if torch.cuda.is_available() else ''}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """What a --compile flag means on this device; None: on CUDA only. Raises BadInput where there is no C++ compiler."""
    wanted = device.type == "cuda" if wanted is None else wanted
    if wanted:
        from torch._inductor.cpp_builder import get_cpp_compiler
        try:
            get_cpp_compiler()
        except RuntimeError:
            raise BadInput("--compile needs a C++ compiler: install one, such as g++, or give --compile=False") from None
    return wanted


def check_resumed(config: Train, checkpoint: dict, data: Data) -> None:
    """A resumed run must be the run that it was; what does not change its numbers may differ, and so may its length."""
    free = {"out", "resume", "data", "max_steps", "micro_batch_size", "eval_every", "save_every", "log_every", "device", "compile", "checkpointing"}
    for name, old in checkpoint["train"].items():
        if name not in free and getattr(config, name) != old:
            raise BadInput(f"{config.out} was trained with {name}={old}, not {getattr(config, name)}: resume it as it was, or choose another --out")
    if checkpoint["tokenizer"] != describe(data.tokenizer):
        raise BadInput(f"{config.out} was trained with another tokenizer than that of {config.data}")


def train(config: Train) -> dict:
    """Trains, and returns the summary. Raises BadInput before anything is written."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    main_process, out = rank == 0, Path(config.out)
    if config.global_batch_size % world:
        raise BadInput(f"global_batch_size {config.global_batch_size} does not divide among {world} processes")
    share = config.global_batch_size // world
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise BadInput(f"the {share} sequences of a process (global_batch_size {config.global_batch_size} / {world}) do not divide into micro_batch_size {micro}")
    data = Data(config.data, config.block_size)
    if config.vocab_size and config.vocab_size < data.tokenizer.n_vocab:
        raise BadInput(f"vocab_size is {config.vocab_size}, but {config.data} has a vocabulary of {data.tokenizer.n_vocab}")
    path = out / "ckpt.pt"
    if (path.exists() or (out / "log.jsonl").exists()) and not config.resume:
        raise BadInput(f"{out} holds a run already: continue it with --resume, or choose another --out")

    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        model = build(config.model_config(config.vocab_size or data.tokenizer.n_vocab)).to(device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    optimizer, start, tokens, seconds = make_optimizer(model, config), 0, 0, 0.0
    controller = None if config.budget is None else BudgetController(config.budget, config.max_latent, config.max_steps)
    if config.resume and path.exists():
        saved, _, checkpoint = load_checkpoint(path)
        check_resumed(config, checkpoint, data)
        model.load_state_dict(saved.state_dict())
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, tokens, seconds, model.lam = (checkpoint[name] for name in ("step", "tokens", "seconds", "lam"))
        model.matmul_flops, model.attention_flops = checkpoint["flops"]
        if controller:
            controller.mean, controller.slow, controller.integral = checkpoint["controller"]
        del saved, checkpoint  # as large as the model and its optimizer
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model.checkpointing = config.checkpointing
    if compiles(config.compile, device):
        for block in model.blocks:
            block.compile()
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False) if world > 1 else model
    roof = measure_roof(device) * world
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        _keep_log_until(out / "log.jsonl", start)
        n = sum(p.numel() for p in model.parameters())
        print(f"{config.method}: {n / 1e6:.2f}M parameters on {device.type} × {world}, {config.global_batch_size} × {config.block_size} tokens a step, "
              f"{share // micro} forward(s) of {micro} per process; matrix roof {roof / 1e12:.2f} TFLOP/s")
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))

    def save(step: int) -> None:
        if main_process:
            save_checkpoint(path, model, data.tokenizer, train=asdict(config), optimizer=optimizer.state_dict(), step=step, tokens=tokens, seconds=seconds,
                            lam=model.lam, flops=(model.matmul_flops, model.attention_flops), controller=(controller.mean, controller.slow, controller.integral) if controller else None)

    def log(record: dict) -> None:
        if main_process:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def evaluated() -> dict:
        flops = model.matmul_flops, model.attention_flops
        with torch.random.fork_rng(devices=[]):
            result = evaluate(model, data, config.eval_windows, micro, device, rank, world)
        model.matmul_flops, model.attention_flops = flops  # training's FLOPs only
        return result

    bar = tqdm(range(start, config.max_steps), initial=start, total=config.max_steps, unit="step", dynamic_ncols=True, disable=not (main_process and sys.stderr.isatty()))
    result = {}
    for step in bar:
        began = time.perf_counter()
        torch.manual_seed(config.seed + 1_000_003 * (step + 1))  # a method that draws (ponder2) draws the same after a resume
        rate = learning_rate(config, step)
        for group, group_rate in zip(optimizer.param_groups, (rate, rate, router_rate(config))):
            group["lr"] = group_rate
        flops, lam = training_flops(model), model.lam
        metrics = torch.zeros(4 + model.max_latent, device=device)  # loss, ce, ada, stop, share of tokens that reached step 1 …
        for i in range(rank * share, (rank + 1) * share, micro):
            x, y = (t.to(device, non_blocking=True) for t in data.batch(config.seed, step, config.global_batch_size, slice(i, i + micro)))
            last = i + micro == (rank + 1) * share
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast(device):
                    o = wrapped(x, y)
                (o.loss * micro / share).backward()
            reached = [(o.steps >= k).float().mean() for k in range(1, model.max_latent + 1)]
            metrics += torch.stack([o.loss.detach(), o.ce.detach(), o.ada.detach(), metrics.new_zeros(()), *reached]) * micro / share
        if stop:
            metrics[3] = 1
        if world > 1:
            dist.all_reduce(metrics, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
            metrics /= 1 if device.type == "cuda" else world
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        loss, ce, ada, stopping, *reached, norm = [*metrics.tolist(), norm.item()]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = f"the last good checkpoint is {path} at step {_saved_step(path)}" if path.exists() else "no checkpoint had been written yet"
            sys.exit(f"train.py: loss {loss}, gradient norm {norm} at step {step + 1}; {good}; a lower --learning_rate may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if controller:
            model.lam = controller.update(step, sum(reached))
        took = time.perf_counter() - began
        tokens, seconds = tokens + config.global_batch_size * config.block_size, seconds + took
        speed, mfu = config.global_batch_size * config.block_size / took, (training_flops(model) - flops) * world / took / roof
        done = step + 1
        if done % config.log_every == 0 or done == config.max_steps:
            log({"step": done, "tokens": tokens, "loss": loss, "ce": ce, "ada": ada, "lam": lam, "latent_steps": sum(reached), "reached": reached, "grad_norm": norm,
                 "lr": rate, "tokens_per_second": speed, "flops": training_flops(model) * world, "mfu": mfu})
        bar.set_postfix_str(f"loss {loss:.3f}, latent {sum(reached):.2f}, {speed:,.0f} tok/s", refresh=False)
        if done % config.eval_every == 0 or done == config.max_steps:
            result = evaluated()
            log({"step": done, **result})
            if main_process:
                tqdm.write(f"step {done:>6}  train {loss:.4f}  val {result['val_loss']:.4f}  latent steps {result['val_steps']:.2f}  λ {lam:.4f}  {speed:,.0f} tok/s", file=sys.stdout)
        if done % config.save_every == 0 or done == config.max_steps or stopping:
            save(done)
        if stopping and done < config.max_steps:
            bar.close()
            if main_process:
                print(f"stopped after step {done}, saved to {path}; go on with --resume")
            return {}
    result = result or evaluated()
    result |= {"flops": training_flops(model) * world, "tokens": tokens, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    if main_process:
        write_whole(out / "summary.json", json.dumps({"config": asdict(config), **result}, indent=1) + "\n")
        print(f"\nvalidation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits per byte\n"
              f"mean latent steps {result['val_steps']:.3f} of {config.max_latent}; {tokens:,} tokens, {result['flops']:.3e} training FLOPs, {seconds / 60:.1f} minutes\n"
              f"next: python sample.py {out} \"def \"")
    return result


def _saved_step(path: Path) -> int:
    return torch.load(path, map_location="cpu", weights_only=True)["step"]


def _keep_log_until(path: Path, step: int) -> None:
    """Drops the lines that a killed run wrote after its last checkpoint."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in lines))


def main() -> None:
    config = configure(Train, default=TINY)
    try:
        train(config)
    except torch.OutOfMemoryError:
        raise BadInput(f"the GPU's memory is too small for --micro_batch_size={config.micro_batch_size} (0: all that fall to a process); "
                       "a lower one or --checkpointing takes less and changes no number, also with --resume") from None
    if dist.is_initialized():  # not in train: DDP must be gone first, or its destructor waits for gloo's thread, which waits for the GIL
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
