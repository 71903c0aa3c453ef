"""What a thought costs: FLOPs and time of every method, side by side, in one run.

    python bench.py flops                      counted on the executed graph, and by formula
    python bench.py flops config/410m.py       by formula alone: too big to execute here
    python bench.py speed                      training, prefill and decoding; time ratio against FLOP ratio
    python bench.py growth                     time per token against the context, and against ℓ_max
    python bench.py memory config/7b.py        what each of --world sharded processes holds, what fits a GPU

What is notable here:
* Adaptive is forced to a mean number of latent steps (costs.py): nothing needs to be trained.
* Methods alternate round by round, in another order each time, and medians are quoted, so that a machine that
  drifts favours nobody. MFU is against the roof that the same run measured with a large matrix product.
"""

from common import TINY, answer_help

answer_help(__file__, default=TINY)

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from baselines import METHODS
from common import (BadInput, about, autocast, check_items, check_output, check_read, check_typed,
                    configure, enough_memory, load_checkpoint, measure_roof, pick_device, precision, run,
                    table, timed, write_whole)
from costs import (bytes_read, costs, counted, fitting, forward_flops, going_on, kept_bytes, made_up_steps,
                   make, memory, training_flops)
from fast import compile_ticks, compile_training, compiles, fuse_norms, lay_out
from log import Cache
from model import AdaptiveLatentCoT, Config
from schedule import ADAPTIVE, STEERING


@dataclass
class Bench(Config):
    what: str = ""  # flops, speed, growth or memory
    methods: list[str] = field(default_factory=list)  # some of vanilla, adaptive, …; none: all that can be
    checkpoint: str = ""  # flops: take shape and mean latent steps of this trained model
    mean_latent: float | None = None  # latent steps that adaptive is forced to; None: 1.5, at most max_latent
    batch: int = 8  # flops, speed, memory: sequences at once
    world: int = 8  # memory: processes, each with a GPU
    rounds: int = 7  # speed, growth: rounds, each of which times every method once
    contexts: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])  # growth: block_size
    device: str = ""  # speed, growth: cpu, cuda, cuda:N or mps; empty: cuda where there is one
    dtype: str = ""  # speed, growth, memory: bfloat16 or float32, of matrix products; empty: what suits best
    compile: bool | None = None  # speed, growth: torch.compile; None: on CUDA only
    results: str = "results"  # folder for the JSON

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in BENCHES:
            raise ValueError(f"what to measure is {self.what!r}, but must be one of {', '.join(BENCHES)}")
        check_read(self, READ, [self.what], "bench.py ")
        self.methods = self.methods or [m for m in METHODS if m != "mor" or self.n_layer > 2]
        if self.mean_latent is None:
            self.mean_latent = min(1.5, self.max_latent)
        if self.method != "adaptive":
            raise ValueError(f"--method={self.method} is not read here; name the methods with --methods")
        check_items("methods", self.methods, METHODS)
        if not 0 <= self.mean_latent <= self.max_latent:
            raise ValueError(f"mean_latent is {self.mean_latent}, but at most {self.max_latent} is possible")

    def config_of(self, method: str) -> Config:
        """The shape of a method; ponder2 has at most one latent step, as its authors ran it."""
        most = min(1, self.max_latent) if method == "ponder2" else self.max_latent
        shape = {f.name: getattr(self, f.name) for f in fields(Config)}
        return Config(**shape | {"method": method, "max_latent": most})


# ------------------------------------------------------------------------------------------------------ FLOPs


