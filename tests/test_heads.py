"""Attention heads as groups: which parameters they have, and the proximal step on them."""

import copy
from argparse import Namespace

import pytest
import torch
from fairseq.models import build_model as build
from fairseq.optim import build_optimizer
from fairseq.sequence_generator import SequenceGenerator
from small_models import (
    build_align_model,
    build_language_model,
    build_model,
    checkpoint_of,
    dictionary,
    model_in,
    model_task,
)
from test_compaction import outputs, prune
from test_control import ADAM
from test_proximal_optimizer import whole_config

from fairseq_autosize import prox, proximal_optimizer
from fairseq_autosize.checkpoint import parameter_names
from fairseq_autosize.compaction import compact
from fairseq_autosize.config import ConfigError
from fairseq_autosize.groups import (
    Attention,
    GroupError,
    attention_in_state,
    blocks_in_model,
)
from fairseq_autosize.prox import OPERATORS
from fairseq_autosize.proximal_optimizer import GroupShape, ProximalOptimizer
from fairseq_autosize.report import count_neurons
from fairseq_autosize.strength import Goal, Plan

WIDTHS = {"encoder": 4, "decoder": 4}  # d = 8, two heads


def optimizer_of(model):
    cfg = whole_config(**ADAM)
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
    for groups in (("cross-attention",), ("encoder-ffn", "encoder-attention")):
        told = (
            f"--prox-groups {','.join(groups)}: TransformerLanguageModel has no such blocks; this "
            "model has: ffn, decoder-ffn, attention, decoder-attention, all$"
        )
        with pytest.raises(GroupError, match=told):
            blocks_in_model(model, groups)


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


