"""One sweeper at work on a search: which trial is next, running it, telling the study what came of it.

:class:`Campaign` is the story; :class:`~mgm_exp.campaign.roster.Roster` knows which trials there are and who works on
them, :class:`~mgm_exp.campaign.rungs.Rungs` who waits to be promoted, and
:class:`~mgm_exp.campaign.constraints.Constraints` which points are not run at all.
"""

from mgm_exp.campaign.campaign import Campaign
from mgm_exp.campaign.constraints import constraints_of

__all__ = ["Campaign", "constraints_of"]
