"""FuseMix: the pairs of a batch mixed with each other, before any objective sees them."""

from __future__ import annotations

from typing import Any, Literal

import jax
from jaxtyping import Array

from sotalign_jax.features.batches import Batch
from sotalign_jax.mixup import fusemix
from sotalign_jax.objectives.base import LossSettings, share, whole
from sotalign_jax.objectives.options import options, traced

__all__ = ["FuseMix", "mixed", "mixtures"]

# Folded into the key of a step, which is the objective's own.
_KEY_NUMBER = 1_001


@options
class FuseMix:
    """The table ``config.fusemix``, of no objective and for each of them.

    Attributes:
        alpha: of the Beta distribution of the proportions; 0 mixes nothing. FuseMix takes 1.
        partners: ``"halves"``: half as many mixtures as pairs, as FuseMix; ``"roll"``: as many as
            pairs, as STRUCTURE's version of it.
        per_row: a proportion for each mixture, not one for all of a batch as both have.
    """

    alpha: Any = traced(0.0)
    partners: Literal["halves", "roll"] = "halves"
    per_row: bool = False

    def check(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha: must be finite and not negative (0 is off), got {self.alpha}")


def mixtures(fusemix: FuseMix | None, pairs: int) -> int:
    """How many pairs an objective sees of those of a batch.

    Args:
        fusemix: the options; None mixes nothing.
        pairs: in the batch.

    Returns:
        The number of mixtures, or of pairs where nothing is mixed.

    Raises:
        ValueError: where so many pairs cannot be mixed so; it begins with the name of the option.
    """
    if fusemix is None:
        return pairs
    if pairs < 2:
        raise ValueError(f"alpha: mixtures need at least 2 pairs a step, got {pairs}; set 0")
    if fusemix.partners == "roll":
        return pairs
    if pairs % 2:
        raise ValueError(
            f"partners: 'halves' needs an even number of pairs a step, got {pairs}; make "
            "batch.pairs even or take 'roll'"
        )
    return pairs // 2


@jax.named_scope("draw")
def mixed(batch: Batch, pairs: int, settings: LossSettings, key: Array) -> Batch:
    """A prepared batch with mixtures of its pairs in their place; unpaired rows are not mixed.

    A neighbour of each pair, where there is one, is mixed as the pair is. On a mesh the pairs
    travel to every device once more: a mixture is of rows of two devices.

    Args:
        batch: rows as the aligner gets them, on a mesh this device's share.
        pairs: how many the batch has before padding.
        settings: of the loss, whose ``sizes`` count mixtures already.
        key: of the step.

    Returns:
        The batch; as it is where nothing is to be mixed.
    """
    how = settings.fusemix
    if how is None:
        return batch

    def mix(image: Array, text: Array) -> tuple[Array, Array]:
        image, text = fusemix(
            jax.random.fold_in(key, _KEY_NUMBER),
            whole(image, settings)[:pairs],
            whole(text, settings)[:pairs],
            alpha=how.alpha,
            partners=how.partners,
            per_row=how.per_row,
        )
        return share(image, settings), share(text, settings)

    def alike(rows: Array | None) -> Array | None:
        return None if rows is None else mix(rows, rows)[0]

    image, text = mix(batch.pairs_image, batch.pairs_text)
    return batch._replace(
        pairs_image=image,
        pairs_text=text,
        neighbour_image=alike(batch.neighbour_image),
        neighbour_text=alike(batch.neighbour_text),
    )
