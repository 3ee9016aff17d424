"""Reduce the tokens of a plain timm model, and see what it costs and what it kept."""

import timm
import torch

from reducers import ATS, Ratio, at, reduce_tokens

model = timm.create_model("deit_tiny_patch16_224").eval()  # pretrained=True fetches timm's weights
fast = reduce_tokens(model, at(range(3, 12), ATS(Ratio(0.5, of="initial"))))  # blocks 3-11, K = 98

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    logits, trace = fast.trace(images)
    dense = reduce_tokens(model, at([], ATS(Ratio(0.5)))).trace(images)[1]

print("logits", tuple(logits.shape))
print("tokens entering each block", trace.tokens[0].tolist())
print(f"{dense.macs[0] / 1e9:.3f} GMACs become {trace.macs[0] / 1e9:.3f}")
print("patches of image 0 that still have a row of their own after block 11:", int(trace.kept(11)[0].sum()))
