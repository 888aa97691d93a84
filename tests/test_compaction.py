"""Compaction: the small model computes what the pruned one does, and everything is cut with it."""

import copy
from argparse import Namespace

import pytest
import torch
from fairseq.models import build_model as build
from omegaconf import OmegaConf
from small_models import (
    TASK,
    build_language_model,
    build_model,
    checkpoint_of,
    model_in,
    model_task,
)
from torch import nn

from fairseq_autosize.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from fairseq_autosize.compaction import FORMAT, compact
from fairseq_autosize.config import ConfigError
from fairseq_autosize.groups import GroupError
from fairseq_autosize.models.transformer_autosize import layer_sizes

# Neurons alive in (encoder 0, encoder 1, decoder 0, decoder 1); full are 12 and 10.
WIDTHS = [(12, 12, 10, 10), (0, 0, 0, 0), (1, 3, 0, 10), (7, 12, 5, 1), (0, 12, 10, 0)]


def prune(model: nn.Module, alive: tuple[int, ...], bias: float = 0.0) -> None:
    """Leave so many neurons alive in each layer, at scattered places; the dead get this bias."""
    stacks = [
        getattr(model, side).layers for side in ("encoder", "decoder") if hasattr(model, side)
    ]
    layers = [
        layer for stack in stacks for layer in stack.children()
    ]  # LayerDrop's own order skips
    with torch.no_grad():
        for seed, (layer, width) in enumerate(zip(layers, alive, strict=True)):
            order = torch.randperm(len(layer.fc1.bias), generator=torch.manual_seed(seed))
            layer.fc1.bias.uniform_(-0.5, 0.5)
            layer.fc1.weight[order[width:]] = 0
            layer.fc1.bias[order[width:]] = bias


def outputs(model: nn.Module) -> torch.Tensor:
    """Scores of a few random sentences, in float64."""
    model = copy.deepcopy(model).double().eval()
    tokens = torch.randint(4, 14, (3, 7), generator=torch.manual_seed(0))
    with torch.no_grad():
        if hasattr(model, "encoder"):
            return model(tokens, torch.tensor([7, 7, 7]), tokens.flip(1))[0]
        return model(tokens)[0]


