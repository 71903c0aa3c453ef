"""What a thought buys: every method trained on the same batches from the same seeds, side by side.

    python compare.py config/micro.py --seeds=3 --jobs=2 --plot      hours: equal tokens and FLOPs, a figure
    python compare.py --max_steps=3000 --parts rates tokens --methods vanilla adaptive "no thoughts"
    python compare.py plot out/tiny out/vanilla                      curves of any runs; see plot --help

What is notable here:
* A run is `python train.py …` in a process of its own, `jobs` of them at a time, which share the cores.
* A run is written to results/ as it ends, and not made again: after an interruption the same command goes on.
* Each method gets the best of the given learning rates. A run that diverges is a result too: the worst.
"""

import sys

from common import TINY, answer_help

if sys.argv[1:2] != ["plot"]:  # which has settings of its own
    answer_help(__file__, default=TINY)

import json
import os
import signal
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

import figures
from baselines import METHODS
from common import (BadInput, about, check_items, check_output, check_read, check_typed, configure,
                    optional, read_json, run, table, write_whole)
from configurator import flags_of, on_end
from prepare import Data
from runs import DIVERGED
from schedule import ADAPTIVE, OF_ADAPTIVE, STEERING, Recipe, most_latent, unread

TRAIN = Path(__file__).with_name("train.py")
NO_THOUGHTS = "no thoughts"  # a control: adaptive's embedding scale, but never a latent step
ALL_STEPS = "all steps"  # another: every token takes every latent step
KINDS = (*METHODS, NO_THOUGHTS, ALL_STEPS)
TRAINED = [f.name for f in fields(Recipe)]  # what train.py is told
PARTS = {"rates": "rates rate_steps", "tokens": "seeds", "flops": "seeds", "lengths": "seeds lengths",
         "pareto": "seeds budgets ks depths"}  # the tables, and the settings that not all of them read
READERS = dict.fromkeys(KINDS, "ks") | {"vanilla": "depths", "mor": "", NO_THOUGHTS: ""}
READERS |= {ALL_STEPS: "ks exit_loss weigh_values"}
READERS |= dict.fromkeys(ADAPTIVE, " ".join(("budgets", *OF_ADAPTIVE)))  # of the kinds, likewise
HEAD = "run|tokens|training FLOPs|steps, training|steps, validation|validation loss|bits per byte".split("|")
FORMATS = {"tokens": ",.0f", "flops": ".3e", "train_steps": ".2f", "val_steps": ".2f", "val_loss": ".4f",
           "bits_per_byte": ".4f"}


