"""The file ``property`` beside a record file: number of classes, height and width."""

import logging
import re
from pathlib import Path

from arcface_kd.system.files import open_regular

logger = logging.getLogger(__name__)

_BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_property(path: Path) -> int | None:
    """The number of classes that a ``property`` file states; None where there is none, or it cannot be read.

    Commas or blanks may separate its fields; only the first one is looked at. Training does not need the file.
    """
    try:
        with open_regular(path) as stream:
            head = stream.read(200)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("passed over %s: %s", path, error.strerror)
        return None
    text = head.decode(_BOMS.get(head[:2], "utf-8-sig"), errors="replace")
    found = re.match(r"\s*([0-9]{1,8})(\s*[,;\s]|$)", text)
    if found is None or not 0 < int(found[1]) <= 1 << 24:
        logger.warning("passed over %s: it starts with %r, wanted 'num_classes,height,width'", path, head[:40])
        return None
    return int(found[1])
