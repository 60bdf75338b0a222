"""Every field of a run with its meaning and the paper's value. Copy what you change.

    sotalign train --config=configs/default.py --workdir=runs/cc3m \
        --config.data.files.image=... --config.data.files.text=... (and the other files)

`default.py:runlocal` is the same run shrunk to a smoke test on the embedded emoji: ten seconds.
The paper's result with these values on DINOv3 ViT-L + NV-Embed-v2 features of CC3M: mean
recall@1 on COCO val of 30.3, against 21.5 for the teacher and 24.2 for SAIL (table 1).
"""

from sotalign_jax.config import default_config


def get_config(arg=None):
    config = default_config()

    config.seed = 0  # draws the pairs, the initial weights and the batches
    config.steps = 2_000  # 0: nothing is trained, the aligner is its start (a teacher, say)
    # Layers, trained by the steps of an objective; or an aligner that is fitted in one go, without
    # steps, with options of its own below: csa (CCA, weighted) | asif (similarities to the pairs) |
    # sue (spectral embeddings); docs/fitted.md
    config.aligner = "layers"
    # sotalign | sail (pairs alone) | sail_semi (unpaired negatives) | clip (InfoNCE on pairs) |
    # structure (InfoNCE, and similarities within a modality are kept) | sclip (pseudo-labels) |
    # nnclr (nearest neighbours as positives); docs/objectives.md
    config.objective = "sotalign"

    # ---- rows
    config.data.name = "files"  # files | emoji | platonic
    config.data.n_pairs = 10_000  # paper: 1e2 .. 1e5
    config.data.n_unpaired = 0  # a side; 0: all there are, platonic: 20,000 (paper: 1e4 .. 1e6)
    config.data.resident = "auto"  # all rows on devices: auto | always | never (stream from disk)
    # GiB of rows that "auto" may keep on each device; preparing them at the start takes some more.
    config.data.resident_gib = 8.0
    # Any format that `sotalign inspect` opens; FILE:KEY names one array of a .npz, .h5 or
    # .safetensors file, as in "coco.npz:image". Rows join by id wherever both sides have ids.
    config.data.files.image = ""  # the paired corpus, images
    config.data.files.text = ""  # the paired corpus, texts
    config.data.files.on = "auto"  # join by: ids | rows | auto (ids where both sides have them)
    # Unpaired rows: the rest of the paired corpus, the same items on both sides, each side shuffled
    # (aligned); two halves of it (disjoint); other corpora (independent).
    config.data.files.mode = "disjoint"
    config.data.files.unpaired_image = ""  # mode independent
    config.data.files.unpaired_text = ""  # mode independent
    config.data.files.val_image = ""  # to choose alpha and steps on (paper: CC3M validation)
    config.data.files.val_text = ""
    config.data.files.n_val = 0  # or hold out this many images of the paired corpus
    config.data.files.test_image = ""  # to report on; several texts an image are welcome
    config.data.files.test_text = ""
    config.data.files.n_test = 0  # or hold out this many images, the same ones for every seed
    config.data.emoji.image = "google"  # google (Noto drawings) | fluent3d
    config.data.emoji.text = "label_tags"  # label_tags | label
    config.data.emoji.unpaired = "emoji"  # emoji | openclipart
    config.data.platonic.noise = 1.0
    config.data.platonic.n_val = 500
    config.data.platonic.n_test = 1_000

    # ---- teacher, fitted on the pairs
    config.teacher.name = "cca"  # cca | procrustes | contrastive
    config.teacher.dim = 0  # 0: as many directions as the pairs support; contrastive needs one
    config.teacher.ridge = 0.1
    config.teacher.ridge_on = "covariance"  # covariance (authors' code) | scatter (appendix C)
    config.teacher.weighted = False  # both sides times the root of the canonical correlations
    config.teacher.center = "pairs"  # means of the pairs, or of the unpaired rows: unpaired
    config.teacher.steps = 1_000  # contrastive only
    config.teacher.learning_rate = 1e-3  # contrastive only
    # Not in the paper: columns of unit rows minus their mean, over their standard deviation to this
    # power, and unit rows again; the deviations are those of pairs and unpaired rows together. The
    # aligner inherits it. 0: off, 0.5: half of the way to 1, at which all columns weigh the same.
    config.teacher.standardize.image = 0.0
    config.teacher.standardize.text = 0.0
    # Not in the paper: fit the CCA again on its pairs and on the unpaired rows, coupled by its own
    # transport plan, which then count for `weight` of every covariance. 0: off, else below 1.
    config.teacher.refit.weight = 0.0
    config.teacher.refit.epsilon = 0.02  # of that plan
    config.teacher.refit.rounds = 1

    # ---- alignment layers
    config.model.init = "random"  # random | teacher (helps with few pairs; linear, no LayerNorm)
    config.model.dim = 1_024  # from the teacher: the teacher's dimension
    config.model.layer = "linear"  # linear | mlp | star
    config.model.layer_norm = True  # LayerNorm of the input, as SAIL's "linear" has
    config.model.width_factor = 0  # hidden width over input width; 0: 4 (mlp), 8 (star)
    config.model.normalize = True  # features to unit length first
    config.model.center = True  # then minus the teacher's means
    config.model.scale = 20.0  # SigLIP logit scale at the start; learned
    config.model.bias = -10.0  # SigLIP logit bias at the start; learned

    # ---- pairs mixed with each other, for any objective: FuseMix
    config.fusemix.alpha = 0.0  # of the proportions' Beta distribution; 0: off, FuseMix: 1
    config.fusemix.partners = "halves"  # halves (half as many mixtures as pairs) | roll (as many)
    config.fusemix.per_row = False  # a proportion a mixture, not one a batch

    # ---- loss = SigLIP(pairs) + alpha * divergence(unpaired)
    # alpha belongs to this normalisation: "mean" divides by n x n as the authors' code does, "rows"
    # by n as the SigLIP paper does, which is n times larger and wants an n times larger alpha.
    config.loss.normalization = "mean"
    config.loss.divergence = "klot"  # klot | cka | info_nce
    config.loss.alpha = 1e-4  # paper: the best of 1e-3, 1e-4, 1e-5 on validation
    config.loss.epsilon = 0.05  # student
    config.loss.teacher_epsilon = 0.01  # the authors' code defaults to 0.005
    config.loss.threshold = 1e-2  # L1 marginal error at which Sinkhorn stops; see docs/sinkhorn.md
    config.loss.max_iterations = 500
    config.loss.iterations = 0  # the paper's fixed count is 100; 0: until the threshold
    # Sinkhorn starts from this share of the potentials that an image had when it was last in a
    # batch; 0: from nothing, as in the paper. Another start ends at the same threshold. Where every
    # batch is all there is, the teacher's plan always starts from nothing.
    config.loss.warm_student = 1.0
    config.loss.warm_teacher = 1.0
    # Matrices of rows by columns: held (dense), formed block by block anew for every iteration
    # (streamed), or dense while they fit in this much memory of a device (auto).
    config.loss.memory = "auto"  # auto | dense | streamed
    config.loss.memory_gib = 4.0
    # Products of embeddings in klot and SigLIP: in float32, or as three bfloat16 products of their
    # parts, for accelerators: true marginal errors are then up to 4e-7 over epsilon more than the
    # reported ones.
    config.loss.precision = "float32"  # float32 | bfloat16_3x

    # ---- rows a step
    config.batch.pairs = 10_000  # all of them while they fit
    config.batch.unpaired = 22_768  # images, and as many texts; 32,768 rows in all

    # ---- optimiser
    config.optimizer.name = "lion"  # lion | adamw
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.1  # fraction of the steps; then a cosine to zero

    # ---- devices. A run may go on with another number of them.
    config.mesh.devices = 0  # rows are spread over this many; 0: all of all processes

    # ---- rhythm, in steps
    config.log_every = 10  # steps of one dispatch, and of one line in metrics.jsonl
    config.eval_every = 100  # 0: only at the end
    config.checkpoint_every = 100  # 0: at the end and on SIGTERM; a killed run begins anew
    config.select = "last"  # last | best (checkpoint with the highest select_metric on validation)
    config.select_metric = "mean_recall@1"
    config.metrics.tensorboard = False
    config.metrics.wandb = ""  # a project name turns it on

    # ---- `sotalign compare`
    config.compare.seeds = (0,)
    config.compare.teacher = "teacher"  # what the table calls the teacher itself; "" leaves it out
    # config.compare.methods.NAME = {"objective": ..., "loss": {"alpha": ...}}: fields put in
    # config.compare.grids.NAME = {"steps": (500, 1000)}: tuned on validation with these seeds
    config.compare.tune_seeds = ()

    if arg == "runlocal":
        config.steps = 20
        config.data.name = "emoji"
        config.data.n_pairs = 100
        config.model.dim = 64
        config.batch.unpaired = 128
        config.eval_every = config.checkpoint_every = 10
    return config
