"""The seed rule: what a trial draws its random numbers from.

A module of its own, standard library only, because the rule makes numbers: the digest of a trial's code covers it, and
not what names and keeps trials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEEDED_BY = ("stages", "model", "weights_digest", "workload", "data_digest", "images", "seed", "training")
"""The fields of a trial that decide its draws: what is computed, whatever it is called, how it is batched, and by which
version of the code.
"""


def random_seed(trial: Mapping[str, Any]) -> int:
    """Seeds every source of randomness that the stages do not seed themselves: 63 bits of a digest.

    ``trial``: its fields as records hold them.
    """
    content = {name: trial[name] for name in SEEDED_BY}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
