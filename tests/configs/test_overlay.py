import dataclasses

import pytest

from jaxalope.configs import AdamW, Cosine, get_experiment, overlay
from jaxalope.data.config import SourceConfig
from jaxalope.errors import InputError


@pytest.fixture
def tiny():
    return get_experiment("tiny")


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("train.steps=20", "train.steps", 20),
        ("train.steps=2e3", "train.steps", 2000),
        ("schedule.learning_rate=1", "schedule.learning_rate", 1.0),
        ("train.clip_norm=none", "train.clip_norm", None),
        ("train.ema_decay=0.5", "train.ema_decay", 0.5),
        ("model.scan_layers=false", "model.scan_layers", False),
        ("data.tokenizer=a=b", "data.tokenizer", "a=b"),
        ("train.profile_steps=5,2", "train.profile_steps", (5, 2)),
        ("train.profile_steps=(5, 2)", "train.profile_steps", (5, 2)),
        ("rules.seq=context", "rules.seq", "context"),
        ("rules.batch=data,fsdp", "rules.batch", ("data", "fsdp")),
        ("rules.embed=none", "rules.embed", None),
        ("mesh.fsdp=2", "mesh.fsdp", 2),
        ("data.sources=some/dir", "data.sources", (SourceConfig(path="some/dir"),)),
        ("data.sources=a,b", "data.sources", (SourceConfig(path="a"), SourceConfig(path="b"))),
        ("data.sources.0.path=x", "data.sources", (SourceConfig(path="x"),)),
        ("data.sources.0=x", "data.sources", (SourceConfig(path="x"),)),
        ("data.sources.1.path=x", "data.sources", (SourceConfig(), SourceConfig(path="x"))),
    ],
)
def test_a_setting_changes_its_field_and_nothing_else(tiny, setting, path, value):
    changed = overlay(tiny, [setting])
    *parents, last = path.split(".")
    node = changed
    for name in parents:
        node = getattr(node, name)
    assert getattr(node, last) == value
    assert type(getattr(node, last)) is type(value)
    (parent,) = parents
    before = getattr(tiny, parent)
    undone = dataclasses.replace(node, **{last: getattr(before, last)})
    assert dataclasses.replace(changed, **{parent: undone}) == tiny


def test_another_kind_keeps_the_fields_that_both_have(tiny):
    tiny = overlay(tiny, ["optimizer.weight_decay=0.3", "schedule.learning_rate=5e-4"])
    changed = overlay(tiny, ["optimizer=adamw", "optimizer.b1=0.8", "schedule=cosine"])
    assert changed.optimizer == AdamW(weight_decay=0.3, b1=0.8)
    assert changed.schedule == Cosine(learning_rate=5e-4, warmup_steps=2)


def test_another_kind_undoes_nothing_that_was_set_before_it(tiny):
    """The order on a command line is nobody's intention."""
    settings = ["optimizer.trainable=.*lora.*", "optimizer=adamw", "schedule.learning_rate=0.5"]
    settings += ["data.sources.0.weight=3", "data.sources=/x"]
    there, back = (
        overlay(tiny, [*order, "schedule=cosine"]) for order in (settings, settings[::-1])
    )
    assert there == back
    assert there.optimizer == AdamW(trainable=".*lora.*")
    assert there.schedule.learning_rate == 0.5
    assert [(x.path, x.weight) for x in there.data.sources] == [("/x", 3.0)]


def test_settings_are_checked_together_and_the_later_wins(tiny):
    # Neither of the first two is valid alone: warm-up and decay would outlast the run.
    changed = overlay(tiny, ["train.steps=3", "schedule.decay_steps=1", "train.steps=4"])
    assert (changed.train.steps, changed.schedule.decay_steps) == (4, 1)
    with pytest.raises(InputError, match=r"longer than train\.steps=3"):
        overlay(tiny, ["train.steps=3"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stpes=5", r"TrainConfig has no field 'stpes'; did you mean 'steps'\?"),
        ("steps=5", r"did you mean 'train.steps'\?"),
        ("optimiser.b1=0.5", r"did you mean 'optimizer'\?"),
        ("model.num_layer=2", r"KimiLinearConfig has no field .*'num_layers'"),
        ("train.steps=abc", r"train.steps='abc' cannot be used; train.steps wants int"),
        ("train.steps=2.5", r"wants int"),
        ("train.clip_norm=loud", r"wants float or none"),
        ("mesh.explicit=2", r"wants true or false"),
        ("train.profile_steps=1,2,3", r"wants \(int,int\) or none"),
        ("optimizer=adamv", r"wants adamw or muon; did you mean 'adamw'\?"),
        ("model=demo", r"model.field=value"),
        ("checkpoint=often", r"checkpoint.field=value"),
        ("train.ema_decay.rate=1", r"train.ema_decay is None and has no fields"),
        ("data.sources.5.path=x", r"from 0 to 0, or 1 to append"),
        ("retrofits.0=lorra", r"retrofits.0='lorra' cannot be used; .* did you mean 'lora'\?"),
        ("retrofits.0.rank=4", r"no retrofits.0 yet; .*retrofits.0=KIND \(.*lora"),
        (
            "parts=autoencoder",
            r"no default for source; .*model.NAME=SOURCE",
        ),
        ("parts.0.name=x", r"no parts.0 yet, .*no default for name, source; .*model.NAME=SOURCE"),
        ("train.steps", r"write it as path.to.field=value"),
        ("train.accumulation=3", r"must divide data.batch_size=4"),
        ("train.ema_decay=1.5", r"train.ema_decay=1.5: must be in \(0, 1\)"),
        ("optimizer.trainable=(", r"not a regular expression"),
    ],
)
def test_a_setting_that_cannot_be_used_says_why_and_what_would(tiny, setting, message):
    with pytest.raises(InputError, match=message):
        overlay(tiny, [setting])


def test_a_retrofit_is_appended_by_its_kind_and_set_in_the_same_call(tiny):
    changed = overlay(tiny, ["retrofits.0=lora", "retrofits.0.rank=4"])
    assert [type(retrofit).__name__ for retrofit in changed.retrofits] == ["LoRAConfig"]
    assert changed.retrofits[0].rank == 4
