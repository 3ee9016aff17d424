"""Whole runs of synthetic trials: every spec at a few points, and one as large as a real run."""

from __future__ import annotations

import json

from tests.analysis.synthetic import DENSE_GMACS, DENSE_TOP1, PATCHES, Maker, place


def whole_run(maker: Maker) -> Maker:
    """All specs at a few points each, with one failed trial."""
    uncalibrated(maker)
    calibrated(maker)
    trained(maker)
    return maker


def scores(maker: Maker) -> None:
    """One spec with repeated seeds."""
    harms = {
        "class_attention_value_norm": 0.0,
        "class_attention": 0.004,
        "value_norm": 0.06,
        "attention_received": 0.03,
        "random": 0.12,
    }
    for score, harm in harms.items():
        for k in (8, 16, 24, 32, 48):
            for seed in range(3) if score == "random" else (0,):
                keep = 0.8 * k / PATCHES
                maker.add(
                    "score_functions",
                    score,
                    reducer=[{"name": "ats", "budget": {"count": k}, "score": score, "seed": seed}],
                    blocks=[3],
                    keep=keep,
                    accuracy=DENSE_TOP1 - harm - 0.1 * (1 - keep) ** 3,
                    x=k,
                    budget=f"K = {k}",
                    adaptive=True,
                    seed=seed,
                    score=score,
                )


def uncalibrated(maker: Maker) -> None:
    """Six specs as they were before there were targets."""
    scores(maker)
    for name, factor in (("ATS", 0.8), ("top-K", 1.0)):
        for k in (8, 16, 24, 32, 48, 64):
            keep = factor * k / PATCHES
            maker.add(
                "k_values",
                name,
                reducer=[{"name": name.lower().replace("-", ""), "budget": {"count": k}}],
                blocks=[3],
                keep=keep,
                accuracy=DENSE_TOP1 - 0.15 * (1 - keep) ** 3,
                x=k,
                budget=f"K = {k}",
                adaptive=name == "ATS",
            )
    for blocks in ([0], [1], [3], [5], [6], [9], [3, 6, 9], list(range(3, 12))):
        for keep in (0.2, 0.35, 0.5, 0.7):
            maker.add(
                "stage_placement",
                place(blocks),
                reducer=[{"name": "ats", "budget": {"count": int(64 * keep)}}],
                blocks=blocks,
                keep=keep,
                accuracy=DENSE_TOP1 - 0.3 * (1 - keep) ** 2 / (1 + blocks[0]),
                x=blocks[0],
                adaptive=True,
            )
    for name, lost in (("class token kept", 0.0), ("class token sampled", 0.3)):
        for keep in (0.2, 0.4, 0.6, 0.8):
            maker.add(
                "class_token",
                name,
                reducer=[{"name": "ats", "budget": {"count": int(64 * keep)}, "keep_class_token": lost == 0}],
                blocks=[3],
                keep=keep,
                accuracy=DENSE_TOP1 - (lost + 0.1) * (1 - keep) ** 2,
                x=64 * keep,
                adaptive=True,
                drop_class=lost * (1 - keep),
            )
    for keep in (0.5, 0.6, 0.7, 0.8, 0.9):
        budget = {"ratio": keep}
        evit = {"name": "evit", "budget": budget}
        readings = {
            "EViT": [evit],
            "ATS chooses, EViT fuses": [{**evit, "select": {"name": "ats", "budget": budget}}],
            "EViT then ATS": [evit, {"name": "ats", "budget": budget}],
        }
        for i, (name, stack) in enumerate(readings.items()):
            left = keep ** (2 + 0.7 * i)
            maker.add(
                "evit_stacking",
                name,
                reducer=stack,
                blocks=[3, 6, 9],
                keep=left,
                x=keep,
                budget=f"keep {keep:g}",
                accuracy=DENSE_TOP1 - 0.12 * (1 - left) ** 2,
                adaptive=i > 0,
            )
    methods = {
        "ATS": ("ats", 0.0),
        "top-K": ("topk", 0.01),
        "EViT": ("evit", 0.005),
        "ToMe": ("tome", 0.02),
        "random": ("random", 0.1),
    }
    for name, (reducer, harm) in methods.items():
        for keep in (0.15, 0.3, 0.45, 0.6, 0.8):
            maker.add(
                "methods",
                name,
                reducer=[{"name": reducer, "budget": {"ratio": keep}}],
                blocks=[3, 6, 9],
                keep=keep,
                accuracy=DENSE_TOP1 - harm - 0.2 * (1 - keep) ** 3,
                x=keep,
                budget=f"keep {keep:g}",
                adaptive=name == "ATS",
            )
    maker.add("methods", "dense", reducer=[], blocks=[], keep=1.0, accuracy=DENSE_TOP1)
    maker.fail("methods", "ToMe", "ReducerError: r = 40 of 64 tokens: at most half can merge")


