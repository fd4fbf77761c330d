"""The one check of arguments that every operation of the reference makes before it starts."""

from torch import Tensor


def require_shape(name: str, tensor: Tensor, *sizes: int | str) -> None:
    """Refuses a tensor whose shape is not the expected one.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        *sizes: one entry a dimension: its exact size, or its letter in the legend where any size will do.

    Raises:
        ValueError: if the number of dimensions or a fixed size differs.
    """
    same_rank = tensor.dim() == len(sizes)
    if not same_rank or any(isinstance(s, int) and s != n for s, n in zip(sizes, tensor.shape, strict=True)):
        expected = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected}); pass it in that layout")
