"""The LightningDataModule: lists of videos in, batches on the device out.

A batch is a dict: clip (B, T, C, H, W) in training and (B, V, T, C, H, W) in validation and testing, V views of each
video, normalised float on the device; label (B,); caption, a list of B sentences; index, epoch, position and
damaged_packets (B,); and with mixing soft_label (B, classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

try:
    import lightning.pytorch as pl
except ImportError as error:
    from img2vid.data.errors import missing_extra

    raise missing_extra("lightning", "train", "img2vid.data.module") from error
import torch
from torch.utils.data import DataLoader

from img2vid.data.datasets import ClipSampler, VideoDataset
from img2vid.data.errors import ListError
from img2vid.data.lists import read_list
from img2vid.data.loading import ClipLoader, EvalSampler, TrainSampler, worker_options
from img2vid.data.manifest import VideoList
from img2vid.data.order import draw_seed
from img2vid.data.transforms import InputSpec, MixClips, Normalise, TestTransform, TrainTransform


class VideoData(pl.LightningDataModule):
    """Videos for training, validation and testing.

    train_list, val_list, test_list: lists of any format (lists.py); root and format hold for all. Class numbers are the
        training list's (or `classes`').
    train_shards: webdataset tars instead of train_list, with samples_per_epoch and `classes`.
    num_frames, frame_interval, target_fps, short_policy: how clips are cut (ClipSampler); num_clips and num_crops:
        views in testing (validation uses one of each).
    spec: what the backbone expects (InputSpec, or its fields as a dict); may be set later, before `setup`.
    scale, flip, rand_augment, color_jitter, erase: augmentation (TrainTransform).
    mixup_alpha, cutmix_alpha: mixing on the device (MixClips), 0 for none; needs class names.
    batch_size: per process. timeout_seconds: how long a batch may take before a worker counts as hung.
    on_bad_video, max_bad_videos: training only (VideoDataset). start_method: of workers (None: safe_start_method;
        under ``spawn`` a script needs ``if __name__ == "__main__":``).
    """

    def __init__(
        self,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        *,
        format: str = "auto",
        root: str | None = None,
        classes: str | Sequence[str] | None = None,
        train_shards: Sequence[str] = (),
        samples_per_epoch: int | None = None,
        num_frames: int = 8,
        frame_interval: int | None = None,
        target_fps: float | None = None,
        short_policy: str = "repeat_last",
        num_clips: int = 1,
        num_crops: int = 1,
        spec: InputSpec | dict | None = None,
        scale: tuple[float, float] = (0.25, 1.0),
        flip: bool = True,
        rand_augment: tuple[int, int] | None = None,
        color_jitter: float = 0.0,
        erase: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        timeout_seconds: float = 300.0,
        start_method: str | None = None,
        seed: int = 0,
        backend: str = "auto",
        on_error: str = "raise",
        on_bad_video: str = "raise",
        max_bad_videos: float = 0.01,
    ):
        super().__init__()
        if train_list is not None and train_shards:
            raise ValueError("give train_list or train_shards, not both")
        if train_shards and not samples_per_epoch:
            raise ValueError("train_shards needs samples_per_epoch: a stream has no length of its own")
        plain = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if isinstance(spec, InputSpec):
            plain["spec"] = asdict(spec)
        # Plain values only: a checkpoint with anything else does not load with weights_only=True.
        self.save_hyperparameters({name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()})
        self.spec = InputSpec(**spec) if isinstance(spec, dict) else spec
        self.lists: dict[str, VideoList] = {}
        self.class_names: tuple[str, ...] | None = None
        self._train = self._normalise = self._mix = None

    # -- lists and loaders ---------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if self.lists or self._normalise is not None:
            return
        if self.spec is None:
            raise ValueError("VideoData does not know the input size: set `spec` to an InputSpec from the backbone")
        options, classes, lists = self.hparams, self.hparams.classes, {}
        for name in ("train", "val", "test"):
            if options[f"{name}_list"] is not None:
                subset = "train" if name == "train" else "test"
                given = dict(format=options.format, root=options.root, classes=classes, subset=subset)
                lists[name] = read_list(options[f"{name}_list"], **given)
                classes = classes or lists[name].class_names
        known = [videos.class_names for videos in lists.values() if videos.class_names]
        for videos in lists.values():
            if known and not videos.class_names and any(row.label is not None for row in videos.rows):
                raise ListError(f"{videos.source}: has class numbers where another list has names; give `classes`")
        self.lists = lists
        self.class_names = known[0] if known else tuple(classes) if isinstance(classes, (list, tuple)) else None
        self._normalise = Normalise(self.spec)
        if options.mixup_alpha or options.cutmix_alpha:
            if self.class_names is None:
                raise ValueError("mixing needs class names: give `classes` (a text file with one name per line)")
            self._mix = MixClips(len(self.class_names), options.mixup_alpha, options.cutmix_alpha)

    def train_dataloader(self) -> DataLoader:
        options, (rank, world_size) = self.hparams, self._ranks()
        workers = worker_options(options.num_workers, options.timeout_seconds, options.start_method)
        augment = (options.scale, options.flip, options.rand_augment, options.color_jitter, options.erase)
        names = ("scale", "flip", "rand_augment", "color_jitter", "erase")
        transform = TrainTransform(self.spec, **dict(zip(names, augment, strict=True)))
        if options.train_shards:
            return self._shard_loader(transform, workers, rank, world_size)
        self._train = VideoDataset(
            self._list("train"),
            self._sampler(1),
            transform,
            train=True,
            seed=options.seed,
            backend=options.backend,
            on_error=options.on_error,
            on_bad_video=options.on_bad_video,
            max_bad_videos=options.max_bad_videos,
        )
        sampler = TrainSampler(len(self._train), rank, world_size)
        if len(sampler) < options.batch_size:
            raise ValueError(
                f"{self._train.videos.source}: {len(sampler)} videos per process do not fill one batch of "
                f"{options.batch_size}; lower batch_size"
            )
        # drop_last: ranks with batches of different sizes would wait for each other for ever.
        pin = torch.cuda.is_available()
        return ClipLoader(self._train, options.batch_size, sampler=sampler, drop_last=True, pin_memory=pin, **workers)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_loader("val", 1, 1) if "val" in self.lists else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test", self.hparams.num_clips, self.hparams.num_crops)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def bad_rows(self):
        """The training rows skipped so far on this machine."""
        return self._train.bad_rows() if self._train is not None else []

    # -- on the device -------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        if self._mixes:
            # by what the batch holds, so that a resumed run mixes alike; asked for here, where it costs no waiting
            batch["mix_seed"] = draw_seed(
                self.hparams.seed, int(batch["epoch"][0]), int(batch["position"][0]), " mixing"
            )
        return batch

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        clip = batch["clip"]  # uint8 until here
        batch["clip"] = self._normalise.to(clip.device)(clip)
        if "mix_seed" in batch:
            seed = batch.pop("mix_seed")
            batch["clip"], batch["soft_label"] = self._mix(batch["clip"], batch["label"], seed)
        return batch

    @property
    def _mixes(self) -> bool:
        return self._mix is not None and self.trainer is not None and self.trainer.training

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _eval_loader(self, name: str, num_clips: int, num_crops: int) -> DataLoader:
        options, (rank, world_size) = self.hparams, self._ranks()
        transform = TestTransform(self.spec, num_crops)
        given = dict(backend=options.backend, on_error=options.on_error, seed=options.seed)
        dataset = VideoDataset(self._list(name), self._sampler(num_clips), transform, **given)
        if len(dataset) < world_size:  # said by all processes at once: one without videos would end alone
            raise ListError(
                f"{dataset.videos.source}: {len(dataset)} videos cannot be shared among {world_size} processes; "
                "give a longer list or fewer devices"
            )
        workers = worker_options(options.num_workers, options.timeout_seconds, options.start_method)
        size = options.eval_batch_size or options.batch_size
        return DataLoader(dataset, size, sampler=EvalSampler(len(dataset), rank, world_size), **workers)

    def _shard_loader(self, transform, workers: dict, rank: int, world_size: int) -> DataLoader:
        from img2vid.data.shards import ShardedVideos, ShardLoader

        options = self.hparams
        shards = [str(shard) for pattern in options.train_shards for shard in _expand(pattern)]
        sizes = dict(samples_per_epoch=options.samples_per_epoch, rank=rank, world_size=world_size)
        limit = int(options.max_bad_videos * options.samples_per_epoch) if options.on_bad_video == "skip" else 0
        given = dict(class_names=self.class_names, seed=options.seed, max_bad_videos=limit)
        dataset = ShardedVideos(shards, self._sampler(1), transform, **sizes, **given)
        dataset.set_epoch(self.trainer.current_epoch if self.trainer is not None else 0)
        workers.pop("persistent_workers", None)  # workers learn the epoch when they start
        return ShardLoader(dataset, options.batch_size, drop_last=True, **workers)

    def _sampler(self, num_clips: int) -> ClipSampler:
        options = self.hparams
        return ClipSampler(
            options.num_frames, options.frame_interval, options.target_fps, num_clips, options.short_policy
        )

    def _list(self, name: str) -> VideoList:
        if name not in self.lists:
            raise ValueError(f"VideoData has no {name}_list" + ("" if self.lists else " (has setup() been called?)"))
        return self.lists[name]

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _expand(pattern: str) -> list[Path]:
    """Shards by path or by pattern ("shards/*.tar"), in order."""
    if any(sign in pattern for sign in "*?["):
        folder = Path(pattern).parent
        return sorted(folder.glob(Path(pattern).name)) or [Path(pattern)]
    return [Path(pattern)]
