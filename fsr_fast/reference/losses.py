"""Every loss of the method with all its matrices written out (paper, Eq. 8-10; official code where it is silent)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import require_shape


def classification_loss(class_logits: Tensor, aux_class_logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss of the classifier plus that of the aux classifier, L_cls.

    Args:
        class_logits: (B, C) floating.
        aux_class_logits: (B, C) floating.
        labels: (B, C), 1 = present, 0 = absent.

    Returns:
        0-d, the two losses' sum; each is the mean over classes and images.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Eq. 1 and 10.
    """
    require_shape("class_logits", class_logits, "B", "C")
    require_shape("aux_class_logits", aux_class_logits, *class_logits.shape)
    require_shape("labels", labels, *class_logits.shape)
    present = labels.to(class_logits.dtype)
    total = class_logits.new_zeros(())
    for logits in (class_logits, aux_class_logits):
        term = present * F.logsigmoid(logits) + (1 - present) * F.logsigmoid(-logits)
        total = total - term.mean()
    return total


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    centre: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy from the teacher's to the student's prototype distribution.

    Args:
        student: (M, E) floating, L2-normalised bottleneck vectors.
        teacher: (M, E) floating, the teacher's; no gradient.
        student_head: (K, E), directions of the student's prototypes; rows are L2-normalised here (gain 1).
        teacher_head: (K, E), the teacher's; no gradient.
        centre: (K), running centre of the teacher's logits; no gradient.
        student_temperature: > 0.
        teacher_temperature: > 0, a number or a 0-d tensor.
        weight: (M) weights of the vectors, or None for their mean.

    Returns:
        0-d: the mean over the M vectors, or sum(weight * loss) if weight is given.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Eq. 8 (masked patches) and Eq. 9 (class tokens).
    """
    require_shape("student", student, "M", "E")
    M, E = student.shape
    require_shape("teacher", teacher, M, E)
    require_shape("student_head", student_head, "K", E)
    K = student_head.shape[0]
    require_shape("teacher_head", teacher_head, K, E)
    require_shape("centre", centre, K)
    if weight is not None:
        require_shape("weight", weight, M)
    student_logits = student @ (student_head / student_head.norm(dim=1, keepdim=True)).T
    with torch.no_grad():
        teacher_logits = teacher @ (teacher_head / teacher_head.norm(dim=1, keepdim=True)).T
        target = ((teacher_logits - centre) / teacher_temperature).softmax(dim=1)
    loss = -(target * (student_logits / student_temperature).log_softmax(dim=1)).sum(dim=1)
    return loss.mean() if weight is None else (weight * loss).sum()


def affinity_sums(features: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum |cosine similarity| over all pairs of patches with equal and with different labels.

    Args:
        features: (B, N, D) floating, patch features.
        labels: (B, N) integer: 0 background, 1..C classes, ignore_index unknown.
        ignore_index: pairs with this label on either side do not count.

    Returns:
        (4): same_sum, same_count, different_sum, different_count over ordered pairs i != j of the same image.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, patch token contrast.
    """
    require_shape("features", features, "B", "N", "D")
    B, N, _ = features.shape
    require_shape("labels", labels, B, N)
    sums = features.new_zeros(4)
    for b in range(B):
        direction = features[b] / features[b].norm(dim=1, keepdim=True).clamp(min=1e-8)
        similarity = (direction @ direction.T).abs()  # (N, N)
        known = labels[b] != ignore_index
        pair = known[:, None] & known[None, :] & ~torch.eye(N, dtype=torch.bool, device=labels.device)
        equal = labels[b][:, None] == labels[b][None, :]
        same, different = pair & equal, pair & ~equal
        sums = sums + torch.stack(
            [
                (similarity * same).sum(),
                same.sum().to(similarity.dtype),
                (similarity * different).sum(),
                different.sum().to(similarity.dtype),
            ]
        )
    return sums


