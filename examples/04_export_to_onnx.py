"""Export a reduced model to ONNX and run it with onnxruntime. Needs the extra: pip install 'sievit[export]'."""

import tempfile
from pathlib import Path

import timm
import torch

from reducers import EViT, Ratio, ReducerError, at, reduce_tokens
from reducers.runtime.export import export_onnx

try:
    import onnxruntime
except ImportError:
    raise SystemExit("this example needs onnxruntime: pip install 'sievit[export]'") from None

model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()  # four blocks, to be quick; pretrained=True as ever
fast = reduce_tokens(model, at([1, 3], EViT(Ratio(0.6))))

with tempfile.TemporaryDirectory() as folder:
    try:
        path = export_onnx(fast, Path(folder) / "reduced.onnx")
    except ReducerError as error:
        raise SystemExit(str(error)) from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    size = path.stat().st_size

for batch in (1, 3):  # the batch is free, the number of tokens in each block is not
    images = torch.randn(batch, 3, 224, 224)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.inference_mode():
        expected, trace = fast.trace(images)
    difference = (torch.from_numpy(logits) - expected).abs().max()
    print(f"batch {batch}: tokens entering each block {trace.tokens[0].tolist()}, largest difference {difference:.1e}")
print(f"{size / 1e6:.0f} MB, {trace.macs[0] / 1e9:.3f} GMACs an image")
