"""torchcodec, refused where it is known to be wrong (guard.py). It needs an FFmpeg installed on the system."""

from __future__ import annotations

import importlib.util

from img2vid.data.backends import Reader, check_indices
from img2vid.data.backends.guard import ordinary_video, same_count
from img2vid.data.errors import VideoError, missing_extra


def _decoder_class():
    if importlib.util.find_spec("torchcodec") is None:
        raise missing_extra("torchcodec", "torchcodec", 'backend="torchcodec"')
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"")  # the FFmpeg libraries are only looked for now
    except (RuntimeError, OSError, ImportError) as error:
        if "libtorchcodec" in str(error):
            raise ImportError(
                'backend="torchcodec" found no FFmpeg it can load. Install FFmpeg 4 to 9 (apt install ffmpeg, '
                'conda install ffmpeg), or use backend="pyav", which brings its own'
            ) from error
    except ValueError:
        pass  # an empty file is refused, as it should be
    return VideoDecoder


class TorchcodecReader(Reader):
    """Reads one video through torchcodec. `on_error` does not apply: torchcodec does not report concealed damage."""

    def __init__(self, source, label: str, on_error: str = "raise"):
        decoder_class = _decoder_class()
        self.label = label
        self.frames, self.fps, self.codec, self.container = ordinary_video(source, label, "torchcodec")
        try:
            self.decoder = decoder_class(
                source if isinstance(source, str) else source.getvalue(),
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                seek_mode="exact",
            )
        except (RuntimeError, ValueError) as error:
            raise self._failed(error) from error
        same_count(label, "torchcodec", len(self.decoder), self.frames)

    def _failed(self, error) -> VideoError:
        return VideoError.about(self.label, f"torchcodec could not read it ({str(error).strip().splitlines()[0]})")

    def read(self, indices, count: bool = False) -> list:
        indices = check_indices(indices, self.frames, self.label)
        if not indices:
            return []
        try:
            return list(self.decoder.get_frames_at(indices).data.numpy())  # (T, H, W, 3)
        except RuntimeError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self.decoder = None
