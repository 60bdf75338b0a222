"""Where the data of the paper comes from, and the commands from there to features.

Facts only: nothing is downloaded. Commands write features to ``features/DATA/ENCODER``, where the
sweeps of ``configs/sweeps`` look for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["RECIPES", "Recipe", "Split", "find_recipe"]


@dataclasses.dataclass(frozen=True)
class Split:
    """Part of a data set.

    Attributes:
        name: what its authors call it.
        images: how many, or None where there are none.
        texts: how many, or None where there are none.
        remark: what the numbers are of.
    """

    name: str
    images: int | None = None
    texts: int | None = None
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One data set.

    Attributes:
        name: what it is called here.
        title: what people call it.
        source: whose it is and where it is had.
        licence: of the annotations and of the images.
        splits: what it consists of.
        files: which files are needed.
        prepare: commands of a shell that sort out what the others take.
        commands: from these files to features.
        traps: what goes wrong.
        protocols: names of the protocols that are run on it.
        used_for: what the paper takes it for.
        tfds: its name and version in tensorflow-datasets, or ``""``.
        unverified: which of these facts were written from memory, without the source at hand.
    """

    name: str
    title: str
    source: str
    licence: str
    splits: tuple[Split, ...]
    files: tuple[str, ...]
    commands: tuple[str, ...]
    traps: tuple[str, ...]
    prepare: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    used_for: str = ""
    tfds: str = ""
    unverified: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON takes them."""
        return dataclasses.asdict(self)


_IMAGE, _TEXT = "--encoder=dinov3-vitl16", "--encoder=nv-embed-v2"
_IMAGE_OUT, _TEXT_OUT = "features/{}/dinov3_vitl16", "features/{}/nv_embed_v2"


# The encoders of SUE's code, where `configs/sweeps/table6_single_dataset.py` looks for them.
_SUE_OUT = ("features/{}/dinov2_vitb14", "features/{}/all_minilm_l6_v2")


def _encode_for_sue(data: str, table: str, columns: str = "") -> tuple[str, str]:
    image, text = (out.format(data) for out in _SUE_OUT)
    return (
        f"sotalign encode --images={table} --encoder=dinov2-vitb14 --out={image}",
        f"sotalign encode --texts={table} --encoder=all-minilm-l6-v2 --out={text}{columns}",
    )


def _evaluate_for_sue(data: str) -> str:
    image, text = (out.format(data) for out in _SUE_OUT)
    return f"sotalign evaluate --workdir=RUN --protocol=sue400 --image={image} --text={text}"


def _encode(data: str, images: str | None, texts: str | None, more: str = "") -> tuple[str, ...]:
    """The commands that encode a data set with the paper's encoders."""
    commands = []
    if images is not None:
        out = _IMAGE_OUT.format(data)
        commands.append(f"sotalign encode --images={images} {_IMAGE} --out={out}{more}")
    if texts is not None:
        commands.append(f"sotalign encode --texts={texts} {_TEXT} --out={_TEXT_OUT.format(data)}")
    return tuple(commands)


def _evaluate(protocol: str, data: str, texts: str | None = None, more: str = "") -> str:
    image, text = _IMAGE_OUT.format(data), _TEXT_OUT.format(texts or data)
    return (
        f"sotalign evaluate --workdir=RUN --protocol={protocol} --image={image} --text={text}{more}"
    )


def _captions(name: str, annotations: str, out: str, more: str = "") -> str:
    return f"sotalign data captions {name} --annotations={annotations} --out={out}{more}"


_DEAD_LINKS = (
    "many links are dead: download with retries, and expect to lose a fifth or more; pairs are "
    "joined by id, so that missing rows do no harm"
)
_DOWNLOAD = (
    "the files have no header, which img2dataset needs, and captions with double quotes, which can "
    "shift its rows; download from what `data captions` writes: img2dataset --url_list={0}.jsonl "
    "--input_format=jsonl --url_col=url --caption_col=caption --output_format=webdataset "
    "--output_folder={0} --number_sample_per_shard=10000"
)
_KEYS = (
    "img2dataset names rows by their place in the list (nine digits, shards of 10,000): download "
    "from the same file, unsorted, or ids do not join"
)


