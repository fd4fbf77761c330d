"""A trained network as a folder that others can use: `model.safetensors`, `config.json`, and a card, `README.md`."""

import json
from pathlib import Path
from typing import Self

from pydantic import AliasChoices, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fsr_fast.config import ModelConfig
from fsr_fast.config_fields import Section
from fsr_fast.dataloading.reading import Window, check_window
from fsr_fast.errors import UserError
from fsr_fast.models.network import Network

FORMAT = "fsr_fast network 1"
WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


class NetworkDescription(Section):
    """Content of config.json."""

    classes: tuple[str, ...]
    """Names of the foreground classes."""
    image_size: int = Field(ge=32, le=4096)
    """Side of the training views, in pixels."""
    mean: tuple[float, ...]
    """Mean of the input, for images in 0…1."""
    std: tuple[float, ...] = Field(validation_alias=AliasChoices("std", "deviation"))
    """Standard deviation of the input, likewise; earlier exports call it `deviation`."""
    model: ModelConfig
    """Sizes and switches."""
    window: Window | None = None
    """Lowest and highest value of pictures deeper than 8 bits; earlier exports have none."""

    @model_validator(mode="after")
    def _value_per_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.model.in_chans:
            raise ValueError(f"mean and std: expected a number for each of {self.model.in_chans} channels")
        check_window(self.window, self.model.in_chans)
        return self


def is_network_folder(path: Path) -> bool:
    """Return whether a folder holds an exported network."""
    return (path / WEIGHTS).is_file() and (path / DESCRIPTION).is_file()


def write_network(network: Network, folder: Path) -> None:
    """Write weights and description into a folder.

    Args:
        network: the network.
        folder: exists.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    (folder / WEIGHTS).write_bytes(
        save(weights, {"format": "pt"})
    )  # save_file would make a file that only its owner can read
    known = {name: getattr(network, name) for name in ("classes", "image_size", "mean", "std")}
    known["window"] = network.reading.window
    description = {"format": FORMAT, **known, "model": network.config.model_dump(mode="json")}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> tuple[NetworkDescription, dict[str, Tensor]]:
    """Read what `write_network` wrote. No pickled code is run.

    Args:
        folder: with weights and description.

    Returns:
        The description, and the weights by name, on the CPU.

    Raises:
        UserError: a file is damaged or of another format.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description.pop("format") != FORMAT:
            raise UserError(f"{folder / DESCRIPTION}: of another format; expected {FORMAT!r}")
        return NetworkDescription.model_validate(description), load_file(folder / WEIGHTS)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        first = " ".join(f"{type(error).__name__}: {error}".split()[:30])
        raise UserError(f"{folder}: the exported network is damaged ({first}); export it again") from None
