"""Masters and the proximal step on them, for each wrapper that fairseq puts around an optimizer."""

from argparse import Namespace
from dataclasses import asdict
from functools import partial

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim import AMPOptimizer, FairseqBMUF, FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.optim import build_optimizer as build_fairseq_optimizer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fairseq_autosize.groups import dead_neurons, feed_forward_in_model
from fairseq_autosize.masters import find_masters, precision_state, restore_precision
from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.proximal_optimizer import GroupShape, ProximalOptimizer
from fairseq_autosize.strength import Plan

LEARNING_RATE = 0.25
ADAM = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.activation_fn = torch.relu

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Model(nn.Module):
    """Two layers where feed_forward_in_model looks for them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.encoder.layers:
            x = layer(x)
        return x


def whole_config(**optimizer: object) -> DictConfig:
    """fairseq's configuration with an optimizer, SGD if not said otherwise."""
    cfg = OmegaConf.create(asdict(FairseqConfig()))
    cfg.common.fp16_init_scale = 4
    sgd = {"_name": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    cfg.optimizer = {"lr": [LEARNING_RATE], **(optimizer or sgd)}
    cfg.optimization.lr = [LEARNING_RATE]
    return cfg


def build(mode: str, monkeypatch: pytest.MonkeyPatch):
    """A model and its optimizer as fairseq's trainer builds them."""
    torch.manual_seed(1)
    model = Model()
    cfg = whole_config()
    if mode == "fp32":
        return model, build_fairseq_optimizer(cfg.optimizer, list(model.parameters()))
    model = model.bfloat16() if mode == "bf16" else model.half()
    cfg.common.bf16 = mode == "bf16"
    cfg.common.fp16_no_flatten_grads = mode != "fp16-flat"
    if mode == "fp16-flat":
        # The device's number is a key of the flat tensors; a CPU parameter has none.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return model, FP16Optimizer.build_optimizer(cfg, list(model.parameters()))


MODES = ["fp32", "fp16", "fp16-flat", "bf16"]


@pytest.mark.parametrize("mode", MODES)
def test_masters_hold_the_values_of_their_parameters(mode, monkeypatch):
    model, optimizer = build(mode, monkeypatch)
    masters = find_masters(optimizer, list(model.parameters()))
    assert len(masters) == len(list(model.parameters()))
    for parameter, master in masters.items():
        assert master.tensor.dtype == torch.float32
        assert torch.equal(master.tensor, parameter.float())
        assert master.group_index == 0


@pytest.mark.parametrize("mode", MODES)
def test_masters_are_what_the_optimizer_updates(mode, monkeypatch):
    model, optimizer = build(mode, monkeypatch)
    masters = find_masters(optimizer, list(model.parameters()))
    for master in masters.values():
        master.tensor.data.fill_(0.5)  # must reach the model with the next step without gradient
    optimizer.zero_grad()
    optimizer.backward(model(torch.zeros(1, 4, dtype=next(model.parameters()).dtype)).sum() * 0)
    optimizer.step()
    assert all(bool((p == 0.5).all()) for p in model.parameters())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", MODES)
def test_step_is_the_inner_step_and_then_the_prox(mode, operator, monkeypatch):
    model, optimizer = build(mode, monkeypatch)
    twin, twin_optimizer = build(mode, monkeypatch)
    strength = 2.4 if operator == "l21" else 4.0
    proximal = ProximalOptimizer(
        optimizer, feed_forward_in_model(model), OPERATORS[operator], Plan(strength)
    )
    x = torch.linspace(-1, 1, 12, dtype=next(model.parameters()).dtype).view(3, 4)
    for some_model, some_optimizer, step in (
        (model, optimizer, lambda: proximal.step(0)),
        (twin, twin_optimizer, twin_optimizer.step),
    ):
        some_optimizer.zero_grad()
        some_optimizer.backward(some_model(x).square().sum())
        step()
    masters = find_masters(optimizer, list(model.parameters()))
    expected = find_masters(twin_optimizer, list(twin.parameters()))
    for layer, twin_layer in zip(model.encoder.layers, twin.encoder.layers, strict=True):
        weight = expected[twin_layer.fc1.weight].tensor.detach().clone()
        bias = expected[twin_layer.fc1.bias].tensor.detach().clone()
        OPERATORS[operator].prox_(weight, strength * LEARNING_RATE, bias=bias)
        assert torch.equal(masters[layer.fc1.weight].tensor, weight)
        assert torch.equal(masters[layer.fc1.bias].tensor, bias)
        assert 0 < int(dead_neurons(weight).sum()) < 6, "the case must kill some and not all"
        # The model holds the master, rounded to its dtype.
        assert torch.equal(layer.fc1.weight, weight.to(layer.fc1.weight.dtype))
        assert torch.equal(layer.fc1.bias, bias.to(layer.fc1.bias.dtype))
        assert torch.equal(dead_neurons(layer.fc1.weight), dead_neurons(weight))
        # Nothing else is touched.
        assert torch.equal(layer.fc2.weight, twin_layer.fc2.weight)
        assert torch.equal(layer.fc2.bias, twin_layer.fc2.bias)
    assert proximal.threshold == strength * LEARNING_RATE


def test_half_precision_needs_the_master(monkeypatch):
    """Thresholds far below half an ulp of the fp16 weights add up on the masters."""
    model, optimizer = build("fp16", monkeypatch)
    layers = feed_forward_in_model(model)
    proximal = ProximalOptimizer(optimizer, layers, OPERATORS["l21"], Plan(1.0, 1e-5))
    before = proximal.dual_norms()
    for update in range(100):
        optimizer.zero_grad()
        optimizer.backward(model(torch.zeros(1, 4).half()).sum() * 0)
        proximal.step(update)
    assert torch.allclose(before - proximal.dual_norms(), torch.full((12,), 1e-3), rtol=1e-2)
    naive = feed_forward_in_model(build("fp16", monkeypatch)[0])[0].fc1_weight.detach().clone()
    untouched = naive.clone()
    for _ in range(100):
        OPERATORS["l21"].prox_(naive, 1e-5)
    assert torch.equal(naive, untouched), "the naive way loses every step"


def test_options_of_the_step(monkeypatch):
    model, optimizer = build("fp32", monkeypatch)
    layers = feed_forward_in_model(model)
    bias = layers[0].fc1_bias.detach().clone()
    proximal = ProximalOptimizer(
        optimizer,
        layers,
        OPERATORS["l21"],
        Plan(strength=100.0, step_size=1.0, start_update=2),
        GroupShape(bias=False),
    )
    for update, dead in ((0, 0), (1, 0), (2, 6)):
        proximal.step(update)
        assert int(dead_neurons(layers[0].fc1_weight).sum()) == dead
    assert torch.equal(layers[0].fc1_bias, bias), "the bias is not part of the group"
    assert proximal.penalty() == 0.0


@pytest.mark.parametrize("operator", OPERATORS)
def test_scale_multiplies_the_threshold_of_its_block(operator, monkeypatch):
    model, optimizer = build("fp32", monkeypatch)
    layers = feed_forward_in_model(model)
    expected = [(x.fc1_weight.detach().clone(), x.fc1_bias.detach().clone()) for x in layers]
    scales = {"encoder.layers.1": 3.0}
    proximal = ProximalOptimizer(
        optimizer, layers, OPERATORS[operator], Plan(0.2, 1.0), scales=scales
    )
    penalties = [float(OPERATORS[operator].penalty(*rows)) for rows in expected]
    assert proximal.penalty() == pytest.approx(penalties[0] + 3 * penalties[1])
    optimizer.zero_grad()
    proximal.step(0)
    for layer, (weight, bias), threshold in zip(layers, expected, (0.2, 0.6), strict=True):
        OPERATORS[operator].prox_(weight, threshold, bias=bias)
        assert torch.allclose(layer.fc1_weight, weight, atol=1e-7)
        assert torch.allclose(layer.fc1_bias, bias, atol=1e-7)


def test_every_parameter_group_has_its_own_learning_rate(monkeypatch):
    model, _ = build("fp32", monkeypatch)
    first, second = model.encoder.layers
    for layer, name in ((first, "slow"), (second, "fast")):
        for parameter in layer.parameters():
            parameter.param_group = name
    sgd = {"_name": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    groups = {
        name: {"optimizer": sgd | {"lr": [lr]}, "lr_scheduler": {"_name": "fixed"}}
        for name, lr in (("slow", 0.0), ("fast", 9.0))
    }
    cfg = OmegaConf.create({"_name": "composite", "groups": groups, "dynamic_groups": False})
    optimizer = build_fairseq_optimizer(cfg, list(model.parameters()))
    for group, lr in zip(optimizer.param_groups, (0.0, 9.0), strict=True):
        group["lr"] = lr
    ProximalOptimizer(optimizer, feed_forward_in_model(model), OPERATORS["l21"], Plan(1.0)).step(0)
    assert [int(dead_neurons(x.fc1.weight).sum()) for x in (first, second)] == [0, 6]


def test_frozen_layers_are_left_alone_and_named(monkeypatch):
    model, _ = build("fp32", monkeypatch)
    model.encoder.layers[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_fairseq_optimizer(whole_config().optimizer, trained)
    proximal = ProximalOptimizer(
        optimizer, feed_forward_in_model(model), OPERATORS["l21"], Plan(100.0)
    )
    proximal.step(0)
    assert proximal.frozen_blocks == ["encoder.layers.0"]
    dead = [int(dead_neurons(x.fc1_weight).sum()) for x in feed_forward_in_model(model)]
    assert dead == [0, 6]


def test_optimizer_without_a_learning_rate_needs_a_constant(monkeypatch):
    model, optimizer = build("fp32", monkeypatch)
    layers = feed_forward_in_model(model)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    proximal = ProximalOptimizer(optimizer, layers, OPERATORS["l21"], Plan(1.0))
    optimizer.step = lambda: None  # as Adafactor with a relative step: the group has no rate
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match=r"--prox-step-size schedule: .* has no learning rate"):
        proximal.step(0)


def test_wrappers_without_a_usable_master_are_refused(monkeypatch):
    model, inner = build("fp32", monkeypatch)
    cfg = whole_config(**ADAM)
    parameters = list(model.parameters())
    bmuf = Namespace(block_lr=1.0, block_momentum=0.9, warmup_iterations=1, global_sync_iter=1)
    bmuf.use_nbm, bmuf.average_sync, bmuf.distributed_world_size = False, False, 1
    wrappers = (
        MemoryEfficientFP16Optimizer.build_optimizer(cfg, parameters),
        FairseqBMUF(bmuf, inner),
    )
    for wrapper in wrappers:
        with pytest.raises(TypeError, match=type(wrapper).__name__):
            find_masters(wrapper, parameters)


def test_step_that_amp_skips_shrinks_nothing(monkeypatch):
    """Nor does it count for --prox-freeze-update auto."""
    scaler = partial(torch.amp.GradScaler, "cpu")
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", scaler)
    model, _ = build("fp32", monkeypatch)
    optimizer = AMPOptimizer.build_optimizer(whole_config(**ADAM), list(model.parameters()))
    plan = Plan(strength=0.5, step_size=1.0, patience=1)
    proximal = ProximalOptimizer(
        optimizer, feed_forward_in_model(model), OPERATORS["l21"], plan, GroupShape()
    )
    for loss_factor, updated in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = [p.detach().clone() for p in model.parameters()]
        state = proximal.state()
        optimizer.zero_grad()
        optimizer.backward(model(torch.ones(1, 4)).sum() * loss_factor)
        optimizer.clip_grad_norm(0)
        assert proximal.step(0) == updated
        same = all(map(torch.equal, before, model.parameters()))
        assert same != updated
        assert proximal.state() == state or updated
    resumed = AMPOptimizer.build_optimizer(whole_config(**ADAM), list(model.parameters()))
    restore_precision(resumed, precision_state(optimizer))
    assert resumed.scaler.get_scale() == optimizer.scaler.get_scale() == 2  # half of what it was
    assert resumed.scaler.state_dict() == optimizer.scaler.state_dict()


def test_adams_metric_has_nothing_of_the_loss_scale(monkeypatch):
    """fairseq's own step with --amp divides the gradients by the scale a second time."""
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu"))
    metrics = []
    for scale in (1, 2**16):
        model, _ = build("fp32", monkeypatch)
        cfg = whole_config(**ADAM)
        cfg.common.fp16_init_scale = scale
        optimizer = AMPOptimizer.build_optimizer(cfg, list(model.parameters()))
        blocks, plan = feed_forward_in_model(model), Plan(strength=1e-5, step_size=1.0)
        shape = GroupShape(adam=True)
        proximal = ProximalOptimizer(optimizer, blocks, OPERATORS["l21"], plan, shape)
        for update in range(3):
            optimizer.zero_grad()
            optimizer.backward(model(torch.ones(1, 4)).sum())
            optimizer.clip_grad_norm(0)
            assert proximal.step(update)
        found = find_masters(optimizer, [model.encoder.layers[0].fc1.weight])
        metrics.append(next(iter(found.values())).second_moment(optimizer.optimizer)[0])
    assert metrics[0].max() > 0
    torch.testing.assert_close(metrics[1], metrics[0])


@pytest.mark.parametrize("mode", ["fp16", "fp16-flat", "bf16"])
def test_masters_and_scaler_go_on_where_they_were(mode, monkeypatch):
    model, optimizer = build(mode, monkeypatch)
    proximal = ProximalOptimizer(
        optimizer, feed_forward_in_model(model), OPERATORS["l21"], Plan(1.0, 1e-4)
    )
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(1, 4, dtype=next(model.parameters()).dtype)).sum())
    proximal.step(0)
    state = precision_state(optimizer)
    state = {**state, "masters": [tensor.clone() for tensor in state["masters"]]}
    other, other_optimizer = build(mode, monkeypatch)
    untouched = [tensor.clone() for tensor in precision_state(other_optimizer)["masters"]]
    restore_precision(other_optimizer, state)  # which is of another model as yet
    assert all(map(torch.equal, untouched, precision_state(other_optimizer)["masters"]))

    other.load_state_dict(model.state_dict())
    other_optimizer.fp32_params = other_optimizer.build_fp32_params(
        None, other_optimizer.fp16_params, flatten=mode == "fp16-flat"
    )
    rounded = precision_state(other_optimizer)["masters"]
    assert not all(map(torch.equal, rounded, state["masters"]))
    restore_precision(other_optimizer, state)
    restored = precision_state(other_optimizer)
    assert all(map(torch.equal, restored["masters"], state["masters"]))
    assert ("scaler" in state) == (mode != "bf16")
    assert restored.get("scaler") == state.get("scaler")
    if mode != "bf16":
        assert state["scaler"]["_iter"] == 1
