"""Checks every update of a real training, inside its process, against a naive reference.

For ``run_program(..., path=TESTS, first=checked(file))``: it wraps fairseq's trainer before the
program starts and imports nothing of the package. A wrong update ends the program.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from fairseq.trainer import Trainer

TESTS = Path(__file__).parent
FC1 = re.compile(r".*\.layers\.\d+\.fc1\.weight")


def checked(file: Path) -> str:
    """The code that makes a program check its updates, and keep a summary of them in `file`."""
    return f"import step_checker; step_checker.install({str(file)!r})\n"


def masters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The fp32 tensors that the optimizer moves, by their parameters' names."""
    names = {parameter: name for name, parameter in trainer.get_model().named_parameters()}
    halves = getattr(trainer.optimizer, "fp16_params", None)
    if halves is None:
        return {name: parameter.data for parameter, name in names.items()}
    fulls = trainer.optimizer.fp32_params
    if isinstance(fulls, dict):  # flat: one tensor with all parameters in their order
        (flat,) = fulls.values()
        fulls = flat.data.split([half.numel() for half in halves])
    found = {n: p.data for p, n in names.items() if not p.requires_grad}
    for half, full in zip(halves, fulls, strict=True):
        found[names[half]] = full.data.view(half.shape)
    return found


def prox(weight: torch.Tensor, bias: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...]:
    """The l2,1 step on rows of (weight, bias), in float64."""
    rows = torch.cat([weight.double(), bias.double()[:, None]], dim=1)
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows * (norms - threshold).clamp_min(0) / norms.clamp_min(1e-300)
    return rows[:, :-1], rows[:, -1]


class StepChecker:
    """What the updates of one trainer must have done."""

    def __init__(self, trainer: Trainer, file: str) -> None:
        self.trainer, self.file = trainer, Path(file)
        self.summary = {"updates": 0, "skipped": 0, "rates": [], "dead": [], "hashes": []}
        self.steps = 0
        self.whole_step, trainer.task.optimizer_step = trainer.task.optimizer_step, self.step

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in masters_of(self.trainer).items()}

    def step(self, optimizer, model, update_num):
        """Stands in for the task's optimizer_step, and looks at what is there after each part."""
        self.steps += 1
        between = []
        inner = type(optimizer).step

        def inner_step(*arguments, **options):
            inner(optimizer, *arguments, **options)
            between.append(self.snapshot())

        rate = next(iter(optimizer.param_groups))["lr"]
        before, optimizer.step = self.snapshot(), inner_step
        try:
            self.whole_step(optimizer, model, update_num)
        finally:
            del optimizer.step
        (middle,) = between
        skipped = all(torch.equal(before[name], middle[name]) for name in before) and rate > 0
        strength = self.trainer.cfg.task.prox_strength
        if strength is not None:  # not given on the way to a target
            self.check(middle, 0.0 if skipped else rate * strength)
        self.note(skipped, rate)

    def check(self, middle: dict[str, torch.Tensor], threshold: float) -> None:
        """The masters are the prox of `middle` and nothing else; the model is the masters."""
        after = masters_of(self.trainer)
        wanted = dict(middle)
        parameters = dict(self.trainer.get_model().named_parameters())
        for name in filter(FC1.fullmatch, middle):
            bias = name.replace("weight", "bias")
            if parameters[name].requires_grad and threshold:
                wanted[name], wanted[bias] = prox(middle[name], middle[bias], threshold)
        for name, tensor in after.items():
            assert tensor.dtype == torch.float32 or not parameters[name].requires_grad, name
            if wanted[name] is middle[name]:
                assert torch.equal(tensor, middle[name]), f"{name} was touched"
            else:
                same = torch.allclose(tensor.double(), wanted[name], rtol=1e-4, atol=1e-7)
                assert same, f"{name}: other values"
                assert torch.equal(tensor == 0, wanted[name] == 0), f"{name}: other zeros"
            own = parameters[name]
            assert torch.equal(own.data, tensor.to(own.dtype)), f"{name}: the model differs"

    def note(self, skipped: bool, rate: float) -> None:
        masters = masters_of(self.trainer)
        dead = [
            int(((masters[n] == 0).all(dim=1) & (masters[n.replace("weight", "bias")] == 0)).sum())
            for n in filter(FC1.fullmatch, masters)
        ]
        digest = hashlib.sha256()
        for tensor in masters.values():
            digest.update(tensor.contiguous().numpy().tobytes())
        self.summary["hashes"].append(digest.hexdigest())
        self.summary["skipped" if skipped else "updates"] += 1
        self.summary["rates"].append(rate)
        self.summary["dead"].append(sum(dead))
        self.file.write_text(json.dumps(self.summary))


def install(file: str) -> None:
    """Check all updates of the trainers of this process from now on."""
    train_step = Trainer.train_step

    def checked_train_step(self, samples, raise_oom=False):
        checker = self.__dict__.setdefault("_step_checker", None) or StepChecker(self, file)
        self._step_checker = checker
        before, steps, updates = checker.snapshot(), checker.steps, self.get_num_updates()
        result = train_step(self, samples, raise_oom)
        if checker.steps == steps:  # an overflow, after which the optimizer must not step
            checker.check(before, 0.0)
            assert self.get_num_updates() == updates
            checker.note(True, 0.0)
        return result

    Trainer.train_step = checked_train_step