def affinity_loss(features: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Draw patches of one class together and push those of different classes apart, L_aff.

    Args:
        features: (B, N, D) floating, patch features.
        labels: (B, N) integer: 0 background, 1..C classes, ignore_index unknown.
        ignore_index: pairs with this label on either side do not count.

    Returns:
        0-d, counts taken over the whole batch.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Eq. 10 (L_aff); official code for its form.
    """
    same_sum, same_count, different_sum, different_count = affinity_sums(features, labels, ignore_index=ignore_index)
    return 0.5 * (1 - same_sum / (same_count + 1)) + 0.5 * different_sum / (different_count + 1)


def segmentation_sums(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum the full-resolution cross-entropy over background and over foreground pixels.

    Args:
        logits: (B, C + 1, h, w) floating, the decoder's output; channel 0 is the background.
        labels: (B, H, W) uint8 or int64: 0 background, 1..C classes, ignore_index ignored.
        ignore_index: pixels of this label do not count.

    Returns:
        (4): background sum, background count, foreground sum, foreground count.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, segmentation loss.
    """
    require_shape("logits", logits, "B", "C + 1", "h", "w")
    require_shape("labels", labels, logits.shape[0], "H", "W")
    labels = labels.long()
    resized = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    known = labels != ignore_index
    log_probability = resized.log_softmax(dim=1).gather(1, labels.where(known, 0)[:, None])[:, 0]
    background, foreground = known & (labels == 0), known & (labels != 0)
    return torch.stack(
        [
            -(log_probability * background).sum(),
            background.sum().to(logits.dtype),
            -(log_probability * foreground).sum(),
            foreground.sum().to(logits.dtype),
        ]
    )


def segmentation_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Average the cross-entropy of background pixels and that of foreground pixels with equal weight, L_seg.

    Args:
        logits: (B, C + 1, h, w) floating, the decoder's output; channel 0 is the background.
        labels: (B, H, W) uint8 or int64: 0 background, 1..C classes, ignore_index ignored.
        ignore_index: pixels of this label do not count.

    Returns:
        0-d; a set without pixels counts 0.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Eq. 10 (L_seg); official code for its form.
    """
    background_sum, background_count, foreground_sum, foreground_count = segmentation_sums(
        logits, labels, ignore_index=ignore_index
    )
    return 0.5 * (background_sum / background_count.clamp(min=1) + foreground_sum / foreground_count.clamp(min=1))


def dense_energy(
    probabilities: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 50.0,
    ignore_index: int = 255,
) -> Tensor:
    """Compute an energy over all pairs of pixels, low where pixels near in place and colour have similar distributions.

    The gate is treated as a constant. The gradient is that of the official code, dE/dS = -2 G * (K S) / B, which is the
    derivative of E only where the gates of the two pixels of a pair agree.

    Args:
        probabilities: (B, C + 1, h, w) floating, softmax of the decoder's output at half resolution.
        images: (B, 3, h, w) floating, RGB in 0..255.
        labels: (B, h, w) integer pseudo labels; only ignore_index matters here.
        sigma_rgb: standard deviation in colour, in grey levels.
        sigma_xy: standard deviation in place, in pixels of this resolution.
        ignore_index: pixels of this label have an open gate.

    Returns:
        0-d: E = -Σ_ij k_ij (G S)_i . S_j / B, pairs i = j included.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, dense energy loss, with the exact Gaussian in place of its lattice.
    """
    require_shape("probabilities", probabilities, "B", "C + 1", "h", "w")
    B, _, h, w = probabilities.shape
    require_shape("images", images, B, 3, h, w)
    require_shape("labels", labels, B, h, w)
    energy = probabilities.new_zeros(())
    gradient = torch.zeros_like(probabilities)
    with torch.no_grad():
        gate = (1 - probabilities.amax(dim=1)).clamp(min=0).masked_fill(labels == ignore_index, 1)  # (B, h, w)
        for b in range(B):
            for y in range(h):
                kernel = gaussian_kernel(images[b], y, sigma_rgb, sigma_xy).to(probabilities.dtype)  # (w, h, w)
                filtered = torch.einsum("xij,cij->cx", kernel, probabilities[b])  # (K S)_i of the row, (C + 1, w)
                gated = gate[b, y] * filtered
                energy = energy - (gated * probabilities[b, :, y]).sum() / B
                gradient[b, :, y] = -2 * gated / B
    # the value of E with the official gradient: a term that is 0, whose derivative is `gradient`
    return energy + (gradient * (probabilities - probabilities.detach())).sum()


def energy_loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Dense energy of the segmentation at half resolution, times 1e-7.

    Args:
        logits: (B, C + 1, h, w) floating, the decoder's output.
        images: (B, 3, H, W) floating, RGB in 0..255, not rounded.
        labels: (B, H, W) integer pseudo labels.

    Returns:
        0-d.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, energy loss.
    """
    require_shape("logits", logits, "B", "C + 1", "h", "w")
    require_shape("images", images, logits.shape[0], 3, "H", "W")
    B, _, H, W = images.shape
    require_shape("labels", labels, B, H, W)
    half = (H // 2, W // 2)
    scores = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False).softmax(dim=1)
    probabilities = F.interpolate(scores, size=half, mode="bilinear", align_corners=False)
    colours = F.interpolate(images, size=half, mode="nearest")
    halved_labels = F.interpolate(labels[:, None].to(images.dtype), size=half, mode="nearest")[:, 0]
    return 1e-7 * dense_energy(probabilities, colours, halved_labels)


def gaussian_kernel(image: Tensor, y: int, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """Weight all pixels of an image by their proximity in colour and place to each pixel of a row.

    Args:
        image: (3, h, w) floating, RGB in 0..255.
        y: the row.
        sigma_rgb: standard deviation in colour, in grey levels.
        sigma_xy: standard deviation in place, in pixels.

    Returns:
        (w, h, w), first the pixels of the row: exp(-½|Δrgb / σ_rgb|² - ½|Δxy / σ_xy|²).

    Source: official code, dense energy loss.
    """
    _, h, w = image.shape
    rows = torch.arange(h, dtype=image.dtype, device=image.device)[None, :, None]
    columns = torch.arange(w, dtype=image.dtype, device=image.device)
    colour = (image[:, None] - image[:, y, :, None, None]).square().sum(dim=0) / sigma_rgb**2
    place = ((rows - y).square() + (columns - columns[:, None, None]).square()) / sigma_xy**2
    return torch.exp(-0.5 * (colour + place))
