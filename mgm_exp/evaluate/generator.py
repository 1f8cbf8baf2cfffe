"""Batched answers to questions that come from anywhere: notebooks, other harnesses, a server.

    generator = Generator(load_model(folder), load_processor(folder), batch_size=16)
    generator.answers(["What does the sign say?", "Which colour is it?"], [picture, picture])

Benchmarks go through :func:`mgm_exp.evaluate.evaluate`, which keeps what was answered on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.answerer import Answerer, asking
from mgm_exp.evaluate.batches import plan_batches
from mgm_exp.evaluate.passes import Fits
from mgm_exp.evaluate.sight import Sight
from mgm_exp.evaluate.whole_inputs import answerer_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Generator:
    """Answers questions in batches: sorted by length, a picture that comes several times is encoded once.

    Args:
        model: An MGM in evaluation mode, with or without a PEFT adapter; or an
            :class:`~mgm_exp.evaluate.answerer.Answerer` of another family, without a processor.
        processor: The model's.
        batch_size: Most questions in a forward pass; halved, aloud, when the GPU's memory runs out.
        say: Takes a sentence for the user; None: the log's warnings.
    """

    def __init__(
        self, model: Any, processor: Any = None, *, batch_size: int = 16, say: Callable[[str], None] | None = None
    ) -> None:
        self._answerer: Answerer = model if processor is None else answerer_of(model, processor)
        fits = Fits(say)
        self._images, self._questions = fits.images, fits.questions(batch_size)

    def answers(
        self,
        questions: Sequence[str],
        pictures: Sequence[Image | None],
        *,
        max_new_tokens: int = 128,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Greedy answers, in the order of the questions; the same as one at a time (in fp32).

        Args:
            questions: Prompts without chat template; the place of the image is before the text.
            pictures: Of each question, 8-bit RGB; None: a question without an image. The same object is encoded once.
            max_new_tokens: Longest answer, in tokens.
            on_progress: Called with (answered, all) after every batch.
        """
        answerer = self._answerer
        shown = {str(id(picture)): picture for picture in pictures if picture is not None}
        names = ["" if picture is None else str(id(picture)) for picture in pictures]
        prompts = [answerer.encode_prompt(q, bool(name)) for q, name in zip(questions, names, strict=True)]
        batches = [batch.questions for batch in plan_batches([len(p) for p in prompts], names, self._questions.size)]
        images = [[names[place] for place in batch if names[place]] for batch in batches]
        found, answered = [""] * len(prompts), 0
        with Sight([answerer], shown.__getitem__, images, fit=self._images) as sight:
            for batch, needed in zip(batches, images, strict=True):
                seen = dict(zip(needed, sight.see(needed)[0], strict=True))
                asked = [(prompts[place], seen.get(names[place])) for place in batch]
                for place, answer in zip(
                    batch, self._questions.run(asked, asking(answerer, max_new_tokens)), strict=True
                ):
                    found[place] = answer
                answered += len(batch)
                if on_progress is not None:
                    on_progress(answered, len(prompts))
        return found
