"""The adapter for lm-evaluation-harness: its tasks, metrics and tables, on what score.py says.

What is notable here:
* Texts are encoded, cut and stopped as by the harness's own Hugging Face model: equal weights, equal results.
* An answer depends on its request alone, not on the batch size or other requests, also when it is sampled.
* Each task has a Tally of its own, which joins the harness's table: latent steps and FLOPs per token.
"""

import difflib
import itertools
import logging
import os
import random
import zlib
from collections import Counter, defaultdict
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch

from common import BadInput, optional, reason
from model import LLaMA
from page import bytes_of
from score import Tally, score, windows

optional("lm_eval", "--tasks")
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of lm-eval: what is forked beside threads may wait for ever
try:
    from lm_eval import evaluate
    from lm_eval.api.model import LM
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise BadInput(f"--tasks needs a newer lm-eval: pip install -U lm-eval ({reason(error)})") from None

PLAIN = ("lambada_openai", "lambada_standard", "arc_easy", "piqa", "winogrande", "sciq", "race")
NORMALIZED = ("arc_challenge", "hellaswag")  # averaged by acc_norm, as is customary; the paper does not say
PAPER = dict.fromkeys(PLAIN, "acc,none") | dict.fromkeys(NORMALIZED, "acc_norm,none")  # its nine tasks


