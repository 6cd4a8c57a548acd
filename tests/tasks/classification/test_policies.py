"""Policies of augmentation: all of timm's, and none that timm would leave out a part of."""
import subprocess
import sys

import pytest
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_policy

from helpers import ROOT
from tasks.classification.errors import UnknownPolicyError
from tasks.classification.policies import PARTS, check_policy

KNOWN = [
    "rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-mstd1-tweights", "rand-m9-t3aw-p0.5-mmax20", "rand-t3a",
    "original", "original-mstd0.5", "originalr", "v0", "v0r-mstd0.5", "3a", "augmix", "augmix-m5-w4-d2-a0.5-b1-mstd0.5",
]


@pytest.mark.parametrize("policy", KNOWN)
def test_what_timm_knows(policy):
    check_policy(policy)
    create_transform(is_training=True, auto_augment=policy)


def test_names_are_timms():
    assert {policy.partition("-")[0] for policy in KNOWN} == set(PARTS)
    for name in set(PARTS) - {"rand", "augmix"}:
        assert auto_augment_policy(name)


@pytest.mark.parametrize("policy,message", [
    ("nonsense", "unknown augmentation policy 'nonsense'; choose from rand, augmix, v0"),
    ("randomly-m9", "unknown augmentation policy 'randomly'"),
    ("", "unknown augmentation policy ''"),
    ("rand-q7", "rand has no part 'q7'; choose from mstdNUMBER, mINT"),
    ("rand-m9.5", "rand has no part 'm9.5'"),
    ("rand-m9-", "rand has no part ''"),
    # Without a word, timm would leave these out.
    ("rand-inc", "rand has no part 'inc'"),
    ("rand-m9-weights", "rand has no part 'weights'"),
    ("rand-m9-tall", "rand has no part 'tall'"),
    ("original-mstd", "original has no part 'mstd'"),
    ("augmix-tweights", "augmix has no part 'tweights'"),
])
def test_what_timm_does_not_know(policy, message):
    with pytest.raises(UnknownPolicyError) as error:
        check_policy(policy)
    assert message in str(error.value)


MISTAKES = [
    (["--aa", "nonsense"], "unknown augmentation policy 'nonsense'"),
    (["--aa", "rand-q7"], "rand-q7: rand has no part 'q7'"),
    (["--opt", "bnbadam"], "the optimizer bnbadam cannot be used with these arguments"),
    (["--model", "vit_tiny_patch16_224", "--model_kwargs", "num_heads=5"], "python -O leaves out the asserts by which"),
    (["--model_kwargs", "num_regions=0"], "biformer_nano cannot be built: num_regions must be at least 1"),
]


@pytest.mark.long
def test_mistakes_are_one_line_without_asserts_too(tmp_path):
    """One process of `python -O` for all of them."""
    common = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device",
              "cpu", "--data_set", "digits", "--lr", "1e-2", "--output_dir", str(tmp_path / "run")]
    code = f"import main; print([main.main({common} + words) for words in {[words for words, _ in MISTAKES]}])"
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout.splitlines()[-1] == f"{[2] * len(MISTAKES)}" and len(lines) == len(MISTAKES), done.stderr
    for line, (_, message) in zip(lines, MISTAKES, strict=True):
        assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
