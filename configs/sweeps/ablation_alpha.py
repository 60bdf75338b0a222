"""The weight of the divergence: alpha from 0 (SigLIP on the pairs alone) to 1e-2.

    sotalign sweep run   configs/sweeps/ablation_alpha.py --workdir=runs/alpha \
        --config.data.files.image=FILE (and the other files of configs/cc3m.py)
    sotalign sweep table configs/sweeps/ablation_alpha.py --workdir=runs/alpha --paper
    sotalign sweep plot  configs/sweeps/ablation_alpha.py --workdir=runs/alpha
"""

from sotalign_jax.sweeps import base_config


def get_config(arg=None):
    base = "../cc3m.py" if arg is None else "../emoji.py"
    config = base_config(__file__, base, "runlocal" if arg == "runlocal" else None)
    config.eval_every = 0
    return config


def get_hyper(hyper, arg=None):
    alphas = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    return hyper.product(hyper.sweep("loss.alpha", alphas), hyper.sweep("seed", range(2)))


def get_table():
    return {
        "rows": "loss.alpha",
        "metrics": ("test/t2i/recall@1", "test/i2t/recall@1", "test/mean_recall@1"),
    }
