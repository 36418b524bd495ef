"""Results of a comparison in the schema of results.json, with made-up numbers, for tests of what reads them."""

from __future__ import annotations

import itertools
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

ARMS = {
    "vpt-shallow": ("Prompts, shallow", 1_290, 0.70, 0.02),
    "vpt-deep": ("Prompts, deep", 3_850, 0.76, 0.02),
    "full": ("Full fine-tuning", 160_000, 0.58, 0.066),
    "linear": ("Linear probe", 650, 0.68, 0.015),
    "lora": ("LoRA", 8_840, 0.72, 0.033),
    "ftp": ("FTP", 160_000, 0.62, 0.05),
}  # name: title, trainable parameters, accuracy with 50 images, gain by doubling
CROSSING = "The two cross at about 760 images (90 % interval 520 to 980)."
LOADER = 'cl_kernels.continual.load_model("best_{}.safetensors")'
SIZES = [50, 100, 200, 400, 800, 1000]


def results(
    *, verdict: str = "full", seeds: int = 3, epochs: int = 12, sizes: list[int] | None = None
) -> dict[str, Any]:
    """A finished comparison of six arms in which prompts lead with few images and full fine-tuning with many."""
    draw = random.Random(f"{verdict}{seeds}{epochs}")
    held = SIZES if sizes is None else sizes
    accuracy = [_accuracy(name, size, verdict, draw) for name in ARMS for size in held]
    means = {(one["arm"], one["size"]): one["mean"] for one in accuracy}
    gaps = [_gap(size, means["vpt-deep", size] - means["full", size]) for size in held]
    runs = [_run(name, size, seed, epochs, means, draw) for name in ARMS for size in held for seed in range(seeds)]
    return {
        "schema": "cl_kernels.compare/1",
        "settings": {
            "data": "digits",
            "backbone": "embedded",
            "budget": 600.0,
            "seed": 0,
            "seeds": seeds,
            "grid": "default",
            "arms": list(ARMS),
            "prefer": "accuracy",
            "quick": False,
        },
        "environment": {"torch": "2.x", "device": "cpu", "python": "3.11"},
        "data": _card(),
        "probes": _probes(),
        "distance": _distance(),
        "sizes": held,
        "arms": [_arm(name, draw) for name in ARMS],
        "runs": runs,
        "cost": [_cost(name, draw) for name in ARMS],
        "diagnosis": [_diagnosis(name, draw) for name in ARMS],
        "pictures": {},  # see `with_pictures`
        "decision": _decision(verdict, held, accuracy, gaps),
        "budget": {
            "seconds": 600.0,
            "spent": 571.3,
            "threads": 2,
            "stages": [{"stage": "data card", "seconds": 0.4}, {"stage": "size sweep", "seconds": 431.2}],
        },
        "weights": {
            name: {"file": f"best_{name}.safetensors", "loader": LOADER.format(name)} for name in ("vpt-deep", "full")
        },
        "missing": ["The Inception distance: its weights are not on this machine."],
    }


