"""Control: targets, the freeze and the refit, coupled groups, and steps in Adam's metric."""

import copy
import logging

import pytest
import torch
from fairseq.optim import build_optimizer as build_fairseq_optimizer
from test_proximal_optimizer import LEARNING_RATE, MODES, Model, build, whole_config
from torch import nn

from fairseq_autosize import prox
from fairseq_autosize.groups import FeedForward, dead_neurons, feed_forward_in_model
from fairseq_autosize.masters import find_masters
from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.proximal_optimizer import GroupShape, ProximalOptimizer
from fairseq_autosize.strength import Goal, Plan, threshold_toward

GROUPS = 12  # of the small model
ADAM = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0}
ADAM |= {"fp16_adam_stats": False, "use_old_adam": False, "tpu": False}


def backward(model: nn.Module, optimizer: object, update: int) -> None:
    """A gradient that differs from update to update, always the same for one update."""
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(8, 4, generator=generator).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    optimizer.backward((model(x) - x.flip(1)).square().mean())


def adam_model(**options: object):
    torch.manual_seed(1)
    model = Model()
    cfg = whole_config(**ADAM, **options)
    cfg.optimizer.lr = [0.02]
    return model, build_fairseq_optimizer(cfg.optimizer, list(model.parameters()))


def dead_in(model: nn.Module) -> int:
    return sum(int(dead_neurons(layer.fc1_weight).sum()) for layer in feed_forward_in_model(model))


def controlled(model, optimizer, operator="l21", share=0.5, freeze=9, shape=None, **plan):
    proximal = ProximalOptimizer(
        optimizer,
        feed_forward_in_model(model),
        OPERATORS[operator],
        Plan(freeze_update=freeze, **plan),
        shape or GroupShape(),
    )
    if share is not None:
        proximal.aim_at([Goal(round(share * GROUPS), (1, 1))])
    return proximal


def test_threshold_toward_kills_at_the_last_update_whatever_gradients_add():
    norm, history = 1.0, []
    for left in range(20, 0, -1):
        norm += 0.01 * (left % 3)
        history.append(threshold_toward(norm, left))
        norm -= history[-1]
        assert (norm <= 1e-12) == (left == 1)
    assert max(history) < 2 * min(history), "a smooth ramp"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", MODES)
def test_target_is_met_exactly_at_the_freeze(mode, operator, share, monkeypatch):
    model, optimizer = build(mode, monkeypatch)
    proximal = controlled(model, optimizer, operator, share)
    wanted = round(share * GROUPS)
    for update in range(14):
        backward(model, optimizer, update)
        proximal.step(update)
        assert dead_in(model) <= wanted
        if update + 1 >= 9:
            assert dead_in(model) == wanted
    masters = find_masters(optimizer, list(model.parameters()))
    for parameter, master in masters.items():
        assert torch.equal(parameter, master.tensor.to(parameter.dtype))


@pytest.mark.parametrize("operator", OPERATORS)
def test_target_is_met_with_adam_coupled_and_in_its_metric(operator):
    for fc2 in (False, True):
        for adam in (False, True):
            model, optimizer = adam_model()
            shape = GroupShape(fc2=fc2, adam=adam)
            proximal = controlled(model, optimizer, operator, 0.6, 30, shape)
            counts = []
            for update in range(40):
                backward(model, optimizer, update)
                proximal.step(update)
                counts.append(dead_in(model))
            assert counts[29:] == [7] * 11 and max(counts) == 7, (fc2, adam, counts)