def assert_same_function(model: nn.Module, checkpoint: dict) -> None:
    torch.testing.assert_close(outputs(model_in(checkpoint)), outputs(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("uniform", [False, True], ids=["per-layer", "uniform"])
@pytest.mark.parametrize("alive", WIDTHS, ids=str)
def test_small_model_computes_the_same(alive, uniform):
    model, args = build_model(share_all_embeddings=True)
    prune(model, alive)
    result = compact(checkpoint_of(model, args), uniform=uniform)
    wanted = {"encoder": list(alive[:2]), "decoder": list(alive[2:])}
    if uniform:
        wanted = {side: [max(1, *widths)] * 2 for side, widths in wanted.items()}
    assert result.widths == wanted
    assert [layer.alive for layer in result.layers] == list(alive)
    assert result.arch == ("transformer" if uniform else "transformer_autosize")
    assert_same_function(model, result.checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_fn": "gelu"},
        {"activation_fn": "gelu_accurate"},
        {"activation_fn": "tanh"},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"share_decoder_input_output_embed": True},
        {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
        {"checkpoint_activations": True},
        {"arch": "transformer_iwslt_de_en", "_name": "transformer_iwslt_de_en"},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_variants_of_the_architecture(options):
    model, args = build_model(**options)
    prune(model, (3, 0, 10, 1))
    for uniform in (False, True):
        result = compact(checkpoint_of(model, args), uniform=uniform)
        assert result.arch == (args.arch if uniform else f"{args.arch}_autosize")
        assert_same_function(model, result.checkpoint)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_side_without_layers(side):
    model, args = build_model(**{f"{side}_layers": 0})
    prune(model, (3, 0))
    (other,) = {"encoder", "decoder"} - {side}
    for uniform in (False, True):
        result = compact(checkpoint_of(model, args), uniform=uniform)
        assert result.widths == {other: [3, 3] if uniform else [3, 0]}
        assert_same_function(model, result.checkpoint)


def test_widths_that_quantization_noise_can_be_put_on():
    sizes = {"encoder_ffn_embed_dim": 16, "decoder_ffn_embed_dim": 16}
    model, args = build_model(quant_noise_pq=0.1, quant_noise_pq_block_size=8, **sizes)
    prune(model, (3, 8, 16, 1))
    message = r"encoder\.layers\.0: .* multiples of 8, and 3 is none; compact it with --multiple-of"
    with pytest.raises(CheckpointError, match=message):
        compact(checkpoint_of(model, args))
    nested = copy.deepcopy(checkpoint_of(model, args))  # as hydra has it
    settings = vars(nested["cfg"]["model"])
    names = ("pq", "pq_block_size")
    settings["quant_noise"] = {name: settings.pop(f"quant_noise_{name}") for name in names}
    with pytest.raises(CheckpointError, match=message):
        compact(nested)
    for uniform in (False, True):
        result = compact(checkpoint_of(model, args), multiple_of=8, uniform=uniform)
        assert [layer.after for layer in result.layers] == [8, 8, 16, 16 if uniform else 8]
        assert_same_function(model, result.checkpoint)
        tokens = torch.arange(4, 14).unsqueeze(0)
        model_in(result.checkpoint).train()(tokens, torch.tensor([10]), tokens)[0].sum().backward()
    prune(model, (0, 8, 16, 1))
    with pytest.raises(CheckpointError, match="and 0 is none"):
        compact(checkpoint_of(model, args), multiple_of=8)


@pytest.mark.parametrize("uniform", [False, True])
def test_language_model(uniform):
    model, args = build_language_model()
    prune(model, (3, 0))
    result = compact(checkpoint_of(model, args), uniform=uniform)
    assert result.widths == {"decoder": [3, 3] if uniform else [3, 0]}
    assert result.arch == ("transformer_lm" if uniform else "transformer_lm_autosize")
    assert_same_function(model, result.checkpoint)


@pytest.mark.parametrize("uniform", [False, True])
def test_language_model_keeps_the_name_of_its_architecture(uniform):
    model, args = build_language_model(_name="transformer_lm_gpt")
    prune(model, (3, 0))
    result = compact(compact(checkpoint_of(model, args)).checkpoint, uniform=uniform)
    assert result.arch == ("transformer_lm_gpt" if uniform else "transformer_lm_gpt_autosize")
    assert result.checkpoint["cfg"]["model"]._name == result.arch
    assert_same_function(model, result.checkpoint)


@pytest.mark.parametrize("uniform", [False, True])
def test_nested_settings_of_hydra(uniform):
    sizes = {"layers": 2, "embed_dim": 8, "attention_heads": 2}
    model, args = build_model()
    args.encoder = {**sizes, "ffn_embed_dim": 12}
    args.decoder = {**sizes, "ffn_embed_dim": 10}
    prune(model, (3, 0, 7, 1))
    checkpoint = checkpoint_of(model, args)
    checkpoint["cfg"]["model"] = vars(args)
    result = compact(checkpoint, uniform=uniform).checkpoint
    # As fairseq does with a plain dict; from a namespace it would take the flat sizes.
    small = build(OmegaConf.create(result["cfg"]["model"]), model_task())
    small.load_state_dict(result["model"])
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "gelu", "gelu_accurate", "tanh"])
@pytest.mark.parametrize("bias", [0.7, -0.7])
def test_constant_neurons_are_folded_into_the_bias(activation, bias):
    model, args = build_model(activation_fn=activation)
    prune(model.double(), (3, 0, 10, 1), bias=bias)
    result = compact(checkpoint_of(model, args))
    constant = not (activation.startswith("relu") and bias < 0)
    assert [layer.folded for layer in result.layers] == [
        9 * constant,
        12 * constant,
        0,
        9 * constant,
    ]
    small = model_in(result.checkpoint).double()
    small.load_state_dict(result.checkpoint["model"])
    # fairseq computes its gelu in float32.
    atol = 1e-6 if activation == "gelu" else 1e-12
    torch.testing.assert_close(outputs(small), outputs(model), rtol=0, atol=atol)


def test_input_stays_as_it_is():
    model, args = build_model()
    prune(model, (3, 0, 10, 1), bias=0.5)
    checkpoint = checkpoint_of(model, args)
    before = copy.deepcopy(checkpoint)
    compact(checkpoint, uniform=True)
    assert str(checkpoint) == str(before)


def test_second_compaction_changes_nothing():
    model, args = build_model()
    prune(model, (3, 0, 10, 1), bias=0.5)
    for options in ({}, {"uniform": True}, {"multiple_of": 4}):
        once = compact(checkpoint_of(model, args), provenance={"source": "a.pt"}, **options)
        twice = compact(once.checkpoint, provenance={"source": "b.pt"}, **options)
        assert str(twice.checkpoint) == str(once.checkpoint)


def test_uniform_and_back_again():
    model, args = build_model()
    prune(model, (3, 0, 10, 1))
    uniform = compact(checkpoint_of(model, args), uniform=True)
    layered = compact(uniform.checkpoint)
    assert layered.widths == {"encoder": [3, 0], "decoder": [10, 1]}
    assert_same_function(model, layered.checkpoint)
    again = compact(layered.checkpoint, uniform=True)
    assert again.arch == "transformer" and again.widths == uniform.widths
    assert not hasattr(again.checkpoint["cfg"]["model"], "encoder_ffn_dims")
    assert_same_function(model, again.checkpoint)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"multiple_of": 8}, [8, 0, 16, 8]),
        ({"min_width": 2}, [3, 2, 10, 2]),
        ({"min_width": 2, "multiple_of": 4}, [4, 4, 12, 4]),
        ({"uniform": True, "multiple_of": 4}, [4, 4, 12, 12]),
        ({"uniform": True, "min_width": 11}, [11, 11, 11, 11]),
    ],
)
def test_padding(options, widths):
    model, args = build_model()
    prune(model, (3, 0, 10, 1))
    result = compact(checkpoint_of(model, args), **options)
    assert [layer.after for layer in result.layers] == widths
    assert_same_function(model, result.checkpoint)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_padding_gets_no_gradient(activation):
    model, args = build_model(activation_fn=activation)
    prune(model, (3, 0, 10, 1))
    small = model_in(compact(checkpoint_of(model, args), multiple_of=8).checkpoint)
    tokens = torch.arange(4, 14).unsqueeze(0)
    small(tokens, torch.tensor([10]), tokens)[0].square().sum().backward()
    layer = small.encoder.layers[0]
    assert layer.fc1.weight.grad[:3].any(dim=1).all()
    for grad in (layer.fc1.weight.grad[3:], layer.fc1.bias.grad[3:], layer.fc2.weight.grad[:, 3:]):
        assert not grad.any()


