"""What a thought costs and what it buys: every method side by side, in one run, by one script.

    python bench.py flops                      counted on the executed graph, and by formula
    python bench.py flops config/410m.py       by formula alone: too big to execute here
    python bench.py speed                      training, prefill and decoding; time ratio against FLOP ratio
    python bench.py growth                     time per token against the context, and against ℓ_max
    python bench.py quality config/micro.py --seeds=3 --jobs=2 --plot

What is notable here:
* FLOPs are counted, not assumed: halted tokens are absent from what torch.utils.flop_counter sees. The closed formula is in
  the docstring of `formula`, and a test holds the two equal.
* Speed alternates the methods round by round, in another order each time, and quotes medians, so that a machine that drifts
  favours nobody. MFU is against the roof that the same run measured with a large matrix product.
* Quality trains every method on the same batches from the same seeds. Finished runs are read back from results/.
"""

import contextlib
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from baselines import METHODS, build
from configurator import BadInput, configure, run
from model import FAR, AdaptiveLatentCoT, Cache, Config, LLaMA
from train import TINY, Train, autocast, compiles, load_checkpoint, make_optimizer, measure_roof, pick_device, train, training_flops, write_whole


@dataclass
class Bench(Train):
    what: str = ""  # flops, speed, growth or quality
    methods: list[str] = field(default_factory=lambda: list(METHODS))  # which of the methods
    checkpoint: str = ""  # flops: take the mean latent steps of this trained model
    mean_latent: float = 1.5  # flops, speed: mean latent steps that adaptive is forced to where no checkpoint is given
    batch: int = 0  # flops, speed: sequences at once; 0: 4 on CPU, 8 on CUDA
    rounds: int = 7  # speed, growth: rounds, each of which times every method once
    contexts: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])  # growth: context lengths
    seeds: int = 1  # quality: runs of each, from seed, seed + 1, …
    parts: list[str] = field(default_factory=lambda: ["rates", "tokens", "flops", "pareto"])  # quality: which of its tables
    rates: list[float] = field(default_factory=lambda: [3e-3, 6e-3, 1.2e-2])  # quality: learning rates, of which each method gets its best
    budgets: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])  # quality: budgets of adaptive in the Pareto table
    jobs: int = 1  # quality: runs at once, which share the cores
    plot: bool = False  # quality: also draw loss against FLOPs, as SVG and PNG (matplotlib)
    results: str = "results"  # folder for the JSON

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "adaptive":
            raise ValueError(f"--method={self.method} is not read here; name the methods to measure with --methods")
        if self.what not in ("flops", "speed", "growth", "quality"):
            raise ValueError(f"what to measure is {self.what!r}, but must be flops, speed, growth or quality")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods holds {name!r}, but must hold some of {', '.join(METHODS)}")
        if not 0 <= self.mean_latent <= self.max_latent:
            raise ValueError(f"mean_latent is {self.mean_latent}, but must lie between 0 and max_latent {self.max_latent}")
        if not set(self.parts) <= {"rates", "tokens", "flops", "pareto"} or min(self.seeds, self.jobs, self.rounds) < 1:
            raise ValueError("parts must be among rates, tokens, flops and pareto; seeds, jobs and rounds at least 1")


