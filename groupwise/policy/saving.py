"""The trained model as a Hugging Face folder: whole or not there, and compared with what is in memory."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from groupwise.files import make_anew, refuse_link, use_umask, writing
from groupwise.model.loading import LoadedModel
from groupwise.model.saving import check_whole, complete_adapter, save_merged

logger = logging.getLogger(__name__)


def write_model(loaded: LoadedModel, path: Path, *, merged: bool = False) -> None:
    """Write a model folder, or an adapter's; what stood there before is replaced only when the new one is whole.

    Args:
        merged: write an adapter as a whole model, with its base.

    Raises:
        FileError: the disk is full, or the folder cannot be written.
        ExportError: what is on disk is not what is in memory.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, hint="; the checkpoint is whole: --resume writes the model without training again"):
        refuse_link(path)
        make_anew(temporary)
        try:
            if merged and loaded.adapter is not None:
                same = save_merged(loaded.model, temporary)
            else:
                loaded.model.save_pretrained(temporary)  # pyright: ignore[reportUnknownMemberType]
                same = _compared(loaded, temporary, home=path)
            loaded.tokenizer.save_pretrained(temporary)
            logger.info("%s: %d weights compared with those in memory, all the same", path, same)
            use_umask(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _compared(loaded: LoadedModel, folder: Path, *, home: Path) -> int:
    if loaded.adapter is None:
        return check_whole(loaded.model, folder)
    return complete_adapter(loaded.model, folder, tokenizer=loaded.tokenizer, home=home)
