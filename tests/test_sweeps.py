"""Sweeps in TOML and on the command line: every combination once, each under its own name."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.cli.build import with_flags
from atlas.configs import BuildConfig, SAEConfig
from atlas.errors import ConfigError
from atlas.sweeps import expand_sweeps, read_sweep

TOML = """
[[sae]]
architecture = "relu"
sweep = { l1_coefficient = [0.1, 1.0], d_sae = [128, 256] }
[[sae]]
architecture = "topk"
label = "base"
sweep = { k = [4, 8], tied_start = [true, false] }
[[sae]]
architecture = "gated"
"""


def read(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return BuildConfig.from_toml(path)


def test_a_sweep_is_every_combination(tmp_path):
    found = read(tmp_path, TOML).sae
    assert found[:4] == (
        SAEConfig("relu", l1_coefficient=0.1, d_sae=128, label="l1_coefficient-0.1"),
        SAEConfig("relu", l1_coefficient=0.1, d_sae=256, label="l1_coefficient-0.1"),
        SAEConfig("relu", l1_coefficient=1.0, d_sae=128, label="l1_coefficient-1"),
        SAEConfig("relu", l1_coefficient=1.0, d_sae=256, label="l1_coefficient-1"),
    )
    assert [sae.label for sae in found[4:]] == [
        "base-k-4-tied_start-on",
        "base-k-4-tied_start-off",
        "base-k-8-tied_start-on",
        "base-k-8-tied_start-off",
        None,
    ]
    assert found[8] == SAEConfig("gated")


def test_fields_that_names_show_need_no_label(tmp_path):
    text = '[[sae]]\nsweep = { architecture = ["topk", "relu"], expansion = [2, 4] }\n'
    found = read(tmp_path, text).sae
    assert [(sae.architecture, sae.expansion, sae.label) for sae in found] == [
        ("topk", 2, None),
        ("topk", 4, None),
        ("relu", 2, None),
        ("relu", 4, None),
    ]


def test_lists_can_be_swept(tmp_path):
    text = '[[sae]]\narchitecture = "matryoshka"\nsweep = { prefixes = [[0.5, 1.0], [1.0]] }\n'
    found = read(tmp_path, text).sae
    assert [(sae.prefixes, sae.label) for sae in found] == [
        ((0.5, 1.0), "prefixes-0.5-1"),
        ((1.0,), "prefixes-1"),
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["lr", "l1_coefficient", "threshold", "aux_k", "d_sae"]),
        st.lists(st.integers(64, 10**9), min_size=1, max_size=4, unique=True),
        min_size=1,
    )
)
def test_names_are_unique_and_nothing_is_left_out(sweep):
    found = expand_sweeps({"sae": [{"architecture": "relu", "sweep": sweep}]})["sae"]
    values = [tuple(sae[key] for key in sweep) for sae in found]
    assert values == list(itertools.product(*sweep.values()))
    assert len({SAEConfig(**sae).name_at("m", "s", 4) for sae in found}) == len(found)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("3", "is not a table"),
        ("{}", "is not a table"),
        ("{ k = 3 }", "sweep of k 3"),
        ("{ k = [] }", "sweep of k \\[\\]"),
        ("{ l1 = [1] }", "'l1' is not known"),
        ('{ k = ["a"] }', "'a' is not a whole number"),
        ("{ k = [0] }", "k 0"),
        (f"{{ k = {list(range(1, 40))}, aux_k = {list(range(1, 40))} }}", "1521 combinations"),
    ],
)
def test_wrong_sweeps_are_refused(tmp_path, sweep, said):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, f"[[sae]]\nsweep = {sweep}\n")


def test_on_the_command_line():
    assert read_sweep("lr=1e-3, 2") == ("lr", [1e-3, 2])
    config = with_flags(BuildConfig(), {"sweep": ("d_sae=64,128", "k=4,8"), "architecture": "batchtopk"})
    assert [(sae.architecture, sae.d_sae, sae.label) for sae in config.sae] == [
        ("batchtopk", 64, "k-4"),
        ("batchtopk", 64, "k-8"),
        ("batchtopk", 128, "k-4"),
        ("batchtopk", 128, "k-8"),
    ]
    with pytest.raises(ConfigError, match="--lr is ambiguous: there are 4"):
        with_flags(config, {"lr": 0.1})


def test_switches_keep_what_the_file_says(tmp_path):
    text = "[prune]\ntokens = 7\n[train]\ncache = true\n"
    config = with_flags(
        read(tmp_path, text), {"prune": True, "finetune": True, "cache": False, "no_train": False}
    )
    assert config.prune.tokens == 7
    assert config.finetune.tokens == 500_000
    assert config.train.cache
    assert with_flags(BuildConfig(), {"prune": False}).prune is None
    imports = with_flags(BuildConfig(), {"no_train": True, "imports": "gpt2/a,gpt2/b"})
    assert (imports.sae, imports.imports) == ((), ("gpt2/a", "gpt2/b"))
