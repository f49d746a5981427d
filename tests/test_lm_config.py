"""GPTConfig: a round trip through JSON, and one sentence for each wrong field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fused_lm.lm import GPTConfig


def test_config_round_trip_through_json() -> None:
    config = GPTConfig(num_kv_heads=2, positions="rotary", activation="swiglu", dropout=0.1)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.context = 3


BAD_FIELDS = [
    ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    ({"num_layers": 2.0}, r"num_layers must be int, got 2.0 \(float\)"),
    ({"context": True}, r"context must be int, got True \(bool\)"),
    ({"num_kv_heads": "2"}, r"num_kv_heads must be int \| None, got '2' \(str\)"),
    ({"num_kv_heads": 4}, r"num_kv_heads \(4\) must divide num_heads \(6\)"),
    ({"embed_dim": 100}, r"num_heads \(6\) must divide embed_dim \(100\)"),
    ({"dropout": "0.1"}, r"dropout must be float, got '0.1' \(str\)"),
    ({"dropout": float("nan")}, r"dropout must be within 0 and 1, got nan"),
    ({"bias": 1}, r"bias must be bool, got 1 \(int\)"),
    ({"positions": "alibi"}, r"positions must be one of learned, sinusoidal, rotary, got 'alibi'"),
    ({"activation": "tanh"}, r"activation must be one of gelu"),
    ({"norm": None}, r"norm must be str, got None \(NoneType\)"),
    ({"embed_dim": 18, "positions": "rotary"}, r"rotary positions need an even head dim, got 3"),
    ({"width": 3, "depth": 4}, r"unknown fields depth, width; known are vocab_size, context"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS)
def test_wrong_fields_are_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GPTConfig.from_dict({**GPTConfig().to_dict(), **changes})
    assert "\n" not in str(caught.value)


def test_missing_fields_and_foreign_objects_are_refused() -> None:
    values = GPTConfig().to_dict()
    del values["context"], values["norm"]
    with pytest.raises(ValueError, match=r"missing fields context, norm"):
        GPTConfig.from_dict(values)
    with pytest.raises(ValueError, match=r"expected a mapping of fields, got list"):
        GPTConfig.from_dict([1, 2])
