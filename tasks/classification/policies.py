"""Names of timm's augmentation policies, checked here: timm checks them by asserts, and leaves out some parts."""
import re

from timm.data import create_transform

from .errors import UnknownPolicyError

# The parts of each policy, KEY and NUMBER, which hyphens join to its name.
_COMMON = {"mstd": float}
PARTS = {
    "rand": {**_COMMON, "m": int, "n": int, "p": float, "mmax": int, "inc": int},
    "augmix": {**_COMMON, "m": int, "w": int, "d": int, "a": float, "b": int},
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), _COMMON),
}
# What RandAugment chooses among; a part of its own.
CHOICES = ("tweights", "t3aw", "t3a")


def check_policy(policy: str):
    """Check a policy in timm's notation, for example rand-m9-mstd0.5-inc1.

    Raises:
        UnknownPolicyError: timm does not know it, or would leave out a part of it.
    """
    name, *parts = policy.split("-")
    if name not in PARTS:
        raise UnknownPolicyError(f"unknown augmentation policy {name!r}; choose from {', '.join(PARTS)}")
    for part in parts:
        if not _is_known(name, part):
            known = [f"{key}{'INT' if kind is int else 'NUMBER'}" for key, kind in PARTS[name].items()]
            known += CHOICES if name == "rand" else ()
            raise UnknownPolicyError(f"{policy}: {name} has no part {part!r}; choose from {', '.join(known)}")
    try:
        # With timm's defaults for all else, nothing but the policy can be at fault.
        create_transform(is_training=True, auto_augment=policy)
    except (KeyError, ValueError) as error:
        raise UnknownPolicyError(f"{policy}: timm does not take this augmentation policy ({error})") from error


def _is_known(name: str, part: str) -> bool:
    match = re.fullmatch(r"([a-z]+)(\d.*)", part)
    if match is None or match[1] not in PARTS[name]:
        return name == "rand" and part in CHOICES
    try:
        PARTS[name][match[1]](match[2])
    except ValueError:
        return False
    return True
