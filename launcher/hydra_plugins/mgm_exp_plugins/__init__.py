"""Hydra plugins of mgm_exp. Every Hydra app of the environment imports them: nothing heavy at module level."""