def test_ties_and_shared_layers_stay_shared(tmp_path):
    model, args = build_model(share_all_embeddings=True)
    prune(model, (3, 3, 10, 1))
    model.encoder.layers[1] = model.encoder.layers[0]
    result = compact(checkpoint_of(model, args))
    assert result.widths == {"encoder": [3, 3], "decoder": [10, 1]}
    write_checkpoint(result.checkpoint, tmp_path / "small.pt")
    state = read_checkpoint(tmp_path / "small.pt")["model"]
    shared = [
        ("encoder.layers.0.fc1.weight", "encoder.layers.1.fc1.weight"),
        ("encoder.layers.0.fc2.weight", "encoder.layers.1.fc2.weight"),
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "decoder.output_projection.weight"),
    ]
    for first, second in shared:
        assert state[first].data_ptr() == state[second].data_ptr()
    assert_same_function(model, result.checkpoint)


def test_bytes_saved_are_those_of_the_neurons(tmp_path):
    model, args = build_model(encoder_ffn_embed_dim=40_000, decoder_ffn_embed_dim=40_000)
    prune(model, (300, 0, 39_999, 1001))
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": None}
    write_checkpoint(checkpoint, tmp_path / "pruned.pt")
    write_checkpoint(compact(checkpoint).checkpoint, tmp_path / "small.pt")
    saved = (tmp_path / "pruned.pt").stat().st_size - (tmp_path / "small.pt").stat().st_size
    assert saved == pytest.approx(4 * (2 * 8 + 1) * (4 * 40_000 - 41_300), rel=1e-3)