def test_threshold_of_an_update_is_what_the_target_needs():
    """Without gradients all lose t, which is the norm of the last one to die over what is left."""
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, share=0.5, freeze=12, start_update=2)
    for update in range(12):
        before = proximal.dual_norms().sort().values
        optimizer.zero_grad()
        proximal.step(update)
        lost = before - proximal.dual_norms().sort().values
        if update < 2:
            assert bool((lost == 0).all())
        elif update < 11:
            assert proximal.threshold == pytest.approx(before[5] / (12 - update))
            assert torch.allclose(lost, before.clamp_max(proximal.threshold), atol=1e-6)
        else:
            assert bool((lost[6:] == 0).all()), "the last update only cuts"
    assert dead_in(model) == 6


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_layer_of_a_larger_scale_loses_its_groups_first(operator, adam):
    model, optimizer = adam_model()
    proximal = ProximalOptimizer(
        optimizer,
        feed_forward_in_model(model),
        OPERATORS[operator],
        Plan(freeze_update=30),
        GroupShape(adam=adam),
        {"encoder.layers.1": 1e3},
    )
    proximal.aim_at([Goal(8, (1, 1))])
    for update in range(31):
        backward(model, optimizer, update)
        proximal.step(update)
    assert [int(block.dead().sum()) for block in feed_forward_in_model(model)] == [2, 6]


def test_ties_do_not_overshoot():
    model, optimizer = adam_model()
    for layer in feed_forward_in_model(model):
        layer.fc1_weight.data.fill_(0.25)
        layer.fc1_bias.data.fill_(0.25)
    proximal = controlled(model, optimizer, share=0.5, freeze=4)
    for update in range(6):
        optimizer.zero_grad()
        proximal.step(update)
        assert dead_in(model) == (6 if update >= 3 else 0)


def test_costs_decide_how_many_have_to_die():
    """Of layers whose groups cost 1 and 5, as many of the smallest die as reach the amount."""
    model, optimizer = adam_model()
    first, second = feed_forward_in_model(model)
    for layer, size in ((first, 1.0), (second, 0.1)):
        layer.fc1_weight.data.fill_(size)
        layer.fc1_bias.data.fill_(0)
    proximal = controlled(model, optimizer, share=None, freeze=3)
    proximal.aim_at([Goal(32, (1, 5))])
    for update in range(3):
        optimizer.zero_grad()
        proximal.step(update)
    dead = [int(dead_neurons(layer.fc1_weight).sum()) for layer in (first, second)]
    assert dead == [2, 6]  # 6 * 5 + 2 * 1


@pytest.mark.parametrize(
    ("goals", "freeze", "message"),
    [
        ([Goal(6, (1, 1))], None, "no freeze_update"),
        ([Goal(6, (1,))], 9, r"goals are for \[1\] blocks; there are 2"),
        ([Goal(6, (1, 1))] * 2, 9, r"goals are for \[2, 2\] blocks"),
        ([], 9, r"goals are for \[\] blocks"),
    ],
)
def test_goals_that_do_not_fit_are_refused(goals, freeze, message):
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, share=None, freeze=freeze, strength=1.0)
    with pytest.raises(ValueError, match=message):
        proximal.aim_at(goals)
    assert proximal.goals == ()


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_layer_may_have_a_goal_of_its_own(operator):
    """Though the second layer's rows are all smaller, only its own smallest die."""
    model, optimizer = adam_model()
    layers = feed_forward_in_model(model)
    layers[1].fc1_weight.data.mul_(0.1)
    layers[1].fc1_bias.data.mul_(0.1)
    proximal = controlled(model, optimizer, operator, share=None, freeze=9)
    numbers = [layers[0].count // 2, layers[1].count // 4]
    proximal.aim_at([Goal(number, (1,)) for number in numbers])
    for update in range(12):
        backward(model, optimizer, update)
        proximal.step(update)
        dead = [int(dead_neurons(layer.fc1_weight).sum()) for layer in layers]
        assert all(n <= number for n, number in zip(dead, numbers, strict=True))
        assert update < 8 or dead == numbers


def test_freeze_holds_the_dead_and_frees_the_others():
    """After the freeze the survivors move as without any prox; the dead never again."""
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, share=0.5, freeze=5)
    for update in range(5):
        backward(model, optimizer, update)
        proximal.step(update)
    twin, twin_optimizer = adam_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for update in range(5, 25):
        backward(model, optimizer, update)
        proximal.step(update)
        backward(twin, twin_optimizer, update)
        twin_optimizer.step()
        if update == 5:  # Adam's momentum moves the twin's dead; the rest is still equal
            for layer, other in zip(*map(feed_forward_in_model, (model, twin)), strict=True):
                alive = ~dead_neurons(layer.fc1_weight)
                assert torch.equal(layer.fc1_weight[alive], other.fc1_weight[alive])
                assert torch.equal(layer.fc2_weight, other.fc2_weight)
        assert dead_in(model) == 6
    assert dead_in(twin) < 6, "without the mask they would have come back"
    assert proximal.threshold == 0


