"""One engine with one model, in a process of its own: bench_inference.py starts it and asks.

    python scripts/inference_worker.py '{"engine": "fairseq", "model": "small.pt", ...}'

Each line on standard input asks for one measurement, `{"beam": 5, "batch": 1, "calls": 8}`, and is
answered by one line of JSON. torch is imported where fairseq needs it and not at the top, so that
it does not count in CTranslate2's memory.
"""

import json
import os
import random
import re
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

Sentences = list[list[int]]  # numbers from 0 on of the vocabulary's words


def word(number: int) -> str:
    """How a word is written in the vocabulary."""
    return f"w{number}"


class Fairseq:
    """fairseq's beam search, on a model that is loaded and prepared as fairseq-generate does."""

    def __init__(self, path: str, length: int) -> None:
        import torch
        from fairseq import checkpoint_utils

        import fairseq_autosize  # noqa: F401 - registers the architectures with widths

        torch.set_num_threads(1)
        (self.model,), _, self.task = checkpoint_utils.load_model_ensemble_and_task([path])
        self.length = length
        self.torch = torch

    def prepare(self, beam: int) -> None:
        if not self.model._is_generation_fast:
            self.model.prepare_for_inference_(Namespace(generation=Namespace(beam=beam)))
            self.model.eval()
        options = {"min_len": self.length, "max_len_a": 0, "max_len_b": self.length}
        self.generator = self.task.build_generator([self.model], Namespace(beam=beam, **options))

    def indices(self, sentences: Sentences) -> Any:
        """A batch of fairseq's indices, with the end of the sentence."""
        words = self.task.source_dictionary
        end = [words.eos()]
        rows = [[words.nspecial + number for number in sentence] + end for sentence in sentences]
        return self.torch.tensor(rows)

    def run(self, sentences: Sentences) -> list[int]:
        """Translate; returns the lengths, the end included."""
        tokens = self.indices(sentences)
        lengths = self.torch.full((len(tokens),), tokens.shape[1])
        sample = {"net_input": {"src_tokens": tokens, "src_lengths": lengths}}
        found = self.task.inference_step(self.generator, [self.model], sample)
        return [len(hypotheses[0]["tokens"]) for hypotheses in found]


class FairseqTraining(Fairseq):
    """Updates of the model: forward, backward, a step of Adam; the target is the source."""

    def __init__(self, path: str, length: int) -> None:
        super().__init__(path, length)
        self.optimizer = self.torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def prepare(self, beam: int) -> None:
        self.model.train()

    def run(self, sentences: Sentences) -> list[int]:
        tokens = self.indices(sentences)
        lengths = self.torch.full((len(tokens),), tokens.shape[1])
        self.optimizer.zero_grad()
        logits, _ = self.model(tokens, lengths, tokens.roll(1, 1))  # the end comes first
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        self.optimizer.step()
        return lengths.tolist()


class CTranslate2:
    """CTranslate2's beam search; the computation is done in its own thread."""

    def __init__(self, path: str, length: int) -> None:
        import ctranslate2

        options = {"device": "cpu", "inter_threads": 1, "intra_threads": 1}
        self.translator = ctranslate2.Translator(path, **options)
        self.steps = length + 1  # it does not count the end, fairseq does

    def prepare(self, beam: int) -> None:
        lengths = {"min_decoding_length": self.steps, "max_decoding_length": self.steps}
        self.options = {"beam_size": beam, **lengths}

    def run(self, sentences: Sentences) -> list[int]:
        sources = [[word(number) for number in sentence] for sentence in sentences]
        found = self.translator.translate_batch(sources, **self.options)
        return [len(result.hypotheses[0]) for result in found]


ENGINES = {
    "fairseq": Fairseq,
    "CTranslate2 float32": CTranslate2,
    "CTranslate2 int8": CTranslate2,
    "fairseq training": FairseqTraining,
}


def peak_memory() -> int:
    """The most bytes that this process had in memory at a time."""
    # ru_maxrss does not start at zero with a program: it has what the parent had at the fork.
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    # What fairseq prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    length = config["length"]
    engine = ENGINES[config["engine"]](config["model"], length)
    for line in sys.stdin:
        request = json.loads(line)
        chooser = random.Random(config["seed"])
        engine.prepare(request["beam"])
        times = {"cpu": [], "wall": []}
        for _ in range(request["calls"]):
            batch = [
                [chooser.randrange(config["words"]) for _ in range(length)]
                for _ in range(request["batch"])
            ]
            wall, cpu = time.perf_counter(), time.process_time()
            lengths = engine.run(batch)
            times["cpu"].append(time.process_time() - cpu)
            times["wall"].append(time.perf_counter() - wall)
            if lengths != [length + 1] * request["batch"]:
                raise ValueError(f"targets of {lengths} tokens, not {length + 1}")
        print(json.dumps(times | {"peak": peak_memory()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
