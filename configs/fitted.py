"""Aligners that are fitted in one go, on the embedded emoji: 300 pairs, five draws of them.

sotalign compare --config=configs/fitted.py --workdir=runs/fitted
sotalign train   --config=configs/fitted.py --workdir=runs/csa

Minutes on two cores. docs/fitted.md has the table.
"""

from sotalign_jax.config import default_config
from sotalign_jax.fitted import FITTED


def get_config(arg=None):
    config = default_config()
    config.data.name = "emoji"
    config.data.n_pairs = 300
    config.aligner = "csa"

    # Defaults, and what the published code does: nothing is chosen here.
    config.compare.seeds = (0, 1, 2, 3, 4)
    config.compare.teacher = "cca"
    config.compare.methods = {
        "csa": {},
        "csa_in_sample": {"csa": {"correlations": "in_sample"}},
        "csa_equal_weights": {"csa": {"weights": "equal"}},
        "csa_published": {"csa": dict(FITTED["csa"].published)},
        "asif": {"aligner": "asif"},
        "anchors": {"aligner": "asif", "asif": {"neighbours": 0, "power": 1, "center": "pairs"}},
        "sue": {"aligner": "sue"},
        "sue_network": {"aligner": "sue", "sue": {"embedding": "network"}},
    }
    if arg == "runlocal":
        config.data.n_pairs = 60
        config.csa.folds = 2
        config.compare.seeds = (0, 1)
        del config.compare.methods["csa_published"]  # 200 dimensions need as many pairs
    return config