def test_note_tells_what_was_done():
    model, args = build_model()
    prune(model, (3, 0, 10, 1))
    once = compact(checkpoint_of(model, args), multiple_of=2, provenance={"source": "a.pt"})
    note = once.checkpoint["autosize"]
    assert note["format"] == FORMAT
    names = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    (step,) = note["history"]
    assert step["source"] == "a.pt"
    assert step["widths_before"] == dict(zip(names, (12, 12, 10, 10), strict=True))
    assert step["widths_after"] == dict(zip(names, (4, 0, 10, 2), strict=True))
    twice = compact(once.checkpoint, provenance={"source": "b.pt"})
    assert [step["source"] for step in twice.checkpoint["autosize"]["history"]] == ["a.pt", "b.pt"]


def test_explicit_task_name_becomes_the_stock_one():
    model, args = build_model(task="translation_autosize")
    checkpoint = checkpoint_of(model, args, TASK | {"_name": "translation_autosize"})
    result = compact(checkpoint).checkpoint
    assert result["cfg"]["task"] == TASK
    assert result["cfg"]["model"].task == "translation"


def test_settings_of_old_checkpoints():
    model, args = build_model(task="translation")
    prune(model, (3, 0, 10, 1))
    checkpoint = {"args": args, "model": model.state_dict()}
    result = compact(checkpoint).checkpoint
    assert isinstance(result["args"], Namespace)
    assert result["args"].arch == "transformer_autosize"
    assert result["args"].encoder_ffn_dims == "3,0"


# --- the optimizer's state and the moving average -----------------------------------------------


def trained(optimizer_class, model, **options):
    """A model and optimizer after three steps on nothing in particular."""
    optimizer = optimizer_class(model.parameters(), **options)
    tokens = torch.arange(4, 14).unsqueeze(0)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, torch.tensor([10]), tokens.flip(1))[0].square().sum().backward()
        optimizer.step()
    return optimizer


