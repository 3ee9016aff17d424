"""Stack ATS onto EViT: the same two methods, combined in three ways."""

import timm
import torch

from reducers import ATS, EViT, Ratio, Stack, at, reduce_tokens

model = timm.create_model("deit_tiny_patch16_224").eval()
evit, ats = EViT(Ratio(0.7)), ATS(Ratio(0.7, rounding="nearest"))
readings = {
    "EViT alone": at([3, 6, 9], evit),
    "ATS chooses, EViT fuses what it left": at([3, 6, 9], EViT(Ratio(0.7), select=ats)),
    "EViT, then ATS on what remains": at([3, 6, 9], Stack(evit, ats)),
    "EViT at 3, 6, 9 and ATS between": at([3, 6, 9], evit) | at([4, 7, 10], ats),
}
images = torch.randn(2, 3, 224, 224)
for name, placement in readings.items():
    with torch.inference_mode():
        _, trace = reduce_tokens(model, placement).trace(images)
    print(f"{name:40} {trace.macs.mean() / 1e9:.3f} GMACs, {trace.tokens[0, -1]} tokens left in image 0")
