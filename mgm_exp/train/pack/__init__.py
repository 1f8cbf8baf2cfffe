"""Several trials that train together over one base: the adapters' products are batched, all else is each trial's own.

Each trial is trained by the same loop as alone (:mod:`mgm_exp.train.loop`): its own data order, steps, clipping,
optimizer, schedule, guards, checkpoints, validation points and rows. Only its passes through the LLM are taken
together with those of the others (:mod:`.passes`): the frozen layers see the rows of all trials at once, the adapters
(:mod:`.lora`) each its own rows. :mod:`.trials` lets the trials take turns; :mod:`.compatible` says which can.
"""
