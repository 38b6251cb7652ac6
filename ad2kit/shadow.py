"""A shadow teacher: a share of the texts is scored once more, in the background, and compared.

What drifts away from training shows here first, without a label: the student stops agreeing with
the model that it was proven against. The teacher has a thread of its own with the lowest priority
and a short queue; what does not fit is not compared, and no answer ever waits for it.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import sys
import threading
from typing import TYPE_CHECKING, Any

from ad2kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ad2kit.classifier import OnnxClassifier, Prediction

logger = logging.getLogger(__name__)

_QUEUE_TEXTS = 64
# Numbers agree that differ by at most this, or by this share of one that is larger than 1.
_NUMBER_GAP = 0.1


class Shadow:
    """Compares some of a student's answers with its teacher's.

    Args:
        teacher: the teacher's artefact, for the same labels.
        student: whose answers are compared.
        share: of the texts, in (0, 1].
        observe: is told whether the two agree about a text; None for one that was left out because
            the teacher was busy, or failed on it.

    Raises:
        ModelError: the two do not answer the same question.
    """

    def __init__(
        self,
        teacher: OnnxClassifier,
        student: OnnxClassifier,
        share: float,
        observe: Callable[[bool | None], None],
    ) -> None:
        ours, theirs = (
            (each.artifact.task, each.labels, each.artifact.text_columns)
            for each in (student, teacher)
        )
        if ours != theirs:
            raise ModelError(
                f"the shadow in {teacher.folder} answers {theirs} (task, labels, texts), and the "
                f"student {ours}",
                hint="give the artefact of the student's own teacher",
            )
        self._teacher, self._share, self._observe = teacher, share, observe
        self._random = random.Random()  # noqa: S311  (which texts are compared is no secret)
        self._waiting: queue.Queue[tuple[Any, Prediction] | None] = queue.Queue(_QUEUE_TEXTS)
        self._thread = threading.Thread(target=self._work, name="ad2kit-shadow", daemon=True)
        self._thread.start()

    def offer(self, texts: Sequence[Any], predictions: Sequence[Prediction]) -> None:
        """Take a share of some texts, if there is room; never waits."""
        for pair in zip(texts, predictions, strict=True):
            if self._random.random() < self._share:
                try:
                    self._waiting.put_nowait(pair)
                except queue.Full:
                    self._observe(None)

    def close(self) -> None:
        """Leave out what waits, and stop after the text that is being scored."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
            self._observe(None)
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while (pair := self._waiting.get()) is not None:
            text, said = pair
            try:
                (expected,) = self._teacher.predict([text])
            except Exception:
                # Not what it was about: texts of clients stay out of the log.
                logger.exception("the shadow teacher failed on a text")
                self._observe(None)
            else:
                self._observe(_agree(said, expected))


def _agree(said: Prediction, expected: Prediction) -> bool:
    if said.value is not None and expected.value is not None:
        return abs(said.value - expected.value) <= _NUMBER_GAP * max(1, abs(expected.value))
    return (said.label, said.labels) == (expected.label, expected.labels)
