"""Language models: heads and widths go, exactly, and the file is the network."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_networks import HEADS, LABELS, NETWORKS, batch, built
from torch import Tensor, nn

from vbdcompress.compare import EXACT, flatten_output, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.errors import DataError
from vbdcompress.exported import from_exported
from vbdcompress.exporting.onnx_file import export_onnx
from vbdcompress.exporting.slim_file import load_slim
from vbdcompress.pipeline import compress
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_


@torch.no_grad()
def switch_off_(model: nn.Module) -> None:
    """Raise the variance of 40 % of each posterior's entries, and of some whole outputs, far up."""
    for posterior in find_posteriors(model):
        off = torch.rand(posterior.theta.shape) < 0.4
        off[0] = True
        posterior.log_sigma2[off] = 60.0


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "channels") for name in NETWORKS),
        *((name, "weights") for name in ("encoder", "decoder", "generator")),
        *(
            pytest.param(name, "weights", marks=pytest.mark.slow)
            for name in NETWORKS
            if name not in ("encoder", "decoder", "generator")
        ),
    ],
)
def test_slim_equals_masked_and_onnx_equals_torch(name: str, mode: Any, tmp_path: Path) -> None:
    converted = convert(built(name).double(), batch(3, 0), mode)
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        expected = flatten_output(converted.model.eval()(**batch(5, 1)))
        found = flatten_output(slimmed.model(**batch(5, 1)))
    assert relative_difference(expected, found) <= EXACT
    before = sum(parameter.numel() for parameter in converted.undo().parameters())
    assert sum(parameter.numel() for parameter in slimmed.model.parameters()) < before or mode == "weights"
    fresh = built(name).double()
    apply_plan_(fresh, slimmed.plan)
    fresh.load_state_dict(slimmed.model.state_dict())
    with torch.no_grad():
        assert all(map(torch.equal, found, flatten_output(fresh(**batch(5, 1)))))
    check = export_onnx(slimmed.model.float(), tmp_path / "model.onnx", batch(3, 0))
    assert check.max_difference <= check.tolerance


@pytest.mark.parametrize(("name", "table"), [("decoder", "embed_tokens"), ("generator", "wte")])
def test_a_table_and_the_head_that_shares_its_weight_are_cut_as_one(name: str, table: str) -> None:
    converted = convert(built(name).double(), batch(3, 0))
    with torch.no_grad():
        for posterior in find_posteriors(converted.model):
            posterior.theta.uniform_(0.5, 2.0)  # what the head's gates multiply by goes elsewhere
        expected = flatten_output(converted.model.eval()(**batch(5, 1)))
        assert relative_difference(expected, flatten_output(converted.undo()(**batch(5, 1)))) <= EXACT
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0).model
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        expected = flatten_output(converted.model(**batch(5, 1)))
        assert relative_difference(expected, flatten_output(slimmed(**batch(5, 1)))) <= EXACT
    head = slimmed.get_submodule("lm_head").weight
    assert head is slimmed.get_submodule(table).weight
    assert head.shape[1] < 24


# Group of the layer -> what can go one by one, or why it stays whole
EXPECTED: dict[str, dict[str, int | str]] = {
    "encoder": {
        **{f"layers.{n}.attention.query": HEADS for n in range(2)},
        **{f"layers.{n}.wide": 40 for n in range(2)},
        "embeddings.words": 24,
        "pooler": 20,
        "classifier": "output of the network",
    },
    "decoder": {
        **{f"layers.{n}.q_proj": HEADS for n in range(2)},  # pairs of heads, with their keys
        **{f"layers.{n}.gate_proj": 40 for n in range(2)},
        "embed_tokens": 24,  # with the head that shares its weight
    },
    "generator": {
        **{f"layers.{n}.attn.c_attn": HEADS for n in range(2)},
        **{f"layers.{n}.c_fc": 40 for n in range(2)},
        "wte": 24,
    },
}
EXPECTED |= {f"encoder_{kind}": EXPECTED["encoder"] for kind in ("fused", "shaped", "scaled")}


