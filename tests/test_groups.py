"""Finding feed-forward blocks in models and in state dicts."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.models.transformer import TransformerModel
from small_models import build_model
from torch import nn

from fairseq_autosize.groups import (
    GroupError,
    dead_neurons,
    feed_forward_in_model,
    feed_forward_in_state,
    has_slope_at_zero,
    is_layer_name,
    is_of,
    maps_zero_to_zero,
)


def transformer(**options: object) -> TransformerModel:
    return build_model(**({"decoder_layers": 1} | options))[0]


def test_layers_of_a_model_in_order():
    model = transformer()
    layers = feed_forward_in_model(model)
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("encoder.layers.0", "encoder-ffn"),
        ("encoder.layers.1", "encoder-ffn"),
        ("decoder.layers.0", "decoder-ffn"),
    ]
    assert layers[0].fc1_weight is model.encoder.layers[0].fc1.weight
    assert layers[2].fc2_weight is model.decoder.layers[0].fc2.weight
    assert layers[2].fc1_bias.shape == (10,)


def test_names_of_layers():
    for name in ("encoder.layers.0", "decoder.layers.12", "models.de-en.encoder.layers.1"):
        assert is_layer_name(name)
    for name in ("encoder", "encoder.layers", "layers.0", "encoder.layers.x", "ffn", ""):
        assert not is_layer_name(name)


@pytest.mark.parametrize(
    ("name", "selected"),
    [
        ("ffn", [0, 2, 4]),
        ("encoder-ffn", [0, 2]),
        ("attention", [1, 3, 5, 6]),
        ("cross-attention", [6]),
        ("encoder.layers.0", [0, 1]),
        ("encoder.layers.10", [2, 3]),
        ("models.de-en.encoder.layers.10", [2, 3]),
        ("decoder.layers.0", [4, 5, 6]),
        ("encoder.layers.1", []),
    ],
)
def test_blocks_of_a_name(name, selected):
    paths = ["encoder.layers.0", "models.de-en.encoder.layers.10", "decoder.layers.0"]
    blocks = []
    for path in paths:
        side = "encoder" if "encoder" in path else "decoder"
        blocks.append(SimpleNamespace(name=path, kind=f"{side}-ffn"))
        blocks.append(SimpleNamespace(name=f"{path}.self_attn", kind=f"{side}-attention"))
    blocks.append(SimpleNamespace(name="decoder.layers.0.encoder_attn", kind="cross-attention"))
    assert [i for i, block in enumerate(blocks) if is_of(block, name)] == selected


@pytest.mark.parametrize(
    ("groups", "kinds"),
    [(("encoder-ffn",), {"encoder-ffn"}), (("decoder-ffn",), {"decoder-ffn"})],
)
def test_groups_select_a_side(groups, kinds):
    assert {layer.kind for layer in feed_forward_in_model(transformer(), groups)} == kinds


def test_layerdrop_hides_no_layer():
    model = transformer(encoder_layerdrop=0.9, encoder_layers=4).train()
    assert sum(x.kind == "encoder-ffn" for x in feed_forward_in_model(model)) == 4


def test_wrapped_model_has_the_same_layers():
    wrapper = nn.Module()
    wrapper.module = transformer()
    assert len(feed_forward_in_model(wrapper)) == 3


def test_state_dict_gives_what_the_model_gives():
    model = transformer()
    from_state = feed_forward_in_state(model.state_dict())
    from_model = feed_forward_in_model(model)
    assert [layer.name for layer in from_state] == [layer.name for layer in from_model]
    for mine, other in zip(from_state, from_model, strict=True):
        assert torch.equal(mine.fc1_weight, other.fc1_weight)


def test_shared_layers_are_found_once():
    model = transformer()
    model.encoder.layers[1] = model.encoder.layers[0]
    names = [layer.name for layer in feed_forward_in_state(model.state_dict())]
    assert names == ["encoder.layers.0", "decoder.layers.0"]
    assert [layer.name for layer in feed_forward_in_model(model)] == names


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_accurate", "tanh", "linear"])
def test_activations_that_keep_zero(activation):
    layers = feed_forward_in_model(transformer(activation_fn=activation))
    assert len(layers) == 3


def test_layers_that_do_not_tell_their_activation_are_refused():
    model = transformer()
    del model.encoder.layers[1].activation_fn  # as in LightConv
    with pytest.raises(GroupError, match=r"encoder\.layers\.1: TransformerEncoderLayerBase does"):
        feed_forward_in_model(model)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [("relu", False), ("relu_squared", False), ("gelu", True), ("tanh", True), ("linear", True)],
)
def test_slope_at_zero(activation, slope):
    (layer, *_) = feed_forward_in_model(transformer(activation_fn=activation))
    assert has_slope_at_zero(layer.activation) == slope


def test_other_activations_are_refused_by_name():
    model = transformer()
    model.decoder.layers[0].activation_fn = torch.sigmoid
    with pytest.raises(GroupError, match=r"decoder\.layers\.0: activation 'sigmoid'"):
        feed_forward_in_model(model)
    assert feed_forward_in_model(model, ["encoder-ffn"])  # the other side can be auto-sized


def test_silu_is_fine_as_a_function_and_refused_as_the_class():
    # fairseq's --activation-fn swish gives the class, which is not callable on a tensor.
    assert maps_zero_to_zero(torch.nn.functional.silu)
    model = transformer(activation_fn="swish")
    with pytest.raises(GroupError, match="SiLU"):
        feed_forward_in_model(model)


def test_layer_norm_between_fc1_and_fc2_is_refused_by_the_flags_name():
    model = transformer(scale_fc=True)
    with pytest.raises(GroupError, match=r"decoder\.layers\.0: --scale-fc"):
        feed_forward_in_model(model)
    assert feed_forward_in_model(model, ["encoder-ffn"])  # fairseq's encoder has none


def test_unknown_architecture_lists_what_was_found():
    with pytest.raises(GroupError, match=r"Modules found: Linear x1, ReLU x1"):
        feed_forward_in_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(GroupError, match=r"among the parameters: 0\.bias, 0\.weight"):
        feed_forward_in_state(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).state_dict())


def test_state_with_wrong_shapes_is_refused():
    state = transformer().state_dict()
    state["encoder.layers.0.fc2.weight"] = torch.zeros(8, 11)
    with pytest.raises(GroupError, match=r"encoder\.layers\.0: .* do not belong together"):
        feed_forward_in_state(state)


def test_dead_means_a_row_of_exact_zeros():
    weight = torch.tensor([[0.0, 0.0], [0.0, 1e-38], [-0.0, 0.0], [float("nan"), 0.0]])
    assert dead_neurons(weight).tolist() == [True, False, True, False]
    assert dead_neurons(torch.empty(0, 3)).tolist() == []
