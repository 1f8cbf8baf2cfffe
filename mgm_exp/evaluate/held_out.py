"""Questions that are asked again and again while a model trains: scored in memory, nothing is written.

Greedy, in the same batches every time. Images are encoded once where the connector is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks import Benchmark, Question
from mgm_exp.evaluate.generate import answer_batch, plan_batches
from mgm_exp.evaluate.whole_inputs import answers_of, makes_whole_inputs

if TYPE_CHECKING:
    from torch import Tensor


class HeldOut:
    """See the module.

    Args:
        benchmark: Its scorer, its images and its settings.
        questions: Some of its questions.
        processor: The model's.
        keeps_images: Whether an image's visual tokens stay the same while the model trains.

    Raises:
        DataError: the answers are not public.
    """

    def __init__(self, benchmark: Benchmark, questions: Sequence[Question], processor: Any, keeps_images: bool) -> None:
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
        self._kept: dict[str, Tensor] | None = {} if keeps_images else None

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
            with torch.no_grad():
                for batch in self._batches:
                    asked = [self.questions[place] for place in batch.questions]
                    answers = self._answers(model, batch.questions, [question.image for question in asked])
                    for place, question, answer in zip(batch.questions, asked, answers, strict=True):
                        found[place] = self.benchmark.score(answer, question)
        finally:
            for module, was_training in modes:
                module.training = was_training
        return found

    def _answers(self, model: Any, places: Sequence[int], images: Sequence[str]) -> list[str]:
        prompts, most = [self._prompts[place] for place in places], self.benchmark.settings.max_new_tokens
        if self._is_whole:
            pictures = [self.benchmark.picture(image) for image in images]
            return answers_of(model, self.processor, prompts, pictures, most)
        return answer_batch(model, self.processor, prompts, self._tokens(model, images), most)

    def _tokens(self, model: Any, images: Sequence[str]) -> Tensor:
        """(B, N, hidden): the visual tokens of each question's image."""
        import torch

        here: dict[str, Tensor] = {} if self._kept is None else self._kept
        new = [image for image in dict.fromkeys(images) if image not in here]
        if new:
            low, high = zip(*(self._pixels(image) for image in new), strict=True)
            tower = next(model.model.vision_tower.parameters())
            encoded = model.model.encode_images(
                torch.stack(low).to(tower.device, tower.dtype), torch.stack(high).to(tower.device, tower.dtype)
            )
            here.update(zip(new, encoded.cpu(), strict=True))
        return torch.stack([here[image] for image in images]).to(model.device)

    def _pixels(self, image: str) -> Any:
        return self.processor.pixels(self.benchmark.picture(image), "pad")