def head_of(attention, head, bias, of=lambda parameter: parameter):
    """The entries of a head, or what `of` gives for them, as a row; heads are 4 wide."""
    rows = slice(4 * head, 4 * head + 4)
    parts = [of(attention.v_proj.weight)[rows], of(attention.out_proj.weight)[:, rows]]
    parts += [of(attention.v_proj.bias)[rows]] if bias else []
    return torch.cat([part.flatten() for part in parts]).detach()[None]


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
            joined = head_of(plain, head, bias)
            OPERATORS[operator].prox_(joined, scale * strength * 0.02)
            assert torch.allclose(head_of(own, head, bias), joined, atol=1e-6)
            if not bias:
                untouched = plain.v_proj.bias[rows]
                assert torch.allclose(own.v_proj.bias[rows], untouched, atol=1e-6)
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_step_on_heads_in_adams_metric(operator, bias):
    """Head by head, with D from Adam's own state; a head has more entries than a row of v."""
    model, _ = build_model()
    twin, _ = build_model()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    blocks = blocks_in_model(model, ("attention",))
    backward(model, optimizer)
    backward(twin, other)
    other.step()

    def metric(parameter):
        moment = other.optimizer.state[parameter]["exp_avg_sq"]
        return (moment.sqrt() + 1e-8) / (1 - 0.98) ** 0.5

    names = [(block.name, head) for block in blocks for head in range(2)]
    heads = [
        [head_of(twin.get_submodule(name), head, bias, *of) for of in ((), (metric,))]
        for name, head in names
    ]
    # Between what the sixth and the seventh of the heads survive.
    order = 2 if operator == "l21" else 1
    threshold = float(torch.tensor([(w * d).norm(order) for w, d in heads]).sort().values[5]) * 1.01
    entries = 4 * 8 * 2 + 4 * bias
    scale = (entries / (8 + bias)) ** OPERATORS[operator].growth
    plan = Plan(threshold / scale / 0.02)
    shape = GroupShape(bias=bias, adam=True)
    ProximalOptimizer(optimizer, blocks, OPERATORS[operator], plan, shape).step(0)
    dead = 0
    for (name, head), (values, metrics) in zip(names, heads, strict=True):
        expected = getattr(prox, f"prox_{operator}_diagonal")(values, metrics, threshold)
        mine = head_of(model.get_submodule(name), head, bias)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)
        assert bool((mine == 0).all()) == bool((expected == 0).all())
        dead += bool((expected == 0).all())
    assert 6 <= dead < 12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_penalty_weighs_groups_by_their_size(operator, bias):
    """What prox_penalty shows, of coupled neurons and of heads, against norms taken one by one."""
    model, _ = build_model()
    blocks = blocks_in_model(model, ("all",))
    shape = GroupShape(bias=bias, fc2=True)
    proximal = ProximalOptimizer(optimizer_of(model), blocks, OPERATORS[operator], Plan(1.0), shape)
    expected = 0.0
    for block in blocks:
        module = model.get_submodule(block.name)
        heads = isinstance(block, Attention)
        first, last = (module.v_proj, module.out_proj) if heads else (module.fc1, module.fc2)
        width = 4 if heads else 1
        for group in range(block.count):
            rows = slice(width * group, width * (group + 1))
            parts = [first.weight[rows], last.weight[:, rows]] + [first.bias[rows]] * bias
            entries = torch.cat([part.flatten() for part in parts]).detach()
            norm = entries.norm() if operator == "l21" else entries.abs().max()
            # Random entries: the l2 norm grows as the root of their number. What linf1 compares
            # with its threshold is an l1 norm, which grows as the number.
            growth = 0.5 if operator == "l21" else 1.0
            expected += float(norm) * (len(entries) / (8 + bias)) ** growth
    assert proximal.penalty() == pytest.approx(expected, rel=1e-5)


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
    proximal.aim_at([Goal(50, (1,) * len(blocks))])
    for update in range(18):
        backward(model, optimizer, update)
        proximal.step(update)
    dead = {type(block): 0 for block in blocks}
    for block in blocks:
        dead[type(block)] += int(block.dead().sum())
    assert sum(dead.values()) == 50
    assert 6 <= dead[Attention] < 12


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_blocks_stepped_together_end_as_those_stepped_alone(operator, target, monkeypatch):
    """In Adam's metric: neurons of layers of unequal width, and heads with what follows them."""
    models = []
    for limit in (0, 1 << 19):
        monkeypatch.setattr(proximal_optimizer, "_BATCH_ENTRIES", limit)
        model, _ = build_model()
        optimizer = optimizer_of(model)
        blocks = blocks_in_model(model, ("all",))
        plan = Plan(freeze_update=12) if target else Plan(0.02 if operator == "l21" else 0.1)
        shape = GroupShape(adam=True, fc2=True)
        proximal = ProximalOptimizer(optimizer, blocks, OPERATORS[operator], plan, shape)
        if target:
            proximal.aim_at([Goal(30, (1,) * len(blocks))])
        for update in range(14):
            backward(model, optimizer, update)
            proximal.step(update)
        models.append((model, [block.dead() for block in blocks]))
        batches = [len(batch.blocks) for pool in proximal._pools for batch in pool.batches]
        assert batches == ([1] * 10 if limit == 0 else [4, 6]), "neurons, heads"
    (alone, dead), (together, also_dead) = models
    assert all(map(torch.equal, dead, also_dead))
    assert 0 < sum(int(mask.sum()) for mask in dead) < 56
    for (name, parameter), other in zip(
        alone.named_parameters(), together.parameters(), strict=True
    ):
        # No output depends on the bias of keys: Adam makes steps of its gradient's rounding errors.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


# --- counting and compaction --------------------------------------------------------------------


def kill_heads(model, dead: dict[str, list[int]], bias: float = 0.0) -> None:
    """Zero heads of the blocks named, with this bias of v."""
    torch.manual_seed(3)
    with torch.no_grad():
        for block in blocks_in_model(model, ("attention",)):
            attention = model.get_submodule(block.name)
            attention.v_proj.bias.uniform_(-0.5, 0.5)
            for head in dead.get(block.name, []):
                rows = slice(4 * head, 4 * head + 4)
                attention.v_proj.weight[rows] = 0
                attention.v_proj.bias[rows] = bias