def test_freeze_with_a_fixed_strength(caplog):
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, share=None, freeze=20, strength=2.0)
    counts = []
    with caplog.at_level(logging.INFO):
        for update in range(40):
            backward(model, optimizer, update)
            proximal.step(update)
            counts.append(dead_in(model))
    assert 0 < counts[19] < GROUPS and counts[20:] == [counts[19]] * 20
    told = [r.message for r in caplog.records if "frozen after update 20" in r.message]
    assert told == [
        f"frozen after update 20: {counts[19]} of 12 groups are dead and stay so; the others are "
        "not shrunk any more"
    ]


def test_automatic_freeze_waits_for_its_patience_and_survives_a_restart():
    histories = []
    for restart in (None, 16, 25, 29):
        model, optimizer = adam_model()
        plan = {"share": None, "freeze": None, "strength": 1.5, "patience": 8}
        proximal = controlled(model, optimizer, **plan)
        counts, frozen = [], []
        for update in range(70):
            if update == restart:
                state = proximal.state()
                proximal = controlled(model, optimizer, **plan)
                proximal.restore(state)
            backward(model, optimizer, update)
            proximal.step(update)
            counts.append(dead_in(model))
            frozen.append(proximal.is_frozen(update + 1))
        histories.append((counts, frozen, model.state_dict()))
    counts, frozen, parameters = histories[0]
    assert frozen[-1] and counts[-1] > 0
    at = frozen.index(True)
    assert len(set(counts[at - 8 :])) == 1 and counts[at - 9] != counts[at - 8]
    for other in histories[1:]:
        assert other[:2] == (counts, frozen)
        assert all(torch.equal(parameters[name], other[2][name]) for name in parameters)


@pytest.mark.parametrize("died", [True, False])
def test_automatic_freeze_after_a_compaction_that_removed_the_dead(died):
    """None are dead any more, and none die: that something has died is all the same known."""
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, "l21", None, None, strength=1e-6, patience=8)
    proximal.restore({"prox_quiet_updates": 3 * died, "prox_died": int(died)})
    for update in range(10, 15):
        backward(model, optimizer, update)
        assert not proximal.is_frozen(update)
        proximal.step(update)
    assert proximal.is_frozen(15) == died


def test_automatic_freeze_does_not_take_rows_dead_from_the_start_for_its_own():
    """Of a model that was pruned before, or padded; nothing has died in this run as yet."""
    model, optimizer = adam_model()
    layer = feed_forward_in_model(model)[0]
    for part in (layer.fc1_weight, layer.fc1_bias):
        part.data[:2] = 0
    proximal = controlled(model, optimizer, "l21", None, None, strength=1e-6, patience=3)
    for update in range(8):
        backward(model, optimizer, update)
        proximal.step(update)
        assert dead_in(model) == 2 and not proximal.is_frozen(update + 1)
    layer.fc1_weight.data[2], layer.fc1_bias.data[2] = 1e-9, 0  # dies in the next step
    optimizer.optimizer.zero_grad()
    proximal.plan = Plan(strength=100.0, step_size=1e-8, patience=3)
    optimizer.set_lr(0.0)
    frozen = []
    for update in range(8, 13):
        proximal.step(update)
        frozen.append(proximal.is_frozen(update + 1))
    assert dead_in(model) == 3 and frozen == [False] * 3 + [True] * 2