def _classification(
    name: str,
    title: str,
    source: str,
    licence: str,
    split: Split,
    *,
    images: str,
    labels: str = "",
    classnames: str = "",
    traps: tuple[str, ...] = (),
    **more: Any,
) -> Recipe:
    """A data set of zero-shot classification; without ``labels``, folders are the classes."""
    prompts = f"{name}_prompts"
    names = f" --classnames={classnames}" if classnames else ""
    return Recipe(
        name=name,
        title=title,
        source=source,
        licence=licence,
        splits=(split,),
        commands=(
            f"sotalign data prompts {name} --out={prompts}.jsonl{names}",
            *_encode(prompts, None, f"{prompts}.jsonl"),
            *_encode(f"{name}_test", images, None),
            _evaluate(name, f"{name}_test", prompts, f" --labels={labels}" if labels else ""),
        ),
        traps=traps,
        protocols=(name,),
        used_for="zero-shot classification",
        unverified="licence",
        **more,
    )


# Pictures in folders by number of class.
_CIFAR = (
    'python -c "import pickle, pathlib, PIL.Image; '
    "test = pickle.load(open('{file}', 'rb'), encoding='bytes'); "
    "[pathlib.Path('cifar{classes}_test', str(c)).mkdir(parents=True) for c in range({classes})]; "
    "[PIL.Image.fromarray(x.reshape(3, 32, 32).transpose(1, 2, 0))"
    ".save(f'cifar{classes}_test/{{c}}/{{n:05d}}.png') "
    "for n, (x, c) in enumerate(zip(test[b'data'], test[b'{labels}']))]\""
)
_FLOWERS = (
    'python -c "import scipy.io; '
    "rows = scipy.io.loadmat('setid.mat')['tstid'][0]; "
    "labels = scipy.io.loadmat('imagelabels.mat')['labels'][0]; "
    "print('image', *(f'image_{n:05d}.jpg' for n in rows), sep='\\n', "
    "file=open('jpg/test.csv', 'w')); "
    "print('id,label', *(f'image_{n:05d},{labels[n - 1] - 1}' for n in rows), sep='\\n', "
    "file=open('flowers102_labels.csv', 'w'))\""
)

_IMAGENET = (
    "python -c \"import scipy.io; kit = 'ILSVRC2012_devkit_t12/data/'; "
    "sets = scipy.io.loadmat(kit + 'meta.mat', squeeze_me=True)['synsets']; "
    "names = {int(s['ILSVRC2012_ID']): str(s['WNID']) for s in sets}; "
    "truth = open(kit + 'ILSVRC2012_validation_ground_truth.txt').read().split(); "
    "print('id,label', *(f'ILSVRC2012_val_{n:08d},{names[int(k)]}' "
    "for n, k in enumerate(truth, 1)), sep='\\n', file=open('imagenet_labels.csv', 'w'))\""
)
_POLYVORE = (
    'python -c "import pyarrow.parquet as pq; '
    "rows = pq.read_table('polyvore/data', columns=['image', 'text']).slice(0, 20000); "
    "pq.write_table(rows.slice(0, 400), 'polyvore_test.parquet'); "
    "pq.write_table(rows.slice(400), 'polyvore.parquet')\""
)