def picture(path: Path, shade: int = 128, side: int = 16) -> Path:
    """A small grey PNG."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes([shade]) * side for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def with_pictures(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """The same results with two images in two groups, their files below `out`."""
    pair, methods = ["vpt-deep", "full"], {"gradcam": "GradCAM", "rollout": "Attention rollout"}
    shades = itertools.count(40, 9)

    def file(name: str) -> str:
        picture(out / "figures" / name, next(shades) % 256, side=64)
        return f"figures/{name}"

    def image(number: int, group: str) -> dict[str, Any]:
        panels = [
            {
                "method": method,
                "target": 1 if method == "gradcam" else None,
                "class": "one" if method == "gradcam" else None,
                "why": "true, predicted by full" if method == "gradcam" else "",
                "high": 0.1,
                "agreement": 0.31,
                "maps": [
                    {
                        "arm": arm,
                        "file": file(f"{number}-{method}-{arm}.png"),
                        "alt": f"{methods[method]} of {arm} on image {number}: brightest at the top left",
                        "empty": False,
                        "completeness": None,
                        "flagged": None,
                        "masses": None if method == "gradcam" else {"cls": 0.2, "prompts": 0.3, "patches": 0.5},
                    }
                    for arm in pair
                ],
            }
            for method in methods
        ]
        predicted = {arm: {"label": 1, "class": "one", "probability": 0.9} for arm in pair}
        source = {"file": file(f"{number}.png"), "alt": f"Image {number}, true class one, as the models saw it"}
        named = {"number": number, "group": group, "label": 1, "class": "one"}
        return named | {"predicted": predicted, "panels": panels} | source

    groups = [
        {"name": "first-right", "title": "vpt-deep right, full wrong", "available": 7, "shown": 1},
        {"name": "second-right", "title": "full right, vpt-deep wrong", "available": 0, "shown": 0},
        {"name": "both-wrong", "title": "both wrong", "available": 3, "shown": 1},
    ]
    found["pictures"] = {
        "arms": pair,
        "pair": pair,
        "methods": [{"name": name, "title": title, "explains": "a class"} for name, title in methods.items()],
        "groups": groups,
        "images": [image(37, "first-right"), image(41, "both-wrong")],
        "sanity": {arm: {"gradcam": {"spearman": 0.12, "changed": True}} for arm in pair},
        "stopped": False,
        "note": "Maps say where a model looked, not why it was right.",
    }
    return found


def _card() -> dict[str, Any]:
    sizes = {"measured": 500, "distinct": 1, "commonest": [8, 8], "smallest": [8, 8], "largest": [8, 8]}
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return {
        "name": "digits",
        "classes": 10,
        "class_names": names,
        "train": {"n": 1000, "counts": [100] * 10, "channels": 1, "sizes": sizes},
        "test": {"n": 400, "counts": [40] * 10, "channels": 1, "sizes": sizes},
        "imbalance": 1.0,
        "duplicates": {"inside_train": 0, "inside_test": 0, "across": 0, "across_examples": [], "two_labels": 0},
        "skipped": 0,
        "test_from": "a fifth of the images, drawn by class",
        "label_type": {"guess": "not guessed", "reason": "the class names do not say"},
        "warnings": ["only 400 test images: differences of a few points cannot be told from chance"],
    }


def _probes() -> dict[str, Any]:
    def accuracy(share: float) -> dict[str, Any]:
        return {"accuracy": share, "se": math.sqrt(share * (1 - share) / 1000), "n": 1000}

    return {
        "n": 1000,
        "images": 1000,
        "classes": 10,
        "folds": 5,
        "majority": 0.1,
        "feature": "cls",
        "linear": accuracy(0.912),
        "knn": {"5": accuracy(0.871), "20": accuracy(0.853)},
        "class_mean": accuracy(0.764),
        "logme": {"value": 0.4183, "se": 0.011},
        "layers": [{"layer": block, **accuracy(0.62 + 0.07 * block)} for block in range(5)],
        "missing": [],
    }


def _distance() -> dict[str, Any]:
    def mark(name: str, share: float) -> dict[str, Any]:
        other = {"kid": share / 3, "kid_se": 0.002, "proxy_a": 1.1, "proxy_a_se": 0.05}
        return {
            "name": name,
            "n": 1000,
            "frechet": share,
            "frechet_relative": share,
            "frechet_endless": share / 2,
        } | other

    line = {"intercept_relative": 0.31, "residual_relative": 0.004}
    return {
        "n": 1000,
        "frechet": {"value": 12.0, "relative": 0.4123, "line": line, "chance": 0.8, "chance_relative": 0.0312},
        "kid": {"value": 0.0573, "se": 0.002, "low": 0.0534, "high": 0.0612, "n": 1000},
        "proxy_a": {"value": 1.62, "se": 0.03, "error": 0.095, "n": 1000},
        "reference": {"name": "Omniglot", "source": "embedded", "n": 20000},
        "ruler": [mark("digits, inverted", 0.9), mark("digits, fog 5", 0.55), mark("drawings", 0.05)],
        "notes": ["a Frechet distance depends on n: compare it only with others at n = 1000"],
        "missing": ["Inception-FID: its weights are not part of this package"],
    }


def _accuracy(name: str, size: int, verdict: str, draw: random.Random) -> dict[str, Any]:
    _, _, start, gain = ARMS[name]
    if name == "full":
        gain = {"full": gain, "too-close": 0.06, "other": 0.06}.get(verdict, 0.045)
    if name == "lora" and verdict == "other":
        gain += 0.015
    mean = min(0.985, start + gain * math.log2(size / 50) + 0.004 * draw.random())
    half = 0.03 * (100 / size) ** 0.4
    return {"arm": name, "size": size, "mean": mean, "low": mean - half, "high": min(1.0, mean + half)}


def _gap(size: int, mean: float) -> dict[str, Any]:
    half = 0.05 * (100 / size) ** 0.4
    return {"size": size, "mean": mean, "low": mean - half, "high": mean + half}


def _run(
    name: str, size: int, seed: int, epochs: int, means: dict[tuple[str, int], float], draw: random.Random
) -> dict[str, Any]:
    curve = [
        {
            "epoch": epoch + 1,
            "train_loss": 2.2 / (epoch + 1) ** (0.9 if name == "full" else 0.6),
            "lr": 1e-3 * (1 - epoch / epochs),
            "validation_loss": None,
            "validation_accuracy": None,
        }
        for epoch in range(epochs)
    ]
    accuracy = means[name, size] + 0.01 * (draw.random() - 0.5)
    return {
        "arm": name,
        "size": size,
        "seed": seed,
        "options": {"lr": 0.003},
        "epochs": epochs,
        "curve": curve,
        "accuracy_last": accuracy,
        "accuracy_best": accuracy + 0.002,
        "seconds": 1.5,
        "subset": f"{size}-{seed}",
        "test_loss_curve": [2.0 / (epoch + 1) ** 0.5 if epoch % 2 else None for epoch in range(epochs)],
        "data_hash": "0" * 64,
        "weight_hash": "1" * 64,
    }


def _arm(name: str, draw: random.Random) -> dict[str, Any]:
    trials = [
        {
            "options": {"lr": lr},
            "rung": rung,
            "epochs": 5 * (rung + 1),
            "images": 100 * (rung + 1),
            "validation_accuracy": draw.random(),
        }
        for rung, rates in enumerate(([1e-3, 3e-3, 1e-2, 3e-2], [3e-3, 1e-2]))
        for lr in rates
    ]
    return {
        "name": name,
        "title": ARMS[name][0],
        "trainable_parameters": ARMS[name][1],
        "tuning": {"trials": trials, "chosen": {"lr": 3e-3}},
    }


def _cost(name: str, draw: random.Random) -> dict[str, Any]:
    stored = 4 * ARMS[name][1]
    return {
        "arm": name,
        "trainable_parameters": ARMS[name][1],
        "stored_bytes": stored,
        "seconds_per_epoch": 0.05 + 0.4 * draw.random(),
        "seconds_to_best": 0.4 + 10 * draw.random(),
        "peak_bytes": 40_000_000 + stored * 4,
        "latency_ms": 1.2 + draw.random(),
        "images_per_second": 2000 * draw.random() + 500,
        "macs": 5_400_000,
        "task_bytes": {str(tasks): 640_000 + tasks * stored for tasks in (1, 2, 5, 20)},
    }


def _diagnosis(name: str, draw: random.Random) -> dict[str, Any]:
    return {
        "arm": name,
        "overfit": name == "full",
        "overfit_z": 3.4 if name == "full" else 0.2,
        "generalisation_gap": 0.08 * draw.random(),
        "drift": {"cka": 0.71, "cosine": 0.83} if name in ("full", "ftp") else {"cka": 1.0, "cosine": 1.0},
        "prompt_mass": [0.05, 0.12, None, 0.18] if name.startswith("vpt") else [],
    }


def _decision(
    verdict: str, sizes: list[int], accuracy: list[dict[str, Any]], gaps: list[dict[str, Any]]
) -> dict[str, Any]:
    full = sizes[-1]
    arm = {"prompts": "vpt-deep", "full": "full", "other": "lora"}.get(verdict)
    sentences = {
        "prompts": f"Use prompt tuning: with your {full} images it is more accurate than full fine-tuning.",
        "full": f"Use full fine-tuning: with your {full} images it is more accurate than prompts.",
        "other": f"Use LoRA: with your {full} images it is as accurate as the best of the two and costs less.",
        "too-close": f"Too close to call: with your {full} images the two cannot be told apart.",
    }
    at = {}
    for place, times in (("1x", 1), ("2x", 2), ("5x", 5)):
        gap = gaps[-1]["mean"] - 0.02 * (times - 1)
        at[place] = {
            "agreeing": 20,
            "size": full * times,
            "verdict": verdict,
            "gap": gap,
            "low": gap - 0.02 * times,
            "high": gap + 0.02 * times,
            "extrapolated": times > 1,
        }
    return {
        "verdict": verdict,
        "arm": arm,
        "sentence": sentences[verdict],
        "reasons": ["Full fine-tuning gains more from each doubling.", "The crossing lies below your data size."],
        "changes": [
            "With fewer than 300 images, prompts would be the choice.",
            "If storage for many tasks counts, prompts.",
        ],
        "at": at,
        "gaps": gaps,
        "accuracy": accuracy,
        "crossing": {"size": 760.0, "low": 520.0, "high": 980.0, "text": CROSSING},
        "prompts_arm": "vpt-deep",
        "rule": {"level": 0.95, "smallest": 0.005, "redraws": 20, "agree": 18, "draws": 2000},
        "prior": {
            "text": "With 1000 images and a ViT-B/16 pre-trained on ImageNet-21k, prompts won 15 of 19 tasks.",
            "source": "Han et al., ICLR 2024",
            "backbone": "ViT-B/16",
            "size": 1000,
        },
    }