def test_automatic_freeze_knows_of_deaths_before_it_was_asked_for():
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, "l21", None, None, strength=1.5)
    assert proximal.state()["prox_died"] == 0
    for update in range(20):
        backward(model, optimizer, update)
        proximal.step(update)
    assert 0 < dead_in(model) < GROUPS
    resumed = controlled(model, optimizer, "l21", None, None, strength=1e-6, patience=3)
    resumed.restore(proximal.state())
    for update in range(20, 40):
        backward(model, optimizer, update)
        resumed.step(update)
    assert resumed.is_frozen(40)


@pytest.mark.parametrize("update", [5, 9])
def test_resumed_at_or_beyond_the_freeze(update):
    """What is missing to the target is cut at once; what has been reached is left as it is."""
    model, optimizer = adam_model()
    proximal = controlled(model, optimizer, share=0.5, freeze=5)
    backward(model, optimizer, 0)
    proximal.step(update)
    assert dead_in(model) == 6


@pytest.mark.parametrize("adam", [False, True])
def test_momentum_takes_dead_relu_neurons_back_until_the_freeze(adam):
    """A zero row gets no gradient through relu, but Adam steps on with that of before."""
    model = Quadratic()
    cfg = whole_config(**ADAM)
    optimizer = build_fairseq_optimizer(cfg.optimizer, list(model.parameters()))
    weight = model.fc1.weight
    layer = FeedForward("x", "encoder-ffn", weight, None, torch.zeros(4, 1), torch.relu)
    plan = Plan(strength=0.6, freeze_update=30)
    proximal = ProximalOptimizer(optimizer, [layer], OPERATORS["l21"], plan, GroupShape(adam=adam))
    dead = []
    for update in range(60):
        optimizer.set_lr(0.1)
        weight.grad = (weight != 0).float()  # the loss falls with the weights, where there are any
        proximal.step(update)
        dead.append(bool(layer.dead()))
    came_back = [update for update in range(1, 60) if dead[update - 1] and not dead[update]]
    assert came_back and max(came_back) < 30
    assert len(set(dead[30:])) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_coupled_groups_are_rows_with_columns(operator):
    model, optimizer = adam_model()
    twin, twin_optimizer = adam_model()
    strength = {"l21": 30.0, "linf1": 61.0}[operator]
    shape = GroupShape(fc2=True)
    proximal = controlled(model, optimizer, operator, None, None, shape, strength=strength)
    for some_model, some_optimizer, step in (
        (model, optimizer, lambda: proximal.step(0)),
        (twin, twin_optimizer, twin_optimizer.step),
    ):
        backward(some_model, some_optimizer, 0)
        step()
    total = 0
    for layer, other in zip(*map(feed_forward_in_model, (model, twin)), strict=True):
        joined = torch.cat(
            [other.fc1_weight, other.fc1_bias[:, None], other.fc2_weight.t()], 1
        ).detach()
        scale = (9 / 5) ** OPERATORS[operator].growth  # a row with its column has 9 entries
        OPERATORS[operator].prox_(joined, scale * strength * 0.02)
        assert torch.allclose(layer.fc1_weight, joined[:, :4], atol=1e-7)
        assert torch.allclose(layer.fc1_bias, joined[:, 4], atol=1e-7)
        assert torch.allclose(layer.fc2_weight.t(), joined[:, 5:], atol=1e-7)
        dead = dead_neurons(layer.fc1_weight)
        assert torch.equal(dead, (joined == 0).all(1))
        assert bool((layer.fc2_weight[:, dead] == 0).all())
        total += int(dead.sum())
    assert 0 < total < GROUPS


