"""Pictures, through matplotlib and nothing else. Results and arrays in, figures out; no model is needed.

save(honesty_figure(result), "honesty.png")
"""

from img2vid.plots.canvas import PlotError, png, save
from img2vid.plots.curves import curves_figure
from img2vid.plots.results import comparison_figure, confusion_figure, figure_of, honesty_figure
from img2vid.plots.videos import attention_figure, retrieval_figure, similarity_figure

__all__ = [
    "PlotError",
    "attention_figure",
    "comparison_figure",
    "confusion_figure",
    "curves_figure",
    "figure_of",
    "honesty_figure",
    "png",
    "retrieval_figure",
    "save",
    "similarity_figure",
]
