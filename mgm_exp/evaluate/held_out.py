"""Questions that are asked again and again while a model trains: scored in memory, no answer is written.

Greedy, in the same batches every time. Images go through the towers in the groups of evaluation, whose bits they get:
once where the connector is frozen, and not at all where the store has what the towers saw.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.answerer import MgmAnswerer
from mgm_exp.evaluate.batches import plan_batches
from mgm_exp.evaluate.benchmarks import Benchmark, Question
from mgm_exp.evaluate.fitting import Whole
from mgm_exp.evaluate.sight import GROUP, Shelf, Sight
from mgm_exp.evaluate.whole_inputs import answers_of, makes_whole_inputs

if TYPE_CHECKING:
    import torch

    from mgm_exp.evaluate.kept import Keeper

# What is seen once is needed at every point: there is no limit but the number of questions.
_ALL = 1 << 62


class HeldOut:
    """See the module.

    Args:
        benchmark: Its scorer, its images and its settings.
        questions: Some of its questions.
        processor: The model's.
        keeps_images: Whether an image's visual tokens stay the same while the model trains.
        keeper: Of features in the store; None: none are kept there. What it keeps must stay the same, too.
        half: The type that is computed in under autocast; None: there is no autocast.

    Raises:
        DataError: the answers are not public.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        questions: Sequence[Question],
        processor: Any,
        keeps_images: bool,
        keeper: Keeper | None = None,
        half: torch.dtype | None = None,
    ) -> None:
        self.benchmark, self.questions, self.processor = benchmark, list(questions), processor
        if not all(question.answers for question in self.questions):
            raise DataError(
                f"train.validation.benchmark={benchmark.name}: its {benchmark.split} split has no public answers, so "
                "there is nothing to validate by.",
                advice="Use a split with answers.",
            )
        self._is_whole = makes_whole_inputs(processor)
        self._prompts: list[Any] = [
            question.prompt if self._is_whole else processor.encode_prompt(question.prompt)
            for question in self.questions
        ]
        self._batches = plan_batches(
            [processor.prompt_length(text) for text in self._prompts]
            if self._is_whole
            else list(map(len, self._prompts)),
            [question.image for question in self.questions],
            benchmark.settings.batch_size,
        )
        self._shelf = Shelf(_ALL) if keeps_images else None
        self._keeper, self._half = keeper, half

    def scores(self, model: Any) -> list[float]:
        """The score of each question, in 0..1, in their order. The model's mode is left as it was.

        Raises:
            DataError: an image cannot be read.
        """
        import torch

        found = [0.0] * len(self.questions)
        modes = [(module, module.training) for module in model.modules()]  # frozen towers are not in training mode
        model.eval()
        try:
            with torch.no_grad(), closing(self._answers(model)) as batches:
                for places, answers in batches:
                    for place, answer in zip(places, answers, strict=True):
                        found[place] = self.benchmark.score(answer, self.questions[place])
        finally:
            for module, was_training in modes:
                module.training = was_training
        return found

    def _answers(self, model: Any) -> Generator[tuple[Sequence[int], list[str]], None, None]:
        """Places of the questions of each batch, and their answers."""
        batches, most = [batch.questions for batch in self._batches], self.benchmark.settings.max_new_tokens
        images = [[self.questions[place].image for place in places] for places in batches]
        if self._is_whole:
            for places, names in zip(batches, images, strict=True):
                prompts, pictures = [self._prompts[place] for place in places], map(self.benchmark.picture, names)
                yield places, answers_of(model, self.processor, prompts, list(pictures), most)
            return
        answerer = MgmAnswerer(model, self.processor, self._half)
        kept = None
        if self._keeper is not None:
            kept = self._keeper.of(self.benchmark, [answerer], [name for names in images for name in names], GROUP)
        with Sight([answerer], self.benchmark.picture, images, fit=Whole(GROUP), shelf=self._shelf, kept=kept) as sight:
            for places, names in zip(batches, images, strict=True):
                (seen,) = sight.see(names)
                yield places, answerer.answer([self._prompts[place] for place in places], seen, most)