# --- Adam's metric ------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mode", MODES)
def test_metric_is_what_adam_divides_by(mode, operator, monkeypatch):
    """The step equals Adam's and then the prox with D taken from Adam's own formula."""
    torch.manual_seed(1)
    cfg = whole_config(**ADAM)
    cfg.common.bf16, cfg.common.fp16_no_flatten_grads = mode == "bf16", mode != "fp16-flat"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Model()
        if mode == "fp32":
            optimizer = build_fairseq_optimizer(cfg.optimizer, list(model.parameters()))
        else:
            from fairseq.optim import FP16Optimizer

            model = model.bfloat16() if mode == "bf16" else model.half()
            optimizer = FP16Optimizer.build_optimizer(cfg, list(model.parameters()))
        runs.append((model, optimizer))
    (model, optimizer), (twin, twin_optimizer) = runs
    strength, updates = {"l21": 0.05, "linf1": 0.1}[operator], 3
    plan = {"strength": strength, "start_update": updates - 1}
    proximal = controlled(model, optimizer, operator, None, None, GroupShape(adam=True), **plan)
    moments = dict.fromkeys((name for name, _ in twin.named_parameters()), 0.0)
    for update in range(updates):
        backward(model, optimizer, update)
        backward(twin, twin_optimizer, update)
        scaler = getattr(twin_optimizer, "scaler", None)
        scale = scaler.loss_scale if scaler is not None else 1.0
        for name, parameter in twin.named_parameters():
            gradient = parameter.grad.float() / scale
            moments[name] = 0.98 * moments[name] + 0.02 * gradient.square()
        proximal.step(update)
        twin_optimizer.step()
    masters = find_masters(twin_optimizer, list(twin.parameters()))
    own = find_masters(optimizer, list(model.parameters()))
    for index, (layer, other) in enumerate(
        zip(model.encoder.layers, twin.encoder.layers, strict=True)
    ):
        metric = {
            part: (moments[f"encoder.layers.{index}.fc1.{part}"].sqrt() + 1e-8)
            / (1 - 0.98**updates) ** 0.5
            for part in ("weight", "bias")
        }
        expected = getattr(prox, f"prox_{operator}_diagonal")(
            masters[other.fc1.weight].tensor.detach(),
            metric["weight"],
            strength * LEARNING_RATE,
            masters[other.fc1.bias].tensor.detach(),
            metric["bias"],
        )
        for part, value in zip(("weight", "bias"), expected, strict=True):
            mine = own[getattr(layer.fc1, part)].tensor
            assert torch.allclose(mine, value, rtol=1e-3, atol=1e-6)
    assert 0 < dead_in(model) < GROUPS


class Quadratic(nn.Module):
    """Loss 1/2 (w - c)' A (w - c) for one row, with a badly scaled A."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 1, bias=False)
        self.fc1.weight.data.fill_(1.0)
        self.scales = torch.tensor([[100.0, 1.0, 1.0, 1.0]])
        self.centre = torch.tensor([[1.0, 1.0, -1.0, 0.5]])

    def loss(self) -> torch.Tensor:
        return 0.5 * (self.scales * (self.fc1.weight - self.centre).square()).sum()


@pytest.mark.parametrize(("adam", "converges"), [(True, True), (False, False)])
def test_fixed_point_of_the_metric_step_is_the_minimum(adam, converges):
    """Where the plain step after Adam stalls at another point, the one in the metric arrives."""
    model = Quadratic()
    cfg = whole_config(**ADAM)
    optimizer = build_fairseq_optimizer(cfg.optimizer, list(model.parameters()))
    layer = FeedForward("x", "encoder-ffn", model.fc1.weight, None, torch.zeros(4, 1))
    plan = Plan(strength=0.9)
    proximal = ProximalOptimizer(optimizer, [layer], OPERATORS["l21"], plan, GroupShape(adam=adam))
    for update in range(4000):
        optimizer.set_lr(0.05 * 0.998**update)
        optimizer.zero_grad()
        optimizer.backward(model.loss())
        proximal.step(update)
    model.zero_grad()
    model.loss().backward()
    weight = model.fc1.weight.detach()
    residual = model.fc1.weight.grad + 0.9 * weight / weight.norm()
    assert (float(residual.abs().max()) < 1e-2) == converges, residual


def test_metric_needs_second_moments(monkeypatch):
    model, optimizer = build("fp32", monkeypatch)  # SGD
    proximal = controlled(model, optimizer, shape=GroupShape(adam=True))
    backward(model, optimizer, 0)
    with pytest.raises(TypeError, match="--prox-metric adam: SGD keeps no second moment"):
        proximal.step(0)
