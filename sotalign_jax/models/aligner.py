"""The aligner: preprocessing, two alignment layers and the SigLIP scale and bias, as one model."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import sotalign_jax
from sotalign_jax.models.layers import (
    LAYER_NORM_EPSILON,
    STAR_CLAMP,
    LayerConfig,
    Linear,
    check_sizes,
    make_layer,
)
from sotalign_jax.models.saved import (
    CONFIG_FILE,
    TENSORS_FILE,
    json_metadata,
    read_document,
    read_tensors,
    saved_path,
    write_model,
)
from sotalign_jax.numerics import Columns, standardized_rows, unit_rows

__all__ = ["Aligner", "Preprocessing", "TeacherWeights"]

FORMAT = "sotalign_jax.aligner"
# 2 has standardised columns, of which a reader of 1 knows nothing; without them we write 1.
FORMAT_VERSIONS = (1, 2)
_SIDES = ("image", "text")


class Preprocessing(nnx.Variable):
    """A part of the model that comes from the data and is never trained."""


@runtime_checkable
class TeacherWeights(Protocol):
    """What `Aligner.from_teacher` reads of a linear teacher.

    Attributes:
        image_weight: ``(image_dim, dim)``.
        text_weight: ``(text_dim, dim)``.
        image_mean: ``(image_dim,)``, subtracted from image rows of unit length.
        text_mean: ``(text_dim,)``, subtracted from text rows of unit length.

    A teacher that standardises columns also has ``image_columns`` or ``text_columns``, a `Columns`.
    """

    @property
    def image_weight(self) -> ArrayLike: ...

    @property
    def text_weight(self) -> ArrayLike: ...

    @property
    def image_mean(self) -> ArrayLike: ...

    @property
    def text_mean(self) -> ArrayLike: ...


class Aligner(nnx.Module):
    """Two alignment layers with everything that stands between raw features and a similarity.

    A side's raw features x become an embedding by

        z = x / |x| - mean                  preprocessing (the row norm is optional)
        e = layer(z) / |layer(z)|

    where a side with ``columns`` standardises x / |x| first: with u = (x / |x| - columns.mean) /
    columns.scale, z = u / |u| - mean.

    and the similarity of an image and a text is the cosine ``<e_image, e_text>``. The SigLIP
    probability that they belong together is ``sigmoid(scale * cosine + bias)``.

    Trainable (`flax.nnx.Param`): ``image.*``, ``text.*``, ``log_scale``, ``bias``. Not trainable
    (`Preprocessing`): ``image_mean``, ``text_mean``, and where columns are standardised
    ``image_column_mean``, ``image_column_scale`` and the same of the text. So
    ``nnx.split(aligner, nnx.Param, ...)`` separates what a trainer updates from the rest.

    Args:
        image_dim: width of the image features.
        text_dim: width of the text features.
        dim: width of the shared space.
        layer: kind and options of both alignment layers.
        rngs: source of the initial weights.
        scale: initial logit scale, stored as its logarithm.
        bias: initial logit bias.
        normalize: scale raw rows to unit length first.
        image_mean: ``(image_dim,)``, subtracted from the (unit) image rows; ``None`` means zeros.
        text_mean: ``(text_dim,)``, likewise for texts.
        image_columns: standardise the columns of unit image rows by these, before the mean is
            subtracted; ``None`` leaves the columns alone. Needs ``normalize``.
        text_columns: likewise for texts.
        prior: share of true pairs among the image-text combinations seen in training, 1/n for a
            batch of n pairs; `predict_proba` needs it to answer for another share.

    Attributes:
        training_prior: the ``prior`` above; a trainer that learns it late may set it.

    Raises:
        ValueError: for a width, scale, bias, mean, columns or prior out of range.

    References:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training (SigLIP), ICCV 2023; SOTAlign,
        arXiv 2602.23353.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        dim: int,
        *,
        layer: LayerConfig,
        rngs: nnx.Rngs,
        scale: float = 20.0,
        bias: float = -10.0,
        normalize: bool = True,
        image_mean: Float[ArrayLike, "..."] | None = None,
        text_mean: Float[ArrayLike, "..."] | None = None,
        image_columns: Columns | None = None,
        text_columns: Columns | None = None,
        prior: float | None = None,
    ):
        check_sizes(image_dim=image_dim, text_dim=text_dim, dim=dim)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: got {scale!r}; it must be positive and finite")
        if not math.isfinite(bias):
            raise ValueError(f"bias: got {bias!r}; it must be finite")
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize: got {normalize!r}; it must be true or false")
        if prior is not None:
            _log_odds("prior", prior)
        self.image_dim = int(image_dim)
        self.text_dim = int(text_dim)
        self.dim = int(dim)
        self.layer = layer
        self.normalize = normalize
        self.training_prior = prior
        self.image_mean = Preprocessing(_mean("image_mean", image_mean, self.image_dim))
        self.text_mean = Preprocessing(_mean("text_mean", text_mean, self.text_dim))
        self.standardized: tuple[str, ...] = ()
        for side, columns in (("image", image_columns), ("text", text_columns)):
            if columns is None:
                continue
            if not normalize:
                raise ValueError(
                    f"{side}_columns: standardise rows of unit length; set normalize=True"
                )
            self.standardized += (side,)
            for name, value in _columns(side, columns, getattr(self, f"{side}_dim")).items():
                setattr(self, name, Preprocessing(value))
        self.image = make_layer(layer, self.image_dim, self.dim, rngs=rngs)
        self.text = make_layer(layer, self.text_dim, self.dim, rngs=rngs)
        self.log_scale = nnx.Param(jnp.asarray(math.log(scale), jnp.float32))
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    @classmethod
    def from_teacher(
        cls,
        teacher: TeacherWeights,
        *,
        scale: float = 20.0,
        bias: float = -10.0,
        prior: float | None = None,
        rescale: bool = True,
    ) -> "Aligner":
        """An aligner whose `similarity` is the teacher's affinity: the start for training.

        Both layers are linear without LayerNorm, hold the teacher's weights and a bias of zeros;
        the teacher's means and columns become the preprocessing. Cosines do not see the scale of a
        side's weight, but an optimiser whose steps have a fixed size (Lion, Adam) does: the entries
        of a CCA weight may be 100 times those of a fresh layer, or a hundredth.

        Args:
            teacher: a `sotalign_jax.teachers.LinearTeacher`, or anything with its weights and
                means.
            scale: initial logit scale.
            bias: initial logit bias.
            prior: share of true pairs in training, see `Aligner`.
            rescale: multiply each side's weight by one number, so that its root-mean-square entry
                is that of Xavier-uniform initialisation, ``sqrt(2 / (d_in + d_out))``.

        Returns:
            The aligner, independent of the teacher's arrays.

        Raises:
            ValueError: for weights that are not finite, are all zero, or do not fit each other.
        """
        weights = {}
        for side in ("image", "text"):
            name = f"teacher.{side}_weight"
            weight = np.asarray(getattr(teacher, f"{side}_weight"), np.float32)
            if weight.ndim != 2:
                raise ValueError(f"{name}: got shape {weight.shape}; it must be ({side}_dim, dim)")
            # In float64: a weight that is tiny or huge must not under- or overflow when squared.
            size = math.sqrt(np.mean(np.square(weight, dtype=np.float64))) if weight.size else 0.0
            if not (math.isfinite(size) and size > 0):
                raise ValueError(f"{name}: entries must be finite and not all zero")
            factor = math.sqrt(2 / sum(weight.shape)) / size if rescale else 1.0
            weights[side] = (weight * np.float64(factor)).astype(np.float32)
        if weights["image"].shape[1] != weights["text"].shape[1]:
            raise ValueError(
                f"teacher: image_weight has {weights['image'].shape[1]} columns and text_weight "
                f"{weights['text'].shape[1]}; both must map to the same space"
            )
        aligner = cls(
            weights["image"].shape[0],
            weights["text"].shape[0],
            weights["image"].shape[1],
            layer=LayerConfig("linear", layer_norm=False),
            rngs=nnx.Rngs(0),
            scale=scale,
            bias=bias,
            image_mean=teacher.image_mean,
            text_mean=teacher.text_mean,
            image_columns=getattr(teacher, "image_columns", None),
            text_columns=getattr(teacher, "text_columns", None),
            prior=prior,
        )
        for layer, weight in ((aligner.image, weights["image"]), (aligner.text, weights["text"])):
            assert isinstance(layer, Linear)
            layer.linear.kernel[...] = jnp.asarray(weight)
        return aligner

    @property
    def scale(self) -> Float[Array, ""]:
        """The logit scale, ``exp(log_scale)``."""
        return jnp.exp(self.log_scale[...])

    def preprocess_image(
        self, raw: Float[ArrayLike, "*n image_dim"]
    ) -> Float[Array, "*n image_dim"]:
        """Raw image features as the image layer wants them: unit rows minus the mean, float32.

        With ``image_columns`` the unit rows are standardised by column and unit rows again first.

        Args:
            raw: ``(n, image_dim)`` or one row ``(image_dim,)``, any floating dtype.

        Returns:
            The same shape, float32. A row of zeros has no direction and becomes minus the mean,
            unless columns are standardised.

        Raises:
            ValueError: when the width is not ``image_dim``.
        """
        return self._preprocess("image", raw)

    def preprocess_text(self, raw: Float[ArrayLike, "*n text_dim"]) -> Float[Array, "*n text_dim"]:
        """Raw text features as the text layer wants them: unit rows minus the mean, float32.

        With ``text_columns`` the unit rows are standardised by column and unit rows again first.

        Args:
            raw: ``(n, text_dim)`` or one row ``(text_dim,)``, any floating dtype.

        Returns:
            The same shape, float32. A row of zeros has no direction and becomes minus the mean,
            unless columns are standardised.

        Raises:
            ValueError: when the width is not ``text_dim``.
        """
        return self._preprocess("text", raw)

    def project_image(self, preprocessed: Float[Array, "*n image_dim"]) -> Float[Array, "*n dim"]:
        """The image layer alone, for features that were preprocessed once; not normalised.

        Multiplies at the ambient `jax.default_matmul_precision`, where `embed_image` always uses
        the highest.

        Args:
            preprocessed: ``(n, image_dim)`` float32, from `preprocess_image`.

        Returns:
            ``(n, dim)`` float32.
        """
        with jax.named_scope("project"):
            return self.image(preprocessed)

    def project_text(self, preprocessed: Float[Array, "*n text_dim"]) -> Float[Array, "*n dim"]:
        """The text layer alone, for features that were preprocessed once; not normalised.

        Multiplies at the ambient `jax.default_matmul_precision`, where `embed_text` always uses
        the highest.

        Args:
            preprocessed: ``(n, text_dim)`` float32, from `preprocess_text`.

        Returns:
            ``(n, dim)`` float32.
        """
        with jax.named_scope("project"):
            return self.text(preprocessed)

    def embed_image(self, raw: Float[ArrayLike, "*n image_dim"]) -> Float[Array, "*n dim"]:
        """Raw image features to unit rows of the shared space.

        Args:
            raw: ``(n, image_dim)`` or one row ``(image_dim,)``, any floating dtype, as the encoder
                gave them.

        Returns:
            ``(n, dim)`` or ``(dim,)`` float32 of unit length.

        Raises:
            ValueError: when the width is not ``image_dim``.
        """
        with jax.default_matmul_precision("highest"):
            return _unit(self.project_image(self.preprocess_image(raw)))

    def embed_text(self, raw: Float[ArrayLike, "*n text_dim"]) -> Float[Array, "*n dim"]:
        """Raw text features to unit rows of the shared space.

        Args:
            raw: ``(n, text_dim)`` or one row ``(text_dim,)``, any floating dtype, as the encoder
                gave them.

        Returns:
            ``(n, dim)`` or ``(dim,)`` float32 of unit length.

        Raises:
            ValueError: when the width is not ``text_dim``.
        """
        with jax.default_matmul_precision("highest"):
            return _unit(self.project_text(self.preprocess_text(raw)))

    def similarity(
        self, image: Float[ArrayLike, "*n image_dim"], text: Float[ArrayLike, "*m text_dim"]
    ) -> Float[Array, "*n_m"]:
        """Cosine of every image with every text in the shared space.

        Args:
            image: ``(n, image_dim)`` raw features, or one row.
            text: ``(m, text_dim)`` raw features, or one row.

        Returns:
            ``(n, m)`` float32; the axis of a side given as one row is absent.

        Raises:
            ValueError: when a width is wrong.
        """
        with jax.default_matmul_precision("highest"):
            return jnp.matmul(self.embed_image(image), self.embed_text(text).T)

    def predict_proba(
        self,
        image: Float[ArrayLike, "*n image_dim"],
        text: Float[ArrayLike, "*m text_dim"],
        *,
        prior: float | None = None,
    ) -> Float[Array, "*n_m"]:
        """Probability that an image and a text belong together.

        SigLIP's loss is a logistic regression on the cosine s, so ``scale * s + bias`` estimates
        the log-odds of a true pair under the share pi of true pairs in training. By Bayes' rule
        these log-odds are a log likelihood ratio, free of pi, plus the log-odds of pi:

            log P(pair | s) / P(other | s) = log p(s | pair) / p(s | other) + logit(pi)

        For another share pi' of true pairs only the last term changes:

            P'(pair | s) = sigmoid(scale * s + bias - logit(pi) + logit(pi'))

        Args:
            image: ``(n, image_dim)`` raw features, or one row.
            text: ``(m, text_dim)`` raw features, or one row.
            prior: share pi' of true pairs among the combinations asked about, in (0, 1): 0.5 when
                each is as likely true as not, 1/m when each image has one of m texts. ``None``
                keeps the share seen in training, where a true pair is one in n.

        Returns:
            ``(n, m)`` float32; the axis of a side given as one row is absent.

        Raises:
            ValueError: for a prior outside (0, 1), or a prior without a known ``training_prior``.

        References:
            Saerens, Latinne and Decaestecker, Adjusting the Outputs of a Classifier to New a
            Priori Probabilities, Neural Computation 14 (2002), section 2.
        """
        shift = 0.0
        if prior is not None:
            shift = _log_odds("prior", prior)
            if self.training_prior is None:
                raise ValueError(
                    "prior: the share of true pairs in training is unknown, so it cannot be "
                    "replaced; set training_prior (1/n for batches of n pairs) or leave prior out"
                )
            shift -= _log_odds("training_prior", self.training_prior)
        logits = self.scale * self.similarity(image, text) + self.bias[...]
        return jax.nn.sigmoid(logits + shift)

    def save(self, directory: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes the aligner to a directory that needs no JAX to read.

        ``aligner.safetensors`` holds the tensors under flat names (``image.linear.kernel``,
        ``log_scale``, ``image_mean``, ...), ``aligner.json`` the dimensions, the layer, the
        preprocessing, the forward pass in words (``recipe``) and the metadata. Both are written
        beside the target and then moved there in one piece. An aligner that stood there steps
        aside for that moment, where `load` finds it should the process die just then.

        Args:
            directory: where to; parents are made. It may exist if it is empty, or holds an aligner
                of this format version and nothing else.
            metadata: anything of your own that JSON can hold.

        Raises:
            ValueError: when the directory holds something else, or the metadata is not JSON.
        """
        tensors = {name: np.asarray(value[...]) for name, value in _named(nnx.state(self)).items()}
        write_model(directory, self._document(metadata), tensors, FORMAT_VERSIONS)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Aligner":
        """Reads what `save` wrote.

        Args:
            directory: the aligner's directory.

        Returns:
            The aligner, bit for bit.

        Raises:
            ValueError: when the directory holds no aligner, one of another format version, or
                tensors that are damaged, missing, unknown, or of the wrong shape or dtype.
        """
        path = saved_path(directory)
        document = read_document(path, FORMAT, FORMAT_VERSIONS)
        try:
            layer = LayerConfig(**document["layer"])
            options = {name: document[name] for name in ("image_dim", "text_dim", "dim")}
            options |= {"normalize": document["normalize"], "prior": document["training_prior"]}
            options |= _placeholder_columns(document)
            # No memory and no random numbers for weights that are about to be read.
            abstract = nnx.eval_shape(lambda: cls(**options, layer=layer, rngs=nnx.Rngs(0)))
        except KeyError as error:
            raise ValueError(f"{path / CONFIG_FILE}: field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path / CONFIG_FILE}: {error}") from error

        graphdef, state = nnx.split(abstract)
        shapes = {name: variable.shape for name, variable in _named(state).items()}
        tensors = read_tensors(path / TENSORS_FILE, shapes)
        loaded = [
            (path, variable.replace(jnp.asarray(tensors[_name(path)])))
            for path, variable in nnx.to_flat_state(state)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(loaded))

    def columns(self, side: str) -> Columns | None:
        """What standardises the columns of a side, ``"image"`` or ``"text"``; None: nothing."""
        if side not in self.standardized:
            return None
        return Columns(*(getattr(self, f"{side}_column_{name}")[...] for name in Columns._fields))

    def _preprocess(self, side, raw):
        raw = jnp.asarray(raw)
        mean = getattr(self, f"{side}_mean")[...]
        (dim,) = mean.shape
        if raw.ndim not in (1, 2) or raw.shape[-1] != dim:
            raise ValueError(f"{side}: got shape {raw.shape}; expected (n, {dim}) or ({dim},)")
        rows = _unit(raw) if self.normalize else raw.astype(jnp.float32)
        # Constant also for a caller who differentiates the whole module.
        mean, columns = jax.lax.stop_gradient((mean, self.columns(side)))
        if columns is not None:
            rows = standardized_rows(rows.reshape(-1, dim), columns).reshape(rows.shape)
        return rows - jnp.broadcast_to(mean, rows.shape)

    def _document(self, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        prior = self.training_prior
        if prior is not None:
            _log_odds("training_prior", prior)
            prior = float(prior)
        columns = {"standardized": list(self.standardized)} if self.standardized else {}
        return {
            "format": FORMAT,
            "version": FORMAT_VERSIONS[1 if self.standardized else 0],
            "sotalign_jax": sotalign_jax.__version__,
            "image_dim": self.image_dim,
            "text_dim": self.text_dim,
            "dim": self.dim,
            "layer": _layer_fields(self.layer),
            "normalize": self.normalize,
            **columns,
            "training_prior": prior,
            "recipe": _recipe(self.layer, self.normalize, self.standardized),
            "metadata": json_metadata(metadata),
        }


def _unit(rows):
    return unit_rows(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)


def _mean(name: str, mean, dim: int) -> Float[Array, "dim"]:
    if mean is None:
        return jnp.zeros(dim, jnp.float32)
    mean = np.asarray(mean, np.float32)
    if mean.shape != (dim,):
        raise ValueError(f"{name}: got shape {mean.shape}; expected ({dim},)")
    if not np.isfinite(mean).all():
        raise ValueError(f"{name}: entries must be finite")
    return jnp.asarray(mean)


def _columns(side: str, columns, dim: int) -> dict[str, Float[Array, "dim"]]:
    """The checked columns of a side by the names of their tensors."""
    columns = Columns(*columns)
    if not (np.asarray(columns.scale) > 0).all():
        raise ValueError(f"{side}_columns.scale: entries must be positive")
    return {
        f"{side}_column_{name}": _mean(f"{side}_columns.{name}", getattr(columns, name), dim)
        for name in Columns._fields
    }


def _placeholder_columns(document: Mapping[str, Any]) -> dict[str, Columns]:
    """Columns of the right size where a document says that a side has some, to be read later."""
    if document["version"] < FORMAT_VERSIONS[1]:
        return {}
    sides = document["standardized"]
    if sides not in (["image"], ["text"], list(_SIDES)):
        raise ValueError(f"standardized: got {sides!r}; must list image, text or both")
    sizes = {side: document[f"{side}_dim"] for side in sides}
    check_sizes(**{f"{side}_dim": size for side, size in sizes.items()})
    return {f"{side}_columns": Columns(np.zeros(n), np.ones(n)) for side, n in sizes.items()}


def _log_odds(name: str, share: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"{name}: got {share!r}; a share of true pairs lies strictly in (0, 1)")
    return math.log(share) - math.log1p(-share)


def _name(path) -> str:
    return ".".join(str(part) for part in path)


def _named(state) -> dict[str, nnx.Variable]:
    return {_name(path): variable for path, variable in nnx.to_flat_state(state)}


def _layer_fields(layer: LayerConfig) -> dict[str, Any]:
    """Of a layer as JSON; a width that is not given is left out, as before there was one."""
    fields = dataclasses.asdict(layer)
    if layer.hidden is None:
        del fields["hidden"]
    return fields


def _recipe(layer: LayerConfig, normalize: bool, standardized: tuple[str, ...]) -> str:
    """The forward pass in one line, as the tensors' names spell it."""

    def dense(features: str, name: str) -> str:
        return f"{features} @ {name}.kernel" + (f" + {name}.bias" if layer.bias else "")

    steps = ["for a row x of a side (image or text; its tensors start with the side's name)"]
    if normalize:
        steps.append("x = x / |x| (a row of zeros stays zero)")
    if standardized:
        only = "" if standardized == _SIDES else f", {standardized[0]} alone"
        steps.append(f"x = (x - {{side}}_column_mean) / {{side}}_column_scale, x = x / |x|{only}")
    steps.append("x = x - {side}_mean")
    if layer.layer_norm:
        steps.append(
            f"x = (x - mean(x)) / sqrt(variance(x) + {LAYER_NORM_EPSILON:g}) * layer_norm.scale "
            "+ layer_norm.bias"
        )
    if layer.kind == "linear":
        steps.append(f"x = {dense('x', 'linear')}")
    elif layer.kind == "mlp":
        steps.append(f"h = {dense('x', 'hidden')}")
        steps.append("h = h * (1 + erf(h / sqrt(2))) / 2")
        steps.append(f"x = {dense('h', 'output')}")
    else:
        limit = f"{STAR_CLAMP:g}"
        steps.append(f"g = clip({dense('x', 'gate')}, 0, 6)")
        steps.append(f"v = clip({dense('x', 'value')}, -{limit}, {limit})")
        steps.append("h = g * v")
        steps.append(f"x = {dense('h', 'output')}")
    steps.append("embedding = x / |x|")
    steps.append("similarity = <image embedding, text embedding>")
    steps.append("probability = sigmoid(exp(log_scale) * similarity + bias)")
    return "; ".join(steps)
