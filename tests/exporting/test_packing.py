"""Packed weights: rebuilt to the last bit by onnxruntime, at session time, from fewer bytes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import vbdcompress.exporting.onnx_file as onnx_file
from vbdcompress.errors import ExportError
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.packing import Storage, pack_
from vbdcompress.rounding import Rounded, round_weight, roundable, write_rounded_

from .sums import model_of, rebuilt

REBUILDING = {
    "CumSum",
    "ScatterElements",
    "Expand",
    "Gather",
    "Cast",
    "Div",
    "Mod",
    "Slice",
    "Mul",
    "Split",
}


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Any shape, any sparsity, runs of zeros beyond what one byte counts, empty rows, scalars."""
    shape = draw(
        st.sampled_from([(), (1,), (700,), (3, 5), (40, 90), (2, 300, 3), (6, 4, 3, 3), (1, 70_000)])
    )
    seed, share = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.7, 1.0]))
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal(shape) * (generator.random(shape) < share)
    if len(shape) > 1 and draw(st.booleans()):
        weight[0] = 0
    extreme = draw(hnp.arrays(np.float32, (3,), elements=st.floats(-60000, 60000, width=32)))
    weight = np.asarray(weight, np.float32)
    weight.ravel()[: min(3, weight.size)] = extreme[: min(3, weight.size)]
    return weight


@settings(deadline=None)  # the first session, and k-means, take longer than the rest
@given(weights())
def test_pack_rebuilds_every_tensor_to_the_last_bit_and_never_makes_it_larger(weight: np.ndarray) -> None:
    proto = model_of(weight)
    before = proto.ByteSize()
    packed = pack_(proto)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_array_equal(rebuilt(proto), weight)
    assert proto.ByteSize() <= before
    assert all(row.exact for row in packed)


def layer_of(weight: np.ndarray) -> nn.Module:
    """A layer that holds a weight of this shape."""
    if weight.ndim == 4:
        layer: nn.Module = nn.ConvTranspose2d(weight.shape[0], weight.shape[1], weight.shape[2], bias=False)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(weight.copy())
    return layer


@settings(deadline=None)  # the first session, and k-means, take longer than the rest
@given(weights().filter(lambda weight: weight.ndim in (2, 4)), st.sampled_from([16, 8, 4]))
def test_packed_codes_give_the_rounded_weight_to_the_last_bit(weight: np.ndarray, bits: int) -> None:
    codes = round_weight(roundable(layer_of(weight))["weight"], bits)
    values = codes.decode()
    assert not values[weight == 0].any()
    proto = model_of(values)
    packed = pack_(proto, {"w": codes})
    np.testing.assert_array_equal(rebuilt(proto), values)
    if weight.size > 3000 and weight.all():
        assert packed[0].bytes < weight.size * bits / 8 + 1500


def exported(
    model: nn.Module, path: Path, rounded: Mapping[str, Rounded] | None = None, *, pack: bool = True
) -> onnx.ModelProto:
    samples = torch.randn(8, *(3, 12, 12), generator=torch.Generator().manual_seed(1))
    export_onnx(model, path, samples, storage=Storage(pack, rounded or {}))
    return onnx.load(path)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Linear(16, 40),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(960, 10),
    ).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < 0.1
    return model


@pytest.mark.parametrize("bits", [32, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (16, 8)), 4])
def test_export_packs_layers_behind_batch_norm_and_transposed_ones(bits: int, tmp_path: Path) -> None:
    model, codes = small_network(), {}
    if bits < 32:
        codes = {name: round_weight(layer, bits) for name, layer in roundable(model).items()}
        write_rounded_(model, codes)
    dense = exported(model, tmp_path / "dense.onnx", pack=False)
    proto = exported(model, tmp_path / "packed.onnx", codes)
    assert proto.ByteSize() < 0.4 * dense.ByteSize()
    kinds = {initializer.data_type for initializer in proto.graph.initializer}
    assert (TensorProto.UINT8 in kinds) or bits == 32
    floats = [np.prod(item.dims) for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT]
    # what is left in 32 bits: biases, scales, and the nonzeros where these are not rounded
    assert sum(floats) < (0.13 * count_weights(model) if bits == 32 else 350)


def count_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