DEAD = {
    "encoder.layers.0.self_attn": [0],
    "encoder.layers.1.self_attn": [0, 1],
    "decoder.layers.0.self_attn": [0, 1],
    "decoder.layers.0.encoder_attn": [1],
    "decoder.layers.1.encoder_attn": [0, 1],
}


def assert_same_function(model, checkpoint) -> None:
    # With fewer heads fairseq computes attention by itself, and its softmax in float32.
    torch.testing.assert_close(outputs(model_in(checkpoint)), outputs(model), rtol=0, atol=1e-6)


def translations(model) -> list:
    """Hypotheses and scores of a beam search, which decodes step by step."""
    generator = SequenceGenerator([model], dictionary(), beam_size=3, max_len_b=12)
    tokens = torch.randint(4, 14, (4, 6), generator=torch.manual_seed(0))
    sample = {"src_tokens": tokens, "src_lengths": torch.full((4,), 6)}
    found = generator.generate([model], {"net_input": sample})
    return [(h[0]["tokens"].tolist(), round(float(h[0]["score"]), 5)) for h in found]


@pytest.mark.parametrize("bias", [0.0, 0.7])
@pytest.mark.parametrize("uniform", [False, True])
def test_without_its_dead_heads_the_model_computes_the_same(uniform, bias):
    model, args = build_model(share_all_embeddings=True)
    kill_heads(model, DEAD, bias)
    prune(model, (7, 0, 10, 1))
    averaged = copy.deepcopy(model)
    kill_heads(averaged, DEAD, bias / 2)
    checkpoint = checkpoint_of(model, args) | {"extra_state": {"ema": averaged.state_dict()}}
    result = compact(checkpoint, uniform=uniform)
    assert_same_function(model, result.checkpoint)
    assert translations(model_in(result.checkpoint)) == translations(model.eval())
    wanted = {"encoder": [1, 0], "decoder": [0, 2], "cross": [1, 0]}
    assert result.heads == ({} if uniform else wanted)
    assert result.arch == ("transformer" if uniform else "transformer_autosize")
    assert sum(block.folded for block in result.attention) == (8 if bias else 0)
    options = dict(zip(*[iter(result.width_options())] * 2, strict=True))
    assert options.get("--cross-head-counts") == (None if uniform else "1,0")

    before, after = count_neurons(checkpoint_of(model, args)), count_neurons(result.checkpoint)
    assert before["attention_heads"] == {"total": 12, "alive": 4, "pruned": 8}
    assert after["attention_heads"]["total"] == (12 if uniform else 4)
    assert after["attention_heads"]["alive"] == 4
    if not uniform:
        assert after["parameters"]["total"] == before["parameters"]["compact"]
    # Again, and from the one form to the other.
    again = compact(result.checkpoint, uniform=uniform)
    assert again.checkpoint["model"].keys() == result.checkpoint["model"].keys()
    assert_same_function(model, again.checkpoint)
    for done in (result.checkpoint, again.checkpoint):
        assert_same_function(averaged, {**done, "model": done["extra_state"]["ema"]})
    other = compact(result.checkpoint, uniform=not uniform)
    assert other.heads == (wanted if uniform else {})
    assert_same_function(model, other.checkpoint)