class Harness(LM):
    """A model as the harness wants it; `tallies`: what each task took."""

    def __init__(self, model: LLaMA, tokenizer, batch_size: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.end = tokenizer.eot_token  # also what a text without a context begins behind
        self.tallies = defaultdict(Tally)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, never empty. As in the harness, the continuation's are those of the joined text
        after as many as the context has. Where a token spans the join, that may be none: encoded by itself.
        """
        encode = self.tokenizer.encode_ordinary
        before = encode(context.rstrip())  # spaces at the join belong to the continuation
        after = encode(context + continuation)[len(before) :]
        after = after or encode(context[len(context.rstrip()) :] + continuation)
        return before or [self.end], after or [self.end]  # an empty continuation asks whether the text ends

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, would greedy decoding say it) of each (context, continuation)."""
        return self.score_all(requests, [self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        pairs = [([self.end], self.tokenizer.encode_ordinary(request.args[0])) for request in requests]
        return [total for total, _ in self.score_all(requests, pairs)]

    def score_all(self, requests: list, pairs: list) -> list[tuple[float, bool]]:
        """(log p, greedy) of pairs of tokens. What is too long loses its left end, or is scored in pieces."""
        answers, most = [], self.model.config.block_size
        for task, part in itertools.groupby(zip(requests, pairs), key=lambda both: both[0].task_name):
            cut = []
            for _, (before, after) in part:
                cut.append([*windows(np.array([*before, *after], np.uint32), len(before), most, most)])
            every = list(itertools.chain(*cut))
            scores = iter(score(self.model, every, self.batch_size, self.tallies[task], task))
            for pieces in cut:
                nats, right, _ = torch.cat([torch.zeros(3, 0), *itertools.islice(scores, len(pieces))], 1)
                answers.append((-nats.double().sum().item(), bool(right.all())))
        return answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continues each (prompt, settings) until one of its stop strings."""
        kinds, asked, seeds = defaultdict(list), Counter(), []
        for i, request in enumerate(requests):
            task, (prompt, settings) = request.task_name, request.args
            kinds[task, repr(settings)].append(i)
            seeds.append(zlib.crc32(prompt.encode()) + asked[task, prompt])  # what comes again draws anew
            asked[task, prompt] += 1
        texts = {}
        for members in kinds.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                said = self.go_on([requests[i] for i in batch], [seeds[i] for i in batch])
                texts.update(zip(batch, said))
        return [texts[i] for i in range(len(requests))]

    def go_on(self, requests: list, seeds: list[int]) -> list[str]:
        """The texts that follow prompts of one task with the same settings, each drawn with its own seed."""
        task, settings = requests[0].task_name, normalize_gen_kwargs(requests[0].args[1])
        until = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode([self.end]))
        most, context = settings["max_gen_toks"], self.model.config.block_size
        room = context - most if most < context else context  # for a prompt, as the harness has it
        prompts = [self.tokenizer.encode_ordinary(request.args[0]) or [self.end] for request in requests]
        prompts = [prompt[-room:] for prompt in prompts]
        dials = settings.get("temperature", 0.0), settings.get("top_k"), settings.get("top_p"), seeds
        texts, said, going = [b""] * len(prompts), [[] for _ in prompts], {*range(len(prompts))}
        try:
            for new in self.model.generate(prompts, most, *dials, stop=self.end):
                for row, token in zip(new.row.tolist(), new.token.tolist()):
                    if row in going:
                        said[row].append(token)
                        texts[row] += bytes_of(self.tokenizer, token)
                        if any(stop.encode() in texts[row] for stop in until if stop):
                            going.remove(row)
                if not going:
                    break
        except ValueError as error:  # settings that make no sense
            raise BadInput(f"--tasks: {task}: {reason(error)}") from None
        self.score_all(requests, [*zip(prompts, said)])  # tallies what that took: as much as reading it
        return [postprocess_generated_text(text.decode("utf-8", "replace"), until, None) for text in texts]


def find_tasks(names: list[str], include_path: str) -> TaskManager:
    """The harness's TaskManager that knows the names. Raises BadInput for unknown tasks and broken files."""
    if include_path and not Path(include_path).is_dir():
        raise BadInput(f"--include_path {include_path} is not a folder; it wants one of task files (.yaml)")
    log = logging.getLogger("lm_eval")
    handler = logging.Handler()
    records = []
    handler.emit = records.append  # the harness tells only its log which files it leaves out
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    for defaults in (False, True) if include_path else (True,):  # to index its own takes ten seconds
        manager = TaskManager(include_path=include_path or None, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
        for record in records:
            if "Skip" in record.msg and "Unknown config shape" not in str(record.args):  # which is to include
                raise BadInput(f"--tasks: {record.args[0]} is not a task file: {reason(record.args[1])}")
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, 1, 0)[0]
    raise BadInput(f"--tasks: there is no task {unknown[0]!r}; did you mean {close!r}? "
                   "--include_path names a folder of more")


def accuracy(model: LLaMA, tokenizer, config) -> tuple[dict, str]:
    """The tasks of config, an Eval, once for each num_fewshot → the harness's results, and its tables."""
    names = [task for name in config.tasks for task in (PAPER if name == "paper" else [name])]
    manager = find_tasks(names, config.include_path)
    found = {}
    shown = ""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for shots in config.num_fewshot:
        random.seed(DEFAULT_RANDOM_SEED)  # all seeds as the harness's own command sets them
        np.random.seed(DEFAULT_OTHER_SEED)
        loaded = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            try:
                one = manager.load([name])
            except Exception as error:  # whatever the hub, the network or the task's own file did
                raise BadInput(f"--tasks: {name} cannot be loaded ({type(error).__name__}: {reason(error)}); "
                               "without network it wants data in files or in the cache of datasets") from None
            loaded = {part: loaded[part] | one[part] for part in loaded}
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") != 0:  # a task whose file says 0 is never given examples
                task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        harness = Harness(model, tokenizer, config.batch_size)
        try:
            results = evaluate(harness, loaded, limit=config.limit, log_samples=False)
        except ValueError as error:  # random.sample's, of too few examples; others are not the user's
            if "larger than population" not in str(error):
                raise
            raise BadInput(f"--num_fewshot={shots}: a task has fewer examples; want less") from None
        for task, tally in harness.tallies.items():  # as rows of the harness's table
            results["results"][task] |= {f"{key},none": value for key, value in tally.summary().items()}
        total = Tally(*map(sum, zip(*map(astuple, harness.tallies.values())))).summary()
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        found[shots] = {key: results[key] for key in kept if key in results} | total
        groups = make_table(results, "groups") if results.get("groups") else ""
        shown += (f"\n\n{shots}-shot\n{make_table(results)}{groups}\n"
                  f"all tasks: {total['latent_steps']:.3f} latent steps per scored token, "
                  f"{total['flops_per_token']:.4e} forward FLOPs per token")
        if PAPER.keys() <= results["results"].keys():
            average = sum(results["results"][task][metric] for task, metric in PAPER.items()) / len(PAPER)
            found[shots]["average"] = average
            shown += (f"\naverage accuracy of the paper's nine: {100 * average:.2f} % "
                      "(acc_norm for arc_challenge and hellaswag)")
    return found, shown
