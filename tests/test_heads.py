"""Attention heads as groups: which parameters they have, and the proximal step on them."""

import pytest
import torch
from fairseq.optim import build_optimizer
from small_models import build_language_model, build_model
from test_control import ADAM
from test_proximal_optimizer import whole_config

from fairseq_autosize.groups import (
    Attention,
    GroupError,
    attention_in_state,
    blocks_in_model,
)
from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.proximal_optimizer import GroupShape, ProximalOptimizer
from fairseq_autosize.strength import Goal, Plan

WIDTHS = {"encoder": 4, "decoder": 4}  # d = 8, two heads


def optimizer_of(model):
    cfg = whole_config(**ADAM, fp16_adam_stats=False, use_old_adam=False, tpu=False)
    cfg.optimizer.lr = [0.02]
    return build_optimizer(cfg.optimizer, list(model.parameters()))


def backward(model, optimizer, update=0):
    torch.manual_seed(update)
    optimizer.zero_grad()
    optimizer.backward(loss(model))


def loss(model):
    tokens = torch.tensor([[5, 6, 7, 8, 2], [9, 8, 7, 6, 2]])
    logits, _ = model(tokens, torch.tensor([5, 5]), tokens.roll(1, 1))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def test_blocks_of_a_translation_model():
    model, _ = build_model()
    assert [block.name for block in blocks_in_model(model, ("attention",))] == [
        *(f"encoder.layers.{i}.self_attn" for i in range(2)),
        *(f"decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn")),
    ]
    kinds = [block.kind for block in blocks_in_model(model, ("cross-attention", "encoder-ffn"))]
    assert sorted(kinds) == ["cross-attention"] * 2 + ["encoder-ffn"] * 2
    assert len(blocks_in_model(model, ("all",))) == 4 + 6
    in_state = attention_in_state(model.state_dict(), WIDTHS)
    for block, other in zip(blocks_in_model(model, ("attention",)), in_state, strict=True):
        assert (block.name, block.kind, block.count) == (other.name, other.kind, other.count)
        assert block.parameters_per_group() == other.parameters_per_group() == 4 * 4 * 8 + 3 * 4


def test_blocks_of_a_language_model():
    model, _ = build_language_model()
    kinds = {block.kind for block in blocks_in_model(model, ("all",))}
    assert kinds == {"decoder-ffn", "decoder-attention"}
    with pytest.raises(GroupError, match="--prox-groups cross-attention: TransformerLanguageModel"):
        blocks_in_model(model, ("cross-attention",))


def test_attention_with_extra_keys_is_refused():
    model, _ = build_model()
    attention = model.encoder.layers[0].self_attn
    attention.bias_k = attention.bias_v = torch.nn.Parameter(torch.ones(1, 1, 8))
    with pytest.raises(GroupError, match=r"layers\.0\.self_attn: attention with an extra key"):
        blocks_in_model(model, ("attention",))


def test_shapes_that_do_not_belong_together_are_refused():
    state = build_model()[0].state_dict()
    with pytest.raises(GroupError, match="or not to heads of width 3"):
        attention_in_state(state, {"encoder": 3, "decoder": 4})
    state["decoder.layers.1.encoder_attn.q_proj.weight"] = torch.ones(4, 8)
    with pytest.raises(GroupError, match=r"decoder\.layers\.1\.encoder_attn: .* do not belong"):
        attention_in_state(state, WIDTHS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_step_on_heads(operator, bias):
    """A head is its rows of v with their biases and its columns of out_proj; q and k follow."""
    model, _ = build_model()
    twin, _ = build_model()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    blocks = blocks_in_model(model, ("attention",))
    shape = GroupShape(bias=bias)
    proximal = ProximalOptimizer(optimizer, blocks, OPERATORS[operator], Plan(1.0), shape)
    strength = float(proximal.dual_norms().median()) / 0.02
    proximal.plan = Plan(strength)
    backward(model, optimizer)
    backward(twin, other)
    proximal.step(0)
    other.step()
    unit = 8 + bias
    scale = ((4 * 8 * 2 + 4 * bias) / unit) ** OPERATORS[operator].growth
    dead = 0
    for block in blocks:
        own, plain = model.get_submodule(block.name), twin.get_submodule(block.name)
        for head in range(2):
            rows = slice(4 * head, 4 * head + 4)
            parts = [plain.v_proj.weight[rows].flatten(), plain.out_proj.weight[:, rows].t()]
            entries = [*parts, plain.v_proj.bias[rows]] if bias else parts
            joined = torch.cat([part.flatten() for part in entries]).detach()[None].clone()
            OPERATORS[operator].prox_(joined, scale * strength * 0.02)
            v, out, *rest = joined[0].split([32, 32, 4] if bias else [32, 32])
            assert torch.allclose(own.v_proj.weight[rows].flatten(), v, atol=1e-6)
            assert torch.allclose(own.out_proj.weight[:, rows].t().flatten(), out, atol=1e-6)
            expected = rest[0] if bias else plain.v_proj.bias[rows]
            assert torch.allclose(own.v_proj.bias[rows], expected, atol=1e-6)
            is_dead = bool((joined == 0).all())
            assert bool((own.v_proj.weight[rows] == 0).all()) == is_dead
            for name in ("q_proj", "k_proj"):
                for tensor in ("weight", "bias"):
                    mine = getattr(getattr(own, name), tensor)[rows]
                    stock = getattr(getattr(plain, name), tensor)[rows]
                    assert torch.equal(mine, torch.zeros_like(stock) if is_dead else stock)
            dead += is_dead
        assert torch.equal(own.out_proj.bias, plain.out_proj.bias)
    assert 0 < dead < 12
    assert sum(int(block.dead().sum()) for block in blocks) == dead


def test_a_dead_head_says_nothing():
    model, _ = build_model(dropout=0.0)
    model.eval()
    for block in blocks_in_model(model, ("attention",)):
        attention = model.get_submodule(block.name)
        attention.v_proj.weight.data[:4] = 0
        attention.v_proj.bias.data[:4] = 0
    before = loss(model)
    for block in blocks_in_model(model, ("attention",)):
        attention = model.get_submodule(block.name)
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).weight.data[:4] = 3.0
        attention.out_proj.weight.data[:, :4] = 3.0
    assert torch.allclose(loss(model), before, rtol=1e-6)
    assert [block.dead().tolist() for block in blocks_in_model(model, ("attention",))] == [
        [True, False]
    ] * 6


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_target_over_neurons_and_heads(operator, adam):
    model, _ = build_model()
    optimizer = optimizer_of(model)
    blocks = blocks_in_model(model, ("all",))
    assert sum(block.count for block in blocks) == 44 + 12
    plan, shape = Plan(freeze_update=12), GroupShape(adam=adam, fc2=True)
    proximal = ProximalOptimizer(optimizer, blocks, OPERATORS[operator], plan, shape)
    proximal.goal = Goal(50, (1,) * len(blocks))
    for update in range(18):
        backward(model, optimizer, update)
        proximal.step(update)
    dead = {type(block): 0 for block in blocks}
    for block in blocks:
        dead[type(block)] += int(block.dead().sum())
    assert sum(dead.values()) == 50
    assert 6 <= dead[Attention] < 12