def test_the_attention_that_aligns_is_left_alone():
    """Its first head aligns, whether or not it is dead, and stays the first."""
    model, args = build_align_model()
    names = {block.name for block in blocks_in_model(model, ("all",))}
    assert len(names) == 4 + 5 and "decoder.layers.1.encoder_attn" not in names
    v = model.decoder.layers[1].encoder_attn.v_proj
    torch.nn.init.zeros_(v.weight[:4])
    kill_heads(model, {name: dead for name, dead in DEAD.items() if "1.encoder_attn" not in name})
    tokens = torch.randint(4, 14, (3, 7), generator=torch.manual_seed(0))
    batch = (tokens, torch.tensor([7, 7, 7]), tokens.flip(1))
    alignments = model.eval()(*batch)[1]["attn"][0]
    assert float(alignments.std()) > 0.01
    for uniform in (False, True):
        result = compact(checkpoint_of(model, args), uniform=uniform)
        assert result.heads == (
            {} if uniform else {"encoder": [1, 0], "decoder": [0, 2], "cross": [1, 2]}
        )
        assert result.arch == ("transformer_align" if uniform else "transformer_align_autosize")
        small = model_in(result.checkpoint)
        assert_same_function(model, result.checkpoint)
        torch.testing.assert_close(small(*batch)[1]["attn"][0], alignments, rtol=0, atol=1e-6)


def test_language_model_without_heads():
    model, args = build_language_model()
    kill_heads(model, {"decoder.layers.0.self_attn": [0, 1], "decoder.layers.1.self_attn": [1]})
    result = compact(checkpoint_of(model, args))
    assert result.heads == {"decoder": [0, 1]}
    assert_same_function(model, result.checkpoint)


def test_small_model_trains_on_with_its_heads():
    """Also what has no head left, and the prox on what has."""
    model, args = build_model()
    kill_heads(model, DEAD)
    small = model_in(compact(checkpoint_of(model, args)).checkpoint).train()
    optimizer = optimizer_of(small)
    blocks = blocks_in_model(small, ("all",))
    assert [block.count for block in blocks if isinstance(block, Attention)] == [1, 0, 0, 1, 2, 0]
    proximal = ProximalOptimizer(optimizer, blocks, OPERATORS["l21"], Plan(0.1))
    first = float(loss(small))
    for update in range(20):
        backward(small, optimizer, update)
        proximal.step(update)
    assert float(loss(small)) < first


def test_attention_without_heads_is_its_bias_and_every_parameter_has_a_gradient():
    """torch's DistributedDataParallel would not go on without one."""
    model, args = build_model()
    kill_heads(model, DEAD)
    small = model_in(compact(checkpoint_of(model, args)).checkpoint).train()
    loss(small).backward()
    assert [name for name, p in small.named_parameters() if p.grad is None] == []
    query, memory = torch.randn(5, 2, 8), torch.randn(3, 2, 8)
    for attention in (small.encoder.layers[1].self_attn, small.decoder.layers[1].encoder_attn):
        found, weights = attention(query, key=memory, value=memory)
        assert weights is None and torch.equal(found, attention.out_proj.bias.expand(5, 2, 8))


def test_optimizer_state_is_cut_with_its_heads():
    model, args = build_model()
    optimizer = optimizer_of(model)
    backward(model, optimizer)
    optimizer.step()
    kill_heads(model, DEAD)
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": optimizer.state_dict()}
    result = compact(checkpoint, keep_optimizer=True).checkpoint
    names = parameter_names(result["model"])
    slots = result["last_optimizer_state"]["state"]
    for index, name in enumerate(names):
        assert slots[index]["exp_avg"].shape == result["model"][name].shape
    old = dict(model.named_parameters())["encoder.layers.0.self_attn.v_proj.weight"]
    index = names.index("encoder.layers.0.self_attn.v_proj.weight")
    kept = optimizer.optimizer.state[old]["exp_avg"][4:]
    assert torch.equal(slots[index]["exp_avg"], kept)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            "1,3",
            "--encoder-head-counts 1,3: 3 heads, but the architecture has 2; give at most so many",
        ),
        ("1", "--encoder-head-counts 1: gives 1 sizes for 2 layers"),
        ("1,x", "--encoder-head-counts 1,x: must be numbers >= 0"),
    ],
)
def test_bad_head_counts_are_refused(counts, message):
    _, args = build_model()
    settings = vars(args) | {"_name": "transformer_autosize", "encoder_head_counts": counts}
    with pytest.raises(ConfigError, match=message):
        build(Namespace(**settings), model_task())