LEVELS = (0.36, 0.5, 0.7)


def cost_of(share: float) -> float:
    """Accuracy lost at a share of the dense cost, off the shelf."""
    return 0.25 * (1 - share) ** 3


def calibrated(maker: Maker) -> None:
    """Specs whose trials were set to the same costs."""
    multi = list(range(3, 12))
    samplers = {"inverse transform (paper)": ("paper", 0.0), "inverse transform (official)": ("official", 0.005)}
    for share in LEVELS:
        for name, (variant, harm) in samplers.items():
            maker.add("sampling_method", name, reducer=[{"name": "ats", "variant": variant, "budget": {"count": 9}}],
                      blocks=multi, keep=share, accuracy=DENSE_TOP1 - harm - cost_of(share), x=share, target=share,
                      adaptive=True)  # fmt: skip
        maker.add("sampling_method", "top-K", reducer=[{"name": "topk", "budget": {"ratio": 0.9}}], blocks=multi,
                  keep=share, accuracy=DENSE_TOP1 - 0.06 - cost_of(share), x=share, target=share)  # fmt: skip
        for name, blocks in (("ATS (block 3)", [3]), ("ATS (blocks 3-11)", multi)):
            maker.add("single_multi_stage", name, reducer=[{"name": "ats", "budget": {"count": 9}}], blocks=blocks,
                      keep=share, accuracy=DENSE_TOP1 - 0.02 * (len(blocks) == 1) - cost_of(share), x=share,
                      target=share, adaptive=True)  # fmt: skip
        maker.add("adaptivity", "ATS (blocks 3-11)", reducer=[{"name": "ats", "budget": {"count": 9}}], blocks=multi,
                  keep=share, accuracy=DENSE_TOP1 - cost_of(share), x=share, target=share, adaptive=True)  # fmt: skip
    for keep in (0.2, 0.6):  # coarse: no target reached, two costs on either side
        maker.add("single_multi_stage", "coarse", reducer=[{"name": "tome", "budget": {"drop": 3}}], blocks=multi,
                  keep=keep, accuracy=DENSE_TOP1 - cost_of(keep), x=keep, target=0.5, reached=False)  # fmt: skip
    maker.add("single_multi_stage", "too dear", reducer=[{"name": "evit", "budget": {"ratio": 1}}], blocks=[11],
              keep=0.5, accuracy=DENSE_TOP1, x=0.5, target=0.5, reached=False)  # fmt: skip
    maker.add("sampling_method", "inverse transform (official), as many points as patches", blocks=multi, keep=0.4,
              reducer=[{"name": "ats", "variant": "official", "budget": {"ratio": 1, "of": "initial"}}],
              accuracy=DENSE_TOP1 - 0.01, adaptive=True)  # fmt: skip
    for model, dense, top1 in (("digits_vit_small", DENSE_GMACS, 0.90), ("digits_vit_tiny", DENSE_GMACS / 3, 0.84)):
        for share in LEVELS:
            maker.add("model_scaling", "ATS (block 3)", reducer=[{"name": "ats", "budget": {"count": 9}}], blocks=[3],
                      keep=share, accuracy=top1 - cost_of(share), x=share, target=share, adaptive=True, model=model,
                      dense_gmacs=dense, dense_top1=top1, gmacs_mean=share * dense, target_gmacs=share * dense,
                      weights_digest=model[:16])  # fmt: skip
    for row in maker.rows:  # one digest for one set of weights
        row["weights_digest"] = "digits_vit_tiny" if row["model"] == "digits_vit_tiny" else "digits_vit_small"
    for name, ratio, measured in (("ATS (blocks 3-11)", 1.67, 1.6), ("ToMe", 1.67, 1.4)):
        for batch in (1, 8, 32):
            maker.add("runtime", name, reducer=[{"name": name[:3].lower(), "budget": {"count": 9}}], blocks=multi,
                      keep=0.5, accuracy=DENSE_TOP1, x=batch, target=0.6, measure="speed", measured_batch=batch,
                      gmacs_mean=DENSE_GMACS / ratio, speedup=measured - 0.3 / batch, batch=batch,
                      speedup_low=measured - 0.3 / batch - 0.05, speedup_high=measured - 0.3 / batch + 0.04,
                      images_per_second=100.0, dense_images_per_second=60.0,
                      weights_digest="digits_vit_small")  # fmt: skip


