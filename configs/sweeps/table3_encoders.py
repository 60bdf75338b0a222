"""Pairs of encoders: SOTAlign on the features of each.

    sotalign sweep run   configs/sweeps/table3_encoders.py --workdir=runs/table3
    sotalign sweep table configs/sweeps/table3_encoders.py --workdir=runs/table3 --paper

The files are those of FILE below, `features/cc3m/dinov3_vitl16` and so on, from the directory that
the command is started in: edit the pattern, or put files or links there; each encoder needs cc3m,
cc3m_val and coco_val. Of a row whose files are missing every point fails, with their names; the
other rows are run, and the same command goes on once they are there.

The embedded emoji come from one image encoder and one text encoder. `table3_encoders.py:runlocal`
lets the platonic world stand in, two views of one latent: the more noise each view has of its own,
the less the two encoders have in common. 500 pairs, 4,000 + 4,000 unpaired rows, three worlds: 27
runs, five minutes on two CPU cores beside other work: 99.9, 99.8, 91.5 at noise 0.5, 1, 2; their
teachers have 75.3, 72.8, 58.0.

The paper (table 3), 10,000 pairs and 1M + 1M unpaired rows of CC3M; ImageNet is zero-shot top-1,
which a sweep does not measure; COCO val, recall@1; mutual k-nearest neighbours of the two encoders,
which recall follows (Pearson's r with its mean 0.83), in percent:

                            ImageNet   T2I    I2T    mutual k-NN
    DINOv2 + Nemotron-8B    32.4       15.5   23.3   14.6
    DINOv2 + Qwen3-8B       39.5       20.9   31.1   18.9
    DINOv2 + NV-Embed-v2    42.5       23.1   31.1   18.2
    DINOv3 + Nemotron-8B    35.5       16.6   26.2   14.1
    DINOv3 + Qwen3-8B       42.7       24.1   35.3   18.0
    DINOv3 + NV-Embed-v2    46.1       26.5   34.1   17.6

Not yet rerun here: the features are not public.
"""

from sotalign_jax.sweeps import base_config

# Anything that `sotalign inspect` opens: "/data/{data}.h5:{encoder}" would be one file a data set.
FILE = "features/{data}/{encoder}"
IMAGES = {"DINOv2": "dinov2_vitl14", "DINOv3": "dinov3_vitl16"}
TEXTS = {
    "Nemotron-8B": "nemotron_8b",
    "Qwen3-8B": "qwen3_embedding_8b",
    "NV-Embed-v2": "nv_embed_v2",
}
ALPHAS = (1e-3, 1e-4, 1e-5)
LOCAL_NOISE = (0.5, 1.0, 2.0)
LOCAL_ALPHAS = (0.01, 0.1, 1.0)
_PAPER = {
    "DINOv2 + Nemotron-8B": (15.5, 23.3),
    "DINOv2 + Qwen3-8B": (20.9, 31.1),
    "DINOv2 + NV-Embed-v2": (23.1, 31.1),
    "DINOv3 + Nemotron-8B": (16.6, 26.2),
    "DINOv3 + Qwen3-8B": (24.1, 35.3),
    "DINOv3 + NV-Embed-v2": (26.5, 34.1),
}


def get_config(arg=None):
    if arg == "runlocal":
        config = base_config(__file__, "../platonic.py")
        config.data.n_unpaired = 4_000
        config.checkpoint_every = 0
    else:
        config = base_config(__file__, "../cc3m.py")
    config.eval_every = 0  # validation at the end is enough
    return config


def get_hyper(hyper, arg=None):
    local = arg == "runlocal"
    return hyper.product(
        _local_encoders(hyper) if local else _encoders(hyper),
        hyper.sweep("loss.alpha", LOCAL_ALPHAS if local else ALPHAS),
        hyper.sweep("seed", range(3)),
    )


def _encoders(hyper):
    """Of both sides, the files of all splits."""
    splits = {"": "cc3m", "val_": "cc3m_val", "test_": "coco_val"}
    points = []
    for image, image_file in IMAGES.items():
        for text, text_file in TEXTS.items():
            fields = {"label.encoders": f"{image} + {text}"}
            for split, data in splits.items():
                for side, encoder in (("image", image_file), ("text", text_file)):
                    path = FILE.format(data=data, encoder=encoder)
                    fields[f"data.files.{split}{side}"] = path
            points.append(hyper.fixed(fields))
    return hyper.chain(*points)


def _local_encoders(hyper):
    return hyper.zip(
        hyper.sweep("label.encoders", [f"platonic, noise {noise:g}" for noise in LOCAL_NOISE]),
        hyper.sweep("data.platonic.noise", LOCAL_NOISE),
    )


def get_table():
    sides = ("test/t2i/recall@1", "test/i2t/recall@1")
    return {
        "rows": "label.encoders",
        "metrics": (*sides, "test/mean_recall@1", "teacher_test/mean_recall@1"),
        "select": "val/mean_recall@1",
        "paper": {name: dict(zip(sides, values, strict=True)) for name, values in _PAPER.items()},
        "caption": "SOTAlign by the encoders, and its teacher alone.",
    }
