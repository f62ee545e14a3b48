"""The eviction policies, by name."""

from __future__ import annotations

from typing import Any

from rekindle.errors import InvalidRequest, nearest
from rekindle.kv.policies.gdsf import GDSF
from rekindle.kv.policies.lru import LRU
from rekindle.kv.policies.prospect import Prospect
from rekindle.kv.policy import Policy

POLICIES: dict[str, type[Policy[Any]]] = {policy.name: policy for policy in (LRU, GDSF, Prospect)}
DEFAULT = Prospect.name


def check_policy(name: str) -> None:
    """Raises InvalidRequest for a name that no policy has, with the nearest known one."""
    if name not in POLICIES:
        raise InvalidRequest(f"no policy is called {name!r}{nearest(name, POLICIES)}", param="policy")


def make_policy(name: str, capacity: int) -> Policy[Any]:
    """The policy of this name for a tier of this capacity. Raises InvalidRequest."""
    check_policy(name)
    return POLICIES[name](capacity)
