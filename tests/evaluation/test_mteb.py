"""The adapter inside mteb as installed: its protocol, its loaders, its evaluator, its scores."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from mteb._create_dataloaders import _create_dataloader_from_texts
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from mteb.models.models_protocols import EncoderProtocol

import img2vid
from img2vid.data.lists import read_list
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.mteb import MTEBEncoder
from img2vid.evaluation.prompts import embed_texts
from tests.conftest import small_vit


class Decoder:
    """What mteb asks of torchcodec's decoder, on img2vid's reader: frames by number."""

    def __init__(self, path):
        self.path, self.metadata = path, SimpleNamespace(num_frames=img2vid.probe(path).frames)

    def get_frames_at(self, indices):
        return SimpleNamespace(data=img2vid.read_clip(self.path, list(indices)))


@pytest.fixture
def task(motion):
    """mteb's zero-shot task over the motion set's test videos."""
    videos = read_list(motion / "test.csv")
    names = list(videos.class_names)
    rows = {"video": [row.path for row in videos.rows], "label": [row.label for row in videos.rows]}
    features = datasets.Features({"video": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.set_transform(
        lambda batch: {**batch, "video": [Decoder(path) for path in batch["video"]]} if "video" in batch else batch
    )

    class Motions(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="Motions",
            description="digits that move",
            reference=None,
            dataset={"path": "none", "revision": "none"},
            type="VideoZeroshotClassification",
            category="v2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            date=None,
            domains=[],
            task_subtypes=[],
            license=None,
            annotations_creators=None,
            dialect=[],
            modalities=["video", "text"],
            sample_creation=None,
            bibtex_citation="",
        )
        input_column_name = "video"

        def load_data(self, *args, **kwargs):
            self.dataset, self.data_loaded = datasets.DatasetDict({"test": data}), True

        def get_candidate_labels(self):
            return [f"a video of {name}" for name in names]

    return Motions(), videos


def test_a_task_of_mteb_scores_it_as_we_do(timely, task):
    motions, videos = task
    encoder = MTEBEncoder(timely, num_frames=8)  # all eight frames: mteb and img2vid then choose the same
    motions.load_data()
    scores = motions.evaluate(encoder, "test", encode_kwargs={"batch_size": 5})["default"]
    weights = embed_texts(timely, motions.get_candidate_labels())
    right = 0
    for row in videos.rows:
        clip = img2vid.read_clip(row.path, num_frames=8)
        with torch.no_grad():
            video = timely.encode_video(timely.normalize(clip[None]), normalize=True)
        right += int((video @ weights.T).argmax()) == row.label
    assert scores["accuracy"] == pytest.approx(right / len(videos))


def test_protocol(nano_folder, nano):
    encoder = MTEBEncoder(nano_folder, device="cpu")
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == "img2vid/model" and meta.revision == encoder.revision and "video" in meta.modalities
    texts = ["one", "two", "three"]
    embedded = encoder.encode(_create_dataloader_from_texts(texts, batch_size=2))
    torch.testing.assert_close(embedded, embed_texts(nano, texts), atol=1e-6, rtol=1e-5)
    cosines = encoder.similarity(embedded * 3, embedded.numpy())
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3))
    torch.testing.assert_close(encoder.similarity_pairwise(embedded, embedded.flip(0)), cosines.flip(1).diagonal())


def test_what_cannot_be_asked(nano):
    with pytest.raises(EvaluationError, match="need a text tower"):
        MTEBEncoder(img2vid.convert(small_vit(), num_frames=2))
    audio = SimpleNamespace(dataset=SimpleNamespace(features={"audio": None}))
    with pytest.raises(EvaluationError, match="knows text and video"):
        MTEBEncoder(nano).encode(audio)