@pytest.mark.parametrize("name", NETWORKS)
def test_find_groups_says_what_goes_and_why_the_rest_stays(name: str) -> None:
    converted = convert(built(name), batch(3, 0))
    groups = {group.name: group for group in converted.scan.groups}
    for layer, told in EXPECTED[name].items():
        if isinstance(told, int):
            assert (groups[layer].size, groups[layer].whole_because) == (told, None)
        else:
            assert told in (groups[layer].whole_because or "")


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_and_widths_of_an_exported_one_go(name: str) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = built(name)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.of(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits

    example, other = batch(3, 0), batch(5, 1)
    shapes = {key: {0: torch.export.Dim("batch")} for key in example}
    found = from_exported(torch.export.export(Logits().eval(), (), example, dynamic_shapes=shapes))
    converted = convert(found.double(), example)
    groups = {group.name.removeprefix("of."): group.size for group in converted.scan.removable}
    shared = {"embed_tokens", "wte"}  # a program has one layer for both
    wanted = {
        layer: size for layer, size in EXPECTED[name].items() if isinstance(size, int) and layer not in shared
    }
    assert groups == wanted
    switch_off_(converted.model)
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    with torch.no_grad():
        expected, cut = converted.model.eval()(**other), slimmed.model(**other)
    assert relative_difference([expected], [cut]) <= EXACT


def test_compress_takes_dicts_with_labels_and_outputs_with_logits() -> None:
    """As data sets of the transformers library are, without a loss, a metric or an unpack of one's own."""
    batches = [{**batch(8, seed), "labels": torch.arange(8) % LABELS} for seed in range(3)]
    options: dict[str, Any] = {"epochs": 1, "finetune_epochs": 1, "device": "cpu", "threshold": -5.0}
    model = built("encoder_fused")
    result = compress(model, batches, validation=batches, test=batches, **options)
    wrong = {"before": model, "after": result.model.cpu()}
    for when, network in wrong.items():
        with torch.no_grad():
            found = [
                network(given["input_ids"], given["attention_mask"]).logits.argmax(1) != given["labels"]
                for given in batches
            ]
        assert result.report["errors"]["test"][when] == pytest.approx(100 * torch.cat(found).float().mean())
    # it follows the original, as a network of bare logits would
    assert result.report["stages"][0]["distillation"]["share"] == 1


def test_compress_says_which_batch_has_no_labels() -> None:
    batches = [{**batch(8, 0), "labels": torch.arange(8) % LABELS}, batch(8, 1)]
    with pytest.raises(DataError, match="a batch without 'labels'"):
        compress(built("encoder_fused"), batches[:1], validation=batches, epochs=1)


def test_compress_takes_batches_by_name(tmp_path: Path) -> None:
    batches = [{**batch(8, seed), "labels": torch.arange(8) % LABELS} for seed in range(3)]
    model = built("encoder_fused")
    result = compress(
        model,
        batches,
        validation=batches,
        test=batches,
        unpack=lambda given: ({k: v for k, v in given.items() if k != "labels"}, given["labels"]),
        loss=lambda output, target: F.cross_entropy(output.logits, target),
        metric=lambda output, target: (output.logits.argmax(-1) != target).float(),
        **{"mode": "channels", "epochs": 1, "finetune_epochs": 1, "device": "cpu", "threshold": -5.0},
    )
    assert result.model.layers[0].wide.out_features == 1  # of untrained gates none is left but the last
    result.export(tmp_path)
    slimmed = load_slim(tmp_path / "slim.safetensors", model=built("encoder_fused"))
    with torch.no_grad():
        expected, found = result.model.cpu()(**batch(5, 1)).logits, slimmed(**batch(5, 1)).logits
    assert torch.equal(expected, found)
