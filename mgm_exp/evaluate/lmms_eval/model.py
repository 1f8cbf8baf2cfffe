"""An MGM as lmms-eval asks it: batched answers until a stop string, and likelihoods of given answers.

Prompts go through MGM's chat template and images through its processor, as in this package's own benchmarks; what a
task writes around its questions is the task's. MGM sees one image in a prompt: of several the first is shown, and how
often that happened is said.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model import load_model, load_processor

_IMAGE_THREADS = 4
_LONGEST = 1024
"""New tokens where a task does not say how many."""
_SAMPLING = ("temperature", "top_p", "top_k")
_KNOWN = ("until", "max_new_tokens", "num_beams", "do_sample", *_SAMPLING)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One thing to be answered.

    Args:
        place: Among the requests.
        ids: Of the prompt, with the image's placeholder.
        image: None: there is none.
        same_image: Equal for prompts about one image, which is then encoded once.
        settings: Of the generation, as the task has them.
        target: Ids of the answer whose likelihood is asked for.
    """

    place: int
    ids: list[int]
    image: Image.Image | None
    same_image: tuple[Any, ...]
    settings: Mapping[str, Any]
    target: tuple[int, ...] = ()


class MgmExp(lmms):
    """A run's or a checkpoint's model.

    Args:
        pretrained: Run folder, or folder of an MGM checkpoint.
        batch_size: Prompts in one forward pass.
        device: cpu, cuda, cuda:1, ...; None: cuda where there is one.
        dtype: float32, bfloat16, float16; None: that of the run's training, or of the checkpoint.
        attn_implementation, base: As for ``mgm_exp.model.load_model``.

    Raises:
        ModelError: the folder holds no model.
        ConfigError: a batch size that is no number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} is not a number from 1.", advice="Give batch_size=16.")
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None or (self._world_size > 1 and device == "cuda"):
            has_gpu = torch.cuda.is_available()
            device = f"cuda:{self.accelerator.local_process_index}" if has_gpu else "cpu"
        self.batch_size = int(batch_size)
        self.model = load_model(
            pretrained, device=device, dtype=dtype, attn_implementation=attn_implementation, base=base
        )
        self.processor = load_processor(pretrained, base=base)
        self.device = self.model.device
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MgmExp:
        """As lmms-eval's own, but what stands in ``--model_args`` wins over ``--batch_size`` and ``--device``."""
        from lmms_eval.utils import simple_parse_args_string

        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if given.pop("max_batch_size", None) is not None:
            raise ConfigError("--max_batch_size belongs to --batch_size auto, which mgm_exp does not have.")
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    # -- what lmms-eval asks for -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, each up to the first of its task's stop strings.

        Args:
            requests: ``args`` of each are (context, generation settings, doc_to_visual, doc_id, task, split).
        """
        prompts = []
        for place, request in enumerate(requests):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id])
            prompts.append(self._prompt(place, context, images, (task, split, doc_id), settings))
        answers = self._answer(prompts)
        for prompt, request in zip(prompts, requests, strict=True):
            self.cache_hook.add_partial("generate_until", tuple(request.args[:2]), answers[prompt.place])
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers of each round, until the task says that there is no further one.

        Args:
            requests: ``args`` of each are (context, generation settings, doc_to_visual, doc_to_text, doc_id, task,
                split). After a round ``doc_to_text`` gives (images, context, is it over, answers, what it wants to
                know in the next round).
        """
        rounds: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        asked: list[tuple[int, str, Any]] = []
        for place, request in enumerate(requests):
            context, _, doc_to_visual, _, doc_id, task, split = request.args
            asked.append((place, context, doc_to_visual(self.task_dict[task][split][doc_id])))
        number = 0
        while asked:
            prompts = [
                self._prompt(k, context, images, (place, number), requests[place].args[1])
                for k, (place, context, images) in enumerate(asked)
            ]
            for (place, _, _), answer in zip(asked, self._answer(prompts), strict=True):
                rounds[place].append(answer)
            number += 1
            following = []
            for place, _, _ in asked:
                _, _, _, doc_to_text, doc_id, task, split = requests[place].args
                images, context, is_over, said, infos[place] = doc_to_text(
                    self.task_dict[task][split][doc_id],
                    previous_output=rounds[place],
                    round_idx=number,
                    previous_round_info=infos[place],
                )
                rounds[place] = list(said) if is_over else rounds[place]
                if not is_over:
                    following.append((place, context, images))
            asked = following
        return rounds

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How likely the model is to give the answers of a task.

        Args:
            requests: ``args`` of each are (context, answer or function that gives it, doc_to_visual, doc_id, task,
                split).

        Returns:
            (a sum over the answer's tokens, whether greedy decoding would give it). Where a task gives the function
            the sum is of log-probabilities, as lmms-eval's interface has it. For an option of a multiple-choice task
            it is the negative one: lmms-eval takes the option with the smallest number (``ConfigurableTask``
            ``.process_results``), as most of its models return a loss.
        """
        prompts, signs = [], []
        for place, request in enumerate(requests):
            if len(request.args) != 6:
                raise ModelError(
                    "A likelihood without a question was asked for (acc_mutual_info), which lmms-eval would subtract "
                    "with the wrong sign.",
                    advice="Leave acc_mutual_info out of the task's metrics.",
                )
            context, answer, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            signs.append(1.0 if callable(answer) else -1.0)
            text = str(answer(doc) if callable(answer) else answer).strip()  # the template ends with a line of its own
            target = self.processor.tokenizer.encode(text, add_special_tokens=False)
            if not target:
                raise ModelError(f"The answer to document {doc_id} of {task} is empty, so it has no likelihood.")
            prompts.append(self._prompt(place, context, doc_to_visual(doc), (task, split, doc_id), {}, target))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(prompts)
        for batch in self._batches(prompts):
            for prompt, (total, is_greedy) in zip(batch, self._likelihoods(batch), strict=True):
                found[prompt.place] = (signs[prompt.place] * total, is_greedy)
        return found

    # -- prompts and batches ---------------------------------------------------------------------------------------

    def _prompt(
        self,
        place: int,
        context: str,
        images: Sequence[Any] | None,
        same_image: tuple[Any, ...],
        settings: Mapping[str, Any],
        target: Sequence[int] = (),
    ) -> Prompt:
        pictures = list(images or [])
        strange = next((one for one in pictures if not isinstance(one, Image.Image)), None)
        if strange is not None:
            raise ModelError(
                f"The task gives a {type(strange).__name__}, where MGM takes images.",
                advice="Tasks with video or audio cannot be asked.",
            )
        if len(pictures) > 1:
            log.warning("%s has %d images; MGM sees the first one", same_image, len(pictures))
        ids = self.processor.encode_prompt(context, has_image=bool(pictures))
        return Prompt(place, ids, pictures[0] if pictures else None, same_image, settings, tuple(target))

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts with equal settings, all with an image or all without, the longest first; one image side by side."""
        groups: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            kind = json.dumps([prompt.image is None, dict(prompt.settings)], sort_keys=True, default=str)
            groups.setdefault(kind, []).append(prompt)
        for group in groups.values():
            group.sort(key=lambda prompt: (-len(prompt.ids), str(prompt.same_image), prompt.place))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _seen(self, batch: Sequence[Prompt]) -> Tensor | None:
        """Visual tokens (B, N, hidden) of a batch, each image encoded once; None without images."""
        images = {prompt.same_image: prompt.image for prompt in batch if prompt.image is not None}
        if not images:
            return None
        with ThreadPoolExecutor(_IMAGE_THREADS) as pool:
            low, high = zip(*pool.map(self.processor.pixels, images.values()), strict=True)
        tower = next(self.model.model.vision_tower.parameters())
        with torch.inference_mode():
            tokens = self.model.model.encode_images(
                torch.stack(low).to(tower.device, tower.dtype), torch.stack(high).to(tower.device, tower.dtype)
            )
        places = {name: place for place, name in enumerate(images)}
        return tokens[[places[prompt.same_image] for prompt in batch]]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), padded on the left, and which of them are real."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.processor.pad_token_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        for place, row in enumerate(rows):
            ids[place, longest - len(row) :] = torch.tensor(row)
            mask[place, longest - len(row) :] = True
        return ids.to(self.device), mask.to(self.device)

    # -- the model -------------------------------------------------------------------------------------------------

    def _answer(self, prompts: Sequence[Prompt]) -> list[str]:
        answers = [""] * len(prompts)
        unknown = sorted({key for prompt in prompts for key in prompt.settings if key not in _KNOWN})
        if unknown:
            log.warning("settings of the task that mean nothing to MGM: %s", ", ".join(unknown))
        done = 0
        for batch in self._batches(prompts):
            for prompt, answer in zip(batch, self._generate(batch, batch[0].settings), strict=True):
                answers[prompt.place] = answer
            done += len(batch)
            log.info("%d of %d answered", done, len(prompts))
        return answers

    def _generate(self, batch: Sequence[Prompt], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [str(stop) for stop in until if stop]
        options: dict[str, Any] = {
            "max_new_tokens": int(settings.get("max_new_tokens") or _LONGEST),
            "num_beams": int(settings.get("num_beams") or 1),
        }
        temperature = settings.get("temperature")
        if bool(settings.get("do_sample", True)) and temperature is not None and float(temperature) > 0:
            options["do_sample"] = True
            options |= {key: settings[key] for key in _SAMPLING if settings.get(key) is not None}
        if stops:
            options["stopping_criteria"] = StoppingCriteriaList([_Until(stops, self.processor.decode)])
        ids, mask = self._padded([prompt.ids for prompt in batch])
        generated = self.model.generate(
            ids, mask, visual_tokens=self._seen(batch), eos_token_id=self.processor.stop_token_ids, **options
        )
        return [_cut(self.processor.decode(row), stops) for row in generated.cpu()]

    @torch.inference_mode()
    def _likelihoods(self, batch: Sequence[Prompt]) -> list[tuple[float, bool]]:
        """Log-probability of each target, and whether each of its tokens is the likeliest one."""
        rows = [[*prompt.ids, *prompt.target] for prompt in batch]
        limit = self.model.config.tokenizer_model_max_length
        n_seen = self.processor.n_visual_tokens - 1 if batch[0].image is not None else 0
        if limit and max(map(len, rows)) + n_seen > limit:
            raise ModelError(f"A prompt with its answer is longer than the {limit} tokens that the model takes.")
        ids, mask = self._padded(rows)
        embeds, merged_mask, _ = self.model.merge(ids, mask, visual_tokens=self._seen(batch), padding_side="left")
        kept = max(len(prompt.target) for prompt in batch) + 1  # the head runs where answers are, and nowhere else
        positions = (merged_mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            inputs_embeds=embeds,
            attention_mask=merged_mask.long(),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=kept,
        ).logits  # (B, kept, vocabulary)
        found = []
        for row, prompt in zip(logits, batch, strict=True):
            target = torch.tensor(prompt.target, device=row.device)
            before = row[-len(target) - 1 : -1].float()  # what stands at a place is predicted by the one before it
            chosen = before.log_softmax(-1).gather(1, target[:, None]).sum()
            found.append((float(chosen), bool((before.argmax(-1) == target).all())))
        return found


class _Until(StoppingCriteria):
    """Ends a row when its text holds a stop string."""

    def __init__(self, stops: Sequence[str], decode: Callable[[Tensor], str]) -> None:
        self.stops, self.decode = stops, decode

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [self.decode(row) for row in input_ids]
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].strip() if places else text
