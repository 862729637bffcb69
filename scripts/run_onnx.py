"""Run a video through a file of ``img2vid export FOLDER --format onnx --pixels``, with onnxruntime alone.

python scripts/run_onnx.py model.onnx video.mp4 [frames]
"""

import sys

import onnxruntime
from torchvision.transforms.v2.functional import center_crop

import img2vid  # to read the video; any reader of uint8 frames will do

model, video, *frames = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
*_, height, width = session.get_inputs()[0].shape  # (batch, frames, C, H, W)
num_frames = int(frames[0] if frames else session.get_modelmeta().custom_metadata_map["num_frames"])
clip = img2vid.read_clip(video, num_frames=num_frames, short_side=max(height, width))  # uint8 (T, C, H', W')
print(session.run(None, {"pixels": center_crop(clip, [height, width])[None].numpy()})[0])