def bench_flops(bench: Bench) -> tuple[str, dict, str]:
    """The name of the results file, what it is to hold, and the table that shows it."""
    if bench.checkpoint:
        plain = configure(Bench, ["flops"], positional=("what",), default=TINY, also="train.py")
        for name in (*(f.name for f in fields(Config)), "mean_latent"):
            if getattr(bench, name) != getattr(plain, name):
                raise BadInput(f"{name} is not read here, but that of --checkpoint={bench.checkpoint}")
        model, _, checkpoint = load_checkpoint(bench.checkpoint)
        reached = checkpoint.get("result", {}).get("val_steps")
        if not isinstance(model, AdaptiveLatentCoT) or reached is None:
            raise BadInput(f"{bench.checkpoint} is no adaptive model that was evaluated while it was trained")
        methods = bench.methods if bench.methods != plain.methods else []  # all that can be, of that shape
        bench = replace(bench, mean_latent=reached, methods=methods, **asdict(model.config))
    B, T = bench.batch, bench.block_size
    small = bench.n_layer * bench.n_embd**2 < 4e6
    records = {}
    for name in bench.methods:
        config = bench.config_of(name)
        model = make(config, "meta")
        steps = made_up_steps(config, B, T, bench.mean_latent)
        record = {}
        if small:
            executed = make(config, "cpu", bench.mean_latent)
            total, steps = counted(executed, *torch.randint(0, config.vocab_size, (2, B, T)))
            equal = total == float(training_flops(*forward_flops(executed, steps)))
            record = {"counted": total / B / T, "counted_equals_formula": equal}
        record |= {"parameters": sum(p.numel() for p in model.parameters())} | costs(model, steps)
        records[name] = record | {"estimate": 6 * record["parameters"] * record["passes"]}
    rows = []
    for name, r in records.items():
        ratio = f"{r['training'] / records['vanilla']['training']:.2f}" if "vanilla" in records else ""
        equal = {True: "yes", False: "NO", None: "by formula"}[r.get("counted_equals_formula")]
        rows.append([name, f"{r['parameters']:,}", f"{r['passes']:.2f}", f"{r['training']:.4g}", ratio, equal]
                    + [f"{r[key]:.4g}" for key in ("estimate", "prefill", "decode")])
    shown = table(["method", "parameters", "passes", "training / token", "× vanilla", "counted = formula",
                   "6 N passes", "prefill / token", "decode / token"], rows)
    note = "" if small else "; this shape is too big to execute here: all by formula, on the meta device"
    shown += (f"\n\nFLOPs per token at context {T}; adaptive at {bench.mean_latent:.2f} mean latent steps; "
              f"decode: one token at a full context{note}")
    return f"flops-{bench.n_layer}x{bench.n_embd}.json", {
        "mean_latent": bench.mean_latent, "context": T, "methods": records}, shown


# ------------------------------------------------------------------------------------------------------ speed


def measure_copy(device: torch.device) -> float:
    """Bytes/s that the copy of a large tensor reads and writes: what bounds decoding at batch 1."""
    source = torch.zeros(2**25 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(8))


