import dataclasses
import json

import pytest

from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.errors import InputError


def test_round_trip_through_json():
    config = DataConfig(
        sequence_length=8, batch_size=4, sources=(SourceConfig(path="a", weight=2),)
    )
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values["sources"] = tuple(SourceConfig(**s) for s in values["sources"])
    values["eval_sources"] = tuple(values["eval_sources"])
    assert DataConfig(**values) == config


@pytest.mark.parametrize(
    ("batch_size", "streams"), [(1, 1), (8, 8), (64, 64), (96, 48), (128, 64), (97, 1)]
)
def test_default_streams_divide_the_batch(batch_size, streams):
    assert DataConfig(sequence_length=8, batch_size=batch_size).streams == streams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence_length", 1),
        ("batch_size", 0),
        ("sources", ()),
        ("holdout_fraction", 0.9),
        ("packing", "best_fit"),
        ("seed", -1),
        ("align", 0),
        ("num_streams", 3),
        ("prefetch_batches", -1),
        ("read_threads", -1),
        ("tokenizer", ""),
    ],
)
def test_errors_name_the_field_and_the_value(field, value):
    with pytest.raises(
        InputError, match=f"{field}={value!r}".replace("(", r"\(").replace(")", r"\)")
    ):
        DataConfig(**{"sequence_length": 8, "batch_size": 4, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("path", ""), ("format", "csv"), ("weight", 0.0), ("max_document_bytes", 1)],
)
def test_source_errors_name_the_field_and_the_value(field, value):
    with pytest.raises(InputError, match=f"{field}={value!r}"):
        SourceConfig(**{field: value})
