"""One pass over the questions of a benchmark: planned once, asked of one model or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mgm_exp.evaluate.answerer import Answerer, asking
from mgm_exp.evaluate.batches import PlannedBatch, plan_batches
from mgm_exp.evaluate.fitting import Fit
from mgm_exp.evaluate.heap import keep_freed_memory
from mgm_exp.evaluate.kept import Keeper
from mgm_exp.evaluate.sight import GROUP, Shelf, Sight

if TYPE_CHECKING:
    from mgm_exp.evaluate.benchmarks import Benchmark

OnAnswers = Callable[[int, int, list[str]], None]
"""Called with (model, batch, answers in the batch's order)."""


@dataclass(frozen=True)
class Plan:
    """The prompts of a benchmark, and who is asked together.

    Args:
        prompts: Token ids of each question.
        batches: In the order in which they are asked.
    """

    prompts: list[list[int]]
    batches: list[PlannedBatch]

    @classmethod
    def of(cls, benchmark: Benchmark, encode_prompt: Callable[[str], list[int]]) -> Plan:
        """The plan depends on prompts, images and batch size, and on nothing that has happened so far."""
        questions = benchmark.questions
        prompts = [encode_prompt(question.prompt) for question in questions]
        images = [question.image for question in questions]
        return cls(prompts, plan_batches([len(ids) for ids in prompts], images, benchmark.settings.batch_size))

    @cached_property
    def places(self) -> list[tuple[int, ...]]:
        """Places of the questions of each batch."""
        return [batch.questions for batch in self.batches]


class Fits:
    """How many questions and images are taken at a time; what was learnt of memory holds for all passes of a call."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.images = Fit(GROUP, "images", say)
        self._say = say
        self._questions: dict[int, Fit] = {}

    def questions(self, batch_size: int) -> Fit:
        """Of benchmarks with this batch size."""
        return self._questions.setdefault(batch_size, Fit(batch_size, "questions", self._say))


def one_pass(
    benchmark: Benchmark,
    plan: Plan,
    answerers: Sequence[Answerer],
    todo: Sequence[Sequence[int]],
    on_answers: OnAnswers,
    *,
    fits: Fits,
    shelf: Shelf | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Asks the batches that are still to be asked, in the plan's order.

    Args:
        benchmark: Its questions and images.
        plan: Of this benchmark.
        answerers: The models; of one base, so that their prompts are the same.
        todo: Batches that each model is still to be asked.
        on_answers: Takes the answers.
        fits: How much is done at a time.
        shelf: See :class:`mgm_exp.evaluate.sight.Shelf`.
        keeper: Keeps what towers see in the store; None: nothing is kept there.

    Raises:
        DataError: an image cannot be read; it is named.
        MgmError: the GPU's memory is too small for a single question.
    """
    keep_freed_memory()
    questions, wanted = benchmark.questions, [set(batches) for batches in todo]
    numbers = sorted(set().union(*wanted))
    if not numbers:
        return
    images = [[questions[place].image for place in plan.places[number]] for number in numbers]
    fit, max_new_tokens = fits.questions(benchmark.settings.batch_size), benchmark.settings.max_new_tokens
    corruption = benchmark.settings.corruption
    with Sight(
        answerers,
        benchmark.picture,
        images,
        fit=fits.images,
        shelf=shelf,
        shelf_name=lambda image: f"{benchmark.image_root / image} {corruption}",
        kept=keeper.of(benchmark, answerers, [name for names in images for name in names], fits.images.size)
        if keeper is not None
        else None,
    ) as sight:
        for number, names in zip(numbers, images, strict=True):
            prompts = [plan.prompts[place] for place in plan.places[number]]
            for model, (answerer, seen) in enumerate(zip(answerers, sight.see(names), strict=True)):
                if number in wanted[model]:
                    asked = list(zip(prompts, seen, strict=True))
                    on_answers(model, number, fit.run(asked, asking(answerer, max_new_tokens)))
