"""Where the pairs come from; the unpaired rows stay those of CC3M.

    sotalign sweep run   configs/sweeps/table2_pair_source.py --workdir=runs/table2
    sotalign sweep table configs/sweeps/table2_pair_source.py --workdir=runs/table2 --paper

The files are those of FILE below, `features/cc3m/dinov3_vitl16` and so on, from the directory that
the command is started in: edit the pattern, or put files or links there. Of a row whose files are
missing every point fails, with their names; the other rows are run, and the same command goes on
once they are there. Pairs of other sources than CC3M take unpaired images and texts from all of
CC3M (for the synthetic captions, an image may be of a pair and unpaired as well).

`table2_pair_source.py:runlocal` asks the same of the embedded emoji: two vendors' drawings, by the
same encoder, with long or short captions; 300 pairs, three draws. The unpaired rows are always both
drawings and both captions of the rest. Other than in the paper, the test is of the kind of the
pairs. 36 runs, three minutes on two CPU cores beside other work: 11.6 and 10.5 with Noto's drawings
and long, short captions, 10.8 and 11.4 with Fluent's; their teachers have 12.8, 11.2, 12.1, 11.7.

The paper (table 2), 10,000 pairs, 1M + 1M unpaired rows of CC3M; ImageNet is zero-shot top-1, which
a sweep does not measure; COCO val, recall@1:

                               ImageNet   T2I    I2T
    CC3M                       46.1       26.5   34.1
    CC3M, synthetic captions   46.5       31.3   43.1
    CC12M                      47.4       26.1   36.3
    COCO                       35.8       34.8   46.7

Not yet rerun here: the features are not public.
"""

from sotalign_jax.sweeps import base_config

# Anything that `sotalign inspect` opens: "/data/{data}.h5:{encoder}" would be one file a data set.
FILE = "features/{data}/{encoder}"
IMAGE, TEXT = "dinov3_vitl16", "nv_embed_v2"
# Row -> data sets of the images and of the captions.
SOURCES = {
    "CC3M": ("cc3m", "cc3m"),
    "CC3M, synthetic captions": ("cc3m", "cc3m_synthetic"),
    "CC12M": ("cc12m", "cc12m"),
    "COCO": ("coco_train", "coco_train"),
}
ALPHAS = (1e-3, 1e-4, 1e-5)
LOCAL_ALPHAS = (1e-3, 1e-2, 1e-1)
_PAPER = {
    "CC3M": (26.5, 34.1),
    "CC3M, synthetic captions": (31.3, 43.1),
    "CC12M": (26.1, 36.3),
    "COCO": (34.8, 46.7),
}


def _image(data):
    return FILE.format(data=data, encoder=IMAGE)


def _text(data):
    return FILE.format(data=data, encoder=TEXT)


def get_config(arg=None):
    if arg == "runlocal":
        return base_config(__file__, "table4_methods.py", "runlocal")
    config = base_config(__file__, "../cc3m.py")
    config.eval_every = 0  # validation at the end is enough
    files = config.data.files
    files.val_image, files.val_text = _image("cc3m_val"), _text("cc3m_val")
    files.test_image, files.test_text = _image("coco_val"), _text("coco_val")
    return config


def get_hyper(hyper, arg=None):
    local = arg == "runlocal"
    return hyper.product(
        _local_sources(hyper) if local else _sources(hyper),
        hyper.sweep("loss.alpha", LOCAL_ALPHAS if local else ALPHAS),
        hyper.sweep("seed", range(3)),
    )


def _sources(hyper):
    points = []
    for name, (images, texts) in SOURCES.items():
        fields = {"data.files.image": _image(images), "data.files.text": _text(texts)}
        if name != "CC3M":  # whose unpaired rows are those that the pairs leave
            fields |= {
                "data.files.mode": "independent",
                "data.files.unpaired_image": _image("cc3m"),
                "data.files.unpaired_text": _text("cc3m"),
            }
        points.append(hyper.fixed({"label.source": name} | fields))
    return hyper.chain(*points)


def _local_sources(hyper):
    return hyper.chain(
        *(
            hyper.fixed(
                {
                    "label.source": f"{image}, {text}",
                    "data.emoji.image": image,
                    "data.emoji.text": text,
                }
            )
            for image in ("google", "fluent3d")
            for text in ("label_tags", "label")
        )
    )


def get_table():
    sides = ("test/t2i/recall@1", "test/i2t/recall@1")
    return {
        "rows": "label.source",
        "metrics": (*sides, "test/mean_recall@1", "teacher_test/mean_recall@1"),
        "select": "val/mean_recall@1",
        "paper": {name: dict(zip(sides, values, strict=True)) for name, values in _PAPER.items()},
        "names": {"label.source": "pairs"},
        "caption": "SOTAlign by the source of the pairs, and its teacher alone.",
    }
