"""Webdataset tars: write prepared videos into shards, and stream clips from shards.

A shard is a tar whose members share a key: `000012.mp4` (the video as it is) and `000012.json` (its label, captions and
frame count). Tars of other tools are read too: `caption` in the .json, or `000012.txt` and `000012.cls`. Streaming
reads each tar in order, so it suits disks and networks that seek slowly. Shards are drawn with replacement and an epoch
is a fixed number of samples, so no process can run out before the others and leave them waiting; in exchange an epoch
is not exactly one pass over the data.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from img2vid.data.datasets import ClipSampler
from img2vid.data.errors import ListError, VideoError, missing_extra
from img2vid.data.loading import refuse_another_plan
from img2vid.data.manifest import Row
from img2vid.data.order import draw_seed
from img2vid.data.reading import open_video, read_chosen

log = logging.getLogger("img2vid.data")

VIDEO_EXTENSIONS = ("mp4", "avi", "mkv", "webm", "mov")


def write_shards(rows: Sequence[Row], folder, videos_per_shard: int) -> list[Path]:
    """Write rows as shards of `videos_per_shard` videos, in a fixed shuffled order; the paths of the shards.

    Rows with a time range, and folders of frames, must be prepared first (ListError): a tar holds whole files.
    Shuffled, because a list sorted by class would give batches of one class. Each shard appears whole or not at all.
    """
    if videos_per_shard < 1:
        raise ValueError(f"videos_per_shard={videos_per_shard}: expected 1 or more")
    for row in rows:
        if row.start_seconds is not None or row.end_seconds is not None or not os.path.isfile(row.path):
            problem = "has a time range, is no file or is a folder: run 'img2vid data prepare --shard-videos N' instead"
            raise ListError(f"{row.where or row.path}: {problem}")
    folder, order, shards = Path(folder), list(range(len(rows))), []
    folder.mkdir(parents=True, exist_ok=True)
    random.Random(0).shuffle(order)
    for number, start in enumerate(range(0, len(order), videos_per_shard)):
        path = folder / f"{number:06d}.tar"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with tarfile.open(temporary, "w") as tar:
                for index in order[start : start + videos_per_shard]:
                    row, key = rows[index], f"{index:08d}"
                    tar.add(row.path, f"{key}{Path(row.path).suffix.lower()}")
                    facts = {"label": row.label, "captions": list(row.captions), "frames": row.frames}
                    data = json.dumps(facts, ensure_ascii=False).encode()
                    info = tarfile.TarInfo(f"{key}.json")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        shards.append(path)
    return shards


class ShardedVideos(IterableDataset):
    """Clips streamed from webdataset shards; the items of a `VideoDataset` in training, without index.

    shards: paths of tars. samples_per_epoch: over all processes; each takes its equal share.
    rank, world_size: of this process. shuffle_buffer: how many samples wait to be drawn from at random.
    max_bad_videos: how many unreadable videos each worker skips, naming them in the log, before it raises.
    """

    def __init__(
        self,
        shards: Sequence,
        sampler: ClipSampler,
        transform,
        samples_per_epoch: int,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 100,
        max_bad_videos: int = 0,
    ):
        if not shards:
            raise ListError("no shards were given")
        missing = [str(shard) for shard in shards if not Path(shard).is_file()]
        if missing:
            raise ListError(f"{missing[0]}: no such shard ({len(missing)} of {len(shards)} are missing)")
        self.shards, self.sampler, self.transform = [str(shard) for shard in shards], sampler, transform
        self.samples_per_epoch, self.seed, self.rank, self.world_size = samples_per_epoch, seed, rank, world_size
        self.number_of = {name: number for number, name in enumerate(class_names or ())}
        self.shuffle_buffer, self.max_bad_videos, self.epoch = shuffle_buffer, max_bad_videos, 0
        self.batches_given = self.batch_size = 0  # of the epoch that is about to be resumed; set by the loader

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def share(self) -> int:
        """Samples of this process in an epoch. (Not `__len__`: loaders would take it for whole batches.)"""
        return self.samples_per_epoch // self.world_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = (number + self.batches_given) % workers  # the first worker makes the next batch, whoever's turn it was
        mine = _shares(self.share, workers)[number]
        stream = self.rank * workers + number  # a different order in every worker of every process
        seed = draw_seed(self.seed, self.epoch, stream)
        # Batches come from the workers in turn, so what each had made is known; it is read again, but not decoded.
        begin = len(range(number, self.batches_given, workers)) * self.batch_size
        # Item k is made of sample k, or, if that is bad, of the next good one (which also makes its own): so it follows
        # from k alone, wherever the stream was resumed.
        waiting, bad = [], 0
        for k, sample in enumerate(self._samples(seed)):
            if k < begin:
                continue
            if k >= mine and (not waiting or waiting[0] >= mine):
                return
            waiting.append(k)
            try:
                while waiting and waiting[0] < mine:
                    item = self._item(sample, draw_seed(seed, self.epoch, waiting[0]))
                    position = waiting.pop(0) * self.world_size * workers + stream
                    yield {**item, "epoch": self.epoch, "position": position}
            except (VideoError, ValueError) as error:
                bad += 1
                if bad > self.max_bad_videos:
                    raise
                log.warning("%s -- skipped, the next in the stream stands in (%d bad so far)", error, bad)

    def _samples(self, seed: int):
        try:
            import webdataset
        except ImportError:
            raise missing_extra("webdataset", "wds", "reading tar shards") from None

        def urls():
            # Not webdataset's own resampling: it also depends on the number of the worker, which changes on resuming.
            draws = random.Random(draw_seed(seed, self.epoch, -1))
            while True:
                yield {"url": draws.choice(self.shards)}

        return webdataset.DataPipeline(
            urls,
            lambda sources: (sample for source in sources for sample in samples_of(source)),
            webdataset.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=random.Random(seed)),
        )

    def _item(self, sample: dict, draw: int) -> dict:
        name = f"{sample['__url__']} sample {sample['__key__']}"
        extension = next((extension for extension in VIDEO_EXTENSIONS if extension in sample), None)
        if extension is None:
            held = ", ".join(key for key in sample if not key.startswith("_")) or "nothing"
            known = ", ".join(VIDEO_EXTENSIONS)
            raise VideoError.about(name, f"holds no video ({known}) but {held}; a key ends at its first dot")
        label, captions = facts_of(sample, name)
        label = self._number(label, name)
        caption = random.Random(draw).choice(captions or [""])
        with open_video(sample[extension], name=name) as reader:
            pick = lambda frames, fps: self.sampler.clips(frames, fps, random.Random(draw))[0]  # noqa: E731
            clip, _ = read_chosen(reader, pick)
            damaged = reader.damaged
        clip = self.transform(clip, draw)
        return {"clip": clip, "label": label, "caption": caption, "damaged_packets": damaged}

    def _number(self, label, name: str) -> int:
        """The class number of a label, -1 if there is none."""
        if label is None:
            return -1
        if isinstance(label, str) and label in self.number_of:
            return self.number_of[label]
        is_number = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not is_number or (self.number_of and label >= len(self.number_of)):
            problem = f"is none of the {len(self.number_of)} class_names given, nor the number of one"
            if isinstance(label, str) and not self.number_of:
                problem = "is a name, and no class names were given: set data.classes, or prepare a list without labels"
            raise VideoError.about(name, f"label {label!r} {problem}")
        return label


def samples_of(source: dict) -> Iterator[dict]:
    """The samples of one shard, {"url": path}.

    Raises VideoError for one that is damaged, or holds none: drawn again and again, it would be read for ever.
    """
    import webdataset

    count, path = 0, source["url"]
    try:
        for sample in webdataset.tarfile_to_samples(handler=webdataset.handlers.reraise_exception)([source]):
            count += 1
            yield sample
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise VideoError.about(
            path, f"the shard is damaged, cut off, or no tar ({error.args[0] if error.args else error})"
        ) from error
    if not count:
        raise VideoError.about(path, "the shard holds no samples")


def facts_of(sample: dict, name: str) -> tuple[int | str | None, list[str]]:
    """Label and captions of a sample: from its .json (label, captions or caption), or from .cls and .txt beside it."""
    try:
        facts = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        raise VideoError.about(name, "its .json is not JSON") from None
    if not isinstance(facts, dict):
        raise VideoError.about(name, f"its .json is no object with label and captions but {type(facts).__name__}")
    label, captions = facts.get("label"), facts.get("captions") or facts.get("caption") or []
    try:
        if label is None and "cls" in sample:
            label = int(sample["cls"])
        if not captions and "txt" in sample:
            captions = sample["txt"].decode().strip()
    except ValueError as error:
        raise VideoError.about(name, f"its .cls is no number, or its .txt no text ({error})") from None
    captions = [captions] if isinstance(captions, str) and captions else captions or []
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise VideoError.about(name, f"captions must be a list of sentences: {captions!r}")
    return label, captions


class ShardLoader(DataLoader):
    """A DataLoader over `ShardedVideos` whose `len` counts whole batches, as many as will come.

    Every worker fills batches of its own, so each may drop an unfinished one at the end. Iterating again is the next
    epoch. Its state is the number of batches given out, as that of a `ClipLoader`.
    """

    _begun, batches = False, 0

    def __len__(self) -> int:
        shares = _shares(self.dataset.share, max(1, self.num_workers))
        return sum(share // self.batch_size if self.drop_last else -(-share // self.batch_size) for share in shares)

    def __iter__(self):
        # Trainers tell the epoch to samplers only, and a stream has none; nor do they always run to the very end.
        if self._begun:
            self.dataset.set_epoch(self.dataset.epoch + 1)
            self.batches = 0
        self._begun = True
        self.dataset.batches_given, self.dataset.batch_size = self.batches, self.batch_size
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict:
        return {"epoch": self.dataset.epoch, "batches": self.batches, **self._plan()}

    def load_state_dict(self, state: dict) -> None:
        """The next batch is the one that would have come.

        Raises ValueError if an epoch was begun under other circumstances (`refuse_another_plan`).
        """
        state = {**self._plan(), **state}
        epoch, batches = state["epoch"], state["batches"]
        if batches >= state["length"]:
            epoch, batches = epoch + 1, 0
        refuse_another_plan(state, self._plan(), batches)
        self.dataset.set_epoch(epoch)
        self.batches, self._begun = batches, False

    def _plan(self) -> dict:
        data, workers = self.dataset, self.num_workers
        sizes = {"shards": len(data.shards), "world_size": data.world_size, "num_workers": workers}
        return {**sizes, "batch_size": self.batch_size, "length": len(self), "seed": data.seed}


def _shares(samples: int, workers: int) -> list[int]:
    """How many samples each worker makes; they differ by one at most."""
    return [samples // workers + (number < samples % workers) for number in range(workers)]