class Contestant:
    """One method, ready to be timed: a training step, a prefill, decoding at two batch sizes.

    A `twin` has the same config and lends its models, as not all of a large shape would fit on a GPU."""

    def __init__(self, bench: Bench, config: Config, mean_latent: float, batch: int, twin=None) -> None:
        self.bench, self.config, self.mean_latent = bench, config, mean_latent
        self.device = pick_device(bench.device)
        self.model = twin.model if twin else make(config, self.device)
        self.decoder = twin.decoder if twin else make(config, self.device).eval()
        self.optimizer = twin.optimizer if twin else torch.optim.AdamW(self.model.parameters(), fused=True)
        if not twin:
            self.speed_up()
        shape = (2, batch, config.block_size)
        self.idx, self.targets = torch.randint(0, config.vocab_size, shape, device=self.device)
        self.found: dict[str, list[float]] = defaultdict(list)  # what was measured, round by round

    def speed_up(self) -> None:
        """As train.py and sample.py do."""
        lay_out(self.decoder, precision(self.device, self.bench.dtype))
        if compiles(self.bench.compile, self.device):
            compile_training(self.model)
            compile_training(self.decoder)
            compile_ticks(self.decoder)
            torch._dynamo.config.recompile_limit = 1024  # contestants share code, but not their graphs
            torch._dynamo.config.accumulated_recompile_limit = 1024
        elif self.device.type == "cpu" and self.bench.dtype != "bfloat16":
            fuse_norms(self.model)

    def force(self) -> None:
        """Gives the router this contestant's share: twins have it in common."""
        for model in (self.model, self.decoder):
            if isinstance(model, AdaptiveLatentCoT):
                model.router.q = going_on(self.mean_latent, self.config.max_latent)

    def train(self) -> None:
        with autocast(self.device, self.bench.dtype):
            output = self.model(self.idx, self.targets)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps = output.steps

    def measure_training(self) -> None:
        self.model.draw(len(self.found["training"]))
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # others: all but the weights and AdamW's two moments
            others = torch.cuda.memory_allocated() - 3 * sum(p.nbytes for p in self.model.parameters())
        steps = 4 if cuda else 1  # in a row, where a step is short
        took = timed(lambda: [self.train() for _ in range(steps)], self.device)
        self.found["training"].append(took / steps / self.idx.numel())
        if cuda:
            self.found["memory"].append(torch.cuda.max_memory_allocated() - others)
        elif "memory" not in self.found:
            with autocast(self.device, self.bench.dtype):
                self.found["memory"].append(kept_bytes(self.model, self.idx, self.targets))
        products, attention = forward_flops(self.model, self.steps.cpu())  # Apple's GPUs have no float64
        self.found["FLOPs"].append(float(training_flops(products, attention)) / self.idx.numel())

    @torch.inference_mode()
    def measure_prefill(self) -> None:
        with autocast(self.device, self.bench.dtype):
            took = timed(lambda: self.decoder.hidden(self.idx, Cache()), self.device)
        self.found["prefill"].append(took / self.idx.numel())

    @torch.inference_mode()
    def measure_decoding(self, batch: int) -> None:
        """Time per token after a prompt of half the context: once all rows have spoken, before one ends."""
        half = max(1, self.config.block_size // 2)
        new = max(1, min(32, self.config.block_size // 8))  # tokens of each row
        prompts = self.idx[:1, :half].expand(batch, -1)
        stream = self.decoder.generate(prompts, max(16, 2 * half), temperature=0)
        speaking = set()
        steps = []  # of each token

        def listen() -> None:
            while len(steps) < new * batch:
                steps.extend(next(stream).steps.tolist())

        with autocast(self.device, self.bench.dtype):
            while len(speaking) < batch:
                speaking.update(next(stream).row.tolist())
            took = timed(listen, self.device)
        self.found[f"decode {batch}"].append(took / len(steps))
        if batch == 1:
            before = made_up_steps(self.config, 1, half + new // 2, self.mean_latent)
            read = [bytes_read(self.decoder, torch.cat((before, torch.tensor([[own]])), 1)) for own in steps]
            self.found["bytes/s"].append(sum(read) / took)
            self.found["steps"].append(mean(steps))


def measure_growth(contestant: Contestant) -> None:
    contestant.measure_prefill()
    contestant.measure_decoding(1)


def measure_speed(contestant: Contestant) -> None:
    contestant.measure_training()
    measure_growth(contestant)
    contestant.measure_decoding(16)


def alternate(contestants: list[Contestant], rounds: int, measure: Callable) -> Iterator[None]:
    """Measures all, round by round; yields after each but the first, which is there to warm up."""
    for i in tqdm(range(rounds + 1), desc="rounds, the first to warm up", disable=not sys.stderr.isatty()):
        for contestant in random.Random(i).sample(contestants, len(contestants)):
            if i == 1:
                contestant.found.clear()
            contestant.force()
            measure(contestant)
        if i:
            yield


def bench_speed(bench: Bench) -> tuple[str, dict, str]:
    """The name of the results file, what it is to hold, and the table that shows it."""
    contestants: dict[str, Contestant] = {}
    for name in bench.methods:
        means = {0.0}
        if name in ADAPTIVE:
            means = {m for m in (0, 0.5, 1, 1.5, 2, 3) if m <= bench.max_latent} | {bench.mean_latent}
        twin = None
        for mean_latent in sorted(means):
            twin = Contestant(bench, bench.config_of(name), mean_latent, bench.batch, twin)
            contestants[f"{name}, {mean_latent:g} steps" if name in ADAPTIVE else name] = twin
    device = pick_device(bench.device)
    roof, copy = 0.0, 0.0
    for _ in alternate(list(contestants.values()), bench.rounds, measure_speed):
        roof = max(roof, measure_roof(device, bench.dtype))
        copy = max(copy, measure_copy(device))
    records = {}
    for name, contestant in contestants.items():
        found = contestant.found
        timings = ("training", "prefill", "decode 1", "decode 16")
        records[name] = {
            "tokens_per_second": {key: 1 / median(found[key]) for key in timings},
            "spread": {key: (max(found[key]) - min(found[key])) / median(found[key]) for key in timings},
            "training_flops_per_token": median(found["FLOPs"]),
            "mfu": median(flops / time for flops, time in zip(found["FLOPs"], found["training"])) / roof,
            "bandwidth": median(found["bytes/s"]) / copy, "decode_steps": mean(found["steps"]),
            "memory": found["memory"][-1]}
    base = records.get("vanilla") or next(iter(records.values()))
    rows = []
    for name, r in records.items():
        speed = r["tokens_per_second"]
        r["time_ratio"] = base["tokens_per_second"]["training"] / speed["training"]
        r["flop_ratio"] = r["training_flops_per_token"] / base["training_flops_per_token"]
        over = r["time_ratio"] / r["flop_ratio"]
        rows.append([name, f"{speed['training']:,.0f}", f"{r['spread']['training'] / 2:.0%}",
                     f"{r['time_ratio']:.2f}", f"{r['flop_ratio']:.2f}", f"{over:.2f}", f"{r['mfu']:.0%}",
                     f"{speed['prefill']:,.0f}", f"{speed['decode 1']:,.0f}", f"{r['bandwidth']:.0%}",
                     f"{speed['decode 16']:,.0f}", f"{r['memory'] / 2**20:,.0f}"])
    shown = table(["method", "training tok/s", "± spread", "time ratio", "FLOP ratio", "time / FLOPs", "MFU",
                   "prefill tok/s", "decode tok/s, batch 1", "of bandwidth", "batch 16",
                   "peak MiB" if device.type == "cuda" else "kept MiB"], rows)
    shown += (f"\n\n{about(bench.device)['machine']}, torch {torch.__version__}; "
              f"{bench.batch} × {bench.block_size} tokens, medians of {bench.rounds} alternating rounds, on "
              f"CUDA of four steps; roof {roof / 1e12:.3f} TFLOP/s, copy {copy / 1e9:.1f} GB/s; adaptive is "
              "forced to a mean of latent steps; decoding starts at half the context; kept: what a forward "
              "keeps for its backward, weights included")
    kind = device.type + ("-compiled" if compiles(bench.compile, device) else "")
    sizes = {"roof": roof, "copy": copy, "batch": bench.batch, "context": bench.block_size}
    return f"speed-{kind}-{bench.n_layer}x{bench.n_embd}.json", sizes | {"methods": records}, shown


def bench_growth(bench: Bench) -> tuple[str, dict, str]:
    """The same for batch 1 and a mean of one latent step: against the context, and against ℓ_max."""
    base = bench.config_of("adaptive")
    plan = {f"context {c}": replace(base, block_size=c) for c in bench.contexts}
    plan |= {f"context {c}, vanilla": replace(base, block_size=c, method="vanilla") for c in bench.contexts}
    plan |= {f"ℓ_max {k}": replace(base, max_latent=k) for k in (0, 1, 2, 3, 4, 6, 8)}
    contestants = {name: Contestant(bench, each, min(1, each.max_latent), 1) for name, each in plan.items()}
    for _ in alternate(list(contestants.values()), bench.rounds, measure_growth):
        pass
    micro = {}
    for name, contestant in contestants.items():
        micro[name] = {key: 1e6 * median(contestant.found[key]) for key in ("prefill", "decode 1")}
    rows = []
    for c in bench.contexts:
        ours, vanilla = list(micro[f"context {c}"].values()), list(micro[f"context {c}, vanilla"].values())
        ratios = [f"{our / its:.2f}" for our, its in zip(ours, vanilla)]
        rows.append([c, *(f"{time:,.0f}" for time in ours + vanilla), *ratios])
    shown = "Microseconds per token at a mean of one latent step:\n"
    shown += table("context|prefill|decode|vanilla: prefill|decode|ratio: prefill|decode".split("|"), rows)
    rows = [[name.split()[1], *(f"{time:,.0f}" for time in micro[name].values())]
            for name in plan if name.startswith("ℓ_max")]
    shown += "\n\n" + table(["ℓ_max", "prefill", "decode"], rows)
    name = f"growth-{contestant.device.type}-{bench.n_layer}x{bench.n_embd}.json"
    return name, {"microseconds_per_token": micro}, shown


# ----------------------------------------------------------------------------------------------------- memory


def bench_memory(bench: Bench) -> tuple[str, dict, str]:
    """The same for the memory of train.py --shard, by formula: products in bfloat16 unless dtype says not."""
    model = make(bench.config_of("adaptive"), "meta")
    shared = dict(model=model, world=bench.world, low=bench.dtype != "float32")
    ways = {"all kept": False, "--checkpointing": True}
    parts = {way: memory(batch=bench.batch, checkpointing=flag, **shared) for way, flag in ways.items()}
    rows = [[name, *(f"{parts[way][name] / 1e9:.2f}" for way in ways)] for name in parts["all kept"]]
    rows.append(["at the peak", *(f"{sum(parts[way].values()) / 1e9:.2f}" for way in ways)])
    shown = table([f"GB in each process, {bench.batch} × {bench.block_size} tokens at once", *ways], rows)
    fits = {f"{size} GB": [fitting(0.9e9 * size, checkpointing=flag, **shared) for flag in (False, True)]
            for size in (80, 141)}
    shown += "\n\n" + table(["--micro_batch_size that fits", *ways], [[name, *fits[name]] for name in fits])
    host = bench.world * parts["all kept"]["weights"] / 1e9  # each process builds it, then keeps its share
    shown += (f"\n\nAll {bench.max_latent} latent steps taken, blocks not compiled; a tenth is left to CUDA. "
              f"Each process first builds the model in {host:.1f} GB of its machine's memory")
    name = f"memory-{bench.n_layer}x{bench.n_embd}.json"
    return name, {"world": bench.world, "bytes": parts, "fits": fits}, shown


BENCHES = {"flops": bench_flops, "speed": bench_speed, "growth": bench_growth, "memory": bench_memory}
READ = {"flops": "methods checkpoint mean_latent batch",  # settings that not all of them read
        "speed": "methods mean_latent batch rounds device dtype compile",
        "growth": "rounds contexts device dtype compile", "memory": "batch world dtype"}


def main() -> None:
    bench = configure(Bench, positional=("what",), default=TINY, also="train.py")
    check_typed(dict.fromkeys(STEERING, "train.py: adaptive is forced to --mean_latent"))
    precision(pick_device(bench.device), bench.dtype)  # its checks
    machine = about(bench.device)
    check_output(Path(bench.results) / "flops.json", "--results", make=True)
    with enough_memory(f"give less than --batch={bench.batch}, or a smaller shape"):
        name, record, shown = BENCHES[bench.what](bench)
    path = Path(bench.results) / name
    try:
        write_whole(path, json.dumps(machine | record, indent=1, allow_nan=False) + "\n")
    finally:  # the reader of what is printed may have gone, and a disk may be full
        print(shown)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run(main)