@dataclass
class Compare(Recipe):
    out: str = "out/tiny"  # runs stand in <out>-compare-<n_layer>x<n_embd>-<max_steps>
    methods: list[str] = field(default_factory=list)  # vanilla, …, "no thoughts", "all steps"; none: all
    seeds: int = 1  # runs of each kind: seed, seed + 1, …
    parts: list[str] = field(default_factory=lambda: ["rates", "tokens", "flops"])  # also pareto, lengths
    rates: list[float] = field(default_factory=lambda: [3e-3, 6e-3, 1.2e-2])  # each method gets its best
    rate_steps: int = 0  # optimizer steps of the runs that find it; 0: max_steps
    budgets: list[float] = field(default_factory=list)  # Pareto; none: 0.5, 1, 1.5, 2 up to max_latent
    ks: list[int] = field(default_factory=list)  # Pareto: steps of the baselines; none: 1 to max_latent
    depths: list[int] = field(default_factory=lambda: [2, 3, 4])  # Pareto: vanilla's layers, times n_layer
    lengths: list[int] = field(default_factory=list)  # steps of the last table; none: half, and max_steps
    jobs: int = 1  # runs at once, which share the cores
    plot: bool = False  # also draw loss against FLOPs, as SVG and PNG (matplotlib)
    results: str = "results"  # folder for the JSON

    def __post_init__(self) -> None:
        if self.method != "adaptive":
            raise ValueError(f"--method={self.method} is not read here; name the methods with --methods")
        self.methods = self.methods or [who for who in KINDS if who != "mor" or self.n_layer > 2]
        check_items("methods", self.methods, KINDS)
        check_items("parts", self.parts, PARTS)
        check_read(self, PARTS, self.parts, "--parts ")
        check_read(self, READERS, self.methods, "--methods ")
        tried = {"learning_rate": "a comparison without rates in --parts: these are all of --rates"}
        idle = {} if "pareto" in self.parts else unread(self)  # whose budgets are --budgets
        chosen = {*ADAPTIVE} & {*self.methods}
        if not chosen:  # --budget=None is true of all others
            steering = STEERING - {"router_bias"} if ALL_STEPS in self.methods else STEERING
            idle |= {name: "--methods adaptive" for name in steering if getattr(self, name) is not None}
        check_typed(idle | tried if "rates" in self.parts else idle)
        most = max(self.budget or 0, *self.budgets, 0)
        if chosen and most > self.max_latent > 0:
            raise ValueError(f"budget {most:g} does not lie between 0 and max_latent {self.max_latent}")
        for run in (plain_run(who, self) for who in self.methods):  # each must be possible
            self.try_to_build(method=run.method, max_latent=run.max_latent)
        self.budgets = self.budgets or [b for b in (0.5, 1.0, 1.5, 2.0) if b <= self.max_latent]
        self.ks = self.ks or list(range(1, self.max_latent + 1))
        self.lengths = self.lengths or [max(1, self.max_steps // 2), self.max_steps]


@dataclass(frozen=True)
class Run:
    """What sets a run apart from the others; all other settings are common to them."""

    method: str
    learning_rate: float
    seed: int
    max_latent: int
    budget: float | None
    tau: float
    lam: float
    beta: float
    n_layer: int
    max_steps: int
    train_tokens: int

    def __post_init__(self) -> None:
        """What the method does not read has one value, whatever is typed, so that no run is made twice."""
        fixed = {name: getattr(Recipe, name) for name in unread(self) if name in vars(self)}
        beta = self.beta if self.lam else Recipe.beta
        vars(self).update({"beta": beta, "max_latent": most_latent(self)} | fixed)

    @property
    def who(self) -> str:
        """The method, or which of the controls it is."""
        fixed = (self.method, self.budget, self.lam) == ("adaptive", None, 0.0)
        return {1.0: NO_THOUGHTS, 0.0: ALL_STEPS}.get(self.tau, self.method) if fixed else self.method


def plain_run(who: str, settings: Compare) -> Run:
    """The first run of a method, or of a control, as the settings have it."""
    plain = Run(**{f.name: getattr(settings, f.name) for f in fields(Run)})
    if who in ADAPTIVE:
        return replace(plain, method=who)
    if who in (NO_THOUGHTS, ALL_STEPS):
        return replace(plain, budget=None, lam=0.0, tau=float(who == NO_THOUGHTS))
    most = 1 if who == "ponder2" else settings.max_latent  # as its authors ran it
    return replace(plain, method=who, max_latent=min(most, settings.max_latent))


class Runs:
    """The finished runs of a results file, read back, and the making of those that are missing."""

    def __init__(self, settings: Compare) -> None:
        self.settings = settings
        self.about = about(settings.device)  # of runs that diverge; the others say it themselves
        free = ("out", "device", "compile", *(f.name for f in fields(Run)))
        self.common = {name: getattr(settings, name) for name in TRAINED if name not in free}
        shape = f"{settings.n_layer}x{settings.n_embd}-{settings.max_steps}"
        self.path = Path(settings.results, f"quality-{shape}.json")
        self.folder = Path(f"{settings.out}-compare-{shape}")
        check_output(self.path, "--results", make=True)
        self.fingerprint = None  # of the data that the runs were trained on
        self.finished, self.processes = {}, []  # Run → its result; those that are at work
        self.read()

    def read(self) -> None:
        """Adds what the results file holds: another compare.py may have written there, too."""
        if not self.path.exists():
            return
        try:
            stored = read_json(self.path)
            unset = {name: getattr(Recipe, name, []) for name in TRAINED}  # of files older than a setting
            theirs = unset | stored["settings"]
            self.fingerprint = stored.get("fingerprint")
            for result in stored["runs"]:
                self.finished[Run(**{f.name: result[f.name] for f in fields(Run)})] = result
            other = [name for name, ours in self.common.items() if theirs[name] != ours]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{self.path} is not of compare.py ({error!r}); want another --results") from None
        if other:
            raise BadInput(f"{self.path} has other settings ({', '.join(other)}): choose another --results")

    def name(self, run: Run, seed: bool = False) -> str:
        """Its method, where it differs from the plain run of that, its rate, and its seed where wanted."""
        plain = plain_run(run.who, self.settings)
        could = {"max_steps": f"{run.max_steps} steps", "train_tokens": f"{run.train_tokens:,} tokens",
                 "budget": "no budget" if run.budget is None else f"budget {run.budget:g}",
                 "max_latent": f"K = {run.max_latent}", "n_layer": f"{run.n_layer} layers",
                 "tau": f"τ = {run.tau:g}", "lam": f"λ = {run.lam:g}", "beta": f"β = {run.beta:g}"}
        own = [word for name, word in could.items() if getattr(run, name) != getattr(plain, name)]
        return ", ".join([run.who, *own, f"rate {run.learning_rate:g}"] + [f"seed {run.seed}"] * seed)

    def show(self, title: str, kinds: list[Run], seeds: int) -> None:
        """Makes the runs of these kinds that are missing, each with every seed, and prints their table."""
        kinds = list(dict.fromkeys(kinds))
        self.make([replace(kind, seed=kind.seed + i) for i in range(seeds) for kind in kinds])
        rows = [[self.name(kind), *(self.mean(kind, seeds, key) for key in FORMATS)] for kind in kinds]
        print(f"\n{title}\n{table(HEAD, rows)}", flush=True)

    def of(self, kind: Run, seeds: int, key: str) -> list:
        """A result of the runs of a kind, seed by seed; None where one diverged."""
        return [self.finished[replace(kind, seed=kind.seed + i)][key] for i in range(seeds)]

    def mean(self, kind: Run, seeds: int, key: str) -> str:
        """Over seeds, as text; of the loss with its standard deviation."""
        values = self.of(kind, seeds, key)
        if None in values:
            return f"{values.count(None)} of {seeds} diverged" if key == "val_loss" else "–"
        spread = f" ± {statistics.stdev(values):.4f}" if key == "val_loss" and seeds > 1 else ""
        return f"{statistics.mean(values):{FORMATS[key]}}{spread}"

    def make(self, wanted: list[Run]) -> None:
        """Trains the wanted runs that are not there yet, `jobs` at a time."""
        missing = [run for run in wanted if run not in self.finished]
        if old := {self.finished[r].get("commit") for r in {*wanted} - {*missing}} - {self.about["commit"]}:
            print(f"{self.path}: runs of commit {', '.join(sorted(map(str, old)))} are not made again")
        if not missing:
            return
        data = Data(self.settings.data, self.settings.block_size, self.settings.train_tokens)
        if self.finished and self.fingerprint != data.fingerprint:
            raise BadInput(f"{self.path} holds runs on other data: choose another --results")
        self.fingerprint = data.fingerprint
        check_output(self.folder / "log.jsonl", "--out", make=True)
        with ThreadPoolExecutor(self.settings.jobs) as self.pool:
            results = {self.pool.submit(self.train, run): run for run in missing}
            try:
                for count, ended in enumerate(as_completed(results), 1):
                    run = results[ended]
                    self.read()
                    self.finished[run] = self.about | ended.result() | asdict(run)
                    runs = list(self.finished.values())
                    content = {"settings": self.common, "fingerprint": self.fingerprint, "runs": runs}
                    write_whole(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")
                    done = f"{count} of {len(missing)}: {self.name(run, seed=True)}"
                    print(f"{done}: validation loss {self.mean(run, 1, 'val_loss')}", flush=True)
            finally:  # after an interruption, or a run that failed, the others save what they have
                self.pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.terminate()

    def train(self, run: Run) -> dict:
        """A run's summary, and its curve: (step, FLOPs, validation loss). Raises BadInput where it fails."""
        out = self.folder / "-".join(f"{name}={value}" for name, value in asdict(run).items())
        often = max(1, run.max_steps // 10)
        values = {name: getattr(self.settings, name) for name in TRAINED} | asdict(run)
        values |= {"out": out, "eval_every": often, "save_every": often, "resume": (out / "ckpt.pt").exists()}
        flags = flags_of({name: value for name, value in values.items() if name not in unread(run)})
        threads = max(1, torch.get_num_threads() // self.settings.jobs)
        with open(f"{out}.stderr", "w") as stderr:  # in a session of its own, so that Ctrl-C reaches us alone
            process = subprocess.Popen([sys.executable, str(TRAIN), *flags], stdout=subprocess.DEVNULL,
                                       stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                                       start_new_session=True)
        self.processes.append(process)
        code = process.wait()
        if code not in (0, DIVERGED) or (code == 0 and not (out / "summary.json").exists()):
            self.pool.shutdown(wait=False, cancel_futures=True)  # before this thread takes the next run
            said = Path(stderr.name).read_text(encoding="utf-8", errors="replace").splitlines() or ["stopped"]
            raise BadInput(f"{self.name(run, seed=True)}: {said[-1]} (exit code {code}, {stderr.name})")
        path = out / "log.jsonl"  # not there where the first step diverged
        log = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        flops = {row["step"]: row["flops"] for row in log if "flops" in row}
        steps = [row["latent_steps"] for row in log if "latent_steps" in row] or [0]
        curve = [(row["step"], flops[row["step"]], row["val_loss"]) for row in log if "val_loss" in row]
        of_none = dict.fromkeys("val_loss perplexity bits_per_byte val_steps flops tokens".split())
        result = read_json(out / "summary.json") if code == 0 else of_none
        result.pop("config", None)
        return result | {"curve": curve, "train_steps": statistics.mean(steps)}


def main() -> None:
    if sys.argv[1:2] == ["plot"]:
        return figures.main(sys.argv[2:])
    settings = configure(Compare, default=TINY, also="train.py")
    if settings.plot:
        optional("matplotlib.figure", "--plot")
    on_end(signal.default_int_handler)  # stops the runs, as Ctrl-C does
    runs = Runs(settings)
    kinds = {kind.who: kind for kind in (plain_run(who, settings) for who in settings.methods)}

    if "rates" in settings.parts:  # each at its own best learning rate, found on the first seed
        trials = [replace(kind, learning_rate=rate, max_steps=settings.rate_steps or settings.max_steps)
                  for rate in settings.rates for kind in kinds.values()]
        runs.show("Learning rates (first seed):", trials, 1)
        ended = [run for run in trials if runs.finished[run]["val_loss"]]
        for run in sorted(ended, key=lambda run: runs.finished[run]["val_loss"], reverse=True):
            kinds[run.who] = replace(kinds[run.who], learning_rate=run.learning_rate)  # its best comes last

    if "tokens" in settings.parts or "flops" in settings.parts:
        runs.show(f"At equal tokens ({settings.seeds} seeds):", list(kinds.values()), settings.seeds)

    if "flops" in settings.parts:  # each for as many steps as adaptive's FLOPs, or else the most, buy
        costs = {who: runs.of(kind, settings.seeds, "flops") for who, kind in kinds.items()}
        spent = {who: statistics.mean(flops) for who, flops in costs.items() if None not in flops}
        most = "adaptive" if "adaptive" in spent else max(spent, key=spent.get, default="none")
        steps = {who: max(1, round(settings.max_steps * spent[most] / spent[who])) for who in spent}
        for who in [who for who in kinds if who not in spent]:
            print(f"\n{who} diverged: what its steps cost is not known, so that it is not in the next table")
        title = f"At equal training FLOPs, those of {most}; the number of steps is what they buy:"
        runs.show(title, [replace(kinds[who], max_steps=steps[who]) for who in steps], settings.seeds)

    if "pareto" in settings.parts:  # budgets of adaptive, K of the baselines, depths of vanilla
        wanted = [kind for who, kind in kinds.items() if who not in (NO_THOUGHTS, "mor")]
        for kind in list(wanted):
            if kind.who in ADAPTIVE:
                wanted += [replace(kind, budget=budget) for budget in settings.budgets]
            elif kind.who == "vanilla":
                wanted += [replace(kind, n_layer=kind.n_layer * times) for times in settings.depths]
            else:
                wanted += [replace(kind, max_latent=k) for k in settings.ks]
        runs.show("Loss against passes, at equal tokens:", wanted, settings.seeds)

    if "lengths" in settings.parts:
        wanted = [replace(kind, max_steps=steps) for kind in kinds.values() for steps in settings.lengths]
        runs.show("Loss against the length of the training:", wanted, settings.seeds)

    if settings.plot:
        figures.save_comparison(runs.finished, runs.path)


if __name__ == "__main__":
    run(main)
