"""The one training script: one process, or several under torchrun.

    python train.py                                    config/tiny.py: minutes on a laptop CPU
    python train.py --max_latent=0 --out=out/vanilla   a plain LLaMA, without thoughts or scaled embeddings
    torchrun --nproc_per_node=8 train.py config/410m.py
    python train.py --init_from=out/vanilla --max_latent=3 --out=out/thinks    start from trained weights

What is notable here:
* A batch is a function of (seed, step), and each process takes its slice of it: any number of processes sees
  the same tokens, and no state of the data is saved. With --resume a run that was killed goes on bit for bit
  (on a GPU up to rounding).
* `budget` is the mean number of latent steps per token: the threshold τ moves so that it is met throughout.
* FLOPs are those of the executed steps, halted tokens really absent; MFU is against a roof measured before.
* A run leaves log.jsonl, ckpt.pt, best.pt (of the lowest validation loss) and, at its end, summary.json.
"""

from common import TINY, answer_help

answer_help(__file__, default=TINY)

import contextlib
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from baselines import build
from common import (about, autocast, check_read, check_typed, configure, enough_memory, load_checkpoint,
                    measure_roof, optional, pick_device, precision, run, save_checkpoint, write_whole)
from costs import forward_flops, training_flops
from fast import compile_training, compiles, fuse_norms
from init_from import check_source, say_unused, take_shape, take_weights
from log import send
from model import Config
from prepare import Data
from runs import (LOCAL_RANK, RANK, WORLD, Board, Progress, Stop, add_up, check_finite, check_new,
                  clip_gradients, cut_log, distribute, ends_with_the_others, evaluate, exact, largest, lock,
                  log_state, restore, say, say_stopped, shares, signals_as_before, waiting, write_log)
from schedule import (OF_ADAPTIVE, ROUTED, BudgetController, Recipe, budget_at, exploration, is_adaptive,
                      learning_rate, make_optimizer, most_latent, router_rate, seed_of, unread)
from shard import save_shared


@dataclass
class Train(Recipe):
    resume: bool = False  # go on with the run in out
    init_from: str = ""  # start from the weights and the shape of this run; empty: from random weights
    eval_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between checkpoints
    keep_every: int = 0  # steps between models that are kept, as ckpt-100.pt and so on; 0: none
    log_every: int = 1  # steps between lines of log.jsonl
    shard: bool = False  # divide weights, gradients and AdamW's moments among the processes
    tensorboard: bool = False  # write the numbers of log.jsonl for TensorBoard too, into out

    def __post_init__(self) -> None:
        if not self.init_from:  # or the shape is its source's
            self.try_to_build()
        if not is_adaptive(self):
            self.budget = None  # nothing to steer
            self.lam = 0.0
            check_read(self, {ROUTED: " ".join(OF_ADAPTIVE)}, [], "")
        if self.budget is not None and not 0 <= self.budget <= self.max_latent:
            raise ValueError(f"budget is {self.budget}, but must lie in [0, max_latent {self.max_latent}]")


