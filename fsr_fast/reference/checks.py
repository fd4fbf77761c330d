"""The check of arguments that every operation of the reference makes first."""

from torch import Tensor


def require_shape(name: str, tensor: Tensor, *sizes: int | str) -> None:
    """Refuse a tensor whose shape is not the expected one.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        *sizes: one entry per dimension: its exact size, or its letter in the legend if any size is allowed.

    Raises:
        ValueError: if the number of dimensions or a fixed size differs.
    """
    same_rank = tensor.dim() == len(sizes)
    if not same_rank or any(isinstance(s, int) and s != n for s, n in zip(sizes, tensor.shape, strict=True)):
        expected = ", ".join(str(size) for size in sizes)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected}); pass it in that layout")
