"""Run a video through a file of ``img2vid export FOLDER --format onnx --pixels``, with onnxruntime alone.

python scripts/run_onnx.py model.onnx video.mp4 [frames]
"""

import sys

import numpy as np
import onnxruntime

import img2vid  # to read the video; any reader of uint8 frames will do

session = onnxruntime.InferenceSession(sys.argv[1])
*_, height, width = session.get_inputs()[0].shape  # (batch, frames, C, H, W)
frames = int(sys.argv[3] if sys.argv[3:] else session.get_modelmeta().custom_metadata_map["num_frames"])
clip = img2vid.read_clip(sys.argv[2], num_frames=frames, short_side=max(height, width)).numpy()  # (T, C, H', W')
top, left = (clip.shape[-2] - height) // 2, (clip.shape[-1] - width) // 2
answer = session.run(None, {"pixels": clip[None, ..., top : top + height, left : left + width]})[0]
print(np.array2string(answer[0], precision=4, threshold=16))
