"""The paper's Tables 3, 4 and 5: what each row changes in a recipe, and the paper's scores for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Changes = dict[str, dict[str, Any]]
"""Values that a row sets, by section and key."""

KINDS = ("pseudo", "seg")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)

Score = dict[str, float | None]
"""`mean` and `std`, mean IoU in percent; `std` is None if there is none."""


class PaperTable(NamedTuple):
    """One of the paper's tables."""

    title: str
    rows: dict[str, Changes]
    paper: dict[str, dict[str, Score]]
    """The paper's scores for its rows, by kind: on PASCAL VOC val, without CRF."""


def _augment(**changes: Any) -> Changes:
    return {"augment": {"blur": 0.0, "solarise": 0.0, "policy": "none"} | changes}


def _mask(strategy: str, **changes: Any) -> Changes:
    """Return a row of Table 3, which the paper trains without L_c."""
    return {"mask": {"strategy": strategy, **changes}, "loss": {"class_token": 0.0}}


def _losses(aggregation: str, *off: str) -> Changes:
    changes: Changes = {"model": {"aggregation": aggregation}}
    return changes | ({"loss": dict.fromkeys(off, 0.0)} if off else {})


def _paper(pseudo: float, seg: float, stds: tuple[float, float] | None = None) -> dict[str, Score]:
    return {
        kind: {"mean": mean, "std": std}
        for kind, mean, std in zip(KINDS, (pseudo, seg), stds or (None, None), strict=True)
    }


def _paper_ratios(strategy: str, pseudo: Sequence[float], seg: Sequence[float]) -> dict[str, dict[str, Score]]:
    return {f"{strategy}_{ratio}": _paper(p, s) for ratio, p, s in zip(RATIOS, pseudo, seg, strict=True)}


TABLES = {
    3: PaperTable(
        "which patches are masked, trained without L_c; full: uncertain_0.4 with it",
        {
            "edge_strict": _mask("edge_strict"),
            "cam_strict": _mask("cam_strict"),
            **{
                f"{strategy}_{ratio}": _mask(strategy, ratio=ratio)
                for strategy in ("random", "uncertain")
                for ratio in RATIOS
            },
            "full": {"mask": {"strategy": "uncertain", "ratio": 0.4}},
        },
        {
            "edge_strict": _paper(73.3, 71.6),
            "cam_strict": _paper(74.0, 71.8),
            **_paper_ratios("random", (73.1, 73.6, 74.1, 74.2, 73.2), (71.7, 72.3, 71.3, 72.3, 71.2)),
            **_paper_ratios("uncertain", (74.1, 74.2, 73.9, 74.4, 73.7), (72.2, 72.3, 72.0, 72.5, 72.1)),
        },
    ),
    4: PaperTable(
        "self-reinforcement of uncertain patches (unc) and of certain ones (cer) by three aggregations",
        {
            "none": _losses("mca", "uncertain", "class_token"),
            "unc": _losses("mca", "class_token"),
            "cer_gap": _losses("gap", "uncertain"),
            "cer_gmp": _losses("gmp", "uncertain"),
            "cer_mca": _losses("mca", "uncertain"),
            "both": _losses("mca"),
        },
        {
            "none": _paper(71.1, 67.9),
            "unc": _paper(74.4, 72.5),
            "cer_gap": _paper(72.3, 70.9),
            "cer_gmp": _paper(71.8, 70.0),
            "cer_mca": _paper(75.2, 73.3),
            "both": _paper(75.7, 73.6),
        },
    ),
    5: PaperTable(
        "further augmentation; a learned policy replaces colour jitter, except in the rows named jitter",
        {
            "none": _augment(),
            "blur": _augment(blur=0.1),
            "solarise": _augment(solarise=0.2),
            "autoaugment": _augment(policy="autoaugment", jitter=0.0),
            "autoaugment_jitter": _augment(policy="autoaugment"),
            "randaugment": _augment(policy="randaugment", jitter=0.0, crop_scale=(0.08, 1.0)),  # the official code's
            "randaugment_jitter": _augment(policy="randaugment"),
        },
        {
            "none": _paper(75.7, 73.6),
            "blur": _paper(75.9, 73.6, (0.05, 0.02)),
            "solarise": _paper(75.3, 73.2, (0.12, 0.06)),
            "autoaugment": _paper(74.8, 72.8, (0.09, 0.04)),
        },
    ),
}
