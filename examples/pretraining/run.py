"""A seeded training run of a plain timm vision transformer that can be killed at any moment and goes on exactly."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_kernels._timm import import_timm

IGNORED = ("data", "out", "threads", "save_every")  # they do not decide the result
Loss = Callable[[Tensor], Tensor]  # of the logits


def normalise(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.5


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write beside the target, then rename: a kill leaves the old file or the new one, never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    os.replace(temporary, path)


class Run:
    """Model, averaged model and optimizer, with a checkpoint that holds all three."""

    def __init__(
        self, args: argparse.Namespace, classes: int, steps: int, device: str = "cpu", bf16: bool = False
    ) -> None:
        torch.manual_seed(args.seed)
        import_timm()
        from timm.models.vision_transformer import VisionTransformer

        self.args, self.steps, self.step, self.epoch = args, steps, 0, 0
        self.device, self.bf16 = torch.device(device), bf16
        self.shape = {
            "img_size": args.size,
            "patch_size": args.patch,
            "in_chans": args.channels,
            "embed_dim": args.width,
            "depth": args.depth,
            "num_heads": args.heads,
            "global_pool": args.pool,
            "class_token": args.pool == "token",
        }
        self.model = VisionTransformer(
            **self.shape, num_classes=classes, weight_init="jax", drop_path_rate=args.drop_path
        ).to(self.device)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))

    def learning_rate(self) -> float:
        """Linear warm-up over 5 % of the steps, then a cosine to 1 % of the peak."""
        warm = max(1, self.steps // 20)
        if self.step < warm:
            return float(self.args.lr) * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return float(self.args.lr) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing)

    def update(self, images: Tensor, loss_of: Loss) -> Tensor:
        """One step on images in [0, 1]; returns the loss, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(normalise(images))
        loss = loss_of(logits.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.args.ema, self.step / (self.step + 10))
        state = self.model.state_dict()
        torch._foreach_lerp_([self.average[name] for name in state], list(state.values()), 1 - decay)
        return loss.detach()

    def averaged(self) -> nn.Module:
        """A copy of the model that carries the averaged weights."""
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(**self.shape, num_classes=self.model.num_classes).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()

    def command(self) -> str:
        """Everything that decides the result; a checkpoint of another command is not continued."""
        return json.dumps({k: v for k, v in vars(self.args).items() if k not in IGNORED}, sort_keys=True)

    def save(self, path: Path, seconds: float) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        meta = {"command": self.command(), "epoch": str(self.epoch), "step": str(self.step), "seconds": str(seconds)}
        save_atomically(tensors, path, meta)

    def resume(self, path: Path) -> float:
        """Continue from ``path`` if it belongs to this command; returns the seconds spent before."""
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("command") != self.command():
                raise SystemExit(f"{path} belongs to another command; remove it or choose another --out")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors handle
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                index, field = name.removeprefix("optimizer.").split(".")
                state.setdefault(int(index), {})[field] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        self.epoch, self.step = int(meta["epoch"]), int(meta["step"])
        return float(meta["seconds"])

    def export(self, path: Path, right: float, dtype: torch.dtype) -> None:
        """Write the averaged weights without the head, in the layout that ``cl_kernels.data.load_backbone`` reads."""
        weights = {k: v.to(dtype) for k, v in self.average.items() if not k.startswith("head.")}
        meta = {"architecture": json.dumps(self.shape), "mean": "0.5", "std": "0.5", "command": self.command()}
        save_atomically(weights, path, meta | {"format": "pt", "test_accuracy": f"{right:.4f}"})
