"""The drop-in for ProxGradPytorch: its calls work, and each of its faults is right here."""

import inspect
import math
import sys
import types

import pytest
import torch

from fairseq_autosize import prox
from fairseq_autosize import proximal_gradient as pg

Parameter = torch.nn.Parameter
NAMES = ["l21", "l21_slow", "linf1", "linf", "l2", "l1", "elasticnet", "logbarrier"]
OPERATORS = {
    "l21": prox.prox_l21,
    "l21_slow": prox.prox_l21,
    "linf1": prox.prox_linf1,
    "linf": prox.prox_linf,
    "l2": prox.prox_l2,
    "l1": prox.prox_l1,
    "elasticnet": prox.prox_elastic_net,
    "logbarrier": prox.prox_log_barrier,
}


def step(name, weight, bias=None, **options):
    """The values after one step; the parameters stay the same objects."""
    weight = Parameter(torch.tensor(weight))
    bias = None if bias is None else Parameter(torch.tensor(bias))
    getattr(pg, name)(weight, bias, **options)
    return weight.tolist() if bias is None else (weight.tolist(), bias.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_defaults_are_the_original_ones(name):
    parameters = inspect.signature(getattr(pg, name)).parameters
    expected = ["parameter", "bias", "reg", "lr"] + ["gamma"] * (name == "elasticnet")
    assert list(parameters) == expected
    weight, bias = torch.randn(4, 3).abs(), torch.randn(4).abs()
    by_default, by_hand = Parameter(weight.clone()), Parameter(weight.clone())
    getattr(pg, name)(by_default)
    getattr(pg, name)(by_hand, reg=0.01, lr=0.1, **{"gamma": 1.0} if len(expected) == 5 else {})
    assert torch.equal(by_default, by_hand)
    assert not torch.equal(by_default, weight)
    positional = Parameter(weight.clone()), Parameter(bias.clone())
    assert getattr(pg, name)(*positional, 0.5, 0.2) is None
    expected = OPERATORS[name](weight, 0.1, bias)
    torch.testing.assert_close([p.data for p in positional], list(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_storage_strides_and_dtype_are_kept(name, dtype):
    """The original rebinds ``.data``: new storage, other strides, half becomes float32."""
    base = torch.ones(3, 8, dtype=dtype)
    weight = Parameter(base[:, ::2])
    bias = Parameter(torch.ones(3, dtype=dtype))
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    before = (weight.data_ptr(), weight.stride(), bias.data_ptr())
    getattr(pg, name)(weight, bias, reg=2.0)
    assert (weight.data_ptr(), weight.stride(), bias.data_ptr()) == before
    assert weight.dtype == bias.dtype == dtype
    assert weight.requires_grad and weight.is_leaf and weight.grad is None
    assert optimizer.param_groups[0]["params"][0] is weight
    assert (base[:, ::2] != 1).any()  # a view of the same storage sees the step
    assert (base[:, 1::2] == 1).all()
    values, pointer = weight.tolist(), weight.data_ptr()
    getattr(pg, name)(weight, reg=2.0)
    assert (weight.data_ptr(), weight.dtype) == (pointer, dtype)
    assert weight.tolist() != values


def test_l1_and_elasticnet_reach_zero_and_keep_signs():
    """The original gives 0.045 and, for the second, flips signs: -1, 1, -1."""
    assert step("l1", [[0.05, -0.5, 2.0]], reg=1.0) == [pytest.approx([0.0, -0.4, 1.9])]
    assert step("l1", [[0.5, -0.5, 2.0]], reg=3.0, lr=1.0) == [[0.0, 0.0, 0.0]]
    result = step("elasticnet", [[0.05, -0.5, 2.0]], reg=1.0)
    assert result == [pytest.approx([0.0, -0.4 / 1.1, 1.9 / 1.1])]


def test_elasticnet_divides_by_one_plus_reg_lr_gamma():
    result = step("elasticnet", [[2.0]], [3.0], reg=1.0, lr=0.5, gamma=2.0)
    assert result == ([[0.75]], [1.25])
    with pytest.raises(ValueError, match=r"gamma is -1\.0"):  # the original prints a warning
        step("elasticnet", [[2.0]], gamma=-1.0)


def test_l2_treats_weight_and_bias_as_one_group():
    """The original multiplies the bias by 1 - min(1, bias): -2 becomes -6."""
    weight, bias = step("l2", [[2.0, 0.0], [0.0, 1.0]], [-2.0, 0.0], reg=1.5, lr=1.0)
    assert weight == [[1.0, 0.0], [0.0, 0.5]] and bias == [-1.0, 0.0]


def test_linf_takes_a_step(capsys):
    """The original prints two tensors and changes nothing."""
    assert step("linf", [[3.0, -2.0], [1.0, 0.0]], reg=1.0, lr=2.0) == [[1.5, -1.5], [1.0, 0.0]]
    assert step("linf", [[3.0]], [2.5], reg=1.0, lr=1.5) == ([[2.0]], [2.0])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"reg": 0.0}, {"reg": 0.0, "lr": 0.0}])
@pytest.mark.parametrize("name", ["l21", "l21_slow", "linf1", "l2"])
def test_a_zero_row_at_threshold_zero_is_no_nan(name, options):
    """The original's l21 and l2 give NaN: 0/0. A warm-up from 0 then destroys a pruned model."""
    for weight in ([[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0]]):
        assert step(name, weight, **options) == weight


