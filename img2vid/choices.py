"""The words that options take, in one place that imports nothing: parsers know them before libraries are loaded."""

from __future__ import annotations

# img2vid.evaluation
PROTOCOLS = ("list", "splits", "all", "halves", "class-splits", "base-to-novel")
FUSIONS = ("feature", "logit", "probability")
PROBES = ("linear", "knn", "attentive")
EVALUATION_PRECISIONS = ("float32", "bfloat16", "float16")

# img2vid.estimate: precisions as Lightning calls them, optimisers with the numbers they keep for each parameter
TRAINING_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
OPTIMIZER_STATES = {"adamw": 2, "sgd": 1}

# img2vid.checkpoints: whose video checkpoints can be read and written
DIALECTS = ("timesformer", "hf-timesformer", "mmaction2-timesformer", "frozen-in-time", "lavila", "vivit")
# img2vid.export: what runs, or is read, without img2vid
PROGRAM_FORMATS = ("onnx", "torch-export", "torchscript", "safetensors")
EXPORT_FORMATS = ("image", *DIALECTS, *PROGRAM_FORMATS)
POS_EMBED_RESAMPLE = ("bicubic", "nearest_1d")
