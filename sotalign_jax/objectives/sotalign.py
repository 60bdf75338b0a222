"""SOTAlign: SigLIP on the pairs, and a divergence to the teacher on the unpaired rows."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from sotalign_jax.features.batches import Batch
from sotalign_jax.models import Aligner
from sotalign_jax.objectives.base import LossSettings, Moment, Objective, Outcome, Reads
from sotalign_jax.objectives.divergences import DIVERGENCES
from sotalign_jax.objectives.sail import sail

__all__ = ["SOTALIGN"]


def _sotalign(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """SigLIP plus ``alpha`` times a divergence (SOTAlign, arXiv 2602.23353, section 4.2).

    Grids: ``loss.alpha`` 1e-3, 1e-4, 1e-5. As in the paper: ``loss.epsilon=0.05``,
    ``loss.teacher_epsilon=0.01`` (published code: 0.005), ``loss.iterations=100``.
    """
    value, supervised = sail(aligner, batch, settings, moment)
    if not settings.reads.teacher:
        return value, supervised
    with jax.named_scope("divergence"):
        divergence, outcome = DIVERGENCES[settings.divergence].value(
            aligner.project_image(batch.unpaired_image),
            aligner.project_text(batch.unpaired_text),
            batch,
            settings,
            moment,
        )
    outcome = outcome._replace(metrics=supervised.metrics | outcome.metrics)
    return value + settings.alpha * divergence, outcome


def _reads(config: Any) -> Reads:
    needed = config.loss.alpha > 0
    return Reads(unpaired=needed, teacher=needed)


SOTALIGN = Objective(_sotalign, reads=_reads)
