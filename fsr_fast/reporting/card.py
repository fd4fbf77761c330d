"""The card of a trained network: what it is, what it was trained on, and how well it does."""

from pathlib import Path

from fsr_fast.models import Network
from fsr_fast.models.pretrained import StartWeights
from fsr_fast.reporting.record import RunRecord
from fsr_fast.runtime.markdown import code, plain

KINDS = {"pseudo": "pseudo labels from class activation maps", "seg": "segmentation", "seg+crf": "with the dense CRF"}


def model_card(name: str, network: Network, run: RunRecord | None) -> str:
    """Write the card, Markdown.

    Args:
        name: of the network.
        network: the network.
        run: record of its training; None if unknown.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = [
        "---",
        "library_name: fsr_fast",
        "pipeline_tag: image-segmentation",
        "---",
        "",
        f"# {plain(name)}",
        "",
        f"Segmentation network for {len(network.classes)} classes: {', '.join(map(plain, network.classes))}. "
        "It was trained from image-level labels alone by fsr_fast, which implements *Progressive Feature "
        "Self-Reinforcement for Weakly Supervised Semantic Segmentation* (He et al., AAAI 2024).",
        "",
        f"* {parameters / 1e6:.1f} million parameters; training views of {network.image_size} pixels.",
        f"* Input: RGB in 0…1, minus {_list(network.mean)}, divided by {_list(network.std)}.",
        "* Output: background is 0, the classes above are 1, 2, … in that order.",
        "",
        "```python",
        "from fsr_fast import from_pretrained, segment",
        "",
        'network = from_pretrained("this folder")',
        'prediction = segment(network, "picture.jpg")',
        "```",
        "",
        "## Training",
        "",
        *_training(run),
        "",
        "## Scores",
        "",
        *_scores(run),
        "",
        "## Limits",
        "",
        "Masks were learned from labels of whole images: outlines are approximate, and what often appears beside a "
        "class may be taken for a part of it. The network was not tested on pictures unlike those of its training.",
    ]
    return "\n".join(lines) + "\n"


def _training(run: RunRecord | None) -> list[str]:
    if run is None:
        return ["Not recorded."]
    data, optim, model = (run.config.get(section, {}) for section in ("data", "optim", "model"))
    packages = run.environment.get("packages", {})
    origin = model.get("initial") or model.get("pretrained")
    start = run.summary.get("start_weights")
    place = f", folder {code(Path(str(data['root'])).name)}" if data.get("root") else ""
    return [
        f"* Data: {code(data.get('dataset'))}{place}, list {code(data.get('train_list'))}.",
        f"* Backbone: {code(model.get('backbone'))}, from {code(origin)} weights.",
        *([f"* Start weights: {plain(str(StartWeights(**start)))}."] if start else []),
        f"* {run.summary.get('iterations', 'unknown')} of {plain(str(optim.get('iterations')))} iterations of "
        f"{plain(str(optim.get('batch_size')))} images, seed {plain(str(run.config.get('run', {}).get('seed')))}.",
        f"* fsr_fast {plain(str(packages.get('fsr_fast')))}, torch {plain(str(packages.get('torch')))}, commit "
        f"{plain(str(run.environment.get('commit') or 'unknown'))}.",
    ]


def _scores(run: RunRecord | None) -> list[str]:
    if run is None or not run.results:
        return ["Not evaluated."]
    classes = list(next(iter(run.results.values()))["classes"])
    head = " | ".join(KINDS.get(kind, kind) for kind in run.results)
    rows = [
        (plain(name), [scores["classes"].get(name, {}).get("iou") for scores in run.results.values()])
        for name in classes
    ]
    rows.append(("**mean**", [scores.get("mean_iou") for scores in run.results.values()]))
    return [
        f"IoU in percent on the list {code(run.config.get('data', {}).get('val_list'))}.",
        "",
        f"| class | {head} |",
        f"|---|{'---:|' * len(run.results)}",
        *(f"| {name} | {' | '.join('-' if v is None else f'{v:.1f}' for v in values)} |" for name, values in rows),
    ]


def _list(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
