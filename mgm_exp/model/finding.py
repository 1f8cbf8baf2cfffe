"""What a check saw: a name, whether it holds, in words, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_AGAIN = "Merge the run again: mgm-exp merge RUN --out DIR."
_ADVICE = {
    "run": "Merge again if the run went on after the merge; give --run DIR if it is another one.",
    "SHA-256 of shards": "Copy the named files again from where the folder was made, or merge the run again.",
    "SHA-256 of other files": "Copy the named files again, or keep your change and merge again with it.",
    "shards can be read": "Copy the named shards again: a copy or download broke off. Else merge the run again.",
    "index": "Copy model.safetensors.index.json and the named shards again, or merge the run again.",
    "tokenizer": "Copy tokenizer.json and tokenizer_config.json from the base model.",
    "generation config": "Copy generation_config.json from the base model, or merge the run again.",
    "model card": "Restore README.md, or merge again with --license NAME.",
    "LoRA is applied": "Merge again; where B is zero, the run learnt nothing: look at its metrics.jsonl.",
    "logits of merged and base + adapter": "See what else is wrong here; if nothing is, merge the run again.",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `name`, whether it `holds` (None: could not be looked at), and what was seen."""

    name: str
    holds: bool | None
    says: str

    @property
    def advice(self) -> str:
        """What to do where it does not hold."""
        return "" if self.holds is True else _ADVICE.get(self.name, _AGAIN)


def some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more
