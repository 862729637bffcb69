"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, as users of the Hugging Face hub expect them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelHubMixin, snapshot_download

from img2vid.backbones.hub import ONLINE, fetching
from img2vid.errors import WeightsError

if TYPE_CHECKING:
    from img2vid.certificate import Certificate


class Saving(ModelHubMixin, library_name="img2vid", tags=["video", "img2vid"]):
    """What is saved, loaded and uploaded is img2vid's own folder (see ``native``)."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        certificate: Certificate | None = None,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``model.safetensors``, ``config.json``, a model card, and the certificate where one is given.

        Args:
            save_directory: folder to write; files of an earlier model in it are replaced.
            certificate: goes into ``certificate.json`` and the card.
            repo_id, push_to_hub, push_to_hub_kwargs: also upload the folder, as in huggingface_hub.
            config, model_card_kwargs: accepted for huggingface_hub's sake; both are the model's own.
        """
        from img2vid.checkpoints.native import save

        if certificate is None and model_card_kwargs:  # how push_to_hub below hands it on
            certificate = model_card_kwargs.get("certificate")
        folder = save(self, save_directory, certificate)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, certificate=certificate, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, *, certificate: Certificate | None = None, **upload: Any) -> str:
        """Upload the model as a repository: weights, configuration, card, and the certificate where one is given.

        Args:
            repo_id: ``OWNER/NAME``; made where it does not exist yet.
            certificate: goes into ``certificate.json`` and the card.
            upload: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr``, ... of huggingface_hub.

        Returns:
            The address of the commit.
        """
        return super().push_to_hub(repo_id, model_card_kwargs={"certificate": certificate}, **upload)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, image_model: Any = None, **download: Any
    ) -> Saving:
        """Load a folder written by ``save_pretrained``, or a repository of such a folder on the hub.

        Args:
            image_model: a freshly built image model, for a model that was made from a module without a name.
            download: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only`` of the hub.

        Raises:
            WeightsError: not such a folder, another kind of model, or weights that do not fit.
        """
        from img2vid.checkpoints.native import load

        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            # nothing of a backbone's ways out applies: a model folder is here, or on the hub
            ways_out = ("give a folder written by save_pretrained; there is none of that name here", ONLINE)
            with fetching(f"the model {pretrained_model_name_or_path} of the hub", ways_out):
                folder = Path(snapshot_download(str(pretrained_model_name_or_path), **download))
        model = load(folder, image_model=image_model)
        if not isinstance(model, cls):
            raise WeightsError(f"{folder} holds a {type(model).__name__}, not a {cls.__name__}. Use img2vid.load.")
        return model
