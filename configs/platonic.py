"""A world with known truth, in which the unpaired rows can be seen to work.

sotalign compare --config=configs/platonic.py --workdir=runs/platonic
sotalign compare --config=configs/platonic.py:tune --workdir=runs/platonic-tune
"""

from sotalign_jax.config import default_config


def get_config(arg=None):
    config = default_config()
    config.data.name = "platonic"
    config.data.n_pairs = 500
    config.data.n_unpaired = 20_000
    config.teacher.ridge = 1e-3

    config.model.init = "teacher"
    config.model.layer_norm = False
    # These, and the steps and rates of every method below, were chosen on validation (`:tune`).
    config.loss.alpha = 0.1
    config.loss.epsilon = 0.2
    config.batch.unpaired = 1_024
    config.optimizer.learning_rate = 3e-4
    config.steps = 500
    config.log_every = 50
    config.eval_every = 100
    config.checkpoint_every = 100

    random_start = {"init": "random", "dim": 1_024}
    config.compare.seeds = (0, 1, 2)
    config.compare.teacher = "cca"
    config.compare.methods = {
        "sail": {
            "objective": "sail",
            "model": random_start,
            "steps": 2_000,
            "optimizer": {"learning_rate": 1e-4},
        },
        "siglip_from_teacher": {
            "objective": "sail",
            "steps": 100,
            "optimizer": {"learning_rate": 1e-3},
        },
        "sotalign_from_teacher_1k": {"data": {"n_unpaired": 1_000}},
        "sotalign_from_teacher_4k": {"data": {"n_unpaired": 4_000}},
        "sotalign_from_teacher": {},
    }

    if arg == "tune":
        config.compare.tune_seeds = (100, 101)
        rates = {"learning_rate": (1e-4, 3e-4, 1e-3)}
        config.compare.grids = {
            "sail": {"steps": (250, 500, 1_000, 2_000), "optimizer": rates},
            "siglip_from_teacher": {"steps": (50, 100, 250, 500), "optimizer": rates},
            "sotalign_from_teacher": {
                "steps": (250, 500),
                "loss": {"alpha": (0.1, 1.0), "epsilon": (0.05, 0.1, 0.2)},
            },
        }
    if arg == "runlocal":
        config.data.n_pairs = 100
        config.data.n_unpaired = 500
        config.data.platonic.n_val = config.data.platonic.n_test = 100
        config.batch.unpaired = 128
        config.steps = 20
        config.log_every = config.eval_every = config.checkpoint_every = 10
        config.compare.seeds = (0, 1)
        config.compare.methods = {
            "sail": {"objective": "sail", "model": {"init": "random", "dim": 64}},
            "siglip_from_teacher": {"objective": "sail"},
            "sotalign_from_teacher": {},
        }
    return config
