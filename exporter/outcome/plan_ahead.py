"""What a search would look at and what that would cost, before anything is run. Nothing is loaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.staging import check_space
from ..progress import Progress, silent
from ..recipe import RunOptions
from .candidate import Candidate, mixes
from .goal import SearchRecipe
from .job import prepare_search, step_costs
from .prediction import Predictor, wanted_candidates
from .steps_file import StepsFile, candidate_data

FOLDERS = 3  # that lie on disk at a time: what is made, what it is made from, the best so far


@dataclass(frozen=True)
class SearchAhead:
    """Candidates that are expected to be looked at."""

    predictor: Predictor
    candidates: tuple[Candidate, ...]
    seconds: tuple[float, ...]  # of each by itself
    left_out: dict[str, str]
    minutes: float  # of all, the original's look included
    disk_bytes: int

    def to_data(self) -> dict[str, Any]:
        ahead = zip(self.candidates, self.seconds, strict=True)
        return {
            "candidates": [
                {
                    "label": candidate.label,
                    **candidate_data(candidate),
                    "expected": self.predictor.expect(candidate),
                    "seconds": seconds,
                }
                for candidate, seconds in ahead
            ],
            "left_out": self.left_out,
            "minutes": self.minutes,
            "disk_bytes": self.disk_bytes,
        }


def plan_ahead(
    recipe: SearchRecipe, out: Path, options: RunOptions = RunOptions(), progress: Progress = silent
) -> SearchAhead:
    """Check everything that a search is given; return what it would look at. Raises: InputError, as `search` does."""
    job = prepare_search(recipe, options, progress)
    StepsFile(out, job.depends_on())
    predictor, costs = job.predictor(), step_costs(job)
    candidates = wanted_candidates(predictor, recipe.goal, mixes(job.available))
    num_bytes = FOLDERS * job.compression.source.weights.num_bytes
    check_space(out, num_bytes)
    return SearchAhead(
        predictor,
        tuple(candidates),
        seconds=tuple(costs.seconds_of(candidate, ()) for candidate in candidates),
        left_out=job.left_out,
        minutes=(costs.seconds_of_all(candidates) + costs.expect("measure")) / 60,
        disk_bytes=num_bytes,
    )
