"""The curves of a run: which metrics share a figure, and how each is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sotalign_jax.reports.figures import COLOURS, figure
from sotalign_jax.reports.markup import Markup
from sotalign_jax.reports.series import Series

__all__ = ["training_figures"]

_KS = (1, 5, 10)


class _Panel(NamedTuple):
    """One figure: which metrics it takes, and how it shows them."""

    title: str
    takes: Callable[[str], bool]
    note: str = ""
    log: bool = False
    name: Callable[[str], str] = lambda metric: metric.split("/")[-1].replace("_", " ")


def _plan_name(metric: str) -> str:
    return metric.split("/")[-1].split("_")[0]


# A metric goes into the first panel that takes it; those that none takes get one each.
_PANELS = (
    _Panel("Loss", lambda m: m in ("train/loss", "train/siglip", "train/info_nce")),
    _Panel("STRUCTURE", lambda m: m in ("train/structure_image", "train/structure_text")),
    _Panel("Marginal errors of the plans", lambda m: m.endswith("_marginal_error"),
           "L1, the largest since the last record", log=True, name=_plan_name),
    _Panel("Sharpness of the plans", lambda m: m.endswith("_perplexity"),
           "effective number of texts an image is coupled to", log=True, name=_plan_name),
    _Panel("Sinkhorn iterations", lambda m: m.endswith("_iterations"), "a step", name=_plan_name),
    _Panel("Learning rate", lambda m: m == "train/learning_rate"),
    _Panel("Gradient norm", lambda m: m == "train/gradient_norm", log=True),
    _Panel("Logit scale", lambda m: m == "train/scale"),
    _Panel("Logit bias", lambda m: m == "train/bias"),
    _Panel("Parameter norm", lambda m: m == "train/parameter_norm"),
    _Panel("Speed", lambda m: m == "time/rows_per_second", "rows a second; the first record "
           "includes compilation", name=lambda m: "rows per second"),
)  # fmt: skip
_NOT_DRAWN = ("time/steps_per_second",)
_TITLES = {"klot": "KLOT", "cka": "CKA divergence", "info_nce_divergence": "InfoNCE divergence"}


def training_figures(
    series: Mapping[str, Series], teacher: Mapping[str, float] | None = None
) -> list[Markup]:
    """The figures of a run; those of metrics that it did not record are left out.

    Args:
        series: of `read_series`; one that has a single point is no curve.
        teacher: retrieval of the teacher on the validation pairs, for comparison.

    Returns:
        Validation first, then the losses, the plans, the optimiser and the speed.
    """
    figures = []
    series = {name: one for name, one in series.items() if len(one.steps) > 1}
    if "val/mean_recall@1" in series:
        figures.append(_recalls(series, teacher or {}))
        figures.append(_directions(series))
    rest = [m for m in series if not m.startswith("val/") and m not in _NOT_DRAWN]
    grouped: dict[_Panel, list[str]] = {}
    for metric in rest:
        panel = next((p for p in _PANELS if p.takes(metric)), None) or _own_panel(metric)
        grouped.setdefault(panel, []).append(metric)
    own = [panel for panel in grouped if panel not in _PANELS]
    # The terms of the loss stand beside it.
    for panel in (_PANELS[0], *own, *_PANELS[1:]):
        if panel in grouped:
            figures.append(_panel_figure(panel, {m: series[m] for m in grouped[panel]}))
    return figures


def _own_panel(metric: str) -> _Panel:
    short = metric.split("/")[-1]
    title = _TITLES.get(short, short.replace("_", " ").capitalize())
    return _Panel(title, metric.__eq__)


def _panel_figure(panel: _Panel, series: Mapping[str, Series]) -> Markup:
    log = panel.log and all((one.values > 0).all() for one in series.values())

    def draw(axes: Any) -> None:
        for colour, (metric, one) in zip(COLOURS, series.items(), strict=False):
            _line(axes, one, colour, panel.name(metric))
        if log:
            axes.set_yscale("log")
        _finish(axes, legend=len(series) > 1)

    name = "curve-" + "-".join(metric.replace("/", "-") for metric in sorted(series))
    return figure(name, draw, title=panel.title, note=panel.note)


def _recalls(series: Mapping[str, Series], teacher: Mapping[str, float]) -> Markup:
    def draw(axes: Any) -> None:
        for colour, k in zip(COLOURS, _KS, strict=False):
            metric = f"mean_recall@{k}"
            if f"val/{metric}" not in series:
                continue
            _line(axes, _percent(series[f"val/{metric}"]), colour, f"R@{k}")
            if metric in teacher:
                axes.axhline(100 * teacher[metric], color=colour, linestyle=":", linewidth=1.1)
        _finish(axes, "%")

    note = "mean of both directions, validation pairs"
    return figure(
        "curve-val-mean",
        draw,
        title="Recall",
        note=note + ("; dotted: the teacher" if teacher else ""),
    )


def _directions(series: Mapping[str, Series]) -> Markup:
    def draw(axes: Any) -> None:
        for style, side in (("-", "t2i"), ("--", "i2t")):
            for colour, k in zip(COLOURS, _KS, strict=False):
                if (one := series.get(f"val/{side}/recall@{k}")) is not None:
                    _line(axes, _percent(one), colour, f"{side.upper()} R@{k}", linestyle=style)
        _finish(axes, "%")

    return figure("curve-val-sides", draw, title="Recall", note="each direction, validation pairs")


def _percent(series: Series) -> Series:
    return series._replace(values=100 * series.values)


def _line(axes: Any, series: Series, colour: str, label: str, **style: Any) -> None:
    # A few points are seen as such.
    marker = "o" if len(series.steps) <= 12 else None
    axes.plot(series.steps, series.values, color=colour, label=label, marker=marker, **style)


def _finish(axes: Any, unit: str = "", *, legend: bool = True) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", useOffset=False)
    if legend:
        axes.legend(fontsize="small", ncols=2)
