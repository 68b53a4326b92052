"""Networks of the transformers library, small: heads and widths go, exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbdcompress.compare import EXACT, flatten_output, relative_difference
from vbdcompress.conversion import convert
from vbdcompress.slimming import slim
from vbdcompress.surgery.slice import apply_plan_
from vbdcompress.vbd.posterior import find_posteriors, set_threshold_

transformers = pytest.importorskip("transformers")

WORDS, HEADS, WIDE = 64, 4, 48
COMMON = {"vocab_size": WORDS, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": WIDE}
# Class -> its options, and how many groups can lose channels of each size: a stream has 32
NETWORKS: dict[str, tuple[dict[str, Any], dict[int, int]]] = {
    "BertForSequenceClassification": (BERT, {HEADS: 2, WIDE: 2, 32: 2}),
    "AlbertForSequenceClassification": (BERT | {"embedding_size": 16}, {HEADS: 1, WIDE: 1, 32: 2, 16: 1}),
    "GPT2ForSequenceClassification": (
        {"n_embd": 32, "n_layer": 2, "n_head": HEADS, "n_inner": WIDE, "use_cache": False},
        {HEADS: 2, WIDE: 2, 32: 1},
    ),
    # two heads of queries go with each of keys
    "LlamaForSequenceClassification": (
        BERT | {"num_key_value_heads": 2, "use_cache": False},
        {2: 2, WIDE: 2, 32: 1},
    ),
    # the table of words is held by a module that never runs; all layers share one table of distances
    "T5EncoderModel": (
        {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": HEADS, "d_ff": WIDE},
        {HEADS: 1, WIDE: 2},
    ),
    "BartForSequenceClassification": (
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "use_cache": False}
        | dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], HEADS)
        | dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], WIDE),
        {HEADS: 3, WIDE: 2, 32: 1},
    ),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    options = COMMON | ({"n_positions": 64} if "GPT2" in name else {}) | NETWORKS[name][0]
    model: nn.Module = kind(kind.config_class(**options)).double().eval()
    return model


def sentences(count: int, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, WORDS, (count, length), generator=generator)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_and_widths_go_exactly(name: str) -> None:
    converted = convert(built(name), sentences(3))
    sizes = [group.size for group in converted.scan.removable]
    assert {size: sizes.count(size) for size in sizes} == NETWORKS[name][1]
    with torch.no_grad():
        for posterior in find_posteriors(converted.model):
            posterior.log_sigma2[: len(posterior.log_sigma2) // 2] = 60.0
    slimmed = slim(converted, 50.0)
    set_threshold_(converted.model, 50.0)
    fresh = built(name)
    apply_plan_(fresh, slimmed.plan)
    fresh.load_state_dict(slimmed.model.state_dict())
    with torch.no_grad():
        masked, cut, loaded = (
            flatten_output(model.eval()(**sentences(5))) for model in (converted.model, slimmed.model, fresh)
        )
    assert relative_difference(masked, cut) <= EXACT
    assert all(map(torch.equal, cut, loaded))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (built(name), slimmed.model))
    assert after < before