_RECIPES = (
    Recipe(
        name="cc3m",
        title="Conceptual Captions (CC3M)",
        source="Sharma et al., ACL 2018; Google, ai.google.com/research/ConceptualCaptions",
        licence="annotations: free for any purpose, with acknowledgement of Google LLC; images: "
        "those of their sites",
        splits=(
            Split("train", 3_318_333, 3_318_333, "one caption an image, links"),
            Split("validation", 15_840, 15_840, "one caption an image, links"),
        ),
        files=("Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv"),
        commands=(
            _captions("cc3m_train", "Train_GCC-training.tsv", "cc3m.jsonl"),
            _captions("cc3m_val", "Validation_GCC-1.1.0-Validation.tsv", "cc3m_val.jsonl"),
            *_encode("cc3m", "'cc3m/{00000..00331}.tar'", "cc3m.jsonl", " --workers=16"),
            *_encode("cc3m_val", "'cc3m_val/{00000..00001}.tar'", "cc3m_val.jsonl"),
            _evaluate("cc3m_val", "cc3m_val"),
        ),
        traps=(
            _DEAD_LINKS,
            _KEYS,
            _DOWNLOAD.format("cc3m_val"),
        ),
        protocols=("cc3m_val",),
        used_for="10,000 pairs, 1M + 1M unpaired rows; validation chooses hyper-parameters",
    ),
    Recipe(
        name="dreamlip_cc3m",
        title="DreamLIP's synthetic captions of CC3M",
        source="Zheng et al., ECCV 2024; qidouxiong619/dreamlip_long_captions on the Hugging Face "
        "hub",
        licence="CC BY 4.0 by its card; images: those of their sites",
        splits=(
            Split("train", None, None, "up to CC3M's 3,318,333; three models, short and long"),
        ),
        files=("cc3m_3long_3short_1raw_captions_url.csv",),
        commands=(
            _captions("cc3m_train", "Train_GCC-training.tsv", "cc3m.jsonl"),
            _captions(
                "dreamlip_cc3m",
                "cc3m_3long_3short_1raw_captions_url.csv",
                "cc3m_synthetic.jsonl",
                " --urls=cc3m.jsonl --variant=shortSV_captions",
            ),
            *_encode("cc3m_synthetic", None, "cc3m_synthetic.jsonl"),
        ),
        traps=(
            "captions are tied to images by link alone: --urls gives them CC3M's ids; without it "
            "ids are rows of this file, for images downloaded from it",
            "seven columns of captions: say which one a result is of; SAIL's authors name raw and "
            "short ShareGPT4V captions",
            "captions hold line breaks: count rows by a CSV reader, not by lines",
        ),
        used_for="table 2 (pairs) and table 7 (unpaired texts): 'CC3M synthetic'",
    ),
    Recipe(
        name="cc12m",
        title="Conceptual 12M",
        source="Changpinyo et al., CVPR 2021; github.com/google-research-datasets/conceptual-12m",
        licence="annotations: free for any purpose, with acknowledgement of Google LLC; images: "
        "those of their sites",
        splits=(Split("train", 12_423_374, 12_423_374, "one caption an image, links"),),
        files=("cc12m.tsv",),
        commands=(
            _captions("cc12m", "cc12m.tsv", "cc12m.jsonl"),
            *_encode("cc12m", "'cc12m/{00000..01242}.tar'", "cc12m.jsonl", " --workers=16"),
        ),
        traps=(
            _DEAD_LINKS,
            _KEYS,
            _DOWNLOAD.format("cc12m"),
            "link and caption stand the other way round than in CC3M",
        ),
        unverified="licence",
        used_for="tables 2 and 7",
    ),
    Recipe(
        name="coco",
        title="COCO captions",
        source="Lin et al., ECCV 2014, Chen et al. 2015; cocodataset.org; Karpathy's splits: "
        "caption_datasets.zip, cs.stanford.edu/people/karpathy/deepimagesent",
        licence="annotations: CC BY 4.0; images: Flickr's terms of use",
        splits=(
            Split("val2017", 5_000, 25_014, "25,000 with the first five captions of each"),
            Split("train2017", 118_287, 591_753, "591,435 with the first five of each"),
            Split("Karpathy test", 5_000, 25_010, "of val2014"),
            Split("Karpathy val", 5_000, 25_010, "of val2014"),
            Split("Karpathy train", 82_783, 414_113, "train2014"),
            Split("Karpathy restval", 30_504, 152_634, "the rest of val2014"),
        ),
        files=(
            "val2017.zip, train2017.zip, annotations_trainval2017.zip",
            "val2014.zip and dataset_coco.json for Karpathy's splits",
        ),
        commands=(
            _captions("coco_val2017", "annotations/captions_val2017.json", "coco_val.jsonl"),
            _captions("coco_train2017", "annotations/captions_train2017.json", "coco_train.jsonl"),
            _captions("coco_karpathy_test", "dataset_coco.json", "coco_karpathy.jsonl"),
            *_encode("coco_val", "val2017", "coco_val.jsonl"),
            *_encode("coco_train", "train2017", "coco_train.jsonl"),
            *_encode("coco_karpathy", "coco_karpathy.jsonl", "coco_karpathy.jsonl"),
            _evaluate("coco_val2017", "coco_val"),
            _evaluate("coco_karpathy", "coco_karpathy"),
        ),
        traps=(
            "val2017 and Karpathy's test split have 5,000 images each, and not the same ones",
            "12 images of val2017 have six captions and one has seven: five each are used",
            "48 images of val2017 have captions and no objects: loaders of boxes drop them",
            "do not train on train2017 or Karpathy's train split and call a test on COCO zero-shot",
        ),
        protocols=("coco_val2017", "coco_karpathy"),
        used_for="the main test; tables 2 and 7",
        tfds="coco_captions/2014:1.1.0 (Karpathy's splits)",
    ),
    Recipe(
        name="flickr30k",
        title="Flickr30k",
        source="Young et al., TACL 2014; images on request: shannon.cs.illinois.edu/DenotationGraph"
        "; dataset_flickr30k.json of Karpathy's caption_datasets.zip",
        licence="images: Flickr's terms of use, for non-commercial research and education",
        splits=(
            Split("test", 1_000, 5_000, "Karpathy's"),
            Split("val", 1_014, 5_070, "Karpathy's"),
            Split("train", 29_000, 145_000, "Karpathy's"),
        ),
        files=("flickr30k-images/", "dataset_flickr30k.json"),
        commands=(
            _captions("flickr30k_test", "dataset_flickr30k.json", "flickr30k.jsonl"),
            *_encode("flickr30k", "flickr30k.jsonl", "flickr30k.jsonl"),
            _evaluate("flickr30k", "flickr30k"),
        ),
        traps=(
            "captions hold commas: a CSV file split at commas cuts them (SUE's did)",
            "the hub's copies put all 31,783 images into one split called test",
        ),
        unverified="licence",
        protocols=("flickr30k",),
        used_for="zero-shot retrieval; table 6",
    ),
    Recipe(
        name="imagenet",
        title="ImageNet-1k (ILSVRC 2012)",
        source="Russakovsky et al., IJCV 2015; image-net.org, after registration",
        licence="for non-commercial research and education",
        unverified="licence",
        splits=(
            Split("train", 1_281_167, None),
            Split("validation", 50_000, None, "50 of each of 1,000 classes"),
        ),
        files=(
            "ILSVRC2012_img_val.tar, unpacked into val/",
            "ILSVRC2012_devkit_t12.tar.gz, for labels of these",
            "ILSVRC2012_img_train.tar for unpaired images",
        ),
        prepare=(_IMAGENET,),
        commands=(
            "sotalign data prompts imagenet --out=imagenet_prompts.jsonl",
            *_encode("imagenet_prompts", None, "imagenet_prompts.jsonl"),
            *_encode("imagenet_val", "val", None),
            *_encode("imagenet", "train", None, " --workers=16"),
            _evaluate(
                "imagenet", "imagenet_val", "imagenet_prompts", " --labels=imagenet_labels.csv"
            ),
        ),
        traps=(
            "the validation archive is flat: labels come from the development kit, or, without "
            "--labels, from folders n01440764/... that it was sorted into",
            "numbers in the development kit's ground truth count the classes in another order than "
            "everybody's, that of the WordNet ids: its meta.mat translates them",
            "80 prompts of 1,000 classes are 80,000 texts: encode them once for an encoder",
            "two pairs of classes share a name (sunglasses, missile): labels by name do not do",
        ),
        protocols=("imagenet",),
        used_for="zero-shot classification; unpaired images of table 7",
        tfds="imagenet2012:5.1.0",
    ),
    _classification(
        "food101",
        "Food-101",
        "Bossard et al., ECCV 2014; data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "images: of foodspotting.com's users, for scientific fair use",
        Split("test", 25_250, None, "250 of each of 101 classes"),
        files=("food-101.tar.gz",),
        images="food-101/images/test.csv",
        classnames="food-101/meta/classes.txt",
        prepare=(
            "(echo image; sed 's/$/.jpg/' food-101/meta/test.txt) > food-101/images/test.csv",
        ),
        tfds="food101:2.0.0",
    ),
    *(
        _classification(
            f"cifar{classes}",
            f"CIFAR-{classes}",
            "Krizhevsky 2009; www.cs.toronto.edu/~kriz/cifar.html",
            "none is stated",
            Split("test", 10_000, None, f"{10_000 // classes:,} of each of {classes} classes"),
            files=(f"cifar-{classes}-python.tar.gz",),
            images=f"cifar{classes}_test",
            prepare=(_CIFAR.format(classes=classes, file=file, labels=labels),),
            tfds=f"cifar{classes}:3.0.2",
        )
        for classes, file, labels in (
            (10, "cifar-10-batches-py/test_batch", "labels"),
            (100, "cifar-100-python/test", "fine_labels"),
        )
    ),
    _classification(
        "aircraft",
        "FGVC-Aircraft",
        "Maji et al., arXiv 1306.5151; www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        "for non-commercial research",
        Split("test", 3_333, None, "33 or 34 of each of 100 variants"),
        files=("fgvc-aircraft-2013b.tar.gz",),
        images="fgvc-aircraft-2013b/data/images/test.csv",
        prepare=(
            "(cd fgvc-aircraft-2013b/data && "
            "(echo image; sed 's/ .*/.jpg/' images_variant_test.txt) > images/test.csv)",
            "(cd fgvc-aircraft-2013b/data && "
            "(echo id,label; sed 's/ /,/' images_variant_test.txt) > labels.csv)",
        ),
        labels="fgvc-aircraft-2013b/data/labels.csv",
        classnames="fgvc-aircraft-2013b/data/variants.txt",
        traps=("its validation split is as large as its test split",),
    ),
    _classification(
        "dtd",
        "Describable Textures (DTD)",
        "Cimpoi et al., CVPR 2014; www.robots.ox.ac.uk/~vgg/data/dtd",
        "for research",
        Split("test of partition 1", 1_880, None, "40 of each of 47 classes"),
        files=("dtd-r1.0.1.tar.gz",),
        images="dtd/images/test1.csv",
        prepare=(
            "(echo image; cat dtd/labels/test1.txt) > dtd/images/test1.csv",
            "cut -d/ -f1 dtd/labels/test1.txt | sort -u > dtd/classes.txt",
        ),
        classnames="dtd/classes.txt",
        traps=("the first of its ten partitions is meant, whose three splits are equally large",),
        tfds="dtd:3.0.1",
    ),
    _classification(
        "flowers102",
        "Oxford Flowers-102",
        "Nilsback and Zisserman, ICVGIP 2008; www.robots.ox.ac.uk/~vgg/data/flowers/102",
        "none is stated",
        Split("test", 6_149, None, "102 classes of 20 to 238"),
        files=("102flowers.tgz", "imagelabels.mat", "setid.mat"),
        images="jpg/test.csv",
        prepare=(_FLOWERS,),
        labels="flowers102_labels.csv",
        traps=("labels start at 1 in its own file: here numbers start at 0",),
        tfds="oxford_flowers102:2.1.1",
    ),
    Recipe(
        name="sue400",
        title="SUE: 400 test rows of Flickr30k, COCO or Polyvore",
        source="Yacobi et al., arXiv 2505.21524, github.com/shaham-lab/SUE; Flickr30k and COCO as "
        "in their recipes; Marqo/polyvore on the Hugging Face hub",
        licence="those of the three data sets",
        splits=(
            Split("Flickr30k test", 400, 400, "the first rows; one caption an image"),
            Split("Flickr30k train", 31_383, 31_383, "the rest: 500 pairs, unpaired"),
            Split("COCO test", 400, 400, "the first rows; one caption an image"),
            Split(
                "COCO train", 10_500, 10_500, "100 pairs, 10,000 + 10,000 unpaired, 400 held out"
            ),
            Split("Polyvore test", 400, 400, "the first rows of 20,000"),
            Split("Polyvore train", 19_600, 19_600, "the rest: 500 pairs, unpaired"),
        ),
        files=(
            "flickr30k-images/, results_20130124.token",
            "train2017.zip, annotations_trainval2017.zip",
            "polyvore/data/*.parquet",
        ),
        prepare=(_POLYVORE,),
        commands=(
            _captions("sue400_flickr30k", "results_20130124.token", "sue_flickr30k_test.jsonl"),
            _captions("sue_flickr30k", "results_20130124.token", "sue_flickr30k.jsonl"),
            _captions("sue400_coco", "annotations/captions_train2017.json", "sue_coco_test.jsonl"),
            _captions("sue_coco", "annotations/captions_train2017.json", "sue_coco.jsonl"),
            *_encode_for_sue("flickr30k_test", "sue_flickr30k_test.jsonl"),
            *_encode_for_sue("flickr30k", "sue_flickr30k.jsonl"),
            *_encode_for_sue("coco_test", "sue_coco_test.jsonl"),
            *_encode_for_sue("coco", "sue_coco.jsonl"),
            *_encode_for_sue("polyvore_test", "polyvore_test.parquet", " --column=caption:text"),
            *_encode_for_sue("polyvore", "polyvore.parquet", " --column=caption:text"),
            _evaluate_for_sue("flickr30k_test"),
            _evaluate_for_sue("coco_test"),
            _evaluate_for_sue("polyvore_test"),
        ),
        traps=(
            "SUE's code takes the first 400 rows of its list for the test and its last rows as "
            "pairs; a run here draws the pairs from all other rows",
            "SUE's code cuts Flickr30k's captions at the first comma; here they are whole",
            "Polyvore's images go through Marqo-FashionSigLIP there, which was trained on pairs of "
            "fashion images and texts, and is no encoder here: table6_single_dataset.py looks for "
            "its features in features/polyvore/marqo_fashionsiglip",
        ),
        protocols=("sue400",),
        used_for="table 6",
        unverified="which images of COCO (SUE's list is not public; here the first of train2017 by "
        "id), that SUE's list of Flickr30k has the order of the token file, Polyvore's columns, "
        "which encoders the paper's table 6 is of",
    ),
    Recipe(
        name="wikitext103",
        title="WikiText-103",
        source="Merity et al., ICLR 2017; wikitext-103-raw-v1 on the Hugging Face hub",
        licence="CC BY-SA, of Wikipedia's articles",
        splits=(Split("train", None, 1_801_350, "lines, of which many are empty or headings"),),
        files=("wiki.train.raw, or wikitext-103-raw-v1/train-*.parquet: give that folder",),
        unverified="licence",
        commands=(
            _captions("wikitext103", "wiki.train.raw", "wikitext103.jsonl"),
            *_encode("wikitext103", None, "wikitext103.jsonl"),
        ),
        traps=(
            "take the raw version: the other has <unk> for rare words",
            "paragraphs are far longer than captions: the text encoder's length cuts them",
        ),
        used_for="unpaired texts of table 7",
    ),
    Recipe(
        name="winoground",
        title="Winoground",
        source="Thrush et al., CVPR 2022; facebook/winoground on the Hugging Face hub, on request",
        licence="its own: for research, no training; images by Getty Images",
        unverified="licence",
        splits=(Split("test", 800, 800, "400 items of two images and two captions"),),
        files=("examples.jsonl", "images.zip"),
        commands=(
            _captions("winoground", "examples.jsonl", "winoground.jsonl"),
            *_encode("winoground", "winoground.jsonl", "winoground.jsonl"),
            _evaluate("winoground", "winoground"),
        ),
        traps=("a tie is wrong; programs that take an arg-max count it as right",),
        protocols=("winoground",),
    ),
    Recipe(
        name="mmvp",
        title="MMVP-VLM",
        source="Tong et al., CVPR 2024; MMVP/MMVP_VLM on the Hugging Face hub",
        licence="MIT by its card",
        splits=(Split("all", 270, 270, "135 pairs, nine patterns of 15"),),
        files=("Questions.csv", "MLLM_VLM Images/"),
        commands=(
            _captions("mmvp", "Questions.csv", "mmvp.jsonl"),
            *_encode("mmvp", "mmvp.jsonl", "mmvp.jsonl"),
            _evaluate("mmvp", "mmvp"),
        ),
        traps=(
            "captions are 'a photo of ' and the statement",
            "the order of the questions says which pattern a pair is of: do not sort them",
        ),
        protocols=("mmvp",),
    ),
)

RECIPES = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name or of a protocol, or a ValueError that lists them."""
    for recipe in _RECIPES:
        if name == recipe.name or name in recipe.protocols:
            return recipe
    raise ValueError(f"data: no {name!r}; there are {', '.join(RECIPES)}")