def about() -> dict:
    """Machine, versions and commit that a result belongs to."""
    git = lambda *what: subprocess.run(["git", *what], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|", *map(line, rows)])


# ---------------------------------------------------------------------------------------------------- forced routers


def going_on(mean: float, most: int) -> float:
    """q with q + q² + … + q^most = mean: each step is gone on from with this probability."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if sum(q**k for k in range(1, most + 1)) < mean else (low, q)
    return high


class ForcedRouter(nn.Module):
    """Lets a share q of the tokens of each pass go on, drawn at random, whatever they are: to measure cost at a known mean."""

    def __init__(self, router: nn.Linear, q: float) -> None:
        super().__init__()
        self.router, self.q, self.random = router, q, random.Random(0)
        self.generator = torch.Generator(router.weight.device).manual_seed(0)

    def forward(self, h: Tensor) -> Tensor:
        count = math.floor(self.q * len(h) + self.random.random())  # right on average, also for one token
        chosen = torch.randperm(len(h), generator=self.generator, device=h.device) < count
        return (60.0 * chosen - 30.0)[:, None].add(self.router(h), alpha=0)


def make(config: Config, device: torch.device | str, mean_latent: float | None = None) -> LLaMA:
    """A model of config.method; adaptive is forced to mean_latent steps, unless that is None."""
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = build(config)
    except ValueError as error:
        raise BadInput(f"{config.method}: {error}") from None
    if isinstance(model, AdaptiveLatentCoT) and mean_latent is not None:
        model.router = ForcedRouter(model.router, going_on(mean_latent, config.max_latent))
    return model


# ------------------------------------------------------------------------------------------------------------- FLOPs


def formula(config: Config, B: int, T: int, reached: list[tuple[int, int]], rounds: int = 2) -> tuple[int, int]:
    """Forward FLOPs of B rows of T tokens from an empty cache, (matrix products, attention); 2 per multiply-add.

    With d width, f SwiGLU width, L blocks, V vocabulary, N = B · T, a pass of n tokens whose longest row has A, over S keys a row:

        block(n, L) = 2 n L (4 d² + 3 d f)        attention(A, S, L) = 4 B A S d L        head(n) = 2 n d V

    vanilla   block(N, L) + head(N);  attention(T, T, L)
    adaptive  Σ_k block(n_k, L) + 2 n_k d (router) + head(N);  Σ_k attention(A_k, Σ_{j≤k} A_j, L), over the (n_k, A_k) in `reached`
    loop      K + 1 times vanilla's block and attention, one head
    pause     block((K + 1) N, L) + head(N);  attention((K + 1) T, (K + 1) T, L)
    ponder    as loop, with K more heads and K products with the embedding table, as costly as a head
    ponder2   passes of 1 … K columns, `rounds` Jacobi rounds and the last pass of K + 1: Σ block(c N, L), attention(c T, c T, L)
    mor       block(N, 2) + 2 N d (K + 1) (router) + Σ_r block(n_r, L − 2) + head(N);  the same with attention(A_r, A_r, L − 2)

    Attention counts the whole A × S rectangle, as torch's counter does, though a causal kernel skips half of it. Training costs
    3 × the products and 3.5 × attention (its fused backward recomputes the scores). Left out: everything that is no product.
    """
    c, K, N = config, config.max_latent, B * T
    block = lambda n, layers=c.n_layer: 2 * n * layers * (4 * c.n_embd**2 + 3 * c.n_embd * c.n_ff)
    attention = lambda A, S, layers=c.n_layer: 4 * B * A * S * c.n_embd * layers
    head = 2 * N * c.n_embd * c.vocab_size
    if c.method == "vanilla":
        return block(N) + head, attention(T, T)
    if c.method == "adaptive":
        keys = [sum(A for _, A in reached[: k + 1]) for k in range(len(reached))]
        return sum(block(n) + 2 * n * c.n_embd for n, _ in reached) + head, sum(attention(A, S) for (_, A), S in zip(reached, keys))
    if c.method == "loop":
        return (K + 1) * block(N) + head, (K + 1) * attention(T, T)
    if c.method == "pause":
        return block((K + 1) * N) + head, attention((K + 1) * T, (K + 1) * T)
    if c.method == "ponder":
        return (K + 1) * block(N) + (1 + 2 * K) * head, (K + 1) * attention(T, T)
    if c.method == "ponder2":
        columns = [*range(1, K + 1), *[K + 1] * (rounds if K else 0), K + 1]
        return sum(block(n * N) for n in columns) + head, sum(attention(n * T, n * T) for n in columns)
    outer, inner = block(N, 2) + 2 * N * c.n_embd * (K + 1), sum(block(n, c.n_layer - 2) for n, _ in reached)
    return outer + inner + head, attention(T, T, 2) + sum(attention(A, A, c.n_layer - 2) for _, A in reached)


def reached_of(model: LLaMA, cache: Cache) -> list[tuple[int, int]]:
    """The (tokens, longest row) of each pass that filled a cache: latent steps of adaptive, recursions of mor."""
    columns = cache.columns[1:-1] if model.config.method == "mor" else cache.columns
    return [(int((column.order < FAR).sum()), column.size) for column in columns if column.size]


def counted(model: LLaMA, idx: Tensor, targets: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """FLOPs of forward and backward as torch.utils.flop_counter sees them executed, and the passes behind them."""
    aten = torch.ops.aten
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
           aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}
    cache = Cache()
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        model(idx, targets, cache).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops(), reached_of(model, cache)


def expected_passes(config: Config, T: int, B: int, mean_latent: float) -> list[tuple[int, int]]:
    """What `reached` would be at a mean of latent steps, without executing anything; rows are taken as equally long."""
    if config.method == "mor":
        return [(round(B * T * (config.max_latent + 1 - r) / (config.max_latent + 1)), round(T * (config.max_latent + 1 - r) / (config.max_latent + 1)))
                for r in range(config.max_latent + 1)]  # balanced: as many tokens at every depth
    q = going_on(mean_latent, config.max_latent)
    return [(round(B * T * q**k), round(T * q**k)) for k in range(config.max_latent + 1) if round(T * q**k)]


def bench_flops(bench: Bench) -> None:
    if bench.checkpoint:
        model, _, _ = load_checkpoint(bench.checkpoint)
        if model.config.method != "adaptive":
            raise BadInput(f"{bench.checkpoint} is a model of method {model.config.method}; its latent steps are wanted, and so an adaptive one")
        log = (Path(bench.checkpoint) if Path(bench.checkpoint).is_dir() else Path(bench.checkpoint).parent) / "log.jsonl"
        steps = [json.loads(line)["val_steps"] for line in (log.read_text().splitlines() if log.exists() else []) if "val_steps" in line]
        if not steps:
            raise BadInput(f"{log} holds no evaluation, and so no mean of latent steps")
        bench = replace(bench, mean_latent=steps[-1], **{f.name: getattr(model.config, f.name) for f in fields(Config)})
    mean, vocab_size = bench.mean_latent, bench.vocab_size or 257
    B, T, records = bench.batch or 4, bench.block_size, {}
    small = bench.n_layer * bench.n_embd**2 < 4e6
    for name in bench.methods:
        config = replace(bench.model_config(vocab_size), method=name, max_latent=1 if name == "ponder2" else bench.max_latent)
        parameters = sum(p.numel() for p in make(config, "meta").parameters())
        record, reached = {"parameters": parameters}, expected_passes(config, T, B, mean)
        if small:
            model = make(config, "cpu", mean).eval()  # in eval mode ponder2 takes 3 rounds
            idx, targets = (torch.randint(0, vocab_size, (B, T)) for _ in range(2))
            total, reached = counted(model, idx, targets)
            matmul, attention = formula(config, B, T, reached, 3)
            record |= {"counted": total / B / T, "counted_equals_formula": total == 3 * matmul + 3.5 * attention}
        matmul, attention = ((two + three) / 2 for two, three in zip(formula(config, B, T, reached, 2), formula(config, B, T, reached, 3)))  # ponder2 draws
        blocks = config.n_layer * (4 * config.n_embd**2 + 3 * config.n_embd * config.n_ff)
        passes = (matmul - formula(replace(config, method="vanilla"), B, T, [])[0]) / (2 * B * T * blocks) + 1
        one_token = sum(formula(replace(config, method="pause"), B, T, [])) if name == "ponder2" else matmul + attention  # ponder2 decodes without Jacobi
        record |= {"training": (3 * matmul + 3.5 * attention) / B / T, "prefill": sum(formula(config, B, T, reached, 3)) / B / T, "passes": passes,
                   "decode": one_token / B / T, "estimate": 6 * parameters * passes}
        records[name] = record
    vanilla = records.get("vanilla", {}).get("training")
    print(table(["method", "parameters", "passes", "training / token", "× vanilla", "counted = formula", "6 N passes", "prefill / token", "decode / token"],
                [[name, f"{r['parameters']:,}", f"{r['passes']:.2f}", f"{r['training']:.4g}", f"{r['training'] / vanilla:.2f}" if vanilla else "",
                  {True: "yes", False: "NO"}.get(r.get("counted_equals_formula"), "by formula"), f"{r['estimate']:.4g}", f"{r['prefill']:.4g}", f"{r['decode']:.4g}"]
                 for name, r in records.items()]))
    print(f"\nFLOPs per token at context {T}; adaptive at {mean:.2f} mean latent steps; decode: one token at a full context"
          + ("" if small else "; this shape is too big to execute here: all by formula, shapes on the meta device"))
    write_json(Path(bench.results) / f"flops-{bench.n_layer}x{bench.n_embd}.json", about() | {"mean_latent": mean, "context": T, "methods": records})


# ------------------------------------------------------------------------------------------------------------- speed


def timed(f, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept_bytes(model: LLaMA, idx: Tensor, targets: Tensor) -> int:
    """Bytes that a forward keeps for its backward, weights included: the larger part of the peak, and the same on every device."""
    storages = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(idx, targets).loss
    total = sum(storages.values())
    del loss  # until here it kept them all alive, so that no address came twice
    return total


def measure_copy(device: torch.device) -> float:
    """Bytes/s that the copy of a large tensor reads and writes: what bounds decoding at batch 1."""
    a = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device) for _ in range(8))


class Contestant:
    """One method, ready to be timed: a training step, a prefill, decoding at two batch sizes.

    `twin` has the same config and lends its model and optimizer, as not all of a large shape would fit on a GPU.
    """

    def __init__(self, bench: Bench, config: Config, mean: float | None, B: int, device: torch.device, twin: "Contestant | None" = None) -> None:
        self.device, self.config = device, config
        self.share = None if mean is None else going_on(mean, config.max_latent)
        if twin:
            self.model, self.decoder, self.optimizer = twin.model, twin.decoder, twin.optimizer
        else:
            self.model, self.decoder = make(config, device, mean), make(config, device, mean)
            self.decoder.for_decoding()
            self.optimizer = make_optimizer(self.model, bench)
            if compiles(bench.compile, device):
                for block in (*self.model.blocks, *self.decoder.blocks):
                    block.compile()
                self.decoder.compile_decoding()
                torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024  # contestants share code, but not their graphs
        self.idx, self.targets = (torch.randint(0, config.vocab_size, (B, config.block_size), device=device) for _ in range(2))
        self.times: dict[str, list[float]] = {"training": [], "prefill": [], "decode 1": [], "decode 16": []}
        self.training_flops: list[float] = []  # of each round, per token: ponder2 draws its rounds
        self.bandwidth: list[float] = []  # of each round, bytes/s
        self.memory = 0

    def ready(self, model: LLaMA) -> LLaMA:
        """The model with this contestant's share in its router, which twins have in common."""
        if self.share is not None:
            model.router.q = self.share
        return model

    def training(self) -> None:
        self.ready(self.model).train()
        with autocast(self.device):
            loss = self.model(self.idx, self.targets).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self) -> None:
        self.ready(self.decoder).eval()
        with autocast(self.device):
            self.decoder.hidden(self.idx, Cache())

    @torch.no_grad()
    def decode(self, B: int, new: int) -> None:
        """Time of `new` tokens after a prompt of half the context, the prompt not counted."""
        model = self.ready(self.decoder).eval()
        prompt = self.idx[:1, : self.config.block_size // 2].expand(B, -1)
        with autocast(self.device):
            stream = model.generate(prompt, new + 1, temperature=0)
            next(stream)
            before = model.matmul_flops + model.attention_flops
            took = timed(lambda: list(stream), self.device)
        self.times[f"decode {B}"].append(took / new / B)
        if B == 1:  # a weight, key or value is read for each multiply-add; by pause for those of all its tokens
            together = self.config.max_latent + 1 if self.config.method == "pause" else 1
            read = (model.matmul_flops + model.attention_flops - before) / 2 / together * model.head.weight.itemsize
            self.bandwidth.append(read / took)

    def round(self, new: int) -> None:
        before, cuda = training_flops(self.model), self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - 3 * sum(p.nbytes for p in self.model.parameters())  # weights, and two moments in AdamW, are its own
        self.times["training"].append(timed(self.training, self.device) / self.idx.numel())
        self.training_flops.append((training_flops(self.model) - before) / self.idx.numel())
        self.memory = torch.cuda.max_memory_allocated() - others if cuda else self.memory or kept_bytes(self.model, self.idx, self.targets)
        self.times["prefill"].append(timed(self.prefill, self.device) / self.idx.numel())
        for B in (1, 16):
            self.decode(B, new)


def bench_speed(bench: Bench) -> None:
    device, info = pick_device(bench.device), about()
    vocab_size, B = bench.vocab_size or 257, bench.batch or (8 if device.type == "cuda" else 4)
    base, new = bench.model_config(vocab_size), min(32, bench.block_size // 2 - 1)
    plan: dict[str, tuple[Config, float | None]] = {}
    for name in bench.methods:
        config = replace(base, method=name, max_latent=1 if name == "ponder2" else base.max_latent)
        if name == "adaptive":
            means = sorted({m for m in (0, 0.5, 1, 1.5, 2, 3) if m <= base.max_latent} | {bench.mean_latent})
            plan |= {f"adaptive, {m:g} steps": (config, m) for m in means}
        else:
            plan[name] = (config, None)
    contestants: dict[str, Contestant] = {}
    for name, (config, mean) in plan.items():
        twin = next((c for c in contestants.values() if c.config == config), None)
        contestants[name] = Contestant(bench, config, mean, B, device, twin)
    for contestant in tqdm(contestants.values(), desc="warming up", disable=not sys.stderr.isatty()):
        contestant.round(new)
        contestant.times, contestant.training_flops, contestant.bandwidth = {key: [] for key in contestant.times}, [], []
    roof, copy = measure_roof(device), measure_copy(device)
    for i in tqdm(range(bench.rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for contestant in random.Random(i).sample(list(contestants.values()), len(contestants)):  # who follows the roof, or a long one, should change
            contestant.round(new)
        roof, copy = max(roof, measure_roof(device)), max(copy, measure_copy(device))
    records = {}
    for name, c in contestants.items():
        middle = {key: statistics.median(times) for key, times in c.times.items()}
        spread = {key: (max(times) - min(times)) / middle[key] for key, times in c.times.items()}
        per_second = [flops / t for flops, t in zip(c.training_flops, c.times["training"])]
        records[name] = {"tokens_per_second": {key: 1 / t for key, t in middle.items()}, "spread": spread, "training_flops_per_token": statistics.median(c.training_flops),
                         "mfu": statistics.median(per_second) / roof, "bandwidth": statistics.median(c.bandwidth) / copy, "memory": c.memory}
    reference = records.get("vanilla") or next(iter(records.values()))
    for r in records.values():
        r["time_ratio"] = reference["tokens_per_second"]["training"] / r["tokens_per_second"]["training"]
        r["flop_ratio"] = r["training_flops_per_token"] / reference["training_flops_per_token"]
    print(table(["method", "training tok/s", "± spread", "time ratio", "FLOP ratio", "time / FLOPs", "MFU",
                 "prefill tok/s", "decode tok/s, batch 1", "of bandwidth", "batch 16", "peak MiB" if device.type == "cuda" else "kept MiB"],
                [[name, f"{r['tokens_per_second']['training']:,.0f}", f"{r['spread']['training']:.0%}", f"{r['time_ratio']:.2f}", f"{r['flop_ratio']:.2f}",
                  f"{r['time_ratio'] / r['flop_ratio']:.2f}", f"{r['mfu']:.0%}", *(f"{r['tokens_per_second'][k]:,.0f}" for k in ("prefill", "decode 1")), f"{r['bandwidth']:.0%}", f"{r['tokens_per_second']['decode 16']:,.0f}",
                  f"{r['memory'] / 2**20:,.0f}"] for name, r in records.items()]))
    print(f"\n{info['machine']}, torch {info['torch']}; {B} × {base.block_size} tokens, medians of {bench.rounds} alternating rounds; roof {roof / 1e12:.3f} TFLOP/s, "
          f"copy {copy / 1e9:.1f} GB/s; "
          "adaptive is forced to a mean of latent steps; decoding starts at half the context; kept: what a forward keeps for its backward, weights included")
    kind = device.type + ("-compiled" if compiles(bench.compile, device) else "")
    write_json(Path(bench.results) / f"speed-{kind}-{base.n_layer}x{base.n_embd}.json", info | {"roof": roof, "copy": copy, "batch": B, "context": base.block_size, "methods": records})


def bench_growth(bench: Bench) -> None:
    """Prefill and decoding, batch 1, at a mean of one latent step: against the context, and against ℓ_max at the config's own context."""
    device, info = pick_device(bench.device), about()
    base = replace(bench.model_config(bench.vocab_size or 257), method="adaptive")
    plan = {f"context {c}": (replace(base, block_size=c), 1.0) for c in bench.contexts}
    plan |= {f"context {c}, vanilla": (replace(base, block_size=c, method="vanilla"), None) for c in bench.contexts}
    plan |= {f"ℓ_max {k}": (replace(base, max_latent=k), min(1.0, k)) for k in (0, 1, 2, 3, 4, 6, 8)}
    contestants = {name: Contestant(bench, config, mean, 1, device) for name, (config, mean) in plan.items()}
    for i in tqdm(range(bench.rounds + 1), desc="rounds, the first to warm up", disable=not sys.stderr.isatty()):
        for c in contestants.values():
            if i == 1:
                c.times = {key: [] for key in c.times}
            c.times["prefill"].append(timed(c.prefill, device) / c.idx.numel())
            c.decode(1, min(32, c.config.block_size // 2 - 1))
    micro = {name: {key: 1e6 * statistics.median(c.times[key]) for key in ("prefill", "decode 1")} for name, c in contestants.items()}
    row = lambda name: [f"{micro[name][key]:,.0f}" for key in ("prefill", "decode 1")]
    against = lambda name, other: [f"{micro[name][key] / micro[other][key]:.2f}" for key in ("prefill", "decode 1")]
    print("Microseconds per token at a mean of one latent step:")
    print(table(["context", "prefill", "decode", "vanilla: prefill", "decode", "ratio: prefill", "decode"],
                [[str(c), *row(f"context {c}"), *row(f"context {c}, vanilla"), *against(f"context {c}", f"context {c}, vanilla")] for c in bench.contexts]))
    print("\n" + table(["ℓ_max", "prefill", "decode"], [[name.split()[1], *row(name)] for name in plan if name.startswith("ℓ_max")]))
    write_json(Path(bench.results) / f"growth-{device.type}-{base.n_layer}x{base.n_embd}.json", info | {"microseconds_per_token": micro})


# ----------------------------------------------------------------------------------------------------------- quality


def one_run(settings: dict, threads: int, folder: str) -> dict:
    """Trains one run and returns its summary, with its curve: (step, FLOPs, validation loss)."""
    torch.set_num_threads(threads)
    with contextlib.redirect_stdout(None):
        result = train(Train(**settings | {"out": folder, "resume": True}))
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    flops = {line["step"]: line["flops"] for line in lines if "flops" in line}
    curve = [(line["step"], flops[line["step"]], line["val_loss"]) for line in lines if "val_loss" in line]
    train_steps = [line["latent_steps"] for line in lines if "latent_steps" in line]
    return result | {"curve": curve, "train_steps": statistics.mean(train_steps)}


def mean_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


class Quality:
    """The runs that the tables need, made or read back. A run's name tells all that sets it apart from the base config."""

    def __init__(self, bench: Bench) -> None:
        self.about = about()  # now, as the commit may be another when a run ends
        self.bench, self.path = bench, Path(bench.results) / f"quality-{bench.n_layer}x{bench.n_embd}-{bench.max_steps}.json"
        self.base = {f.name: getattr(bench, f.name) for f in fields(Train)}
        self.base |= {"eval_every": max(1, bench.max_steps // 10), "save_every": bench.max_steps, "log_every": 1, "resume": False}
        stored = json.loads(self.path.read_text()) if self.path.exists() else {"settings": self._settings(), "runs": {}}
        if stored["settings"] != self._settings():
            raise BadInput(f"{self.path} holds runs of other settings: remove it, or name another folder with --results")
        self.runs = stored["runs"]

    def _settings(self) -> dict:
        return {k: v for k, v in self.base.items() if k not in ("out", "device", "compile", "seed", "method", "resume")}

    def make(self, wanted: dict[str, dict], seeds: int) -> None:
        """Makes the runs that are not there yet: name → settings that differ from the base; each for every seed."""
        missing = {f"{name}, seed {seed}": settings | {"seed": seed} for name, settings in wanted.items()
                   for seed in range(self.bench.seed, self.bench.seed + seeds) if f"{name}, seed {seed}" not in self.runs}
        bar = tqdm(total=len(missing), desc="runs", disable=not missing or not sys.stderr.isatty())
        for name, result in self._results(missing):
            if not result:
                raise BadInput("interrupted; the same command goes on from here")
            self.runs[name] = result | missing[name] | self.about
            write_json(self.path, {"settings": self._settings(), "runs": self.runs})
            tqdm.write(f"{name}: validation loss {result['val_loss']:.4f}", file=sys.stdout)
            bar.update()

    def _results(self, missing: dict[str, dict]) -> Iterator[tuple[str, dict]]:
        """The missing runs as they finish: in this process, or `jobs` at a time in others."""
        jobs, threads = self.bench.jobs, torch.get_num_threads()
        tasks = {name: (self.base | settings, max(1, threads // jobs), f"{self.bench.out}-quality-{self.bench.max_steps}/{name.replace(', ', '-').replace(' ', '')}")
                 for name, settings in missing.items()}
        if jobs == 1:
            yield from ((name, one_run(*task)) for name, task in tasks.items())
            return
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            running = {pool.submit(one_run, *task): name for name, task in tasks.items()}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            finally:  # after an interruption or a run that diverged no other is begun
                pool.shutdown(cancel_futures=True)

    def of(self, name: str) -> list[dict]:
        seeds = range(self.bench.seed, self.bench.seed + self.bench.seeds)
        return [self.runs[f"{name}, seed {seed}"] for seed in seeds if f"{name}, seed {seed}" in self.runs]

    def show(self, title: str, names: list[str], seeds: int | None = None) -> None:
        rows = []
        for name in names:
            runs = self.of(name)[:seeds]
            mean = lambda key: statistics.mean(r[key] for r in runs)
            rows.append([name, f"{mean('tokens'):,.0f}", f"{mean('flops'):.3e}", f"{mean('train_steps'):.2f}", f"{mean('val_steps'):.2f}",
                         mean_std([r["val_loss"] for r in runs]), f"{mean('bits_per_byte'):.4f}"])
        print(f"\n{title}\n" + table(["run", "tokens", "training FLOPs", "steps, training", "steps, validation", "validation loss", "bits per byte"], rows), flush=True)


NO_THOUGHTS = "no thoughts"


def bench_quality(bench: Bench) -> None:
    if bench.plot:
        try:
            import matplotlib
        except ImportError:
            raise BadInput("--plot needs matplotlib: pip install matplotlib") from None
    quality = Quality(bench)
    K = bench.max_latent
    own = {method: {"method": method, "budget": bench.budget if method == "adaptive" else None, "max_latent": 1 if method == "ponder2" else K}
           for method in bench.methods}
    if "adaptive" in own:  # the control: adaptive's embedding scale, but never a thought
        own[NO_THOUGHTS] = own["adaptive"] | {"tau": 1.0, "budget": None}
    rates = dict.fromkeys(own, bench.learning_rate)

    def settings(who: str, **rest) -> dict:
        return own[who] | {"learning_rate": rates[who]} | rest

    def name_of(who: str, *rest: str) -> str:
        return ", ".join((who, *rest, f"rate {rates[who]:g}"))

    if "rates" in bench.parts:  # each at its own best learning rate, found on the first seed
        trials = {}
        for rate in bench.rates:
            rates = dict.fromkeys(own, rate)
            trials |= {name_of(who): settings(who) for who in own}
        quality.make(trials, 1)
        quality.show("Learning rates (first seed):", list(trials), 1)
        for who in own:
            of_each = {trials[name]["learning_rate"]: quality.of(name)[0]["val_loss"] for name in trials if name.startswith(f"{who}, ")}
            rates[who] = min(of_each, key=of_each.get)
    if "tokens" in bench.parts or "flops" in bench.parts:
        equal_tokens = {name_of(who): settings(who) for who in own}
        quality.make(equal_tokens, bench.seeds)
        quality.show(f"At equal tokens ({bench.seeds} seeds):", list(equal_tokens))
    if "flops" in bench.parts:
        flops = {who: statistics.mean(r["flops"] for r in quality.of(name_of(who))) for who in own}
        aim = flops.get("adaptive", max(flops.values()))
        wanted = {}
        for who in own:
            steps = max(1, round(bench.max_steps * aim / flops[who]))
            if steps == bench.max_steps:
                wanted[name_of(who)] = settings(who)
            else:
                wanted[name_of(who, f"{steps} steps")] = settings(who, max_steps=steps, eval_every=max(1, steps // 10), save_every=steps)
        quality.make(wanted, bench.seeds)
        quality.show("At equal training FLOPs, those of adaptive; the number of steps is what they buy:", list(wanted))
    if "pareto" in bench.parts:
        pareto = {name_of(who): settings(who) for who in own if who in ("vanilla", "adaptive", "loop", "pause", "ponder", "ponder2")}
        if "adaptive" in own:
            pareto |= {name_of("adaptive", f"budget {b:g}"): settings("adaptive", budget=b) for b in bench.budgets if b <= K}
            pareto[name_of("adaptive", "all steps")] = settings("adaptive", budget=None, tau=0.0)
        for method in [m for m in ("loop", "pause", "ponder", "ponder2") if m in own]:
            pareto |= {name_of(method, f"K = {k}"): settings(method, max_latent=k) for k in range(1, K + 1) if k != own[method]["max_latent"]}
        if "vanilla" in own:
            pareto |= {name_of("vanilla", f"{bench.n_layer * m} layers"): settings("vanilla", n_layer=bench.n_layer * m) for m in (2, 3, 4)}
        quality.make(pareto, bench.seeds)
        quality.show("Loss against passes, at equal tokens:", list(pareto))
    if bench.plot:
        plot(quality, quality.path.with_suffix(""))


def plot(quality: Quality, path: Path) -> None:
    """Validation loss against training FLOPs, a point a run, to path.svg and path.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, who in enumerate((*METHODS, NO_THOUGHTS)):
        points = sorted((r["flops"], r["val_loss"]) for name, r in quality.runs.items() if name.startswith(f"{who}, "))
        if points:
            axes.plot(*zip(*points), "o" if who != "adaptive" else "*", markersize=6 if who != "adaptive" else 11, label=who, color=f"C{i}", alpha=0.7)
    axes.set(xscale="log", xlabel="training FLOPs (counted)", ylabel="validation loss, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), bbox_inches="tight")
        print(f"written: {path.with_suffix(suffix)}")


def main() -> None:
    bench = configure(Bench, positional=("what",), default=TINY)
    {"flops": bench_flops, "speed": bench_speed, "growth": bench_growth, "quality": bench_quality}[bench.what](bench)


if __name__ == "__main__":
    run(main)
