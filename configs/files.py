"""Your own images and captions, some hundreds or thousands of pairs, as in the README.

    sotalign encode   --images=photos      --encoder=... --out=features/image
    sotalign encode   --texts=captions.csv --encoder=... --out=features/text
    sotalign train    --config=configs/files.py --workdir=runs/photos
    sotalign evaluate --workdir=runs/photos

Reads `features/image` and `features/text`; other paths are given by --config.data.files.image=...
Of 200 pairs 40 are held out to report on and 20 to choose on; 100 are the pairs, and the rest are
unpaired. Give other numbers with more data, and `configs/default.py` where there are 10,000.
"""

from sotalign_jax.config import default_config


def get_config(arg=None):
    config = default_config()
    config.data.files.image = "features/image"
    config.data.files.text = "features/text"
    config.data.files.n_test = 40
    config.data.files.n_val = 20
    config.data.files.mode = "aligned"
    config.data.n_pairs = 100

    # What served the 300 pairs of configs/emoji.py best.
    config.teacher.ridge = 0.01
    config.teacher.weighted = True
    config.model.init = "teacher"
    config.model.layer_norm = False
    config.loss.alpha = 0.03
    config.loss.epsilon = 0.1
    config.loss.teacher_epsilon = 0.02
    config.batch.unpaired = 1_000
    config.steps = 100
    config.log_every = config.eval_every = 25
    config.checkpoint_every = 50
    config.select = "best"
    config.select_metric = "mean_recall@10"

    if arg == "runlocal":
        config.steps = 20
        config.log_every = config.eval_every = config.checkpoint_every = 10
    return config
