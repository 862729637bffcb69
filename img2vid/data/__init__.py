"""Videos in: reading, sampling, transforms, lists of videos, and the data module that feeds training.

Stands on its own: nothing here knows about models, training or evaluation. Importing it is light; decoders, lightning
and webdataset are imported where they are used.
"""

from img2vid.data.backends import VideoInfo
from img2vid.data.errors import DamagedVideoWarning, ListError, VideoError
from img2vid.data.reading import open_video, probe, read_clip

__all__ = ["DamagedVideoWarning", "ListError", "VideoError", "VideoInfo", "open_video", "probe", "read_clip"]