def trained(maker: Maker) -> None:
    """Finetuned trials with three seeds beside those off the shelf, and the transfer between budgets."""
    common = {"epochs": 3, "train_images": 5000, "finetuned": True, "weights_digest": "digits_vit_small"}
    for share in (0.36, 0.5):
        for name, blocks in (("ATS", list(range(3, 12))), ("top-K", [3])):
            reducer = [{"name": name.lower().replace("-", ""), "budget": {"count": int(share * PATCHES)}}]
            accuracy = DENSE_TOP1 - cost_of(share)
            maker.add("finetuning", name, reducer=reducer, blocks=blocks, keep=share, accuracy=accuracy - 0.05, x=share,
                      target=share, adaptive=name == "ATS", weights_digest="digits_vit_small")  # fmt: skip
            for seed in range(3):
                maker.add("finetuning", name, reducer=reducer, blocks=blocks, keep=share, x=share, target=share,
                          seed=seed, accuracy=accuracy + 0.01 * seed, adaptive=name == "ATS", **common,
                          training=json.dumps({"epochs": 3, "seed": seed, "stages": []}))  # fmt: skip
    for name in ("ats", "topk"):
        for trained_at in (16, 32):
            stages = [{"at": [3], "stack": [{"name": name, "budget": {"count": trained_at}}]}]
            for k in (8, 16, 32, 48):
                off = 0.02 * abs(k - trained_at) / 16 * (3 if name == "topk" else 1)
                maker.add("budget_transfer", f"{name} trained at {trained_at}", blocks=[3], keep=k / PATCHES, x=k,
                          reducer=[{"name": name, "budget": {"count": k}}], budget=f"K = {k}", **common,
                          accuracy=DENSE_TOP1 - cost_of(k / PATCHES) - off,
                          training=json.dumps({"epochs": 3, "seed": 0, "stages": stages}))  # fmt: skip


def large_run(maker: Maker, *, methods: int = 28, levels: int = 6) -> Maker:
    """One spec with very many methods, as many trials as a real run has."""
    for i in range(methods):
        for j in range(levels):
            share = 0.36 + 0.09 * j
            coarse = i % 7 == 3
            maker.add("methods", f"method {i} with a longer name", reducer=[{"name": f"m{i}", "budget": {"count": j}}],
                      blocks=[3, 6, 9] if i % 2 else list(range(3, 12)), keep=share, target=share, x=share,
                      accuracy=DENSE_TOP1 - 0.005 * i - cost_of(share), adaptive=i % 3 == 0,
                      reached=not coarse)  # fmt: skip
    maker.add("methods", "dense", reducer=[], blocks=[], keep=1.0, accuracy=DENSE_TOP1)
    return maker