def adafactor(parameters):
    from fairseq.optim.adafactor import Adafactor

    return Adafactor(parameters)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.Adam, torch.optim.Adagrad, adafactor, torch.optim.SGD]
)
@pytest.mark.parametrize("options", [{"share_all_embeddings": True}, {"encoder_ffn_embed_dim": 8}])
@pytest.mark.parametrize("skipped", [False, True])
def test_optimizer_state_is_cut_with_its_neurons(optimizer_class, options, skipped):
    """Also where it has none: of plain SGD, and of a layer that LayerDrop has always skipped."""
    model, args = build_model(**options)
    optimizer = trained(optimizer_class, model)
    for parameter in model.encoder.layers[0].parameters() if skipped else ():
        optimizer.state.pop(parameter, None)
    alive = (3, 0, 10, 1)
    prune(model, alive)
    kept = [layer.fc1.weight.any(dim=1) for layer in (*model.encoder.layers, *model.decoder.layers)]
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": optimizer.state_dict()}
    result = compact(checkpoint, keep_optimizer=True).checkpoint
    small = model_in(result)
    # A new optimizer takes the state, and its slots are those of the neurons that stay.
    again = optimizer_class(small.parameters())
    again.load_state_dict(result["last_optimizer_state"])
    old = {name: optimizer.state[p] for name, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        assert (parameter in again.state) == bool(old[name])
        new, before = again.state[parameter], old[name]
        layer = ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
        path, _, leaf = name.partition(".fc")
        mask = kept[layer.index(path)] if leaf else None
        for key, value in before.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if (leaf == "1.weight" and not key.endswith("_col")) or leaf == "1.bias":
                value = value[mask]
            elif leaf == "2.weight" and not key.endswith("_row"):
                value = value[..., mask]
            assert torch.equal(new[key], value), (name, key)
    tokens = torch.arange(4, 14).unsqueeze(0)
    small(tokens, torch.tensor([10]), tokens)[0].sum().backward()
    again.step()


def test_flat_optimizer_state_of_fp16():
    model, args = build_model(share_all_embeddings=True)
    prune(model, (3, 0, 10, 1))
    parameters = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    state = {"state": {0: {"step": 3, "exp_avg": flat, "exp_avg_sq": flat}}}
    state |= {"param_groups": [{"lr": 0.1, "params": [0]}], "loss_scale": 4.0}
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": state}
    result = compact(checkpoint, keep_optimizer=True).checkpoint
    small = model_in(result)
    wanted = torch.cat([p.detach().flatten() for p in small.parameters()])
    cut = result["last_optimizer_state"]
    assert torch.equal(cut["state"][0]["exp_avg"], wanted)
    assert cut["state"][0]["step"] == 3 and cut["loss_scale"] == 4.0
    state["state"] = {}  # plain SGD's
    assert compact(checkpoint, keep_optimizer=True).checkpoint["last_optimizer_state"] == state


def test_without_keep_optimizer_there_is_no_state():
    model, args = build_model()
    optimizer = trained(torch.optim.Adam, model)
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": optimizer.state_dict()}
    assert compact(checkpoint).checkpoint["last_optimizer_state"] is None


def test_moving_average_is_cut_by_the_models_mask():
    model, args = build_model()
    average = copy.deepcopy(model.state_dict())  # no zero row anywhere
    prune(model, (3, 0, 10, 1))
    alive = model.encoder.layers[0].fc1.weight.any(dim=1)
    checkpoint = checkpoint_of(model, args)
    checkpoint["extra_state"] = {"ema": average, "epoch": 2}
    result = compact(checkpoint)
    cut = result.checkpoint["extra_state"]
    assert cut["epoch"] == 2
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(cut["ema"][name], average[name][alive])
    assert result.ema_rows == 9 + 12 + 0 + 9
    model_in({**result.checkpoint, "model": cut["ema"]})


@pytest.mark.parametrize("zero", [True, False], ids=["zero in the average", "nearly zero"])
def test_constants_of_a_moving_average_are_folded_into_its_own_bias(zero):
    """Its dead neurons, whose biases are not the model's."""
    model, args = build_model()
    prune(model, (3, 0, 10, 1), bias=0.3)
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (*averaged.encoder.layers, *averaged.decoder.layers):
            dead = ~layer.fc1.weight.any(dim=1)
            layer.fc1.bias[dead] = 0.2
            layer.fc1.weight[dead] += 0 if zero else 1e-9
    checkpoint = checkpoint_of(model, args)
    checkpoint["extra_state"] = {"ema": averaged.state_dict()}
    result = compact(checkpoint).checkpoint
    small = model_in({**result, "model": result["extra_state"]["ema"]})
    torch.testing.assert_close(outputs(small), outputs(averaged), rtol=0, atol=1e-7)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_models_are_refused(value):
    model, args = build_model()
    with torch.no_grad():
        model.decoder.layers[1].fc2.weight[0, 0] = value
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.fc2\.weight holds NaN"):
        compact(checkpoint_of(model, args))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("my_own", r"architecture my_own \(unknown here, as .*\); can: .*transformer_iwslt_de_en"),
        ("lightconv", r"lightconv \(model lightconv\)"),
        (
            "multilingual_transformer_iwslt_de_en",
            "for each pair of languages.* --task translation_multi_simple_epoch",
        ),
    ],
)
def test_other_architectures_are_refused_by_name(arch, message):
    model, args = build_model()
    args.arch = args._name = arch
    with pytest.raises(CheckpointError, match=message):
        compact(checkpoint_of(model, args))


