"""The number of unpaired rows: SOTAlign from few to many of them, against SAIL, which reads none.

    sotalign sweep run   configs/sweeps/fig4_unpaired.py --workdir=runs/fig4_unpaired \
        --config.data.files.image=FILE (and the other files of configs/cc3m.py)
    sotalign sweep table configs/sweeps/fig4_unpaired.py --workdir=runs/fig4_unpaired --paper
    sotalign sweep plot  configs/sweeps/fig4_unpaired.py --workdir=runs/fig4_unpaired

Fewer rows are a prefix of more; alpha is chosen on validation for each number of them. SAIL stands
in the column of the largest number, and is a level line of the plot.

`fig4_unpaired.py:runlocal` is the same on the embedded emoji, 300 pairs and 125 to 1,000 unpaired
rows a side, three draws: 39 runs, 70 seconds on two CPU cores beside other work: SAIL
11.5, SOTAlign 11.4, 11.0, 11.8, 11.6. So few change nothing; the platonic world of the README does.

The paper (figure 4), 10,000 pairs of CC3M, COCO val, recall@1. In numbers only the ends of it:

                          T2I    I2T    mean
    SAIL, no unpaired     21.0   27.4   24.2
    SOTAlign, 1M + 1M     26.5   34.1   30.3

and in words: from 10,000 rows a side on there are gains, up to 500,000. Not yet rerun here: the
features are not public.
"""

from sotalign_jax.sweeps import base_config

UNPAIRED = (10_000, 30_000, 100_000, 200_000, 500_000, 1_000_000)
ALPHAS = (1e-3, 1e-4, 1e-5)
LOCAL_UNPAIRED = (125, 250, 500, 1_000)
LOCAL_ALPHAS = (1e-3, 1e-2, 1e-1)


def get_config(arg=None):
    if arg == "runlocal":
        return base_config(__file__, "table4_methods.py", "runlocal")
    config = base_config(__file__, "../cc3m.py")
    config.eval_every = 0  # validation at the end is enough
    return config


def get_hyper(hyper, arg=None):
    local = arg == "runlocal"
    unpaired = LOCAL_UNPAIRED if local else UNPAIRED
    sail = hyper.fixed(
        {"label.method": "SAIL", "objective": "sail", "data.n_unpaired": unpaired[-1]}
    )
    sotalign = hyper.product(
        hyper.fixed("label.method", "SOTAlign"),
        hyper.sweep("data.n_unpaired", unpaired),
        hyper.sweep("loss.alpha", LOCAL_ALPHAS if local else ALPHAS),
    )
    return hyper.product(hyper.chain(sail, sotalign), hyper.sweep("seed", range(3)))


def get_table():
    metric = "test/mean_recall@1"
    return {
        "rows": "label.method",
        "columns": "data.n_unpaired",
        "metrics": (metric,),
        "select": "val/mean_recall@1",
        "paper": {
            "SAIL": {1_000_000: {metric: 24.2}},
            "SOTAlign": {1_000_000: {metric: 30.3}},
        },
        "names": {"label.method": "method", "data.n_unpaired": "unpaired rows a side"},
        "caption": "Mean of T2I and I2T recall@1 by the number of unpaired rows.",
        "plot": {"x": "data.n_unpaired", "metric": metric},
    }
