"""Where the unpaired rows come from; the pairs stay those of CC3M.

    sotalign sweep run   configs/sweeps/table7_unpaired_source.py --workdir=runs/table7
    sotalign sweep table configs/sweeps/table7_unpaired_source.py --workdir=runs/table7 --paper

The files are those of FILE below, `features/cc3m/dinov3_vitl16` and so on, from the directory that
the command is started in: edit the pattern, or put files or links there. Of a row whose files are
missing every point fails, with their names; the other rows are run, and the same command goes on
once they are there. 1M rows a side are drawn; COCO has fewer, and where it is a source all rows of
both sides are taken.

`table7_unpaired_source.py:runlocal` asks the same of the embedded data: 300 emoji, beside 1,000 +
1,000 drawings and captions of other emoji, or of clip art, or nothing. Three draws: 21 runs,
a minute on two CPU cores: 11.6, 11.9 and (nothing: SAIL) 11.5.

The paper (table 7; images + texts), 10,000 pairs of CC3M; ImageNet is zero-shot top-1, which a
sweep does not measure; COCO val, recall@1:

                              ImageNet   T2I    I2T
    none: SAIL                35.6       21.0   27.4
    CC3M + CC3M               46.1       26.5   34.1
    CC3M + CC3M synthetic     46.2       30.4   39.7
    CC12M + CC12M             46.8       25.7   34.4
    ImageNet + CC3M           43.4       23.8   31.5
    ImageNet + CC12M          44.3       24.2   31.5
    CC3M + COCO               38.4       28.4   26.7
    COCO + CC3M               38.0       21.7   33.9
    ImageNet + WikiText-103   40.7       20.7   28.1

Not yet rerun here: the features are not public.
"""

from sotalign_jax.sweeps import base_config

# Anything that `sotalign inspect` opens: "/data/{data}.h5:{encoder}" would be one file a data set.
FILE = "features/{data}/{encoder}"
IMAGE, TEXT = "dinov3_vitl16", "nv_embed_v2"
# Row -> data sets of unpaired images and texts, and how many rows of each; 0: all there are.
SOURCES = {
    "CC3M + CC3M synthetic": ("cc3m", "cc3m_synthetic", 1_000_000),
    "CC12M + CC12M": ("cc12m", "cc12m", 1_000_000),
    "ImageNet + CC3M": ("imagenet", "cc3m", 1_000_000),
    "ImageNet + CC12M": ("imagenet", "cc12m", 1_000_000),
    "CC3M + COCO": ("cc3m", "coco_train", 0),
    "COCO + CC3M": ("coco_train", "cc3m", 0),
    "ImageNet + WikiText-103": ("imagenet", "wikitext103", 1_000_000),
}
ALPHAS = (1e-3, 1e-4, 1e-5)
LOCAL_SOURCES = ("emoji", "openclipart")
LOCAL_ALPHAS = (1e-3, 1e-2, 1e-1)
_PAPER = {
    "none: SAIL": (21.0, 27.4),
    "CC3M + CC3M": (26.5, 34.1),
    "CC3M + CC3M synthetic": (30.4, 39.7),
    "CC12M + CC12M": (25.7, 34.4),
    "ImageNet + CC3M": (23.8, 31.5),
    "ImageNet + CC12M": (24.2, 31.5),
    "CC3M + COCO": (28.4, 26.7),
    "COCO + CC3M": (21.7, 33.9),
    "ImageNet + WikiText-103": (20.7, 28.1),
}


def _image(data):
    return FILE.format(data=data, encoder=IMAGE)


def _text(data):
    return FILE.format(data=data, encoder=TEXT)


def get_config(arg=None):
    if arg == "runlocal":
        config = base_config(__file__, "table4_methods.py", "runlocal")
        config.data.n_unpaired = 1_000  # all other emoji, and as much clip art
        return config
    config = base_config(__file__, "../cc3m.py")
    config.eval_every = 0  # validation at the end is enough
    files = config.data.files
    files.image, files.text = _image("cc3m"), _text("cc3m")
    files.val_image, files.val_text = _image("cc3m_val"), _text("cc3m_val")
    files.test_image, files.test_text = _image("coco_val"), _text("coco_val")
    return config


def get_hyper(hyper, arg=None):
    local = arg == "runlocal"
    sail = hyper.fixed({"label.source": "none: SAIL", "objective": "sail"})
    sotalign = hyper.product(
        _local_sources(hyper) if local else _sources(hyper),
        hyper.sweep("loss.alpha", LOCAL_ALPHAS if local else ALPHAS),
    )
    return hyper.product(hyper.chain(sail, sotalign), hyper.sweep("seed", range(3)))


def _sources(hyper):
    # The main experiment: two disjoint halves of the rows that the pairs leave.
    points = [hyper.fixed("label.source", "CC3M + CC3M")]
    for name, (images, texts, rows) in SOURCES.items():
        fields = {
            "label.source": name,
            "data.files.mode": "independent",
            "data.files.unpaired_image": _image(images),
            "data.files.unpaired_text": _text(texts),
            "data.n_unpaired": rows,
        }
        points.append(hyper.fixed(fields))
    return hyper.chain(*points)


def _local_sources(hyper):
    return hyper.zip(
        hyper.sweep("label.source", [f"{name} + {name}" for name in LOCAL_SOURCES]),
        hyper.sweep("data.emoji.unpaired", LOCAL_SOURCES),
    )


def get_table():
    sides = ("test/t2i/recall@1", "test/i2t/recall@1")
    return {
        "rows": "label.source",
        "metrics": (*sides, "test/mean_recall@1"),
        "select": "val/mean_recall@1",
        "paper": {name: dict(zip(sides, values, strict=True)) for name, values in _PAPER.items()},
        "names": {"label.source": "unpaired images + texts"},
        "caption": "SOTAlign by the source of the unpaired rows.",
    }