def test_models_without_feed_forward_layers_are_refused():
    _, args = build_model()
    with pytest.raises(GroupError, match="among the parameters: a"):
        compact({"cfg": {"model": args}, "model": {"a": torch.ones(2)}})


def test_layer_norm_between_fc1_and_fc2_is_refused():
    model, args = build_model(scale_fc=True)
    with pytest.raises(CheckpointError, match="--scale-fc"):
        compact(checkpoint_of(model, args))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "no optimizer state"),
        ({"state": {}}, "is not one of torch's"),
        ({"state": {7: {}}, "param_groups": [{"params": [0, 1]}]}, "is not one of torch's"),
        ({"state": {0: []}, "param_groups": [{"params": [0, 1]}]}, "is not one of torch's"),
        ({"state": {}, "param_groups": [{"params": [0, 1]}]}, "has 2 parameters, the model has"),
        (
            {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"params": [0]}]},
            r"flat exp_avg has shape \(5,\)",
        ),
    ],
)
def test_optimizer_states_that_do_not_fit_are_refused(state, message):
    model, args = build_model()
    checkpoint = checkpoint_of(model, args) | {"last_optimizer_state": state}
    with pytest.raises(CheckpointError, match=message):
        compact(checkpoint, keep_optimizer=True)


@pytest.mark.parametrize("options", [{"multiple_of": 0}, {"min_width": -1}])
def test_bad_arguments_are_refused_by_name(options):
    model, args = build_model()
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .* is not a number >= "):
        compact(checkpoint_of(model, args), **options)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ("3,x", "--encoder-ffn-dims 3,x: must be numbers >= 0"),
        ("3,-1", "--encoder-ffn-dims 3,-1: must be numbers >= 0"),
        ("3", "--encoder-ffn-dims 3: gives 1 sizes for 2 layers"),
    ],
)
def test_bad_widths_are_refused_by_the_flags_name(dims, message):
    model, args = build_model(encoder_ffn_dims=dims)
    args._name = "transformer_autosize"
    with pytest.raises(ValueError, match=message):
        model_in(checkpoint_of(model, args))


def test_layers_to_keep_choose_their_widths():
    model, args = build_model(encoder_layers=3)
    prune(model, (3, 0, 7, 10, 1))
    result = compact(checkpoint_of(model, args)).checkpoint
    result["cfg"]["model"].encoder_layers_to_keep = "0,2"
    result["cfg"]["model"].decoder_layers_to_keep = "0,1"  # fairseq wants both or neither
    small = model_in(result)
    assert [layer.fc1.out_features for layer in small.encoder.layers] == [3, 7]


def test_sizes_of_kept_layers_are_saved():
    """fairseq forgets which layers were kept once it has loaded them: then the sizes are theirs."""
    model, args = build_model(encoder_layers=3)
    prune(model, (3, 0, 7, 10, 1))
    settings = compact(checkpoint_of(model, args)).checkpoint["cfg"]["model"]
    settings.encoder_layers_to_keep, settings.decoder_layers_to_keep = "0,2", "0,1"
    fine = build(settings, model_task())  # as fairseq-train does, with layers yet to choose
    assert (settings.encoder_layers, settings.encoder_ffn_dims) == (2, "3,7")
    settings.encoder_layers_to_keep = settings.decoder_layers_to_keep = None
    again = build(settings, model_task())
    again.load_state_dict(fine.state_dict())


def test_a_width_may_be_a_number():
    assert layer_sizes(Namespace(decoder_ffn_dims=24), "decoder_ffn_dims", 1) == [24]
    assert layer_sizes(Namespace(decoder_ffn_dims=0), "decoder_ffn_dims", 1) == [0]
    with pytest.raises(ConfigError, match=r"--decoder-ffn-dims \[8, 12\]: must be numbers"):
        layer_sizes(Namespace(decoder_ffn_dims=[8, 12]), "decoder_ffn_dims", 2)
