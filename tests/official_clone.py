"""A stand-in for a clone of the official code: its files and names, each of them this project's own reference."""

from pathlib import Path

FILES = {
    "models/__init__.py": "",
    "models/vit.py": """
class VisionTransformer:
    def __init__(self, **sizes):
        self.sizes = sizes
""",
    "models/decoder.py": """
class LargeFOV:
    def __init__(self, width, channels):
        pass
""",
    "models/projector.py": """
class DINOHead:
    def __init__(self, width, prototypes):
        self.prototypes = prototypes
""",
    "models/network.py": """
import torch
from fsr_fast import reference
from fsr_fast.config import ModelConfig
from fsr_fast.models import Network, build_network


def WSSSNetwork(encoder, decoder, projector, num_classes):
    sizes = encoder.sizes
    options = {name: sizes[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    config = ModelConfig(
        backbone_options=options, pretrained="none", normalisation="imagenet", mask_mode="none",
        stochastic_depth=0.0, prototypes=projector.prototypes, decoder_width=32, projector_hidden=64, bottleneck=32,
    )
    network = build_network(config, tuple(map(str, range(1, num_classes))), sizes["img_size"])
    network.__class__ = StandIn
    return network


class StandIn(Network):
    def forward(self, views, mask=None, cam_only=False):
        images = torch.cat(views) if isinstance(views, (list, tuple)) else views
        mask = None if mask is None else mask.flatten(1)
        state = self.state_dict(keep_vars=True)
        heads = self.encoder.blocks[0].attn.num_heads
        out = reference.forward_network(
            state, images, heads=heads, patch_size=self.encoder.patch_size, mask=mask, mask_mode="none"
        )
        if cam_only:
            return out.cam, out.aux_cam
        tokens = torch.cat([out.class_token[:, None], out.patch_tokens], dim=1)
        first = slice(len(views[0])) if isinstance(views, (list, tuple)) else slice(None)
        return {
            "top_cls_out": out.class_logits[first],
            "aux_cls_out": out.aux_class_logits[first],
            "seg_out": out.seg_logits[first],
            "top_cam": out.cam[first],
            "aux_cam": out.aux_cam[first],
            "top_fmap": out.patch_features[first],
            "aux_fmap": out.aux_features[first],
            "project_out": reference.prototype_logits(state, reference.project(state, tokens)),
        }
""",
    "models/losses.py": "",
    "models/PAR.py": "",
    "train_voc.py": """
import argparse
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from fsr_fast import reference
from fsr_fast.reference.cam import merge_scales
from fsr_fast.reference.losses import energy_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
parser = argparse.ArgumentParser()
parser.add_argument("--momentum", type=float, default=0.9995)
imutils = SimpleNamespace(denormalize_img2=lambda images: reference.denormalise_images(images, MEAN, STD) / 255)
build_model = MultiviewTransform = setup_logger = voc = None
PAR = lambda num_iter, dilations: torch.nn.Identity()


def multi_scale_cam(model, inputs, scales):
    sizes = [(int(s * inputs.shape[2]), int(s * inputs.shape[3])) for s in scales]
    views = [F.interpolate(inputs, size=size, mode="bilinear", align_corners=False) for size in sizes]
    with torch.no_grad():
        plain, mirrored = ([model(one, cam_only=True) for one in side] for side in (views, [v.flip(3) for v in views]))
    return tuple(
        merge_scales([one[i] for one in plain], [one[i] for one in mirrored], size=tuple(inputs.shape[2:]))
        for i in (0, 1)
    )


def cam_to_label(cam, labels, img_box=None, ignore_mid=True, high_thre=0.7, low_thre=0.25, ignore_index=255):
    return cam * labels[:, :, None, None], reference.cam_to_labels(cam, labels, high=high_thre, low=low_thre)


def refine_cams_with_bkg_v2(par, images, cams, cls_labels, high_thre, low_thre, ignore_index, img_box=None):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    views = ((images * 255 + 0.5) / 255 - mean) / std
    return reference.generate_pseudo_labels(views, cams, cls_labels, mean=MEAN, std=STD, high=high_thre, low=low_thre)


def label_to_aff_mask(labels):
    return labels


def get_masked_ptc_loss(features, labels):
    return reference.affinity_loss(features.flatten(2).transpose(1, 2), labels.flatten(1))


def get_seg_loss(logits, labels, ignore_index=255):
    return reference.segmentation_loss(logits, labels.to(torch.uint8))


def DenseEnergyLoss(**settings):
    return None


def get_energy_loss(img, logit, label, img_box, loss_layer):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return energy_loss(logit, 255 * (img * std + mean), label.to(torch.uint8))


class MaskGenerator:
    def __init__(self, side, patch, block, ratio):
        self.grid, self.block, self.ratio = (side // patch,) * 2, block // patch, ratio

    def __call__(self, cam, labels, low, high, strategy):
        blocks = (self.grid[0] // self.block) ** 2
        uniform, k = torch.rand(len(cam), blocks), -(-blocks * 2 // 5)
        if strategy == "random":
            mask = reference.top_k_mask(uniform, k=k, grid=self.grid, block=self.block).mask
        else:
            mask = reference.uncertain_mask_from_cam(
                cam, labels, uniform, grid=self.grid, k=k, block=self.block, low=low, high=high
            ).mask
        return mask.view(-1, *self.grid)


def reduce_tensor(loss):
    return loss


def train(args):
    student, teacher = build_model(args), build_model(args)
    make = MaskGenerator(args.input_size, 16, args.block_size, 0.4)
    centres = [torch.zeros(args.out_dim), torch.zeros(args.out_dim)]
    state = reference.start_training(student.state_dict())
    settings = reference.OFFICIAL._replace(
        optim=reference.OFFICIAL.optim._replace(iterations=args.max_iters, warmup=args.warmup_iters)
    )
    from fsr_fast.reference.optimiser import follow_student
    from fsr_fast.reference.step import update_student

    for n, (_, (view1, view2), labels) in enumerate(DataLoader()):
        for parameter in student.parameters():
            parameter.grad = None
        scales = (1.0, 0.5, 1.5)
        strategy = "random" if n + 1 <= args.max_iters // 5 else "uncertain"
        mask = make(multi_scale_cam(student, view2, scales)[1], labels, 0.2, 0.7, strategy)
        both = student([view1, view2], mask=torch.cat([torch.zeros_like(mask), mask]))
        with torch.no_grad():
            taught = teacher([view1, view2])["project_out"]
            cam, aux = multi_scale_cam(student, view1, scales)
            pseudo = refine_cams_with_bkg_v2(
                None, imutils.denormalize_img2(view1), cams=cam, cls_labels=labels,
                high_thre=0.7, low_thre=0.25, ignore_index=255,
            )
        size = both["top_fmap"].shape[2:]
        patch = cam_to_label(F.interpolate(aux, size=size, mode="bilinear", align_corners=False), labels)[1]
        logits = F.interpolate(both["seg_out"], size=view1.shape[2:], mode="bilinear", align_corners=False)
        losses = {
            "cls": reference.classification_loss(both["top_cls_out"], both["aux_cls_out"], labels),
            "aff": get_masked_ptc_loss(both["top_fmap"], label_to_aff_mask(patch)),
            "seg": get_seg_loss(logits, pseudo.long()),
        }
        energy = get_energy_loss(img=view1, logit=logits, label=pseudo, img_box=None, loss_layer=None)
        t = reference.teacher_temperature(n, total=args.max_iters)
        second, chosen = both["project_out"].chunk(2)[1], mask.flatten(1)

        def compare(student_logits, teacher_logits, centre):
            target = ((teacher_logits - centre) / t).softmax(-1)
            return -(target * (student_logits / 0.1).log_softmax(-1)).sum(-1)

        losses["class"] = compare(second[:, 0], taught.chunk(2)[0][:, 0], centres[0]).mean()
        losses["patch"] = (
            compare(second[:, 1:], taught.chunk(2)[1][:, 1:], centres[1]) * chosen
        ).sum(1).div(chosen.sum(1)).mean()
        centres[0] = 0.9 * centres[0] + 0.1 * taught.chunk(2)[0][:, 0].mean(0)
        centres[1] = 0.9 * centres[1] + 0.1 * taught.chunk(2)[1][:, 1:].mean((0, 1))
        gate = 1.0 if n + 1 > 2000 else 0.0
        total = losses["cls"] + 0.2 * losses["aff"] + 0.1 * losses["class"] + 0.1 * losses["patch"]
        (total + gate * (0.1 * losses["seg"] + 0.05 * energy)).backward()
        gradients = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
        zeros = {name: torch.zeros_like(value) for name, value in state.first.items()}
        new, first, second_moment = update_student(state, zeros | gradients, settings)
        momentum = reference.teacher_momentum(n, total=args.max_iters, start=args.momentum)
        averaged = follow_student(
            dict(teacher.state_dict()), new, encoder_momentum=momentum, projector_momentum=momentum
        )
        student.load_state_dict(new)
        teacher.load_state_dict(averaged)
        state = state._replace(student=new, first=first, second=second_moment, iteration=n + 1)
        for name in ("cls", "aff", "seg", "class", "patch"):
            reduce_tensor(losses[name])
""",
}


def write_clone(folder: Path, **changes: str) -> Path:
    """Write the stand-in; `changes` replace one text in train_voc.py by another."""
    for name, text in FILES.items():
        for old, new in changes.items() if name == "train_voc.py" else ():
            assert old in text
            text = text.replace(old, new)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