@signals_as_before()
def train(config: Train) -> dict:
    """Trains, and returns the summary; empty where the run was stopped. Raises BadInput before it writes,
    later only where it cannot, and SystemExit where numbers are not finite any more.
    """
    # Whatever can be wrong with the settings and the data.
    device = pick_device(config.device, LOCAL_RANK)
    precision(device, config.dtype)  # its checks
    compiled = compiles(config.compile, device)
    data = Data(config.data, config.block_size, config.train_tokens)
    check_new(config, data)
    asked = config
    source = None  # the model to start from
    if config.init_from and not config.resume:
        source, tokenizer, _ = load_checkpoint(config.init_from)
        check_source(config, tokenizer, data)
        config = take_shape(config, replace(source.config, embed_scale=source.scale))
        say_unused(asked, config)
    share, micro = shares(config)
    step_tokens = config.global_batch_size * config.block_size
    out = Path(config.out)
    path = out / "ckpt.pt"
    log = out / "log.jsonl"
    if config.tensorboard:
        optional("tensorboard", "--tensorboard")
    held = lock(out) if RANK == 0 else None  # until train returns
    made = about(config.device) if RANK == 0 else {}  # now, as the commit may be another when the run ends

    # The model and what trains it: new, or as its last checkpoint has it.
    torch.manual_seed(config.seed)
    last = load_checkpoint(path, parts=False) if config.resume else None  # model, tokenizer, all else
    if last and config.init_from:  # the shape is that of its source, which the checkpoint knows
        config = take_shape(config, Config(**last[2]["config"]))
    model = build(config.model_config(config.vocab_size or data.tokenizer.n_vocab))
    if source:
        say(f"starts from {config.init_from}: {take_weights(model, source, config.budget is not None)}")
    wrapped = distribute(model, device, config)  # averages gradients over all processes
    optimizer = make_optimizer(model, config)
    at = Progress()
    controller = None if config.budget is None else BudgetController()
    if last:
        checkpoint = restore(last, config, data, model, optimizer)
        say_unused(asked, config)
        at = Progress(**{name: checkpoint[name] for name in asdict(at)})
        if controller:
            controller.state = at.threshold
        model.tau = checkpoint["config"]["tau"]
        if RANK == 0:
            cut_log(log, *at.log)
        if checkpoint.get("commit") and made.get("commit") not in (None, "", checkpoint["commit"]):
            say(f"saved at commit {checkpoint['commit']}, the run goes on at {made['commit']}")
        old = learning_rate(replace(config, max_steps=checkpoint["train"]["max_steps"]), at.step)
        new = learning_rate(config, at.step)
        if old != new:
            say(f"max_steps is another, so the learning rate jumps from {old:.2e} to {new:.2e}")
    del source, last
    model.checkpointing = config.checkpointing
    if compiled:
        compile_training(model)
        say("the blocks are compiled as they first run: a minute or so")
    elif device.type == "cpu" and config.dtype != "bfloat16":
        fuse_norms(model)

    # What the machine can do.
    roof = measure_roof(device, config.dtype) * WORLD
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{config.method}: {parameters / 1e6:.2f}M parameters on {device.type} × {WORLD}, "
        f"{config.global_batch_size} × {config.block_size} tokens a step, {share // micro} forward(s) of "
        f"{micro} per process; matrix roof {roof / 1e12:.2f} TFLOP/s")
    hidden = RANK > 0 or not sys.stderr.isatty()
    board = Board(out, at.step) if config.tensorboard and RANK == 0 else None
    bar = tqdm(initial=at.step, total=config.max_steps, unit="step", dynamic_ncols=True, disable=hidden)
    sharded = config.shard and WORLD > 1
    if config.shard and WORLD == 1:
        say("--shard changes nothing here: there is one process, which holds all (see torchrun)")
    save = save_shared if sharded else save_checkpoint
    most = most_latent(config)
    stop = Stop()
    stopping = False
    shown = ""  # of the last step

    for step in range(at.step, config.max_steps + 1):  # the number of steps done so far
        # Evaluate.
        ends = step == config.max_steps
        due = ends or step > 0 and step % config.eval_every == 0
        result = {}
        if due and at.result.get("step") != step and not stopping:
            result = evaluate(model, data, config, micro, device, stop)
            stopping = not result
        improves = bool(result) and result["val_loss"] < at.best
        if result:
            check_finite(result, step, path)
            at.best = min(at.best, result["val_loss"])
            at.result = {"step": step} | result
            write_log(log, at.result, board)

        # Save, and only then print: a terminal may fail.
        saves = ends or stopping or step % config.save_every == 0
        keeps = config.keep_every > 0 and step > 0 and step % config.keep_every == 0
        if saves or keeps or improves:
            check_finite({"largest weight": largest(model, optimizer)}, step, path)
        if (RANK == 0 or sharded) and (saves or keeps or improves):
            at.log = log_state(log) if RANK == 0 else at.log
            state = {"train": asdict(config), "data": data.fingerprint, "commit": made.get("commit"),
                     **asdict(at)}
            if improves:
                save(out / "best.pt", model, data.tokenizer, **state)
            if keeps:
                save(out / f"ckpt-{step}.pt", model, data.tokenizer, **state)
            if saves:
                trained = optimizer if sharded else optimizer.state_dict()
                save(path, model, data.tokenizer, **state, optimizer=trained)
        if config.init_from and step == 0:  # only now, as a run exists from its first checkpoint
            result = evaluate(model, data, config, micro, device, stop)
            stopping = not result
            if result:
                check_finite(result, 0, path)
                at.result = {"step": 0} | result
                at.start, at.best = result["val_steps"], result["val_loss"]
                write_log(log, at.result, board)
            if result and (RANK == 0 or sharded):
                save(out / "best.pt", model, data.tokenizer, **state | asdict(at))
        if result:
            validation = f"val {result['val_loss']:.4f}  latent {result['val_steps']:.2f}"
            say(f"step {step:>6}  {validation}  {shown}")

        # End, or stop where that was asked for.
        if stopping:
            bar.close()
            say_stopped(step, path)
            return {}
        if ends:
            break

        # What is a function of the step alone, and so the same in every process: learning rate, draws.
        began = time.perf_counter()
        rate = learning_rate(config, step)
        of_router = router_rate(config, step, at.start)
        for group in optimizer.param_groups:
            group["lr"] = of_router if group.get("of_router") else rate
        model.draw(seed_of(config, step))
        tau = model.tau
        noise = exploration(config, step, device)
        if noise is not None:  # a threshold for each position and latent step
            model.tau = torch.sigmoid(torch.logit(noise.new_tensor(tau)) - noise)

        # Forward and backward, in micro-batches.
        sums = {"loss": 0.0, "ce": 0.0, "ada": 0.0}
        executed = []
        counts = torch.zeros(BudgetController.bins)  # of tokens by their reach
        first = RANK * share
        for i in range(first, first + share, micro):
            x, y = data.batch(config.seed, step, config.global_batch_size, slice(i, i + micro))
            last = i + micro == first + share  # only then DDP averages gradients over the processes
            with contextlib.nullcontext() if last or WORLD == 1 or sharded else wrapped.no_sync():
                with autocast(device, config.dtype):
                    o = wrapped(send(x, device), send(y, device))
                (o.loss * micro / share).backward()
            for name in sums:
                sums[name] += getattr(o, name).detach() * micro / config.global_batch_size
            executed.append(o.steps.detach())
            if controller:
                counts = counts.to(device) + controller.count(o.reach.detach(), noise)
            del o  # or its cache, the keys and values of this forward, would outlive the next one
        model.tau = tau

        # Metrics, by name.
        steps = torch.cat(executed).to(exact(device))  # (share, T)
        sums["products"], sums["attention"] = forward_flops(model, steps)
        for k in range(1, most + 1):
            sums[f"reached {k}"] = (steps >= k).sum()
        sums["counts"] = counts
        sums["stop"] = steps.new_tensor(stop.asked)
        metrics = add_up(sums, device)
        counts = metrics.pop("counts")
        metrics["grad_norm"] = clip_gradients(model, config.grad_clip)
        check_finite(metrics, step + 1, path)
        reached = [metrics[f"reached {k}"] / step_tokens for k in range(1, most + 1)]
        latent = sum(reached)
        lost = waiting(executed, most) if WORLD > 1 else 0.0
        stopping = metrics["stop"] > 0

        # Step, and steer τ.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if controller:
            model.tau = controller.update(counts, budget_at(config, step, at.start) * step_tokens)
            at.threshold = controller.state
        took = time.perf_counter() - began
        at.step = step + 1
        at.seconds += took
        at.products += int(metrics["products"])
        at.attention += int(metrics["attention"])

        # Log.
        speed = step_tokens / took
        if at.step % config.log_every == 0 or at.step == config.max_steps:
            mfu = training_flops(metrics["products"], metrics["attention"]) / took / roof
            write_log(log, {
                "step": at.step, "tokens": at.step * step_tokens, "loss": metrics["loss"],
                "ce": metrics["ce"], "ada": metrics["ada"], "latent_steps": latent,
                "reached": reached, "grad_norm": metrics["grad_norm"], "lr": rate, "tokens_per_second": speed,
                "flops": training_flops(at.products, at.attention), "mfu": mfu}
                | ({"tau": tau} if is_adaptive(config) else {})
                | ({"waiting": lost} if WORLD > 1 else {}), board)
        shown = f"train {metrics['loss']:.4f}  latent {latent:.2f}  τ {tau:.4f}  {speed:,.0f} tok/s"
        bar.set_postfix_str(shown, refresh=False)
        bar.update()

    # Summary.
    bar.close()
    result = at.result | {"flops": training_flops(at.products, at.attention), "tokens": at.step * step_tokens,
                          "seconds": at.seconds, "parameters": parameters}
    if RANK == 0:
        content = {"config": asdict(config), **result, **made}
        write_whole(out / "summary.json", json.dumps(content, indent=1) + "\n")
    missed = ""
    if controller and abs(result["val_steps"] - config.budget) > 0.1 * config.budget:
        missed = f" (the budget of {config.budget:g} is missed)"
    say(f"\nvalidation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
        f"{result['bits_per_byte']:.4f} bits per byte\nmean latent steps {result['val_steps']:.3f} of "
        f"{most}{missed}; {result['tokens']:,} tokens, {result['flops']:.3e} training FLOPs, "
        f"{at.seconds / 60:.1f} minutes\nnext: python sample.py {shlex.quote(str(out))} \"def \"")
    return result


def main() -> None:
    with ends_with_the_others():
        config = configure(Train, default=TINY)
        check_typed(unread(config))
        _, micro = shares(config)
        lower = f"less than --micro_batch_size={micro}, " if micro > 1 else ""
        with enough_memory(f"give {lower}--checkpointing or, on several GPUs, --shard: results differ by "
                           "rounding only (but for mor's balancing loss), also with --resume; else take a "
                           "smaller model"):
            train(config)
    if dist.is_initialized():  # not in train: DDP must be gone first, or its end waits for gloo's thread
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