# the tensors in 8 bits are rebuilt together, the others alone
MIXED = (16, 8, 8, 4)


def test_nothing_that_rebuilds_weights_is_left_in_the_optimised_graph(tmp_path: Path) -> None:
    model = small_network()
    codes = {
        name: round_weight(layer, bits)
        for (name, layer), bits in zip(roundable(model).items(), MIXED, strict=True)
    }
    write_rounded_(model, codes)
    proto = exported(model, tmp_path / "packed.onnx", codes)
    assert {node.op_type for node in proto.graph.node} >= REBUILDING - {"Slice"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "packed.onnx"), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not left & REBUILDING


@pytest.mark.parametrize("bits", [(32, 32, 32, 32), MIXED], ids=["exact", "rounded"])
def test_packed_files_keep_to_what_onnx_says_of_operators(bits: tuple[int, ...], tmp_path: Path) -> None:
    model = small_network()
    codes = {
        name: round_weight(layer, of)
        for (name, layer), of in zip(roundable(model).items(), bits, strict=True)
        if of < 32
    }
    write_rounded_(model, codes)
    proto = exported(model, tmp_path / "packed.onnx", codes)
    assert {node.op_type for node in proto.graph.node} >= {"CumSum", "ScatterElements"}
    x = torch.randn(2, 3, 12, 12).numpy()
    name = proto.graph.input[0].name
    (found,) = ReferenceEvaluator(proto).run(None, {name: x})
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert found == pytest.approx(session.run(None, {name: x})[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("which", range(8))
def test_a_fault_in_the_packed_constants_is_refused(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT16)
    model = small_network()
    codes = {
        name: round_weight(layer, bits)
        for (name, layer), bits in zip(roundable(model).items(), MIXED, strict=True)
    }
    write_rounded_(model, codes)

    def faulty(proto: onnx.ModelProto, rounded: Mapping[str, Rounded] | None) -> object:
        rows = pack_(proto, rounded)
        stored = [item for item in proto.graph.initializer if item.data_type in kinds]
        array = numpy_helper.to_array(stored[which]).copy()
        array.view(f"u{array.itemsize}").flat[array.size // 2] ^= 1
        stored[which].CopyFrom(numpy_helper.from_array(array, stored[which].name))
        return rows

    monkeypatch.setattr(onnx_file, "pack_", faulty)
    path = tmp_path / "packed.onnx"
    with pytest.raises(ExportError, match=r"differs from the network's|fails on|can't load"):
        exported(model, path, codes)
    assert not path.exists()


def several(arrays: list[np.ndarray]) -> onnx.ModelProto:
    """x + weight for each weight, for a scalar x."""
    names = [f"w{number}" for number in range(len(arrays))]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", name], [f"y{name}"]) for name in names],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])],
        [
            helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, list(array.shape))
            for name, array in zip(names, arrays, strict=True)
        ],
        [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@settings(deadline=None)  # the first session takes longer than the rest
@given(st.lists(weights(), min_size=2, max_size=4))
def test_pack_rebuilds_several_tensors_to_the_last_bit(arrays: list[np.ndarray]) -> None:
    proto = several(arrays)
    before = proto.ByteSize()
    packed = pack_(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ByteSize() <= before
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.zeros((), np.float32)})
    for one, other in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(one, other)
    kept = sum(
        array.nbytes
        for number, array in enumerate(arrays)
        if f"w{number}" not in {row.name for row in packed}
    )
    assert sum(row.bytes for row in packed) + kept <= proto.ByteSize()


def test_small_sparse_tensors_are_rebuilt_together_in_fewer_bytes() -> None:
    generator = np.random.default_rng(0)
    arrays = [
        (generator.standard_normal(shape) * (generator.random(shape) < 0.05)).astype(np.float32)
        for shape in ((40, 50), (30, 3, 3, 3), (60, 40))
    ]
    apart = [several([array]) for array in arrays]
    before = [proto.ByteSize() for proto in apart]
    saved = sum(before) - sum(_packed_size(proto) for proto in apart)
    together = several(arrays)
    size = together.ByteSize()
    assert size - _packed_size(together) > saved
    assert [node.op_type for node in together.graph.node].count("ScatterElements") == 1


def _packed_size(proto: onnx.ModelProto) -> int:
    pack_(proto)
    return proto.ByteSize()