def test_linf1_rows_below_the_threshold_are_exactly_zero():
    """The original leaves -7e-9, -1e-8 of the first, and about a tenth of the rows at random."""
    assert step("linf1", [[0.1, 0.2, 0.3]], reg=0.6, lr=1.0) == [[0.0, 0.0, 0.0]]
    weight = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0)) * 0.05
    should = weight.abs().sum(1) <= 1
    assert 800 < should.sum() < 1000
    parameter = Parameter(weight.clone())
    pg.linf1(parameter, reg=1.0, lr=1.0)
    assert torch.equal((parameter == 0).all(1), should)


def test_linf1_at_tiny_thresholds():
    """The original takes only 2e-8 from each of the two maxima instead of t/2 = 1e-7."""
    weight = [[0.04, 0.04, 0.01]]
    result = step("linf1", weight, reg=2e-7, lr=1.0)
    assert 0.04 - result[0][0] == pytest.approx(1e-7, rel=0.03)
    assert result[0][1:] == [result[0][0], torch.tensor(0.01).item()]


def test_linf1_in_float64():
    """The original raises: its work arrays are float32."""
    weight = Parameter(torch.tensor([[4.0, 3.0, 1.0]], dtype=torch.float64))
    pg.linf1(weight, reg=3.0, lr=1.0)
    assert weight.tolist() == [[2.0, 2.0, 1.0]]


def test_logbarrier_does_not_cancel():
    """The original gives 9.5e-7 and 0, which is outside the barrier."""
    result = step("logbarrier", [[-10.0, -1000.0]], reg=1e-4)
    assert result == [pytest.approx([1e-6, 1e-8], rel=1e-3)]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_are_refused(name):
    """The original takes a negative strength and lets the weights grow."""
    with pytest.raises(ValueError, match=r"threshold is -0\.1"):
        step(name, [[1.0, 1.0]], reg=-1.0)
    with pytest.raises(ValueError, match="threshold is nan"):
        step(name, [[1.0, 1.0]], reg=math.nan)
    with pytest.raises(ValueError, match="bias has shape"):
        step(name, [[1.0, 1.0]], [1.0, 1.0])


def test_l21_slow_takes_both_orders_of_arguments():
    weight, bias = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([0.0, 1.0])
    calls = [
        (lambda w: pg.l21_slow(w, 0.1, 0.2), 0.02),
        (lambda w: pg.l21_slow(w, 5.0, 0.01), 0.05),
        (lambda w: pg.l21_slow(w, 5.0), 0.5),
        (lambda w: pg.l21_slow(w, 5.0, lr=0.3), 1.5),
        (lambda w: pg.l21_slow(w, reg=5.0), 0.5),
        (lambda w: pg.l21_slow(w, reg=5.0, lr=0.3), 1.5),
    ]
    for call, t in calls:
        parameter = Parameter(weight.clone())
        call(parameter)
        torch.testing.assert_close(parameter.data, prox.prox_l21(weight, t))
    both = Parameter(weight.clone()), Parameter(bias.clone())
    pg.l21_slow(*both, reg=0.5, lr=1.0)
    torch.testing.assert_close([p.data for p in both], list(prox.prox_l21(weight, 0.5, bias)))
    with pytest.raises(ValueError, match=r"bias is 0\.1; it must be a tensor"):
        pg.l21_slow(both[0], 0.1, 0.1, 0.1)


def test_under_the_originals_name(monkeypatch):
    """As its own examples and tests import and call it."""
    package = types.ModuleType("proximal_gradient")
    package.proximalGradient = pg
    monkeypatch.setitem(sys.modules, "proximal_gradient", package)
    monkeypatch.setitem(sys.modules, "proximal_gradient.proximalGradient", pg)
    import proximal_gradient.proximalGradient as original

    layer = torch.nn.Linear(3, 2)
    layer.name = "linear1"
    for name in ("l1", "linf1", "elasticnet", "logbarrier", "l2", "l21", "linf"):
        getattr(original, name)(layer.weight, layer.bias, reg=0.1)
        getattr(original, name)(layer.weight, reg=0.1)
        assert layer.weight.requires_grad and layer.weight.isfinite().all()
    original.l21_slow(layer.weight, reg=0.1)


def test_xor_is_learnt_with_few_neurons():
    """The original's example: a 2-100-1 network, SGD, one linf1 step after each update."""
    torch.manual_seed(0)
    hidden, output = torch.nn.Linear(2, 100), torch.nn.Linear(100, 1)
    inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    targets = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    optimizer = torch.optim.SGD([*hidden.parameters(), *output.parameters()], lr=0.01)
    for _ in range(1500):  # all four examples at once: four times the strength of the original
        loss = (output(hidden(inputs).relu()) - targets).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pg.linf1(hidden.weight, hidden.bias, reg=0.02)
    alive = int(hidden.weight.ne(0).any(1).sum())
    assert 2 <= alive <= 40
    assert torch.equal(hidden.weight.eq(0).all(1), hidden.weight.eq(0).all(1) & hidden.bias.eq(0))
    with torch.no_grad():
        predicted = output(hidden(inputs).relu())
    assert torch.equal(predicted.round().abs(), targets)
